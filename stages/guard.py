"""`python -m stages.guard TOKEN`: wait until a run ends, then kill every process it left behind.

A run that is killed by SIGKILL cannot end its processes itself. All processes that it started have
its token in their environment: stages, workers of their engines, Prefect's temporary server.
"""

import os
import sys
import time
from contextlib import suppress

import psutil

from stages.process import RUN_TOKEN

# A round may miss a process that starts during it. The next round finds it.
ROUNDS = 50
SECONDS_BETWEEN_ROUNDS = 0.1


def main(token: str) -> None:
    """Wait until standard input closes, then kill all processes that carry `token`.

    Standard input is a pipe from the run. The kernel closes it when the run ends, in any way.
    """
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
