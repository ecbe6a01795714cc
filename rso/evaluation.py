"""From evaluation decodes to verdicts, and from verdicts to figures with intervals.

Rows go in and come out as lists of dicts in the shape of `generations`, `judgements` and `metrics`
(`pyarrow.Table.to_pylist` and `from_pylist`). The unit of every interval is the prompt.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rso.labelling import Labeller
from rso.statistics import Interval, bootstrap_mean, paired_bootstrap_difference, wilson, win_rate
from rso.text_metrics import chrf, distinct_words, rouge_l

Row = dict[str, Any]
Rows = Sequence[Mapping[str, Any]]

POLICY, REFERENCE, HUMAN = "policy", "reference", "human"
CONTESTS = ((POLICY, REFERENCE), (POLICY, HUMAN), (REFERENCE, HUMAN))
# Judges in the order in which they are shown; `gold` is the synthetic labeller itself.
JUDGES = ("ranker", "gold_ranker", "gold", "length")
POINTS = {"win": 1.0, "tie": 0.5, "loss": 0.0}
EVEN = 0.5

MEANINGS = {
    "win_rate": "share of prompts won, ties one half",
    "tie_share": "share of prompts on which both gave the same text or neither was preferred",
    "agreement_with_gold": "share of the gold's decisions that the judge shares",
    "mean_words": "words a response",
    "rouge_l": "ROUGE-L F1 with the human line",
    "chrf": "chrF with the human line",
    "distinct_words": "distinct words by all words of a system",
    "gold_score": "synthetic gold points",
    "truncated_share": "share of responses cut off at the longest length",
    "empty_share": "share of responses without a word",
    "kl": "KL divergence from the opponent, nats a response",
}
PAIRED = ("mean_words", "rouge_l", "chrf", "gold_score")


class Match(NamedTuple):
    """Two systems' responses to one prompt."""

    prompt_id: str
    prompt: str
    target: str | None
    system: str
    opponent: str
    response: str
    opponent_response: str


def verdict_from_logit(z: float) -> str:
    """Return win, tie or loss for logit z of P(the system is better); a tie is exactly 0.

    Raises:
        ValueError: z is NaN, which would count as a loss unnoticed.
    """
    if math.isnan(z):
        raise ValueError("verdict_from_logit: the judge's logit is NaN; look at the judge's model")
    if z == 0:
        return "tie"
    return "win" if z > 0 else "loss"


def matches(generations: Rows, prompts: Rows) -> list[Match]:
    """Return the matches to judge: greedy decodes of policy, reference and the human line.

    Ordered by contest, then prompt_id. A prompt without a target has no match against the human.

    Raises:
        ValueError: a system has no greedy response to a prompt that another one has.
    """
    prompt_of = {row["prompt_id"]: row for row in prompts}
    texts = _responses(generations, prompts)
    result = []
    for system, opponent in CONTESTS:
        lacking = sorted(texts[system].keys() ^ texts[opponent].keys()) if opponent != HUMAN else []
        if lacking:
            raise ValueError(
                f"generations: prompt {lacking[0]} has a greedy response of only one of "
                f"{system!r} and {opponent!r}; decode both on the same prompts"
            )
        result += [
            Match(
                prompt_id,
                prompt_of[prompt_id]["prompt"],
                prompt_of[prompt_id]["target"],
                system,
                opponent,
                texts[system][prompt_id],
                texts[opponent][prompt_id],
            )
            for prompt_id in sorted(texts[system].keys() & texts[opponent].keys())
        ]
    return result


def judge_by_logits(judge: str, played: Sequence[Match], logits: Iterable[float]) -> list[Row]:
    """Return judgements of a ranker whose logits (nats, both orders averaged) favour the system.

    Equal texts are a tie whatever the logit, which both orders make 0 but for rounding.
    """
    rows = []
    for match, logit in zip(played, logits, strict=True):
        z = 0.0 if match.response == match.opponent_response else float(logit)
        rows.append(_judgement(judge, match, verdict_from_logit(z), _sigmoid(z)))
    return rows


def judge_by_gold(labeller: Labeller, played: Sequence[Match]) -> list[Row]:
    """Return judgements of the known synthetic gold; a gold that knows the target skips humans."""
    rows = []
    for match in played:
        if labeller.needs_target and (match.opponent == HUMAN or match.target is None):
            continue
        gap = labeller.score(match.prompt, match.response, match.target) - labeller.score(
            match.prompt, match.opponent_response, match.target
        )
        rows.append(_decision("gold", match, gap))
    return rows


def judge_by_length(played: Sequence[Match]) -> list[Row]:
    """Return judgements that look at length alone: the response of more words wins."""
    return [
        _decision("length", match, _num_words(match.response) - _num_words(match.opponent_response))
        for match in played
    ]


def metrics(
    generations: Rows,
    judgements: Rows,
    prompts: Rows,
    *,
    seed: int,
    labeller: Labeller | None = None,
) -> list[Row]:
    """Return all figures as rows of `metrics`; what has no data behind it is left out."""
    texts = _responses(generations, prompts)
    prompt_of = {row["prompt_id"]: row for row in prompts}
    per_prompt = {
        system: _text_figures(answers, prompt_of, labeller, is_human=system == HUMAN)
        for system, answers in texts.items()
        if answers
    }
    rows = _win_rates(judgements) + _agreements(judgements)
    for system, figures in per_prompt.items():
        for metric, values in figures.items():
            rows.append(_figure(system, metric, bootstrap_mean(list(values.values()), seed=seed)))
        distinct = distinct_words(texts[system].values())
        rows.append(_plain_figure(system, "distinct_words", distinct, len(texts[system])))
    rows += _truncation(generations)
    rows += _differences(per_prompt, seed)
    return rows + kl_divergence(generations, seed=seed)


def kl_divergence(generations: Rows, *, seed: int) -> list[Row]:
    """Return the row of KL(policy || reference) in nats a response, or none without samples.

    The mean over the policy's ancestral samples of log π_θ(y|x) - log π_sft(y|x), which is unbiased
    and can be below 0 by chance; samples of a prompt are averaged first.
    """
    gaps: dict[str, list[float]] = defaultdict(list)
    for row in generations:
        if row["system"] == POLICY and row["sampling"] == "ancestral":
            if row["policy_logps"] is None or row["reference_logps"] is None:
                raise ValueError(
                    f"generations: ancestral response {row['response_id']} has no log-prob under "
                    "policy or reference; both are needed for the KL"
                )
            gaps[row["prompt_id"]].append(row["policy_logps"] - row["reference_logps"])
    if not gaps:
        return []
    means = [math.fsum(gaps[prompt_id]) / len(gaps[prompt_id]) for prompt_id in sorted(gaps)]
    return [_figure(POLICY, "kl", bootstrap_mean(means, seed=seed), opponent=REFERENCE)]


def find(
    rows: Rows, metric: str, *, system: str = POLICY, opponent: str = "", judge: str = ""
) -> Mapping[str, Any] | None:
    """Return the row of a figure, or None."""
    wanted = {"metric": metric, "system": system, "opponent": opponent, "judge": judge}
    return next((row for row in rows if all(row[k] == v for k, v in wanted.items())), None)


def conclusion(rows: Rows) -> str:
    """Return in a sentence or two whether the policy beats the reference, and at which price.

    The judge is the known gold where there is one, otherwise the gold ranker, otherwise the ranker.
    """
    for judge in ("gold", "gold_ranker", "ranker"):
        row = find(rows, "win_rate", opponent=REFERENCE, judge=judge)
        if row is not None:
            return f"{_gain(row, judge)} {_price(rows)}".strip()
    return "Nothing was judged, so nothing is known of a gain."


def _gain(row: Mapping[str, Any], judge: str) -> str:
    name = {"gold": "the known synthetic gold", "gold_ranker": "the gold ranker"}.get(
        judge, "the ranker it was trained with"
    )
    figure = (
        f"{100 * row['value']:.1f} % of {row['num_prompts']} prompts "
        f"(95 % interval {100 * row['low']:.1f} to {100 * row['high']:.1f})"
    )
    if row["low"] > EVEN:
        return f"Under {name} the policy beats SFT: it wins {figure}, separated from 50 %."
    if row["high"] < EVEN:
        return f"Under {name} the policy is worse than SFT: it wins {figure}, separated from 50 %."
    return (
        f"Under {name} no gain over SFT is shown: the policy wins {figure}, "
        "an interval that includes 50 %."
    )


def _price(rows: Rows) -> str:
    """Return what moved, beyond its interval, in directions that no judge was asked about."""
    names = {"rouge_l": "ROUGE-L with the human line", "mean_words": "length in words"}
    moved = []
    for metric, name in names.items():
        row = find(rows, f"{metric}_difference", opponent=REFERENCE)
        if row is not None and (row["low"] > 0 or row["high"] < 0):
            direction = "rose" if row["value"] > 0 else "fell"
            digits = 1 if metric == "mean_words" else 3
            moved.append(f"{name} {direction} by {abs(row['value']):.{digits}f}")
    return f"Meanwhile {' and '.join(moved)} a prompt." if moved else ""


def _responses(generations: Rows, prompts: Rows) -> dict[str, dict[str, str]]:
    """Return system -> prompt_id -> greedy response, with the human lines of the same prompts."""
    texts: dict[str, dict[str, str]] = {POLICY: {}, REFERENCE: {}, HUMAN: {}}
    for row in sorted(generations, key=lambda row: (row["prompt_id"], row["sample_index"])):
        if row["sampling"] == "greedy":
            texts.setdefault(row["system"], {}).setdefault(row["prompt_id"], row["response"])
    judged = set[str]().union(*texts.values())
    for row in sorted(prompts, key=lambda row: str(row["prompt_id"])):
        if row["target"] is not None and row["prompt_id"] in judged:
            texts[HUMAN][row["prompt_id"]] = row["target"]
    return texts


def _text_figures(
    answers: Mapping[str, str],
    prompt_of: Mapping[str, Mapping[str, Any]],
    labeller: Labeller | None,
    *,
    is_human: bool,
) -> dict[str, dict[str, float]]:
    """Return metric -> prompt_id -> value; the human line is not compared with itself."""
    figures: dict[str, dict[str, float]] = defaultdict(dict)
    for prompt_id, response in answers.items():
        prompt, target = prompt_of[prompt_id]["prompt"], prompt_of[prompt_id]["target"]
        figures["mean_words"][prompt_id] = _num_words(response)
        figures["empty_share"][prompt_id] = float(not response.strip())
        if target is not None and not is_human:
            figures["rouge_l"][prompt_id] = rouge_l(response, target)
            figures["chrf"][prompt_id] = chrf(response, target)
        knows = labeller is not None and not (
            labeller.needs_target and (is_human or target is None)
        )
        if labeller is not None and knows:
            figures["gold_score"][prompt_id] = labeller.score(prompt, response, target)
    return dict(figures)


def _win_rates(judgements: Rows) -> list[Row]:
    contests: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for row in judgements:
        contests[row["system"], row["opponent"], row["judge"]].append(row["verdict"])
    rows = []
    for (system, opponent, judge), verdicts in contests.items():
        rate = win_rate([POINTS[verdict] for verdict in verdicts])
        ties = wilson(verdicts.count("tie"), len(verdicts))
        rows.append(_figure(system, "win_rate", rate, opponent=opponent, judge=judge))
        rows.append(_figure(system, "tie_share", ties, opponent=opponent, judge=judge))
    return rows


def _agreements(judgements: Rows) -> list[Row]:
    """Return how often each judge sides with the gold where the gold decided, ties one half."""
    gold = {_place(row): row["verdict"] for row in judgements if row["judge"] == "gold"}
    shared: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for row in judgements:
        truth = gold.get(_place(row), "tie")
        if row["judge"] != "gold" and truth != "tie":
            agreement = 1 - abs(POINTS[row["verdict"]] - POINTS[truth])
            shared[row["system"], row["opponent"], row["judge"]].append(agreement)
    return [
        _figure(system, "agreement_with_gold", win_rate(values), opponent=opponent, judge=judge)
        for (system, opponent, judge), values in shared.items()
    ]


def _truncation(generations: Rows) -> list[Row]:
    cut: dict[str, list[bool]] = defaultdict(list)
    for row in generations:
        if row["sampling"] == "greedy":
            cut[row["system"]].append(row["finish_reason"] == "length")
    return [
        _figure(system, "truncated_share", wilson(sum(flags), len(flags)))
        for system, flags in cut.items()
    ]


def _differences(
    per_prompt: Mapping[str, Mapping[str, Mapping[str, float]]], seed: int
) -> list[Row]:
    """Return the policy's figures minus the reference's, prompt by prompt."""
    rows = []
    for metric in PAIRED:
        ours = per_prompt.get(POLICY, {}).get(metric, {})
        theirs = per_prompt.get(REFERENCE, {}).get(metric, {})
        both = sorted(ours.keys() & theirs.keys())
        if both:
            interval = paired_bootstrap_difference(
                [ours[i] for i in both], [theirs[i] for i in both], seed=seed
            )
            rows.append(_figure(POLICY, f"{metric}_difference", interval, opponent=REFERENCE))
    return rows


def _decision(judge: str, match: Match, gap: float) -> Row:
    verdict = verdict_from_logit(gap)
    return _judgement(judge, match, verdict, POINTS[verdict])


def _judgement(judge: str, match: Match, verdict: str, probability: float) -> Row:
    return {
        "prompt_id": match.prompt_id,
        "system": match.system,
        "opponent": match.opponent,
        "judge": judge,
        "verdict": verdict,
        "probability": probability,
        "is_flipped": False,
    }


def _figure(
    system: str, metric: str, interval: Interval, *, opponent: str = "", judge: str = ""
) -> Row:
    return {
        "system": system,
        "opponent": opponent,
        "judge": judge,
        "metric": metric,
        "value": interval.value,
        "low": interval.low,
        "high": interval.high,
        "num_prompts": interval.n,
    }


def _plain_figure(system: str, metric: str, value: float, num_prompts: int) -> Row:
    row = _figure(system, metric, Interval(value, 0.0, 0.0, num_prompts))
    return row | {"low": None, "high": None}


def _place(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["prompt_id"], row["system"], row["opponent"]


def _num_words(text: str) -> int:
    return len(text.split())


def _sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z >= 0 else 1 - 1 / (1 + math.exp(z))
