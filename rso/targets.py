"""Which candidates become targets of supervised fine-tuning (RAFT, ReST; section 5).

The N candidates of P prompts stand prompt after prompt. The candidates of a prompt are in ascending
order of their ids. `sizes` [P] count the candidates of each prompt, at least one. `texts` [N] are
numbers from 0, equal for equal texts of one prompt. `rewards` [N] are finite. Of the copies of a
text only the one with the highest reward counts; among equal rewards, the one with the smallest id.

Targets are indices into the candidates.
"""

from typing import NamedTuple

import numpy as np

from rso.aliases import Floats, Indices


class Bounds(NamedTuple):
    """The rewards that normalisation maps to 0 (`low`) and to 1 (`high`)."""

    low: float
    high: float


def distinct_by_reward(sizes: Indices, texts: Indices, rewards: Floats) -> Indices:
    """One candidate for each text of each prompt: prompt after prompt, by descending reward."""
    prompt = _prompts(sizes)
    # Stable: among equal rewards the smallest id comes first.
    order = np.lexsort((-rewards, prompt))
    text_of_prompt = prompt[order] * (texts.max(initial=0) + 1) + texts[order]
    _, first = np.unique(text_of_prompt, return_index=True)
    distinct: Indices = order[np.sort(first)]
    return distinct


def raft_targets(sizes: Indices, texts: Indices, rewards: Floats) -> Indices:
    """[P]: the candidate with the highest reward of each prompt (RAFT).

    Among equal rewards the candidate with the smallest id is taken.
    """
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

    The order is prompt after prompt, by descending reward. By default the lowest reward of a prompt
    becomes 0 and its highest 1. `bounds` gives these two rewards for all prompts, for example those
    of a whole dataset. A prompt whose candidates all have one reward has no targets either way: a
    reward only compares responses to one prompt, and none of these is better.
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
    """[n]: the place of each element within its run of equal `prompts` [n], from 0.

    Equal prompts must stand together.
    """
    _, first, runs = np.unique(prompts, return_index=True, return_inverse=True)
    places: Indices = np.arange(len(prompts)) - first[runs]
    return places


def _prompts(sizes: Indices) -> Indices:
    """[N]: the number of each candidate's prompt."""
    return np.repeat(np.arange(len(sizes)), sizes)
