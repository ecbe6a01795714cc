"""Who meets whom."""

from collections import Counter
from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rso.pairing import (
    Tournament,
    best_vs_random,
    best_vs_worst,
    first_round,
    tournament,
)
from rso.rejection import NonFiniteReward

IDS = st.lists(st.integers(0, 10**6).map(str), max_size=17, unique=True)


@given(IDS)
def test_first_round_pairs_every_sample_once_and_gives_an_odd_one_a_bye(ids) -> None:
    games = first_round(ids, prompt_id="p", seed=0)
    met = [index for game in games for index in (game.first, game.second)]
    assert len(games) == len(ids) // 2
    assert len(set(met)) == len(met) and set(met) <= set(range(len(ids)))
    assert all(game.match_round == 0 for game in games)


@given(IDS, st.randoms())
def test_first_round_of_reordered_ids_has_the_same_games(ids, random) -> None:
    moved = random.sample(ids, len(ids))
    here = first_round(ids, prompt_id="p", seed=4)
    there = first_round(moved, prompt_id="p", seed=4)
    assert [(ids[g.first], ids[g.second]) for g in here] == [
        (moved[g.first], moved[g.second]) for g in there
    ]


def test_first_round_under_other_keys_has_other_games() -> None:
    ids = [str(number) for number in range(12)]
    drawn = {
        tuple(first_round(ids, prompt_id=prompt_id, seed=seed))
        for prompt_id, seed in [("p", 0), ("q", 0), ("p", 1)]
    }
    assert len(drawn) == 3


@given(IDS, st.lists(st.integers(), min_size=17, max_size=17, unique=True))
def test_tournament_has_one_game_less_than_samples_and_the_best_wins(ids, strength) -> None:
    games = tournament(ids, prompt_id="p", seed=0, better=lambda i, j: strength[i] > strength[j])
    assert len(games) == max(len(ids) - 1, 0)
    assert all(strength[game.first] > strength[game.second] for game in games)
    # Each loses once, but for the best, who loses never.
    losers = [game.second for game in games]
    best = set(range(len(ids))) - set(losers)
    assert len(set(losers)) == len(losers)
    assert best == ({max(range(len(ids)), key=strength.__getitem__)} if ids else set())


@given(IDS)
def test_tournament_starts_with_the_first_round(ids) -> None:
    games = tournament(ids, prompt_id="p", seed=3, better=lambda i, j: True)
    assert [g for g in games if g.match_round == 0] == first_round(ids, prompt_id="p", seed=3)


@given(st.integers(0, 70), st.randoms())
def test_tournament_of_any_size_gives_byes_to_odd_rounds_and_no_sample_two(k, random) -> None:
    bracket = Tournament([str(number) for number in range(k)], prompt_id="p", seed=0)
    games = bracket.next_round()
    sizes, byes = [], []
    while games:
        sizes.append(len(bracket.standing))
        met = {index for game in games for index in (game.first, game.second)}
        byes.extend(set(bracket.standing) - met)
        games = bracket.next_round([random.choice(game[:2]) for game in games])
    assert len(bracket.standing) == min(k, 1)
    assert all(after == -(-before // 2) for before, after in pairwise(sizes))
    assert len(byes) == bracket.num_byes == sum(size % 2 for size in sizes)
    assert max(Counter(byes).values(), default=0) <= 1


@pytest.mark.parametrize(("k", "num_byes"), [(1, 0), (3, 1), (5, 2), (6, 1), (8, 0), (17, 4)])
def test_tournament_num_byes_of_some_sizes(k, num_byes) -> None:
    bracket = Tournament([str(number) for number in range(k)], prompt_id="p", seed=0)
    games = bracket.next_round()
    while games:
        games = bracket.next_round([game.first for game in games])
    assert bracket.num_byes == num_byes


@given(st.integers(0, 70))
def test_first_round_leaves_over_the_odd_one_alone(k) -> None:
    bracket = Tournament([str(number) for number in range(k)], prompt_id="p", seed=0)
    games = bracket.next_round()
    assert k == 2 * len(games) + bracket.num_byes + (k == 1)


@pytest.mark.parametrize("winners", [None, [0], [9, 9]])
def test_next_round_without_the_winners_of_the_last_raises(winners) -> None:
    bracket = Tournament(list("abcd"), prompt_id="12ab", seed=0)
    bracket.next_round()
    with pytest.raises(ValueError, match="prompt 12ab: round 0 has winners"):
        bracket.next_round(winners)


def test_first_round_of_repeated_ids_raises() -> None:
    with pytest.raises(ValueError, match=r"prompt p: ids .* are not distinct"):
        first_round(["a", "a"], prompt_id="p", seed=0)


class Samples(NamedTuple):
    ids: list[str]
    texts: list[str]
    rewards: list[float]


@st.composite
def samples(draw: st.DrawFn) -> Samples:
    """Of any number, with copies of texts and with ties; copies have one reward."""
    ids = draw(IDS)
    texts = draw(st.lists(st.sampled_from("abcde"), min_size=len(ids), max_size=len(ids)))
    reward = {text: draw(st.sampled_from([-1.5, 0.0, 2.0])) for text in "abcde"}
    return Samples(ids, texts, [reward[text] for text in texts])


BY_REWARD = {
    "best-vs-worst": best_vs_worst,
    "best-vs-random": lambda *columns, prompt_id: best_vs_random(
        *columns, prompt_id=prompt_id, seed=5
    ),
}


@pytest.mark.parametrize("ranking", BY_REWARD)
@given(given=samples())
def test_by_reward_the_best_meets_one_of_another_text(ranking, given) -> None:
    games = BY_REWARD[ranking](*given, prompt_id="p")
    assert len(games) == (len(set(given.texts)) > 1)
    for first, second, match_round in games:
        top = [i for i, reward in enumerate(given.rewards) if reward == max(given.rewards)]
        assert given.ids[first] == min(given.ids[i] for i in top)
        assert given.texts[first] != given.texts[second]
        assert match_round == 0


@pytest.mark.parametrize("ranking", BY_REWARD)
@given(given=samples(), random=st.randoms())
def test_by_reward_of_reordered_samples_is_the_same_game(ranking, given, random) -> None:
    rows = list(zip(*given, strict=True))
    moved = random.sample(rows, len(rows))
    columns = [list(column) for column in zip(*moved, strict=True)] or [[], [], []]
    here = BY_REWARD[ranking](*given, prompt_id="p")
    there = BY_REWARD[ranking](*columns, prompt_id="p")
    assert [(given.ids[g.first], given.ids[g.second]) for g in here] == [
        (moved[g.first][0], moved[g.second][0]) for g in there
    ]


@given(samples())
def test_best_vs_worst_second_has_the_lowest_reward_and_smallest_id_of_the_others(given) -> None:
    for game in best_vs_worst(*given, prompt_id="p"):
        best = given.texts[game.first]
        others = [row for row in zip(*given, strict=True) if row[1] != best]
        expected = min(others, key=lambda row: (row[2], row[0]))
        assert given.ids[game.second] == expected[0]


def test_best_vs_random_draws_every_other_alike_and_copies_as_often_as_sampled() -> None:
    ids = [f"id{number}" for number in range(6)]
    texts, rewards = list("aabbbc"), [9.0, 9.0, 1.0, 1.0, 1.0, 5.0]
    drawn = Counter(
        best_vs_random(ids, texts, rewards, prompt_id=str(prompt), seed=0)[0].second
        for prompt in range(4000)
    )
    # 1,000 each, with a standard deviation of 27.
    assert drawn.keys() == {2, 3, 4, 5}
    assert all(870 < count < 1130 for count in drawn.values())


@pytest.mark.parametrize("ranking", BY_REWARD)
def test_by_reward_of_non_finite_rewards_raises(ranking) -> None:
    with pytest.raises(NonFiniteReward, match=r"prompt p: candidate b \(index 1\)"):
        BY_REWARD[ranking](["a", "b"], ["x", "y"], [0.0, float("nan")], prompt_id="p")
