"""Real processes: two at once, SIGKILL at any moment, SIGSTOP past the lease."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import bucket  # noqa: F401
import pytest
from store_build import FINGERPRINT, LEASE_SECONDS, STAGE

from rso.artifact import Artifact, Store

SCRIPT = str(Path(__file__).with_name("store_build.py"))
NUM_SHARDS = 6
Start = Callable[[float], "subprocess.Popen[str]"]


@pytest.fixture(params=["local", "bucket"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"bucket://{tmp_path}/store" if request.param == "bucket" else str(tmp_path / "store")


@pytest.fixture
def start(root: str, tmp_path: Path) -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def start(seconds_per_shard: float) -> "subprocess.Popen[str]":
        command = [sys.executable, SCRIPT, root, str(NUM_SHARDS), str(seconds_per_shard)]
        environment = os.environ | {"RSO_CACHE_DIR": str(tmp_path / "cache")}
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def finish(process: "subprocess.Popen[str]") -> list[str]:
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0, printed
    return printed.splitlines()


def read_until(process: "subprocess.Popen[str]", line: str) -> None:
    assert process.stdout is not None
    for printed in process.stdout:
        if printed.strip() == line:
            return
    raise AssertionError(f"{line!r} was never printed")


def whole(root: str) -> Artifact:
    """Return the artifact after every byte of it was checked, and nothing else is there."""
    store = Store(root, lease_seconds=LEASE_SECONDS)
    artifact = store.find(STAGE, FINGERPRINT, verify=True)
    assert artifact is not None
    assert artifact.read("rewards").num_rows == 50 * NUM_SHARDS
    names = {name for name in store._files.children(STAGE) if store._files.sizes(f"{STAGE}/{name}")}
    assert {name for name in names if not name.endswith(".lock")} == {FINGERPRINT}
    return artifact


def test_store_two_processes_one_works_the_other_takes_its_result(root: str, start: Start) -> None:
    first = start(0.2)
    read_until(first, "started")
    second = finish(start(0.2))
    assert finish(first)[-1] == "committed"
    assert second[-1] == "existing" and "wrote 0" not in second
    assert sum("waiting for its result" in line for line in second) == 1
    whole(root)


def test_store_killed_holder_is_followed_by_the_one_that_waits(root: str, start: Start) -> None:
    first = start(0.5)
    read_until(first, "wrote 1")
    second = start(0.0)
    time.sleep(1.5)
    first.send_signal(signal.SIGKILL)
    printed = finish(second)
    assert printed[-1] == "committed" and "kept 0" in printed
    whole(root)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_store_sigkill_at_random_moments_leaves_no_half_artifact(
    root: str, start: Start, seed: int
) -> None:
    moments = random.Random(f"{root}{seed}")
    store = Store(root, lease_seconds=LEASE_SECONDS)
    for _ in range(2):
        process = start(0.05)
        read_until(process, "started")
        time.sleep(moments.uniform(0.0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = store.find(STAGE, FINGERPRINT, verify=True)
        assert found is None or found.read("rewards").num_rows == 50 * NUM_SHARDS
    assert finish(start(0.0))[-1] in ("committed", "existing")
    whole(root)


def test_store_run_after_a_kill_writes_only_what_is_missing(root: str, start: Start) -> None:
    process = start(0.6)
    read_until(process, "wrote 2")
    # On a remote store a finished shard goes up with the next mirroring.
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert Store(root).find(STAGE, FINGERPRINT) is None
    printed = finish(start(0.0))
    assert {"kept 0", "kept 1"} <= set(printed)
    assert {"wrote 3", "wrote 4", "wrote 5", "committed"} <= set(printed)
    whole(root)


@pytest.mark.slow
@pytest.mark.parametrize(("root", "step"), [("local", 7), ("bucket", 31)], indirect=["root"])
def test_store_sigkill_at_many_file_operations_loses_nothing(
    root: str, step: int, tmp_path: Path
) -> None:
    def run(action: str, number: int) -> "subprocess.CompletedProcess[str]":
        script = str(Path(SCRIPT).with_name("store_kill_points.py"))
        return subprocess.run(
            [sys.executable, script, root, action, str(number), str(tmp_path / "old")],
            capture_output=True,
            text=True,
            timeout=60,
            env=os.environ | {"RSO_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
        )

    moment = 1
    while True:
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
        assert run("build", 0).returncode == 0
        shutil.copy(tmp_path / "store" / STAGE / FINGERPRINT / "manifest.json", tmp_path / "old")
        killed = run("kill", moment)
        if killed.returncode == 0:
            break
        assert killed.returncode == -signal.SIGKILL, (moment, killed.stderr)
        checked = run("check", 0)
        assert checked.returncode == 0, (moment, checked.stderr)
        moment += step
    assert moment > 6 * step


@pytest.mark.parametrize("root", ["bucket"], indirect=True)
def test_store_stopped_holder_is_overtaken_and_gives_up(root: str, start: Start) -> None:
    first = start(0.3)
    read_until(first, "wrote 1")
    first.send_signal(signal.SIGSTOP)
    assert finish(start(0.0))[-1] == "committed"
    manifest = whole(root).manifest
    first.send_signal(signal.SIGCONT)
    printed, _ = first.communicate(timeout=60)
    assert first.returncode == 1 and "LockLost" in printed and "gives up" in printed
    assert whole(root).manifest == manifest


@pytest.mark.parametrize("root", ["local"], indirect=True)
def test_store_lock_is_not_kept_by_a_child_that_outlives_its_parent(
    root: str, tmp_path: Path
) -> None:
    code = (
        "import os, sys, time\nsys.path[:0] = sys.argv[2:]\n"
        "from store_build import *\n"
        "with Store(sys.argv[1]).build(STAGE, FINGERPRINT):\n"
        "    if os.fork() == 0:\n        time.sleep(20)\n        os._exit(0)\n"
        "    time.sleep(0.3)\n    os.kill(os.getpid(), 9)\n"
    )
    paths = [str(Path(SCRIPT).parent), str(Path(SCRIPT).parents[1])]
    subprocess.run([sys.executable, "-c", code, root, *paths], stdout=subprocess.DEVNULL)
    started = time.monotonic()
    with Store(root).build(STAGE, FINGERPRINT) as work:
        assert work.existing is None
    assert time.monotonic() - started < 5
