"""Rewards to accepted candidates by statistical rejection sampling (algorithm 1)."""

import logging
from typing import NamedTuple

import numpy as np

from pipelines.reject import REJECT_COLUMNS, RejectShard, all_betas, in_nats
from pipelines.rewards import reward_column
from pipelines.tables import prompt_runs
from rso.aliases import Floats, Indices
from rso.diagnostics import (
    beta_for_effective_samples,
    curve,
    sampling_advice,
    spreads,
    wanted_effective_samples,
)
from stages.context import Context, Outcome

logger = logging.getLogger(__name__)

# The advised β is computed from the first shards that together have at least this many candidates,
# or from all shards. This takes half a second.
MOST_CANDIDATES = 2**18


def run(context: Context) -> Outcome:
    """Sample the optimal policy of eq. 4 from the candidates, and measure the effect of other β."""
    settings = context.config.reject
    found = _rewards(context)
    spread = float(np.median(found.spreads)) if len(found.spreads) else 0.0
    resolved = in_nats(settings, spread)
    function = RejectShard(resolved, context.config.seed)
    sums = context.map_groups(
        "reject", function, inputs=REJECT_COLUMNS, outputs=["accepted", "diagnostics"]
    )
    totals = dict(zip(all_betas(resolved), sums, strict=True))
    points = curve(totals)
    wanted = wanted_effective_samples(settings.num_samples)
    total = {
        **totals[resolved.beta],
        "beta_nats": resolved.beta,
        "reward_spread_median": spread,
        "beta_advised_nats": beta_for_effective_samples(found.rewards, found.sizes, wanted),
    }
    for sentence in sampling_advice(
        points,
        total,
        beta=settings.beta,
        beta_unit=settings.beta_unit,
        num_samples=settings.num_samples,
    ):
        logger.warning("%s", sentence)
    return Outcome(total, {"betas": points})


class _Rewards(NamedTuple):
    """The spread of every prompt, [prompt], nats; and the rewards of the first shards.

    `rewards` are [candidate], prompt after prompt, and `sizes` [prompt] count the candidates of
    each prompt. A hash of the prompt's id chooses its shard, so the first shards are a random part.
    """

    spreads: Floats
    rewards: Floats
    sizes: Indices


def _rewards(context: Context) -> _Rewards:
    found: list[Floats] = []
    rewards: list[Floats] = []
    sizes: list[Indices] = []
    for table in context.shards("rewards", REJECT_COLUMNS["rewards"]):
        values, (_, counts) = reward_column(table, "reject"), prompt_runs(table)
        found.append(spreads(values, counts))
        if sum(map(len, rewards)) < MOST_CANDIDATES:
            rewards.append(values)
            sizes.append(counts)
    return _Rewards(np.concatenate(found), np.concatenate(rewards), np.concatenate(sizes))
