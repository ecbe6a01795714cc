"""Comparisons to a pairwise ranker; run once more, on other prompts, for the gold ranker."""

from rso import seeds
from rso.config import TrainRanker
from rso.errors import UserError
from rso.training.ranker import HeldOut, LabelledComparison, train_ranker
from stages.context import Context, Outcome

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
        **(_held_out(result.held_out) if result.held_out is not None else {}),
    }
    return Outcome(counters, {context.stage: result.training.curve})


def fold(prompt_id: str, num_folds: int) -> int:
    """Return the fold in [0, num_folds) of a prompt, independent of its shard."""
    return seeds.key("fold", prompt_id) % num_folds


def _is_ours(prompt_id: str, settings: TrainRanker) -> bool:
    return fold(prompt_id, settings.num_folds) in settings.folds


def _held_out(held_out: HeldOut) -> dict[str, float]:
    intervals = {
        "accuracy": held_out.accuracy,
        "accuracy_of_longer": held_out.longer,
        "accuracy_where_chosen_is_longer": held_out.chosen_longer,
        "accuracy_where_chosen_is_shorter": held_out.chosen_shorter,
    }
    return {
        "held_out_comparisons": held_out.accuracy.n,
        "held_out_loss": held_out.mean_loss,
        "accuracy_low": held_out.accuracy.low,
        "accuracy_high": held_out.accuracy.high,
        **{name: interval.value for name, interval in intervals.items() if interval is not None},
    }
