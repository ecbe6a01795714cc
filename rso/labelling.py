"""Synthetic labellers: stated functions of text that stand in for human judgement.

Where no human comparisons exist, pairs are labelled by one of these, as Gao et al. (2023, "Scaling
laws for reward model overoptimization") do with a synthetic gold reward. Its merit is that the gold
is known exactly; its scores are "gold points" and are called synthetic wherever they are shown.

`summary_quality(prompt, response)` is, in gold points from 0 to 10,

    10 · (0.2 + 0.8 · content) · length · grammar · variety · form · wording · opening

- content: harmonic mean of *recall*, the weight of the prompt's words that the response takes up
  over the weight of the prompt's 8 heaviest words (at most 1), and *grounding*, the share of the
  response's content words that are in the prompt. Words are compared without common endings;
  a word of the prompt weighs 1 + ln(count), and 1.5 times that in the first sentence.
- The others are guards: 1 in the range that human lines keep, falling smoothly to 0.25 outside.
  length: words, 6 to 10 (2 and 18 at the foot). grammar: share of function words, 0.20 to 0.50
  (0.02 and 0.75), which telegraphic text has too few of and padding too many. variety: the lesser
  of two guards, one of the share of distinct ones among content words and among pairs of
  neighbours, 0.95 and above (0.5), one of the share of distinct words, 0.8 and above (0.55). form:
  share of: begins with a capital letter, ends with one full stop, is one sentence on one line, has
  no stray marks; all of them (none). wording: longest run of words copied from the prompt, 4 or
  fewer (10).
- opening: 1 where the first word is a content word outside GENERIC_WORDS, the words that more than
  one in twenty of the standard library's docstrings hold, and 0.4 otherwise.

Every term is bounded and needs the prompt and the response alone, so a ranker can learn it, and no
term can be bought with another: more of the prompt's words beyond the heaviest gain nothing, and a
list of them loses grammar, form and variety. Opening keeps a policy from pleasing the gold with one
beginning for all prompts: "Return the …" and "A …" are taxed. docs/evaluation.md says what human
lines and some bad summaries score.
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

# Content words of more than 5 % of the prompts of configs/quickstart.yaml, whole words here.
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
    """A guard: 1 between `low` and `high`, FLOOR at `foot_low` and `foot_high` and beyond."""

    foot_low: float
    low: float
    high: float
    foot_high: float


# The parameters of `summary_quality`, all of them.
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
    """A synthetic gold: its score of (prompt, response, human target or None) in gold points."""

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
        UserError: there is none; the message lists those there are.
    """
    if name not in LABELLERS:
        raise UserError(
            f"comparisons.labeller is {name!r}, expected one of {', '.join(LABELLERS)}; "
            "take one of these, or null where your sources hold human comparisons."
        )
    return LABELLERS[name]


def label(score_a: float, score_b: float, *, min_gap: float = 0.0) -> Literal["a", "b"] | None:
    """Return the better side, or None for a tie: scores no more than `min_gap` apart."""
    if abs(score_a - score_b) <= min_gap:
        return None
    return "a" if score_a > score_b else "b"


def length(prompt: str, response: str, target: str | None = None) -> float:
    """Number of words: the longer, the better. For comparison, not for use."""
    return float(len(response.split()))


def coverage(prompt: str, response: str, target: str | None = None) -> float:
    """Distinct content words of the prompt in the response, minus words beyond ten.

    Known to be over-optimised: nothing in it asks for grammar, so a policy learns to leave it out.
    """
    content = {word for word in _words(prompt) if word not in FUNCTION_WORDS}
    num_beyond = max(0, len(response.split()) - 10)
    return float(len(content & set(_words(response))) - num_beyond)


def chrf_to_target(prompt: str, response: str, target: str | None) -> float:
    """Similarity to the human line, 0 to 100 (chrF, Popović 2015). The prompt plays no part."""
    if target is None:
        raise UserError(
            "labeller 'chrf': a prompt has no human target to compare with; choose another "
            "`comparisons.labeller`, or prompts with targets."
        )
    return 100.0 * chrf_similarity(response, target)


def summary_quality(prompt: str, response: str, target: str | None = None) -> float:
    """Gold points in [0, 10] as the module's docstring states them; 0 without a word."""
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
    """Return whether the first word is a content word that few prompts have."""
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
    """Return the length of the longest run of `words` that stands in `source` as it is."""
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
    """Return 1 inside the range and FLOOR beyond its feet, with a smooth step in between."""
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
