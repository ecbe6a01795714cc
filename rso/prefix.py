"""Shared-prefix rows: one prompt and its responses in one sequence.

A row is `prefix + branch + branch + …`. Every branch attends to the prefix and to itself, with
position ids that go on from the prefix, so each branch is computed as if it followed the prefix
alone, and the prefix is computed once. How encoder-decoder models compute the same is in
`encoder_decoder`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

# Elements of the largest block of logits in memory: 64 MiB in fp32.
LOGITS_BLOCK = 1 << 24


@dataclass(frozen=True)
class Row:
    """Token ids of one prompt and of its branches."""

    prefix: list[int]
    branches: list[list[int]]

    @property
    def num_tokens(self) -> int:
        """Tokens of the row, without padding."""
        return len(self.prefix) + sum(map(len, self.branches))


@dataclass(frozen=True)
class Batch:
    """Rows padded to one length `L`.

    `input_ids` and `position_ids` are int64 [B, L]; `attention_mask` is bool [B, 1, L, L], true
    where a query (third axis) attends to a key. `spans[row][branch]` is the (start, end) of a
    branch within its row, and `prefix_lengths[row]` the end of the row's prefix.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    prefix_lengths: list[int]
    spans: list[list[tuple[int, int]]]

    @property
    def num_branches(self) -> int:
        """Branches of all rows."""
        return sum(map(len, self.spans))

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest prefix with one branch: what the model sees as one sequence."""
        return max(
            prefix + end - start
            for prefix, spans in zip(self.prefix_lengths, self.spans, strict=True)
            for start, end in spans
        )


def collate(rows: Sequence[Row], *, pad_id: int = 0, device: torch.device | str = "cpu") -> Batch:
    """Return `rows` as one batch on `device`; no branch sees padding, so any `pad_id` will do.

    Raises:
        ValueError: a row has an empty prefix, no branch, or an empty branch.
    """
    length = max(row.num_tokens for row in rows)
    ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    positions = torch.zeros((len(rows), length), dtype=torch.int64)
    # Segment 0 is the prefix, k the k-th branch, -1 padding.
    segments = torch.full((len(rows), length), -1, dtype=torch.int64)
    spans = [_spans(index, row) for index, row in enumerate(rows)]
    for index, row in enumerate(rows):
        size = len(row.prefix)
        ids[index, : row.num_tokens] = torch.tensor(
            [*row.prefix, *(token for branch in row.branches for token in branch)]
        )
        positions[index, :size] = torch.arange(size)
        segments[index, :size] = 0
        for number, (start, end) in enumerate(spans[index], 1):
            positions[index, start:end] = torch.arange(size, size + end - start)
            segments[index, start:end] = number
    return Batch(
        ids.to(device),
        positions.to(device),
        _mask(segments.to(device)),
        [len(row.prefix) for row in rows],
        spans,
    )


def plan_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Return batches of indices, longest first, whose padded tokens stay within the budget.

    A row longer than the budget is a batch of its own. Every index occurs once; equal lengths keep
    their order.
    """
    batches: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if room < 1:
            batches.append([])
            room = max(1, token_budget // max(1, lengths[index]))
        batches[-1].append(index)
        room -= 1
    return batches


def split_row(row: Row, max_tokens: int) -> list[Row]:
    """Return rows with the same prefix and all branches in order, each row within `max_tokens`.

    A branch that does not fit beside the prefix gets a row of its own.
    """
    rows: list[Row] = []
    for branch in row.branches:
        if rows and rows[-1].num_tokens + len(branch) <= max_tokens:
            rows[-1].branches.append(branch)
        else:
            rows.append(Row(row.prefix, [branch]))
    return rows


def hidden_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return a decoder-only model's last hidden states [B, L, H] in its dtype, without any logits.

    Raises:
        ValueError: a sequence is longer than the model's context or sliding attention window.
    """
    _check_length(model, batch.longest_sequence)
    mask = batch.attention_mask
    if model.config._attn_implementation != "sdpa":
        # Only sdpa reads a boolean mask; eager attention would add it to the scores.
        mask = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill(
            ~mask, torch.finfo(model.dtype).min
        )
    output = _decoder(model)(
        input_ids=batch.input_ids,
        attention_mask=mask,
        position_ids=batch.position_ids,
        use_cache=False,
    )
    hidden: Tensor = output.last_hidden_state
    return hidden


def branch_token_logps(model: PreTrainedModel, batch: Batch) -> list[list[Tensor]]:
    """Return, for each row and branch, the log-probs of its tokens: fp32 [tokens], nats.

    The first token is predicted at the last position of the prefix, or, with an encoder, at the
    decoder's start token. Differentiable; logits exist only at positions that predict a branch
    token, a block at a time.
    """
    device = batch.input_ids.device
    row_index: list[int] = []
    source: list[int] = []
    target: list[int] = []
    sizes: list[int] = []
    for row, (prefix, spans) in enumerate(zip(batch.prefix_lengths, batch.spans, strict=True)):
        for start, end in spans:
            row_index += [row] * (end - start)
            source += [prefix - 1, *range(start, end - 1)]
            target += range(start, end)
            sizes.append(end - start)
    rows = torch.tensor(row_index, device=device)
    if model.config.is_encoder_decoder:
        from rso import encoder_decoder

        picked = encoder_decoder.response_states(model, batch)
    else:
        picked = hidden_states(model, batch)[rows, torch.tensor(source, device=device)]
    tokens = batch.input_ids[rows, torch.tensor(target, device=device)]
    flat = iter(torch.split(_target_logps(model, picked, tokens), sizes))
    return [[next(flat) for _ in spans] for spans in batch.spans]


def branch_logps(model: PreTrainedModel, batch: Batch) -> list[Tensor]:
    """Return, for each row, the summed log-probs of its branches: fp32 [branches], nats."""
    return [
        torch.stack([token_logps.sum() for token_logps in row])
        for row in branch_token_logps(model, batch)
    ]


def last_logits(model: PreTrainedModel, batch: Batch, token_ids: Sequence[int]) -> Tensor:
    """Return fp32 [branches, tokens]: logits of `token_ids` after the last token of each branch.

    With an encoder, which reads prefix and branch, they are those of the decoder's first token.
    Branches come in order, row by row. Only these tokens are projected, in fp32: the difference of
    two bf16 logits would be a multiple of 0.06 or more. Differentiable.
    """
    device = batch.input_ids.device
    if model.config.is_encoder_decoder:
        from rso import encoder_decoder

        picked = encoder_decoder.label_states(model, batch)
    else:
        rows = [row for row, spans in enumerate(batch.spans) for _ in spans]
        ends = [end - 1 for spans in batch.spans for _, end in spans]
        picked = hidden_states(model, batch)[
            torch.tensor(rows, device=device), torch.tensor(ends, device=device)
        ]
    head = _head(model)
    index = torch.tensor(list(token_ids), device=device)
    logits = picked.float() @ head.weight[index].float().T
    if getattr(head, "bias", None) is not None:
        logits = logits + head.bias[index].float()
    return _final_logits(model, logits)


def _spans(index: int, row: Row) -> list[tuple[int, int]]:
    if not row.prefix:
        raise ValueError(f"row {index}: the prefix is empty; a prompt has at least one token.")
    if not row.branches:
        raise ValueError(f"row {index}: no branches; a row has at least one response.")
    spans = []
    start = len(row.prefix)
    for number, branch in enumerate(row.branches):
        if not branch:
            raise ValueError(
                f"row {index}, branch {number}: the response has no tokens; a response has at "
                "least its end-of-sequence token."
            )
        spans.append((start, start + len(branch)))
        start += len(branch)
    return spans


def _mask(segments: Tensor) -> Tensor:
    """Return bool [B, 1, L, L] from segment numbers [B, L]."""
    length = segments.shape[1]
    query, key = segments[:, :, None], segments[:, None, :]
    earlier = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    # Padding (-1) is its own segment: it attends to padding before it and to itself, so that no
    # row of the mask is empty, which would give NaN.
    mask = ((key == query) | ((key == 0) & (query > 0))) & earlier
    return mask[:, None]


def _decoder(model: Any) -> Any:
    return model.get_decoder()


def _head(model: Any) -> Any:
    return model.get_output_embeddings()


def _check_length(model: PreTrainedModel, longest: int) -> None:
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and longest > context:
        raise ValueError(
            f"a sequence of {longest} tokens is longer than the model's context of {context}; "
            "shorten prompts or responses, or choose a model with a longer context."
        )
    window = getattr(model.config, "sliding_window", None)
    if window is not None and longest > window:
        raise ValueError(
            f"a sequence of {longest} tokens is longer than the model's sliding attention window "
            f"of {window}, which rows with a shared prefix do not follow; shorten prompts or "
            "responses, or choose a model with full attention."
        )


def _target_logps(model: PreTrainedModel, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Return fp32 [N]: log-probs of `tokens` [N] predicted from `hidden` [N, H]."""
    head = _head(model)
    size = max(1, LOGITS_BLOCK // model.config.vocab_size)

    def block(part: Tensor, chosen: Tensor) -> Tensor:
        logits = _final_logits(model, head(part).float())
        return logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(1)

    parts = list(_apply_blocks(block, hidden, tokens, size))
    return torch.cat(parts)


def _apply_blocks(
    block: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, tokens: Tensor, size: int
) -> Iterator[Tensor]:
    for part, chosen in zip(torch.split(hidden, size), torch.split(tokens, size), strict=True):
        if torch.is_grad_enabled():
            # Recomputed in the backward pass, or every block of logits would be kept for it.
            yield checkpoint(block, part, chosen, use_reentrant=False)
        else:
            yield block(part, chosen)


def _final_logits(model: PreTrainedModel, logits: Tensor) -> Tensor:
    """Apply what some architectures do to their logits after the projection."""
    config = model.config
    if getattr(config, "scale_decoder_outputs", False):
        # T5 scales the states before a projection without bias, which is the same but for rounding.
        logits = logits * config.d_model**-0.5
    scale = getattr(config, "logit_scale", None)
    if isinstance(scale, int | float):
        logits = logits * scale
    divisor = getattr(config, "logits_scaling", None)
    if isinstance(divisor, int | float):
        logits = logits / divisor
    cap = getattr(config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits
