"""Algorithm 1 as the paper lists it, with its uniforms given, and its exact distribution.

`uniforms[round][i]` is the draw of candidate i in pass `round`; candidates are walked as given.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

Uniforms = Sequence[Sequence[float]]


def acceptance(reward: float, max_reward: float, beta: float) -> float:
    """The probability of the listing, with its limits at the ends."""
    if beta == 0:
        return float(reward == max_reward)
    return 1.0 if math.isinf(beta) else math.exp((reward - max_reward) / beta)


def conduct_rejection_sampling(
    texts: Sequence[str],
    rewards: Sequence[float],
    uniforms: Uniforms,
    beta: float,
    num_samples: int,
) -> list[str]:
    """The listing of appendix A.1: accepted texts, keyed by text."""
    places = {text: place for place, text in enumerate(texts)}
    candidates = dict(zip(texts, rewards, strict=True))
    accepted: list[str] = []
    round = 0
    while len(accepted) < num_samples:
        max_reward = max(candidates.values())
        to_remove = []
        for text, reward in candidates.items():
            u = uniforms[round][places[text]]
            if u >= acceptance(reward, max_reward, beta):
                continue
            accepted.append(text)
            to_remove.append(text)
            if len(accepted) == num_samples:
                break
        for text in to_remove:
            candidates.pop(text)
        round += 1
    return accepted


def keep_multiplicity(
    texts: Sequence[str],
    rewards: Sequence[float],
    uniforms: Uniforms,
    beta: float,
    num_samples: int,
) -> tuple[list[tuple[int, int]], int]:
    """The same with every copy of a text walked, and all of them retired when one is accepted.

    Gives [(candidate, pass)] in order of acceptance, and the number of draws. Ends when the
    candidates run out.
    """
    remaining = list(range(len(texts)))
    accepted: list[tuple[int, int]] = []
    num_draws = 0
    round = 0
    while remaining and len(accepted) < num_samples:
        max_reward = max(rewards[candidate] for candidate in remaining)
        retired: set[str] = set()
        for candidate in remaining:
            if texts[candidate] in retired:
                continue
            num_draws += 1
            if uniforms[round][candidate] >= acceptance(rewards[candidate], max_reward, beta):
                continue
            accepted.append((candidate, round))
            retired.add(texts[candidate])
            if len(accepted) == num_samples:
                break
        remaining = [candidate for candidate in remaining if texts[candidate] not in retired]
        round += 1
    return accepted, num_draws


def outcome_probabilities(
    texts: Sequence[str], rewards: Sequence[float], beta: float, num_samples: int
) -> dict[tuple[str, ...], float]:
    """Exact probability of every ordered outcome of `keep_multiplicity` after a random shuffle."""
    probabilities: dict[tuple[str, ...], float] = defaultdict(float)
    orders = list(itertools.permutations(range(len(texts))))
    for order in orders:
        for outcome, probability in _passes(list(order), (), texts, rewards, beta, num_samples):
            probabilities[outcome] += probability / len(orders)
    return dict(probabilities)


_Outcomes = Iterator[tuple[tuple[str, ...], float]]


def _passes(
    remaining: list[int],
    accepted: tuple[str, ...],
    texts: Sequence[str],
    rewards: Sequence[float],
    beta: float,
    num_samples: int,
) -> _Outcomes:
    remaining = [candidate for candidate in remaining if texts[candidate] not in accepted]
    if not remaining or len(accepted) == num_samples:
        yield accepted, 1.0
        return
    max_reward = max(rewards[candidate] for candidate in remaining)

    def walk(place: int, so_far: tuple[str, ...]) -> _Outcomes:
        if place == len(remaining) or len(so_far) == num_samples:
            yield so_far, 1.0
            return
        candidate = remaining[place]
        if texts[candidate] in so_far:
            yield from walk(place + 1, so_far)
            return
        p = acceptance(rewards[candidate], max_reward, beta)
        for outcome, rest in walk(place + 1, (*so_far, texts[candidate])):
            yield outcome, p * rest
        if p < 1:
            for outcome, rest in walk(place + 1, so_far):
                yield outcome, (1 - p) * rest

    for after, probability in walk(0, accepted):
        for outcome, rest in _passes(remaining, after, texts, rewards, beta, num_samples):
            yield outcome, probability * rest
