"""Figures of rejection sampling against their definitions, and what is said about them."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rso.diagnostics import (
    beta_for_effective_samples,
    curve,
    diagnose,
    effective_sample_size,
    effective_sample_sizes,
    sampling_advice,
    spreads,
    sums,
    wanted_effective_samples,
)
from rso.rejection import Candidates, acceptance_probabilities, select_many
from tests.test_rejection_statistics import random_candidates


def gaussian(num_prompts: int = 300, size: int = 32, spread: float = 1.0) -> Candidates:
    draw = np.random.default_rng(0)
    return Candidates(
        np.full(num_prompts, size),
        draw.integers(0, 2**64, num_prompts * size, dtype=np.uint64),
        np.tile(np.arange(size), num_prompts),
        draw.normal(0, spread, num_prompts * size),
    )


def totals_of(candidates: Candidates, beta: float, num_samples: int = 8) -> dict[str, float]:
    selections = select_many(candidates, beta=beta, num_samples=num_samples)
    return sums(candidates, selections, diagnose(candidates, selections, beta))


def warned(candidates: Candidates, beta: float, num_samples: int = 8, unit: str = "nats") -> str:
    """What is said where `beta` is set in `unit`."""
    median = float(np.median(spreads(candidates.rewards, candidates.sizes)))
    nats = beta * (median if unit == "spread" else 1.0)
    totals = {b: totals_of(candidates, b, num_samples) for b in (0.0, nats)}
    counters = totals[nats] | {
        "beta_nats": nats,
        "reward_spread_median": median,
        "beta_advised_nats": advised(candidates, num_samples),
    }
    asked = {"beta": beta, "beta_unit": unit, "num_samples": num_samples}
    return " ".join(sampling_advice(curve(totals), counters, **asked))


def advised(candidates: Candidates, num_samples: int = 8) -> float:
    wanted = wanted_effective_samples(num_samples)
    return beta_for_effective_samples(candidates.rewards, candidates.sizes, wanted)


def test_effective_sample_size_at_its_ends() -> None:
    rewards = [0.0, 1.0, 3.0, 3.0]
    assert effective_sample_size(rewards, np.inf) == 4
    assert effective_sample_size(rewards, 0) == 2
    assert effective_sample_size([], 0.5) == 0
    weights = np.exp([0.0, 2.0, 6.0, 6.0])
    expected = weights.sum() ** 2 / (weights**2).sum()
    assert effective_sample_size(rewards, 0.5) == pytest.approx(expected)


@given(
    st.lists(st.integers(-30, 30).map(float), min_size=1), st.floats(0.1, 10), st.integers(-9, 9)
)
def test_effective_sample_size_lies_within_1_and_n_and_ignores_shifts(rewards, beta, shift) -> None:
    size = effective_sample_size(rewards, beta)
    assert 1 - 1e-9 <= size <= len(rewards) + 1e-9
    assert size == effective_sample_size([reward + shift for reward in rewards], beta)


@pytest.mark.parametrize("beta", [0.0, 1e-3, 0.5, 3.0, 1e6, np.inf])
@pytest.mark.parametrize("num_samples", [0, 3, 12])
def test_diagnose_agrees_with_its_definitions(beta: float, num_samples: int) -> None:
    given_ = random_candidates(np.random.default_rng(0), 60)
    is_moderate = np.abs(given_.rewards) < 1e9
    candidates = given_._replace(
        sizes=given_.sizes[given_.sizes > 0], rewards=np.where(is_moderate, given_.rewards, 0.0)
    )
    selections = select_many(candidates, beta=beta, num_samples=num_samples)
    figures = diagnose(candidates, selections, beta)
    start = 0
    for row, size in enumerate(candidates.sizes):
        mine = slice(start, start := start + size)
        rewards, is_accepted = candidates.rewards[mine], selections.is_accepted[mine]
        found = type(figures)(*(field[row] for field in figures))
        kept = rewards[is_accepted]
        weights = acceptance_probabilities(rewards, beta)
        posterior, uniform = weights / weights.sum(), np.full(size, 1 / size)
        assert found.has_best == bool(kept.size and kept.max() == rewards.max())
        assert found.reward_gain == pytest.approx(kept.mean() - rewards.mean() if kept.size else 0)
        assert found.reward_spread == pytest.approx(rewards.std())
        assert spreads(rewards, np.array([size]))[0] == found.reward_spread
        assert found.expected_acceptance == pytest.approx(weights.mean())
        assert found.effective_samples == pytest.approx(effective_sample_size(rewards, beta))
        assert found.kl == pytest.approx(stats.entropy(posterior, uniform), abs=1e-9)


def test_sums_of_shards_add_up_to_those_of_the_whole() -> None:
    whole = gaussian(100)
    parts = [
        Candidates(
            whole.sizes[rows], *(field[rows.start * 32 : rows.stop * 32] for field in whole[1:])
        )
        for rows in (slice(0, 30), slice(30, 100))
    ]
    expected = totals_of(whole, 0.5)
    first, second = (totals_of(part, 0.5) for part in parts)
    assert expected.keys() == first.keys() | second.keys()
    for name, value in expected.items():
        assert first.get(name, 0) + second.get(name, 0) == pytest.approx(value), name
    rounds = [name for name in expected if name.startswith("draws_round_")]
    assert sum(expected[name] for name in rounds) == expected["draws"]
    assert sum(expected[f"accepted_{name[6:]}"] for name in rounds) == expected["accepted"]


def test_curve_falls_from_best_of_n_to_no_selection() -> None:
    candidates = gaussian()
    betas = [0.0, 0.1, 0.5, 2.0, np.inf]
    points = curve({beta: totals_of(candidates, beta) for beta in reversed(betas)})
    assert [point["beta"] for point in points] == betas
    for name in ("reward_gain", "strength", "kl", "has_best"):
        values = [point[name] for point in points]
        assert values == sorted(values, reverse=True), name
    for name in ("expected_acceptance", "effective_samples"):
        values = [point[name] for point in points]
        assert values == sorted(values), name
    assert points[0]["strength"] == 1 and points[0]["has_best"] == 1
    assert points[-1]["strength"] == pytest.approx(0, abs=0.05) and points[-1]["kl"] == 0
    assert points[-1]["acceptance_rate"] == points[-1]["acceptance_rate_round_1"] == 1
    assert points[0]["rounds"] == 8 and points[0]["acceptance_rate_round_8"] > 0


@given(
    st.lists(
        st.lists(st.integers(-20, 20).map(float), min_size=1, max_size=12), min_size=1, max_size=6
    ),
    st.floats(0.02, 0.98),
    st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_beta_for_effective_samples_leaves_that_many(prompts, share, scale) -> None:
    """The oracle is the mean of Kish's number of each prompt."""
    sizes = np.array([len(rewards) for rewards in prompts])
    rewards = scale * np.concatenate([np.array(rewards) for rewards in prompts])

    def mean(beta: float) -> float:
        return np.mean([effective_sample_size(scale * np.array(r), beta) for r in prompts])

    fewest, most = mean(0.0), sizes.mean()
    effective = fewest + share * (most - fewest)
    beta = beta_for_effective_samples(rewards, sizes, effective)
    if fewest == most:
        assert beta == 0.0
    else:
        assert mean(beta) == pytest.approx(effective, rel=1e-5)
    assert beta_for_effective_samples(rewards, sizes, fewest - 0.1) == 0.0
    assert beta_for_effective_samples(rewards, sizes, most + 0.1) == np.inf


def test_effective_sample_sizes_are_those_of_each_prompt() -> None:
    candidates = gaussian(20, size=7)
    found = effective_sample_sizes(candidates.rewards, candidates.sizes, 0.7)
    rows = candidates.rewards.reshape(20, 7)
    assert found == pytest.approx([effective_sample_size(row, 0.7) for row in rows])


def test_advice_is_silent_where_sampling_selects() -> None:
    assert warned(gaussian(), 0.5) == ""


def test_best_of_n_is_said_below_half_as_many_effective_samples_as_are_accepted() -> None:
    candidates = gaussian()
    border = beta_for_effective_samples(candidates.rewards, candidates.sizes, 4.0)
    assert "best-of-N" in warned(candidates, 0.98 * border)
    assert "fewer than 4 where reject.num_samples is 8" in warned(candidates, 0.98 * border)
    assert warned(candidates, 1.02 * border) == ""
    # With one sample two effective ones are the least.
    assert "fewer than 2 where" in warned(candidates, 0.1, num_samples=1)


@pytest.mark.parametrize("beta", [0.01, 100.0])
@pytest.mark.parametrize("unit", ["nats", "spread"])
def test_advised_beta_is_in_the_unit_of_the_setting_and_ends_the_warning(
    beta: float, unit: str
) -> None:
    candidates = gaussian(spread=4.0)
    found = re.search(
        r"Try reject.beta = ([\d.]+), which leaves 8 eff", warned(candidates, beta, unit=unit)
    )
    assert found is not None
    better = float(found[1])
    assert better == pytest.approx(advised(candidates) / (3.93 if unit == "spread" else 1), rel=0.1)
    assert warned(candidates, better, unit=unit) == ""


def test_advice_in_spreads_says_the_nats_too() -> None:
    assert "reject.beta = 0.05 (0.19" in warned(gaussian(spread=4.0), 0.05, unit="spread")


@pytest.mark.parametrize(
    ("spread", "beta", "words"),
    [
        (1.0, 0.01, ["beta = 0.01 is so small", "best-of-N", "Try reject.beta = 0."]),
        (1.0, 100.0, ["beta = 100 is so large", "changes nothing", "Try reject.beta = 0."]),
        (0.0, 0.5, ["the same reward", "Look at the ranker"]),
    ],
)
def test_advice_names_what_to_change(spread: float, beta: float, words: list[str]) -> None:
    found = warned(gaussian(spread=spread), beta)
    assert all(word in found for word in words), found


def test_advice_without_a_beta_that_would_do_names_none() -> None:
    """Eight candidates of two texts cannot be worth more than eight samples."""
    few = gaussian(num_prompts=5, size=8)._replace(texts=np.tile(np.arange(8) // 4, 5))
    found = warned(few, 0.01)
    assert "best-of-N" in found and "Try reject.beta" not in found and "inf" not in found


def test_advice_where_all_candidates_are_accepted_is_to_decode_more() -> None:
    found = warned(gaussian(size=8), 0.5)
    assert "Every candidate was accepted" in found and "Raise decode.num_samples" in found


def test_advice_counts_the_samples_that_are_missing() -> None:
    few = gaussian(num_prompts=5, size=12)._replace(texts=np.zeros(60, dtype=np.intp))
    assert "5 of 5 prompts" in warned(few, 0.5) and "35 samples are missing" in warned(few, 0.5)
