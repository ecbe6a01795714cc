"""Real processes of a test: started with a mark of their own, found by it, and ended."""

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
MARK = "RSO_TEST_MARK"


class Marked:
    """Starts processes that carry a mark in their environment, as their children do."""

    def __init__(self, home: Path) -> None:
        self._mark = secrets.token_hex(8)
        self.environment = {
            **os.environ,
            MARK: self._mark,
            "PREFECT_HOME": str(home),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "200",
        }
        for name in list(self.environment):
            if name in ("PREFECT_API_URL", "RSO_CONFIG") or name.startswith("PREFECT_LOGGING_"):
                del self.environment[name]

    def start(self, command: Sequence[str], log: Path) -> "subprocess.Popen[bytes]":
        """Start a command in the project's folder; what it prints goes to `log`."""
        with log.open("ab") as file:
            return subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stdout=file, stderr=subprocess.STDOUT
            )

    def run(self, command: Sequence[str], timeout: float) -> "subprocess.CompletedProcess[str]":
        """Run a command in the project's folder."""
        return subprocess.run(
            command,
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def alive(self) -> list[psutil.Process]:
        """Return the processes of this mark, zombies aside."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.environ().get(MARK) == self._mark:
                    found.append(process)
        return found

    def gone_within(self, seconds: float) -> list[str]:
        """Wait until no process is left; return the command lines of those that stay."""
        end = time.monotonic() + seconds
        while self.alive() and time.monotonic() < end:
            time.sleep(0.1)
        left = []
        for process in self.alive():
            with suppress(psutil.Error):
                left.append(" ".join(process.cmdline()))
        return left


@contextmanager
def marked(home: Path) -> Iterator[Marked]:
    """Give a starter of processes and end at the end all that it started."""
    starter = Marked(home)
    try:
        yield starter
    finally:
        for _ in range(20):
            for process in starter.alive():
                with suppress(psutil.Error):
                    process.kill()
            if not starter.alive():
                break
            time.sleep(0.1)


def rso(*arguments: object) -> list[str]:
    """Return the command line of `rso`."""
    return [sys.executable, "-c", "from rso.cli import main; main()", *map(str, arguments)]
