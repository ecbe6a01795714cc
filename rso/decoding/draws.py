"""Drawing tokens by keyed uniforms: the same uniform and logits always give the same token."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rso import seeds
from rso.decoding import Sampling, not_finite

# Rows of the layout whose columns `top_logits` sorts.
BLOCK = 32


class Distribution(NamedTuple):
    """One categorical distribution per row: cumulative probabilities, tokens in order of id."""

    token_ids: Tensor | None
    """int64 [row, choice], ascending; None if every token of the vocabulary is a choice."""
    cumulative: Tensor
    """float64 [row, choice]; the last column is 1."""


def keyed_uniforms(seed: int, prompt_id: str, num_samples: int, length: int) -> np.ndarray:
    """Return float64 [num_samples, length] in [0, 1); row i depends on (seed, prompt_id, i)."""
    rows = (
        seeds.generator("decode", seed, prompt_id, sample).random(length)
        for sample in range(num_samples)
    )
    return np.stack(list(rows))


def filtered(logits: Tensor, sampling: Sampling) -> Distribution:
    """Return the distributions of logits [row, vocabulary] after temperature, top-k and top-p.

    The temperature must be above 0. The choices are sorted by token id. If they were sorted by
    probability, rounding could swap two tokens of nearly equal probability, and a uniform would
    select another token.
    """
    num_choices = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    if num_choices == logits.shape[-1] and sampling.top_p == 1.0:
        scaled = logits.float() / sampling.temperature
        return Distribution(None, _cumulative(torch.softmax(scaled, -1)))
    top, token_ids = top_logits(logits, num_choices)
    probabilities = torch.softmax(top / sampling.temperature, -1)
    if sampling.top_p < 1.0:
        mass_before = probabilities.cumsum(-1) - probabilities
        # The most likely token always stays: the mass before it is 0.
        probabilities = probabilities.masked_fill(mass_before >= sampling.top_p, 0.0)
    token_ids, order = token_ids.sort(dim=-1)
    return Distribution(token_ids, _cumulative(probabilities.gather(-1, order)))


def bytes_of_logit(sampling: Sampling) -> int:
    """Return the bytes per logit that `filtered` needs, measured on a CPU; a top-k needs few."""
    if sampling.temperature == 0 or sampling.top_k:
        return 0
    return 24 if sampling.top_p == 1.0 else 49


def top_logits(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest logits of each row, fp32 [row, count], descending, and their token ids.

    A large vocabulary is laid out as [BLOCK, column]. Only the `count` columns with the largest
    maxima are sorted: they hold the largest logits. This takes a third of the time of `torch.topk`.
    """
    num_columns = logits.shape[-1] // BLOCK
    if num_columns <= 4 * count:
        top, token_ids = torch.topk(logits, count, dim=-1)
        return top.float(), token_ids
    laid_out = logits[:, : BLOCK * num_columns].view(-1, BLOCK, num_columns)
    columns = laid_out.amax(1).topk(count, dim=-1).indices
    # The layout leaves out fewer than BLOCK tokens; all of them are sorted too.
    rest = torch.arange(BLOCK * num_columns, logits.shape[-1], device=logits.device)
    first = torch.arange(BLOCK, device=logits.device) * num_columns
    token_ids = (first[:, None] + columns[:, None, :]).flatten(1)
    token_ids = torch.cat([token_ids, rest.expand(len(logits), -1)], dim=-1)
    top, place = logits.gather(-1, token_ids).topk(count, dim=-1)
    return top.float(), token_ids.gather(-1, place)


def draw(distribution: Distribution, uniforms: Tensor) -> Tensor:
    """Return int64 token ids [row, draw] for float64 uniforms [row, draw] (inverse CDF)."""
    # right=True takes the first choice whose cumulative probability exceeds the uniform, so that
    # a choice of probability zero is never taken.
    chosen = torch.searchsorted(distribution.cumulative, uniforms.contiguous(), right=True)
    if distribution.token_ids is None:
        return chosen
    return distribution.token_ids.gather(-1, chosen)


def token_logps(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Return fp32 [row, draw]: log-probs of `token_ids` [row, draw] under logits, in nats.

    Logits are [row, vocabulary], and are neither tempered nor filtered here.
    """
    # Take few rows at a time, so that intermediate results stay in the cache of a CPU.
    elements = 1 << 18 if logits.device.type == "cpu" else 1 << 26
    parts = torch.split(logits, max(1, elements // logits.shape[-1]))
    total = torch.cat([part.float().logsumexp(-1, keepdim=True) for part in parts])
    return logits.gather(-1, token_ids).float() - total


def check_finite(logits: Tensor, prompts: Tensor, prompt_ids: Sequence[str]) -> None:
    """Raise `UserError` with a prompt's id if a row of logits holds NaN or +inf, or only -inf.

    `prompts`, int64 [row], are indices into `prompt_ids`.
    """
    is_finite = logits.amax(-1).isfinite()
    if not bool(is_finite.all()):
        row = int(is_finite.logical_not().nonzero()[0, 0])
        raise not_finite("logits", prompt_ids[int(prompts[row])])


def _cumulative(probabilities: Tensor) -> Tensor:
    # A sum over the vocabulary in fp32 has an error above the probability of rare tokens.
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    return cumulative / cumulative[:, -1:]
