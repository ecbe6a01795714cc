"""Processes that end with the one that started them, however that ends."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Make the kernel kill this process when its parent, with this id, dies (Linux).

    A SIGKILLed parent runs no handlers, so the request is made to the kernel. The thread that
    started this process must live as long as the parent; a parent gone already ends us at once.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
