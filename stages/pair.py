"""Samples to labelled preference pairs."""

from pipelines.pair import PAIR_COLUMNS, DirectPairShard, PairShard
from rso.aliases import Counters
from rso.config import Pair
from rso.errors import UserError
from stages.context import Context, Outcome
from stages.rankers import ranker_of_run


def run(context: Context) -> Outcome:
    """Pair accepted candidates or random decodes, or use the comparisons as pairs.

    Raises:
        UserError: no pairs were made; the message says why.
    """
    config = context.config
    if config.pair.source == "direct":
        counters = context.map(
            "pair",
            DirectPairShard(context.directory("reference"), config.pair, config.templates),
            inputs=["comparisons"],
            outputs=["pairs"],
        )
    else:
        counters = context.map(
            "pair",
            PairShard(ranker_of_run(context), config.pair, config.seed),
            inputs=PAIR_COLUMNS,
            outputs=["pairs"],
        )
    if not counters["pairs"]:
        raise UserError(_why_none(config.pair, counters))
    return Outcome(counters)


def _why_none(settings: Pair, counters: Counters) -> str:
    if settings.source == "direct":
        return (
            f"pair: no pairs were made of {counters['comparisons']:.0f} comparisons: "
            f"{counters['not_for_training']:.0f} are not of the training split and "
            f"{counters['identical']:.0f} have two equal sides at pair.max_response_tokens: "
            f"{settings.max_response_tokens}; give training comparisons, or raise that setting."
        )
    return (
        f"pair: no pairs were made of {counters['prompts']:.0f} prompts and "
        f"{counters['matches']:.0f} matches, of which {counters['identical']:.0f} were between "
        f"equal responses and {counters['near_ties']:.0f} closer than pair.min_margin: "
        f"{settings.min_margin:g}; lower that setting, or, as every prompt needs two distinct "
        "responses, raise decode.num_samples, reject.num_samples or the sampling temperature."
    )
