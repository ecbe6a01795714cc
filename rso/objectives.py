"""Rewards of several rankers as one (appendix A.9): a weighted mean, each standardised or not.

Rejection sampling and labels use differences within a prompt alone, so standardising divides by a
spread within prompts and subtracts nothing: rewards stay relative to the baseline (eq. 7). It is
one spread an objective and not one a prompt, which would blow up the noise of a ranker in prompts
whose candidates it hardly tells apart.
"""

import math
from collections.abc import Sequence

import numpy as np

from rso.aliases import Float32s
from rso.config import Objective, Score
from rso.errors import UserError


def objectives_of(settings: Score) -> tuple[Objective, ...]:
    """Return the objectives in the settings, or the trained ranker as the only one."""
    return settings.objectives or (Objective(name="ranker"),)


def coefficients(weights: Sequence[float], scales: Sequence[float]) -> list[float]:
    """Return what each objective is multiplied with: its share of the weights over its scale."""
    total = math.fsum(weights)
    return [weight / total / scale for weight, scale in zip(weights, scales, strict=True)]


def weighted_sum(values: Sequence[Float32s], factors: Sequence[float]) -> Float32s:
    """Return the sum over objectives of factor times values [n], taken in float64: [n]."""
    products = [f * value.astype(np.float64) for f, value in zip(factors, values, strict=True)]
    return np.asarray(np.sum(products, axis=0), dtype=np.float32)


def pooled_scale(name: str, variance_sum: float, num_prompts: float) -> float:
    """Return the root of the mean variance of rewards within a prompt, nats.

    Raises:
        UserError: it is 0, as the objective tells no candidates apart.
    """
    scale = math.sqrt(variance_sum / num_prompts) if num_prompts else 0.0
    if scale == 0:
        raise UserError(
            f"score.standardise: objective {name!r} gives all candidates of a prompt the same "
            f"reward, in each of {num_prompts:.0f} prompts, so it has no spread to divide by; "
            "remove it from score.objectives, or look at its ranker."
        )
    return scale
