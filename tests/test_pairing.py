"""Who meets whom, and who becomes a target."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rso.pairing import Tournament, first_round, raft_target, rest_targets, tournament
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


def test_tournament_of_five_gives_no_sample_two_byes() -> None:
    bracket = Tournament(list("abcde"), prompt_id="p", seed=0)
    games = bracket.next_round()
    byes = []
    while games:
        met = {index for game in games for index in (game.first, game.second)}
        byes.extend(set(bracket.standing) - met)
        games = bracket.next_round([game.first for game in games])
    assert len(byes) == len(set(byes)) == 2
    assert len(bracket.standing) == 1


@pytest.mark.parametrize("winners", [None, [0], [9, 9]])
def test_next_round_without_the_winners_of_the_last_raises(winners) -> None:
    bracket = Tournament(list("abcd"), prompt_id="12ab", seed=0)
    bracket.next_round()
    with pytest.raises(ValueError, match="prompt 12ab: round 0 has winners"):
        bracket.next_round(winners)


def test_first_round_of_repeated_ids_raises() -> None:
    with pytest.raises(ValueError, match=r"prompt p: ids .* are not distinct"):
        first_round(["a", "a"], prompt_id="p", seed=0)


def test_raft_target_is_the_best_and_among_equals_the_smallest_id() -> None:
    assert raft_target([0.0, 2.0, 1.0], ["a", "b", "c"]) == 1
    assert raft_target([2.0, 2.0, 1.0], ["b", "a", "c"]) == 1


def test_raft_target_of_no_candidates_raises() -> None:
    with pytest.raises(ValueError, match="no candidates"):
        raft_target([], [])


def test_rest_targets_are_those_above_the_normalised_threshold() -> None:
    rewards = [-5.0, 5.0, 2.0, 2.5]  # normalised 0, 1, 0.7, 0.75
    assert rest_targets(rewards) == [1, 3]
    assert rest_targets(rewards, threshold=0.8) == [1]
    assert rest_targets(rewards, threshold=0.0) == [1, 2, 3]


@given(
    st.lists(st.integers(-8, 8).map(float), min_size=1),
    st.integers(-5, 5),
    st.sampled_from([0.5, 1.0, 4.0]),
)
def test_rest_targets_of_scaled_and_shifted_rewards_are_the_same(rewards, shift, scale) -> None:
    assert rest_targets([scale * reward + shift for reward in rewards]) == rest_targets(rewards)


@pytest.mark.parametrize("rewards", [[], [1.5], [2.0, 2.0]])
def test_rest_targets_of_equal_rewards_are_none(rewards) -> None:
    assert rest_targets(rewards) == []


def test_targets_of_non_finite_rewards_raise() -> None:
    with pytest.raises(NonFiniteReward, match=r"raft_target: candidate b \(index 1\)"):
        raft_target([0.0, float("nan")], ["a", "b"])
    with pytest.raises(NonFiniteReward, match="rest_targets: candidate 0"):
        rest_targets([float("inf"), 0.0])
