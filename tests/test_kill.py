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


@pytest.mark.parametrize("stage", ["decode", "score"])
def test_stage_killed_at_ten_random_moments_does_only_the_rest(
    tiny_run: system.Run, tmp_path: Path, stage: str
) -> None:
    changes = ("prepare.prompts_per_shard=1", "decode.num_prompts=36", "decode.num_samples=24")
    run = system.Run(tiny_run.path, tmp_path / "store")
    system.run_all(run.config(*changes), until="score")
    never = run.artifact(stage, *changes)
    shutil.move(never.directory, tmp_path / "never")
    output = {"decode": "candidates", "score": "rewards"}[stage]
    # a shard is done when its counters are there; its rows are written before
    done = f"{stage}/*.work/scratch/**/{stage}-*-of-*[0-9].json"
    command = rso("stage", stage, "-c", run.path, "--set", f"store={run.store}")
    for change in changes:
        command += ["--set", change]
    moments = random.Random(20260101)
    before: dict[str, int] = {}
    with processes.marked(tmp_path / "prefect") as starter:
        for kill in range(10):
            process = starter.start(command, tmp_path / "log")
            begun = time.monotonic()
            # most kills fall between two shards or within one, some on the start
            wanted = len(before) + moments.choice([0, 1, 1, 2])
            while len(finished_shards(run, done, output)) < wanted:
                log = (tmp_path / "log").read_text()
                assert process.poll() is None and time.monotonic() - begun < 60, log
                time.sleep(0.005)
            time.sleep(moments.uniform(0, 0.2))
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert starter.gone_within(5) == []
            after = finished_shards(run, done, output)
            assert before.items() <= after.items(), f"kill {kill}: a finished shard was done again"
            before = after
        total = len(list((tmp_path / "never" / output).glob("*.parquet")))
        assert 5 < len(before) < total
        ended = starter.run(command, timeout=120)
        assert ended.returncode == 0, ended.stderr
    artifact = system.Run(run.path, run.store).artifact(stage, *changes)
    assert artifact.manifest.rows[output] == 36 * 24
    for file in sorted((tmp_path / "never" / output).glob("*.parquet")):
        again = Path(artifact.directory, output, file.name)
        assert again.read_bytes() == file.read_bytes()
        assert before.get(file.name) in (None, again.stat().st_mtime_ns)
    assert artifact.manifest.counters == never.manifest.counters


def finished_shards(run: system.Run, done: str, output: str) -> dict[str, int]:
    """The files of `output` whose shard is done, and when each was written."""
    found = {}
    for counters in run.store.glob(done):
        work = next(parent for parent in counters.parents if parent.name.endswith(".work"))
        number = counters.stem.split("-", 1)[1]
        file = work / output / f"part-{number}.parquet"
        found[file.name] = file.stat().st_mtime_ns
    return found
