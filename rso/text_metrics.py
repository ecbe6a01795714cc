"""Metrics of texts that need no model: overlap with a reference, variety, and similarity."""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from rso import seeds

_CHRF_ORDERS = range(1, 7)
_CHRF_BETA_SQUARED = 4.0

MAX_PAIRS = 20_000
"""The largest number of pairs of texts that `mean_similarity` compares by default."""


class Opening(NamedTuple):
    """The first words of a text, lower-cased, and the number of texts that begin with them."""

    words: str
    num_texts: int


def chrf(hypothesis: str, reference: str) -> float:
    """Character n-gram F2 in [0, 1], n = 1 to 6, whitespace removed (Popović 2015).

    It equals sacrebleu's sentence-level chrF divided by 100: precision and recall are averaged over
    those n for which both texts are long enough. It is 0 if a text is empty.
    """
    ours, theirs = "".join(hypothesis.split()), "".join(reference.split())
    orders = [n for n in _CHRF_ORDERS if n <= min(len(ours), len(theirs))]
    if not orders:
        return 0.0
    matches = [(_ngrams(ours, n) & _ngrams(theirs, n)).total() for n in orders]
    precision = _mean([m / (len(ours) - n + 1) for m, n in zip(matches, orders, strict=True)])
    recall = _mean([m / (len(theirs) - n + 1) for m, n in zip(matches, orders, strict=True)])
    return _f_score(precision, recall, _CHRF_BETA_SQUARED)


def rouge_l(hypothesis: str, reference: str) -> float:
    """ROUGE-L F1 in [0, 1]: longest common subsequence of lower-cased words (Lin 2004).

    Words are runs of letters, digits and underscores, without stemming. ROUGE-L is 0 if a text has
    no words.
    """
    ours, theirs = _words(hypothesis), _words(reference)
    if not ours or not theirs:
        return 0.0
    common = _longest_common_subsequence(ours, theirs)
    return _f_score(common / len(ours), common / len(theirs), 1.0)


def distinct_words(texts: Iterable[str]) -> float:
    """Number of distinct words of `texts` divided by their number of words; 0 without words.

    It falls with the amount of text, so compare only sets of about the same size.
    """
    counts = Counter(word for text in texts for word in _words(text))
    return len(counts) / counts.total() if counts else 0.0


def top_opening(texts: Iterable[str], num_words: int) -> Opening:
    """Return the most common opening: the first `num_words` words of a text, joined by spaces.

    Among equally common openings it is the first in alphabetical order. Words are as in `rouge_l`.
    The opening of a shorter text is all its words.

    Raises:
        ValueError: there are no texts.
    """
    counts = Counter(" ".join(_words(text)[:num_words]) for text in texts)
    if not counts:
        raise ValueError("top_opening: no texts, expected at least one: leave out the figure")
    return Opening(*min(counts.items(), key=lambda item: (-item[1], item[0])))


def distinct_first_words(texts: Iterable[str]) -> int:
    """Return the number of different first words, in lower case; a text without words has none."""
    return len({words[0] for text in texts if (words := _words(text))})


def num_repeated(texts: Iterable[str]) -> int:
    """Return how many texts equal another text, apart from case and amount of white space."""
    counts = Counter(" ".join(text.lower().split()) for text in texts)
    return sum(count for count in counts.values() if count > 1)


def mean_similarity(texts: Sequence[str], *, seed: int, max_pairs: int = MAX_PAIRS) -> float:
    """Return the mean similarity of two of the texts, in [0, 1].

    The similarity of a pair is the Jaccard index of the two sets of words: the number of shared
    words divided by the number of words in either text. For two texts without words it is 1. The
    mean is over all pairs, or over `max_pairs` random ones if there are more pairs than that. These
    are drawn with replacement, keyed by `seed`: in lists of equal length, the same indices are
    drawn.

    Raises:
        ValueError: there are fewer than two texts.
    """
    if len(texts) < 2:
        raise ValueError(
            f"mean_similarity: {len(texts)} texts, expected at least two: leave out the figure"
        )
    sets = [frozenset(_words(text)) for text in texts]
    return _mean([_jaccard(sets[i], sets[j]) for i, j in _pairs(len(sets), seed, max_pairs)])


def _pairs(count: int, seed: int, max_pairs: int) -> Iterator[tuple[int, int]]:
    if count * (count - 1) // 2 <= max_pairs:
        yield from itertools.combinations(range(count), 2)
        return
    draws = seeds.generator("similarity", seed)
    firsts = draws.integers(count, size=max_pairs)
    steps = draws.integers(1, count, size=max_pairs)
    for first, step in zip(firsts.tolist(), steps.tolist(), strict=True):
        yield first, (first + step) % count


def _jaccard(ours: frozenset[str], theirs: frozenset[str]) -> float:
    either = len(ours | theirs)
    return len(ours & theirs) / either if either else 1.0


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _ngrams(text: str, n: int) -> Counter[str]:
    return Counter(text[start : start + n] for start in range(len(text) - n + 1))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _f_score(precision: float, recall: float, beta_squared: float) -> float:
    if precision + recall == 0:
        return 0.0
    return (1 + beta_squared) * precision * recall / (beta_squared * precision + recall)


def _longest_common_subsequence(ours: Sequence[str], theirs: Sequence[str]) -> int:
    lengths = [0] * (len(theirs) + 1)
    for word in ours:
        diagonal = 0
        for column, other in enumerate(theirs, start=1):
            above = lengths[column]
            lengths[column] = diagonal + 1 if word == other else max(above, lengths[column - 1])
            diagonal = above
    return lengths[-1]
