"""From decoded responses to verdicts, and from verdicts to figures with intervals.

Rows go in and come out as lists of dicts, one dict per row of `generations`, `judgements` or
`metrics` (`pyarrow.Table.to_pylist` and `from_pylist`). The unit of every interval is the prompt.

Greedy and sampled responses are judged and measured separately. Ancestral responses serve only the
KL divergence.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rso.aliases import Row
from rso.labelling import Labeller
from rso.statistics import Interval, bootstrap_mean, paired_bootstrap_difference, wilson, win_rate
from rso.text_metrics import (
    Opening,
    chrf,
    distinct_first_words,
    distinct_words,
    mean_similarity,
    num_repeated,
    rouge_l,
    top_opening,
)

Rows = Sequence[Row]

POLICY, REFERENCE, HUMAN = "policy", "reference", "human"
GREEDY, SAMPLED, ANCESTRAL = "greedy", "sampled", "ancestral"
# Ways of decoding whose responses are judged and measured.
ANSWERED = (GREEDY, SAMPLED)


class Contest(NamedTuple):
    """Two systems whose responses are compared, and how the responses were decoded."""

    system: str
    opponent: str
    sampling: str = GREEDY


# Sampled responses are judged in the main contest only: judges cost more than all decoding.
CONTESTS = (
    Contest(POLICY, REFERENCE),
    Contest(POLICY, REFERENCE, SAMPLED),
    Contest(POLICY, HUMAN),
    Contest(REFERENCE, HUMAN),
)


class Judge(NamedTuple):
    """How a judge is shown: its `heading` in tables, its `name` in sentences, and what it means."""

    heading: str
    name: str
    meaning: str


# Every judge, in the order in which they are shown. `gold` is the synthetic labeller itself.
JUDGES: Mapping[str, Judge] = {
    "ranker": Judge(
        "Ranker",
        "the ranker it was trained with",
        "the model that labelled the pairs, so the policy was trained to please it",
    ),
    "gold_ranker": Judge(
        "Gold ranker",
        "the gold ranker",
        "a model trained on comparisons of other prompts, unseen in training the policy",
    ),
    "gold": Judge(
        "Known gold (synthetic)",
        "the known synthetic gold",
        "the stated function of text that labelled the comparisons: synthetic, but exact",
    ),
    "length": Judge(
        "Length alone",
        "length alone",
        "prefers the response with more words and looks at nothing else",
    ),
}
# The conclusion is the verdict of the first of these judges that judged.
DECIDING = ("gold", "gold_ranker", "ranker")
POINTS = {"win": 1.0, "tie": 0.5, "loss": 0.0}
EVEN = 0.5

# `warnings_of` says what these mean.
COLLAPSED_SHARE = 0.5
COLLAPSED_VARIETY = 0.5
FEW_FIRST_WORDS = 20
WORDS_OF_AN_OPENING = 3

MEANINGS = {
    "win_rate": "share of prompts won, ties one half",
    "tie_share": "share of prompts on which both gave the same text or neither was preferred",
    "agreement_with_gold": "share of the gold's decisions that the judge shares",
    "mean_words": "words per response",
    "rouge_l": "ROUGE-L F1 with the human line",
    "chrf": "chrF with the human line",
    "distinct_words": "distinct words by all words of a system",
    "top_first_word_share": "share of responses that begin with the most common first word",
    "top_opening_share": "share of responses that begin with the most common first three words",
    "distinct_first_words": "number of different first words",
    "repeated_share": "share of responses that equal the response to another prompt",
    "mean_similarity": "mean Jaccard index of the words of two responses to different prompts",
    "same_as_reference_share": "share of prompts to which the policy gave the reference's response",
    "gold_score": "synthetic gold points",
    "truncated_share": "share of responses cut off at the longest length",
    "empty_share": "share of responses without a word",
    "kl": "KL divergence from the opponent, nats per response",
}
PAIRED = ("mean_words", "rouge_l", "chrf", "gold_score")


class Match(NamedTuple):
    """Two systems' responses to one prompt."""

    prompt_id: str
    prompt: str
    target: str | None
    system: str
    opponent: str
    sampling: str
    response: str
    opponent_response: str


def verdict_from_logit(z: float) -> str:
    """Return win, tie or loss for z, the logit of P(the system is better). Only z = 0 is a tie.

    Raises:
        ValueError: z is NaN, which would silently count as a loss.
    """
    if math.isnan(z):
        raise ValueError("verdict_from_logit: the judge's logit is NaN; look at the judge's model")
    if z == 0:
        return "tie"
    return "win" if z > 0 else "loss"


def matches(generations: Rows, prompts: Rows) -> list[Match]:
    """Return the matches to judge: one per contest of `CONTESTS` and prompt, in this order.

    Prompts are in the order of prompt_id. The human line is a system too, and a prompt without a
    target has no match against it. Without sampled responses their contest has no match.

    Raises:
        ValueError: only one of policy and reference has a response to a prompt.
    """
    prompt_of = {row["prompt_id"]: row for row in prompts}
    texts_of = {sampling: _responses(generations, prompts, sampling) for sampling in ANSWERED}
    result = []
    for system, opponent, sampling in CONTESTS:
        ours, theirs = texts_of[sampling][system], texts_of[sampling][opponent]
        lacking = sorted(ours.keys() ^ theirs.keys()) if opponent != HUMAN else []
        if lacking:
            raise ValueError(
                f"generations: prompt {lacking[0]} has a {sampling} response of only one of "
                f"{system!r} and {opponent!r}; decode both on the same prompts"
            )
        result += [
            Match(
                prompt_id,
                prompt_of[prompt_id]["prompt"],
                prompt_of[prompt_id]["target"],
                system,
                opponent,
                sampling,
                ours[prompt_id],
                theirs[prompt_id],
            )
            for prompt_id in sorted(ours.keys() & theirs.keys())
        ]
    return result


def judge_by_logits(judge: str, played: Sequence[Match], logits: Iterable[float]) -> list[Row]:
    """Return one judgement of a ranker per match.

    `logits` [match] are means of both orders, in nats, positive where the ranker prefers the
    system. Equal texts are a tie whatever the logit is: both orders make it 0 up to rounding.

    Raises:
        ValueError: a logit is NaN, or the judge is not in `JUDGES`.
    """
    rows = []
    for match, logit in zip(played, logits, strict=True):
        z = 0.0 if match.response == match.opponent_response else float(logit)
        rows.append(_judgement(judge, match, verdict_from_logit(z), _sigmoid(z)))
    return rows


def judge_by_gold(labeller: Labeller, played: Sequence[Match]) -> list[Row]:
    """Return judgements of the known synthetic gold.

    A gold that needs the target skips matches against the human line and prompts without a target.
    """
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
    """Return judgements by length alone: the response with more words wins."""
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
    """Return all figures as rows of `metrics`. Figures without data are left out.

    `seed` keys the bootstraps and the pairs of `mean_similarity`. `labeller` adds its score.

    Raises:
        ValueError: see `kl_divergence`.
    """
    rows = _win_rates(judgements) + _agreements(judgements) + _truncation(generations)
    for sampling in ANSWERED:
        texts = _responses(generations, prompts, sampling)
        del texts[HUMAN]
        rows += _figures_of_texts(texts, prompts, sampling, seed, labeller)
    humans = {HUMAN: _human_lines(generations, prompts)}
    rows += _figures_of_texts(humans, prompts, "", seed, labeller)
    return rows + kl_divergence(generations, seed=seed)


def kl_divergence(generations: Rows, *, seed: int) -> list[Row]:
    """Return the row of KL(policy || reference) in nats per response, or no row without samples.

    It is the mean of log π_θ(y|x) - log π_sft(y|x) over the policy's ancestral samples. The samples
    of one prompt are averaged first. This estimate is unbiased, and can be below 0 by chance.

    Raises:
        ValueError: a sample has no log-prob under the policy or under the reference.
    """
    gaps: dict[str, list[float]] = defaultdict(list)
    for row in generations:
        if row["system"] == POLICY and row["sampling"] == ANCESTRAL:
            if row["policy_logps"] is None or row["reference_logps"] is None:
                raise ValueError(
                    f"generations: ancestral response {row['response_id']} has no log-prob under "
                    "policy or reference; both are needed for the KL"
                )
            gaps[row["prompt_id"]].append(row["policy_logps"] - row["reference_logps"])
    if not gaps:
        return []
    means = [math.fsum(gaps[prompt_id]) / len(gaps[prompt_id]) for prompt_id in sorted(gaps)]
    interval = bootstrap_mean(means, seed=seed)
    return [_figure(POLICY, "kl", interval, opponent=REFERENCE, sampling=ANCESTRAL)]


def find(
    rows: Rows,
    metric: str,
    *,
    system: str = POLICY,
    opponent: str = "",
    judge: str = "",
    sampling: str = GREEDY,
) -> Row | None:
    """Return the row of a figure, or None.

    For figures of the human lines alone `sampling` is empty. For the KL it is `ancestral`.
    """
    wanted = {
        "metric": metric,
        "system": system,
        "opponent": opponent,
        "judge": judge,
        "sampling": sampling,
    }
    return next((row for row in rows if all(row[k] == v for k, v in wanted.items())), None)


def conclusion(rows: Rows) -> str:
    """Return what the figures say, as one text: `warnings_of` first, then `gains`."""
    return " ".join([*warnings_of(rows), *gains(rows)])


def warnings_of(rows: Rows) -> list[str]:
    """Return the warnings about the policy's answers, for each way of decoding.

    A warning says that the answers have collapsed, or that every answer equals the reference's.
    Answers have collapsed if one of these holds:

    - More than half of them have the same first word (or the same first three words), and the most
      common first word (or three words) of the reference is significantly rarer: the two Wilson
      intervals do not overlap.
    - They have at most half as many different first words as the reference's answers, and those
      have at least 20. With fewer than 20, half can be missing by chance.
    """
    return [
        sentence
        for sampling in ANSWERED
        for sentence in (_collapse(rows, sampling), _copy(rows, sampling))
        if sentence
    ]


def gains(rows: Rows) -> list[str]:
    """Return whether the policy beats the reference, and what else changed.

    There is one text for greedy answers, and one for sampled answers if there are any. The judge is
    the first of `DECIDING` that judged.
    """
    for judge in DECIDING:
        found = {
            sampling: find(rows, "win_rate", opponent=REFERENCE, judge=judge, sampling=sampling)
            for sampling in ANSWERED
        }
        texts = [
            f"{_gain(row, judge)} {_price(rows, sampling)}".strip()
            for sampling, row in found.items()
            if row is not None
        ]
        if texts:
            return texts
    return ["Nothing was judged, so nothing is known of a gain."]


def _collapse(rows: Rows, sampling: str) -> str:
    name = "sampled answers" if sampling == SAMPLED else "answers"
    for metric in ("top_first_word_share", "top_opening_share"):
        ours, theirs = _both(rows, metric, sampling)
        if ours is None or theirs is None:
            continue
        if ours["value"] > COLLAPSED_SHARE and ours["low"] > theirs["high"]:
            share, other = _of_ten(ours["value"], theirs["value"])
            if theirs["text"] != ours["text"]:
                other += f" with {words_of(theirs)}"
            return (
                f"{share} {name} begin alike ({words_of(ours)}, SFT {other}): "
                "the policy has collapsed."
            )
    ours, theirs = _both(rows, "distinct_first_words", sampling)
    if ours is None or theirs is None or theirs["value"] < FEW_FIRST_WORDS:
        return ""
    if ours["value"] <= COLLAPSED_VARIETY * theirs["value"]:
        return (
            f"The {ours['num_prompts']} {name} begin with {ours['value']:.0f} different words "
            f"(SFT {theirs['value']:.0f}): the policy has collapsed."
        )
    return ""


def _copy(rows: Rows, sampling: str) -> str:
    row = find(rows, "same_as_reference_share", opponent=REFERENCE, sampling=sampling)
    if row is None or row["value"] < 1:
        return ""
    name = "sampled answer" if sampling == SAMPLED else "answer"
    return f"The policy gave the same {name} as SFT to every prompt."


def _both(
    rows: Rows, metric: str, sampling: str
) -> tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]:
    return (
        find(rows, metric, sampling=sampling),
        find(rows, metric, system=REFERENCE, sampling=sampling),
    )


def words_of(row: Mapping[str, Any]) -> str:
    """Return the words that a figure counts, in the form in which they are shown."""
    return f"`{row['text']}`" if row["text"] else "no word"


def _of_ten(share: float, other: float) -> tuple[str, str]:
    """Return two shares as "9 of 10" or "93 of 100"; `share` must be the larger one.

    It is "of 100" if both shares round to the same number of 10, or the larger one rounds to 10 of
    10. A share of exactly 1 is "All".
    """
    tens, others = round(10 * share), round(10 * other)
    if tens < 10 and tens != others:
        return f"{tens} of 10", f"{others} of 10"
    if share == 1:
        return "All", f"{round(100 * other)} of 100"
    return f"{min(99, round(100 * share))} of 100", f"{round(100 * other)} of 100"


def _gain(row: Mapping[str, Any], judge: str) -> str:
    where = f"Under {JUDGES[judge].name}"
    if row["sampling"] == SAMPLED:
        where = "On sampled answers, under the same judge,"
    figure = (
        f"{100 * row['value']:.1f} % of {row['num_prompts']} prompts "
        f"(95 % interval {100 * row['low']:.1f} to {100 * row['high']:.1f})"
    )
    if row["low"] > EVEN:
        return f"{where} the policy beats SFT: it wins {figure}, separated from 50 %."
    if row["high"] < EVEN:
        return f"{where} the policy is worse than SFT: it wins {figure}, separated from 50 %."
    return (
        f"{where} no gain over SFT is shown: the policy wins {figure}, "
        "an interval that includes 50 %."
    )


def _price(rows: Rows, sampling: str) -> str:
    """Return a sentence on overlap with the human line and on length, if they clearly changed.

    A change is clear if its interval excludes 0.
    """
    names = {"rouge_l": "ROUGE-L with the human line", "mean_words": "length in words"}
    moved = []
    for metric, name in names.items():
        row = find(rows, f"{metric}_difference", opponent=REFERENCE, sampling=sampling)
        if row is not None and (row["low"] > 0 or row["high"] < 0):
            direction = "rose" if row["value"] > 0 else "fell"
            digits = 1 if metric == "mean_words" else 3
            moved.append(f"{name} {direction} by {abs(row['value']):.{digits}f}")
    return f"Meanwhile {' and '.join(moved)} per prompt." if moved else ""


def _responses(generations: Rows, prompts: Rows, sampling: str) -> dict[str, dict[str, str]]:
    """Return system -> prompt_id -> response, with the human lines of the same prompts.

    Of several responses of a system to a prompt it is the one with the lowest `sample_index`.
    """
    texts: dict[str, dict[str, str]] = {POLICY: {}, REFERENCE: {}}
    decoded = [row for row in generations if row["sampling"] == sampling]
    for row in sorted(decoded, key=lambda row: (row["prompt_id"], row["sample_index"])):
        texts.setdefault(row["system"], {}).setdefault(row["prompt_id"], row["response"])
    return texts | {HUMAN: _human_lines(decoded, prompts)}


def _human_lines(generations: Rows, prompts: Rows) -> dict[str, str]:
    """Return prompt_id -> human line, for the prompts that were answered."""
    answered = {row["prompt_id"] for row in generations}
    return {
        row["prompt_id"]: row["target"]
        for row in sorted(prompts, key=lambda row: str(row["prompt_id"]))
        if row["target"] is not None and row["prompt_id"] in answered
    }


def _figures_of_texts(
    texts: Mapping[str, Mapping[str, str]],
    prompts: Rows,
    sampling: str,
    seed: int,
    labeller: Labeller | None,
) -> list[Row]:
    """Return all figures of `texts` (system -> prompt_id -> response), and policy - reference."""
    prompt_of = {row["prompt_id"]: row for row in prompts}
    per_prompt = {
        system: _text_figures(answers, prompt_of, labeller, is_human=system == HUMAN)
        for system, answers in texts.items()
        if answers
    }
    rows = [
        _figure(system, metric, bootstrap_mean(list(values.values()), seed=seed))
        for system, figures in per_prompt.items()
        for metric, values in figures.items()
    ]
    for system in per_prompt:
        rows += _variety(system, list(texts[system].values()), seed)
    rows += _differences(per_prompt, seed)
    rows += _copies(texts)
    return [row | {"sampling": sampling} for row in rows]


def _variety(system: str, answers: Sequence[str], seed: int) -> list[Row]:
    """Return how alike the answers of one system to different prompts are."""
    count = len(answers)
    rows = [
        _plain_figure(system, "distinct_words", distinct_words(answers), count),
        _plain_figure(system, "distinct_first_words", distinct_first_words(answers), count),
        _opening_figure(system, "top_first_word_share", top_opening(answers, 1), count),
        _opening_figure(
            system, "top_opening_share", top_opening(answers, WORDS_OF_AN_OPENING), count
        ),
        _figure(system, "repeated_share", wilson(num_repeated(answers), count)),
    ]
    if count > 1:
        similarity = mean_similarity(answers, seed=seed)
        rows.append(_plain_figure(system, "mean_similarity", similarity, count))
    return rows


def _copies(texts: Mapping[str, Mapping[str, str]]) -> list[Row]:
    """Return the share of prompts to which policy and reference gave exactly the same answer."""
    ours, theirs = texts.get(POLICY, {}), texts.get(REFERENCE, {})
    both = ours.keys() & theirs.keys()
    if not both:
        return []
    share = wilson(sum(ours[i] == theirs[i] for i in both), len(both))
    return [_figure(POLICY, "same_as_reference_share", share, opponent=REFERENCE)]


def _text_figures(
    answers: Mapping[str, str],
    prompt_of: Mapping[str, Mapping[str, Any]],
    labeller: Labeller | None,
    *,
    is_human: bool,
) -> dict[str, dict[str, float]]:
    """Return metric -> prompt_id -> value. The human line is not compared with itself."""
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
    verdicts_of: dict[tuple[Contest, str], list[str]] = defaultdict(list)
    for row in judgements:
        verdicts_of[_contest(row), row["judge"]].append(row["verdict"])
    rows = []
    for (contest, judge), verdicts in verdicts_of.items():
        rate = win_rate([POINTS[verdict] for verdict in verdicts])
        ties = wilson(verdicts.count("tie"), len(verdicts))
        rows.append(_contest_figure(contest, judge, "win_rate", rate))
        rows.append(_contest_figure(contest, judge, "tie_share", ties))
    return rows


def _agreements(judgements: Rows) -> list[Row]:
    """Return how often each judge agrees with the gold, where the gold's verdict is not a tie.

    A tie of the judge counts one half.
    """
    gold = {
        (row["prompt_id"], _contest(row)): row["verdict"]
        for row in judgements
        if row["judge"] == "gold"
    }
    shared: dict[tuple[Contest, str], list[float]] = defaultdict(list)
    for row in judgements:
        truth = gold.get((row["prompt_id"], _contest(row)), "tie")
        if row["judge"] != "gold" and truth != "tie":
            agreement = 1 - abs(POINTS[row["verdict"]] - POINTS[truth])
            shared[_contest(row), row["judge"]].append(agreement)
    return [
        _contest_figure(contest, judge, "agreement_with_gold", win_rate(values))
        for (contest, judge), values in shared.items()
    ]


def _truncation(generations: Rows) -> list[Row]:
    cut: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for row in generations:
        if row["sampling"] in ANSWERED:
            cut[row["system"], row["sampling"]].append(row["finish_reason"] == "length")
    return [
        _figure(system, "truncated_share", wilson(sum(flags), len(flags)), sampling=sampling)
        for (system, sampling), flags in cut.items()
    ]


def _differences(
    per_prompt: Mapping[str, Mapping[str, Mapping[str, float]]], seed: int
) -> list[Row]:
    """Return the means over prompts of the policy's figures minus the reference's."""
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
    if judge not in JUDGES:
        raise ValueError(
            f"found the judge {judge!r}, expected one of {', '.join(JUDGES)}: add it to JUDGES, so "
            "that report and terminal show it"
        )
    return {
        "prompt_id": match.prompt_id,
        "system": match.system,
        "opponent": match.opponent,
        "judge": judge,
        "sampling": match.sampling,
        "verdict": verdict,
        "probability": probability,
    }


def _figure(
    system: str,
    metric: str,
    interval: Interval,
    *,
    opponent: str = "",
    judge: str = "",
    sampling: str = "",
) -> Row:
    return {
        "system": system,
        "opponent": opponent,
        "judge": judge,
        "sampling": sampling,
        "metric": metric,
        "value": interval.value,
        "low": interval.low,
        "high": interval.high,
        "text": None,
        "num_prompts": interval.n,
    }


def _plain_figure(system: str, metric: str, value: float, num_prompts: int) -> Row:
    row = _figure(system, metric, Interval(value, 0.0, 0.0, num_prompts))
    return row | {"low": None, "high": None}


def _opening_figure(system: str, metric: str, opening: Opening, count: int) -> Row:
    row = _figure(system, metric, wilson(opening.num_texts, count))
    return row | {"text": opening.words}


def _contest_figure(contest: Contest, judge: str, metric: str, interval: Interval) -> Row:
    return _figure(
        contest.system,
        metric,
        interval,
        opponent=contest.opponent,
        judge=judge,
        sampling=contest.sampling,
    )


def _contest(row: Mapping[str, Any]) -> Contest:
    return Contest(row["system"], row["opponent"], row["sampling"])


def _num_words(text: str) -> int:
    return len(text.split())


def _sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z >= 0 else 1 - 1 / (1 + math.exp(z))
