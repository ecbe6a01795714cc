"""`python -m stages.guard TOKEN`: wait until a run is gone, then end every process it left behind.

A SIGKILLed run ends nothing itself. What it started carries its token in the environment: stages,
their engines' workers, Prefect's temporary server.
"""

import os
import sys
import time
from contextlib import suppress

import psutil

from stages.process import RUN_TOKEN

# Processes that are being started while others are killed are found by the next round.
ROUNDS = 50
SECONDS_BETWEEN_ROUNDS = 0.1


def main(token: str) -> None:
    """Read until the other end of the pipe is closed, which the kernel does for the dead."""
    sys.stdin.buffer.read()
    for _ in range(ROUNDS):
        left = [process for process in psutil.process_iter() if _token(process) == token]
        if not left:
            return
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        time.sleep(SECONDS_BETWEEN_ROUNDS)


def _token(process: psutil.Process) -> str | None:
    if process.pid == os.getpid():
        return None
    try:
        return process.environ().get(RUN_TOKEN)
    except (psutil.Error, OSError):
        return None


if __name__ == "__main__":
    main(sys.argv[1])
