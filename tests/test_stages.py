"""Every stage of the tiny run: what it wrote, and that the artifacts fit each other."""

import html
import itertools
import math
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow as pa
import pytest
import system
import torch
from transformers import AutoModelForCausalLM

from pipelines.decode import Decoding
from pipelines.evaluate import GenerateShard
from pipelines.score import RankerSource
from rso.config import identity
from rso.decoding import Request, Sampling, load_decoder
from rso.errors import UserError
from rso.models import load_tokenizer
from rso.parquet import read_shard, write_shard
from rso.ranking import Comparison
from rso.templates import encode_prompt
from schemas import SCHEMAS
from stages import stages
from stages.report import _sampling
from stages.runner import run_stage

STAGES = (
    "prepare train_sft compare train_ranker train_gold_ranker decode score reject pair logps "
    "train_policy evaluate report"
)
DATASETS = {
    "prepare/prompts": 60,
    "prepare/demonstrations": 60,
    "prepare/comparisons": 0,
    "prepare/quarantine": 4,
    "compare/comparisons": None,
    "decode/candidates": 16 * 6,
    "score/rewards": 16 * 6,
    "score/objectives": 1,
    "score/checks": None,
    "reject/accepted": 16 * 6,
    "reject/diagnostics": 16 * 4,
    "pair/pairs": None,
    "logps/logps": None,
    # greedy and sampled of two systems, and one sample of the policy for the KL
    "evaluate/generations": 8 * 5,
    "evaluate/judgements": 8 * 4 * 4,
    "evaluate/metrics": None,
}
MODELS = ["train_sft/reference", "train_ranker/ranker", "train_gold_ranker/ranker"]
Row = dict[str, Any]


def by(rows: list[Row], *keys: str) -> dict[Any, Row]:
    """Return rows by a unique key."""
    found = {tuple(row[key] for key in keys): row for row in rows}
    assert len(found) == len(rows), f"{keys} are not unique"
    return found


def split_of(run: system.Run) -> dict[str, str]:
    return {row["prompt_id"]: row["split"] for row in run.rows("prepare/prompts")}


def test_stages_every_stage_of_the_table_has_its_outputs(finished: system.Run) -> None:
    graph = finished.graph()
    assert " ".join(graph.table) == STAGES
    for name, stage in graph.table.items():
        artifact = graph.find(name)
        assert artifact is not None and artifact.outputs == sorted(stage.writes)
        assert graph.store.verify(artifact) == []
    datasets = [f"{s.name}/{o}" for s in graph.table.values() for o in s.writes if o in SCHEMAS]
    assert datasets == list(DATASETS)


@pytest.mark.parametrize(("place", "count"), DATASETS.items())
def test_stages_datasets_open_with_plain_pandas(
    finished: system.Run, place: str, count: int | None
) -> None:
    stage, output = place.split("/")
    artifact = finished.artifact(stage)
    frame = pandas.read_parquet(artifact.output(output))
    assert list(frame.columns) == SCHEMAS[output].names
    assert len(frame) == artifact.manifest.rows[output]
    assert len(frame) == count if count is not None else len(frame) > 0


@pytest.mark.parametrize("place", [*MODELS, "train_policy/policy"])
def test_stages_models_open_with_plain_transformers(finished: system.Run, place: str) -> None:
    stage, output = place.split("/")
    directory = finished.artifact(stage).output(output)
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokens = load_tokenizer(directory)("the list", return_tensors="pt")
    assert torch.isfinite(model(tokens["input_ids"]).logits).all()


@pytest.mark.parametrize(
    ("stage", "above"),
    [
        ("train_sft/reference", None),
        ("train_ranker/ranker", "train_sft/reference"),
        ("train_gold_ranker/ranker", "train_ranker/ranker"),
        ("train_policy/policy", "train_sft/reference"),
    ],
)
def test_stages_trained_models_differ_from_what_they_came_from(
    finished: system.Run, tiny_llama_dir: str, stage: str, above: str | None
) -> None:
    def weights(place: str) -> torch.Tensor:
        name, output = place.split("/")
        directory = finished.artifact(name).output(output)
        model = AutoModelForCausalLM.from_pretrained(directory)
        return model.model.layers[1].mlp.down_proj.weight.detach()

    start = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    before = weights(above) if above else start.model.layers[1].mlp.down_proj.weight.detach()
    assert (weights(stage) - before).abs().max() > 1e-4


def test_prepare_rows_in_are_rows_out_and_refused(finished: system.Run) -> None:
    counters = finished.artifact("prepare").manifest.counters
    quarantine = finished.rows("prepare/quarantine")
    demonstrations = finished.rows("prepare/demonstrations")
    assert counters["rows_read"] == 64 == len(demonstrations) + len(quarantine)
    assert [(row["line"], row["field"]) for row in sorted(quarantine, key=lambda r: r["line"])] == [
        (61, "line"),
        (62, "body"),
        (63, ""),
        (64, "body"),
    ]
    assert {(row["prompt"], row["target"]) for row in demonstrations} == {
        (row["body"], row["line"]) for row in system.examples()
    }


def test_prepare_groups_stay_on_one_side_of_the_split(finished: system.Run) -> None:
    module = {row["body"]: row["module"] for row in system.examples()}
    sides = defaultdict(set)
    for row in finished.rows("prepare/prompts"):
        sides[module[row["prompt"]]].add(row["split"])
    assert all(len(side) == 1 for side in sides.values())
    assert set.union(*sides.values()) == {"train", "validation", "test"}


def test_stages_shards_of_all_artifacts_line_up_by_prompt(finished: system.Run) -> None:
    place_of: dict[str, int] = {}
    for place in DATASETS:
        stage, output = place.split("/")
        artifact = finished.artifact(stage)
        if output in ("quarantine", "metrics", "objectives"):
            continue
        assert artifact.num_shards(output) == 3, place
        for index in range(3):
            ids = read_shard(artifact.output(output), output, index, 3)["prompt_id"].to_pylist()
            assert all(place_of.setdefault(prompt_id, index) == index for prompt_id in ids), place
    assert len(set(place_of.values())) == 3


def test_stages_use_prompts_of_their_own_split_alone(finished: system.Run) -> None:
    split = split_of(finished)

    def splits(place: str) -> set[str]:
        return {split[row["prompt_id"]] for row in finished.rows(place)}

    assert splits("compare/comparisons") == {"train", "validation"}
    assert splits("decode/candidates") == splits("pair/pairs") == {"train"}
    assert splits("evaluate/generations") == splits("evaluate/judgements") == {"test"}
    for row in finished.rows("compare/comparisons"):
        assert row["split"] == split[row["prompt_id"]]


def test_compare_prefers_what_the_labeller_prefers(finished: system.Run) -> None:
    comparisons = finished.rows("compare/comparisons")
    assert all(len(row["chosen"].split()) > len(row["rejected"].split()) for row in comparisons)
    counters = finished.artifact("compare").manifest.counters
    assert counters["comparisons"] == len(comparisons) == 30 * 2 - counters["ties"]


def test_rankers_are_trained_on_disjoint_prompts(finished: system.Run) -> None:
    from stages.train_ranker import fold

    config = finished.config()
    folds = {
        name: set(getattr(config, name).folds) for name in ("train_ranker", "train_gold_ranker")
    }
    assert not folds["train_ranker"] & folds["train_gold_ranker"]
    train = [r for r in finished.rows("compare/comparisons") if r["split"] == "train"]
    used = Counter(fold(row["prompt_id"], 3) for row in train)
    assert set(used) == {0, 1, 2}


def test_decode_gives_each_prompt_its_samples_and_one_baseline(finished: system.Run) -> None:
    candidates = finished.rows("decode/candidates")
    by(candidates, "response_id")
    for _, rows in groups(candidates):
        assert [row["sample_index"] for row in sorted(rows, key=lambda r: r["sample_index"])] == [
            *range(6)
        ]
        assert sum(row["is_baseline"] for row in rows) == 1
    for row in candidates:
        assert 0 < row["num_tokens"] == len(row["token_ids"]) <= 8
        assert math.isfinite(row["cumulative_logp"]) and row["cumulative_logp"] < 0


def test_decode_takes_prompts_that_were_not_compared(finished: system.Run, tmp_path: Path) -> None:
    """Both choose among the same training prompts, which here are enough for both."""
    run = finished.copy(tmp_path / "store")
    few = "decode.num_prompts=8"
    run_stage(run.graph(few), "decode")

    def prompts(place: str, *changes: str) -> set[str]:
        return {row["prompt_id"] for row in run.rows(place, *changes)}

    train = {prompt_id for prompt_id, split in split_of(run).items() if split == "train"}
    compared = prompts("compare/comparisons") & train
    decoded = prompts("decode/candidates", few)
    assert len(train) >= 24 + 8 and len(decoded) == 8 and decoded <= train
    assert not decoded & compared
    assert decoded < prompts("decode/candidates")


def test_score_rewards_are_the_candidates_each_against_its_baseline(finished: system.Run) -> None:
    candidates = by(finished.rows("decode/candidates"), "prompt_id", "response_id")
    rewards = by(finished.rows("score/rewards"), "prompt_id", "response_id")
    assert rewards.keys() == candidates.keys()
    baselines = {key[0]: key[1] for key, row in candidates.items() if row["is_baseline"]}
    for (prompt_id, _), row in rewards.items():
        assert row["baseline_id"] == baselines[prompt_id]
        assert math.isfinite(row["reward"])


def test_reject_keeps_every_candidate_with_a_verdict(finished: system.Run) -> None:
    rewards = by(finished.rows("score/rewards"), "prompt_id", "response_id")
    accepted = by(finished.rows("reject/accepted"), "prompt_id", "response_id")
    assert accepted.keys() == rewards.keys()
    assert all(row["reward"] == rewards[key]["reward"] for key, row in accepted.items())
    for _, rows in groups(list(accepted.values())):
        positions = sorted(row["position"] for row in rows if row["is_accepted"])
        assert positions == [0, 1, 2, 3]
        assert all(row["position"] == -1 for row in rows if not row["is_accepted"])


def test_reject_records_what_each_beta_would_do(finished: system.Run) -> None:
    manifest = finished.artifact("reject").manifest
    points = manifest.curves["betas"]
    assert [point["beta"] for point in points] == [0.0, 0.05, 0.5, 5.0]
    rows = finished.rows("reject/diagnostics")
    for point in points:
        mine = [row for row in rows if row["beta"] == point["beta"]]
        for name in ("kl", "effective_samples", "reward_gain", "has_best", "expected_acceptance"):
            assert point[name] == pytest.approx(np.mean([row[name] for row in mine])), name
    accepted = [row for row in finished.rows("reject/accepted") if row["is_accepted"]]
    assert manifest.counters["accepted"] == len(accepted) == 4 * 16
    page = Path(finished.artifact("report").output("report"), "report.html").read_text()
    assert '<tr class="chosen">\n<td class="number">0.5</td>' in page


def test_reject_in_spreads_is_reject_at_the_nats_that_it_records(
    finished: system.Run, tmp_path: Path
) -> None:
    run = finished.copy(tmp_path / "store")
    spreads = [
        np.std([row["reward"] for row in rows]) for _, rows in groups(run.rows("score/rewards"))
    ]
    changes = ("reject.beta_unit=spread", "reject.beta=0.75", "reject.betas=[3.0]")
    run_stage(run.graph(*changes), "reject")
    manifest = run.artifact("reject", *changes).manifest
    counters = manifest.counters
    assert counters["reward_spread_median"] == pytest.approx(np.median(spreads))
    assert counters["beta_nats"] == pytest.approx(0.75 * np.median(spreads))
    betas = [0.0, counters["beta_nats"], 3.0 * counters["reward_spread_median"]]
    assert [point["beta"] for point in manifest.curves["betas"]] == betas
    assert {row["beta"] for row in run.rows("reject/diagnostics", *changes)} == set(betas)
    assert _sampling(manifest)["beta"] == betas[1]

    in_nats = (f"reject.beta={betas[1]!r}", f"reject.betas=[{betas[2]!r}]")
    run_stage(run.graph(*in_nats), "reject")
    for output in ("accepted", "diagnostics"):
        assert run.rows(f"reject/{output}", *in_nats) == run.rows(f"reject/{output}", *changes)
    assert run.artifact("reject", *in_nats).manifest.counters == counters


def test_reject_records_the_beta_that_leaves_enough_effective_samples(
    finished: system.Run, tmp_path: Path
) -> None:
    """As many effective samples as `reject.num_samples`, 4."""
    run = finished.copy(tmp_path / "store")
    better = finished.artifact("reject").manifest.counters["beta_advised_nats"]
    change = f"reject.beta={better!r}"
    run_stage(run.graph(change), "reject")
    points = run.artifact("reject", change).manifest.curves["betas"]
    (point,) = [point for point in points if point["beta"] == better]
    assert point["effective_samples"] == pytest.approx(4.0, rel=1e-4)


def test_pair_sides_are_accepted_candidates_of_their_prompt(finished: system.Run) -> None:
    candidates = by(finished.rows("decode/candidates"), "prompt_id", "response_id")
    accepted = by(finished.rows("reject/accepted"), "prompt_id", "response_id")
    prompts = by(finished.rows("prepare/prompts"), "prompt_id")
    pairs = finished.rows("pair/pairs")
    by(pairs, "pair_id")
    for pair in pairs:
        assert pair["prompt"] == prompts[(pair["prompt_id"],)]["prompt"]
        assert pair["chosen_id"] != pair["rejected_id"]
        for side in ("chosen", "rejected"):
            key = pair["prompt_id"], pair[f"{side}_id"]
            assert accepted[key]["is_accepted"]
            assert pair[side] == candidates[key]["response"]
            assert pair[f"{side}_token_ids"] == candidates[key]["token_ids"]
        assert 0.5 <= pair["label_probability"] <= 1
        assert (pair["match_round"], pair["origin"]) == (0, "rso-sample-rank")
    counters = finished.artifact("pair").manifest.counters
    assert len(pairs) == 16 * 2 - counters["identical"]
    # First round: nobody plays twice.
    assert max(Counter(p[f"{s}_id"] for p in pairs for s in ("chosen", "rejected")).values()) == 1


def test_logps_cover_exactly_the_responses_of_pairs(finished: system.Run) -> None:
    logps = by(finished.rows("logps/logps"), "prompt_id", "response_id")
    sides = {
        (pair["prompt_id"], pair[f"{side}_id"]): len(pair[f"{side}_token_ids"])
        for pair in finished.rows("pair/pairs")
        for side in ("chosen", "rejected")
    }
    assert {key: row["num_tokens"] for key, row in logps.items()} == sides


def test_logps_equal_a_plain_forward_pass_of_the_reference(finished: system.Run) -> None:
    directory = finished.artifact("train_sft").output("reference")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = load_tokenizer(directory)
    logps = by(finished.rows("logps/logps"), "prompt_id", "response_id")
    for pair in finished.rows("pair/pairs")[:6]:
        prefix = encode_prompt(tokenizer, finished.config().templates, pair["prompt"])
        response = pair["chosen_token_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prefix + response])).logits[0].log_softmax(-1)
        start = len(prefix) - 1
        steps = range(start, start + len(response))
        expected = sum(float(logits[i, token]) for i, token in zip(steps, response, strict=True))
        found = logps[(pair["prompt_id"], pair["chosen_id"])]["logps"]
        assert found == pytest.approx(expected, rel=1e-4)


def test_decode_and_logps_agree_about_the_same_response(finished: system.Run) -> None:
    candidates = by(finished.rows("decode/candidates"), "prompt_id", "response_id")
    for row in finished.rows("logps/logps"):
        decoded = candidates[(row["prompt_id"], row["response_id"])]["cumulative_logp"]
        assert row["logps"] == pytest.approx(decoded, rel=1e-3)


def test_train_policy_starts_at_the_reference(finished: system.Run) -> None:
    counters = finished.artifact("train_policy").manifest.counters
    assert counters["max_step_zero_nats_per_token"] < 1e-4
    curve = finished.artifact("train_policy").manifest.curves["train_policy"]
    assert [point["step"] for point in curve] == [1, 2, 3, 4]
    assert all(math.isfinite(point["loss"]) for point in curve)


def greedy_answers(run: system.Run, rows: list[Row]) -> list[str]:
    """The SFT policy's own, as `train_policy` decodes them."""
    directory = run.artifact("train_sft").output("reference")
    templates, tokenizer = run.config().templates, load_tokenizer(directory)
    requests = [
        Request(row["prompt_id"], encode_prompt(tokenizer, templates, row["prompt"]))
        for row in rows
    ]
    decoder = load_decoder("transformers", directory, dtype="float32")
    decoded = decoder.decode(requests, Sampling(0.0, top_k=0, max_new_tokens=8), seed=0)
    return [found[0].text for found in decoded]


def test_train_policy_chooses_by_probability_and_records_the_contest(
    finished: system.Run, tmp_path: Path
) -> None:
    run = finished.copy(tmp_path / "store")
    two = "train_policy.num_evaluations=2"
    manifest = run_stage(run.graph(two), "train_policy").artifact.manifest
    counters, curve = manifest.counters, manifest.curves["train_policy_evaluations"]
    assert [point["step"] for point in curve] == [2.0, 4.0]
    best = max(curve, key=lambda point: (point["mean_probability"], point["mean_margin"]))
    (other,) = [point for point in curve if point is not best]
    assert counters["selected_step"] == best["step"]
    assert counters["validation_win_rate"] == best["win_rate"]
    assert counters["validation_mean_probability"] == best["mean_probability"]
    difference = best["mean_probability"] - other["mean_probability"]
    assert counters["choice_difference"] == pytest.approx(difference)
    assert counters["choice_difference_low"] <= counters["choice_difference"]
    assert counters["choice_difference"] <= counters["choice_difference_high"]

    rows = [row for row in run.rows("prepare/prompts") if row["split"] == "validation"][:4]
    ranker = RankerSource(
        run.artifact("train_ranker").output("ranker"), run.config().compute, run.config().templates
    )
    margins = ranker.load().preference(
        [
            Comparison(row["prompt"], answer, row["target"])
            for row, answer in zip(rows, greedy_answers(run, rows), strict=True)
        ]
    )
    expected = (1 / (1 + np.exp(-margins.astype(float)))).mean()
    assert counters["reference_mean_probability"] == pytest.approx(expected, abs=1e-4)


def test_train_policy_with_one_evaluation_chooses_nothing(finished: system.Run) -> None:
    counters = finished.artifact("train_policy").manifest.counters
    assert 0 <= counters["validation_win_rate"] <= 1
    assert 0 < counters["validation_mean_probability"] < 1
    assert not counters.keys() & {"reference_mean_probability", "choice_difference"}


def test_train_policy_against_the_reference_needs_no_targets(
    finished: system.Run, tmp_path: Path
) -> None:
    run = finished.copy(tmp_path / "store")
    rows = [row | {"target": None} for row in run.rows("prepare/prompts")]
    table = pa.Table.from_pylist(rows, schema=SCHEMAS["prompts"])
    write_shard(str(tmp_path / "prompts"), "prompts", 0, 1, table)
    given = {"prompts": str(tmp_path / "prompts")}
    two = "train_policy.num_evaluations=2"
    with pytest.raises(UserError, match=r"set train_policy.selection.against: reference"):
        run_stage(run.graph(two), "train_policy", given=given)
    # So slow that the policy's answers are still the reference's: no margin, whatever the ranker.
    changes = (two, "train_policy.selection.against=reference", "train_policy.learning_rate=1e-9")
    manifest = run_stage(run.graph(*changes), "train_policy", given=given).artifact.manifest
    assert "reference_mean_probability" not in manifest.counters
    for point in manifest.curves["train_policy_evaluations"]:
        assert point["win_rate"] == 0.5 and point["mean_probability"] == pytest.approx(0.5)
        assert point["mean_margin"] == 0.0
    assert manifest.counters["selected_step"] == 2


def test_train_policy_says_that_the_contest_is_saturated(
    finished: system.Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One prompt, and a ranker whose logits are a million times those of the run's."""
    run = finished.copy(tmp_path / "store")
    ranker = tmp_path / "ranker"
    shutil.copytree(run.artifact("train_ranker").output("ranker"), ranker)
    model = AutoModelForCausalLM.from_pretrained(ranker)
    model.get_output_embeddings().weight.data *= 1e6
    model.save_pretrained(ranker)
    changes = ("train_policy.num_evaluations=2", "train_policy.num_validation_prompts=1")
    with caplog.at_level("WARNING"):
        run_stage(run.graph(*changes), "train_policy", given={"ranker": str(ranker)})
    assert "contest that chooses the checkpoint is saturated" in caplog.text
    assert "set train_policy.selection.against: reference" in caplog.text


def test_evaluate_judgements_are_matches_times_judges(finished: system.Run) -> None:
    judgements = finished.rows("evaluate/judgements")
    place = ("prompt_id", "system", "opponent", "sampling")
    matches = Counter(tuple(row[name] for name in place) for row in judgements)
    prompts = {row["prompt_id"] for row in finished.rows("evaluate/generations")}
    assert len(prompts) == 8
    assert len(matches) == 4 * len(prompts) and set(matches.values()) == {4}
    assert len({row["judge"] for row in judgements}) == 4
    wins = defaultdict(list)
    for row in judgements:
        if row["opponent"] == "reference":
            wins[row["judge"], row["sampling"]].append(row)
    assert len(wins) == 4 * 2
    for metric in finished.rows("evaluate/metrics"):
        rows = wins.get((metric["judge"], metric["sampling"]))
        if metric["metric"] != "win_rate" or metric["opponent"] != "reference" or not rows:
            continue
        points = {"win": 1.0, "tie": 0.5, "loss": 0.0}
        mean = sum(points[row["verdict"]] for row in rows) / len(rows)
        assert metric["value"] == pytest.approx(mean)
        assert metric["low"] <= mean <= metric["high"] and metric["num_prompts"] == 8


def test_evaluate_samples_each_system_once_a_prompt(finished: system.Run) -> None:
    generations = finished.rows("evaluate/generations")
    found = by(generations, "prompt_id", "system", "sampling")
    prompts = {row["prompt_id"] for row in generations}
    ways = Counter((row["system"], row["sampling"]) for row in generations)
    assert ways == {
        ("policy", "greedy"): len(prompts),
        ("policy", "sampled"): len(prompts),
        ("policy", "ancestral"): len(prompts),
        ("reference", "greedy"): len(prompts),
        ("reference", "sampled"): len(prompts),
    }
    # Cooled samples of a model of random weights are not its greedy answers, nor all alike.
    for name in ("policy", "reference"):
        pairs = [
            [found[i, name, way]["response"] for way in ("greedy", "sampled")] for i in prompts
        ]
        assert any(greedy != sampled for greedy, sampled in pairs)
        assert len({sampled for _, sampled in pairs}) > 1


def test_evaluate_sampled_answers_do_not_depend_on_other_prompts(
    finished: system.Run, tmp_path: Path
) -> None:
    run = finished.copy(tmp_path / "store")
    changes = ("evaluate.num_prompts=5",)
    run_stage(run.graph(*changes), "evaluate")
    every = by(finished.rows("evaluate/generations"), "response_id")
    some = by(run.rows("evaluate/generations", *changes), "response_id")
    assert len(some) == 5 * 5
    for key, row in some.items():
        assert row["token_ids"] == every[key]["token_ids"], row["sampling"]


def test_evaluate_without_sampling_judges_greedy_answers_alone(
    finished: system.Run, tmp_path: Path
) -> None:
    run = finished.copy(tmp_path / "store")
    changes = ("evaluate.sampling=null", "evaluate.num_kl_prompts=0", "train_gold_ranker=null")
    was_cached = system.run_all(run.config(*changes))
    assert "train_gold_ranker" not in was_cached
    assert [name for name, cached in was_cached.items() if not cached] == ["evaluate", "report"]
    assert len(run.rows("evaluate/generations", *changes)) == 8 * 2
    kept = [
        row
        for row in finished.rows("evaluate/judgements")
        if row["sampling"] == "greedy" and row["judge"] != "gold_ranker"
    ]
    key = ("prompt_id", "system", "opponent", "judge")
    found = by(run.rows("evaluate/judgements", *changes), *key)
    assert found.keys() == by(kept, *key).keys()
    assert {row["sampling"] for row in found.values()} == {"greedy"}
    page = Path(run.artifact("report", *changes).output("report"), "report.html").read_text("utf-8")
    assert "Gold ranker" not in page and "sampled</th>" not in page


def test_evaluate_ends_greedy_and_sampled_answers_at_a_stop_text(finished: system.Run) -> None:
    prompts = finished.artifact("prepare").read("prompts").slice(0, 6)
    ids = prompts["prompt_id"].to_pylist()
    greedy = Decoding(
        label="greedy",
        model=finished.artifact("train_sft").local("reference"),
        engine="transformers",
        compute=finished.config().compute,
        templates=finished.config().templates,
        sampling=Sampling(temperature=0.0, top_k=0, max_new_tokens=8),
        seed=0,
    )
    sampled = replace(greedy, sampling=replace(greedy.sampling, temperature=1.0))

    def answers(**templates: Any) -> dict[Any, Row]:
        changed = greedy.templates.model_copy(update=templates)
        ways = {
            name: replace(decoding, templates=changed)
            for name, decoding in {"greedy": greedy, "sampled": sampled}.items()
        }
        shard = GenerateShard(ways, "policy", dict.fromkeys(ways, ids))
        made = shard(shard.setup(), {"prompts": prompts}).tables["generations"]
        return by(made.to_pylist(), "prompt_id", "sampling")

    free = answers()
    stop = next(
        row["response"][3:5]
        for (_, sampling), row in free.items()
        if sampling == "sampled" and len(row["response"]) > 5
    )
    stopped = answers(stop=(stop,))
    assert {key for key, row in free.items() if stop in row["response"]} & {
        (i, "sampled") for i in ids
    }
    for key, row in stopped.items():
        assert row["response"] == free[key]["response"].partition(stop)[0]


def test_evaluate_samples_for_kl_have_both_log_probabilities(finished: system.Run) -> None:
    for row in finished.rows("evaluate/generations"):
        has_both = row["policy_logps"] is not None and row["reference_logps"] is not None
        assert has_both == (row["sampling"] == "ancestral")


def test_report_stands_alone_and_holds_the_examples(finished: system.Run) -> None:
    page = Path(finished.artifact("report").output("report"), "report.html").read_text("utf-8")
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//|@import|url\(""", page)
    assert "RSO report" in page and "synthetic" in page.lower()
    answers = {row["response"] for row in finished.rows("evaluate/generations")}
    assert sum(html.escape(answer) in page for answer in answers) >= 3


def test_stages_manifests_hold_config_settings_and_no_paths(finished: system.Run) -> None:
    for stage in finished.graph().table.values():
        manifest = finished.artifact(stage.name).manifest
        assert manifest.config["train_policy"]["gamma"] == 0.05
        assert set(manifest.settings) <= {"seed", "compute", "templates", *stage.sees}
        assert str(finished.store) not in repr((manifest.settings, manifest.inputs))
        assert manifest.peak_memory_bytes and manifest.timings["seconds"] > 0
        assert manifest.versions["torch"] in torch.__version__


def groups(rows: list[Row]) -> Iterator[tuple[str, list[Row]]]:
    rows = sorted(rows, key=lambda row: row["prompt_id"])
    for prompt_id, group in itertools.groupby(rows, key=lambda row: row["prompt_id"]):
        yield prompt_id, list(group)


@pytest.fixture(scope="module")
def forced(finished: system.Run, tmp_path_factory: pytest.TempPathFactory) -> system.Run:
    """The finished run with every stage but the report made a second time."""
    run = finished.copy(tmp_path_factory.mktemp("forced") / "store")
    for name in finished.graph().table:
        if name != "report":
            assert not run_stage(run.graph(), name, force=True).is_cached
    return run


def test_stages_made_again_have_the_same_content(finished: system.Run, forced: system.Run) -> None:
    for name in finished.graph().table:
        if name != "report":
            first, second = finished.artifact(name).manifest, forced.artifact(name).manifest
            assert second.digests == first.digests, name
            assert second.created_at > first.created_at


def test_stages_force_keeps_the_artifact_that_it_replaces(forced: system.Run) -> None:
    assert list((forced.store / "reject").glob("*.replaced-*"))


def test_human_comparisons_take_the_place_of_compare(finished: system.Run, tmp_path: Path) -> None:
    run = finished.copy(tmp_path / "store")
    people = system.write_human_comparisons(tmp_path / "people.jsonl")
    sources = [*finished.config().model_dump()["prepare"]["sources"], people]
    changes = [
        system.override("prepare.sources", sources),
        "comparisons.labeller=null",
        # 124 rows in as many shards as 64 before, so that the rows keep their order.
        "prepare.prompts_per_shard=48",
    ]
    graph = run.graph(*changes)
    assert "compare" not in graph.table
    assert graph.table["train_ranker"].reads["comparisons"] == "prepare/comparisons"
    was_cached = system.run_all(run.config(*changes))
    # Demonstrations and prompts are the same content, so what reads them alone is not made again.
    assert [name for name, cached in was_cached.items() if cached] == ["train_sft", "decode"]
    judges = {row["judge"] for row in run.rows("evaluate/judgements", *changes)}
    assert len(judges) == 3 and not any("gold" in judge for judge in judges - {"gold_ranker"})
    page = Path(run.artifact("report", *changes).output("report"), "report.html").read_text()
    assert "known gold" not in page.lower()


def test_gold_ranker_may_be_absent_with_human_comparisons_too(finished: system.Run) -> None:
    people = {"name": "people", "kind": "comparisons", "path": "people.jsonl"}
    for changes in (
        ("train_gold_ranker=null",),
        (
            "train_gold_ranker=null",
            "comparisons.labeller=null",
            system.override("prepare.sources", [people]),
        ),
    ):
        config = finished.config(*changes)
        table = {stage.name: stage for stage in stages(config)}
        assert "train_gold_ranker" not in table
        assert "gold_ranker" not in table["evaluate"].reads
        assert identity(config)["train_gold_ranker"] is None
        assert not any("gold_ranker" in feed for feed in table["report"].reads)
    planned = system.statuses(finished, "train_gold_ranker=null")
    assert planned["evaluate"] == "run" and planned["train_policy"] == "cached"
    assert (
        "input gold_ranker changed"
        in system.reasons(finished, "train_gold_ranker=null")["evaluate"]
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("train_gold_ranker.epoch=2", "did you mean 'epochs'"),
        ("train_policy.lora.rnk=2", "did you mean 'rank'"),
        ("evaluate.sampling.temprature=1", "did you mean 'temperature'"),
        ("evaluate.sampling.max_new_tokens=9", "unknown key 'evaluate.sampling.max_new_tokens'"),
        ("evaluate.sampling.temperature=0", "greater than 0"),
    ],
)
def test_mistake_in_a_section_that_may_be_null_is_told(
    finished: system.Run, change: str, said: str
) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        finished.config(change)


def test_direct_pairs_need_no_decodes_and_go_to_the_end(
    finished: system.Run, tmp_path: Path
) -> None:
    run = finished.copy(tmp_path / "store")
    changes = ["pair.source=direct", "train_policy.loss=hinge"]
    graph = run.graph(*changes)
    assert not {"decode", "score", "reject"} & set(graph.table)
    was_cached = system.run_all(run.config(*changes))
    assert [name for name, cached in was_cached.items() if not cached] == [
        "pair",
        "logps",
        "train_policy",
        "evaluate",
        "report",
    ]
    train = [r for r in run.rows("compare/comparisons", *changes) if r["split"] == "train"]
    pairs = run.rows("pair/pairs", *changes)
    assert {(p["chosen_id"], p["rejected_id"]) for p in pairs} == {
        (r["chosen_id"], r["rejected_id"]) for r in train
    }
    tokenizer = load_tokenizer(run.artifact("train_sft").output("reference"))
    for pair in pairs:
        *body, last = pair["chosen_token_ids"]
        assert (tokenizer.decode(body), last) == (pair["chosen"], tokenizer.eos_token_id)


def test_sft_sample_rank_pairs_random_decodes(finished: system.Run, tmp_path: Path) -> None:
    run = finished.copy(tmp_path / "store")
    changes = ["pair.source=sft-sample-rank", "pair.num_samples=6"]
    run_stage(run.graph(*changes), "pair")
    pairs = run.rows("pair/pairs", *changes)
    assert len(pairs) == 16 * 3 and {row["origin"] for row in pairs} == {"sft-sample-rank"}
    accepted = by(run.rows("reject/accepted"), "response_id")
    sides = {pair[f"{side}_id"] for pair in pairs for side in ("chosen", "rejected")}
    assert any(not accepted[(side,)]["is_accepted"] for side in sides)
    assert sides <= {key[0] for key in accepted}


def test_tournament_winners_meet_again(finished: system.Run, tmp_path: Path) -> None:
    run = finished.copy(tmp_path / "store")
    run_stage(run.graph("pair.ranking=tournament"), "pair")
    for _, pairs in groups(run.rows("pair/pairs", "pair.ranking=tournament")):
        assert sorted(pair["match_round"] for pair in pairs) == [0, 0, 1]
        final = next(pair for pair in pairs if pair["match_round"] == 1)
        winners = {pair["chosen_id"] for pair in pairs if pair["match_round"] == 0}
        assert {final["chosen_id"], final["rejected_id"]} == winners
    # The first round of a tournament is the default's pairs.
    first = [r for r in run.rows("pair/pairs", "pair.ranking=tournament") if not r["match_round"]]
    assert {row["pair_id"] for row in first} == {row["pair_id"] for row in run.rows("pair/pairs")}
