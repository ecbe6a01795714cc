"""Which responses meet and which become targets (section 5.2); who wins, the ranker says."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from rso import seeds
from rso.rejection import Rewards, finite_rewards


class Game(NamedTuple):
    """Two samples of one prompt that the ranker is to compare."""

    first: int
    """Index into the k samples."""
    second: int
    match_round: int
    """The round of the tournament, from 0."""


class Tournament:
    """Rounds of games between k samples, asked for one at a time so that a ranker can batch them.

    k - 1 games in all. In a round of odd size the last one has a bye and opens the next round,
    so that byes go round. The draw is keyed by (seed, prompt_id) and belongs to the ids.
    """

    def __init__(self, ids: Sequence[str], *, prompt_id: str, seed: int) -> None:
        """Draw the bracket of the samples `ids`, which must be distinct."""
        self._prompt_id = prompt_id
        self._standing = _keyed_order(ids, prompt_id, seed)
        self._games: list[Game] = []
        self._num_rounds = 0

    def next_round(self, winners: Sequence[int] | None = None) -> list[Game]:
        """The next games, given the winner of each game of the last round; [] when one is left.

        `winners` are indices into the samples, in the order of the games; None before round 0.
        """
        if self._games or winners:
            self._advance(winners or [])
        self._games = _games(self._standing, self._num_rounds)
        self._num_rounds += 1
        return list(self._games)

    @property
    def standing(self) -> list[int]:
        """The samples that have not lost, in the order in which they meet."""
        return list(self._standing)

    def _advance(self, winners: Sequence[int]) -> None:
        sides = [(game.first, game.second) for game in self._games]
        if len(winners) != len(sides) or any(
            winner not in side for winner, side in zip(winners, sides, strict=True)
        ):
            raise ValueError(
                f"prompt {self._prompt_id}: round {self._num_rounds - 1} has winners"
                f" {list(winners)}, expected one of each of {sides}: give next_round the winner"
                " of every game of the round before, in their order"
            )
        bye = self._standing[2 * len(sides) :]
        self._standing = [*bye, *winners]


def first_round(ids: Sequence[str], *, prompt_id: str, seed: int) -> list[Game]:
    """k // 2 games between the k samples in keyed random order; an odd one has a bye.

    `first-round-rank`. The draw belongs to the ids: the order of the input does not matter.
    """
    return Tournament(ids, prompt_id=prompt_id, seed=seed).next_round()


def tournament(
    ids: Sequence[str], *, prompt_id: str, seed: int, better: Callable[[int, int], bool]
) -> list[Game]:
    """All k - 1 games of `tournament-rank`, each with its winner as `first`.

    `better(i, j)` says whether sample i is preferred over sample j.
    """
    bracket = Tournament(ids, prompt_id=prompt_id, seed=seed)
    decided: list[Game] = []
    games = bracket.next_round()
    while games:
        played = [game if better(game.first, game.second) else _swapped(game) for game in games]
        decided.extend(played)
        games = bracket.next_round([game.first for game in played])
    return decided


def raft_target(rewards: Rewards, ids: Sequence[str]) -> int:
    """Index of the best candidate, among equals the one with the smallest id (RAFT).

    Raises NonFiniteReward, and ValueError where there is no candidate.
    """
    if len(ids) == 0:
        raise ValueError("raft_target: no candidates, expected at least one: skip the prompt")
    values = finite_rewards(rewards, "raft_target", ids)
    return min(range(len(ids)), key=lambda index: (-values[index], ids[index]))


def rest_targets(rewards: Rewards, threshold: float = 0.7) -> list[int]:
    """Indices of the candidates whose reward, normalised to [0, 1] per prompt, exceeds `threshold`.

    ReST. None when all rewards are equal: there is nothing to normalise by. Raises NonFiniteReward.
    """
    values = finite_rewards(rewards, "rest_targets")
    if values.size == 0 or values.max() == values.min():
        return []
    normalised = (values - values.min()) / (values.max() - values.min())
    return [int(index) for index in np.flatnonzero(normalised > threshold)]


def _keyed_order(ids: Sequence[str], prompt_id: str, seed: int) -> list[int]:
    if len(set(ids)) < len(ids):
        raise ValueError(
            f"prompt {prompt_id}: ids {list(ids)} are not distinct, so their order would depend on"
            " the input: give every sample an id of its own"
        )
    return [int(index) for index in seeds.order(ids, "pairing", seed, prompt_id)]


def _games(standing: Sequence[int], match_round: int) -> list[Game]:
    return [
        Game(first, second, match_round)
        for first, second in zip(standing[0::2], standing[1::2], strict=False)
    ]


def _swapped(game: Game) -> Game:
    return Game(game.second, game.first, game.match_round)
