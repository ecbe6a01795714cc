"""Samples to labelled preference pairs."""

from pipelines.pair import DirectPairShard, PairShard
from pipelines.score import RankerSource
from rso.errors import UserError
from stages.context import Context, Outcome


def run(context: Context) -> Outcome:
    """Pair accepted candidates, random decodes, or take the comparisons as they are."""
    config = context.config
    if config.pair.source == "direct":
        counters = context.map(
            "pair",
            DirectPairShard(context.directory("reference"), config.templates),
            inputs=["comparisons"],
            outputs=["pairs"],
        )
    else:
        ranker = RankerSource(context.directory("ranker"), config.compute, config.templates)
        counters = context.map(
            "pair",
            PairShard(ranker, config.pair, config.seed),
            inputs=["candidates", "accepted", "prompts"],
            outputs=["pairs"],
        )
    if not counters["pairs"]:
        raise UserError(
            "pair: no pairs were made; every prompt needs two distinct responses: raise "
            "decode.num_samples, reject.num_samples or the sampling temperature."
        )
    return Outcome(counters)
