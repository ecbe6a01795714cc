"""Candidates to rewards by the ranker, or several, against each prompt's baseline (eq. 7)."""

from collections.abc import Mapping

from pipelines.score import CombineShard, ScoreShard, scored_by
from pipelines.shards import Counters
from pipelines.tables import table_of
from rso.config import TRAINED
from rso.fingerprint import canonical_json
from rso.models import resolve
from rso.objectives import coefficients, pooled_scale
from rso.parquet import write_shard
from stages.context import Context, Outcome
from stages.rankers import objective_rankers

INPUTS = ("candidates", "prompts")


def run(context: Context) -> Outcome:
    """Score every candidate by each objective, and combine them."""
    objectives = context.config.score.rankers
    rankers = objective_rankers(context)
    scales = dict.fromkeys(rankers, 1.0)
    if len(rankers) == 1 and not context.config.score.standardise:
        (ranker,) = rankers.values()
        counters = context.map("score", ScoreShard(ranker), inputs=INPUTS, outputs=["rewards"])
    else:
        found = {
            name: context.map(
                f"score {name}",
                ScoreShard(ranker),
                inputs=INPUTS,
                outputs=["rewards"],
                scratch_output=scored_by(name),
            )
            for name, ranker in rankers.items()
        }
        if context.config.score.standardise:
            scales = {
                name: pooled_scale(name, counters["reward_variance_sum"], counters["prompts"])
                for name, counters in found.items()
            }
        factors = coefficients([o.weight for o in objectives], [scales[o.name] for o in objectives])
        context.map(
            "combine",
            CombineShard(dict(zip(rankers, factors, strict=True))),
            inputs={"candidates": ("prompt_id", "response_id")},
            scratch_inputs={scored_by(name): "rewards" for name in rankers},
            outputs=["rewards"],
        )
        counters = _by_objective(found)
    total = sum(objective.weight for objective in objectives)
    rows = [
        {
            "name": objective.name,
            "weight": objective.weight / total,
            "scale": scales[objective.name],
            "ranker": objective.ranker
            if objective.ranker == TRAINED
            else canonical_json(resolve(objective.ranker).identity),
        }
        for objective in sorted(objectives, key=lambda objective: objective.name)
    ]
    write_shard(context.work.output("objectives"), "objectives", 0, 1, table_of("objectives", rows))
    return Outcome(counters)


def _by_objective(found: Mapping[str, Counters]) -> Counters:
    """Return the counters that are the same for all objectives once, the others by name."""
    shared = ("prompts", "responses", "scored_once_for_copies")
    first = next(iter(found.values()))
    return {name: first[name] for name in shared} | {
        f"{objective}/{name}": value
        for objective, counters in found.items()
        for name, value in counters.items()
        if name not in shared
    }
