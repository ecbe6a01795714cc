"""RAFT and ReST as section 5 tells them, one prompt and one candidate at a time."""

from collections.abc import Sequence
from typing import NamedTuple


class Candidate(NamedTuple):
    """A candidate of a prompt."""

    id: str
    text: str
    reward: float


def raft(candidates: Sequence[Candidate]) -> list[str]:
    """Id of the candidate with the highest reward; of several, the smallest."""
    best = candidates[0]
    for candidate in candidates:
        is_higher = candidate.reward > best.reward
        if is_higher or (candidate.reward == best.reward and candidate.id < best.id):
            best = candidate
    return [best.id]


def rest(candidates: Sequence[Candidate], threshold: float, low: float, high: float) -> list[str]:
    """Ids of the distinct texts above `threshold` when `low` and `high` are 0 and 1, best first.

    None where all candidates have one reward.
    """
    if all(candidate.reward == candidates[0].reward for candidate in candidates):
        return []
    seen = set()
    chosen = []
    for candidate in sorted(candidates, key=lambda c: (-c.reward, c.id)):
        if candidate.text in seen:
            continue
        seen.add(candidate.text)
        if (candidate.reward - low) / (high - low) > threshold:
            chosen.append(candidate.id)
    return chosen
