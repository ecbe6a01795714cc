"""Pairs to the reference policy's log-probabilities of their responses."""

from pipelines.logps import LogpsShard, PolicySource
from stages.context import Context, Outcome


def run(context: Context) -> Outcome:
    """Compute the log-probability of each distinct response in the pairs once."""
    policy = PolicySource(
        context.directory("reference"), context.config.compute, context.config.templates
    )
    return Outcome(context.map("logps", LogpsShard(policy), inputs=["pairs"], outputs=["logps"]))
