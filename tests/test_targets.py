"""RAFT and ReST targets: against a plain transcription, and as a stage."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import system
from hypothesis import given
from hypothesis import strategies as st
from test_pipelines import ONE, THREADS, read_all, reshard

from pipelines.shards import Dataset, Plan, map_shards
from pipelines.targets import TARGET_COLUMNS, TargetShard
from rso.config import Beam, Targets
from rso.errors import UserError
from rso.rejection import NonFiniteReward
from rso.targets import Bounds, raft_targets, ranks, rest_targets
from schemas import SCHEMAS
from stages.runner import run_stage
from tests.oracles import targets as oracle
from tests.oracles.targets import Candidate

REST = "targets.method=rest"


@st.composite
def prompts(draw: st.DrawFn) -> list[list[Candidate]]:
    """Some prompts with candidates in ascending order of their ids; copies may differ in reward."""
    rewards = st.integers(-8, 8).map(lambda quarters: quarters / 4)
    made = []
    for _ in range(draw(st.integers(0, 5))):
        names = draw(st.lists(st.integers(0, 999), min_size=1, max_size=9, unique=True))
        made.append(
            [
                Candidate(f"{name:03d}", draw(st.sampled_from("abcd")), draw(rewards))
                for name in sorted(names)
            ]
        )
    return made


def columns(given: list[list[Candidate]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    flat = [candidate for candidates in given for candidate in candidates]
    return (
        np.array([len(candidates) for candidates in given], dtype=np.intp),
        np.array([ord(candidate.text) - ord("a") for candidate in flat], dtype=np.intp),
        np.array([candidate.reward for candidate in flat], dtype=np.float64),
    )


def named(given: list[list[Candidate]], index: np.ndarray) -> list[tuple[int, str]]:
    flat = [(number, candidate.id) for number, c in enumerate(given) for candidate in c]
    return [flat[i] for i in index]


@given(prompts())
def test_raft_targets_equal_the_transcription(given) -> None:
    expected = [(number, id_) for number, c in enumerate(given) for id_ in oracle.raft(c)]
    assert named(given, raft_targets(*columns(given))) == expected


@given(prompts(), st.sampled_from([0.0, 0.25, 0.5, 0.7]))
def test_rest_targets_equal_the_transcription(given, threshold) -> None:
    expected = [
        (number, id_)
        for number, c in enumerate(given)
        for id_ in oracle.rest(c, threshold, min(c_.reward for c_ in c), max(c_.reward for c_ in c))
    ]
    assert named(given, rest_targets(*columns(given), threshold=threshold)) == expected


@given(prompts(), st.sampled_from([0.0, 0.25, 0.5, 0.7]))
def test_rest_targets_within_bounds_equal_the_transcription(given, threshold) -> None:
    rewards = columns(given)[2]
    bounds = Bounds(rewards.min(initial=9), rewards.max(initial=-9))
    expected = [
        (number, id_)
        for number, c in enumerate(given)
        for id_ in oracle.rest(c, threshold, *bounds)
    ]
    found = rest_targets(*columns(given), threshold=threshold, bounds=bounds)
    assert named(given, found) == expected


@given(prompts(), st.integers(-5, 5), st.sampled_from([0.5, 1.0, 4.0]))
def test_rest_targets_of_scaled_and_shifted_rewards_are_the_same(given, shift, scale) -> None:
    sizes, texts, rewards = columns(given)
    moved = rest_targets(sizes, texts, scale * rewards + shift, threshold=0.7)
    assert moved.tolist() == rest_targets(sizes, texts, rewards, threshold=0.7).tolist()


def test_rest_targets_lie_above_the_threshold_and_not_at_it() -> None:
    sizes, texts = np.array([4]), np.arange(4)
    rewards = np.array([-5.0, 5.0, 2.0, 2.5])  # normalised 0, 1, 0.7, 0.75
    assert rest_targets(sizes, texts, rewards, threshold=0.7).tolist() == [1, 3]
    assert rest_targets(sizes, texts, rewards, threshold=0.8).tolist() == [1]
    assert rest_targets(sizes, texts, rewards, threshold=0.0).tolist() == [1, 3, 2]


def test_rest_targets_of_a_prompt_with_one_reward_are_none_even_above_the_bounds() -> None:
    sizes, texts = np.array([2, 2]), np.array([0, 1, 2, 3])
    rewards = np.array([4.0, 4.0, 0.0, 5.0])
    bounds = Bounds(0.0, 5.0)
    assert rest_targets(sizes, texts, rewards, threshold=0.7, bounds=bounds).tolist() == [3]


@given(st.lists(st.integers(1, 4), max_size=6))
def test_ranks_count_within_runs(sizes) -> None:
    prompts = np.repeat(np.arange(len(sizes)), sizes)
    assert ranks(prompts).tolist() == [place for size in sizes for place in range(size)]


# --- the pipeline


def plan_of(finished: system.Run, folder: Path, total: int, rewards: list[dict], name: str) -> Plan:
    rows = {
        "candidates": finished.rows("decode/candidates"),
        "rewards": rewards,
        "prompts": finished.rows("prepare/prompts"),
    }
    inputs = {
        key: reshard(value, folder / key, key, total)._replace(columns=TARGET_COLUMNS[key])
        for key, value in rows.items()
    }
    outputs = {"demonstrations": Dataset(str(folder / name), "demonstrations")}
    return Plan(name, inputs, outputs, str(folder / "counters"), total)


# Of forty shards some are empty.
@pytest.mark.parametrize(("total", "beam"), [(1, ONE), (5, THREADS), (40, ONE)])
@pytest.mark.parametrize("normalise", ["prompt", "dataset"])
def test_rest_pipeline_however_sharded_equals_the_transcription(
    finished: system.Run, tmp_path: Path, total: int, beam: Beam, normalise: str
) -> None:
    rewards = finished.rows("score/rewards")
    # A prompt of one reward, which teaches nothing.
    flat = rewards[0]["prompt_id"]
    for row in rewards:
        row["reward"] = 0.5 if row["prompt_id"] == flat else row["reward"]
    plan = plan_of(finished, tmp_path, total, rewards, "targets")
    bounds = None
    if normalise == "dataset":
        bounds = Bounds(min(r["reward"] for r in rewards), max(r["reward"] for r in rewards))
    settings = Targets(method="rest", threshold=0.6, normalise=normalise)
    counters = map_shards(TargetShard(settings, "", bounds), plan, beam)

    texts = {row["response_id"]: row["response"] for row in finished.rows("decode/candidates")}
    prompts = {row["prompt_id"]: row for row in finished.rows("prepare/prompts")}
    expected = []
    for prompt_id in {row["prompt_id"] for row in rewards}:
        candidates = [
            Candidate(row["response_id"], texts[row["response_id"]], row["reward"])
            for row in rewards
            if row["prompt_id"] == prompt_id
        ]
        own = [candidate.reward for candidate in candidates]
        low, high = bounds or (min(own), max(own))
        for index, response_id in enumerate(oracle.rest(candidates, 0.6, low, high)):
            expected.append(
                {
                    "prompt_id": prompt_id,
                    "response_id": response_id,
                    "prompt": prompts[prompt_id]["prompt"],
                    "target": texts[response_id],
                    "reference_index": index,
                    "split": "train",
                    "source": "rest",
                }
            )
    expected.sort(key=lambda row: (row["prompt_id"], row["response_id"]))
    assert read_all(tmp_path / "targets", "demonstrations") == expected
    assert counters["targets"] == len(expected) > 0
    with_targets = {row["prompt_id"] for row in expected}
    assert flat not in with_targets
    assert counters["prompts_without_targets"] == counters["prompts"] - len(with_targets) >= 1
    assert counters["candidates"] == 96
    assert counters["candidates"] == counters["targets"] + counters["copies"] + counters["declined"]


def tables(rows: list[tuple[str, str, float]], finish_reason: str = "stop") -> dict[str, pa.Table]:
    """One prompt's candidates as (id, text, reward)."""
    candidates = [
        {"prompt_id": "p", "response_id": i, "response": text, "finish_reason": finish_reason}
        for i, text, _ in rows
    ]
    rewards = [{"prompt_id": "p", "response_id": i, "reward": reward} for i, _, reward in rows]
    prompts = [{"prompt_id": "p", "prompt": "why", "split": "train"}]
    data = {"candidates": candidates, "rewards": rewards, "prompts": prompts}
    return {
        name: pa.Table.from_pylist(
            data[name], schema=pa.schema([SCHEMAS[name].field(c) for c in TARGET_COLUMNS[name]])
        )
        for name in data
    }


def test_targets_shard_counts_copies_once_and_cut_off_targets() -> None:
    rows = [("a", "x", 2.0), ("b", "x", 2.0), ("c", "y", 1.9), ("d", "z", -1.0)]
    shard = TargetShard(Targets(method="rest"), "", None)(None, tables(rows, "length"))
    found = shard.tables["demonstrations"].to_pylist()
    assert [(r["response_id"], r["target"], r["reference_index"]) for r in found] == [
        ("a", "x", 0),
        ("c", "y", 1),
    ]
    assert shard.counters == {
        "prompts": 1,
        "prompts_without_targets": 0,
        "candidates": 4,
        "copies": 1,
        "declined": 1,
        "targets": 2,
        "cut_off": 2,
    }


def test_targets_shard_leaves_out_the_prefix_that_training_puts_before() -> None:
    rows = [("a", "  two", 2.0), ("b", " one", 1.9), ("c", "none", 1.8), ("d", "", -1.0)]
    shard = TargetShard(Targets(method="rest"), " ", None)(None, tables(rows))
    assert shard.tables["demonstrations"]["target"].to_pylist() == [" two", "one", "none"]


def test_targets_shard_of_a_reward_that_is_no_number_names_it() -> None:
    given = tables([("a", "x", 2.0), ("b", "y", float("nan"))])
    sentence = "prompt p: candidate b has reward nan"
    with pytest.raises(NonFiniteReward, match=sentence):
        TargetShard(Targets(method="raft"), "", None)(None, given)


def test_targets_shard_of_rows_that_do_not_belong_together_refuses() -> None:
    given = tables([("a", "x", 2.0), ("b", "y", 1.0)])
    function = TargetShard(Targets(method="raft"), "", None)
    with pytest.raises(ValueError, match="1 rewards and 2 candidates share 1 ids"):
        function(None, given | {"rewards": given["rewards"].slice(1)})
    with pytest.raises(ValueError, match="candidates have prompt p, which prompts have not"):
        function(None, given | {"prompts": given["prompts"].slice(1)})


# --- the stage


def test_targets_stage_is_there_only_with_a_method(finished: system.Run) -> None:
    assert "targets" not in finished.graph().table
    table = finished.graph(REST).table
    assert [name for name in table if name not in finished.graph().table] == ["targets"]
    assert table["report"].reads["targets/demonstrations"] == "targets/demonstrations"


def test_targets_with_direct_pairs_is_refused(finished: system.Run) -> None:
    with pytest.raises(UserError, match=r"targets.method: raft needs candidates .* set targets"):
        finished.graph("targets.method=raft", "pair.source=direct")


def test_raft_stage_makes_one_target_a_prompt(finished: system.Run, tmp_path: Path) -> None:
    run = finished.copy(tmp_path / "store")
    run_stage(run.graph("targets.method=raft"), "targets")
    targets = run.rows("targets/demonstrations", "targets.method=raft")
    best: dict[str, float] = {}
    rewards = {row["response_id"]: row for row in run.rows("score/rewards")}
    for row in rewards.values():
        best[row["prompt_id"]] = max(row["reward"], best.get(row["prompt_id"], row["reward"]))
    assert {r["prompt_id"]: rewards[r["response_id"]]["reward"] for r in targets} == best
    assert {(r["source"], r["reference_index"], r["split"]) for r in targets} == {
        ("raft", 0, "train")
    }


def test_rest_stage_over_the_dataset_records_its_bounds(
    finished: system.Run, tmp_path: Path
) -> None:
    run = finished.copy(tmp_path / "store")
    changes = [REST, "targets.normalise=dataset", "targets.threshold=0.5"]
    run_stage(run.graph(*changes), "targets")
    rewards = {row["response_id"]: row["reward"] for row in run.rows("score/rewards")}
    low, high = min(rewards.values()), max(rewards.values())
    counters = run.artifact("targets", *changes).manifest.counters
    assert (counters["lowest_reward"], counters["highest_reward"]) == (low, high)
    targets = run.rows("targets/demonstrations", *changes)
    assert all(rewards[r["response_id"]] > (low + high) / 2 for r in targets)
    assert len({r["prompt_id"] for r in targets}) == 16 - counters["prompts_without_targets"]


def test_targets_stage_without_any_target_says_what_to_change(
    finished: system.Run, tmp_path: Path
) -> None:
    run = finished.copy(tmp_path / "store")
    rewards = [row | {"reward": 1.0} for row in run.rows("score/rewards")]
    reshard(rewards, tmp_path / "rewards", "rewards", 3)
    with pytest.raises(UserError, match=r"none of 16 prompts with 96 .* raise decode.num_samples"):
        run_stage(run.graph(REST), "targets", given={"rewards": str(tmp_path / "rewards")})


@pytest.mark.parametrize("stage", ["reject", "targets"])
def test_stage_given_a_reward_that_is_not_finite_tells_the_user_which(
    finished: system.Run, tmp_path: Path, stage: str
) -> None:
    run = finished.copy(tmp_path / "store")
    rows = run.rows("score/rewards")
    rows[3] |= {"reward": float("nan")}
    reshard(rows, tmp_path / "rewards", "rewards", 3)
    with pytest.raises(UserError, match=rf"{stage}, prompt .*{rows[3]['response_id']} has reward"):
        run_stage(run.graph(REST), stage, given={"rewards": str(tmp_path / "rewards")})


@pytest.mark.parametrize("base", ["model", "reference"])
def test_sft_trains_on_targets(finished: system.Run, tmp_path: Path, base: str) -> None:
    """As docs/pairs.md tells it, from the base model or from the SFT policy."""
    run = finished.copy(tmp_path / "store")
    targets = run_stage(run.graph(REST), "targets").artifact
    given = {"demonstrations": targets.output("demonstrations")}
    changes = [REST]
    if base == "reference":
        changes.append(f"model={run.artifact('train_sft').output('reference')}")
    ran = run_stage(run.graph(*changes), "train_sft", given=given)
    assert not ran.is_cached
    assert ran.artifact.manifest.digests != run.artifact("train_sft").manifest.digests
    num_targets = targets.manifest.rows["demonstrations"]
    steps = ran.artifact.manifest.counters["steps"]
    assert steps == -(-num_targets // run.config().train_sft.batch_size)
