"""Which responses of a prompt are paired (section 5.2); the ranker decides which one wins."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from rso import seeds
from rso.aliases import Floats
from rso.rejection import RewardsLike, finite_rewards


class Game(NamedTuple):
    """Two samples of one prompt that the ranker compares."""

    first: int
    """Index into the k samples."""
    second: int
    match_round: int
    """The round of the tournament, from 0."""


class Tournament:
    """Rounds of games between k samples of one prompt: k - 1 games in all.

    The caller takes one round at a time, so that a ranker can batch the games of many prompts.

    The first round has k samples. Each later round has half as many, rounded up, until one sample
    is left. In a round of odd size the last sample has a bye: it goes on without a game and stands
    first in the next round, so no sample has two byes. There are no byes if k is a power of two.
    k = 5 has two byes (rounds of 5, 3 and 2). k = 1 has neither a game nor a bye.

    The order of the samples is random. It depends on (seed, prompt_id) and the ids, not on the
    order of the input.
    """

    def __init__(self, ids: Sequence[str], *, prompt_id: str, seed: int) -> None:
        """Draw the order of the samples.

        Raises:
            ValueError: the ids are not distinct.
        """
        self.num_byes = 0
        """Byes in the rounds that `next_round` has returned."""
        self._prompt_id = prompt_id
        self._standing = _keyed_order(ids, prompt_id, seed)
        self._games: list[Game] = []
        self._num_rounds = 0

    def next_round(self, winners: Sequence[int] | None = None) -> list[Game]:
        """The games of the next round; [] when at most one sample is left.

        `winners` are the winners of the round before: indices into the samples, in the order of its
        games. Give None for the first round.

        Raises:
            ValueError: there is not one winner for each game, or a winner did not play the game.
        """
        if self._games or winners:
            self._advance(winners or [])
        self._games = _games(self._standing, self._num_rounds)
        self._num_rounds += 1
        if self._games:
            self.num_byes += len(self._standing) % 2
        return list(self._games)

    @property
    def standing(self) -> list[int]:
        """Indices of the samples that have not lost; neighbours play, two by two."""
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
    """k // 2 games between k samples in keyed random order (`first-round-rank`).

    For odd k the last sample has a bye and is in no pair. The order depends on the ids, not on the
    order of the input.

    Raises:
        ValueError: the ids are not distinct.
    """
    return Tournament(ids, prompt_id=prompt_id, seed=seed).next_round()


def tournament(
    ids: Sequence[str], *, prompt_id: str, seed: int, better: Callable[[int, int], bool]
) -> list[Game]:
    """All k - 1 games of `tournament-rank`, each with its winner as `first`.

    `better(i, j)` says whether sample i is preferred over sample j. Byes are as in `Tournament`.

    Raises:
        ValueError: the ids are not distinct.
    """
    bracket = Tournament(ids, prompt_id=prompt_id, seed=seed)
    decided: list[Game] = []
    games = bracket.next_round()
    while games:
        played = [game if better(game.first, game.second) else _swapped(game) for game in games]
        decided.extend(played)
        games = bracket.next_round([game.first for game in played])
    return decided


def best_vs_worst(
    ids: Sequence[str], texts: Sequence[str], rewards: RewardsLike, *, prompt_id: str
) -> list[Game]:
    """One game: the sample with the highest reward, as `first`, against that with the lowest.

    Among equal rewards the sample with the smallest id is taken. The second sample is one with
    another text than the first; if there is none, the result is []. The other k - 2 samples are in
    no pair.

    Raises:
        NonFiniteReward: a reward is NaN or infinite.
    """
    values = finite_rewards(rewards, f"prompt {prompt_id}", ids)
    best, others = _best_and_others(ids, texts, values)
    if not others:
        return []
    return [Game(best, min(others, key=lambda index: (values[index], ids[index])), 0)]


def best_vs_random(
    ids: Sequence[str], texts: Sequence[str], rewards: RewardsLike, *, prompt_id: str, seed: int
) -> list[Game]:
    """One game: the sample with the highest reward, as `first`, against one drawn by key.

    Among equal rewards the sample with the smallest id is the best. The second sample is drawn from
    those with another text than the best; if there is none, the result is []. Each of them is
    equally likely, so a text with three copies is three times as likely. The draw depends on the
    ids, not on the order of the input.

    Raises:
        NonFiniteReward: a reward is NaN or infinite.
        ValueError: the ids are not distinct.
    """
    values = finite_rewards(rewards, f"prompt {prompt_id}", ids)
    best, others = _best_and_others(ids, texts, values)
    drawn = [index for index in _keyed_order(ids, prompt_id, seed) if index in others]
    return [Game(best, index, 0) for index in drawn[:1]]


def _best_and_others(
    ids: Sequence[str], texts: Sequence[str], values: Floats
) -> tuple[int, set[int]]:
    """The best sample (-1 if there are no samples), and the samples with another text."""
    best = min(range(len(ids)), key=lambda index: (-values[index], ids[index]), default=-1)
    return best, {index for index, text in enumerate(texts) if text != texts[best]}


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
