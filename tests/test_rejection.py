"""Algorithm 1 against its transcription, draw for draw, and against its exact distribution."""

from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rso import seeds
from rso.rejection import (
    Candidates,
    NonFiniteReward,
    Selection,
    acceptance_probabilities,
    rejection_sample,
    select,
    select_many,
    states_of,
)
from tests.oracles import rejection as oracle

BETAS = st.sampled_from([1e-3, 0.1, 0.5, 1.0, 3.0, 1e6])


class Case(NamedTuple):
    ids: list[str]
    texts: list[str]
    rewards: list[float]
    num_samples: int
    seed: int


@st.composite
def cases(draw: st.DrawFn, is_distinct: bool = False) -> Case:
    """Candidates of one prompt; rewards are quarters, so that shifts are exact and ties occur."""
    size = draw(st.integers(1, 12))
    names = st.integers(0, 10**9).map(str)
    # Few distinct texts, each with one reward, as when identical texts are scored once.
    labels = list(range(size)) if is_distinct else draw(_lists(st.integers(0, 5), size))
    scores = draw(_lists(st.integers(-12, 12).map(lambda quarters: quarters / 4), 12))
    return Case(
        ids=draw(st.lists(names, min_size=size, max_size=size, unique=True)),
        texts=[f"text {label}" for label in labels],
        rewards=[scores[label] for label in labels],
        num_samples=draw(st.integers(0, 14)),
        seed=draw(st.integers(0, 2**40)),
    )


def _lists(elements: st.SearchStrategy, size: int) -> st.SearchStrategy:
    return st.lists(elements, min_size=size, max_size=size)


def _select(case: Case, beta: float, duplicates: str = "keep", prompt_id: str = "p") -> Selection:
    return select(
        case.ids,
        case.texts,
        case.rewards,
        prompt_id=prompt_id,
        beta=beta,
        num_samples=case.num_samples,
        seed=case.seed,
        duplicates=duplicates,
    )


def _accepted(selection: Selection) -> list[int]:
    """Indices in order of acceptance."""
    chosen = np.flatnonzero(selection.position >= 0)
    return chosen[np.argsort(selection.position[chosen])].tolist()


def _walked(case: Case, indices: list[int] | None = None) -> tuple[list[int], np.ndarray]:
    """The order in which `indices` are walked, and their uniforms [pass, walked]."""
    size = len(case.ids)
    states = states_of(seeds.hashes(["p"]), np.array([size]), seeds.hashes(case.ids), case.seed)
    order = sorted(range(size), key=lambda index: (states[index] >> 24, case.ids[index]))
    order = [index for index in order if indices is None or index in indices]
    return order, np.array([seeds.uniforms_at(states[order], round) for round in range(size)])


@given(cases(), BETAS)
def test_select_keeping_copies_is_the_transcription_draw_for_draw(case: Case, beta: float) -> None:
    order, uniforms = _walked(case)
    texts, rewards = [case.texts[i] for i in order], [case.rewards[i] for i in order]
    expected, num_draws = oracle.keep_multiplicity(texts, rewards, uniforms, beta, case.num_samples)

    got = _select(case, beta)

    assert _accepted(got) == [order[place] for place, _ in expected]
    assert got.round[_accepted(got)].tolist() == [round for _, round in expected]
    assert got.num_draws == num_draws
    assert got.num_rounds == 1 + max((round for _, round in expected), default=-1)


@given(cases(), BETAS)
def test_select_collapsing_copies_is_the_listing_draw_for_draw(case: Case, beta: float) -> None:
    first = {
        text: min(i for t, i in zip(case.texts, case.ids, strict=True) if t == text)
        for text in case.texts
    }
    standing = [index for index, text in enumerate(case.texts) if case.ids[index] == first[text]]
    order, uniforms = _walked(case, standing)
    texts, rewards = [case.texts[i] for i in order], [case.rewards[i] for i in order]
    # The listing itself fails where there are too few candidates.
    num_samples = min(case.num_samples, len(standing))
    expected = oracle.conduct_rejection_sampling(texts, rewards, uniforms, beta, num_samples)

    got = _accepted(_select(case, beta, "collapse"))

    assert [case.texts[index] for index in got] == expected
    assert set(got) <= set(standing)


@given(cases(is_distinct=True), BETAS)
def test_select_of_distinct_texts_keeps_and_collapses_equally(case: Case, beta: float) -> None:
    kept, collapsed = _select(case, beta), _select(case, beta, "collapse")
    assert all(np.array_equal(a, b) for a, b in zip(kept, collapsed, strict=True))


@given(cases(), BETAS, st.integers(-40, 40))
def test_select_of_shifted_rewards_changes_nothing(case: Case, beta: float, shift: int) -> None:
    shifted = case._replace(rewards=[reward + shift for reward in case.rewards])
    before, after = _select(case, beta), _select(shifted, beta)
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


@given(cases(), BETAS | st.sampled_from([0.0, np.inf]), st.randoms())
def test_select_of_reordered_candidates_accepts_the_same_ids(case: Case, beta, random) -> None:
    shuffled = list(range(len(case.ids)))
    random.shuffle(shuffled)
    moved = case._replace(
        ids=[case.ids[i] for i in shuffled],
        texts=[case.texts[i] for i in shuffled],
        rewards=[case.rewards[i] for i in shuffled],
    )
    for duplicates in ("keep", "collapse"):
        here, there = _select(case, beta, duplicates), _select(moved, beta, duplicates)
        assert [case.ids[i] for i in _accepted(here)] == [moved.ids[i] for i in _accepted(there)]
        assert np.array_equal(here.acceptance_probability[shuffled], there.acceptance_probability)
        assert here[4:] == there[4:]


@given(cases(), BETAS)
def test_select_accepts_a_maximum_whenever_it_is_drawn(case: Case, beta: float) -> None:
    selection = _select(case._replace(num_samples=99), beta)
    left = set(range(len(case.texts)))
    for round in range(selection.num_rounds):
        best = max(case.rewards[i] for i in left)
        accepted = {case.texts[i] for i in np.flatnonzero(selection.round == round)}
        assert {case.texts[i] for i in left if case.rewards[i] == best} <= accepted
        left = {i for i in left if case.texts[i] not in accepted}
    assert not left


@given(cases(), st.sampled_from(["keep", "collapse"]), BETAS | st.sampled_from([0.0, np.inf]))
def test_select_accepts_distinct_texts_and_counts_the_shortfall(case, duplicates, beta) -> None:
    selection = _select(case, beta, duplicates)
    accepted = [case.texts[i] for i in _accepted(selection)]
    assert len(set(accepted)) == len(accepted)
    assert len(accepted) == min(case.num_samples, len(set(case.texts)))
    assert selection.num_shortfall == case.num_samples - len(accepted)
    assert selection.is_accepted.tolist() == (selection.round >= 0).tolist()
    assert np.all((selection.acceptance_probability >= 0) & (selection.acceptance_probability <= 1))


@given(cases(), st.sampled_from([0.0, 1e-300, 1e-3]))
def test_select_with_no_beta_takes_the_top_k(case: Case, beta: float) -> None:
    accepted = _accepted(_select(case, beta))
    best = sorted({text: r for text, r in zip(case.texts, case.rewards, strict=True)}.values())
    assert [case.rewards[i] for i in accepted] == best[::-1][: case.num_samples]


@given(cases(), st.integers(-12, 12))
def test_select_with_infinite_beta_ignores_rewards(case: Case, quarters: int) -> None:
    other = case._replace(rewards=[quarters / 4] + [-r for r in case.rewards[1:]])
    assert _accepted(_select(case, np.inf)) == _accepted(_select(other, np.inf))


def test_rejection_sample_of_two_is_permute_and_flip() -> None:
    """The lesser of two, of weight q, comes first with probability q / 2 and not q / (1 + q)."""
    q = np.exp(-1.0)
    exact = oracle.outcome_probabilities("ab", [0.0, 0.5], 0.5, 1)
    assert exact["a",] == pytest.approx(q / 2)


def test_rejection_sample_gives_the_indices_of_select_in_order_of_acceptance() -> None:
    rewards = np.linspace(0, 3, 20, dtype=np.float32)
    indices = rejection_sample(
        [str(i) for i in range(20)], rewards, beta=0.5, num_samples=8, seed=1
    )
    assert len(set(indices)) == 8 and all(type(index) is int for index in indices)
    assert indices != sorted(indices)


@given(cases(), BETAS, st.sampled_from(["keep", "collapse"]))
def test_rejection_sample_with_ids_accepts_what_those_ids_draw(case, beta, duplicates) -> None:
    indices = rejection_sample(
        case.texts,
        case.rewards,
        beta=beta,
        num_samples=case.num_samples,
        seed=case.seed,
        ids=case.ids,
        duplicates=duplicates,
    )
    assert indices == _accepted(_select(case, beta, duplicates, prompt_id=""))


def test_rejection_sample_without_ids_collapses_to_first_occurrences() -> None:
    texts = ["x", "y"] * 12
    indices = rejection_sample(
        texts, [0.0] * 24, beta=1.0, num_samples=2, seed=0, duplicates="collapse"
    )
    assert sorted(indices) == [0, 1]


def test_rejection_sample_with_other_seeds_differs() -> None:
    texts = [str(i) for i in range(10)]
    drawn = {
        tuple(rejection_sample(texts, [0.0] * 10, beta=0.5, num_samples=3, seed=seed))
        for seed in (0, 1, 2)
    }
    assert len(drawn) == 3


def test_select_of_other_prompts_draws_differently() -> None:
    case = Case([str(i) for i in range(10)], list("abcdefghij"), [0.0] * 10, 3, 0)
    drawn = {tuple(_accepted(_select(case, 0.5, prompt_id=name))) for name in ("p", "q", "r")}
    assert len(drawn) == 3


def test_select_keeps_multiplicity_in_what_is_accepted_first() -> None:
    """30 copies of 64 carry 30/64 of the proposal mass, collapsed 1/35."""
    texts = ["often"] * 30 + [f"text {i}" for i in range(34)]
    firsts: Counter[str] = Counter()
    for seed in range(400):
        for duplicates in ("keep", "collapse"):
            (first,) = rejection_sample(
                texts, [0.0] * 64, beta=1.0, num_samples=1, seed=seed, duplicates=duplicates
            )
            firsts[duplicates] += texts[first] == "often"
    assert firsts["keep"] / 400 == pytest.approx(30 / 64, abs=0.1)
    assert firsts["collapse"] / 400 == pytest.approx(1 / 35, abs=0.04)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_select_with_a_non_finite_reward_names_prompt_and_candidate(bad: float) -> None:
    case = Case(["r0", "r1", "r2"], list("abc"), [0.0, bad, 1.0], 2, 0)
    with pytest.raises(NonFiniteReward, match=r"prompt 12ab: candidate r1 \(index 1\) has reward"):
        _select(case, 0.5, prompt_id="12ab")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": -1.0}, "beta is -1.0"),
        ({"beta": np.nan}, "beta is nan"),
        ({"num_samples": -1}, "num_samples is -1"),
        ({"duplicates": "drop"}, "duplicates is 'drop'"),
        ({"ids": ["r", "r"]}, "id 'r' stands for several"),
        ({"ids": ["r"]}, "1 ids, 2 texts and 2 rewards"),
    ],
)
def test_rejection_sample_with_arguments_that_do_not_fit_raises(change, message) -> None:
    arguments = {"beta": 0.5, "num_samples": 1, "seed": 0} | change
    with pytest.raises(ValueError, match=message):
        rejection_sample(["a", "b"], [0.0, 1.0], **arguments)


@pytest.mark.parametrize("beta", [0.0, 0.5, np.inf])
def test_rejection_sample_of_no_candidates_accepts_none(beta: float) -> None:
    assert rejection_sample([], [], beta=beta, num_samples=3, seed=0) == []


@pytest.mark.parametrize("beta", [0.0, 1e-320, 0.5, 1e308, np.inf])
def test_select_of_extreme_rewards_is_finite_and_silent(beta: float) -> None:
    case = Case(["0", "1", "2"], list("abc"), [-1.7e308, 0.0, 1.7e308], 3, 0)
    with np.errstate(all="raise", under="ignore"):
        selection = _select(case, beta)
    assert selection.is_accepted.all()
    assert np.isfinite(selection.acceptance_probability).all()


def test_acceptance_probabilities_are_those_of_theorem_1() -> None:
    rewards = [1.0, 2.0, 2.5]
    assert acceptance_probabilities(rewards, 0.5) == pytest.approx([np.exp(-3), np.exp(-1), 1])
    assert acceptance_probabilities(rewards, 0).tolist() == [0, 0, 1]
    assert acceptance_probabilities(rewards, np.inf).tolist() == [1, 1, 1]


def test_select_records_the_probability_of_the_last_pass_in_play() -> None:
    """At beta = 0 the better goes first, then the lesser is the maximum; the least never is."""
    case = Case(["0", "1", "2"], list("abc"), [1.0, 2.0, 0.0], 2, 0)
    assert _select(case, 0.0).acceptance_probability.tolist() == [1, 1, 0]
    declined = _select(case, 0.1)
    assert declined.acceptance_probability[2] == pytest.approx(np.exp(-10))


@given(cases(), BETAS)
def test_select_collapsing_copies_records_one_probability_per_text(case: Case, beta: float) -> None:
    probabilities = _select(case, beta, "collapse").acceptance_probability
    recorded = set(zip(case.texts, probabilities.tolist(), strict=True))
    assert len(recorded) == len(set(case.texts))


@given(st.lists(cases(), min_size=1, max_size=6), BETAS | st.sampled_from([0.0, np.inf]))
def test_select_many_is_select_prompt_by_prompt(several: list[Case], beta: float) -> None:
    several = [case._replace(num_samples=several[0].num_samples, seed=7) for case in several]
    rows = [sorted(range(len(case.ids)), key=case.ids.__getitem__) for case in several]
    sizes = np.array([len(case.ids) for case in several])
    together = Candidates(
        sizes=sizes,
        states=states_of(
            seeds.hashes([f"{place:016x}" for place in range(len(several))]),
            sizes,
            seeds.hashes([c.ids[i] for c, r in zip(several, rows, strict=True) for i in r]),
            seed=7,
        ),
        texts=np.array(
            [int(c.texts[i].split()[1]) for c, r in zip(several, rows, strict=True) for i in r]
        ),
        rewards=np.array([c.rewards[i] for c, r in zip(several, rows, strict=True) for i in r]),
    )
    starts = np.cumsum([0, *together.sizes])
    for duplicates in ("keep", "collapse"):
        found = select_many(
            together,
            beta=beta,
            num_samples=several[0].num_samples,
            duplicates=duplicates,
        )
        for place, (case, row) in enumerate(zip(several, rows, strict=True)):
            alone = _select(case, beta, duplicates, prompt_id=f"{place:016x}")
            mine = slice(starts[place], starts[place + 1])
            for name in ("is_accepted", "round", "position", "acceptance_probability"):
                assert np.array_equal(getattr(found, name)[mine], getattr(alone, name)[row]), name
            for name in ("num_rounds", "num_draws", "num_shortfall"):
                assert getattr(found, name)[place] == getattr(alone, name)


def test_select_many_of_prompts_without_candidates_reports_the_shortfall() -> None:
    empty = np.array([], dtype=np.intp)
    none = Candidates(np.array([0, 0]), empty.astype(np.uint64), empty, empty.astype(np.float64))
    found = select_many(none, beta=0.5, num_samples=3)
    assert found.num_shortfall.tolist() == [3, 3] and found.num_rounds.tolist() == [0, 0]
