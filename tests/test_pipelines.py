"""Shard maps: equal to the pure functions however bundled, resumable, honest about mistakes."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pyarrow as pa
import pytest
import system

from pipelines.prepare import PREPARE_OUTPUTS, prepare_shards
from pipelines.reject import RejectShard, all_betas, in_nats
from pipelines.shards import Dataset, Plan, Shard, map_shards, sum_groups
from rso import sources
from rso.config import Beam, Config, Reject
from rso.errors import UserError
from rso.ids import shard_of
from rso.parquet import num_shards, read_shard, write_shard
from rso.rejection import select
from schemas import SCHEMAS, sort_keys

ONE = Beam()
THREADS = Beam(options={"direct_num_workers": 3, "direct_running_mode": "multi_threading"})
PROCESSES = Beam(num_workers=2)


@pytest.fixture(autouse=True)
def python_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker processes find the functions of these tests."""
    monkeypatch.setenv("PYTHONPATH", f"{processes.ROOT}:{processes.ROOT}/tests")


def read_all(directory: str | Path, name: str) -> list[dict[str, Any]]:
    """Return all rows of a dataset in the order of its keys."""
    total = num_shards(str(directory))
    tables = [read_shard(str(directory), name, index, total) for index in range(total)]
    rows = [row for table in tables for row in table.to_pylist()]
    return sorted(rows, key=lambda row: [row[key] for key in sort_keys(name)])


def reshard(rows: list[dict[str, Any]], directory: Path, name: str, total: int) -> Dataset:
    """Write rows as a dataset of `total` shards."""
    for index in range(total):
        mine = [row for row in rows if shard_of(row["prompt_id"], total) == index]
        table = pa.Table.from_pylist(mine, schema=SCHEMAS[name])
        write_shard(str(directory), name, index, total, table)
    return Dataset(str(directory), name)


# Of forty shards some are empty.
@pytest.mark.parametrize(
    ("total", "beam"), [(1, ONE), (5, ONE), (5, THREADS), (5, PROCESSES), (40, ONE)]
)
def test_reject_pipeline_however_sharded_equals_the_pure_function(
    finished: system.Run, tmp_path: Path, total: int, beam: Beam
) -> None:
    candidates = finished.rows("decode/candidates")
    rewards = finished.rows("score/rewards")
    settings = Reject(beta=0.7, betas=(2.0,), num_samples=3)
    plan = Plan(
        "reject",
        {
            "candidates": reshard(candidates, tmp_path / "candidates", "candidates", total),
            "rewards": reshard(rewards, tmp_path / "rewards", "rewards", total),
        },
        {name: Dataset(str(tmp_path / name), name) for name in ("accepted", "diagnostics")},
        str(tmp_path / "counters"),
        total,
    )
    map_shards(RejectShard(settings, seed=3), plan, beam)

    texts = {row["response_id"]: row["response"] for row in candidates}
    expected = []
    for prompt_id, group in itertools.groupby(
        sorted(rewards, key=lambda r: r["prompt_id"]), key=lambda r: r["prompt_id"]
    ):
        # In an order of its own: draws belong to the ids.
        rows = sorted(group, key=lambda row: row["response_id"], reverse=True)
        selection = select(
            [row["response_id"] for row in rows],
            [texts[row["response_id"]] for row in rows],
            pa.array([row["reward"] for row in rows], pa.float32()).to_numpy(),
            prompt_id=prompt_id,
            beta=0.7,
            num_samples=3,
            seed=3,
            duplicates="keep",
        )
        for i, row in enumerate(rows):
            expected.append(
                {
                    "prompt_id": prompt_id,
                    "response_id": row["response_id"],
                    "reward": row["reward"],
                    "is_accepted": bool(selection.is_accepted[i]),
                    "round": int(selection.round[i]),
                    "position": int(selection.position[i]),
                    "acceptance_probability": float(selection.acceptance_probability[i]),
                }
            )
    expected.sort(key=lambda row: [row[key] for key in sort_keys("accepted")])
    assert read_all(tmp_path / "accepted", "accepted") == expected
    totals = dict(zip([0.0, 0.7, 2.0], sum_groups(plan), strict=True))
    assert totals[0.7]["accepted"] == sum(r["is_accepted"] for r in expected) == 3 * 16

    rows = read_all(tmp_path / "diagnostics", "diagnostics")
    assert [row["prompt_id"] for row in rows[::3]] == sorted({row["prompt_id"] for row in expected})
    assert [row["beta"] for row in rows] == [0.0, 0.7, 2.0] * 16
    assert {(row["num_candidates"], row["num_accepted"]) for row in rows} == {(6, 3)}
    for row in rows[1::3]:
        mine = [r for r in expected if r["prompt_id"] == row["prompt_id"]]
        kept = [r["reward"] for r in mine if r["is_accepted"]]
        gain = np.mean(kept) - np.mean([r["reward"] for r in mine])
        assert row["reward_gain"] == pytest.approx(gain)
        assert row["num_rounds"] == 1 + max(r["round"] for r in mine)
    for name in ("num_draws", "num_rounds", "num_shortfall"):
        assert totals[2.0][name.removeprefix("num_")] == sum(row[name] for row in rows[2::3])


def test_betas_in_spreads_become_nats() -> None:
    settings = Reject(beta=0.5, betas=(0.0, 0.25, float("inf")), beta_unit="spread", num_samples=3)
    found = in_nats(settings, 4.0)
    assert found == Reject(beta=2.0, betas=(0.0, 1.0, float("inf")), num_samples=3)
    assert all_betas(found) == [0.0, 1.0, 2.0, float("inf")]
    plain = Reject(beta=0.5)
    assert in_nats(plain, 4.0) is plain and in_nats(plain, 0.0) is plain


def test_betas_in_spreads_without_any_spread_are_refused() -> None:
    with pytest.raises(UserError, match=r"it is 0: .* set reject.beta_unit to nats"):
        in_nats(Reject(beta_unit="spread"), 0.0)


def test_reject_pipeline_with_a_reward_missing_refuses(
    finished: system.Run, tmp_path: Path
) -> None:
    rewards = finished.rows("score/rewards")
    plan = Plan(
        "reject",
        {
            "candidates": reshard(
                finished.rows("decode/candidates"), tmp_path / "candidates", "candidates", 1
            ),
            "rewards": reshard(rewards[1:], tmp_path / "rewards", "rewards", 1),
        },
        {"accepted": Dataset(str(tmp_path / "accepted"), "accepted")},
        str(tmp_path / "counters"),
        1,
    )
    with pytest.raises(Exception, match="95 rewards and 96 candidates share 95 ids"):
        map_shards(RejectShard(Reject(), seed=3), plan, ONE)
    assert not (tmp_path / "accepted").exists()


def test_reject_pipeline_with_a_reward_that_is_no_number_names_it(
    finished: system.Run, tmp_path: Path
) -> None:
    rewards = finished.rows("score/rewards")
    rewards[7]["reward"] = float("nan")
    candidates = finished.rows("decode/candidates")
    plan = Plan(
        "reject",
        {
            "candidates": reshard(candidates, tmp_path / "candidates", "candidates", 1),
            "rewards": reshard(rewards, tmp_path / "rewards", "rewards", 1),
        },
        {"accepted": Dataset(str(tmp_path / "accepted"), "accepted")},
        str(tmp_path / "counters"),
        1,
    )
    with pytest.raises(Exception, match=f"candidate {rewards[7]['response_id']} has reward nan"):
        map_shards(RejectShard(Reject(), seed=3), plan, ONE)


class CountWords:
    """A token counter that a worker can load."""

    def __call__(self, text: str) -> int:
        return len(text.split())


def load_count_words() -> CountWords:
    return CountWords()


def prepared(config: Config, folder: Path, prompts_per_shard: int, beam: Beam) -> dict[str, float]:
    return prepare_shards(
        config.prepare.model_copy(update={"prompts_per_shard": prompts_per_shard}),
        seed=config.seed,
        load_counter=load_count_words,
        outputs={name: str(folder / name) for name in PREPARE_OUTPUTS},
        counters=str(folder / "counters"),
        beam_settings=beam,
    )


@pytest.mark.parametrize(
    ("prompts_per_shard", "beam"),
    [(1000, ONE), (24, ONE), (7, ONE), (7, THREADS), (7, PROCESSES)],
)
def test_prepare_pipeline_however_sharded_equals_the_pure_function(
    tiny_run: system.Run, tmp_path: Path, prompts_per_shard: int, beam: Beam
) -> None:
    people = system.write_human_comparisons(tmp_path / "people.jsonl")
    sources_ = [*tiny_run.config().model_dump()["prepare"]["sources"], people]
    config = tiny_run.config(system.override("prepare.sources", sources_))
    counters = prepared(config, tmp_path, prompts_per_shard, beam)
    expected = sources.prepare(config.prepare, seed=config.seed, count_tokens=CountWords())
    for name in PREPARE_OUTPUTS:
        rows = getattr(expected, name)
        rows = pa.Table.from_pylist(rows, schema=SCHEMAS[name]).to_pylist()
        rows.sort(key=lambda row: [row[key] for key in sort_keys(name)])
        assert read_all(tmp_path / name, name) == rows, name
        assert num_shards(str(tmp_path / name)) == -(-124 // prompts_per_shard)
    assert {n: c for n, c in counters.items() if c} == {
        n: c for n, c in expected.counts.items() if c
    }
    assert counters["rows_refused"] == 4 and len(expected.comparisons) == 60


@dataclass(frozen=True)
class Trace:
    """A shard function that leaves a line for each call, and fails where it is told to."""

    log: str
    refuse: int | None = None
    crash: int | None = None

    def _note(self, what: str) -> None:
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(f"{what}\n")

    def setup(self) -> str:
        self._note("setup")
        return "engine"

    def __call__(self, engine: str, tables: Mapping[str, pa.Table]) -> Shard:
        assert engine == "engine"
        table = tables["logps"]
        index = int(table["num_tokens"][0].as_py())
        self._note(str(index))
        if index == self.refuse:
            raise UserError(f"shard {index}: the user's mistake, e.g. naïve text")
        if index == self.crash:
            raise RuntimeError(f"shard {index}: ours")
        groups = [{"shards": 1.0, "index": index}, {"squares": index**2}]
        return Shard({"logps": table}, {"shards": 1, "sum": FLOATS[index]}, groups)


# Their sum depends on the order: 1.0 is lost beside 1e16.
FLOATS = [1e16, 1.0, 1.0, -1e16, 1.0, 0.5]


@pytest.fixture
def plan(tmp_path: Path) -> Iterator[Plan]:
    """Six shards of one row."""
    source = Dataset(str(tmp_path / "in"), "logps")
    for index in range(len(FLOATS)):
        row = {"prompt_id": f"{index:016x}", "response_id": "r", "logps": -1.0, "num_tokens": index}
        table = pa.Table.from_pylist([row], schema=SCHEMAS["logps"])
        write_shard(source.directory, "logps", index, len(FLOATS), table)
    target = {"logps": Dataset(str(tmp_path / "out"), "logps")}
    yield Plan("trace", {"logps": source}, target, str(tmp_path / "counters"), len(FLOATS))


def lines(path: Path) -> list[str]:
    return sorted(path.read_text().split()) if path.exists() else []


def counters_file(plan: Plan, index: int) -> Path:
    (found,) = Path(plan.counters).glob(f"*-{index:05d}-of-*.json")
    return found


def test_map_shards_loads_the_engine_once_and_sums_in_the_order_of_the_shards(
    plan: Plan, tmp_path: Path
) -> None:
    counters = map_shards(Trace(str(tmp_path / "log")), plan, ONE)
    assert lines(tmp_path / "log") == [*"012345", "setup"]
    total = 0.0
    for value in FLOATS:
        total += value
    assert total != sum(reversed(FLOATS))
    assert counters == {"shards": 6, "sum": total}
    assert sum_groups(plan) == [{"shards": 6, "index": 15}, {"squares": 55}]


@pytest.mark.parametrize("beam", [ONE, THREADS, PROCESSES])
def test_map_shards_gives_the_same_sums_and_bytes_however_bundled(
    plan: Plan, tmp_path: Path, beam: Beam
) -> None:
    expected = map_shards(Trace(str(tmp_path / "log")), plan, ONE)
    target = {"logps": Dataset(str(tmp_path / "other"), "logps")}
    other = replace(plan, outputs=target, counters=str(tmp_path / "other-counters"))
    assert map_shards(Trace(str(tmp_path / "log")), other, beam) == expected
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()


def test_map_shards_with_finished_shards_does_only_the_others(plan: Plan, tmp_path: Path) -> None:
    first = map_shards(Trace(str(tmp_path / "log")), plan, ONE)
    # Parquet without counters is a shard that was killed in between.
    counters_file(plan, 2).unlink()
    counters_file(plan, 4).unlink()
    again = map_shards(Trace(str(tmp_path / "again")), plan, ONE)
    assert lines(tmp_path / "again") == ["2", "4", "setup"]
    assert again == first


def test_map_shards_with_every_shard_finished_loads_nothing(plan: Plan, tmp_path: Path) -> None:
    first = map_shards(Trace(str(tmp_path / "log")), plan, ONE)
    assert map_shards(Trace(str(tmp_path / "again"), crash=0), plan, ONE) == first
    assert lines(tmp_path / "again") == []


@pytest.mark.parametrize("beam", [ONE, THREADS, PROCESSES])
def test_map_shards_users_mistake_comes_out_as_itself(
    plan: Plan, tmp_path: Path, beam: Beam, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UserError) as caught:
        map_shards(Trace(str(tmp_path / "log"), refuse=3), plan, beam)
    assert str(caught.value) == "shard 3: the user's mistake, e.g. naïve text"
    assert "Traceback" not in caplog.text


def test_map_shards_after_a_mistake_is_mended_goes_on(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        map_shards(Trace(str(tmp_path / "log"), refuse=3), plan, ONE)
    done = {str(index) for index in range(6) if list(tmp_path.glob(f"out/part-0000{index}-*"))}
    with pytest.raises(RuntimeError, match="shard 5: ours") as caught:
        map_shards(Trace(str(tmp_path / "other"), crash=5), plan, ONE)
    assert not isinstance(caught.value, UserError)
    counters = map_shards(Trace(str(tmp_path / "again")), plan, ONE)
    assert counters["shards"] == 6
    assert not done & set(lines(tmp_path / "again"))
    assert "5" in lines(tmp_path / "again")
