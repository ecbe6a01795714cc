"""Which prompts a stage works on."""

from rso import seeds
from rso.errors import UserError
from stages.context import Context


def choose_prompts(
    context: Context, split: str, count: int | None, *, from_end: bool = False
) -> list[str]:
    """Return the sorted ids of `count` prompts of a split, or of all prompts if `count` is None.

    The seed puts the prompts of the split in a fixed order, and the first `count` are chosen. So a
    larger count gives a superset. `from_end` chooses from the other end of this order: both choices
    are disjoint if the split has enough prompts.

    Raises:
        UserError: the split is empty.
    """
    prompts = context.table("prompts", ["prompt_id", "split"])
    ids = [
        prompt_id
        for prompt_id, where in zip(
            prompts["prompt_id"].to_pylist(), prompts["split"].to_pylist(), strict=True
        )
        if where == split
    ]
    if not ids:
        raise UserError(
            f"{context.stage}: the {split} split holds no prompts, expected at least one; "
            "raise the share in prepare.split or give more data."
        )
    order = seeds.order(ids, "choose", context.config.seed, split)
    return sorted(ids[int(i)] for i in (order[::-1] if from_end else order)[:count])
