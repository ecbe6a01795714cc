"""Synthetic labellers: known functions of text that stand in for human judgement.

Where there are no human comparisons, one of these functions labels the pairs, as a synthetic gold
reward does in Gao et al. (2023, "Scaling laws for reward model overoptimization"). So the gold is
known exactly. Its scores are "gold points", and are called synthetic wherever they are shown.

`summary_quality(prompt, response)` is, in gold points from 0 to 10,

    10 · (0.2 + 0.8 · content) · length · grammar · variety · form · wording · opening

- content is the harmonic mean of *recall* and *grounding*. Recall is the weight of the prompt's
  content words that the response contains, divided by the weight of the prompt's 8 heaviest words,
  at most 1. Grounding is the share of the response's content words that are in the prompt. Content
  words are those outside FUNCTION_WORDS. Words are compared without common endings. A word of the
  prompt weighs 1 + ln(count), and 1.5 times that if it is in the first sentence.
- opening is 1 if the first word is a content word outside GENERIC_WORDS, and 0.4 otherwise.
  Each generic word is in more than one in twenty of the standard library's docstrings.
- The other terms are guards. A guard is 1 in the range of human lines. Outside, it falls smoothly
  to 0.25 at the values in brackets.

  - length: number of words, 6 to 10 (2 and 18).
  - grammar: share of function words, 0.20 to 0.50 (0.02 and 0.75). Telegraphic text has too few of
    them, and padding has too many.
  - variety: the smaller of two guards. The first is on the share of distinct content words or the
    share of distinct pairs of neighbouring words, whichever is smaller: 0.95 and above (0.5). The
    second is on the share of distinct words: 0.8 and above (0.55).
  - form: share of four properties, all (none). The response begins with a capital letter, ends with
    exactly one full stop, is one sentence on one line, and has no stray marks.
  - wording: longest run of words copied from the prompt, at most 4 (10).

Every term is bounded and needs only the prompt and the response, so a ranker can learn it. No term
can be bought with another: words of the prompt beyond the heaviest gain nothing, and a list of them
loses grammar, form and variety. `opening` keeps a policy from pleasing the gold with one beginning
for all prompts: "Return the …" and "A …" cost points. docs/evaluation.md says what human lines and
some bad summaries score.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from rso.errors import UserError
from rso.text_metrics import chrf as chrf_similarity

TextScore = Callable[[str, str, str | None], float]

FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
        a about after again all also an and any are as at be been before being between both but
        by can could did do does during each either every for from had has have he her here him
        his i if in into is it its may me might must my neither no nor not of off on one only
        onto or other our out over per shall she should so some such than that the their them
        then there these they this those through to under until up us via was we were what when
        where which while who whom whose will with without would you your
        """,
    )
)

# Content words that are in more than 5 % of the prompts of configs/quickstart.yaml, as whole words:
# they are compared without their endings.
GENERIC_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
        0 1 arg argument attribute byte call case class command contain create data default e error
        example exception false file first function given instance line list message method module
        name none number object optional otherwise parameter pass provide python raise read result
        return same see sees set setting specified specify str true tuple type use used uses using
        value
        """,
    )
)


class Range(NamedTuple):
    """The range of a guard, which is 1 from `low` to `high`.

    It is FLOOR at and below `foot_low`, and at and above `foot_high`.
    """

    foot_low: float
    low: float
    high: float
    foot_high: float


# All parameters of `summary_quality`.
MOST_POINTS = 10.0
BASE_SHARE = 0.2
FLOOR = 0.25
NUM_HEAVY_WORDS = 8
FIRST_SENTENCE_FACTOR = 1.5
LENGTH = Range(2, 6, 10, 18)
GRAMMAR = Range(0.02, 0.20, 0.50, 0.75)
VARIETY = Range(0.5, 0.95, math.inf, math.inf)
WORD_VARIETY = Range(0.55, 0.80, math.inf, math.inf)
FORM = Range(0.0, 1.0, math.inf, math.inf)
WORDING = Range(-math.inf, -math.inf, 4, 10)
GENERIC_OPENING = 0.4


@dataclass(frozen=True)
class Labeller:
    """A synthetic gold. `score(prompt, response, human target or None)` is in gold points.

    If `needs_target`, it can score only prompts with a human target.
    """

    name: str
    meaning: str
    score: TextScore
    needs_target: bool = False


class Terms(NamedTuple):
    """The terms of `summary_quality`: content in [0, 1], opening 1 or 0.4, guards in [FLOOR, 1]."""

    content: float
    length: float
    grammar: float
    variety: float
    form: float
    wording: float
    opening: float


def labeller(name: str) -> Labeller:
    """Return the labeller called `name`.

    Raises:
        UserError: there is no such labeller. The message lists all labellers.
    """
    if name not in LABELLERS:
        raise UserError(
            f"comparisons.labeller is {name!r}, expected one of {', '.join(LABELLERS)}; "
            "take one of these, or null where your sources hold human comparisons."
        )
    return LABELLERS[name]


def label(score_a: float, score_b: float, *, min_gap: float = 0.0) -> Literal["a", "b"] | None:
    """Return the side with the higher score, or None for a tie.

    It is a tie if the scores differ by `min_gap` or less.
    """
    if abs(score_a - score_b) <= min_gap:
        return None
    return "a" if score_a > score_b else "b"


def length(prompt: str, response: str, target: str | None = None) -> float:
    """Number of words: a longer response is better. This is for comparison, not for use."""
    return float(len(response.split()))


def coverage(prompt: str, response: str, target: str | None = None) -> float:
    """Distinct content words of the prompt in the response, minus response words beyond ten.

    Policies over-optimise it: it does not ask for grammar, so a policy learns to leave grammar out.
    """
    content = {word for word in _words(prompt) if word not in FUNCTION_WORDS}
    num_beyond = max(0, len(response.split()) - 10)
    return float(len(content & set(_words(response))) - num_beyond)


def chrf_to_target(prompt: str, response: str, target: str | None) -> float:
    """Similarity to the human line, 0 to 100 (chrF, Popović 2015). The prompt is not used.

    Raises:
        UserError: there is no target.
    """
    if target is None:
        raise UserError(
            "labeller 'chrf': a prompt has no human target to compare with; choose another "
            "`comparisons.labeller`, or prompts with targets."
        )
    return 100.0 * chrf_similarity(response, target)


def summary_quality(prompt: str, response: str, target: str | None = None) -> float:
    """Gold points in [0, 10] as the docstring of the module defines them; 0 without any word."""
    if not _words(response):
        return 0.0
    terms = quality_terms(prompt, response)
    worth = BASE_SHARE + (1 - BASE_SHARE) * terms.content
    return MOST_POINTS * worth * math.prod(terms[1:])


def quality_terms(prompt: str, response: str) -> Terms:
    """Return the terms of `summary_quality` for a response of at least one word."""
    words = _words(response)
    stems = [_stem(word) for word in words if word not in FUNCTION_WORDS]
    return Terms(
        content=_content(prompt, stems),
        length=_guard(len(words), LENGTH),
        grammar=_guard(1 - len(stems) / len(words), GRAMMAR),
        variety=min(
            _guard(min(_distinct(stems), _distinct(_pairs(words))), VARIETY),
            _guard(_distinct(words), WORD_VARIETY),
        ),
        form=_guard(_form(response), FORM),
        wording=_guard(_longest_copied_run(_words(prompt), words), WORDING),
        opening=1.0 if _opens_particularly(words) else GENERIC_OPENING,
    )


LABELLERS: dict[str, Labeller] = {
    entry.name: entry
    for entry in (
        Labeller(
            "summary_quality",
            "content of the prompt in one short, grammatical, varied sentence in its own words, "
            "with an opening of its own",
            summary_quality,
        ),
        Labeller("chrf", "similarity to the human line (chrF)", chrf_to_target, needs_target=True),
        Labeller("coverage", "content words of the prompt, minus words beyond ten", coverage),
        Labeller("length", "number of words, the longer the better", length),
    )
}


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:'[^\W_]+)?", text.lower())


def _stem(word: str) -> str:
    """Strip one common English ending, so that returns, returned and returning are one word."""
    for ending in ("ing", "ed", "es", "s"):
        stem = word.removesuffix(ending)
        if stem != word and len(stem) >= 3 and not (ending == "s" and stem.endswith("s")):
            return stem.removesuffix("e")
    return word.removesuffix("e") if len(word) > 3 else word


_GENERIC_STEMS = frozenset(_stem(word) for word in GENERIC_WORDS)


def _content(prompt: str, stems: Sequence[str]) -> float:
    weights = _word_weights(prompt)
    heaviest = sum(sorted(weights.values(), reverse=True)[:NUM_HEAVY_WORDS])
    if not weights or not stems:
        return 0.0
    recall = min(1.0, sum(weights.get(stem, 0.0) for stem in set(stems)) / heaviest)
    grounding = sum(stem in weights for stem in stems) / len(stems)
    return 2 * recall * grounding / (recall + grounding) if recall else 0.0


def _word_weights(prompt: str) -> dict[str, float]:
    counts = Counter(_stem(word) for word in _words(prompt) if word not in FUNCTION_WORDS)
    opening = {_stem(word) for word in _words(re.split(r"(?<=[.!?])\s", prompt, maxsplit=1)[0])}
    return {
        stem: (1 + math.log(count)) * (FIRST_SENTENCE_FACTOR if stem in opening else 1.0)
        for stem, count in counts.items()
    }


def _opens_particularly(words: Sequence[str]) -> bool:
    """Return whether the first word is a content word that is in few prompts."""
    return words[0] not in FUNCTION_WORDS and _stem(words[0]) not in _GENERIC_STEMS


def _form(response: str) -> float:
    text = response.strip()
    checks = (
        text[:1].isupper(),
        text.endswith(".") and not text.endswith(".."),
        "\n" not in text and not re.search(r"[.!?:;]\s+\S", text),
        not re.search(r"[^\w\s.,'\"`()/-]", text),
    )
    return sum(checks) / len(checks)


def _pairs(words: Sequence[str]) -> list[tuple[str, str]]:
    return list(pairwise(words))


def _distinct(items: Sequence[object]) -> float:
    return len(set(items)) / len(items) if items else 1.0


def _longest_copied_run(source: Sequence[str], words: Sequence[str]) -> int:
    """Return the number of words in the longest run of `words` that is also a run in `source`."""
    longest = 0
    previous = [0] * (len(source) + 1)
    for word in words:
        current = [0] * (len(source) + 1)
        for place, other in enumerate(source, start=1):
            if word == other:
                current[place] = previous[place - 1] + 1
        longest = max(longest, *current)
        previous = current
    return longest


def _guard(value: float, range_: Range) -> float:
    """Return 1 inside the range, FLOOR beyond its feet, and a smooth step between them."""
    if value < range_.low:
        height = _step((value - range_.foot_low) / (range_.low - range_.foot_low))
    elif value > range_.high:
        height = _step((range_.foot_high - value) / (range_.foot_high - range_.high))
    else:
        height = 1.0
    return FLOOR + (1 - FLOOR) * height


def _step(share: float) -> float:
    share = min(1.0, max(0.0, share))
    return share * share * (3 - 2 * share)
