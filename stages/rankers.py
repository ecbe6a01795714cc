"""Which ranker a stage compares with: the trained one, or several combined (appendix A.9)."""

from pipelines.score import AnyRanker, RankerSource, WeightedSource
from rso.config import TRAINED
from rso.models import resolve_model
from rso.objectives import coefficients, objectives_of
from stages.context import Context


def objective_rankers(context: Context) -> dict[str, RankerSource]:
    """Return the ranker of each objective in the config, by the objective's name."""
    config = context.config
    return {
        objective.name: RankerSource(
            context.directory("ranker")
            if objective.ranker == TRAINED
            else resolve_model(objective.ranker).location,
            config.compute,
            config.templates,
        )
        for objective in objectives_of(config.objectives)
    }


def ranker_of_run(context: Context) -> AnyRanker:
    """Return the ranker that scored the candidates, with the weights and scales of `score`.

    If nothing was scored (`pair.source: direct`), it is the trained ranker.
    """
    if "objectives" not in context.inputs:
        config = context.config
        return RankerSource(context.directory("ranker"), config.compute, config.templates)
    rankers = objective_rankers(context)
    rows = {row["name"]: row for row in context.table("objectives").to_pylist()}
    scales = [rows[name]["scale"] for name in rankers]
    if len(rankers) == 1 and scales == [1.0]:
        return next(iter(rankers.values()))
    weights = [rows[name]["weight"] for name in rankers]
    return WeightedSource(list(rankers.values()), coefficients(weights, scales))
