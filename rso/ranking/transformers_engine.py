"""The ranker in this process, causal or T5: shared-prefix rows, two logits per comparison."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rso import models
from rso.aliases import Float32s
from rso.out_of_memory import BatchSize
from rso.prefix import PrefixRow, collate, last_logits, plan_batches, split_row
from rso.progress import progress as Bar
from rso.ranking import RowRanker
from rso.templates import RankerEncoder


class TransformersRanker(RowRanker):
    """A `Ranker` over a loaded model.

    A causal model computes the prefix of a row once for all its branches. A row that is longer than
    `token_budget` is split, and each part computes the prefix again.
    """

    def __init__(
        self, model: PreTrainedModel, encoder: RankerEncoder, *, token_budget: int = 4096
    ) -> None:
        super().__init__(encoder, models.context_length(model.config))
        self._model = model
        self._token_budget = BatchSize(
            token_budget,
            "tokens",
            what="ranker",
            advice="lower templates.max_context_tokens, or use a device with more memory",
        )

    def label_logits(self, rows: Sequence[PrefixRow], progress: Bar | None) -> list[Float32s]:
        """Return logit_A - logit_B after each branch: [branches] for each row, in the given order.

        `progress` advances by one per branch.
        """
        most = sum(row.num_tokens for row in rows)
        return self._token_budget.attempt(lambda budget: self._within(budget, rows, progress), most)

    def _within(
        self, token_budget: int, rows: Sequence[PrefixRow], progress: Bar | None
    ) -> list[Float32s]:
        parts = [
            (index, part) for index, row in enumerate(rows) for part in split_row(row, token_budget)
        ]
        computed: list[tuple[list[int], list[int], Tensor]] = []
        for chosen in plan_batches([part.num_tokens for _, part in parts], token_budget):
            batch = collate([parts[number][1] for number in chosen], device=self._model.device)
            with torch.inference_mode():
                logits = last_logits(self._model, batch, self._encoder.labels)
            sizes = [len(spans) for spans in batch.layout.branches]
            # The result stays on the GPU, which computes while the next batch is prepared.
            computed.append((chosen, sizes, logits[:, 0] - logits[:, 1]))
            if progress is not None:
                progress.advance(batch.num_branches)
        found: list[Float32s] = [np.empty(0, np.float32)] * len(parts)
        for chosen, sizes, differences in computed:
            of_parts = np.split(differences.cpu().numpy(), np.cumsum(sizes)[:-1])
            for number, values in zip(chosen, of_parts, strict=True):
                found[number] = values
        pieces: list[list[Float32s]] = [[np.empty(0, np.float32)] for _ in rows]
        for (index, _), values in zip(parts, found, strict=True):
            pieces[index].append(values)
        return [np.concatenate(piece) for piece in pieces]
