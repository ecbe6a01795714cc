"""Candidates to rewards: one or several rankers compare each with its prompt's baseline (eq. 7).

The stage also checks the ranker. Held-out comparisons show its accuracy and calibration. Pairs of a
baseline and a candidate, compared in both orders, show its positional bias.
"""

import logging
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.score import CANDIDATES, HELD_OUT, CombineShard, ScoreShard, scored_by
from pipelines.tables import table_of
from rso import seeds
from rso.aliases import Counters
from rso.calibration import bias_advice, judge, positional_bias
from rso.config import TRAINED
from rso.fingerprint import canonical_json
from rso.models import resolve_model
from rso.objectives import coefficients, objectives_of, pooled_scale
from rso.parquet import write_shard
from stages.context import Context, Curve, Outcome
from stages.rankers import objective_rankers

logger = logging.getLogger(__name__)

INPUTS = ("candidates", "prompts", "comparisons")
_OUTPUTS = ("rewards", "checks")
# With this many pairs, the standard error of the mean bias is below a tenth of its spread over
# pairs. With `orders: both` the pairs cost nothing. With `baseline-first` each costs one comparison
# for the second order. This is not a setting: every stage that asks the rankers sees the settings
# of `score`, so another number would run the training of the policy again.
MOST_FLIPPED = 128


def run(context: Context) -> Outcome:
    """Score every candidate by each objective, combine the rewards, and check the ranker.

    Raises:
        UserError: `objectives.standardise` is set, and an objective gives all candidates of a
            prompt the same reward, for every prompt.
    """
    config = context.config
    objectives = objectives_of(config.objectives)
    rankers = objective_rankers(context)
    flipped = _flipped(context)
    scales = dict.fromkeys(rankers, 1.0)
    shards = {
        name: ScoreShard(ranker, flipped, config.seed, config.score.orders, config.templates)
        for name, ranker in rankers.items()
    }
    if len(rankers) == 1 and not config.objectives.standardise:
        (shard,) = shards.values()
        counters = context.map("score", shard, inputs=INPUTS, outputs=_OUTPUTS)
    else:
        found = {
            name: context.map(
                f"score {name}",
                shard,
                inputs=INPUTS,
                outputs=_OUTPUTS,
                scratch_output=scored_by(name),
            )
            for name, shard in shards.items()
        }
        if config.objectives.standardise:
            scales = {
                name: pooled_scale(name, counters["reward_variance_sum"], counters["prompts"])
                for name, counters in found.items()
            }
        factors = coefficients([o.weight for o in objectives], [scales[o.name] for o in objectives])
        combined = context.map(
            "combine",
            CombineShard(dict(zip(rankers, factors, strict=True))),
            inputs={"candidates": ("prompt_id", "response_id")},
            scratch_inputs={
                f"{scored_by(name)}/{output}": output for name in rankers for output in _OUTPUTS
            },
            outputs=_OUTPUTS,
        )
        counters = _by_objective(found) | combined
    total = sum(objective.weight for objective in objectives)
    rows = [
        {
            "name": objective.name,
            "weight": objective.weight / total,
            "scale": scales[objective.name],
            "ranker": objective.ranker
            if objective.ranker == TRAINED
            else canonical_json(resolve_model(objective.ranker).identity),
        }
        for objective in sorted(objectives, key=lambda objective: objective.name)
    ]
    write_shard(context.work.output("objectives"), "objectives", 0, 1, table_of("objectives", rows))
    return _checked(context, counters)


def _flipped(context: Context) -> frozenset[str]:
    """Return the keyed random prompts for each of which one pair is checked in both orders."""
    prompt_ids = pc.unique(context.table("candidates", ["prompt_id"])["prompt_id"]).to_pylist()
    order = seeds.order(prompt_ids, "flipped", context.config.seed)
    return frozenset(prompt_ids[int(i)] for i in order[:MOST_FLIPPED])


def _checked(context: Context, counters: Counters) -> Outcome:
    """Return the counters with the figures of the ranker's checks, and its reliability curve.

    Without held-out comparisons, their number is 0 and their figures are left out. The same holds
    for flipped pairs.
    """
    checks = context.written("checks").sort_by("comparison_id")
    held_out = checks.filter(pc.field("origin") == HELD_OUT)
    pairs = checks.filter(pc.field("origin") == CANDIDATES)
    figures: dict[str, float] = {"held_out_comparisons": len(held_out), "flipped_pairs": len(pairs)}
    curves: dict[str, Curve] = {}
    if len(held_out):
        excess = _excess(context.table("comparisons", ["comparison_id", "chosen", "rejected"]))
        forward, backward = (held_out[name].to_numpy() for name in ("forward", "backward"))
        found = judge(
            (forward - backward) / 2, [excess[i] for i in held_out["comparison_id"].to_pylist()]
        )
        figures |= found.figures
        curves["reliability"] = [bin.figures for bin in found.by_margin]
    else:
        logger.warning(
            "score: no comparison is in the validation split, so nothing says how often the ranker "
            "is right; give some in the sources, or raise comparisons.num_validation_prompts."
        )
    if len(pairs):
        forward, backward = (pairs[name].to_numpy() for name in ("forward", "backward"))
        figures |= positional_bias(forward, backward, seed=context.config.seed).figures
    sentence = bias_advice(counters | figures, context.config.score.orders)
    if sentence is not None:
        logger.warning("%s", sentence)
    return Outcome(counters | figures, curves)


def _excess(comparisons: pa.Table) -> dict[str, int]:
    """Return how many more characters the chosen text of each comparison has than the rejected."""
    longer = pc.subtract(
        pc.utf8_length(comparisons["chosen"]), pc.utf8_length(comparisons["rejected"])
    )
    return dict(zip(comparisons["comparison_id"].to_pylist(), longer.to_pylist(), strict=True))


def _by_objective(found: Mapping[str, Counters]) -> Counters:
    """Return counters shared by all objectives once, and the others as `objective/name`."""
    shared = ("prompts", "responses", "scored_once_for_copies")
    first = next(iter(found.values()))
    return {name: first[name] for name in shared} | {
        f"{objective}/{name}": value
        for objective, counters in found.items()
        for name, value in counters.items()
        if name not in shared
    }
