"""Every stage of the tiny run: what it wrote, and that the artifacts fit each other."""

import html
import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import system
import torch
from transformers import AutoModelForCausalLM

from rso.models import load_tokenizer
from rso.parquet import read_shard
from rso.templates import encode_prompt
from schemas import SCHEMAS
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
    "evaluate/generations": 8 * 3,
    "evaluate/judgements": 8 * 3 * 4,
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
        assert artifact is not None and artifact.outputs == sorted(stage.outputs)
        assert graph.store.verify(artifact) == []
    datasets = [f"{s.name}/{o}" for s in graph.table.values() for o in s.outputs if o in SCHEMAS]
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


def test_evaluate_judgements_are_matches_times_judges(finished: system.Run) -> None:
    judgements = finished.rows("evaluate/judgements")
    matches = Counter((r["prompt_id"], r["system"], r["opponent"]) for r in judgements)
    prompts = {row["prompt_id"] for row in finished.rows("evaluate/generations")}
    assert len(prompts) == 8
    assert len(matches) == 3 * len(prompts) and set(matches.values()) == {4}
    assert len({row["judge"] for row in judgements}) == 4
    wins = {
        judge: [r for r in judgements if r["judge"] == judge and r["opponent"] == "reference"]
        for judge in {row["judge"] for row in judgements}
    }
    for metric in finished.rows("evaluate/metrics"):
        rows = wins.get(metric["judge"])
        if metric["metric"] != "win_rate" or metric["opponent"] != "reference" or not rows:
            continue
        points = {"win": 1.0, "tie": 0.5, "loss": 0.0}
        mean = sum(points[row["verdict"]] for row in rows) / len(rows)
        assert metric["value"] == pytest.approx(mean)
        assert metric["low"] <= mean <= metric["high"] and metric["num_prompts"] == 8


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
        assert set(manifest.settings) <= {"seed", "compute", "templates", *stage.sections}
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
    assert graph.table["train_ranker"].inputs["comparisons"] == "prepare/comparisons"
    was_cached = system.run_all(run.config(*changes))
    # Demonstrations and prompts are the same content, so what reads them alone is not made again.
    assert [name for name, cached in was_cached.items() if cached] == ["train_sft", "decode"]
    judges = {row["judge"] for row in run.rows("evaluate/judgements", *changes)}
    assert len(judges) == 3 and not any("gold" in judge for judge in judges - {"gold_ranker"})
    page = Path(run.artifact("report", *changes).output("report"), "report.html").read_text()
    assert "known gold" not in page.lower()


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
