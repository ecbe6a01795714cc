"""Log-probs of responses under a model, by the same code as in training."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from rso.prefix import PrefixRow, branch_logps, collate, plan_batches, split_row
from rso.progress import progress as Bar


def response_logps(
    model: PreTrainedModel,
    rows: Sequence[PrefixRow],
    *,
    token_budget: int,
    progress: Bar | None = None,
) -> list[list[float]]:
    """Return, for each row and branch, the log-prob of the branch given the prefix, in nats.

    A log-prob is untempered and summed over all ids of the branch, with end-of-sequence if the
    branch holds it. The caller puts the model in evaluation mode. `progress` counts branches. A row
    without branches gives an empty list.

    Raises:
        ValueError: a prefix or branch is empty; or, in a decoder-only model, a prefix with one
            branch is longer than the model's context or sliding attention window.
    """
    parts = [
        (index, part) for index, row in enumerate(rows) for part in split_row(row, token_budget)
    ]
    found: list[list[float]] = [[] for _ in parts]
    for chosen in plan_batches([part.num_tokens for _, part in parts], token_budget):
        batch = collate([parts[number][1] for number in chosen], device=model.device)
        with torch.inference_mode():
            logps = branch_logps(model, batch)
        for number, summed in zip(chosen, logps, strict=True):
            found[number] = summed.tolist()
        if progress is not None:
            progress.advance(batch.num_branches)
    result: list[list[float]] = [[] for _ in rows]
    for (index, _), values in zip(parts, found, strict=True):
        result[index] += values
    return result
