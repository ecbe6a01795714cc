"""Attention for many samples of a prompt: its keys and values are stored and read once.

The queries of all samples of a prompt attend to the prompt together. Each also attends to its
sample's own tokens. These keys are disjoint, so the log-sum-exps merge the two softmaxes. In the
rest of the model each sample is one row, so that a finished sample costs nothing there.
"""

from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from rso import flash_on_gpu
from rso.flash_on_gpu import Spans

SHARED_PROMPT = "rso_shared_prompt"
"""The name of `shared_prompt_attention` in transformers' registry of attention functions."""

# Below this share of live rows the keys of finished rows are dropped. That copies the others.
LIVE_SHARE = 0.75
# Prompts are cut into runs of one length, or masked if there are more runs than this.
MOST_RUNS = 8
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


class Stored:
    """Keys and values, float [row, head, column, size] per layer; zero until they are written."""

    def __init__(self, num_rows: int, num_columns: int) -> None:
        self.num_rows, self._num_columns = num_rows, num_columns
        self._of_layer: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the buffers of a layer; `key` and `value` give their heads, sizes and types."""
        if layer not in self._of_layer:
            self._of_layer[layer] = self._zeros(key), self._zeros(value)
        return self._of_layer[layer]

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but `rows` (int64), which are renumbered in order."""
        self.num_rows = len(rows)
        for layer, (keys, values) in self._of_layer.items():
            self._of_layer[layer] = keys[rows], values[rows]

    def _zeros(self, new: Tensor) -> Tensor:
        # Zeros: masked columns are read too, and NaN times zero is NaN.
        _, heads, _, size = new.shape
        if new.device.type == "cpu":
            return new.new_zeros(self.num_rows, heads, self._num_columns, size)
        # In memory, tokens come before heads: kernels on a GPU read sequences of several lengths.
        return new.new_zeros(self.num_rows, self._num_columns, heads, size).transpose(1, 2)


class Prompts:
    """The keys and values of some prompts, right-padded.

    Args:
        lengths: tokens of each prompt, int64 [prompt].
    """

    def __init__(self, lengths: Tensor, dtype: torch.dtype) -> None:
        self.lengths, self.columns = lengths, Columns(lengths, dtype)
        self.stored = Stored(len(lengths), int(lengths.max()))


class Prefill:
    """Attention of the tokens from column `start` to `end` of consecutive prompts.

    One row of tokens for several prompts means that all of them share these tokens.
    """

    def __init__(self, prompts: Prompts, rows: slice, start: int, end: int) -> None:
        self._prompts, self._rows, self._columns = prompts, rows, slice(start, end)
        columns = torch.arange(end, device=prompts.lengths.device)
        is_seen = columns <= columns[start:, None]
        # Plain causal attention needs no mask, and is faster without one.
        self._is_seen = is_seen if start else None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        keys, values = self._prompts.stored.layer(layer, key, value)
        keys[self._rows, :, self._columns] = key
        values[self._rows, :, self._columns] = value
        if self._is_seen is None:
            return scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scale, enable_gqa=True
            )
        seen = self._rows, slice(None), slice(0, self._columns.stop)
        mask = additive(self._is_seen, query.dtype)
        return scaled_dot_product_attention(
            query, keys[seen], values[seen], attn_mask=mask, scale=scale, enable_gqa=True
        )


class LastToken:
    """Attention of the last token of each prompt, one per row, over the whole prompt."""

    def __init__(self, prompts: Prompts) -> None:
        self._prompts = prompts

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        prompts = self._prompts
        keys, values = prompts.stored.layer(layer, key, value)
        place = torch.arange(len(prompts.lengths), device=key.device), slice(None)
        keys[*place, prompts.lengths - 1] = key[:, :, 0]
        values[*place, prompts.lengths - 1] = value[:, :, 0]
        mask = padding_mask(prompts.lengths, query.dtype)
        return scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, scale=scale, enable_gqa=True
        )


class SampleKeys:
    """The keys and values of the samples' own tokens.

    Args:
        numbers: int64 [row], ascending: the sample of each row.
        num_columns: the most tokens of a sample.
    """

    def __init__(self, numbers: Tensor, num_columns: int) -> None:
        self.stored = Stored(len(numbers), num_columns)
        self.num_filled = 0
        self._numbers = numbers

    def advance(self, live: Tensor) -> Tensor:
        """Start a column for one more token of each sample in `live`; return their rows, int64.

        Rows of finished samples may be dropped.
        """
        if len(live) < LIVE_SHARE * len(self._numbers):
            self.stored.keep(torch.searchsorted(self._numbers, live))
            self._numbers = live
        self.num_filled += 1
        return torch.searchsorted(self._numbers, live)


class Slots:
    """Lays rows of the model out by group, with `num_slots` slots per group, and back.

    Args:
        group_of: int64 [row], ascending: the group of each row.
    """

    def __init__(self, group_of: Tensor, num_groups: int) -> None:
        counts = torch.bincount(group_of, minlength=num_groups)
        self.num_groups, self.num_slots = num_groups, int(counts.max())
        ends = counts.cumsum(0)
        first_row = ends - counts
        self.rows = Spans(torch.cat([first_row[:1], ends]).int(), self.num_slots)
        slot = torch.arange(len(group_of), device=group_of.device) - first_row[group_of]
        self._place = group_of * self.num_slots + slot
        self._is_full = len(group_of) == num_groups * self.num_slots

    def spread(self, rows: Tensor) -> Tensor:
        """Take [row, ...]; return [group, slot, ...], zero where a slot has no row."""
        shape = (self.num_groups, self.num_slots, *rows.shape[1:])
        if self._is_full:
            return rows.reshape(shape)
        padded = rows.new_zeros(self.num_groups * self.num_slots, *rows.shape[1:])
        padded[self._place] = rows
        return padded.view(shape)

    def gather(self, spread: Tensor) -> Tensor:
        """Take [group, slot, ...]; return [row, ...]."""
        rows = spread.flatten(0, 1)
        return rows if self._is_full else rows[self._place]


class DecodeStep:
    """Attention of one new token per row over its prompt and over its sample.

    Args:
        live: int64 [row], ascending: the sample of each row.
        prompt_of: int64 [row]: the prompt of each row.
    """

    def __init__(
        self, prompts: Prompts, samples: SampleKeys, live: Tensor, prompt_of: Tensor
    ) -> None:
        self._prompts, self._samples = prompts, samples
        self._place = samples.advance(live)
        self._slots = Slots(prompt_of, len(prompts.lengths))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        end, place = self._samples.num_filled, self._place
        keys, values = self._samples.stored.layer(layer, key, value)
        keys[place, :, end - 1] = key[:, :, 0]
        values[place, :, end - 1] = value[:, :, 0]
        # [row, key head, query heads that share it, size]
        folded = query.view(len(query), key.shape[1], -1, query.shape[3])
        own, own_total = self._own(folded, keys[:, :, :end], values[:, :, :end], scale)
        shared, shared_total = across(
            folded,
            *self._prompts.stored.layer(layer, key, value),
            self._prompts.columns,
            self._slots,
            scale,
        )
        share = torch.sigmoid(own_total - shared_total)[..., None]
        seen = torch.lerp(shared.float(), own.float(), share).to(query.dtype)
        return seen.flatten(1, 2)[:, :, None]

    def _own(
        self, folded: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        if len(keys) == len(folded):
            return with_total(folded, keys, values, None, scale)
        # Rows of finished samples are still stored. Their queries are zero, and nothing reads the
        # results.
        spread = folded.new_zeros(len(keys), *folded.shape[1:])
        spread[self._place] = folded
        seen, total = with_total(spread, keys, values, None, scale)
        return seen[self._place], total[self._place]


def shared_prompt_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    shared_prompt: Prefill | LastToken | DecodeStep,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return the attention of `shared_prompt`, which also stores `key` and `value`.

    The signature is that of transformers' attention functions. Takes [row, head, position, size]
    and returns [row, position, head, size].
    """
    layer = module.layer_idx
    assert isinstance(layer, int)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return shared_prompt.attend(layer, query, key, value, scale).transpose(1, 2), None


AttentionInterface.register(SHARED_PROMPT, shared_prompt_attention)


class Run(NamedTuple):
    """Consecutive groups, the columns that they read, and an additive mask of these columns."""

    groups: slice
    columns: slice
    mask: Tensor | None


class Columns:
    """The columns of each group in right-padded keys: the first `lengths`, int64 [group]."""

    def __init__(self, lengths: Tensor, dtype: torch.dtype) -> None:
        self._lengths, self._dtype = lengths, dtype

    @cached_property
    def runs(self) -> list[Run]:
        """The groups in runs of one length, which need no mask; one masked run if there are many.

        A mask costs a fifth of a decoding step on a CPU.
        """
        sizes, counts = (
            found.tolist() for found in torch.unique_consecutive(self._lengths, return_counts=True)
        )
        if len(sizes) > MOST_RUNS:
            mask = padding_mask(self._lengths, self._dtype)
            return [Run(slice(0, len(self._lengths)), slice(0, max(sizes)), mask)]
        ends = list(accumulate(counts))
        return [
            Run(slice(end - count, end), slice(0, size), None)
            for size, count, end in zip(sizes, counts, ends, strict=True)
        ]

    @cached_property
    def num_used(self) -> Tensor:
        """`lengths` for kernels on a GPU: int32 [group]."""
        return self._lengths.int()

    @cached_property
    def padded(self) -> Spans:
        """The keys of all groups with their padding, one group after another."""
        width = int(self._lengths.max())
        return Spans.of_sizes([width] * len(self._lengths), self._lengths.device)


def padding_mask(lengths: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the additive mask [group, 1, 1, column] of right-padded keys."""
    columns = torch.arange(int(lengths.max()), device=lengths.device)
    return additive((columns < lengths[:, None])[:, None, None], dtype)


def across(
    folded: Tensor, keys: Tensor, values: Tensor, columns: Columns, slots: Slots, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the attention of each row to the keys of its group, and the log-sum-exps.

    Takes queries [row, key head, query, size] and keys [group, key head, column, size]. Returns
    [row, key head, query, size] and fp32 [row, key head, query]. All queries of a group attend
    together, so that its keys are read once and never repeated in memory.
    """
    num_heads, num_queries, size = folded.shape[1:]
    if flash_on_gpu.has_kernel(folded):
        seen, total = flash_on_gpu.attend(
            folded.flatten(1, 2),
            keys.transpose(1, 2).flatten(0, 1),
            values.transpose(1, 2).flatten(0, 1),
            slots.rows,
            columns.padded,
            is_causal=False,
            scale=scale,
            num_used=columns.num_used,
        )
        return seen.view_as(folded), total.T.reshape(folded.shape[:-1])
    # [group, key head, slot x query, size]
    together = slots.spread(folded).transpose(1, 2).flatten(2, 3)
    parts = [
        with_total(
            together[run.groups],
            keys[run.groups, :, run.columns],
            values[run.groups, :, run.columns],
            run.mask,
            scale,
        )
        for run in columns.runs
    ]
    seen, total = (torch.cat(found) for found in zip(*parts, strict=True))
    shape = (slots.num_groups, num_heads, slots.num_slots, num_queries)
    seen = seen.reshape(*shape, size).transpose(1, 2)
    return slots.gather(seen), slots.gather(total.reshape(shape).transpose(1, 2))


def with_total(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return attention [row, head, query, size] and its log-sum-exps, fp32 [row, head, query].

    `mask` is additive and broadcasts to [row, head, query, column].
    """
    if query.device.type == "cpu":
        if mask is not None:
            mask = mask.expand(*query.shape[:3], key.shape[2])
        seen, total = _flash(query, key, value, 0.0, False, attn_mask=mask, scale=scale)
        return seen, total
    if mask is None and flash_on_gpu.has_kernel(query):
        found = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)
        return found[0], found[1]
    scores = (query @ key.transpose(2, 3)).float() * scale
    if mask is not None:
        scores = scores + mask
    total = scores.logsumexp(-1)
    return (scores - total[..., None]).exp().to(value.dtype) @ value, total


def additive(is_seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask to add to scores: 0 where `is_seen`, else minus infinity."""
    mask = torch.zeros(is_seen.shape, dtype=dtype, device=is_seen.device)
    return mask.masked_fill_(~is_seen, float("-inf"))
