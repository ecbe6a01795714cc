"""SIGKILL of `rso run` at random moments: no orphan, nothing half there, nothing done twice."""

import random
import re
import shutil
import signal
import time
from pathlib import Path

import processes
import pytest
import system
from processes import rso

from rso.artifact import Store
from rso.lock import is_locked

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
FINGERPRINT = re.compile("[0-9a-f]{64}")


def made(store: Path) -> dict[str, str]:
    """Return when each artifact was made; every byte of each is checked."""
    opened = Store(str(store))
    found = {}
    for folder in store.glob("*/*"):
        if not folder.is_dir() or folder.name.endswith(".work"):
            continue
        assert FINGERPRINT.fullmatch(folder.name), folder
        artifact = opened.find(folder.parent.name, folder.name, verify=True)
        assert artifact is not None, f"{folder} is only half there"
        found[artifact.stage] = artifact.manifest.created_at
    return found


def test_run_killed_at_random_moments_goes_on_and_completes(
    tiny_run: system.Run, finished: system.Run, tmp_path: Path
) -> None:
    # Two parts of the run, so that every kill falls on stages that have yet to run: from nothing
    # to the candidates, and from the pairs (made by another run) to the report.
    moments = random.Random(20240101)
    run = system.Run(tiny_run.path, tmp_path / "store")
    with processes.marked(tmp_path / "prefect") as starter:
        command = rso("run", run.path, "--set", f"store={run.store}")
        before: dict[str, str] = {}
        for kill in range(5):
            if kill == 3:
                before |= adopt(finished, run, until="pair")
            process = starter.start(command, tmp_path / "log")
            if kill == 0:
                time.sleep(moments.uniform(0.1, 1.0))
            else:
                wait_for_work(run, moments.uniform(0.0, 9.0))
            assert process.poll() is None, (tmp_path / "log").read_text()
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert starter.gone_within(5) == []
            after = made(run.store) if run.store.exists() else {}
            assert before.items() <= after.items(), "a finished stage was done again"
            before = after
        done = starter.run(command, timeout=300)
        assert done.returncode == 0, done.stderr
        after = made(run.store)
        assert before.items() <= after.items()
        assert list(after) and set(after) == set(run.graph().table)
        assert not list(run.store.glob("*/*.work"))
        for name in run.graph().table:
            if name != "report":
                assert (
                    run.artifact(name).manifest.digests == finished.artifact(name).manifest.digests
                )
        assert starter.gone_within(10) == []


def wait_for_work(run: system.Run, seconds: float) -> None:
    """Wait until a stage is at work, and then so many seconds."""
    begun = time.monotonic()
    while not any(is_locked(str(path)) for path in run.store.glob("*/*.lock")):
        assert time.monotonic() - begun < 120, "no stage began"
        time.sleep(0.05)
    time.sleep(seconds)


def adopt(finished: system.Run, run: system.Run, until: str) -> dict[str, str]:
    """Give a run the finished artifacts of another up to a stage, where it has none itself."""
    adopted = {}
    for name in finished.graph().table:
        artifact = finished.artifact(name)
        target = run.store / name / artifact.fingerprint
        if not target.exists():
            shutil.rmtree(f"{target}.work", ignore_errors=True)
            shutil.copytree(artifact.directory, target)
            adopted[name] = artifact.manifest.created_at
        if name == until:
            return adopted
    raise AssertionError(until)


def test_stage_killed_while_training_goes_on_from_its_checkpoint(
    finished: system.Run, tmp_path: Path
) -> None:
    run = finished.copy(tmp_path / "store")
    change = "train_policy.epochs=30"
    command = rso("stage", "train_policy", "-c", run.path, "--set", f"store={run.store}")
    command += ["--set", change, "--json"]
    with processes.marked(tmp_path / "prefect") as starter:
        process = starter.start(command, tmp_path / "log")
        begun = time.monotonic()
        while not list(run.store.glob("train_policy/*.work/scratch/**/checkpoint-*")):
            assert process.poll() is None and time.monotonic() - begun < 120
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert run.graph(change).find("train_policy") is None
        done = starter.run(command, timeout=120)
        assert done.returncode == 0, done.stderr
    whole = finished.copy(tmp_path / "whole")
    with processes.marked(tmp_path / "prefect") as starter:
        command = rso("stage", "train_policy", "-c", run.path, "--set", f"store={whole.store}")
        done = starter.run([*command, "--set", change], timeout=120)
        assert done.returncode == 0, done.stderr
    killed, never = (r.artifact("train_policy", change).manifest for r in (run, whole))
    assert killed.digests == never.digests
    assert killed.counters["steps"] == never.counters["steps"] == 120
