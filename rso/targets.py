"""Which candidates become targets of supervised fine-tuning (RAFT, ReST; section 5).

Candidates of P prompts, N in all, come prompt after prompt, in ascending order of their ids within
a prompt. `sizes` [P] counts the candidates of each, every one at least 1. `texts` [N] are numbers
from 0, equal for equal texts; `rewards` [N] are finite. Copies of a text count once, by the copy
with the highest reward, among equals the one with the smallest id.
"""

from typing import NamedTuple

import numpy as np

from rso.rejection import Floats, Indices


class Bounds(NamedTuple):
    """The rewards that normalisation takes to 0 and to 1."""

    low: float
    high: float


def distinct_by_reward(sizes: Indices, texts: Indices, rewards: Floats) -> Indices:
    """One candidate of each text of each prompt: prompt after prompt, by descending reward."""
    prompt = _prompts(sizes)
    # Stable: among equal rewards the smallest id comes first.
    order = np.lexsort((-rewards, prompt))
    text_of_prompt = prompt[order] * (texts.max(initial=0) + 1) + texts[order]
    _, first = np.unique(text_of_prompt, return_index=True)
    distinct: Indices = order[np.sort(first)]
    return distinct


def raft_targets(sizes: Indices, texts: Indices, rewards: Floats) -> Indices:
    """[P]: the best candidate of each prompt, among equals the one with the smallest id (RAFT)."""
    distinct = distinct_by_reward(sizes, texts, rewards)
    best: Indices = distinct[ranks(_prompts(sizes)[distinct]) == 0]
    return best


def rest_targets(
    sizes: Indices,
    texts: Indices,
    rewards: Floats,
    *,
    threshold: float,
    bounds: Bounds | None = None,
) -> Indices:
    """Candidates whose reward, normalised to [0, 1], exceeds `threshold` (ReST).

    Prompt after prompt, by descending reward. Normalised by the prompt's own lowest and highest
    reward, or by `bounds`, those of a whole dataset. A prompt whose candidates all have one reward
    has none either way: rewards compare responses to one prompt, and there nothing is better.
    """
    starts = np.cumsum(sizes) - sizes
    low, high = np.minimum.reduceat(rewards, starts), np.maximum.reduceat(rewards, starts)
    distinct = distinct_by_reward(sizes, texts, rewards)
    prompt = _prompts(sizes)[distinct]
    distinct, prompt = (array[(high > low)[prompt]] for array in (distinct, prompt))
    if bounds is not None:
        low, high = np.full_like(low, bounds.low), np.full_like(high, bounds.high)
    normalised = (rewards[distinct] - low[prompt]) / (high - low)[prompt]
    above: Indices = distinct[normalised > threshold]
    return above


def ranks(prompts: Indices) -> Indices:
    """[n]: the place of each within its run of equal `prompts` [n], from 0."""
    _, first, runs = np.unique(prompts, return_index=True, return_inverse=True)
    places: Indices = np.arange(len(prompts)) - first[runs]
    return places


def _prompts(sizes: Indices) -> Indices:
    """[N]: the number of each candidate's prompt."""
    return np.repeat(np.arange(len(sizes)), sizes)
