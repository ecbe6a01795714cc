"""How sure a figure is: intervals and tests over prompts, which are drawn independently."""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rso import seeds
from rso.aliases import Floats

Values = Sequence[float] | npt.NDArray[np.floating]


class Interval(NamedTuple):
    """An estimate over n prompts with its confidence interval."""

    value: float
    low: float
    high: float
    n: int


def wilson(successes: float, n: int, *, level: float = 0.95) -> Interval:
    """The share of successes in `n` trials, with Wilson's score interval (1927).

    `successes` may count ties as halves. The interval is then wide rather than narrow, because
    values in [0, 1] with mean m vary at most as much as a coin with probability m.

    Raises:
        ValueError: there are no trials, or `successes` is not in [0, n].
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(
            f"wilson: {successes} successes of {n}, expected at least one trial and 0 to n"
            " successes: leave out the figure when nothing was judged"
        )
    share = successes / n
    z_squared = NormalDist().inv_cdf((1 + level) / 2) ** 2
    centre = (share + z_squared / (2 * n)) / (1 + z_squared / n)
    spread = share * (1 - share) / n + z_squared / (4 * n**2)
    half_width = math.sqrt(z_squared * spread) / (1 + z_squared / n)
    # With 0 or n successes an end is exactly 0 or 1. Rounding would miss it.
    low = 0.0 if successes == 0 else centre - half_width
    high = 1.0 if successes == n else centre + half_width
    return Interval(share, low, high, n)


def win_rate(verdicts: Values, *, level: float = 0.95) -> Interval:
    """Mean of `verdicts` [prompt] (win 1, tie 0.5, loss 0) with Wilson's score interval.

    Unlike a bootstrap, this interval needs no seed and holds at 0 and 1. With ties it is too wide
    rather than too narrow.

    Raises:
        ValueError: there is no verdict, or one is not 0, 0.5 or 1.
    """
    values = np.asarray(verdicts, dtype=np.float64)
    wrong = values[~np.isin(values, (0.0, 0.5, 1.0))]
    if wrong.size:
        raise ValueError(
            f"win_rate: a verdict is {wrong[0]}, expected 1 (win), 0.5 (tie) or 0 (loss):"
            " decide each prompt before counting"
        )
    return wilson(float(values.sum()), len(values), level=level)


def bootstrap_mean(
    values: Values, *, seed: int, level: float = 0.95, resamples: int = 2000
) -> Interval:
    """Mean of `values` [prompt] with a percentile bootstrap interval (Efron 1979).

    `seed` keys the draws. With fewer than about 30 prompts these intervals are too narrow.

    Raises:
        ValueError: there are no values.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.size == 0:
        raise ValueError(
            "bootstrap_mean: no values, expected at least one prompt: leave out the figure"
        )
    draws = seeds.generator("bootstrap", seed)
    # One resample at a time, so that memory holds only one.
    means = [sample[draws.integers(sample.size, size=sample.size)].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(sample.mean()), float(low), float(high), sample.size)


def paired_bootstrap_difference(
    values: Values, baseline: Values, *, seed: int, level: float = 0.95, resamples: int = 2000
) -> Interval:
    """Mean of values - baseline with its bootstrap interval; positive where `values` are larger.

    Both are [prompt], for the same prompts in the same order. So the difficulty of a prompt
    cancels.

    Raises:
        ValueError: the numbers of values differ, or there are none.
    """
    differences = _differences("paired_bootstrap_difference", values, baseline)
    return bootstrap_mean(differences, seed=seed, level=level, resamples=resamples)


def sign_test(values: Values, baseline: Values) -> float:
    """Two-sided p-value of the exact sign test of "neither system leads"; ties are left out.

    Both are [prompt], for the same prompts in the same order. The p-value is 1 if all are ties.

    Raises:
        ValueError: the numbers of values differ.
    """
    differences = _differences("sign_test", values, baseline)
    num_wins = int(np.count_nonzero(differences > 0))
    num_decided = int(np.count_nonzero(differences))
    tail = range(min(num_wins, num_decided - num_wins) + 1)
    # Logarithms, because binomial coefficients overflow floats from about a thousand prompts.
    return min(1.0, 2 * math.fsum(math.exp(_log_fair_binomial(num_decided, k)) for k in tail))


def _differences(where: str, values: Values, baseline: Values) -> Floats:
    ours = np.asarray(values, dtype=np.float64)
    theirs = np.asarray(baseline, dtype=np.float64)
    if ours.shape != theirs.shape:
        raise ValueError(
            f"{where}: {len(ours)} values against {len(theirs)}, expected one of each per prompt:"
            " join both on prompt_id first"
        )
    return ours - theirs


def _log_fair_binomial(n: int, k: int) -> float:
    log_ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return log_ways - n * math.log(2)
