"""Worker processes: a GPU each, the same bytes, and no run that waits for a dead one."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import processes
import psutil
import pyarrow as pa
import pytest
import system
from pydantic import ValidationError

from pipelines.shards import Dataset, Plan, Shard, map_shards
from rso import gpus
from rso.artifact import Artifact
from rso.config import Beam
from rso.errors import UserError
from rso.parquet import read_shard, write_shard
from rso.progress import WORKER
from schemas import SCHEMAS
from stages.runner import run_stage

NUM_SHARDS = 4


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Workers find the functions of the tests, and claims lie in a folder of the test's own."""
    monkeypatch.setenv("PYTHONPATH", f"{processes.ROOT}:{processes.ROOT}/tests")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "claims"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "claims").mkdir()
    gpus.claim_gpu.cache_clear()
    yield
    gpus.claim_gpu.cache_clear()


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Four shards of one row."""
    source = Dataset(str(tmp_path / "in"), "logps")
    for index in range(NUM_SHARDS):
        row = {"prompt_id": f"{index:016x}", "response_id": "r", "logps": -1.0, "num_tokens": index}
        table = pa.Table.from_pylist([row], schema=SCHEMAS["logps"])
        write_shard(source.directory, "logps", index, NUM_SHARDS, table)
    target = {"logps": Dataset(str(tmp_path / "out"), "logps")}
    return Plan("claim", {"logps": source}, target, str(tmp_path / "counters"), NUM_SHARDS)


@dataclass(frozen=True)
class Claim:
    """Tells what GPU its worker sees, once so many workers have claimed theirs."""

    folder: str
    num_workers: int

    def setup(self) -> None:
        gpus.claim_gpu()
        Path(self.folder, str(os.getpid())).write_text(os.environ["OMP_NUM_THREADS"])

    def __call__(self, engine: None, tables: Mapping[str, pa.Table]) -> Shard:
        end = time.monotonic() + 60
        while len(os.listdir(self.folder)) < self.num_workers:
            assert time.monotonic() < end, "the other workers did not come"
            time.sleep(0.05)
        seen = pa.array([os.environ["CUDA_VISIBLE_DEVICES"]])
        table = tables["logps"]
        place = table.schema.get_field_index("response_id")
        return Shard({"logps": table.set_column(place, table.schema.field(place), seen)}, {})


def claimed(plan: Plan, folder: Path, num_workers: int) -> list[str]:
    """Return the GPU that each shard saw, after a run with so many workers."""
    folder.mkdir()
    map_shards(Claim(str(folder), num_workers), plan, Beam(num_workers=num_workers))
    out = plan.outputs["logps"].directory
    tables = [read_shard(out, "logps", index, NUM_SHARDS) for index in range(NUM_SHARDS)]
    return [table["response_id"][0].as_py() for table in tables]


def test_workers_claim_a_gpu_each(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert sorted(claimed(plan, tmp_path / "workers", 2)) == ["3", "3", "5", "5"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,5"
    threads = [file.read_text() for file in (tmp_path / "workers").iterdir()]
    assert threads == 2 * [str(max(1, len(os.sched_getaffinity(0)) // 2))]


def test_workers_more_than_gpus_are_refused(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    with pytest.raises(UserError, match=r"num_workers is 3, .* 2 GPUs \(3, 5\) .*num_workers=2"):
        claimed(plan, tmp_path / "workers", 3)


def test_workers_without_gpus_claim_nothing(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert claimed(plan, tmp_path / "workers", 2) == NUM_SHARDS * [""]


def test_one_worker_claims_nothing(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert claimed(plan, tmp_path / "workers", 1) == NUM_SHARDS * ["3,5"]
    assert [file.name for file in (tmp_path / "workers").iterdir()] == [str(os.getpid())]
    assert not any((tmp_path / "claims").iterdir())


def worker(code: str, visible: str = "3,5") -> "subprocess.Popen[str]":
    """Start Python code as one of two workers."""
    environment = {**os.environ, gpus.WORKERS: "2", "CUDA_VISIBLE_DEVICES": visible}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


HOLD = "from rso.gpus import claim_gpu; print(claim_gpu(), flush=True); input()"


def test_claim_ends_with_its_process() -> None:
    holders = []
    try:
        for gpu in ("3", "5"):
            holders.append(worker(HOLD))
            assert holders[-1].stdout is not None
            assert holders[-1].stdout.readline().strip() == gpu
        said, _ = worker(HOLD).communicate(timeout=60)
        assert "workers of other runs hold the 2 GPUs (3, 5)" in said
        holders[0].send_signal(signal.SIGKILL)
        holders[0].wait()
        said, _ = worker("from rso.gpus import *; print(claim_gpu(), claim_gpu())").communicate()
        assert said.split() == ["3", "3"]
    finally:
        for holder in holders:
            holder.kill()
            holder.communicate()


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ("0, 2", ["0", "2"]),
        ("2,-1,0", ["2"]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("GPU-8932f937,MIG-GPU-8932f937/1/2", ["GPU-8932f937", "MIG-GPU-8932f937/1/2"]),
    ],
)
def test_visible_gpus_are_those_cuda_would_show(
    given: str, seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert gpus.visible_gpus() == seen


def test_claim_after_cuda_is_initialised_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setenv(gpus.WORKERS, "2")
    monkeypatch.setattr(
        "ctypes.CDLL", lambda name: SimpleNamespace(cuDeviceGetCount=lambda count: 0)
    )
    with pytest.raises(AssertionError, match="initialised CUDA before it claimed"):
        gpus.claim_gpu()


@pytest.mark.slow
def test_worker_whose_gpu_does_not_work_names_it(tiny_llama_dir: str, tmp_path: Path) -> None:
    load = (
        "from rso.models import load_model\n"
        "print(load_model({!r}, dtype='float32', device={!r}).device)"
    )
    said, _ = worker(load.format(tiny_llama_dir, "cpu")).communicate(timeout=120)
    assert said.splitlines()[-1] == "cpu"
    assert not any((tmp_path / "claims").iterdir())
    said, _ = worker(load.format(tiny_llama_dir, "cuda"), "GPU-none,5").communicate(timeout=120)
    assert "UserError: GPU GPU-none of " in said and "cannot be used (" in said


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_worker_with_a_device_of_its_own_claims_nothing(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv(gpus.WORKERS, "2")
    assert gpus.device_of_worker(device) == device
    with pytest.raises(UserError, match="num_workers is 2"):
        gpus.device_of_worker("cuda")


@dataclass(frozen=True)
class Die:
    """Ends the worker with this number, once; until then the others are at work for minutes."""

    folder: str
    number: int
    how: str

    def setup(self) -> None:
        """Nothing to load."""

    def __call__(self, engine: None, tables: Mapping[str, pa.Table]) -> Shard:
        once = Path(self.folder, "once")
        if not once.exists():
            if os.environ[WORKER] != str(self.number):
                time.sleep(600)
            once.touch()
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(3)
        return Shard({"logps": tables["logps"]}, {"shards": 1})


# Beam waits for its workers one after another: one that died must not wait for the one before it.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "how", "said"),
    [(0, "kill", r"was killed \(SIGKILL\)"), (1, "exit", "ended with exit code 3")],
)
@pytest.mark.timeout(120)
def test_worker_that_dies_ends_the_run_with_a_sentence(
    plan: Plan, tmp_path: Path, number: int, how: str, said: str
) -> None:
    function = Die(str(tmp_path), number, how)
    before = psutil.Process().children(recursive=True)
    with pytest.raises(
        UserError, match=rf"claim: a worker process \(\d+, of 2\) {said}.*run again"
    ):
        map_shards(function, plan, Beam(num_workers=2))
    assert set(psutil.Process().children(recursive=True)) <= set(before)
    assert map_shards(function, plan, Beam(num_workers=2)) == {"shards": NUM_SHARDS}


@pytest.mark.timeout(120)
def test_worker_that_cannot_start_ends_the_run_with_a_sentence(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nif 'pipelines.worker' in sys.orig_argv: os._exit(7)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ['PYTHONPATH']}")
    with pytest.raises(UserError, match="ended with exit code 7"):
        map_shards(Die(str(tmp_path), 0, "kill"), plan, Beam(num_workers=2))


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_worker_that_the_system_refuses_ends_the_run(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, start = [], subprocess.Popen

    def refuse_the_second(command: list[str], **options: Any) -> Any:
        if "pipelines.worker" in command:
            started.append(command)
            if len(started) == 2:
                raise BlockingIOError("Resource temporarily unavailable")
        return start(command, **options)

    before = psutil.Process().children(recursive=True)
    monkeypatch.setattr("pipelines.workers.subprocess.Popen", refuse_the_second)
    with pytest.raises(BlockingIOError):
        map_shards(Die(str(tmp_path), 0, "kill"), plan, Beam(num_workers=2))
    assert set(psutil.Process().children(recursive=True)) <= set(before)


def test_worker_processes_are_counted_once() -> None:
    for settings in (
        {"num_workers": 2, "options": {"direct_num_workers": 3}},
        {"options": {"direct_running_mode": "multi_processing"}},
    ):
        with pytest.raises(ValueError, match="set num_workers"):
            Beam(**settings)


TWO = "beam.num_workers=2"


@pytest.mark.slow
def test_stages_with_two_workers_write_the_same_bytes_and_counters(
    finished: system.Run, tmp_path: Path
) -> None:
    run = finished.copy(tmp_path / "store")
    assert set(system.statuses(run, TWO).values()) == {"cached"}
    for stage in ("decode", "score"):
        one = run.artifact(stage)
        two = run_stage(system.graph_of(run.config(TWO)), stage, force=True).artifact
        assert two.manifest.created_at > one.manifest.created_at
        assert two.manifest.counters == one.manifest.counters
        assert files(two) == files(finished.artifact(stage))


@pytest.mark.slow
def test_two_workers_hold_a_vllm_engine_each(finished: system.Run, tmp_path: Path) -> None:
    run = finished.copy(tmp_path / "store")

    def responses(*settings: str) -> list[tuple[str, int, list[int]]]:
        config = run.config("decode.engine=vllm", *settings)
        artifact = run_stage(system.graph_of(config), "decode", force=True).artifact
        rows = artifact.read("candidates").to_pylist()
        return [(row["prompt_id"], row["sample_index"], row["token_ids"]) for row in rows]

    one = responses()
    assert len(one) == 16 * 6
    assert responses(TWO) == one


def files(artifact: Artifact) -> dict[str, bytes]:
    """The bytes of each file but the manifest."""
    folder = Path(artifact.directory)
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["stage", "worker", "interrupted stage"])
@pytest.mark.timeout(120)
def test_stage_and_workers_end_together(finished: system.Run, tmp_path: Path, victim: str) -> None:
    run = finished.copy(tmp_path / "store")
    command = [sys.executable, "-m", "stages", "decode", "--config", str(run.path)]
    for setting in (f"store={run.store}", TWO, "decode.num_samples=4096"):
        command += ["--set", setting]
    with processes.marked(tmp_path / "prefect") as starter:
        stage = starter.start(command, tmp_path / "log")
        end = time.monotonic() + 60
        while len(workers := [p for p in starter.alive() if "pipelines.worker" in p.cmdline()]) < 2:
            assert stage.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.05)
        time.sleep(1)
        if victim == "worker":
            workers[1].kill()
        else:
            stage.send_signal(signal.SIGKILL if victim == "stage" else signal.SIGINT)
        code = stage.wait(timeout=60)
        assert starter.gone_within(5) == []
    if victim == "worker":
        said = (tmp_path / "log").read_text()
        assert code == 2 and re.fullmatch(r"error: decode: a worker process .*\n", said), said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"runner": "DaskRunner", "num_workers": 2}, "num_workers is for FnApiRunner"),
        ({"options": {"direct_running_mode": "multi_processing"}}, "is num_workers here"),
    ],
)
def test_beam_settings_that_say_workers_twice_are_refused(
    settings: dict[str, object], said: str
) -> None:
    with pytest.raises(ValidationError, match=said):
        Beam.model_validate(settings)
