"""Intervals and tests against hand-known figures, scipy and simulation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rso.statistics import (
    bootstrap_mean,
    paired_bootstrap_difference,
    sign_test,
    wilson,
    win_rate,
)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe (1998), table I, method 3.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_of_published_cases_is_as_published(successes, n, low, high) -> None:
    interval = wilson(successes, n)
    assert interval.value == successes / n and interval.n == n
    assert (round(interval.low, 4), round(interval.high, 4)) == (low, high)


@given(st.integers(0, 400), st.integers(1, 200), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_wilson_turned_round_is_mirrored_and_holds_its_value(halves, n, level) -> None:
    successes = min(halves / 2, n)
    here, there = wilson(successes, n, level=level), wilson(n - successes, n, level=level)
    assert (here.low, here.high) == pytest.approx((1 - there.high, 1 - there.low))
    assert 0 <= here.low <= here.value <= here.high <= 1


@given(st.integers(0, 100), st.integers(1, 100))
def test_wilson_of_counts_is_that_of_scipy(successes, n) -> None:
    successes = min(successes, n)
    expected = stats.binomtest(successes, n).proportion_ci(0.9, method="wilson")
    got = wilson(successes, n, level=0.9)
    assert (got.low, got.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (5, 4), (-1, 4), (float("nan"), 4)])
def test_wilson_of_impossible_counts_raises(successes, n) -> None:
    with pytest.raises(ValueError, match=r"wilson: .* successes of"):
        wilson(successes, n)


def test_win_rate_counts_a_tie_as_half() -> None:
    assert win_rate([1, 0.5, 0.5, 0, 1, 1]) == wilson(4, 6)


def test_win_rate_with_half_the_verdicts_ties_covers_at_least_its_level() -> None:
    rng = np.random.default_rng(0)
    intervals = [win_rate(rng.choice([0, 0.5, 1], size=60, p=[0.2, 0.5, 0.3])) for _ in range(400)]
    assert np.mean([i.low <= 0.55 <= i.high for i in intervals]) >= 0.95


def test_win_rate_of_something_else_raises() -> None:
    with pytest.raises(ValueError, match=r"a verdict is 0\.7"):
        win_rate([1.0, 0.7])


def test_bootstrap_mean_covers_the_mean_about_as_often_as_its_level_says() -> None:
    rng = np.random.default_rng(0)
    samples = rng.exponential(size=(400, 50))
    intervals = [bootstrap_mean(s, seed=i, resamples=300) for i, s in enumerate(samples)]
    # Percentile intervals of 50 skewed values cover some 93 %; 400 trials add ±2.5 %.
    assert 0.89 <= np.mean([i.low <= 1 <= i.high for i in intervals]) <= 0.975


def test_bootstrap_mean_of_normal_values_has_the_normal_width() -> None:
    values = np.random.default_rng(1).normal(3, 2, size=400)
    interval = bootstrap_mean(values, seed=0)
    half_width = 1.96 * values.std() / 20
    assert interval.value == values.mean() and interval.n == 400
    assert interval.low == pytest.approx(values.mean() - half_width, abs=0.03)
    assert interval.high == pytest.approx(values.mean() + half_width, abs=0.03)


def test_bootstrap_mean_is_fixed_by_its_seed() -> None:
    values = list(range(30))
    assert bootstrap_mean(values, seed=0) == bootstrap_mean(values, seed=0)
    assert bootstrap_mean(values, seed=0) != bootstrap_mean(values, seed=1)


def test_bootstrap_mean_of_equal_values_is_a_point() -> None:
    assert bootstrap_mean([0.5] * 8, seed=0) == (0.5, 0.5, 0.5, 8)


def test_bootstrap_mean_of_no_values_raises() -> None:
    with pytest.raises(ValueError, match="bootstrap_mean: no values"):
        bootstrap_mean([], seed=0)


def test_paired_bootstrap_difference_cancels_what_prompts_share() -> None:
    rng = np.random.default_rng(0)
    hardness, noise = rng.normal(0, 10, size=100), rng.normal(0, 0.1, size=100)
    interval = paired_bootstrap_difference(hardness + 1 + noise, hardness, seed=0)
    assert 0.9 < interval.low < 1 + noise.mean() < interval.high < 1.1
    swapped = paired_bootstrap_difference(hardness, hardness + 1 + noise, seed=0)
    assert swapped[:3] == pytest.approx((-interval.value, -interval.high, -interval.low))


@pytest.mark.parametrize(
    "compare", [sign_test, lambda a, b: paired_bootstrap_difference(a, b, seed=0)]
)
def test_paired_figures_of_unequal_lengths_raise(compare) -> None:
    with pytest.raises(ValueError, match="2 values against 3"):
        compare([1, 2], [1, 2, 3])


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 5))
def test_sign_test_is_the_binomial_test_of_the_decided(wins, losses, ties) -> None:
    values = [1.0] * wins + [0.0] * losses + [0.5] * ties
    baseline = [0.0] * wins + [1.0] * losses + [0.5] * ties
    decided = wins + losses
    expected = stats.binomtest(wins, decided).pvalue if decided else 1.0
    assert sign_test(values, baseline) == pytest.approx(expected, rel=1e-9)


def test_sign_test_of_many_prompts_is_finite() -> None:
    values = np.r_[np.ones(2_600), np.zeros(2_400)]
    expected = stats.binomtest(2_600, 5_000).pvalue
    assert sign_test(values, 1 - values) == pytest.approx(expected, rel=1e-6)
