"""Encoder-decoder models (T5) on shared-prefix rows: a prefix is encoded once for all its branches.

The model's own encoder and decoder run unchanged. Positions are relative within a sequence, so
every branch is a decoder sequence of its own. It begins with the decoder's start token, and attends
to the encoder states of its row.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rso.branch_attention import Span
from rso.prefix import Batch


class Encoded(NamedTuple):
    """Encoder states [N, P, H], and their mask [N, P], which is false at padding."""

    states: Tensor
    mask: Tensor


def response_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return [tokens, H]: the decoder's states that predict the tokens of all branches, in order.

    Every prefix is encoded once. The sequences of one encoder or decoder call have, with their
    padding, at most as many tokens as the batch.
    """
    prefixes, branches = batch.layout.prefixes, batch.layout.branches
    states: dict[Span, Tensor] = {}
    for rows in _plan([[prefix] for prefix in prefixes], _size(batch)):
        encoded = _encode(model, batch, [[prefixes[row]] for row in rows])
        spans = [(place, span) for place, row in enumerate(rows) for span in branches[row]]
        for chosen in _plan([[span] for _, span in spans], _size(batch)):
            own, parts = zip(*(spans[i] for i in chosen), strict=True)
            # The start token predicts the first token. The decoder is causal, so no token attends
            # to the padding after it.
            ids, _ = _padded(batch, [[(start, end - 1)] for start, end in parts])
            ids = torch.cat([_start_tokens(model, ids), ids], dim=1)
            index = torch.tensor(own, device=ids.device)
            hidden = _decode(model, ids, Encoded(encoded.states[index], encoded.mask[index]))
            for place, (start, end) in enumerate(parts):
                states[start, end] = hidden[place, : end - start]
    return torch.cat([states[span] for spans in branches for span in spans])


def label_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return [branches, H]: the decoder's first state after the encoder read prefix and branch.

    The encoder attends in both directions, so the prefix is encoded again with every branch. The
    sequences of one call have, with their padding, at most as many tokens as the batch.
    """
    inputs = [
        [prefix, span]
        for prefix, spans in zip(batch.layout.prefixes, batch.layout.branches, strict=True)
        for span in spans
    ]
    states: dict[int, Tensor] = {}
    for chosen in _plan(inputs, _size(batch)):
        encoded = _encode(model, batch, [inputs[i] for i in chosen])
        hidden = _decode(model, _start_tokens(model, encoded.mask), encoded)
        states |= {i: hidden[place] for place, i in enumerate(chosen)}
    return torch.cat([states[i] for i in range(len(inputs))])


def _size(batch: Batch) -> int:
    return batch.input_ids.shape[1]


def _plan(sequences: Sequence[Sequence[Span]], most: int) -> list[list[int]]:
    """Return batches of indices, longest sequence first, each of at most `most` padded tokens.

    A sequence longer than `most` is a batch of its own.
    """
    sizes = [sum(end - start for start, end in spans) for spans in sequences]
    batches: list[list[int]] = []
    room = 0
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if room < 1:
            batches.append([])
            room = max(1, most // sizes[index])
        batches[-1].append(index)
        room -= 1
    return batches


def _padded(batch: Batch, sequences: Sequence[Sequence[Span]]) -> tuple[Tensor, Tensor]:
    """Return the ids [N, L] of the joined spans of each sequence, and a mask, false at padding."""
    places = [[i for span in spans for i in range(*span)] for spans in sequences]
    length = max(map(len, places))
    device = batch.input_ids.device
    index = torch.tensor([[*row, *([0] * (length - len(row)))] for row in places], device=device)
    sizes = torch.tensor([len(row) for row in places], device=device)
    mask = torch.arange(length, device=device) < sizes[:, None]
    return batch.input_ids[0, index.long()], mask


def _start_tokens(model: Any, rows: Tensor) -> Tensor:
    """Return the decoder's start token for each of the N `rows`: int64 [N, 1]."""
    start = model.config.decoder_start_token_id
    return torch.full((len(rows), 1), start, device=rows.device)


def _encode(model: Any, batch: Batch, sequences: Sequence[Sequence[Span]]) -> Encoded:
    ids, mask = _padded(batch, sequences)
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
