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
    metrics = {row["metric"].removesuffix("_difference") for row in rows}
    assert metrics <= evaluation.MEANINGS.keys()
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
    human = find(rows, "mean_words", system="human", sampling="")
    assert human is not None and human["value"] == 3.0
    assert find(rows, "rouge_l", system="human", sampling="") is None
    reference = find(rows, "rouge_l", system="reference")
    assert reference is not None and reference["value"] == 1.0


def test_judge_by_logits_equal_texts_tie_whatever_the_logit() -> None:
    generations = [generation(0, "policy", "same"), generation(0, "reference", "same")]
    played = evaluation.matches(generations, PROMPTS)[:1]
    assert judge_by_logits("ranker", played, [0.3])[0]["verdict"] == "tie"
    assert judge_by_logits("ranker", played, [0.3])[0]["probability"] == 0.5


@given(st.floats(-700, 700))
def test_judge_by_logits_swapping_systems_turns_the_verdict(z: float) -> None:
    match = evaluation.Match("id", "p", None, "policy", "reference", "greedy", "a", "b")
    row, turned = judge_by_logits("ranker", [match, match], [z, -z])
    assert evaluation.POINTS[row["verdict"]] == 1 - evaluation.POINTS[turned["verdict"]]
    assert row["probability"] == pytest.approx(1 - turned["probability"], abs=1e-12)


def test_judge_that_no_table_would_show_is_refused() -> None:
    match = evaluation.Match("id", "p", None, "policy", "reference", "greedy", "a", "b")
    with pytest.raises(ValueError, match="found the judge 'other', expected one of ranker, gold_"):
        judge_by_logits("other", [match], [1.0])


def test_verdict_from_logit_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        evaluation.verdict_from_logit(math.nan)


def test_judge_by_gold_that_knows_the_target_leaves_humans_out() -> None:
    rows = run(two_systems(30), "chrf")
    assert find(rows, "win_rate", opponent="human", judge="gold") is None
    assert find(rows, "win_rate", opponent="reference", judge="gold") is not None
    assert find(rows, "gold_score", system="human", sampling="") is None


def test_matches_a_missing_response_is_told() -> None:
    with pytest.raises(ValueError, match="has a greedy response of only one of"):
        evaluation.matches(two_systems(3)[:-1], PROMPTS)
    rows = [*two_systems(3), generation(0, "policy", "a", sampling="sampled")]
    with pytest.raises(ValueError, match="has a sampled response of only one of"):
        evaluation.matches(rows, PROMPTS)


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
    assert find([row], "kl", opponent="reference", sampling="ancestral") is row
    assert evaluation.kl_divergence(two_systems(2), seed=0) == []
    with pytest.raises(ValueError, match="no log-prob"):
        evaluation.kl_divergence([rows[0] | {"policy_logps": None}], seed=0)


@pytest.mark.parametrize(
    ("num_wins", "said"),
    [
        (36, "the policy beats SFT: it wins 90.0 %"),
        (21, "no gain over SFT is shown: the policy wins 52.5 %"),
        (4, "the policy is worse than SFT: it wins 10.0 %"),
    ],
)
def test_conclusion_says_what_the_interval_says(num_wins: int, said: str) -> None:
    rows = two_systems(num_wins)
    greedy, sampled_ = evaluation.gains(run(rows + sampled(rows)))
    assert greedy.startswith(f"Under the known synthetic gold {said} of 40 prompts")
    assert sampled_.startswith(f"On sampled answers, under the same judge, {said} of 40 prompts")
    assert ("an interval that includes 50 %" in greedy) is (num_wins == 21)


def test_conclusion_names_the_price_and_the_judge() -> None:
    rows = run(two_systems(4))
    assert "ROUGE-L with the human line fell" in conclusion(rows)
    ungolden = [row for row in rows if row["judge"] != "gold"]
    assert "the ranker it was trained with" in conclusion(ungolden)
    assert conclusion([]) == "Nothing was judged, so nothing is known of a gain."


def sampled(rows: Rows) -> Rows:
    return [row | {"sampling": "sampled"} for row in rows]


def test_matches_of_sampled_answers_are_one_contest_of_its_own() -> None:
    played = evaluation.matches(two_systems(30) + sampled(two_systems(5)), PROMPTS)
    contests = [evaluation.Contest(m.system, m.opponent, m.sampling) for m in played]
    assert contests == [contest for contest in evaluation.CONTESTS for _ in PROMPTS]
    longer = [m for m in played if m.sampling == "sampled" and m.response.endswith("more")]
    assert len(longer) == 5


def test_metrics_keep_greedy_and_sampled_answers_apart() -> None:
    rows = run(two_systems(30) + sampled(two_systems(5)))
    place = {"opponent": "reference", "judge": "gold"}
    greedy, other = (
        find(rows, "win_rate", **place),
        find(rows, "win_rate", **place, sampling="sampled"),
    )
    assert greedy is not None and other is not None
    assert (greedy["value"], other["value"]) == (0.75, 0.125)
    for metric in ("mean_words_difference", "rouge_l_difference", "gold_score_difference"):
        pair = [find(rows, metric, opponent="reference", sampling=s) for s in ("greedy", "sampled")]
        assert pair[0] is not None and pair[1] is not None and pair[0]["value"] > pair[1]["value"]
    assert find(rows, "truncated_share", sampling="sampled") is not None
    assert find(rows, "win_rate", opponent="human", judge="gold", sampling="sampled") is None
    # what concerns greedy answers alone is the same without the sampled ones
    alone = run(two_systems(30))
    assert [row for row in rows if row["sampling"] == "greedy"] == [
        row for row in alone if row["sampling"] == "greedy"
    ]
    assert {row["sampling"] for row in alone} == {"greedy", ""}
    assert {row["system"] for row in alone if not row["sampling"]} == {"human"}


def test_metrics_of_collapse_by_hand() -> None:
    answers = ["Return it.", "return IT.", "Return the list of a.", "Read it."]
    rows = [generation(i, "policy", answer) for i, answer in enumerate(answers)]
    rows += [generation(i, "reference", answers[0]) for i in range(4)]
    found = run(rows)

    def value(metric: str, **place: str) -> Any:
        row = find(found, metric, **place)
        return row and (row["value"], row["text"], row["low"] is None)

    assert value("top_first_word_share") == (0.75, "return", False)
    assert value("top_opening_share") == (0.5, "return it", False)
    assert value("distinct_first_words") == (2.0, None, True)
    assert value("repeated_share") == (0.5, None, False)
    assert value("same_as_reference_share", opponent="reference") == (0.25, None, False)
    # of six pairs: one of equal words; two of 1 in 6; two of 1 in 3; one of none
    similarity = find(found, "mean_similarity")
    assert similarity is not None
    assert similarity["value"] == pytest.approx((1 + 2 / 6 + 2 / 3 + 0) / 6)
    assert value("repeated_share", system="reference") == (1.0, None, False)
    human = find(found, "top_opening_share", system="human", sampling="")
    assert human is not None and human["num_prompts"] == 4 and human["text"].startswith("human")


def test_metrics_of_one_prompt_have_no_similarity() -> None:
    rows = run([generation(0, system, "a b") for system in ("policy", "reference")])
    assert find(rows, "mean_similarity") is None
    assert find(rows, "top_first_word_share") is not None


def openings(share: float, distinct: int, num_prompts: int = 192) -> list[str]:
    """Answers of which `share` begin with "Return", with so many different first words in all."""
    num_top = round(share * num_prompts)
    others = [f"verb{i % (distinct - 1)} the {i}" for i in range(num_prompts - num_top)]
    return [f"Return {i} of the list" for i in range(num_top)] + others


def collapse_of(policy: list[str], reference: list[str], sampling: str = "greedy") -> list[str]:
    prompts = [
        {"prompt_id": f"{i:016x}", "prompt": "p", "target": None} for i in range(len(policy))
    ]
    rows = [
        {
            "prompt_id": prompt["prompt_id"],
            "system": system,
            "sample_index": 0,
            "sampling": sampling,
            "response": answers[i],
            "finish_reason": "stop",
        }
        for system, answers in (("policy", policy), ("reference", reference))
        for i, prompt in enumerate(prompts)
    ]
    return evaluation.warnings_of(evaluation.metrics(rows, [], prompts, seed=0))


def test_warnings_name_the_collapse_of_a_real_run() -> None:
    policy, reference = openings(0.917, 14), openings(0.615, 27)
    said = "9 of 10 answers begin alike (`return`, SFT 6 of 10): the policy has collapsed."
    assert collapse_of(policy, reference) == [said]
    assert collapse_of(policy, reference, "sampled") == [said.replace("answers", "sampled answers")]
    assert collapse_of(reference, policy) == []


@pytest.mark.parametrize(
    ("policy", "reference", "said"),
    [
        pytest.param(openings(0.55, 20), openings(0.52, 20), [], id="by-chance"),
        pytest.param(openings(0.45, 20), openings(0.1, 30), [], id="less-than-half"),
        pytest.param(
            openings(0.78, 20),
            openings(0.51, 20),
            ["8 of 10 answers begin alike (`return`, SFT 5 of 10): the policy has collapsed."],
            id="of-ten",
        ),
        pytest.param(
            openings(0.995, 2),
            openings(0.96, 8, 1000)[:192],
            [],
            id="all-of-both",
        ),
        pytest.param(
            openings(0.98, 4),
            openings(0.88, 20),
            ["98 of 100 answers begin alike (`return`, SFT 88 of 100): the policy has collapsed."],
            id="nearly-all",
        ),
        pytest.param(
            ["Return it."] * 192,
            openings(0.6, 20),
            ["All answers begin alike (`return`, SFT 60 of 100): the policy has collapsed."],
            id="all",
        ),
        pytest.param(
            [text.replace("Return", "Get") for text in openings(0.917, 14)],
            openings(0.615, 27),
            [
                "9 of 10 answers begin alike (`get`, SFT 6 of 10 with `return`): "
                "the policy has collapsed."
            ],
            id="two-words",
        ),
        pytest.param(
            [""] * 192,
            openings(0.6, 20),
            [
                "All answers begin alike (no word, SFT 60 of 100 with `return`): "
                "the policy has collapsed."
            ],
            id="empty",
        ),
        pytest.param(
            openings(0.1, 15),
            openings(0.1, 30),
            ["The 192 answers begin with 15 different words (SFT 30): the policy has collapsed."],
            id="half-the-first-words",
        ),
        pytest.param(openings(0.1, 16), openings(0.1, 30), [], id="more-than-half-of-them"),
        pytest.param(openings(0.1, 5), openings(0.1, 19), [], id="few-first-words"),
        pytest.param(
            [f"Return the number {i}" for i in range(192)],
            [f"Return {i} the number" for i in range(192)],
            [
                "All answers begin alike (`return the number`, SFT 1 of 100 with `return 0 the`): "
                "the policy has collapsed."
            ],
            id="three-words",
        ),
    ],
)
def test_warnings_of_a_collapse_follow_the_stated_rule(
    policy: list[str], reference: list[str], said: list[str]
) -> None:
    assert collapse_of(policy, reference) == said


def test_warnings_name_a_policy_that_answers_as_the_reference_does() -> None:
    answers = openings(0.5, 20)
    assert collapse_of(answers, answers) == [
        "The policy gave the same answer as SFT to every prompt."
    ]
    assert collapse_of(answers, answers, "sampled") == [
        "The policy gave the same sampled answer as SFT to every prompt."
    ]
    assert collapse_of([*answers[:-1], "other"], answers) == []


def test_conclusion_names_a_collapse_before_the_gain_and_sampled_answers_after_greedy_ones() -> (
    None
):
    rows = run(
        [generation(i, "policy", f"Return one of the {i} lists") for i in range(40)]
        + [generation(i, "reference", f"verb{i} it") for i in range(40)]
        + sampled([generation(i, "policy", f"verb{i}") for i in range(40)])
        + sampled([generation(i, "reference", f"verb{i} it") for i in range(40)])
    )
    sentence = conclusion(rows)
    assert sentence.startswith(
        "All answers begin alike (`return`, SFT 2 of 100 with `verb0`): the policy has"
    )
    places = [
        sentence.index(said)
        for said in (
            "Under the known synthetic gold the policy beats SFT: it wins 100.0 % of 40 prompts",
            "length in words rose by 4.0 per prompt.",
            "On sampled answers, under the same judge, the policy is worse than SFT: it wins 0.0 %",
            "length in words fell by 1.0 per prompt.",
        )
    ]
    assert places == sorted(places)
