"""Algorithm 1 on very many prompts: draw for draw the oracles', and in distribution as proved."""

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from scipy import stats

from rso import seeds
from rso.rejection import Candidates, Selections, acceptance_probabilities, select_many
from tests.oracles import rejection as oracle

BETAS = [0.0, 1e-300, 1e-3, 0.3, 1.0, 4.0, 1e6, np.inf]


def random_candidates(draw: np.random.Generator, num_prompts: int) -> Candidates:
    """Prompts of 0 to 9 candidates with copies, ties of rewards, of places, and huge rewards."""
    sizes = draw.integers(0, 10, num_prompts)
    size = int(sizes.sum())
    prompt = np.repeat(np.arange(num_prompts), sizes)
    num_texts = draw.integers(1, 13, num_prompts)[prompt]
    states = _states(draw, size)
    # Of some prompts all places in the walk are tied.
    states &= np.where(draw.random(num_prompts) < 0.1, 2**24 - 1, 2**64 - 1).astype(np.uint64)[
        prompt
    ]
    rewards = draw.integers(-8, 9, size) / 4
    rewards *= np.where(draw.random(num_prompts) < 0.05, 1e300, 1.0)[prompt]
    return Candidates(sizes, states, draw.integers(0, num_texts), rewards)


def _states(draw: np.random.Generator, size: int) -> np.ndarray:
    return draw.integers(0, 2**64, size, dtype=np.uint64)


def walks(
    candidates: Candidates, wanted: np.ndarray
) -> Iterator[tuple[int, list[int], list[list[float]]]]:
    """Yield each prompt, the places of its wanted candidates as walked, uniforms [pass][walked]."""
    rounds = range(max(1, candidates.sizes.max(initial=0)))
    uniforms = np.stack([seeds.uniforms_at(candidates.states, number) for number in rounds])
    prompt = np.repeat(np.arange(len(candidates.sizes)), candidates.sizes)
    order = np.lexsort((candidates.states >> np.uint64(24), prompt))
    order = order[wanted[order]]
    counts = np.bincount(prompt[wanted], minlength=len(candidates.sizes))
    ends = np.cumsum(counts)
    for number, (end, count) in enumerate(zip(ends.tolist(), counts.tolist(), strict=True)):
        mine = order[end - count : end]
        yield number, mine.tolist(), uniforms[:, mine].tolist()


def check_keep(candidates: Candidates, beta: float, num_samples: int) -> None:
    found = select_many(candidates, beta=beta, num_samples=num_samples)
    texts, rewards = candidates.texts.tolist(), candidates.rewards.tolist()
    expected = {name: np.full(len(texts), -1) for name in ("round", "position")}
    num_draws = np.zeros(len(candidates.sizes), dtype=int)
    for prompt, mine, uniforms in walks(candidates, np.ones(len(texts), dtype=bool)):
        accepted, num_draws[prompt] = oracle.keep_multiplicity(
            [texts[i] for i in mine], [rewards[i] for i in mine], uniforms, beta, num_samples
        )
        for position, (place, number) in enumerate(accepted):
            expected["round"][mine[place]] = number
            expected["position"][mine[place]] = position
    _check(found, expected)
    assert np.array_equal(found.num_draws, num_draws)


def check_collapse(candidates: Candidates, beta: float, num_samples: int) -> None:
    found = select_many(candidates, beta=beta, num_samples=num_samples, duplicates="collapse")
    texts, rewards = candidates.texts.tolist(), candidates.rewards.tolist()
    prompt = np.repeat(np.arange(len(candidates.sizes)), candidates.sizes)
    _, firsts = np.unique(prompt * 100 + candidates.texts, return_index=True)
    stands = np.zeros(len(texts), dtype=bool)
    stands[firsts] = True
    expected = {"position": np.full(len(texts), -1)}
    for _, mine, uniforms in walks(candidates, stands):
        of_text = {texts[i]: i for i in mine}
        # The listing itself fails where there are too few candidates.
        accepted = oracle.conduct_rejection_sampling(
            list(of_text),
            [rewards[i] for i in mine],
            uniforms,
            beta,
            min(num_samples, len(mine)),
        )
        for position, text in enumerate(accepted):
            expected["position"][of_text[text]] = position
    _check(found, expected)


def _check(found: Selections, expected: dict[str, np.ndarray]) -> None:
    for name, values in expected.items():
        assert np.array_equal(getattr(found, name), values), name
    assert np.array_equal(found.is_accepted, expected["position"] >= 0)


@pytest.mark.parametrize("check", [check_keep, check_collapse])
@pytest.mark.parametrize(
    "num_prompts", [500, pytest.param(60_000, marks=pytest.mark.slow, id="2.4 million in all")]
)
def test_select_many_is_the_oracle_draw_for_draw(check, num_prompts: int) -> None:
    draw = np.random.default_rng(num_prompts)
    for beta in BETAS:
        for num_samples in (0, 1, 2, 4, 12):
            check(random_candidates(draw, num_prompts), beta, num_samples)


def test_select_many_in_any_company_is_the_same() -> None:
    """Neither the other prompts of a shard nor their order change what happens to one."""
    given = random_candidates(np.random.default_rng(1), 3_000)
    starts = np.cumsum(given.sizes) - given.sizes
    chosen = np.random.default_rng(2).permutation(3_000)[:1_500]
    places = np.concatenate([np.arange(starts[p], starts[p] + given.sizes[p]) for p in chosen])
    some = Candidates(given.sizes[chosen], *(field[places] for field in given[1:]))
    for duplicates in ("keep", "collapse"):
        whole, part = (
            select_many(c, beta=0.5, num_samples=3, duplicates=duplicates) for c in (given, some)
        )
        for name in ("is_accepted", "round", "position", "acceptance_probability"):
            assert np.array_equal(getattr(whole, name)[places], getattr(part, name)), name
        for name in ("num_rounds", "num_draws", "num_shortfall"):
            assert np.array_equal(getattr(whole, name)[chosen], getattr(part, name)), name


@pytest.mark.parametrize(
    ("texts", "rewards", "beta", "num_samples"),
    [
        ("abcd", [0.0, 0.3, 0.5, 1.0], 0.5, 2),
        ("aabc", [0.2, 0.2, 0.0, 0.6], 0.5, 2),
        ("aaab", [0.0, 0.0, 0.0, 1.0], 0.5, 1),
        ("abcd", [0.0, 0.3, 0.5, 1.0], np.inf, 2),
    ],
    ids=["distinct", "a copy", "three copies", "uniform"],
)
def test_select_many_has_the_exact_distribution_to_one_percent(
    texts: str, rewards: list[float], beta: float, num_samples: int
) -> None:
    num_trials = 8_000_000
    exact = oracle.outcome_probabilities(texts, rewards, beta, num_samples)
    counts: Counter[tuple[str, ...]] = Counter()
    draw = np.random.default_rng(3)
    numbers = [texts.index(text) for text in texts]
    for _ in range(40):
        num = num_trials // 40
        found = select_many(
            Candidates(
                np.full(num, len(texts)),
                _states(draw, num * len(texts)),
                np.tile(numbers, num),
                np.tile(rewards, num),
            ),
            beta=beta,
            num_samples=num_samples,
        )
        # One number an outcome: the candidate of each position as a digit.
        positions = found.position.reshape(num, len(texts))
        digits = np.argmax(positions[:, :, None] == np.arange(num_samples), axis=1)
        codes = digits @ (10 ** np.arange(num_samples))
        for code, count in zip(*np.unique(codes, return_counts=True), strict=True):
            outcome = tuple(texts[code // 10**place % 10] for place in range(num_samples))
            counts[outcome] += int(count)
    assert counts.keys() <= exact.keys()
    observed = np.array([counts[outcome] for outcome in exact])
    expected = np.array(list(exact.values())) * num_trials
    assert stats.chisquare(observed, expected).pvalue > 1e-4
    # Enough draws to see it if the likeliest outcome were one percent likelier.
    wrong = expected.copy()
    wrong[expected.argmax()] *= 1.01
    wrong *= num_trials / wrong.sum()
    assert stats.chisquare(observed, wrong).pvalue < 1e-4


@pytest.mark.parametrize("beta", [0.25, 0.5, 2.0])
def test_first_pass_accepts_at_the_rate_of_theorem_1(beta: float) -> None:
    num_prompts, size = 20_000, 64
    draw = np.random.default_rng(4)
    rewards = draw.normal(0, 1, (num_prompts, size))
    candidates = Candidates(
        np.full(num_prompts, size),
        _states(draw, num_prompts * size),
        np.tile(np.arange(size), num_prompts),
        rewards.ravel(),
    )
    found = select_many(candidates, beta=beta, num_samples=size)
    # With room for all, the first pass draws once for each candidate.
    assert found.draws_by_round[0] == rewards.size
    rate = np.count_nonzero(found.round == 0) / rewards.size
    chances = acceptance_probabilities(rewards, beta, rewards.max(axis=1, keepdims=True))
    error = np.sqrt((chances * (1 - chances)).sum()) / rewards.size
    assert abs(rate - chances.mean()) < 4 * error < 0.02 * rate


def test_more_candidates_bring_the_accepted_nearer_to_the_optimal_policy() -> None:
    """For r(y) = y and y ~ N(0, 1), π_r is N(1 / β, 1) (eq. 4)."""
    beta, draw = 0.5, np.random.default_rng(5)
    distances = []
    for size in (4, 16, 64, 256):
        num_prompts = 400_000 // size
        rewards = draw.normal(0, 1, num_prompts * size)
        candidates = Candidates(
            np.full(num_prompts, size),
            _states(draw, num_prompts * size),
            np.tile(np.arange(size), num_prompts),
            rewards,
        )
        found = select_many(candidates, beta=beta, num_samples=1)
        sample = rewards[found.is_accepted]
        distances.append(stats.kstest(sample, stats.norm(1 / beta, 1).cdf).statistic)
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.15 < 0.4 < distances[0]
