"""Flash attention on a GPU over sequences that lie one after another, with its log-sum-exps.

With the log-sum-exps, callers merge two attentions over disjoint keys, and compute the gradients.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Spans(NamedTuple):
    """Consecutive sequences: the start of each and the end of the last, int32 [n + 1]."""

    starts: Tensor
    longest: int

    @classmethod
    def of_sizes(cls, sizes: Sequence[int], device: torch.device) -> "Spans":
        """Return sequences of these sizes, one after another."""
        ends = torch.tensor([0, *sizes], device=device).cumsum(0)
        return cls(ends.int(), max(sizes))


def has_kernel(states: Tensor) -> bool:
    """Return whether there is a kernel for such queries [..., size].

    They lie on a GPU of compute capability 8.0 or more, in bfloat16 or float16, and their size is a
    multiple of 8 and at most 256.
    """
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

    Takes queries [query, head, size], and keys and values [key, key head, size]. Sequence i of the
    queries attends to sequence i of the keys, or to its first `num_used[i]` keys (int32).
    Consecutive query heads share a key head.
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
    """Return the gradients of query, key and value, in their shapes.

    Shapes are those of `attend`. `out` and `total` may come from an attention over these and other
    keys: they say which share of the softmax these keys have.
    """
    # The kernel reads the random state only for dropout.
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
