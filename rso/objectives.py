"""Rewards of several rankers as one (appendix A.9): their weighted mean, standardised or not.

Rejection sampling and labels use only differences within a prompt. So standardising divides by the
spread within prompts and subtracts nothing: rewards stay relative to the baseline (eq. 7). There is
one spread per objective. One spread per prompt would blow up a ranker's noise on prompts whose
candidates the ranker hardly tells apart.
"""

import math
from collections.abc import Sequence

import numpy as np

from rso.aliases import Float32s
from rso.config import Objective, Objectives
from rso.errors import UserError


def objectives_of(settings: Objectives) -> tuple[Objective, ...]:
    """Return the objectives in the settings, or the trained ranker as the only one."""
    return settings.rankers or (Objective(name="ranker"),)


def coefficients(weights: Sequence[float], scales: Sequence[float]) -> list[float]:
    """Return the factor of each objective: its share of all weights, divided by its scale."""
    total = math.fsum(weights)
    return [weight / total / scale for weight, scale in zip(weights, scales, strict=True)]


def weighted_sum(values: Sequence[Float32s], factors: Sequence[float]) -> Float32s:
    """Return the sum [n] over objectives of factor times values [n], computed in float64."""
    products = [f * value.astype(np.float64) for f, value in zip(factors, values, strict=True)]
    return np.asarray(np.sum(products, axis=0), dtype=np.float32)


def pooled_scale(name: str, variance_sum: float, num_prompts: float) -> float:
    """Return the spread of the rewards of an objective within prompts, nats; it is above 0.

    This is the square root of the mean over prompts of the variance of a prompt's rewards.
    `variance_sum` is the sum of these variances. `name` is the objective, for the error.

    Raises:
        UserError: the spread is 0, because the objective tells no candidates apart.
    """
    scale = math.sqrt(variance_sum / num_prompts) if num_prompts else 0.0
    if scale == 0:
        raise UserError(
            f"objectives.standardise: objective {name!r} gives all candidates of a prompt the same "
            f"reward, in each of {num_prompts:.0f} prompts, so it has no spread to divide by; "
            "remove it from objectives.rankers, or look at its ranker."
        )
    return scale
