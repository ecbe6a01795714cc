"""Encoder-decoder models (T5) on shared-prefix rows: a prefix is encoded once for all its branches.

The model's own encoder and decoder run unchanged. Positions are relative to one another within a
sequence, so every branch is a decoder sequence of its own, which begins with the decoder's start
token and reads its row's encoder states.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rso.prefix import Batch, plan_batches


class Encoded(NamedTuple):
    """Encoder states [N, P, H] and the mask [N, P] that is true where they are no padding."""

    states: Tensor
    mask: Tensor


class _Branch(NamedTuple):
    row: int
    prefix: int
    start: int
    end: int


def response_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return [tokens, H]: the decoder's states that predict the tokens of all branches, in order.

    The encoder runs once a row. The decoder runs on as many branches at a time as have, padded, no
    more tokens than the batch.
    """
    device = batch.input_ids.device
    lengths = torch.tensor(batch.prefix_lengths, device=device)
    encoded = _encode(model, batch.input_ids[:, : max(batch.prefix_lengths)], lengths)
    branches = _branches(batch)
    sizes = [branch.end - branch.start for branch in branches]
    states: dict[int, Tensor] = {}
    for chosen in plan_batches(sizes, batch.input_ids.numel()):
        rows = torch.tensor([branches[i].row for i in chosen], device=device)
        starts = torch.tensor([branches[i].start for i in chosen], device=device)
        # What a shorter branch is padded with comes after its tokens, which do not see it.
        others = starts[:, None] + torch.arange(max(sizes[i] for i in chosen) - 1, device=device)
        ids = torch.cat([_start_tokens(model, rows), _tokens(batch, rows, others)], dim=1)
        hidden = _decode(model, ids, Encoded(encoded.states[rows], encoded.mask[rows]))
        states |= {i: hidden[place, : sizes[i]] for place, i in enumerate(chosen)}
    return torch.cat([states[i] for i in range(len(branches))])


def label_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return [branches, H]: the decoder's first state after the encoder read prefix and branch.

    The encoder attends both ways, so the prefix is encoded anew with every branch, as many
    branches at a time as have, padded, no more tokens than the batch.
    """
    device = batch.input_ids.device
    branches = _branches(batch)
    sizes = [branch.prefix + branch.end - branch.start for branch in branches]
    states: dict[int, Tensor] = {}
    for chosen in plan_batches(sizes, batch.input_ids.numel()):
        rows, prefixes, starts, _ = torch.tensor([branches[i] for i in chosen], device=device).T
        places = torch.arange(max(sizes[i] for i in chosen), device=device).expand(len(chosen), -1)
        prefix = prefixes[:, None]
        columns = torch.where(places < prefix, places, places - prefix + starts[:, None])
        lengths = torch.tensor([sizes[i] for i in chosen], device=device)
        encoded = _encode(model, _tokens(batch, rows, columns), lengths)
        hidden = _decode(model, _start_tokens(model, rows), encoded)
        states |= {i: hidden[place] for place, i in enumerate(chosen)}
    return torch.cat([states[i] for i in range(len(branches))])


def _branches(batch: Batch) -> Sequence[_Branch]:
    return [
        _Branch(row, prefix, start, end)
        for row, (prefix, spans) in enumerate(zip(batch.prefix_lengths, batch.spans, strict=True))
        for start, end in spans
    ]


def _tokens(batch: Batch, rows: Tensor, columns: Tensor) -> Tensor:
    """Return ids [N, C] at `columns` [N, C] of `rows` [N]; past the end, those at the end."""
    return batch.input_ids[rows[:, None], columns.clamp(max=batch.input_ids.shape[1] - 1)]


def _start_tokens(model: Any, rows: Tensor) -> Tensor:
    return rows.new_full((len(rows), 1), model.config.decoder_start_token_id)


def _encode(model: Any, ids: Tensor, lengths: Tensor) -> Encoded:
    mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    output = model.get_encoder()(input_ids=ids, attention_mask=mask)
    return Encoded(output.last_hidden_state, mask)


def _decode(model: Any, ids: Tensor, encoded: Encoded) -> Tensor:
    output = model.get_decoder()(
        input_ids=ids,
        encoder_hidden_states=encoded.states,
        encoder_attention_mask=encoded.mask,
        use_cache=False,
    )
    hidden: Tensor = output.last_hidden_state
    return hidden
