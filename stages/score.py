"""Candidates to rewards by the ranker against each prompt's baseline (eq. 7)."""

from pipelines.score import RankerSource, ScoreShard
from stages.context import Context, Outcome


def run(context: Context) -> Outcome:
    """Score every candidate."""
    ranker = RankerSource(
        context.directory("ranker"), context.config.compute, context.config.templates
    )
    return Outcome(
        context.map(
            "score", ScoreShard(ranker), inputs=["candidates", "prompts"], outputs=["rewards"]
        )
    )
