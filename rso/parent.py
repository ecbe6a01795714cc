"""Processes that end when the process that started them ends, in whatever way it ends."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Make the kernel kill this process when its parent, with the id `parent`, dies (Linux only).

    A parent that is killed by SIGKILL runs no handlers, so the kernel is asked. The thread that
    started this process must live as long as the parent: the kernel acts when that thread ends. If
    the parent is already gone, this process exits at once with code 1.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
