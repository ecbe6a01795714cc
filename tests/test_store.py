"""The store: what is committed is whole, what is broken is noticed, nothing is lost."""

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import bucket  # noqa: F401
import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from store_build import FINGERPRINT, STAGE, commit, rewards

from rso.artifact import Artifact, LockLost, Store, StoreError, digest_directory
from rso.code_digest import CodeDigest
from rso.content_digest import table_digest
from rso.errors import UserError
from rso.files import Files, writing
from rso.fingerprint import fingerprint
from rso.lock import lease
from rso.manifest import BadManifest, read_manifest
from rso.parquet import (
    DuplicateRows,
    UnreadableShard,
    has_shard,
    num_shards,
    read_shard,
    write_shard,
)
from schemas import SCHEMAS, SchemaMismatch

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(params=["local", "bucket", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RSO_CACHE_DIR", str(tmp_path / "cache"))
    return {
        "local": str(tmp_path / "store"),
        "bucket": f"bucket://{tmp_path}/store",
        "memory": f"memory://{tmp_path.name}/{fingerprint(str(tmp_path))}",
    }[request.param]


@pytest.fixture
def store(root: str) -> Store:
    return Store(root, lease_seconds=4)


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def build(
    store: Store, fp: str = FINGERPRINT, *, shift: float = 0.0, force: bool = False
) -> Artifact:
    with store.build(STAGE, fp, force=force) as work:
        assert work.existing is None
        for index in range(2):
            work.write_shard("rewards", index, 2, rewards(index, shift=shift))
        Path(work.scratch, "checkpoint").write_text("not part of it")
        Path(work.output("report"), "report.html").write_text("<p>report</p>")
        return commit(work)


def siblings(store: Store) -> set[str]:
    # `memory://` keeps empty directories, which object stores do not have.
    names = store._files.children(STAGE)
    found = {name for name in names if store._files.sizes(f"{STAGE}/{name}")}
    return {name.removeprefix(FINGERPRINT) for name in found}


def test_store_build_then_find_reads_back_what_was_written(store: Store) -> None:
    artifact = build(store)
    found = store.find(STAGE, FINGERPRINT, verify=True)
    assert found is not None and found.manifest == artifact.manifest
    table = found.read("rewards")
    assert table.num_rows == found.rows("rewards") == 100
    assert table.schema.equals(SCHEMAS["rewards"], check_metadata=True)
    expected = pa.concat_tables([rewards(0), rewards(1)]).sort_by(
        [("prompt_id", "ascending"), ("response_id", "ascending")]
    )
    assert table.equals(expected)
    assert found.num_shards("rewards") == 2 and found.outputs == ["report", "rewards"]
    assert Path(found.local("report"), "report.html").read_text() == "<p>report</p>"
    assert found.digest("rewards") == digest_directory(found.local("rewards"), "rewards")
    assert siblings(store) == {""}


def test_store_dataset_opens_with_plain_pandas(store: Store, root: str) -> None:
    directory = build(store).output("rewards")
    if root.startswith("bucket"):
        directory = directory.removeprefix("bucket://")
    assert len(pd.read_parquet(directory)) == 100


def test_store_second_build_finds_the_first(store: Store) -> None:
    artifact = build(store)
    with store.build(STAGE, FINGERPRINT) as work:
        assert work.existing is not None
        assert work.existing.manifest == artifact.manifest


def test_store_same_rows_make_the_same_bytes_and_digests(tmp_path: Path) -> None:
    first = build(Store(str(tmp_path / "a"))).manifest
    second = build(Store(str(tmp_path / "b"))).manifest
    assert first.files == second.files and first.digests == second.digests


def test_store_manifest_keeps_what_was_committed(store: Store) -> None:
    settings = {"beta": float("inf"), "init": None, "list": [1, 1.0]}
    with store.build(STAGE, FINGERPRINT) as work:
        work.write_shard("rewards", 0, 1, rewards(0))
        work.commit(
            inputs={"candidates": "d" * 64},
            externals={"model": {"sha256": "e"}},
            settings=settings,
            config={"store": "x"},
            code=CodeDigest("c" * 64, {"rso.losses": "f"}),
            counters={"rows": np.int64(3), "mean": np.float32(0.5)},  # type: ignore[dict-item]
            curves={"loss": [{"step": 1, "loss": float("nan")}]},
            timings={"seconds": 1.5},
            peak_memory_bytes=7,
            versions={"python": "3.11"},
        )
    found = store.find(STAGE, FINGERPRINT, verify=True)
    assert found is not None
    manifest = found.manifest
    assert manifest.settings == settings and manifest.inputs == {"candidates": "d" * 64}
    assert manifest.code == {"rso.losses": "f"} and manifest.code_digest == "c" * 64
    assert manifest.counters == {"rows": 3, "mean": 0.5} and manifest.peak_memory_bytes == 7
    assert type(manifest.counters["rows"]) is int
    assert np.isnan(manifest.curves["loss"][0]["loss"])


def test_store_failed_build_leaves_its_work_and_no_artifact(store: Store) -> None:
    def fail() -> None:
        with store.build(STAGE, FINGERPRINT) as work:
            work.write_shard("rewards", 0, 2, rewards(0))
            Path(work.scratch, "checkpoint").write_text("step 7")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fail()
    assert store.find(STAGE, FINGERPRINT) is None and store.artifacts() == []
    with store.build(STAGE, FINGERPRINT) as work:
        assert work.has_shard("rewards", 0, 2) and not work.has_shard("rewards", 1, 2)
        assert work.shard("rewards", 0, 2).num_rows == 50
        assert Path(work.scratch, "checkpoint").read_text() == "step 7"
        work.write_shard("rewards", 1, 2, rewards(1))
        artifact = commit(work)
    assert artifact.rows("rewards") == 100 and siblings(store) == {""}
    assert all("checkpoint" not in entry.path for entry in artifact.manifest.files)


def test_store_commit_without_all_shards_is_refused(store: Store) -> None:
    with store.build(STAGE, FINGERPRINT) as work:
        work.write_shard("rewards", 1, 2, rewards(0))
        with pytest.raises(UnreadableShard, match=r"part-00000-of-00002.parquet is missing"):
            commit(work)
    assert store.find(STAGE, FINGERPRINT) is None


def test_store_commit_drops_what_a_killed_writer_left(store: Store) -> None:
    with store.build(STAGE, FINGERPRINT) as work:
        work.write_shard("rewards", 0, 1, rewards(0))
        Path(work.output("rewards"), ".part-00000-of-00001.parquet.1.ab.tmp").write_text("half")
        artifact = commit(work)
    assert [entry.path for entry in artifact.manifest.files] == [
        "rewards/part-00000-of-00001.parquet"
    ]
    assert store.verify(artifact) == []


@pytest.mark.parametrize("is_forced", [False, True])
def test_store_build_killed_after_its_manifest_is_finished(
    store: Store, is_forced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = build(store) if is_forced else None
    with store.build(STAGE, FINGERPRINT, force=is_forced) as work:
        work.write_shard("rewards", 0, 1, rewards(0, shift=1.0))
        monkeypatch.setattr(work, "_publish", lambda manifest: None)
        commit(work)
    # On a remote store the manifest goes up with the commit alone, so there it is put by hand.
    if not store._files.is_local:
        pytest.skip("covered by the kill tests")
    with store.build(STAGE, FINGERPRINT, force=is_forced) as work:
        assert work.existing is not None
        assert work.existing.read("rewards")["reward"][0].as_py() == 1.0
    assert siblings(store) == ({"", ".replaced-1"} if old else {""})


def test_store_force_sets_the_old_artifact_aside_only_with_the_commit(store: Store) -> None:
    old = build(store)
    with store.build(STAGE, FINGERPRINT, force=True) as work:
        assert work.existing is None
        work.write_shard("rewards", 0, 1, rewards(0, shift=1.0))
        found = store.find(STAGE, FINGERPRINT, verify=True)
        assert found is not None and found.manifest == old.manifest
        new = commit(work)
    found = store.find(STAGE, FINGERPRINT, verify=True)
    assert found is not None and found.manifest == new.manifest != old.manifest
    assert siblings(store) == {"", ".replaced-1"}
    aside = store._files.read(f"{STAGE}/{FINGERPRINT}.replaced-1/manifest.json")
    assert aside is not None and read_manifest(aside, "aside") == old.manifest


def test_store_failed_force_keeps_the_old_artifact(store: Store) -> None:
    old = build(store)
    with pytest.raises(RuntimeError), store.build(STAGE, FINGERPRINT, force=True) as work:
        work.write_shard("rewards", 0, 1, rewards(0))
        raise RuntimeError
    found = store.find(STAGE, FINGERPRINT, verify=True)
    assert found is not None and found.manifest == old.manifest


def overwrite(store: Store, path: str, data: bytes) -> None:
    inner = store._files.path(f"{STAGE}/{FINGERPRINT}/{path}")
    if store._files.is_local:
        Path(inner).write_bytes(data)
    else:
        store._files.fs.pipe_file(inner, data)


def content(store: Store, path: str) -> bytes:
    data = store._files.read(f"{STAGE}/{FINGERPRINT}/{path}")
    assert data is not None
    return data


PATHS = ["rewards/part-00001-of-00002.parquet", "report/report.html", "manifest.json"]


@pytest.mark.parametrize("path", PATHS)
def test_store_any_flipped_byte_is_found_by_verify(store: Store, path: str) -> None:
    artifact = build(store)
    data = content(store, path)
    assert store.verify(artifact) == []
    for position in {0, len(data) // 3, len(data) // 2, len(data) - 1}:
        flipped = bytearray(data)
        flipped[position] ^= 1
        overwrite(store, path, bytes(flipped))
        assert any(Path(path).name in problem for problem in store.verify(artifact)), position
    assert store.find(STAGE, FINGERPRINT, verify=True) is None
    assert siblings(store) == {".corrupt-1"}


def test_store_flipped_byte_in_a_page_is_noticed_on_reading(local: Store) -> None:
    artifact = build(local)
    path = Path(artifact.shards("rewards")[0])
    data = bytearray(path.read_bytes())
    metadata = pq.ParquetFile(path).metadata.row_group(0).column(1)
    data[metadata.data_page_offset + metadata.total_compressed_size // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UnreadableShard, match=r"rso verify"):
        artifact.shard("rewards", 0)


@pytest.mark.parametrize("path", PATHS)
def test_store_changed_size_or_missing_file_is_found_at_find_and_set_aside(
    store: Store, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    for number, change in enumerate(("longer", "shorter"), start=1):
        build(store)
        data = content(store, path)
        overwrite(store, path, data + b"x" if change == "longer" else data[:-3])
        with caplog.at_level(logging.WARNING):
            assert store.find(STAGE, FINGERPRINT) is None
        assert siblings(store) == {f".corrupt-{n}" for n in range(1, number + 1)}
    assert caplog.text.count("is corrupt and was set aside as") == 2
    build(store)
    store._files.remove(f"{STAGE}/{FINGERPRINT}/{path}")
    assert store.find(STAGE, FINGERPRINT) is None
    if path != "manifest.json" or store._files.is_local:
        assert "" not in siblings(store)
    assert build(store).rows("rewards") == 100


def test_store_foreign_file_is_found_by_verify_and_not_read(local: Store) -> None:
    artifact = build(local)
    shutil.copy(artifact.shards("rewards")[0], f"{artifact.output('rewards')}/extra.parquet")
    assert local.verify(artifact) == ["rewards/extra.parquet is in no manifest"]
    assert artifact.read("rewards").num_rows == 100


def test_store_artifacts_are_newest_first_and_open_by_prefix(store: Store) -> None:
    names = ["aa" * 32, "ab" * 32, "0c" * 32]
    for fp in names:
        build(store, fp)
    assert [a.fingerprint for a in store.artifacts(STAGE)] == names[::-1]
    assert [a.fingerprint for a in store.artifacts()] == names[::-1]
    assert store.open(STAGE).fingerprint == names[2]
    assert store.open(f"{STAGE}/ab").fingerprint == names[1]
    with pytest.raises(UserError, match=r"fits 2 artifacts"):
        store.open(f"{STAGE}/a")
    for text in ("decode", f"{STAGE}/f"):
        with pytest.raises(UserError, match=r"has no artifact"):
            store.open(text)


def test_store_that_does_not_exist_is_empty_and_not_made(store: Store, tmp_path: Path) -> None:
    assert store.artifacts() == [] and store.find(STAGE, FINGERPRINT) is None
    assert not (tmp_path / "store").exists()


def test_artifact_unknown_output_is_a_user_error(store: Store) -> None:
    artifact = build(store)
    with pytest.raises(UserError, match=r"no output 'pairs'; expected one of report, rewards"):
        artifact.output("pairs")
    with pytest.raises(UserError, match=r"report is no dataset; expected one of rewards"):
        artifact.read("report")


def test_manifest_of_a_later_format_is_refused(local: Store) -> None:
    found = json.loads(build(local).manifest.to_bytes())
    found["format"] += 1
    with pytest.raises(BadManifest, match=r"format 2, expected 1"):
        read_manifest(json.dumps(found).encode(), "x")


# Shards


def test_write_shard_duplicate_keys_are_refused_with_the_row(tmp_path: Path) -> None:
    table = pa.concat_tables([rewards(0), rewards(0).slice(3, 2)])
    with pytest.raises(DuplicateRows, match=r"2 rows repeat .*'response_id': '0+2d'"):
        write_shard(str(tmp_path), "rewards", 0, 1, table)
    assert not has_shard(str(tmp_path), 0, 1) and list(tmp_path.iterdir()) == []


def test_write_shard_wrong_schema_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SchemaMismatch, match=r"'reward' is missing"):
        write_shard(str(tmp_path), "rewards", 0, 1, rewards(0).drop_columns("reward"))


def test_write_shard_empty_table_is_a_shard(tmp_path: Path) -> None:
    assert write_shard(str(tmp_path), "rewards", 0, 1, rewards(0).slice(0, 0)) == 0
    assert read_shard(str(tmp_path), "rewards", 0, 1).num_rows == 0


def test_write_shard_columns_in_another_order_make_the_same_bytes(tmp_path: Path) -> None:
    table = rewards(0)
    for name, rows in {
        "a": table,
        "b": table.select(table.column_names[::-1]),
        "c": pa.concat_tables([table.slice(20), table.slice(0, 20)]),
    }.items():
        write_shard(str(tmp_path / name), "rewards", 0, 1, rows)
    written = {path.read_bytes() for path in tmp_path.glob("*/*.parquet")}
    assert len(written) == 1


def test_shards_have_page_checksums_and_fixed_row_groups(tmp_path: Path) -> None:
    write_shard(str(tmp_path), "rewards", 0, 1, rewards(0, count=70_000))
    found = pq.ParquetFile(tmp_path / "part-00000-of-00001.parquet").metadata
    assert [found.row_group(i).num_rows for i in range(3)] == [32_768, 32_768, 4_464]


def test_num_shards_mixed_layouts_are_refused(tmp_path: Path) -> None:
    write_shard(str(tmp_path), "rewards", 0, 1, rewards(0))
    assert num_shards(str(tmp_path)) == 1
    write_shard(str(tmp_path), "rewards", 0, 2, rewards(0))
    with pytest.raises(UnreadableShard, match=r"2 files of \[1, 2\]"):
        num_shards(str(tmp_path))


# Content digests

COLUMNS = {
    "text": (pa.string(), st.text(max_size=5)),
    "large": (pa.large_string(), st.text(max_size=3)),
    "whole": (pa.int32(), st.integers(-5, 5)),
    "real": (pa.float32(), st.sampled_from([0.0, -0.0, 1.5, float("nan"), float("inf")])),
    "flag": (pa.bool_(), st.booleans()),
    "list": (pa.list_(pa.int32()), st.lists(st.none() | st.integers(0, 3), max_size=3)),
    "nested": (
        pa.list_(pa.list_(pa.string())),
        st.lists(st.lists(st.text(max_size=2)), max_size=2),
    ),
    "map": (
        pa.map_(pa.string(), pa.float32()),
        st.dictionaries(st.text(max_size=2), st.none() | st.sampled_from([0.5, 1.0])).map(
            lambda d: list(d.items())
        ),
    ),
}
ROWS = st.lists(
    st.fixed_dictionaries({name: st.none() | values for name, (_, values) in COLUMNS.items()}),
    max_size=8,
)


def table(rows: list[dict[str, object]]) -> pa.Table:
    schema = pa.schema({name: type_ for name, (type_, _) in COLUMNS.items()})
    return pa.Table.from_pylist(rows, schema=schema)


@given(ROWS, st.integers(0, 8), st.integers(0, 8))
def test_table_digest_chunks_and_offsets_do_not_count(
    rows: list[dict[str, object]], first: int, second: int
) -> None:
    whole = table(rows)
    a, b = sorted((min(first, len(rows)), min(second, len(rows))))
    cut = pa.concat_tables([whole.slice(0, a), whole.slice(a, b - a), whole.slice(b)])
    shifted = pa.concat_tables([whole, whole]).combine_chunks().slice(len(rows))
    assert table_digest(cut) == table_digest(shifted) == table_digest(whole)


@given(ROWS, ROWS)
def test_table_digest_is_equal_only_for_equal_rows(
    first: list[dict[str, object]], second: list[dict[str, object]]
) -> None:
    # `repr` tells -0.0 from 0.0 and takes all NaN for one, as the digest does.
    same = repr(table(first).to_pylist()) == repr(table(second).to_pylist())
    assert (table_digest(table(first)) == table_digest(table(second))) == same


def test_table_digest_each_cell_counts() -> None:
    row = {
        "text": "a", "large": "b", "whole": 1, "real": 0.0, "flag": True,
        "list": [1, 2], "nested": [["a"], []], "map": [("k", 1.0)],
    }  # fmt: skip
    other = {
        "text": "b", "large": "c", "whole": 2, "real": -0.0, "flag": False,
        "list": [1], "nested": [[], ["a"]], "map": [("k", None)],
    }  # fmt: skip
    digests = {table_digest(table([row]))}
    for name, value in other.items():
        digests |= {table_digest(table([row | {name: value}]))}
        digests |= {table_digest(table([row | {name: None}]))}
    assert len(digests) == 1 + 2 * len(row)


def test_table_digest_what_lies_under_a_null_does_not_count() -> None:
    for hidden in ("", "hidden"):
        array = pa.Array.from_buffers(
            pa.string(),
            2,
            [
                pa.py_buffer(b"\x02"),
                pa.py_buffer(np.array([0, len(hidden), len(hidden) + 1], np.int32)),
                pa.py_buffer(hidden.encode() + b"x"),
            ],
        )
        assert array.to_pylist() == [None, "x"]
        assert table_digest(pa.table({"a": array})) == table_digest(pa.table({"a": [None, "x"]}))


def test_table_digest_is_what_it_was() -> None:
    # Written down once: a change here reruns what depends on every artifact of every store.
    assert (
        table_digest(rewards(0))
        == "1cfa94bad6538e71bd7bd89876e6a55bfc6ad30dc2ce2bd559efab97a3060058"
    )


def test_model_output_has_the_digest_of_its_content(store: Store) -> None:
    digests = []
    for number, dtype in enumerate((np.float32, np.float32, np.float16)):
        with store.build("train_sft", f"{number}" * 16) as work:
            directory = Path(work.output("reference"))
            tensors = {"b": np.ones((2, 3), dtype), "a": np.zeros(2, dtype)}
            save_file(tensors, directory / "model.safetensors", {"format": f"pt{number}"})
            config = {"transformers_version": str(number), "hidden_size": 3}
            (directory / "config.json").write_text(json.dumps(config, indent=number))
            digests.append(commit(work).digest("reference"))
    assert digests[0] == digests[1] != digests[2]


# Locks


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RSO_CACHE_DIR", str(tmp_path / "cache"))
    return f"bucket://{tmp_path}/store"


def test_store_two_threads_one_works_the_other_takes_its_result(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    built: list[bool] = []

    def run() -> None:
        with store.build(STAGE, FINGERPRINT) as work:
            built.append(work.existing is None)
            if work.existing is None:
                time.sleep(1.0)
                work.write_shard("rewards", 0, 1, rewards(0))
                commit(work)

    threads = [threading.Thread(target=run) for _ in range(3)]
    with caplog.at_level(logging.WARNING):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(built) == [False, False, True]
    waiting = [r for r in caplog.records if "waiting for its result" in r.getMessage()]
    assert len(waiting) == 2
    assert siblings(store) == {""}


def test_lease_is_taken_over_and_the_stale_holder_finds_out(remote: str) -> None:
    files = Files(remote)
    with lease(files, "score/x.lease", "x", 0.8) as stale:
        # As if the holder's process were stopped: no heartbeat, and nothing learnt.
        stale._stop.set()
        stale._thread.join()
        with lease(files, "score/x.lease", "x", 0.8) as fresh:
            fresh.confirm()
            with pytest.raises(LockLost):
                stale.confirm()
            stale._renewed = time.monotonic()
            with pytest.raises(LockLost):
                stale.confirm()
        # The tokens start again from one, and the stale holder's one is not that one.
        with lease(files, "score/x.lease", "x", 0.8) as third:
            third.confirm()
            stale._renewed, stale._lost = time.monotonic(), False
            with pytest.raises(LockLost):
                stale.confirm()
    assert files.children("score/x.lease") == []


def test_lease_with_a_heartbeat_is_not_taken_over(remote: str) -> None:
    files = Files(remote)
    taken = threading.Event()

    def wait() -> None:
        with lease(files, "score/x.lease", "x", 1.0):
            taken.set()

    with lease(files, "score/x.lease", "x", 1.0) as held:
        thread = threading.Thread(target=wait)
        thread.start()
        assert not taken.wait(2.5)
        held.confirm()
    thread.join()
    assert taken.is_set()


def test_store_stale_builder_cannot_commit(remote: str) -> None:
    store = Store(remote, lease_seconds=0.8)
    with pytest.raises(LockLost), store.build(STAGE, FINGERPRINT) as work:
        for index in range(2):
            work.write_shard("rewards", index, 2, rewards(index, shift=1.0))
        _stop_lease_threads()
        artifact = build(store)
        commit(work)
    found = store.find(STAGE, FINGERPRINT, verify=True)
    assert found is not None and found.manifest == artifact.manifest


def _stop_lease_threads() -> None:
    import gc

    from rso.lock import Lease

    for held in [o for o in gc.get_objects() if isinstance(o, Lease)]:
        held._stop.set()
        held._thread.join()


def test_store_builds_where_another_machine_stopped(
    remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(remote, lease_seconds=2)
    with pytest.raises(RuntimeError), store.build(STAGE, FINGERPRINT) as work:
        work.write_shard("rewards", 0, 2, rewards(0))
        Path(work.scratch, "old").write_text("rotated away")
        time.sleep(1.2)
        Path(work.scratch, "old").unlink()
        Path(work.scratch, "new").write_text("kept")
        raise RuntimeError
    monkeypatch.setenv("RSO_CACHE_DIR", str(tmp_path / "another machine"))
    with store.build(STAGE, FINGERPRINT) as work:
        assert work.has_shard("rewards", 0, 2)
        assert os.listdir(work.scratch) == ["new"]


# Stores that cannot be written


def unprivileged(code: str, *arguments: str, limit: str = "") -> subprocess.CompletedProcess[str]:
    """Run code in a process that is not root, which no permission stops."""
    prelude = (
        "import os, sys, resource\n"
        "from rso.artifact import Store\nfrom store_build import *\nimport pyarrow.compute\n"
        "if os.geteuid() == 0: os.seteuid(65534)\n"
        f"{limit}\n"
    )
    paths = f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}"
    return subprocess.run(
        [sys.executable, "-c", prelude + code, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"},
    )


@pytest.fixture
def shared_directory() -> Iterator[Path]:
    # pytest's own directories are closed to other users.
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o777)
        yield Path(directory)


BUILD = """
try:
    with Store(sys.argv[1]).build(STAGE, FINGERPRINT) as work:
        work.write_shard("rewards", 0, 1, rewards(0, count=20_000))
        commit(work)
except Exception as error:
    print(type(error).__name__, error)
"""


def test_store_read_only_is_a_user_error_that_says_what_to_do(shared_directory: Path) -> None:
    shared_directory.chmod(0o555)
    printed = unprivileged(BUILD, str(shared_directory / "store")).stdout
    assert printed.startswith(f"StoreError store {shared_directory}/store")
    assert "cannot be written (Permission denied)" in printed and "set `store`" in printed


def test_store_full_is_a_user_error_and_leaves_no_half_file(shared_directory: Path) -> None:
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    done = unprivileged(BUILD, str(shared_directory), limit=limit)
    assert done.stdout.startswith(f"StoreError store {shared_directory}/score"), done.stderr
    assert "is full (File too large): free space" in done.stdout
    assert [p for p in shared_directory.rglob("*") if p.is_file()] == []
    assert Store(str(shared_directory)).artifacts() == []


def test_store_below_a_file_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    store = Store(str(tmp_path / "file" / "store"))
    assert store.artifacts() == []
    with pytest.raises(StoreError, match=r"cannot be written"), store.build(STAGE, FINGERPRINT):
        pass


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_writing_no_space_is_a_store_error(number: int) -> None:
    with pytest.raises(StoreError, match=r"store /x is full .*free space"), writing("/x"):
        raise OSError(number, os.strerror(number))


class PlainFileSystem(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """A file system that only looks before it writes."""

    protocol = "plain"


fsspec.register_implementation("plain", PlainFileSystem, clobber=True)


@pytest.mark.parametrize(
    ("url", "message"), [("plain://x", "no conditional write"), ("nothing://x", "nothing")]
)
def test_store_of_an_unfit_kind_is_a_user_error(url: str, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        Store(url)


def test_digest_directory_missing_or_unfit_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected a directory with rewards, found nothing"):
        digest_directory(str(tmp_path / "absent"), "rewards")
    with pytest.raises(UserError, match=r"no part-\*.parquet file"):
        digest_directory(str(tmp_path), "rewards")


def test_store_leftovers_of_a_killed_publication_are_cleared(remote: str) -> None:
    store = Store(remote, lease_seconds=4)
    build(store)
    # Killed between the manifest and the removal of the work directory.
    store._files.write(f"{STAGE}/{FINGERPRINT}.work/report/report.html", b"<p>report</p>")
    assert siblings(store) == {"", ".work"}
    with store.build(STAGE, FINGERPRINT) as work:
        assert work.existing is not None
    assert siblings(store) == {""}
