"""Comparisons to a pairwise ranker. The gold ranker is trained the same way on other prompts."""

import logging

from rso import seeds
from rso.config import TrainRanker
from rso.errors import UserError
from rso.length_bias import length_advice
from rso.training.ranker import LabelledComparison, train_ranker
from stages.context import Context, Outcome

logger = logging.getLogger(__name__)

FIELDS = LabelledComparison._fields


def run(context: Context) -> Outcome:
    """Train on the comparisons of this ranker's prompt folds, and judge on validation comparisons.

    Raises:
        UserError: these folds have no training comparisons, or the settings do not fit the model.
    """
    config = context.config
    settings: TrainRanker = getattr(config, context.stage)
    comparisons = [
        LabelledComparison(**{name: row[name] for name in FIELDS})
        for row in context.table("comparisons").to_pylist()
        if row["split"] == "validation" or _is_ours(row["prompt_id"], settings)
    ]
    if not any(comparison.split == "train" for comparison in comparisons):
        raise UserError(
            f"{context.stage}: no training comparisons in folds {list(settings.folds)} of "
            f"{settings.num_folds}; give a source of kind comparisons, set comparisons.labeller, "
            f"or change {context.stage}.folds."
        )
    result = train_ranker(
        context.model(settings.init_from),
        comparisons,
        settings,
        config.compute,
        config.templates,
        seed=config.seed,
        work_directory=context.work.scratch,
        output_directory=context.work.output("ranker"),
        what=context.stage,
    )
    counters = {
        "steps": result.training.num_steps,
        "tokens": result.training.num_tokens,
        "contexts_cut": result.num_truncated,
        "selected_step": result.selected_step,
        **(result.held_out.figures if result.held_out is not None else {}),
        **(result.each_order.figures if result.each_order is not None else {}),
    }
    curves = {context.stage: result.training.curve}
    if result.evaluations:
        curves[f"{context.stage}_evaluations"] = [dict(e) for e in result.evaluations]
    if result.held_out is not None:
        curves[f"{context.stage}_by_margin"] = [bin.figures for bin in result.held_out.by_margin]
        curves[f"{context.stage}_by_length"] = [bin.figures for bin in result.held_out.by_length]
    sentence = length_advice(context.stage, counters)
    if sentence is not None:
        logger.warning("%s", sentence)
    return Outcome(counters, curves)


def fold(prompt_id: str, num_folds: int) -> int:
    """Return the fold of a prompt, from 0 to num_folds - 1; it depends on the prompt's id only."""
    return seeds.key("fold", prompt_id) % num_folds


def _is_ours(prompt_id: str, settings: TrainRanker) -> bool:
    return fold(prompt_id, settings.num_folds) in settings.folds
