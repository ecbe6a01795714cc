"""Shared-prefix rows: one prompt and its responses in one sequence.

A row is `prefix + branch + branch + …`. Every branch attends to the prefix and to itself. Its
position ids continue those of the prefix. So each branch is computed as if only the prefix stood
before it, and the prefix is computed once. A batch is rows one after another, without padding.
`encoder_decoder` computes the same with encoder-decoder models.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from rso.branch_attention import BRANCHES, Layout, Span

# Elements of the largest block of logits in memory: 64 MiB in fp32.
LOGITS_BLOCK = 1 << 24


@dataclass(frozen=True)
class PrefixRow:
    """Token ids of one prompt and of its branches."""

    prefix: list[int]
    branches: list[list[int]]

    @property
    def num_tokens(self) -> int:
        """The number of tokens of the row."""
        return len(self.prefix) + sum(map(len, self.branches))


@dataclass(frozen=True)
class Batch:
    """Rows packed into one sequence of `T` tokens, without padding.

    `input_ids` and `position_ids` are int64 [1, T]. `layout` holds the spans of each row's prefix
    and branches.
    """

    input_ids: Tensor
    position_ids: Tensor
    layout: Layout

    @property
    def num_branches(self) -> int:
        """The number of branches of all rows."""
        return sum(map(len, self.layout.branches))

    @property
    def longest_sequence(self) -> int:
        """The largest number of tokens of a prefix and one branch: one sequence for the model."""
        return int(self.position_ids.max()) + 1


def collate(rows: Sequence[PrefixRow], *, device: torch.device | str = "cpu") -> Batch:
    """Return `rows` as one batch on `device`.

    Raises:
        ValueError: a row has an empty prefix, no branch, or an empty branch.
    """
    ids: list[int] = []
    positions: list[int] = []
    prefixes: list[Span] = []
    branches: list[tuple[Span, ...]] = []
    for index, row in enumerate(rows):
        _check_row(index, row)
        size = len(row.prefix)
        prefixes.append((len(ids), len(ids) + size))
        ids += row.prefix
        positions += range(size)
        spans = []
        for branch in row.branches:
            spans.append((len(ids), len(ids) + len(branch)))
            ids += branch
            positions += range(size, size + len(branch))
        branches.append(tuple(spans))
    return Batch(
        torch.tensor([ids], device=device),
        torch.tensor([positions], device=device),
        Layout(tuple(prefixes), tuple(branches), torch.device(device)),
    )


def plan_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Return batches of indices, longest row first, each within the budget of tokens.

    A row longer than the budget is a batch of its own. Every index occurs once. Rows of equal
    length keep their order.
    """
    batches: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not batches or lengths[index] > room:
            batches.append([])
            room = token_budget
        batches[-1].append(index)
        room -= lengths[index]
    return batches


def split_row(row: PrefixRow, max_tokens: int) -> list[PrefixRow]:
    """Return rows with the same prefix and all branches in order, each row within `max_tokens`.

    A branch that does not fit beside the prefix gets a row of its own, which is longer than
    `max_tokens`.
    """
    rows: list[PrefixRow] = []
    for branch in row.branches:
        if rows and rows[-1].num_tokens + len(branch) <= max_tokens:
            rows[-1].branches.append(branch)
        else:
            rows.append(PrefixRow(row.prefix, [branch]))
    return rows


def hidden_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return a decoder-only model's last hidden states [T, H] in its dtype; compute no logits.

    Raises:
        ValueError: a sequence is longer than the model's context or sliding attention window.
    """
    _check_length(model, batch.longest_sequence)
    output = _decoder(model)(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        **_attention_inputs(model, batch),
    )
    hidden: Tensor = output.last_hidden_state
    return hidden[0]


def branch_token_logps(model: PreTrainedModel, batch: Batch) -> list[list[Tensor]]:
    """Return, for each row and branch, the log-probs of its tokens: fp32 [tokens], nats.

    The first token of a branch is predicted at the last position of the prefix. In an
    encoder-decoder model it is predicted at the decoder's start token. Differentiable. Logits are
    computed only at positions that predict a branch token, one block at a time.

    Raises:
        ValueError: as `hidden_states`, for decoder-only models.
    """
    device = batch.input_ids.device
    source: list[int] = []
    target: list[int] = []
    sizes: list[int] = []
    for (_, prefix_end), spans in zip(batch.layout.prefixes, batch.layout.branches, strict=True):
        for start, end in spans:
            source += [prefix_end - 1, *range(start, end - 1)]
            target += range(start, end)
            sizes.append(end - start)
    if model.config.is_encoder_decoder:
        from rso import encoder_decoder

        picked = encoder_decoder.response_states(model, batch)
    else:
        picked = hidden_states(model, batch)[torch.tensor(source, device=device)]
    tokens = batch.input_ids[0, torch.tensor(target, device=device)]
    flat = iter(torch.split(_target_logps(model, picked, tokens), sizes))
    return [[next(flat) for _ in spans] for spans in batch.layout.branches]


def branch_logps(model: PreTrainedModel, batch: Batch) -> list[Tensor]:
    """Return, for each row, the summed log-probs of its branches: fp32 [branches], nats.

    Raises:
        ValueError: as `branch_token_logps`.
    """
    return [
        torch.stack([token_logps.sum() for token_logps in row])
        for row in branch_token_logps(model, batch)
    ]


def last_logits(model: PreTrainedModel, batch: Batch, token_ids: Sequence[int]) -> Tensor:
    """Return fp32 [branches, tokens]: logits of `token_ids` after the last token of each branch.

    In an encoder-decoder model the encoder reads prefix and branch, and the logits are those of the
    decoder's first token. Branches come in order, row by row. Only `token_ids` are projected, in
    fp32: the difference of two bf16 logits would be a multiple of 0.06 or more. Differentiable.

    Raises:
        ValueError: as `hidden_states`, for decoder-only models.
    """
    device = batch.input_ids.device
    if model.config.is_encoder_decoder:
        from rso import encoder_decoder

        picked = encoder_decoder.label_states(model, batch)
    else:
        last = [end - 1 for spans in batch.layout.branches for _, end in spans]
        picked = hidden_states(model, batch)[torch.tensor(last, device=device)]
    head = _head(model)
    index = torch.tensor(list(token_ids), device=device)
    logits = picked.float() @ head.weight[index].float().T
    if getattr(head, "bias", None) is not None:
        logits = logits + head.bias[index].float()
    return _final_logits(model, logits)


def _check_row(index: int, row: PrefixRow) -> None:
    if not row.prefix:
        raise ValueError(f"row {index}: the prefix is empty; a prompt has at least one token.")
    if not row.branches:
        raise ValueError(f"row {index}: no branches; a row has at least one response.")
    for number, branch in enumerate(row.branches):
        if not branch:
            raise ValueError(
                f"row {index}, branch {number}: the response has no tokens; a response has at "
                "least its end-of-sequence token."
            )


def _attention_inputs(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """Return the model's inputs that say which tokens attend to which."""
    kind = model.config._attn_implementation
    if kind == BRANCHES:
        # This attention never reads the mask. With four axes it passes through the model unchanged.
        return {"attention_mask": batch.position_ids[None, None], "branches": batch.layout}
    is_seen = batch.layout.is_seen[None, None]
    if kind == "sdpa":
        return {"attention_mask": is_seen}
    # Eager attention adds the mask to the scores.
    mask = torch.zeros(is_seen.shape, dtype=model.dtype, device=is_seen.device)
    return {"attention_mask": mask.masked_fill_(~is_seen, torch.finfo(model.dtype).min)}


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
            # The backward pass computes each block of logits again, so that none is kept for it.
            yield checkpoint(block, part, chosen, use_reentrant=False)
        else:
            yield block(part, chosen)


def _final_logits(model: PreTrainedModel, logits: Tensor) -> Tensor:
    """Apply what some architectures do to their logits after the projection."""
    config = model.config
    if getattr(config, "scale_decoder_outputs", False):
        # T5 scales the states before its projection. Without a bias only the rounding differs.
        logits = logits * config.d_model**-0.5
    scale = getattr(config, "logit_scale", None)
    if isinstance(scale, int | float):
        logits = logits * scale
    divisor = getattr(config, "logits_scaling", None)
    if isinstance(divisor, int | float):
        logits = logits / divisor
    cap = getattr(config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits
