"""Flash attention on a GPU over sequences that lie one after another, with its log-sum-exps.

Those let two attentions over disjoint keys be merged, here and in `branch_attention`'s gradients.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Spans(NamedTuple):
    """Consecutive sequences: where each begins and the last ends, int32 [n + 1]."""

    starts: Tensor
    longest: int

    @classmethod
    def of_sizes(cls, sizes: Sequence[int], device: torch.device) -> "Spans":
        """Return sequences of these sizes, one after another."""
        ends = torch.tensor([0, *sizes], device=device).cumsum(0)
        return cls(ends.int(), max(sizes))


def has_kernel(states: Tensor) -> bool:
    """Return whether there is a kernel for such queries: half precision, on a recent GPU."""
    return (
        states.device.type == "cuda"
        and states.dtype in (torch.bfloat16, torch.float16)
        and states.shape[-1] % 8 == 0
        and states.shape[-1] <= 256
        and torch.cuda.get_device_capability(states.device) >= (8, 0)
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Spans,
    keys: Spans,
    *,
    is_causal: bool,
    scale: float,
    num_used: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return attention [query, head, size], and the log-sum-exp of its scores, fp32 [head, query].

    Sequence i of the queries [query, head, size] sees sequence i of the keys, or the first
    `num_used[i]` (int32) of them; consecutive query heads share a key head.
    """
    out, total, *_ = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        queries.starts,
        keys.starts,
        queries.longest,
        keys.longest,
        0.0,
        is_causal,
        False,
        scale=scale,
        seqused_k=num_used,
    )
    return out, total


def gradients(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    total: Tensor,
    queries: Spans,
    keys: Spans,
    *,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value.

    `out` and `total` may be those of an attention that saw other keys besides: they say what share
    of the softmax these keys had.
    """
    # without dropout nothing is read of the random state
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    unused = torch.empty(0, device=query.device)
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
        gradient,
        query,
        key,
        value,
        out,
        total,
        queries.starts,
        keys.starts,
        queries.longest,
        keys.longest,
        0.0,
        is_causal,
        state,
        unused,
        scale=scale,
    )
    return found
