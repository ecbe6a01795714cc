"""A stage as a separate process, which ends when the process that started it ends."""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Sequence

from rso.parent import die_with

# Exit codes of a stage for a defect of rso and for a mistake of the user.
DEFECT, USER_MISTAKE = 1, 2
# Environment variable by which the guard recognises the processes of a run.
RUN_TOKEN = "RSO_RUN"


def stage_command(stage: str, config: str, overrides: Sequence[str]) -> list[str]:
    """Return the command line that runs one stage."""
    settings = [part for override in overrides for part in ("--set", override)]
    return [sys.executable, "-m", "stages", stage, "--config", config, *settings]


def run_stage_process(stage: str, config: str, overrides: Sequence[str]) -> int:
    """Run a stage in a new process group and return its exit code.

    The group is killed when the stage ends, and also when an interrupt ends the wait.
    """
    environment = {**os.environ, "RSO_PARENT": str(os.getpid())}
    if not sys.stderr.isatty():
        # In a log, bars of other libraries are control characters. Ours are one line per minute.
        environment.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    process = subprocess.Popen(
        stage_command(stage, config, overrides), start_new_session=True, env=environment
    )
    try:
        return process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def guard_this_run() -> None:
    """Start a process that kills everything this process has started, once this process ends.

    `die_with_parent` covers only our own stages; see `stages.guard`.
    """
    token = secrets.token_hex(16)
    # Nothing is written to the pipe. Its write end stays open until this process ends, in any way.
    reading, _ = os.pipe()
    subprocess.Popen(
        [sys.executable, "-m", "stages.guard", token],
        stdin=reading,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # Ctrl-C goes to the whole process group, and the guard must survive it.
        start_new_session=True,
    )
    os.close(reading)
    os.environ[RUN_TOKEN] = token


def die_with_parent() -> None:
    """End this stage when the process that started it by `run_stage_process` ends.

    Does nothing for a stage that was started in another way.
    """
    parent = os.environ.get("RSO_PARENT")
    if parent is not None:
        die_with(int(parent))
