"""Comparisons to a pairwise ranker; run once more, on other prompts, for the gold ranker."""

import logging

from rso import seeds
from rso.config import TrainRanker
from rso.errors import UserError
from rso.length_bias import advice
from rso.training.ranker import Bin, HeldOut, LabelledComparison, train_ranker
from stages.context import Context, Outcome

logger = logging.getLogger(__name__)

FIELDS = LabelledComparison._fields


def run(context: Context) -> Outcome:
    """Train on the comparisons of this ranker's prompt folds; accuracy on validation prompts."""
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
        **(_held_out(result.held_out) if result.held_out is not None else {}),
    }
    curves = {context.stage: result.training.curve}
    if result.evaluations:
        curves[f"{context.stage}_evaluations"] = [dict(e) for e in result.evaluations]
    if result.held_out is not None:
        curves[f"{context.stage}_by_margin"] = [_row(bin) for bin in result.held_out.by_margin]
        curves[f"{context.stage}_by_length"] = [_row(bin) for bin in result.held_out.by_length]
    sentence = advice(context.stage, counters)
    if sentence is not None:
        logger.warning("%s", sentence)
    return Outcome(counters, curves)


def fold(prompt_id: str, num_folds: int) -> int:
    """Return the fold in [0, num_folds) of a prompt, independent of its shard."""
    return seeds.key("fold", prompt_id) % num_folds


def _is_ours(prompt_id: str, settings: TrainRanker) -> bool:
    return fold(prompt_id, settings.num_folds) in settings.folds


def _row(found: Bin) -> dict[str, float]:
    return {
        "low": found.low,
        "high": found.high,
        "comparisons": found.accuracy.n,
        "accuracy": found.accuracy.value,
        "accuracy_low": found.accuracy.low,
        "accuracy_high": found.accuracy.high,
        "probability": found.probability,
    }


def _held_out(held_out: HeldOut) -> dict[str, float]:
    intervals = {
        "accuracy": held_out.accuracy,
        "accuracy_of_longer": held_out.longer,
        "accuracy_where_chosen_is_longer": held_out.chosen_longer,
        "accuracy_where_chosen_is_shorter": held_out.chosen_shorter,
    }
    edges = {
        f"{name}_{edge}": getattr(interval, edge)
        for name, interval in intervals.items()
        for edge in ("low", "high")
        if interval is not None
    }
    return {
        "held_out_comparisons": held_out.accuracy.n,
        "held_out_loss": held_out.mean_loss,
        **edges,
        **{name: interval.value for name, interval in intervals.items() if interval is not None},
    }
