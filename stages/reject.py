"""Rewards to accepted candidates by statistical rejection sampling (algorithm 1)."""

import logging

from pipelines.reject import COLUMNS, RejectShard, counter
from rso.diagnostics import advice, curve
from stages.context import Context, Outcome

logger = logging.getLogger(__name__)


def run(context: Context) -> Outcome:
    """Sample the optimal policy of eq. 4 from the candidates, and see what other β would do."""
    settings = context.config.reject
    function = RejectShard(settings, context.config.seed)
    counters = context.map("reject", function, inputs=COLUMNS, outputs=["accepted", "diagnostics"])
    totals = {
        beta: {
            name.removeprefix(prefix): count
            for name, count in counters.items()
            if name.startswith(prefix)
        }
        for beta in settings.all_betas
        for prefix in [counter(beta, "")]
    }
    points = curve(totals)
    for sentence in advice(points, totals[settings.beta], settings.beta):
        logger.warning("%s", sentence)
    return Outcome(totals[settings.beta], {"betas": points})
