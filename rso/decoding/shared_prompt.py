"""Attention for many samples of a prompt: its keys and values are stored and read once.

A *group* is one prompt and some of its samples. All keys of a group lie side by side: first the
prompt, then one column a sample for each step. A sample's query sees the prompt and the columns
that the sample owns. Samples are packed one a row in the rest of the model, so that a finished
sample costs nothing there, and are laid out by group for attention alone.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

ATTENTION = "rso_shared_prompt"
"""The name of `attention` in transformers' registry of attention functions."""

PROMPT = -1
"""The owner of columns that all samples of the group see."""
_NOTHING = -2


class Groups:
    """The keys and values of some prompts and of the samples that continue them.

    Args:
        lengths: the number of prompt tokens that `Prefill` brings, int64 [group].
        num_columns: the most keys that a group will hold.
    """

    def __init__(self, lengths: Tensor, num_columns: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.num_filled = int(lengths.max())
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._owner = lengths.new_full((len(lengths), num_columns), _NOTHING)
        columns = torch.arange(num_columns, device=lengths.device)
        self._owner[columns < lengths[:, None]] = PROMPT

    @property
    def num_groups(self) -> int:
        return self._owner.shape[0]

    def keep(self, groups: Tensor) -> None:
        """Forget all groups but `groups` (int64, ascending), which are renumbered in order."""
        self._owner = self._owner[groups]
        for stored in (self._keys, self._values):
            for layer in stored:
                stored[layer] = stored[layer][groups]

    def stored(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the layer's keys and values, float [group, head, column, size]."""
        if layer not in self._keys:
            for tensors, example in ((self._keys, key), (self._values, value)):
                shape = (self.num_groups, example.shape[1], self._owner.shape[1], example.shape[3])
                # zeros, as masked columns are read too and NaN times zero is NaN
                tensors[layer] = example.new_zeros(shape)
        return self._keys[layer], self._values[layer]

    def claim(self, samples: Tensor) -> Tensor:
        """Give each of `samples` (int64 [group, slot]) a column.

        Returns the additive mask [group, 1, slot, column] of what the samples see.
        """
        start = self.num_filled
        self.num_filled += samples.shape[1]
        self._owner[:, start : self.num_filled] = samples
        owner = self._owner[:, None, None, : self.num_filled]
        return additive((owner == samples[:, None, :, None]) | (owner == PROMPT), self.dtype)


class Prefill:
    """Attention over prompt tokens, right-padded, from column `start` of consecutive groups.

    The rows of the model are prompts, each of which fills `num_copies` groups from `first_group`.
    """

    def __init__(
        self, groups: Groups, first_group: int, num_rows: int, num_copies: int, start: int, end: int
    ) -> None:
        self._groups = groups
        self._rows = slice(first_group, first_group + num_rows * num_copies)
        self._num_copies, self._start, self._end = num_copies, start, end
        device = groups._owner.device
        columns = torch.arange(end, device=device)
        is_seen = columns <= torch.arange(start, end, device=device)[:, None]
        # plain causal attention needs no mask, and is faster without one
        self._mask = additive(is_seen[None, None], groups.dtype) if start else None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        columns = slice(self._start, self._end)
        rows, copies = self._rows, self._num_copies
        stored = self._groups.stored(layer, key, value)
        for buffer, new in zip(stored, (key, value), strict=True):
            buffer[rows, :, columns] = new.repeat_interleave(copies, dim=0)
        if self._mask is None:
            return scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scale, enable_gqa=True
            )
        keys, values = (buffer[rows][::copies, :, : self._end] for buffer in stored)
        return grouped_attention(query, keys, values, self._mask, scale)


class Slots:
    """Rows of the model laid out by group, `num_slots` a group, and back.

    Args:
        group_of: int64 [row], ascending: the group of each row.
    """

    def __init__(self, group_of: Tensor, num_groups: int) -> None:
        counts = torch.bincount(group_of, minlength=num_groups)
        self.num_groups, self.num_slots = num_groups, int(counts.max())
        first_row = counts.cumsum(0) - counts
        slot = torch.arange(len(group_of), device=group_of.device) - first_row[group_of]
        self._place = group_of * self.num_slots + slot
        self._is_full = len(group_of) == num_groups * self.num_slots

    def spread(self, rows: Tensor, fill: int = 0) -> Tensor:
        """[row, ...] to [group, slot, ...], `fill` where a slot has no row."""
        shape = (self.num_groups, self.num_slots, *rows.shape[1:])
        if self._is_full:
            return rows.reshape(shape)
        padded = rows.new_full((self.num_groups * self.num_slots, *rows.shape[1:]), fill)
        padded[self._place] = rows
        return padded.view(shape)

    def gather(self, spread: Tensor) -> Tensor:
        """[group, slot, ...] to [row, ...]."""
        rows = spread.flatten(0, 1)
        return rows if self._is_full else rows[self._place]

    def heads(self, rows: Tensor) -> Tensor:
        """[row, head, 1, size] to [group, head, slot, size], zero where a slot has no row."""
        return self.spread(rows[:, :, 0]).transpose(1, 2)

    def unheads(self, spread: Tensor) -> Tensor:
        """[group, head, slot, size] to [row, head, 1, size]."""
        return self.gather(spread.transpose(1, 2))[:, :, None]


class Step:
    """Attention of one new token a row.

    Args:
        group_of: int64 [row], ascending: the group of each row of the model.
        sample_of: int64 [row], unique within a group: who owns the row's keys, or `PROMPT`.
    """

    def __init__(self, groups: Groups, group_of: Tensor, sample_of: Tensor) -> None:
        self._groups = groups
        self._slots = Slots(group_of, groups.num_groups)
        self._start = groups.num_filled
        self._mask = groups.claim(self._slots.spread(sample_of, _NOTHING))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        end, slots = self._groups.num_filled, self._slots
        keys, values = self._groups.stored(layer, key, value)
        keys[:, :, self._start : end] = slots.heads(key)
        values[:, :, self._start : end] = slots.heads(value)
        seen = grouped_attention(
            slots.heads(query), keys[:, :, :end], values[:, :, :end], self._mask, scale
        )
        return slots.unheads(seen)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    shared_prompt: Prefill | Step,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as `shared_prompt` says; the signature is that of transformers' attention functions.

    Takes [row, head, position, size] and returns [row, position, head, size].
    """
    layer = module.layer_idx
    assert isinstance(layer, int)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return shared_prompt.attend(layer, query, key, value, scale).transpose(1, 2), None


AttentionInterface.register(ATTENTION, attention)


def grouped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """[batch, query head, query, size] over [batch, key head, column, size], grouped heads.

    Query heads that share a key head become queries of that head: keys are read once and never
    repeated in memory.
    """
    batch, num_heads, num_queries, size = query.shape
    num_shared = num_heads // key.shape[1]
    folded = query.reshape(batch, key.shape[1], num_shared * num_queries, size)
    seen = scaled_dot_product_attention(
        folded, key, value, attn_mask=mask.repeat(1, 1, num_shared, 1), scale=scale
    )
    return seen.reshape(batch, num_heads, num_queries, value.shape[3])


def additive(is_seen: Tensor, dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(is_seen.shape, dtype=dtype, device=is_seen.device)
    return mask.masked_fill_(~is_seen, float("-inf"))
