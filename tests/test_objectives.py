"""Several rankers as one: the arithmetic, the stages, and what is refused."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import system
from hypothesis import given
from hypothesis import strategies as st

from rso.config import Compute, Templates, parse_config
from rso.errors import UserError
from rso.objectives import coefficients, pooled_scale, weighted_sum
from rso.ranking import Comparison, PromptCandidates, RowRanker, WeightedRanker, load_ranker
from stages.runner import run_stage

Row = dict[str, Any]


def objectives(*entries: str, standardise: bool = False) -> list[str]:
    """Overrides of the config, as one would type them."""
    changes = [f"objectives.rankers=[{', '.join(f'{{{entry}}}' for entry in entries)}]"]
    return [*changes, "objectives.standardise=true"] if standardise else changes


def load(directory: str) -> RowRanker:
    compute = Compute(dtype="float32", device="cpu")
    return load_ranker(directory, Templates(), dtype="float32", token_budget=compute.token_budget)


@given(
    st.lists(st.lists(st.floats(-50, 50, width=32), min_size=3, max_size=3), min_size=1),
    st.data(),
)
def test_weighted_sum_is_the_weighted_mean_of_scaled_values(values, data) -> None:
    positive = st.lists(st.floats(0.01, 9), min_size=len(values), max_size=len(values))
    weights, scales = data.draw(positive), data.draw(positive)
    found = weighted_sum(
        [np.array(v, dtype=np.float32) for v in values], coefficients(weights, scales)
    )
    expected = [
        sum(w * v[i] / s for w, v, s in zip(weights, values, scales, strict=True)) / sum(weights)
        for i in range(3)
    ]
    assert found.dtype == np.float32
    assert found.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-4)


def test_weighted_sum_of_one_unscaled_objective_is_it_bit_for_bit() -> None:
    values = np.random.default_rng(0).normal(size=1_000).astype(np.float32)
    assert weighted_sum([values], coefficients([7.0], [1.0])).tobytes() == values.tobytes()


def test_pooled_scale_without_spread_names_the_objective() -> None:
    assert pooled_scale("short", 8.0, 2) == 2.0
    with pytest.raises(UserError, match=r"objective 'short' gives all candidates .* 4 prompts"):
        pooled_scale("short", 0.0, 4)


def test_weighted_ranker_is_the_weighted_sum_of_its_rankers(finished: system.Run) -> None:
    rankers = [
        load(finished.artifact(name).local("ranker"))
        for name in ("train_ranker", "train_gold_ranker")
    ]
    both = WeightedRanker(rankers, [0.25, 2.0])
    items = [Comparison("why", "a list", "a number"), Comparison("how", "sort", "sort the list")]
    many = [PromptCandidates("why", "a list", ["a number", "a list", "lines"])]
    for method in ("compare", "preference"):
        one, other = (getattr(ranker, method)(items) for ranker in rankers)
        assert not np.array_equal(one, other)
        assert getattr(both, method)(items) == pytest.approx(0.25 * one + 2 * other, abs=1e-6)
    for orders in ("both", "baseline-first"):
        mine, one, other = (
            ranker.rewards_many(many, orders=orders)[0] for ranker in (both, *rankers)
        )
        assert mine.values == pytest.approx(0.25 * one.values + 2 * other.values, abs=1e-6)
        assert mine.num_tokens == one.num_tokens + other.num_tokens
    for mine, one, other in zip(
        both.both_orders(items), *(ranker.both_orders(items) for ranker in rankers), strict=True
    ):
        assert mine == pytest.approx(0.25 * one + 2 * other, abs=1e-6)


@pytest.mark.parametrize("standardise", [False, True])
def test_several_objectives_score_select_and_label(
    finished: system.Run, tmp_path: Path, standardise: bool
) -> None:
    run = finished.copy(tmp_path / "store")
    other = run.artifact("train_gold_ranker").local("ranker")
    changes = objectives(
        "name: own", f"name: candidates, ranker: {other}, weight: 3", standardise=standardise
    )
    for stage in ("score", "reject", "pair"):
        assert not run_stage(run.graph(*changes), stage).is_cached

    rows = {row["name"]: row for row in run.rows("score/objectives", *changes)}
    assert {name: row["weight"] for name, row in rows.items()} == {"own": 0.25, "candidates": 0.75}
    assert rows["own"]["ranker"] == "trained" and "sha256" in rows["candidates"]["ranker"]
    rewards = run.rows("score/rewards", *changes)
    raw = {row["response_id"]: dict(row["objectives"]) for row in rewards}
    before = {row["response_id"]: row["reward"] for row in finished.rows("score/rewards")}
    assert {key: value["own"] for key, value in raw.items()} == before
    by_prompt: dict[str, list[str]] = {}
    for row in rewards:
        by_prompt.setdefault(row["prompt_id"], []).append(row["response_id"])
    for name, row in rows.items():
        variances = [np.var([raw[i][name] for i in ids]) for ids in by_prompt.values()]
        expected = np.sqrt(np.mean(variances)) if standardise else 1.0
        assert row["scale"] == pytest.approx(expected)
    for row in rewards:
        parts = raw[row["response_id"]]
        expected = sum(
            rows[name]["weight"] / rows[name]["scale"] * parts[name]
            for name in ("own", "candidates")
        )
        assert row["reward"] == pytest.approx(expected, abs=1e-5)

    directories = {"own": run.artifact("train_ranker").local("ranker"), "candidates": other}
    together = WeightedRanker(
        [load(directories[name]) for name in rows],
        [row["weight"] / row["scale"] for row in rows.values()],
    )
    pairs = run.rows("pair/pairs", *changes)
    logits = together.preference(
        [Comparison(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in pairs]
    )
    for pair, logit in zip(pairs, logits, strict=True):
        assert pair["label_probability"] == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-4)
    counters = run.artifact("score", *changes).manifest.counters
    assert counters["responses"] == 96
    assert counters["candidates/reward_sum"] == pytest.approx(
        sum(r["candidates"] for r in raw.values())
    )


def test_one_objective_is_the_run_without_objectives(finished: system.Run, tmp_path: Path) -> None:
    run = finished.copy(tmp_path / "store")
    changes = objectives("name: ranker, weight: 5")
    for stage in ("score", "reject", "pair"):
        run_stage(run.graph(*changes), stage)
    for place in ("score/rewards", "reject/accepted", "pair/pairs"):
        stage, output = place.split("/")
        found, expected = run.artifact(stage, *changes), finished.artifact(stage)
        assert found.digest(output) == expected.digest(output)


def test_objectives_are_known_by_their_content_and_not_their_path(
    finished: system.Run, tmp_path: Path
) -> None:
    run = finished.copy(tmp_path / "store")
    here = run.artifact("train_gold_ranker").local("ranker")
    there = shutil.copytree(here, tmp_path / "elsewhere")
    policy = run.artifact("train_sft").local("reference")
    fingerprints = []
    for directory in (here, there, policy):
        graph = run.graph(*objectives("name: own", f"name: other, ranker: {directory}"))
        fingerprints.append(graph.recipe(graph.stage("score")).fingerprint)
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


@pytest.mark.parametrize(
    ("score", "sentence"),
    [
        ([{"name": "a"}, {"name": "a", "ranker": "x"}], "names are a, a; expected each once"),
        ([{"name": "a"}, {"name": "b"}], "a and b are all the ranker of train_ranker"),
        ([{"name": "a", "weight": 0}], "objectives.rankers.0.weight"),
        ([{"name": "a", "weight": float("inf")}], "objectives.rankers.0.weight"),
        ([{"name": "A b"}], "objectives.rankers.0.name"),
    ],
)
def test_config_refuses_objectives(score: list[Row], sentence: str) -> None:
    data = {"model": "m", "prepare": {"sources": []}, "objectives": {"rankers": score}}
    with pytest.raises(UserError) as refusal:
        parse_config(data, where="here.yaml")
    assert sentence in str(refusal.value)


def test_objectives_with_direct_pairs_are_refused(finished: system.Run) -> None:
    with pytest.raises(
        UserError, match=r"objectives.rankers .* pair.source: direct nothing is sco"
    ):
        finished.graph(*objectives("name: own"), "pair.source=direct")
