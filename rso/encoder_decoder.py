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

from rso.branch_attention import Span
from rso.prefix import Batch, plan_batches


class Encoded(NamedTuple):
    """Encoder states [N, P, H] and the mask [N, P] that is true where they are no padding."""

    states: Tensor
    mask: Tensor


def response_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return [tokens, H]: the decoder's states that predict the tokens of all branches, in order.

    The encoder runs once a row. The decoder runs on as many branches at a time as have, padded,
    about as many tokens as the batch.
    """
    encoded = _encode(model, batch, [[span] for span in batch.layout.prefixes])
    rows = [row for row, spans in enumerate(batch.layout.branches) for _ in spans]
    branches = [span for spans in batch.layout.branches for span in spans]
    states: dict[int, Tensor] = {}
    for chosen in plan_batches([end - start for start, end in branches], _size(batch)):
        # The start token predicts the first token; what pads a shorter branch is seen by none.
        ids, _ = _padded(batch, [[(branches[i][0], branches[i][1] - 1)] for i in chosen])
        ids = torch.cat([_start_tokens(model, ids), ids], dim=1)
        own = torch.tensor([rows[i] for i in chosen], device=ids.device)
        hidden = _decode(model, ids, Encoded(encoded.states[own], encoded.mask[own]))
        for place, i in enumerate(chosen):
            start, end = branches[i]
            states[i] = hidden[place, : end - start]
    return torch.cat([states[i] for i in range(len(branches))])


def label_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return [branches, H]: the decoder's first state after the encoder read prefix and branch.

    The encoder attends both ways, so the prefix is encoded anew with every branch, as many
    branches at a time as have, padded, about as many tokens as the batch.
    """
    inputs = [
        [prefix, span]
        for prefix, spans in zip(batch.layout.prefixes, batch.layout.branches, strict=True)
        for span in spans
    ]
    sizes = [sum(end - start for start, end in spans) for spans in inputs]
    states: dict[int, Tensor] = {}
    for chosen in plan_batches(sizes, _size(batch)):
        encoded = _encode(model, batch, [inputs[i] for i in chosen])
        hidden = _decode(model, _start_tokens(model, encoded.mask), encoded)
        states |= {i: hidden[place] for place, i in enumerate(chosen)}
    return torch.cat([states[i] for i in range(len(inputs))])


def _size(batch: Batch) -> int:
    return batch.input_ids.shape[1]


def _padded(batch: Batch, sequences: Sequence[Sequence[Span]]) -> tuple[Tensor, Tensor]:
    """Each sequence's spans, joined, as ids [N, L], and a mask [N, L], false where they end."""
    places = [[i for span in spans for i in range(*span)] for spans in sequences]
    length = max(map(len, places))
    device = batch.input_ids.device
    index = torch.tensor([[*row, *([0] * (length - len(row)))] for row in places], device=device)
    sizes = torch.tensor([len(row) for row in places], device=device)
    mask = torch.arange(length, device=device) < sizes[:, None]
    return batch.input_ids[0, index.long()], mask


def _start_tokens(model: Any, rows: Tensor) -> Tensor:
    """[N, 1], one for each of the N `rows`."""
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
