"""Attention over packed shared-prefix rows: a prefix is read once, and branches are never mixed.

Rows lie one after another in one sequence, `prefix branch branch … prefix branch …`, without
padding. A prefix attends to itself. A branch attends to its row's prefix and to itself. These keys
are disjoint, so flash attention runs over each part, and the log-sum-exps merge the results. Masked
scores are not computed. On a CPU there is one call for each prefix, for each branch, and for the
branches of each row over their prefix. On a GPU there are two calls: all prefixes and branches over
themselves, and all branches over their prefixes. Where a GPU has no such kernel, for example in
float32, attention is dense with one mask.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rso import flash_on_gpu
from rso.flash_on_gpu import Spans

BRANCHES = "branches"
"""The name of `branch_attention` in transformers' registry, and in `compute.attention`."""

Span = tuple[int, int]
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Packed(NamedTuple):
    """A layout for the kernels on a GPU: sequences of tokens, and the places of the tokens."""

    segments: Spans
    """Every prefix and every branch is one sequence; together they are all tokens in order."""
    prefixes: Spans
    prefix_tokens: Tensor
    branches: Spans
    """The branches of one row are one sequence."""
    branch_tokens: Tensor


@dataclass(frozen=True)
class Layout:
    """The spans (start, end) of prefixes and branches in a packed sequence.

    `branches[row]` are consecutive and follow `prefixes[row]`. The next row follows them.
    """

    prefixes: tuple[Span, ...]
    branches: tuple[tuple[Span, ...], ...]
    device: torch.device

    @property
    def num_tokens(self) -> int:
        """The length of the packed sequence."""
        return self.branches[-1][-1][1]

    @cached_property
    def is_seen(self) -> Tensor:
        """Bool [query, key]: whether a query attends to a key; a mask for dense attention."""
        row, segment = self._rows_and_segments()
        index = torch.arange(self.num_tokens, device=self.device)
        is_own = (segment[:, None] == segment) | (segment == 0)
        return (row[:, None] == row) & is_own & (index <= index[:, None])

    @cached_property
    def packed(self) -> Packed:
        """The layout for the kernels of `flash_on_gpu`; all layers share it."""
        prefixes = list(self.prefixes)
        branches = [(spans[0][0], spans[-1][1]) for spans in self.branches]
        segments = [
            span
            for prefix, spans in zip(prefixes, self.branches, strict=True)
            for span in (prefix, *spans)
        ]
        return Packed(
            self._spans(segments),
            self._spans(prefixes),
            self._tokens(prefixes),
            self._spans(branches),
            self._tokens(branches),
        )

    def _rows_and_segments(self) -> tuple[Tensor, Tensor]:
        """Return each token's row and segment: 0 is the prefix, the branches are 1, 2, …"""
        row = torch.empty(self.num_tokens, dtype=torch.int64)
        segment = torch.empty(self.num_tokens, dtype=torch.int64)
        for number, (prefix, branches) in enumerate(zip(self.prefixes, self.branches, strict=True)):
            row[prefix[0] : branches[-1][1]] = number
            for order, (start, end) in enumerate((prefix, *branches)):
                segment[start:end] = order
        return row.to(self.device), segment.to(self.device)

    def _spans(self, spans: list[Span]) -> Spans:
        return Spans.of_sizes([end - start for start, end in spans], self.device)

    def _tokens(self, spans: list[Span]) -> Tensor:
        return torch.cat([torch.arange(*span) for span in spans]).to(self.device)


def branch_attention(
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
    """Return the attention of the layout `branches`; without a layout, that of `sdpa`.

    The signature is that of transformers' attention functions. With a layout it takes
    [1, head, position, size], where key and value have their own number of heads, and returns
    [1, position, head, size].

    Raises:
        ValueError: attention dropout with a layout: the kernels have no dropout.
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
    # `Any`: torch does not annotate `apply`.
    on_cpu: Any = _OnCpu.apply
    on_gpu: Any = _OnGpu.apply
    if query.device.type == "cpu":
        return on_cpu(query, key, value, branches, scale), None
    if flash_on_gpu.has_kernel(value) and query.shape[-1] == value.shape[-1]:
        return on_gpu(query, key, value, branches, scale), None
    return dense(query, key, value, branches, scale), None


def dense(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
    """Return what `branch_attention` does with a layout, from one mask over the whole sequence.

    Time and memory are quadratic in the number of tokens.
    """
    q, k, v = _in_type(value.dtype, query, key, value)
    seen = scaled_dot_product_attention(q, k, v, attn_mask=layout.is_seen, scale=scale)
    return seen.transpose(1, 2)


class _OnCpu(torch.autograd.Function):
    """Flash attention by slices, in the type of the values, or in float32 if gradients are needed.

    The backward pass of the kernel is ten times slower in bfloat16 than in float32.

    The backward pass of flash attention takes the merged output and log-sum-exp for each slice.
    They say which share of the softmax the keys of the slice have.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float
    ) -> Tensor:
        """Take [1, head, position, size]; return [1, position, head, size] in the values' type."""
        is_trained = any(ctx.needs_input_grad)
        # Under autocast, rotary positions leave queries and keys in float32, but not values.
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
        # The query heads that share a key head are consecutive.
        dk, dv = (g.view(1, key.shape[1], -1, *g.shape[2:]).sum(2) for g in (dk, dv))
        return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), None, None


def _slices(layout: Layout) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...], bool]]:
    """Yield the calls of flash attention: (queries, keys, is_causal)."""
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
    """Return all three in `dtype`, with keys and values repeated for all query heads."""
    groups = query.shape[1] // key.shape[1]
    return query.to(dtype), repeat_kv(key.to(dtype), groups), repeat_kv(value.to(dtype), groups)


class _OnGpu(torch.autograd.Function):
    """Flash attention in the values' type: every segment over itself, branches over prefixes.

    The backward pass of both calls takes the merged output and log-sum-exp, as in `_OnCpu`.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float
    ) -> Tensor:
        packed = layout.packed
        # Under autocast, rotary positions leave queries and keys in float32.
        q, k, v = (states[0].transpose(0, 1).to(value.dtype) for states in (query, key, value))
        at, of_prefix = packed.branch_tokens, packed.prefix_tokens
        out, total = flash_on_gpu.attend(
            q, k, v, packed.segments, packed.segments, is_causal=True, scale=scale
        )
        to_prefix, prefix_total = flash_on_gpu.attend(
            q[at],
            k[of_prefix],
            v[of_prefix],
            packed.branches,
            packed.prefixes,
            is_causal=False,
            scale=scale,
        )
        merged = torch.logaddexp(total[:, at], prefix_total)
        share = (total[:, at] - merged).exp_().T[..., None]
        out[at] = torch.lerp(to_prefix.float(), out[at].float(), share).to(out.dtype)
        total[:, at] = merged
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(q, k, v, out, total)
        ctx.layout, ctx.scale, ctx.dtypes = layout, scale, (query.dtype, key.dtype)
        return out[None]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, total = ctx.saved_tensors
        packed = ctx.layout.packed
        at, of_prefix = packed.branch_tokens, packed.prefix_tokens
        gradient = gradients[0][0].to(out.dtype).contiguous()
        dq, dk, dv = flash_on_gpu.gradients(
            gradient,
            q,
            k,
            v,
            out,
            total,
            packed.segments,
            packed.segments,
            is_causal=True,
            scale=ctx.scale,
        )
        of_branches, *of_prefixes = flash_on_gpu.gradients(
            gradient[at],
            q[at],
            k[of_prefix],
            v[of_prefix],
            out[at],
            total[:, at],
            packed.branches,
            packed.prefixes,
            is_causal=False,
            scale=ctx.scale,
        )
        dq[at] += of_branches
        dk[of_prefix] += of_prefixes[0]
        dv[of_prefix] += of_prefixes[1]
        dq, dk, dv = (part.transpose(0, 1)[None] for part in (dq, dk, dv))
        return dq.to(ctx.dtypes[0]), dk.to(ctx.dtypes[1]), dv, None, None


AttentionInterface.register(BRANCHES, branch_attention)
AttentionMaskInterface.register(BRANCHES, sdpa_mask)
