"""Drawing tokens by keyed uniforms: the same uniform and the same logits give the same token."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rso import seeds
from rso.decoding import Sampling, not_finite

# Rows of the layout in which `top_logits` looks for columns.
BLOCK = 32


class Distribution(NamedTuple):
    """A categorical distribution a row: cumulative probabilities over tokens in order of id."""

    token_ids: Tensor | None
    """int64 [row, choice], ascending; None if every token of the vocabulary is a choice."""
    cumulative: Tensor
    """float64 [row, choice], the last column is 1."""


def keyed_uniforms(seed: int, prompt_id: str, num_samples: int, length: int) -> np.ndarray:
    """Return float64 [num_samples, length] in [0, 1); row i depends on (seed, prompt_id, i)."""
    rows = (
        seeds.generator("decode", seed, prompt_id, sample).random(length)
        for sample in range(num_samples)
    )
    return np.stack(list(rows))


def filtered(logits: Tensor, sampling: Sampling) -> Distribution:
    """Return what `sampling` leaves of logits [row, vocabulary], temperature above 0.

    The choices are sorted by token id, not by probability: rounding that swaps two tokens of
    nearly equal probability would otherwise swap what a uniform selects.
    """
    num_choices = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    if num_choices == logits.shape[-1] and sampling.top_p == 1.0:
        scaled = logits.float() / sampling.temperature
        return Distribution(None, _cumulative(torch.softmax(scaled, -1)))
    top, token_ids = top_logits(logits, num_choices)
    probabilities = torch.softmax(top / sampling.temperature, -1)
    if sampling.top_p < 1.0:
        mass_before = probabilities.cumsum(-1) - probabilities
        # the most likely token always stays: nothing comes before it
        probabilities = probabilities.masked_fill(mass_before >= sampling.top_p, 0.0)
    token_ids, order = token_ids.sort(dim=-1)
    return Distribution(token_ids, _cumulative(probabilities.gather(-1, order)))


def bytes_of_logit(sampling: Sampling) -> int:
    """Return the bytes a logit that `filtered` takes, as measured on a CPU: few with a top-k."""
    if sampling.temperature == 0 or sampling.top_k:
        return 0
    return 24 if sampling.top_p == 1.0 else 49


def top_logits(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest logits of each row [row, count], fp32, falling, and their token ids.

    Of a large vocabulary only the `count` columns of a [BLOCK, column] layout with the largest
    maxima are sorted: the largest logits lie in them. A third of the time of `torch.topk`.
    """
    num_columns = logits.shape[-1] // BLOCK
    if num_columns <= 4 * count:
        top, token_ids = torch.topk(logits, count, dim=-1)
        return top.float(), token_ids
    laid_out = logits[:, : BLOCK * num_columns].view(-1, BLOCK, num_columns)
    columns = laid_out.amax(1).topk(count, dim=-1).indices
    # what the layout leaves over is looked at whole
    rest = torch.arange(BLOCK * num_columns, logits.shape[-1], device=logits.device)
    first = torch.arange(BLOCK, device=logits.device) * num_columns
    token_ids = (first[:, None] + columns[:, None, :]).flatten(1)
    token_ids = torch.cat([token_ids, rest.expand(len(logits), -1)], dim=-1)
    top, place = logits.gather(-1, token_ids).topk(count, dim=-1)
    return top.float(), token_ids.gather(-1, place)


def draw(distribution: Distribution, uniforms: Tensor) -> Tensor:
    """Return int64 token ids [row, draw] for float64 uniforms [row, draw] (inverse CDF)."""
    # right=True: the first choice whose cumulative probability exceeds the uniform, so that
    # choices of probability zero are never taken
    chosen = torch.searchsorted(distribution.cumulative, uniforms.contiguous(), right=True)
    if distribution.token_ids is None:
        return chosen
    return distribution.token_ids.gather(-1, chosen)


def token_logps(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Return the log-softmax in nats, fp32, of `token_ids` [row, draw] under [row, vocabulary]."""
    # few rows at a time, so that what is computed of them stays in a CPU's cache
    elements = 1 << 18 if logits.device.type == "cpu" else 1 << 26
    parts = torch.split(logits, max(1, elements // logits.shape[-1]))
    total = torch.cat([part.float().logsumexp(-1, keepdim=True) for part in parts])
    return logits.gather(-1, token_ids).float() - total


def check_finite(logits: Tensor, prompts: Tensor, prompt_ids: Sequence[str]) -> None:
    """Raise `UserError` if a row of logits holds NaN or +inf, with the id of its prompt.

    `prompts` are int64 [row], places in `prompt_ids`.
    """
    is_finite = logits.amax(-1).isfinite()
    if not bool(is_finite.all()):
        row = int(is_finite.logical_not().nonzero()[0, 0])
        raise not_finite("logits", prompt_ids[int(prompts[row])])


def _cumulative(probabilities: Tensor) -> Tensor:
    # fp64, as a sum over a whole vocabulary in fp32 is off by more than rare tokens have
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    return cumulative / cumulative[:, -1:]
