"""A stage as a process of its own that dies with whoever started it."""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Sequence

from rso.parent import die_with

# Exit codes of a stage: ours and the user's.
DEFECT, USER_MISTAKE = 1, 2
# Environment variable by which the guard knows what belongs to a run.
RUN_TOKEN = "RSO_RUN"


def stage_command(stage: str, config: str, overrides: Sequence[str]) -> list[str]:
    """Return the command line that runs one stage."""
    settings = [part for override in overrides for part in ("--set", override)]
    return [sys.executable, "-m", "stages", stage, "--config", config, *settings]


def run_stage_process(stage: str, config: str, overrides: Sequence[str]) -> int:
    """Run a stage in a new process group and return its exit code; an interrupt ends the group."""
    environment = {**os.environ, "RSO_PARENT": str(os.getpid())}
    if not sys.stderr.isatty():
        # Bars of other libraries are control characters in a log; ours is a line a minute there.
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
    """Have a process beside this one end all that this one starts, once this one is gone.

    `die_with_parent` reaches our own stages alone; see `stages.guard`.
    """
    token = secrets.token_hex(16)
    # Nobody writes: the end that stays open here is closed when this process ends, however.
    reading, _ = os.pipe()
    subprocess.Popen(
        [sys.executable, "-m", "stages.guard", token],
        stdin=reading,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # Ctrl-C goes to the whole group, and the guard must outlive it.
        start_new_session=True,
    )
    os.close(reading)
    os.environ[RUN_TOKEN] = token


def die_with_parent() -> None:
    """End with the process that started this stage by `run_stage_process`, if one did."""
    parent = os.environ.get("RSO_PARENT")
    if parent is not None:
        die_with(int(parent))
