"""The least time that a machine could need for the work of a turn, given the rates measured on it.

Decoding, with all samples of a turn in one batch, takes one step for the prompts and one step per
further token of the responses. A step takes at least the longer of

- operations / the rate of a matrix product: 2 operations per weight and row, and 4 per query, key
  and dimension of a head;
- bytes / the rate of a copy: every weight, the keys and values of every prompt once and of every
  sample, and the logits, written and read.

Scoring counts operations only. Other work of a step (norms, softmax, draws) is left out. The model
must be decoder-only.
"""

import statistics
import time
from typing import Any, NamedTuple

from _sides import spread


class Ceilings(NamedTuple):
    """Operations per second in a matrix product; bytes per second read and written in a copy."""

    operations: float
    bandwidth: float

    def seconds(self, operations: float, num_bytes: float) -> float:
        """Return the least seconds of a step."""
        return max(operations / self.operations, num_bytes / self.bandwidth)


def measure(dtype: str, device: str = "cpu") -> Ceilings:
    """Measure, print and return the rates of the machine, medians over repeats."""
    import torch

    size, num_bytes = (2048, 1 << 28) if device == "cpu" else (8192, 1 << 32)
    kind = getattr(torch, dtype)
    a, b = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    products = [2 * size**3 / _seconds(lambda: a @ b, device) for _ in range(5)]
    copies = [2 * num_bytes / _seconds(lambda: target.copy_(source), device) for _ in range(3)]
    if device == "cuda":
        # The sides need this memory.
        del a, b, source, target
        torch.cuda.empty_cache()
    print(
        f"ceilings: {spread([rate / 1e9 for rate in products])} GFLOP/s in a {dtype} matrix "
        f"product of {size}, {spread([rate / 1e9 for rate in copies], 1)} GB/s read and written in "
        "a copy",
        flush=True,
    )
    return Ceilings(statistics.median(products), statistics.median(copies))


class Model(NamedTuple):
    """The amounts of work of a decoder-only model."""

    layer_weights: int
    """Weights in matrix products, all layers together."""
    head_weights: int
    vocabulary: int
    operations_of_key: int
    """Operations per pair of query and key, all layers together."""
    bytes_of_token: int
    """Bytes of keys and values per token, all layers together."""
    itemsize: int

    @classmethod
    def of(cls, config: Any, itemsize: int = 2) -> "Model":
        """Return the amounts of work for a transformers config."""
        width, heads = config.hidden_size, config.num_attention_heads
        layers = config.num_hidden_layers
        size = getattr(config, "head_dim", None) or width // heads
        key_heads = config.num_key_value_heads
        attention = width * size * (2 * heads + 2 * key_heads)
        layer = attention + 3 * width * config.intermediate_size
        return cls(
            layers * layer,
            width * config.vocab_size,
            config.vocab_size,
            4 * layers * heads * size,
            2 * layers * key_heads * size * itemsize,
            itemsize,
        )


def decode_seconds(
    model: Model,
    ceilings: Ceilings,
    *,
    num_prompts: int,
    num_samples: int,
    prompt_tokens: int,
    new_tokens: int,
) -> float:
    """Return the least seconds to decode `num_samples` responses to each prompt."""
    rows, prompt_total = num_prompts * num_samples, num_prompts * prompt_tokens
    weights = (model.layer_weights + model.head_weights) * model.itemsize
    prompt_keys = prompt_total * prompt_tokens / 2
    seconds = ceilings.seconds(
        2 * (prompt_total * model.layer_weights + num_prompts * model.head_weights)
        + prompt_keys * model.operations_of_key,
        weights + prompt_total * model.bytes_of_token,
    )
    # The prompt's logits give the first token of a response. The model does not read the last.
    for own in range(1, new_tokens):
        seconds += ceilings.seconds(
            2 * rows * (model.layer_weights + model.head_weights)
            + rows * (prompt_tokens + own) * model.operations_of_key,
            weights
            + (prompt_total + rows * own) * model.bytes_of_token
            + 2 * rows * model.vocabulary * model.itemsize,
        )
    return seconds


def score_seconds(
    model: Model, ceilings: Ceilings, *, prefix_tokens: int, branch_tokens: list[int]
) -> float:
    """Return the least seconds for the comparisons of one prompt, which share a prefix."""
    tokens = prefix_tokens + sum(branch_tokens)
    keys = prefix_tokens**2 / 2 + sum(size * (prefix_tokens + size / 2) for size in branch_tokens)
    operations = 2 * tokens * model.layer_weights + keys * model.operations_of_key
    return operations / ceilings.operations


def _seconds(work: Any, device: str) -> float:
    import torch

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    work()
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started
