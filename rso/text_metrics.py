"""What can be read off a text without a model: overlap with a reference, and variety of words."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

_CHRF_ORDERS = range(1, 7)
_CHRF_BETA_SQUARED = 4.0


def chrf(hypothesis: str, reference: str) -> float:
    """Character n-gram F2 in [0, 1], n = 1 to 6, whitespace removed (Popović 2015).

    As sacrebleu's sentence-level chrF (divided by 100): precision and recall are averaged over the
    orders that both texts are long enough for. 0 when one of them is empty.
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

    Words are runs of letters, digits and underscores, without stemming. 0 when there are none.
    """
    ours, theirs = _words(hypothesis), _words(reference)
    if not ours or not theirs:
        return 0.0
    common = _longest_common_subsequence(ours, theirs)
    return _f_score(common / len(ours), common / len(theirs), 1.0)


def distinct_words(texts: Iterable[str]) -> float:
    """Share of distinct words among all words of `texts` (types by tokens); 0 without words.

    It falls with the amount of text, so compare only sets of about the same size.
    """
    counts = Counter(word for text in texts for word in _words(text))
    return len(counts) / counts.total() if counts else 0.0


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
