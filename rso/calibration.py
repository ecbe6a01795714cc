"""How reliable a ranker is: how often it is right, how sure it is, and which slot it prefers.

The margin of a comparison is z = (z_AB - z_BA) / 2, nats. z_AB is logit_A - logit_B with the chosen
response in slot A, and z_BA is logit_A - logit_B with the chosen response in slot B. So z is
positive when the ranker prefers the chosen response. It gives its own preference the probability
sigmoid(|z|).
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from rso.aliases import Floats
from rso.statistics import Interval, Values, bootstrap_mean, wilson

# With fewer comparisons than this, a bin tells nothing.
_LEAST_IN_A_BIN = 12
_MOST_VERDICTS_FLIPPED = 1 / 3
_MOST_BINS_OF_MARGIN, _MOST_BINS_OF_LENGTH = 10, 4


@dataclass(frozen=True)
class Bin:
    """Accuracy on the comparisons whose value lies in [low, high].

    `probability` is the mean probability that the ranker gave its own preferences. The ranker is
    too sure where it is larger than the accuracy.
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
    """A ranker on held-out comparisons. A margin of exactly zero counts as half a hit.

    `longer` is the accuracy of always preferring the text with more characters. `chosen_longer` and
    `chosen_shorter` are the ranker's accuracy where the chosen text is the longer or the shorter
    one. A ranker that looks only at length has nearly 1 and nearly 0 there. They are None where
    there is no such comparison.

    `mean_loss` is the mean of -log sigmoid(margin), nats. `believed` is the mean probability that
    the ranker gives its own preferences. `calibration_error` is the expected calibration error: the
    mean over comparisons of |accuracy - believed| of the comparison's bin (Naeini et al. 2015). In
    finite bins it is above 0 even for true beliefs. `calibration_error_by_chance` is about its
    value if these beliefs were true.

    `by_margin` has bins of the ranker's own |margin|, nats. This is the reliability curve.
    `by_length` has bins of how many more characters the chosen text has than the rejected one.
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
        """All fields but the bins, as counters of a manifest. Fields that are None are left out."""
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
    """Accuracy and calibration for `margins` [comparison], nats, positive for the chosen response.

    `excess` [comparison] is how many more characters the chosen text has than the rejected one.
    There must be at least one comparison.
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
    """How much a ranker prefers a slot, over pairs that it compared in both orders.

    The bias of a pair is (z_AB + z_BA) / 2, nats, positive when slot A is favoured. `mean` is the
    mean bias with its bootstrap interval, and `spread` the standard deviation of the bias over
    pairs. `flips` is the share of pairs in which the same slot wins in both orders, so that the
    order decides the verdict. Its interval is Wilson's.
    """

    mean: Interval
    spread: float
    flips: Interval

    @property
    def figures(self) -> dict[str, float]:
        """All fields as counters of a manifest."""
        return {
            "positional_bias_spread": self.spread,
            **_with_edges({"positional_bias": self.mean, "verdicts_flipped": self.flips}),
        }


@dataclass(frozen=True)
class EachOrder:
    """A ranker on held-out comparisons in each order separately, and its positional bias.

    `chosen_first` and `chosen_second` are its accuracy with the chosen response in slot A and in
    slot B. A logit of exactly zero counts as half a hit. `bias` is the mean of (z_AB + z_BA) / 2,
    nats, positive when slot A is favoured. `spread` is the standard deviation over comparisons.
    """

    chosen_first: Interval
    chosen_second: Interval
    bias: float
    spread: float

    @property
    def figures(self) -> dict[str, float]:
        """All fields as counters of a manifest."""
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
    """Accuracy in each order, and positional bias, from logit_A - logit_B [comparison], nats.

    `forward` has the chosen response in slot A, and `backward` has it in slot B. There must be at
    least one comparison.
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
    """Positional bias from `forward` = z_AB and `backward` = z_BA [pair], logit_A - logit_B, nats.

    There must be at least one pair. Take pairs of different prompts, because the prompt is the unit
    of the intervals. `seed` keys the bootstrap.
    """
    z_ab, z_ba = (np.asarray(z, dtype=np.float64) for z in (forward, backward))
    bias = (z_ab + z_ba) / 2
    return PositionalBias(
        mean=bootstrap_mean(bias, seed=seed),
        spread=float(bias.std()),
        flips=wilson(int((z_ab * z_ba > 0).sum()), len(bias)),
    )


def bias_advice(counters: Mapping[str, float], orders: str) -> str | None:
    """Return a warning that the slot decides too much, from the counters of `score`, or None.

    The slot decides too much in two cases: the positional bias varies more over pairs than rewards
    vary within a prompt, or the order decides more than a third of the verdicts. `orders` is
    `score.orders`. The warning names this setting if another value would help.
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
        "with a larger train_ranker.bias_penalty."
    )


def _bins(values: Sequence[float], hits: Floats, sure: Floats, most_bins: int) -> tuple[Bin, ...]:
    """Return bins that hold every comparison once.

    No bin mixes values below, at and above zero. Equal values share a bin.
    """
    bins = []
    for sign in (-1, 0, 1):
        order = sorted(
            (i for i, v in enumerate(values) if (v > 0) - (v < 0) == sign), key=lambda i: values[i]
        )
        num_bins = max(1, min(most_bins, len(order) // _LEAST_IN_A_BIN))
        sorted_values = [values[i] for i in order]
        # A bin begins at the first of equal values, so that no value is in two bins.
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
    """Return about the mean calibration error if the beliefs `sure` were true.

    The number of hits in a bin is taken as normal. Its mean |deviation| is then sqrt(2 / pi) times
    its standard deviation. `sure` [comparison] is sorted, as the bins are.
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
