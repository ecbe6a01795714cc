"""How far a ranker can be believed: how often it is right, how sure it is, and which slot it likes.

A margin is z = (z_AB - z_BA) / 2, nats, of the chosen over the rejected response: the logit_A -
logit_B of both orders, each in the direction of the chosen one, averaged. The ranker believes its
own preference with probability sigmoid(|z|).
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from rso.aliases import Floats
from rso.statistics import Interval, Values, bootstrap_mean, wilson

# Fewer than so many comparisons tell nothing of a bin.
_LEAST_IN_A_BIN = 12
_MOST_VERDICTS_FLIPPED = 1 / 3
_MOST_BINS_OF_MARGIN, _MOST_BINS_OF_LENGTH = 10, 4


@dataclass(frozen=True)
class Bin:
    """Accuracy on the comparisons whose value lies in [low, high].

    `probability` is what the ranker gave its own preference, on average: where it exceeds the
    accuracy the ranker is too sure.
    """

    low: float
    high: float
    accuracy: Interval
    probability: float

    @property
    def figures(self) -> dict[str, float]:
        """The bin as one row of numbers, for manifests and the report."""
        return {
            "low": self.low,
            "high": self.high,
            "comparisons": self.accuracy.n,
            "accuracy": self.accuracy.value,
            "accuracy_low": self.accuracy.low,
            "accuracy_high": self.accuracy.high,
            "probability": self.probability,
        }


@dataclass(frozen=True)
class HeldOut:
    """A ranker on held-out comparisons; a margin of exactly zero counts one half.

    `longer` is the accuracy of preferring the text with more characters. `chosen_longer` and
    `chosen_shorter` are the ranker's accuracy where the chosen text is the longer or the shorter
    one; a ranker that only likes length has nearly 1 and 0 there.

    `believed` is the mean probability that the ranker gives its own preferences. The expected
    calibration error is the mean over comparisons of |accuracy - believed| of their bin (Naeini
    et al. 2015); `calibration_error_by_chance` is about what a ranker with these beliefs would
    have if they were true, as bins are finite.

    `by_margin` and `by_length` are in bins: by the ranker's own |margin|, nats, which is the
    reliability curve, and by how many characters the chosen text has more than the rejected one.
    """

    accuracy: Interval
    longer: Interval
    chosen_longer: Interval | None
    chosen_shorter: Interval | None
    mean_loss: float
    believed: float
    calibration_error: float
    calibration_error_by_chance: float
    by_margin: tuple[Bin, ...]
    by_length: tuple[Bin, ...]

    @property
    def figures(self) -> dict[str, float]:
        """Everything but the bins as counters of a manifest; what is None is left out."""
        intervals = {
            "accuracy": self.accuracy,
            "accuracy_of_longer": self.longer,
            "accuracy_where_chosen_is_longer": self.chosen_longer,
            "accuracy_where_chosen_is_shorter": self.chosen_shorter,
        }
        return {
            "held_out_comparisons": self.accuracy.n,
            "held_out_loss": self.mean_loss,
            "believed": self.believed,
            "calibration_error": self.calibration_error,
            "calibration_error_by_chance": self.calibration_error_by_chance,
            **_with_edges(intervals),
        }


def judge(margins: Values, excess: Sequence[int]) -> HeldOut:
    """Accuracy and calibration of `margins` [comparison] of chosen over rejected, at least one.

    `excess` [comparison] is how many characters the chosen text has more than the rejected one.
    """
    z = np.asarray(margins, dtype=np.float64)
    hits = _hits(z)
    longer = np.asarray(excess)
    sure = _sigmoid(np.abs(z))
    by_margin = _bins(np.abs(z).tolist(), hits, sure, _MOST_BINS_OF_MARGIN)
    return HeldOut(
        accuracy=wilson(float(hits.sum()), len(hits)),
        longer=wilson(float(np.where(longer == 0, 0.5, longer > 0).sum()), len(longer)),
        chosen_longer=_accuracy(hits[longer > 0]),
        chosen_shorter=_accuracy(hits[longer < 0]),
        mean_loss=float(np.logaddexp(0, -z).mean()),
        believed=float(sure.mean()),
        calibration_error=_calibration_error(by_margin),
        calibration_error_by_chance=_calibration_error_by_chance(by_margin, np.sort(sure)),
        by_margin=by_margin,
        by_length=_bins(longer.tolist(), hits, sure, _MOST_BINS_OF_LENGTH),
    )


@dataclass(frozen=True)
class PositionalBias:
    """What the slot alone is worth to a ranker, over pairs that it compared in both orders.

    `mean` is that of (z_AB + z_BA) / 2, nats, positive when slot A is favoured, with a bootstrap
    interval; `spread` is its standard deviation over pairs. `flips` is the share of pairs in
    which the same slot wins in both orders, so that the order decides the verdict.
    """

    mean: Interval
    spread: float
    flips: Interval

    @property
    def figures(self) -> dict[str, float]:
        """The same as counters of a manifest."""
        return {
            "positional_bias_spread": self.spread,
            **_with_edges({"positional_bias": self.mean, "verdicts_flipped": self.flips}),
        }


@dataclass(frozen=True)
class EachOrder:
    """A ranker on held-out comparisons in each order alone, and what the slot is worth to it.

    `chosen_first` and `chosen_second` are its accuracy with the chosen response in slot A and in
    slot B; a logit of exactly zero counts one half. `bias` is the mean of (z_AB + z_BA) / 2, nats,
    positive when slot A is favoured; `spread` is its standard deviation over comparisons.
    """

    chosen_first: Interval
    chosen_second: Interval
    bias: float
    spread: float

    @property
    def figures(self) -> dict[str, float]:
        """The same as counters of a manifest."""
        return {
            "positional_bias": self.bias,
            "positional_bias_spread": self.spread,
            **_with_edges(
                {
                    "accuracy_chosen_first": self.chosen_first,
                    "accuracy_chosen_second": self.chosen_second,
                }
            ),
        }


def in_each_order(forward: Values, backward: Values) -> EachOrder:
    """Accuracy in each order, from z_AB and z_BA [comparison], at least one.

    Each is logit_A - logit_B: `forward` with the chosen response in slot A, `backward` in slot B.
    """
    z_ab, z_ba = (np.asarray(z, dtype=np.float64) for z in (forward, backward))
    bias = (z_ab + z_ba) / 2
    return EachOrder(
        chosen_first=wilson(float(_hits(z_ab).sum()), len(z_ab)),
        chosen_second=wilson(float(_hits(-z_ba).sum()), len(z_ba)),
        bias=float(bias.mean()),
        spread=float(bias.std()),
    )


def positional_bias(forward: Values, backward: Values, *, seed: int) -> PositionalBias:
    """What the slot is worth, from z_AB and z_BA [pair], each logit_A - logit_B, at least one.

    Pairs are to be of different prompts, the unit of the intervals. `seed` keys the bootstrap.
    """
    z_ab, z_ba = (np.asarray(z, dtype=np.float64) for z in (forward, backward))
    bias = (z_ab + z_ba) / 2
    return PositionalBias(
        mean=bootstrap_mean(bias, seed=seed),
        spread=float(bias.std()),
        flips=wilson(int((z_ab * z_ba > 0).sum()), len(bias)),
    )


def bias_advice(counters: Mapping[str, float], orders: str) -> str | None:
    """What to say of a ranker with these counters of `score`; None where nothing is wrong.

    Something is wrong when the positional bias varies more from pair to pair than rewards do
    within a prompt, or when the order decides more than a third of the verdicts. `orders` is
    `score.orders`, which the advice names where it would help.
    """
    spread, flips = counters.get("positional_bias_spread"), counters.get("verdicts_flipped")
    if spread is None or flips is None:
        return None
    reward_spread = counters["reward_spread_sum"] / counters["prompts"]
    if spread <= reward_spread and flips <= _MOST_VERDICTS_FLIPPED:
        return None
    remedy = "Rewards are the mean of both orders, in which its mean cancels."
    if orders != "both":
        remedy = "Take rewards in both orders (score.orders: both)."
    return (
        f"score: on {counters['flipped_pairs']:.0f} pairs in both orders, the positional bias has "
        f"a spread of {spread:.2f}, rewards within a prompt have one of {reward_spread:.2f}, and "
        f"in {flips:.0%} of the pairs the order decides who wins. One order of this ranker says "
        f"little. {remedy} For a smaller bias, train the ranker with train_ranker.orders: mean or "
        "with a train_ranker.bias_penalty above 0."
    )


def _bins(values: Sequence[float], hits: Floats, sure: Floats, most_bins: int) -> tuple[Bin, ...]:
    """Every comparison in one bin; below, at and above zero apart, equal values together."""
    bins = []
    for sign in (-1, 0, 1):
        order = sorted(
            (i for i, v in enumerate(values) if (v > 0) - (v < 0) == sign), key=lambda i: values[i]
        )
        num_bins = max(1, min(most_bins, len(order) // _LEAST_IN_A_BIN))
        sorted_values = [values[i] for i in order]
        # A bin begins where a new value does.
        starts = {
            bisect_left(sorted_values, sorted_values[len(order) * k // num_bins])
            for k in range(num_bins)
            if order
        }
        for first, last in pairwise([*sorted(starts), len(order)]):
            inside = order[first:last]
            bins.append(
                Bin(
                    float(values[inside[0]]),
                    float(values[inside[-1]]),
                    wilson(float(hits[inside].sum()), len(inside)),
                    float(sure[inside].mean()),
                )
            )
    return tuple(bins)


def _calibration_error(bins: Sequence[Bin]) -> float:
    total = sum(b.accuracy.n for b in bins)
    return sum(b.accuracy.n * abs(b.accuracy.value - b.probability) for b in bins) / total


def _calibration_error_by_chance(bins: Sequence[Bin], sure: Floats) -> float:
    """The mean |deviation| of each bin's number of hits, normal, were the beliefs true.

    `sure` [comparison] is sorted, as the bins are.
    """
    ends = np.cumsum([b.accuracy.n for b in bins])
    variances = [float((part * (1 - part)).sum()) for part in np.split(sure, ends[:-1])]
    return float(np.sqrt(2 / np.pi * np.array(variances)).sum() / len(sure))


def _hits(z: Floats) -> Floats:
    return np.where(z == 0, 0.5, z > 0)


def _sigmoid(z: Floats) -> Floats:
    """Sigmoid of z [n] >= 0, where exp cannot overflow."""
    return 1 / (1 + np.exp(-z))


def _with_edges(intervals: dict[str, Interval | None]) -> dict[str, float]:
    return {
        f"{name}{edge}": value
        for name, interval in intervals.items()
        if interval is not None
        for edge, value in (("", interval.value), ("_low", interval.low), ("_high", interval.high))
    }


def _accuracy(hits: Floats) -> Interval | None:
    return wilson(float(hits.sum()), len(hits)) if len(hits) else None
