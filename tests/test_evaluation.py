"""Verdicts and figures on rows small enough to check by hand."""

import math
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import schemas
from rso import evaluation
from rso.evaluation import conclusion, find, judge_by_gold, judge_by_length, judge_by_logits
from rso.labelling import labeller

Rows = list[dict[str, Any]]

PROMPTS: Rows = [
    {"prompt_id": f"{i:016x}", "prompt": f"text {i} of words", "target": f"human line {i}"}
    for i in range(40)
]


def generation(prompt: int, system: str, response: str, **other: Any) -> dict[str, Any]:
    row = {
        "prompt_id": PROMPTS[prompt]["prompt_id"],
        "response_id": f"{system}-{prompt}",
        "system": system,
        "sample_index": 0,
        "sampling": "greedy",
        "response": response,
        "token_ids": [1],
        "num_tokens": 1,
        "finish_reason": "stop",
        "policy_logps": None,
        "reference_logps": None,
    }
    return row | other


def two_systems(num_wins: int) -> Rows:
    """Policy's answers have one word more than the reference's on `num_wins` of 40 prompts."""
    rows = []
    for i in range(40):
        rows.append(generation(i, "reference", f"human line {i}"))
        longer = f"human line {i} more" if i < num_wins else "human"
        rows.append(generation(i, "policy", longer))
    return rows


def run(generations: Rows, name: str = "length") -> Rows:
    played = evaluation.matches(generations, PROMPTS)
    gold = labeller(name)
    judgements = judge_by_gold(gold, played) + judge_by_length(played)
    judgements += judge_by_logits("ranker", played, [1.5] * len(played))
    table = pa.Table.from_pylist(judgements, schema=schemas.SCHEMAS["judgements"])
    schemas.check(table, "judgements", "test")
    rows = evaluation.metrics(generations, judgements, PROMPTS, seed=0, labeller=gold)
    table = pa.Table.from_pylist(rows, schema=schemas.SCHEMAS["metrics"])
    schemas.check(table, "metrics", "test")
    keys = [tuple(row[key] for key in schemas.sort_keys("metrics")) for row in rows]
    assert len(set(keys)) == len(keys)
    return rows


def test_metrics_win_rates_and_agreement_by_hand() -> None:
    rows = run(two_systems(30))
    rate = find(rows, "win_rate", opponent="reference", judge="gold")
    assert rate is not None
    assert (rate["value"], rate["num_prompts"]) == (0.75, 40)
    assert rate["low"] < 0.75 < rate["high"]
    agreement = find(rows, "agreement_with_gold", opponent="reference", judge="ranker")
    assert agreement is not None and agreement["value"] == 0.75
    assert find(rows, "agreement_with_gold", opponent="reference", judge="length") is not None
    ties = find(rows, "tie_share", system="reference", opponent="human", judge="length")
    assert ties is not None and ties["value"] == 1.0
    human = find(rows, "mean_words", system="human")
    assert human is not None and human["value"] == 3.0
    assert find(rows, "rouge_l", system="human") is None
    reference = find(rows, "rouge_l", system="reference")
    assert reference is not None and reference["value"] == 1.0


def test_judge_by_logits_equal_texts_tie_whatever_the_logit() -> None:
    generations = [generation(0, "policy", "same"), generation(0, "reference", "same")]
    played = evaluation.matches(generations, PROMPTS)[:1]
    assert judge_by_logits("ranker", played, [0.3])[0]["verdict"] == "tie"
    assert judge_by_logits("ranker", played, [0.3])[0]["probability"] == 0.5


@given(st.floats(-700, 700))
def test_judge_by_logits_swapping_systems_turns_the_verdict(z: float) -> None:
    match = evaluation.Match("id", "p", None, "policy", "reference", "a", "b")
    row, turned = judge_by_logits("r", [match, match], [z, -z])
    assert evaluation.POINTS[row["verdict"]] == 1 - evaluation.POINTS[turned["verdict"]]
    assert row["probability"] == pytest.approx(1 - turned["probability"], abs=1e-12)


def test_verdict_from_logit_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        evaluation.verdict_from_logit(math.nan)


def test_judge_by_gold_that_knows_the_target_leaves_humans_out() -> None:
    rows = run(two_systems(30), "chrf")
    assert find(rows, "win_rate", opponent="human", judge="gold") is None
    assert find(rows, "win_rate", opponent="reference", judge="gold") is not None
    assert find(rows, "gold_score", system="human") is None


def test_matches_a_missing_response_is_told() -> None:
    with pytest.raises(ValueError, match="only one of"):
        evaluation.matches(two_systems(3)[:-1], PROMPTS)


def test_matches_without_targets_has_no_human_contest() -> None:
    prompts = [row | {"target": None} for row in PROMPTS]
    played = evaluation.matches(two_systems(3), prompts)
    assert {match.opponent for match in played} == {"reference"}


def test_kl_divergence_averages_samples_of_a_prompt_first() -> None:
    rows = [
        generation(
            p,
            "policy",
            "x",
            sampling="ancestral",
            sample_index=s,
            policy_logps=-1.0,
            reference_logps=-1.0 - gap,
        )
        for p, s, gap in [(0, 0, 1.0), (0, 1, 3.0), (1, 0, 4.0)]
    ]
    (row,) = evaluation.kl_divergence(rows, seed=0)
    assert (row["value"], row["num_prompts"], row["opponent"]) == (3.0, 2, "reference")
    assert evaluation.kl_divergence(two_systems(2), seed=0) == []
    with pytest.raises(ValueError, match="no log-prob"):
        evaluation.kl_divergence([rows[0] | {"policy_logps": None}], seed=0)


@pytest.mark.parametrize(
    ("num_wins", "said"),
    [(36, "beats SFT"), (21, "an interval that includes 50 %"), (4, "is worse than SFT")],
)
def test_conclusion_says_what_the_interval_says(num_wins: int, said: str) -> None:
    sentence = conclusion(run(two_systems(num_wins)))
    assert said in sentence
    assert "synthetic" in sentence


def test_conclusion_names_the_price_and_the_judge() -> None:
    rows = run(two_systems(4))
    assert "ROUGE-L with the human line fell" in conclusion(rows)
    ungolden = [row for row in rows if row["judge"] != "gold"]
    assert "the ranker it was trained with" in conclusion(ungolden)
    assert conclusion([]) == "Nothing was judged, so nothing is known of a gain."
