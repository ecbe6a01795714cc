"""Attention over packed shared-prefix rows: a prefix is read once, and branches are never mixed.

Rows lie one after another in one sequence, `prefix branch branch … prefix branch …`, without
padding. A prefix attends to itself, a branch to its row's prefix and to itself. On a CPU these are
flash-attention calls over contiguous slices: the prefix alone; all branches of a row over its
prefix; each branch alone. The last two see disjoint keys, so their softmaxes merge by their
log-sum-exps, and nothing that is masked is computed. Elsewhere FlexAttention takes the same layout
as a block mask.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "branches"
"""The name of `attention` in transformers' registry, and in `compute.attention`."""

Span = tuple[int, int]
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@dataclass(frozen=True)
class Layout:
    """Where prefixes and branches lie in a packed sequence, as (start, end).

    `branches[row]` are consecutive and follow `prefixes[row]`; the next row follows them.
    """

    prefixes: tuple[Span, ...]
    branches: tuple[tuple[Span, ...], ...]

    @property
    def num_tokens(self) -> int:
        """Length of the sequence."""
        return self.branches[-1][-1][1]

    def is_seen(self, device: torch.device | str) -> Tensor:
        """Bool [query, key]: whether a query attends to a key. Quadratic: for dense attention."""
        row, segment = self.segments(device)
        index = torch.arange(self.num_tokens, device=device)
        query, key = index[:, None], index[None, :]
        return _is_seen(row, segment, query, key)

    def segments(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Row of each token, and its segment: 0 for the prefix, from 1 for the row's branches."""
        row = torch.empty(self.num_tokens, dtype=torch.int64)
        segment = torch.empty(self.num_tokens, dtype=torch.int64)
        for number, (prefix, branches) in enumerate(zip(self.prefixes, self.branches, strict=True)):
            row[prefix[0] : branches[-1][1]] = number
            for order, (start, end) in enumerate((prefix, *branches)):
                segment[start:end] = order
        return row.to(device), segment.to(device)

    @cached_property
    def block_mask(self) -> BlockMask:
        """FlexAttention's form of `is_seen`, built once for all layers, on the GPU."""
        return self.block_mask_on("cuda")

    def block_mask_on(self, device: torch.device | str) -> BlockMask:
        """FlexAttention's form of `is_seen` on `device`."""
        row, segment = self.segments(device)

        def is_seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return _is_seen(row, segment, query, key)

        size = self.num_tokens
        return create_block_mask(is_seen, None, None, size, size, device=str(device))


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    branches: Layout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as `branches` says; without it, as `sdpa` would, e.g. in plain decoding.

    The signature is that of transformers' attention functions: takes [1, head, position, size],
    key and value with their own number of heads, and returns [1, position, head, size].

    Raises:
        ValueError: attention dropout, which the kernels lack.
    """
    if branches is None:
        seen, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return seen, None
    if dropout:
        raise ValueError(
            f"attention dropout is {dropout}, which attention over branches has not; set "
            "attention_dropout to 0 in the model's config.json, or compute.attention to sdpa."
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.device.type == "cpu":
        # Typed loosely: torch does not annotate `apply`.
        apply: Any = _BranchAttention.apply
        return apply(query, key, value, branches, scale), None
    seen = _compiled_flex(
        query, key, value, block_mask=branches.block_mask, scale=scale, enable_gqa=True
    )
    return seen.transpose(1, 2), None


class _BranchAttention(torch.autograd.Function):
    """Flash attention by slices: in the values' type, but in float32 where there are gradients.

    Backward, bfloat16 is ten times slower.

    The gradient of a slice is that of flash attention given the merged output and log-sum-exp,
    since both say what share of the softmax the slice's keys had.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float
    ) -> Tensor:
        """[1, head, position, size] to [1, position, head, size] in the type of `value`."""
        is_trained = any(ctx.needs_input_grad)
        # under autocast rotary positions leave queries and keys in float32, and values are not
        dtype = torch.float32 if is_trained else value.dtype
        q, k, v = _in_type(dtype, query, key, value)
        out = q.new_empty(1, q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
        total = q.new_empty(q.shape[:3], dtype=torch.float32)
        for prefix, branches in zip(layout.prefixes, layout.branches, strict=True):
            at = _slice(prefix)
            out[at], total[at[:3]] = _flash(q[at], k[at], v[at], 0.0, True, scale=scale)
            all_of_row = _slice((branches[0][0], branches[-1][1]))
            to_prefix, prefix_total = _flash(q[all_of_row], k[at], v[at], 0.0, False, scale=scale)
            for branch in branches:
                own = _slice(branch)
                out[own], total[own[:3]] = _flash(q[own], k[own], v[own], 0.0, True, scale=scale)
            merged = torch.logaddexp(total[all_of_row[:3]], prefix_total)
            share = (total[all_of_row[:3]] - merged).exp_()[..., None]
            out[all_of_row] = torch.lerp(to_prefix.float(), out[all_of_row].float(), share).to(
                q.dtype
            )
            total[all_of_row[:3]] = merged
        if is_trained:
            ctx.save_for_backward(query, key, value, out, total)
        ctx.layout, ctx.scale = layout, scale
        return out.transpose(1, 2).to(value.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, total = ctx.saved_tensors
        q, k, v = _in_type(torch.float32, query, key, value)
        (gradient,) = gradients
        grad_out = gradient.float().transpose(1, 2)
        grads = tuple(torch.zeros_like(t) for t in (q, k, v))
        for queries, keys, is_causal in _slices(ctx.layout):
            parts = _flash_backward(
                grad_out[queries],
                q[queries],
                k[keys],
                v[keys],
                out[queries],
                total[queries[:3]],
                0.0,
                is_causal,
                scale=ctx.scale,
            )
            for grad, part, at in zip(grads, parts, (queries, keys, keys), strict=True):
                grad[at] += part
        dq, dk, dv = grads
        # Query heads that share a key head lie side by side.
        dk, dv = (g.view(1, key.shape[1], -1, *g.shape[2:]).sum(2) for g in (dk, dv))
        return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), None, None


def _slices(layout: Layout) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...], bool]]:
    """The flash-attention calls: (queries, keys, is_causal)."""
    for prefix, branches in zip(layout.prefixes, layout.branches, strict=True):
        yield _slice(prefix), _slice(prefix), True
        yield _slice((branches[0][0], branches[-1][1])), _slice(prefix), False
        for branch in branches:
            yield _slice(branch), _slice(branch), True


def _slice(span: Span) -> tuple[slice, ...]:
    return slice(None), slice(None), slice(*span)


def _in_type(
    dtype: torch.dtype, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """In one type, with keys and values repeated for all query heads."""
    groups = query.shape[1] // key.shape[1]
    return query.to(dtype), repeat_kv(key.to(dtype), groups), repeat_kv(value.to(dtype), groups)


def _is_seen(row: Tensor, segment: Tensor, query: Tensor, key: Tensor) -> Tensor:
    is_own = (segment[key] == segment[query]) | (segment[key] == 0)
    return (row[key] == row[query]) & is_own & (key <= query)


# Compiled, it is one kernel; as plain Python it would hold every score.
_compiled_flex = torch.compile(flex_attention, dynamic=True)

AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
