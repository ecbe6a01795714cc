"""Rewards to accepted candidates by statistical rejection sampling (algorithm 1)."""

from pipelines.reject import COLUMNS, RejectShard
from stages.context import Context, Outcome


def run(context: Context) -> Outcome:
    """Sample the optimal policy of eq. 4 from the candidates."""
    function = RejectShard(context.config.reject, context.config.seed)
    return Outcome(context.map("reject", function, inputs=COLUMNS, outputs=["accepted"]))
