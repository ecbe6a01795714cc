"""What `score` says of the ranker that scores: both orders, held-out comparisons, bias, shards."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import system
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipelines.score import RankerSource, ScoreShard
from pipelines.shards import Dataset, Plan, map_shards
from rso import seeds
from rso.calibration import bias_advice, in_each_order, judge
from rso.config import Templates
from rso.errors import UserError
from rso.models import load_tokenizer
from rso.ranking import Comparison, WeightedRanker
from rso.templates import RankerEncoder
from stages import score
from stages.runner import run_stage
from tests.test_objectives import load, objectives
from tests.test_pipelines import ONE, read_all, reshard
from tests.test_ranking import plant as plant_preference

Row = dict[str, Any]


def checks(run: system.Run, origin: str, *overrides: str) -> list[Row]:
    return [row for row in run.rows("score/checks", *overrides) if row["origin"] == origin]


def held_out(run: system.Run) -> dict[str, Row]:
    """The comparisons that no ranker has learnt, by their id."""
    rows = run.rows("compare/comparisons")
    return {row["comparison_id"]: row for row in rows if row["split"] == "validation"}


def test_checks_hold_both_orders_of_every_held_out_comparison(finished: system.Run) -> None:
    ranker = load(finished.artifact("train_ranker").local("ranker"))
    comparisons = held_out(finished)
    rows = checks(finished, "held_out")
    assert {row["comparison_id"] for row in rows} == comparisons.keys() and len(rows) >= 5
    for row in rows:
        one = comparisons[row["comparison_id"]]
        assert (row["first_id"], row["second_id"]) == (one["chosen_id"], one["rejected_id"])
        (forward,) = ranker.compare([Comparison(one["prompt"], one["chosen"], one["rejected"])])
        (backward,) = ranker.compare([Comparison(one["prompt"], one["rejected"], one["chosen"])])
        assert (row["forward"], row["backward"]) == pytest.approx((forward, backward), abs=1e-4)


@pytest.mark.parametrize("orders", ["both", "baseline-first"])
def test_checks_hold_both_orders_of_a_candidate_and_its_baseline(
    finished: system.Run, tmp_path: Path, orders: str
) -> None:
    run, change = finished.copy(tmp_path / "store"), f"score.orders={orders}"
    assert run_stage(run.graph(change), "score").is_cached == (orders == "both")
    ranker = load(run.artifact("train_ranker").local("ranker"))
    prompts = {row["prompt_id"]: row["prompt"] for row in run.rows("prepare/prompts")}
    texts = {row["response_id"]: row["response"] for row in run.rows("decode/candidates")}
    rewards = {row["response_id"]: row for row in run.rows("score/rewards", change)}
    rows = checks(run, "candidates", change)
    different = {
        r["prompt_id"]
        for r in rewards.values()
        if texts[r["baseline_id"]].strip() != texts[r["response_id"]].strip()
    }
    assert sorted(row["prompt_id"] for row in rows) == sorted(different)
    for row in rows:
        baseline, candidate = texts[row["first_id"]], texts[row["second_id"]]
        assert rewards[row["second_id"]]["baseline_id"] == row["first_id"] and baseline != candidate
        reward = rewards[row["second_id"]]["reward"]
        if orders == "both":
            assert reward == pytest.approx((row["backward"] - row["forward"]) / 2, abs=1e-5)
        else:
            assert reward == -row["forward"]
        prompt = prompts[row["prompt_id"]]
        forward, backward = ranker.compare(
            [Comparison(prompt, baseline, candidate), Comparison(prompt, candidate, baseline)]
        )
        assert row["forward"] == pytest.approx(forward, abs=1e-4)
        assert row["backward"] == pytest.approx(backward, abs=1e-4)


@pytest.mark.parametrize("orders", ["both", "baseline-first"])
def test_score_counts_the_tokens_that_rewards_prefill(
    finished: system.Run, tmp_path: Path, orders: str
) -> None:
    run, change = finished.copy(tmp_path / "store"), f"score.orders={orders}"
    run_stage(run.graph(change), "score")
    encoder = load(run.artifact("train_ranker").local("ranker"))._encoder
    prompts = {row["prompt_id"]: row["prompt"] for row in run.rows("prepare/prompts")}
    texts: dict[str, set[str]] = {}
    baselines = {}
    for row in run.rows("decode/candidates"):
        texts.setdefault(row["prompt_id"], set()).add(row["response"].strip())
        if row["is_baseline"]:
            baselines[row["prompt_id"]] = row["response"]
    expected = 0
    for prompt_id, candidates in texts.items():
        baseline, context = baselines[prompt_id], len(encoder.context(prompts[prompt_id]).ids)
        expected += context + len(encoder.side("A", baseline))
        expected += sum(len(encoder.side("B", c) + encoder.suffix) for c in candidates)
        if orders == "both":
            expected += context + sum(len(encoder.branch(c, baseline)) for c in candidates)
    counters = run.artifact("score", change).manifest.counters
    assert counters["tokens_prefilled"] == expected
    assert counters["scored_once_for_copies"] == 96 - sum(map(len, texts.values()))


def test_score_records_accuracy_and_reliability_of_its_ranker(finished: system.Run) -> None:
    manifest = finished.artifact("score").manifest
    comparisons = held_out(finished)
    rows = checks(finished, "held_out")
    excess = [
        len(c["chosen"]) - len(c["rejected"])
        for c in (comparisons[row["comparison_id"]] for row in rows)
    ]
    found = judge([(row["forward"] - row["backward"]) / 2 for row in rows], excess)
    for name, value in found.figures.items():
        assert manifest.counters[name] == pytest.approx(value, abs=1e-6), name
    assert manifest.curves["reliability"] == [
        pytest.approx(bin.figures, abs=1e-6) for bin in found.by_margin
    ]
    # One trained ranker scores, so the stage that made it has found the same.
    trained = finished.artifact("train_ranker").manifest.counters
    assert trained["accuracy"] == found.accuracy.value
    assert trained["held_out_loss"] == pytest.approx(found.mean_loss, abs=1e-4)
    each_order = in_each_order(*([row[name] for row in rows] for name in ("forward", "backward")))
    for name, value in each_order.figures.items():
        assert trained[name] == pytest.approx(value, abs=1e-4), name
    page = Path(finished.artifact("report").output("report"), "report.html").read_text("utf-8")
    assert f"<dt>Held-out comparisons</dt><dd>{len(rows)}</dd>" in page
    advice = bias_advice(manifest.counters, "both")
    assert advice is None or advice in page
    assert ("the order decides who wins" in page) == (advice is not None)


def plant(directory: str, nats: float) -> None:
    """Make a ranker say A with a logit that is `nats` above B's, whatever it reads.

    The last layer adds so much to one unit that it is nearly all of the normed state: root 32.
    """
    path = Path(directory, "model.safetensors")
    weights = load_file(path)
    weights["model.layers.1.mlp.down_proj.bias"][0] = 1e4
    weights["lm_head.weight"][:, 0] = 0
    labels = RankerEncoder(load_tokenizer(directory), Templates()).labels
    weights["lm_head.weight"][labels.a, 0] = nats / np.sqrt(32)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("nats", [1.5, -1.5])
def test_score_shows_the_bias_of_a_ranker_that_likes_a_slot_and_warns_of_it(
    finished: system.Run,
    make_llama: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    nats: float,
) -> None:
    run = finished.copy(tmp_path / "store")
    directory = make_llama(tmp_path / "biased", mlp_bias=True)
    plant(directory, nats)
    changes = objectives(f"name: biased, ranker: {directory}")
    with caplog.at_level(logging.WARNING):
        run_stage(run.graph(*changes), "score")
    assert "in 100% of the pairs the order decides who wins" in caplog.text
    assert "mean of both orders" in caplog.text and "train_ranker.orders: mean" in caplog.text
    counters = run.artifact("score", *changes).manifest.counters
    assert counters["positional_bias"] == pytest.approx(nats, abs=0.02)
    assert counters["positional_bias_spread"] < 0.02
    assert counters["verdicts_flipped"] == 1.0 and counters["flipped_pairs"] == 16
    # Both orders are averaged on held-out comparisons, so there the bias does no harm.
    assert counters["believed"] == pytest.approx(0.5, abs=0.01)
    # Rewards average both orders too; in one order the slot is all that they hold.
    for orders, expected in (("both", 0.0), ("baseline-first", -nats)):
        change = f"score.orders={orders}"
        run_stage(run.graph(*changes, change), "score")
        rewards = [row["reward"] for row in run.rows("score/rewards", *changes, change)]
        assert rewards == pytest.approx([expected] * 96, abs=0.05)


def test_score_counts_contexts_that_are_cut(finished: system.Run, tmp_path: Path) -> None:
    run = finished.copy(tmp_path / "store")
    prompts = {row["prompt_id"]: row["prompt"] for row in run.rows("prepare/prompts")}
    chosen = {row["prompt_id"] for row in run.rows("decode/candidates")}
    ranker = load(run.artifact("train_ranker").local("ranker"))
    sizes = [len(ranker._encoder.context(prompts[prompt_id]).ids) for prompt_id in chosen]
    limit = sorted(sizes)[8]
    whole = run.artifact("score").manifest.counters["contexts_cut"]
    shard = ScoreShard(
        RankerSource(
            run.artifact("train_ranker").local("ranker"),
            run.config().compute,
            Templates(max_context_tokens=limit),
        ),
        frozenset(),
        0,
        "both",
        Templates(),
    )
    tables = {
        "candidates": run.artifact("decode").read("candidates"),
        "prompts": run.artifact("prepare").read("prompts"),
        "comparisons": run.artifact("compare").read("comparisons"),
    }
    counted = shard(shard.setup(), tables).counters["contexts_cut"]
    assert whole == 0 and counted == sum(size > limit for size in sizes) > 0


def test_score_with_a_broken_ranker_names_the_prompt(
    finished: system.Run, make_llama: Any, tmp_path: Path
) -> None:
    run = finished.copy(tmp_path / "store")
    directory = make_llama(tmp_path / "broken")
    weights = load_file(Path(directory, "model.safetensors"))
    weights["lm_head.weight"][:] = np.nan
    save_file(weights, Path(directory, "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"^prompt [0-9a-f]{16}: .*NaN.*compute.dtype") as error:
        run_stage(run.graph(*objectives(f"name: broken, ranker: {directory}")), "score")
    named = str(error.value).split()[1].rstrip(":")
    assert named in {row["prompt_id"] for row in run.rows("decode/candidates")}


def test_planted_preference_gets_the_highest_reward_of_every_prompt(
    finished: system.Run, make_llama: Any, tmp_path: Path
) -> None:
    """The sign of a reward, from the labels that a ranker learnt to the rows of `score`."""
    directory = make_llama(tmp_path / "planted", initializer_range=0.1)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    plant_preference(model, RankerEncoder(load_tokenizer(directory), Templates()))
    model.save_pretrained(directory)
    words = ["fox", "good", "lazy", "empty", "file", "lines"]
    inputs = {
        "candidates": [
            {**row, "response": words[row["sample_index"]]}
            for row in finished.rows("decode/candidates")
        ],
        "prompts": [{**row, "prompt": "a text"} for row in finished.rows("prepare/prompts")],
        "comparisons": [],
    }
    plan = Plan(
        "score",
        {name: reshard(rows, tmp_path / name, name, 2) for name, rows in inputs.items()},
        {name: Dataset(str(tmp_path / name), name) for name in ("rewards", "checks")},
        str(tmp_path / "counters"),
        2,
    )
    source = RankerSource(directory, finished.config().compute, Templates())
    map_shards(ScoreShard(source, frozenset(), 0, "both", Templates()), plan, ONE)
    texts = {row["response_id"]: row["response"] for row in inputs["candidates"]}
    best: dict[str, dict[str, Any]] = {}
    for row in read_all(tmp_path / "rewards", "rewards"):
        known = best.get(row["prompt_id"])
        if known is None or row["reward"] > known["reward"]:
            best[row["prompt_id"]] = row
    assert len(best) == 16
    assert {texts[row["response_id"]] for row in best.values()} == {"good"}


def test_checks_of_several_rankers_are_those_of_their_weighted_sum(
    finished: system.Run, tmp_path: Path
) -> None:
    run = finished.copy(tmp_path / "store")
    other = run.artifact("train_gold_ranker").local("ranker")
    changes = objectives("name: own", f"name: other, ranker: {other}, weight: 3", standardise=True)
    run_stage(run.graph(*changes), "score")
    rows = {row["name"]: row for row in run.rows("score/objectives", *changes)}
    directories = {"own": run.artifact("train_ranker").local("ranker"), "other": other}
    together = WeightedRanker(
        [load(directories[name]) for name in rows],
        [row["weight"] / row["scale"] for row in rows.values()],
    )
    comparisons = held_out(run)
    found = checks(run, "held_out", *changes)
    z = together.preference(
        [
            Comparison(c["prompt"], c["chosen"], c["rejected"])
            for c in (comparisons[row["comparison_id"]] for row in found)
        ]
    )
    assert [(row["forward"] - row["backward"]) / 2 for row in found] == pytest.approx(z, abs=1e-4)
    counters = run.artifact("score", *changes).manifest.counters
    assert counters["accuracy"] == np.mean(np.where(z == 0, 0.5, z > 0))
    rewards = {row["response_id"]: row["reward"] for row in run.rows("score/rewards", *changes)}
    pairs = checks(run, "candidates", *changes)
    assert [(row["backward"] - row["forward"]) / 2 for row in pairs] == pytest.approx(
        [rewards[row["second_id"]] for row in pairs], abs=1e-5
    )
    bias = np.mean([(row["forward"] + row["backward"]) / 2 for row in pairs])
    assert counters["positional_bias"] == pytest.approx(bias)
    by_prompt: dict[str, list[float]] = {}
    for row in run.rows("score/rewards", *changes):
        by_prompt.setdefault(row["prompt_id"], []).append(row["reward"])
    assert counters["reward_spread_sum"] == pytest.approx(sum(map(np.std, by_prompt.values())))
    assert counters["own/tokens_prefilled"] == counters["other/tokens_prefilled"] > 0


@pytest.mark.parametrize("total", [1, 5, 40])
def test_checks_are_the_same_however_sharded(
    finished: system.Run, tmp_path: Path, total: int
) -> None:
    config = finished.config()
    inputs = {
        "candidates": finished.rows("decode/candidates"),
        "prompts": finished.rows("prepare/prompts"),
        "comparisons": finished.rows("compare/comparisons"),
    }
    plan = Plan(
        "score",
        {name: reshard(rows, tmp_path / name, name, total) for name, rows in inputs.items()},
        {name: Dataset(str(tmp_path / name), name) for name in ("rewards", "checks")},
        str(tmp_path / "counters"),
        total,
    )
    ranker = RankerSource(
        finished.artifact("train_ranker").local("ranker"), config.compute, config.templates
    )
    everyone = frozenset(row["prompt_id"] for row in inputs["prompts"])
    shard = ScoreShard(ranker, everyone, config.seed, "both", config.templates)
    map_shards(shard, plan, ONE)
    key = ("prompt_id", "comparison_id")
    expected = sorted(finished.rows("score/checks"), key=lambda row: [row[k] for k in key])
    found = read_all(tmp_path / "checks", "checks")
    for name in (*key, "origin", "first_id", "second_id"):
        assert [row[name] for row in found] == [row[name] for row in expected]
    for name in ("forward", "backward"):
        assert [row[name] for row in found] == pytest.approx(
            [row[name] for row in expected], abs=1e-4
        )


def test_flipped_prompts_are_drawn_by_key_and_no_more_than_stated(
    finished: system.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished.copy(tmp_path / "store")
    monkeypatch.setattr(score, "MOST_FLIPPED", 5)
    run_stage(run.graph(), "score", force=True)
    after = checks(system.Run(run.path, run.store), "candidates")
    before = {row["comparison_id"]: row for row in checks(finished, "candidates")}
    assert len(after) == 5
    for row in after:
        expected = before[row["comparison_id"]]
        for name in ("forward", "backward"):
            # another batch is rounded otherwise
            assert row[name] == pytest.approx(expected[name], abs=1e-4)
            expected = expected | {name: row[name]}
        assert row == expected
    prompt_ids = sorted({row["prompt_id"] for row in finished.rows("decode/candidates")})
    order = seeds.order(prompt_ids, "flipped", run.config().seed)
    assert {row["prompt_id"] for row in after} == {prompt_ids[int(i)] for i in order[:5]}


def test_score_without_held_out_comparisons_says_so_and_goes_on(
    finished: system.Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = finished.copy(tmp_path / "store")
    rows = [row for row in run.rows("compare/comparisons") if row["split"] == "train"]
    reshard(rows, tmp_path / "comparisons", "comparisons", 3)
    with caplog.at_level(logging.WARNING):
        ran = run_stage(run.graph(), "score", given={"comparisons": str(tmp_path / "comparisons")})
    assert "no comparison is in the validation split" in caplog.text
    counters = ran.artifact.manifest.counters
    assert counters["held_out_comparisons"] == 0 and "accuracy" not in counters
    assert counters["flipped_pairs"] == 16 and "positional_bias" in counters
    assert "reliability" not in ran.artifact.manifest.curves
    assert ran.artifact.digest("rewards") == finished.artifact("score").digest("rewards")
