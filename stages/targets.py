"""Rewards to new fine-tuning targets (RAFT, ReST)."""

import math

from pipelines.rewards import reward_column
from pipelines.targets import TARGET_COLUMNS, TargetShard
from rso.errors import UserError
from rso.targets import Bounds
from stages.context import Context, Outcome


def run(context: Context) -> Outcome:
    """Make demonstrations of the candidates with high rewards.

    Raises:
        UserError: no candidate became a target.
    """
    settings = context.config.targets
    is_global = settings.method == "rest" and settings.normalise == "dataset"
    bounds = _bounds(context) if is_global else None
    counters = context.map(
        "targets",
        TargetShard(settings, context.config.templates.response_prefix, bounds),
        inputs=TARGET_COLUMNS,
        outputs=["demonstrations"],
    )
    if not counters["targets"]:
        raise UserError(
            f"targets: none of {counters['prompts']:.0f} prompts with "
            f"{counters['candidates']:.0f} candidates has a target; targets.method: rest needs "
            "candidates of one prompt with different rewards, and with targets.normalise: dataset "
            f"some above targets.threshold: {settings.threshold:g}; raise decode.num_samples or "
            "the sampling temperature, or lower the threshold."
        )
    if bounds is not None:
        counters |= {"lowest_reward": bounds.low, "highest_reward": bounds.high}
    return Outcome(counters)


def _bounds(context: Context) -> Bounds:
    """Return the lowest and the highest reward of all shards; a shard knows only its own."""
    low, high = math.inf, -math.inf
    for table in context.shards("rewards", TARGET_COLUMNS["rewards"]):
        rewards = reward_column(table, "targets")
        low = float(rewards.min(initial=low))
        high = float(rewards.max(initial=high))
    return Bounds(low, high)
