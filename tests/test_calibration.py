"""How far a ranker can be believed: reliability, calibration error, bias for a slot, length."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rso import length_bias
from rso.calibration import HeldOut, bias_advice, in_each_order, judge, positional_bias

MARGINS = st.lists(st.floats(-30, 30), min_size=1, max_size=80)


def planted(chosen_lengths: Sequence[int], rejected_lengths: Sequence[int]) -> HeldOut:
    """Comparisons of texts of such lengths, judged by a ranker that likes length alone."""
    excess = [c - r for c, r in zip(chosen_lengths, rejected_lengths, strict=True)]
    return judge([0.1 * e for e in excess], excess)


def test_ranker_that_only_likes_length_is_shown_to() -> None:
    held_out = planted([*range(10, 50), *range(10, 30)], [*([9] * 40), *([60] * 20)])
    assert held_out.accuracy.value == pytest.approx(2 / 3)
    assert [b.accuracy.value for b in held_out.by_length] == [0.0, 1.0, 1.0, 1.0]
    assert held_out.by_length[0].high < 0 < held_out.by_length[1].low
    counters = {
        f"accuracy_where_chosen_is_{side}{edge}": getattr(interval, attribute)
        for side, interval in (
            ("longer", held_out.chosen_longer),
            ("shorter", held_out.chosen_shorter),
        )
        for edge, attribute in (("", "value"), ("_low", "low"), ("_high", "high"))
    }
    sentence = length_bias.length_advice("train_ranker", counters)
    assert sentence is not None and "100% where the chosen text is the longer one" in sentence
    counters["accuracy_where_chosen_is_shorter_high"] = 0.6
    assert length_bias.length_advice("train_ranker", counters) is None
    assert length_bias.length_advice("train_ranker", {}) is None


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=80))
def test_bins_hold_every_comparison_once_and_equal_values_together(lengths) -> None:
    held_out = planted([c for c, _ in lengths], [r for _, r in lengths])
    excess = sorted(c - r for c, r in lengths)
    for bins, values in (
        (held_out.by_length, excess),
        (held_out.by_margin, sorted(0.1 * abs(e) for e in excess)),
    ):
        assert sum(b.accuracy.n for b in bins) == len(lengths)
        for b in bins:
            inside = [v for v in values if b.low - 1e-9 <= v <= b.high + 1e-9]
            assert len(inside) == b.accuracy.n
        assert all(a.high < b.low for a, b in itertools.pairwise(bins))


def believing(factor: float, size: int = 20_000) -> HeldOut:
    """Comparisons decided by margins of which the ranker believes a multiple."""
    draws = np.random.default_rng(0)
    true = draws.normal(0, 1.5, size)
    is_first = draws.random(size) < 1 / (1 + np.exp(-true))
    return judge(factor * np.where(is_first, true, -true), [0] * size)


def test_calibrated_ranker_lies_on_the_diagonal() -> None:
    held_out = believing(1.0)
    assert len(held_out.by_margin) == 10
    for b in held_out.by_margin:
        assert b.accuracy.value == pytest.approx(b.probability, abs=0.035)
    assert held_out.believed == pytest.approx(held_out.accuracy.value, abs=0.01)
    assert held_out.calibration_error < 0.02


@pytest.mark.parametrize(("factor", "is_too_sure"), [(3.0, True), (0.3, False)])
def test_ranker_of_wrong_sureness_lies_off_the_diagonal(factor: float, is_too_sure: bool) -> None:
    held_out, calibrated = believing(factor), believing(1.0)
    assert held_out.accuracy == calibrated.accuracy
    for b in held_out.by_margin[2:]:
        assert (b.probability > b.accuracy.high) == is_too_sure
        assert (b.probability < b.accuracy.low) != is_too_sure
    # In every bin the error has one sign, so the bins hide none of it.
    difference = abs(held_out.believed - held_out.accuracy.value)
    assert held_out.calibration_error == pytest.approx(difference, abs=0.005)
    assert held_out.calibration_error > 0.1
    assert held_out.mean_loss > calibrated.mean_loss


@pytest.mark.parametrize("size", [60, 200, 2_000])
def test_calibration_error_by_chance_is_that_of_calibrated_rankers(size: int) -> None:
    draws = np.random.default_rng(1)
    found = []
    for _ in range(200):
        true = draws.normal(0, 1.0, size)
        is_first = draws.random(size) < 1 / (1 + np.exp(-true))
        found.append(judge(np.where(is_first, true, -true), [0] * size))
    errors = np.mean([f.calibration_error for f in found])
    chance = np.mean([f.calibration_error_by_chance for f in found])
    assert errors == pytest.approx(chance, rel=0.06)


@given(MARGINS)
def test_judge_is_the_plain_sum_over_comparisons(margins: list[float]) -> None:
    held_out = judge(margins, [0] * len(margins))
    believed = [1 / (1 + np.exp(-abs(z))) for z in margins]
    assert held_out.believed == pytest.approx(np.mean(believed))
    losses = [-np.log(1 / (1 + np.exp(-z))) for z in margins]
    assert held_out.mean_loss == pytest.approx(np.mean(losses), abs=1e-9)
    # No binning can make the error smaller than that of all comparisons as one bin.
    whole = abs(held_out.accuracy.value - held_out.believed)
    assert whole - 1e-9 <= held_out.calibration_error <= 1
    for b in held_out.by_margin:
        inside = [z for z in margins if b.low <= abs(z) <= b.high]
        hits = [0.5 if z == 0 else float(z > 0) for z in inside]
        assert b.accuracy.value == pytest.approx(np.mean(hits))
        assert b.probability == pytest.approx(np.mean([1 / (1 + np.exp(-abs(z))) for z in inside]))


@pytest.mark.parametrize("planted_bias", [0.7, -0.7])
def test_positional_bias_is_the_planted_one(planted_bias: float) -> None:
    draws = np.random.default_rng(2)
    preference = draws.normal(0, 1.0, 2_000)
    slot = draws.normal(planted_bias, 0.4, 2_000)
    found = positional_bias(preference + slot, -preference + slot, seed=0)
    assert found.mean.low < planted_bias < found.mean.high
    assert found.mean.high - found.mean.low < 0.05
    assert found.spread == pytest.approx(0.4, abs=0.02)
    # The slot decides where it outweighs the preference.
    assert found.flips.value == np.mean(np.abs(slot) > np.abs(preference))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.floats(-30, 30), st.floats(-30, 30)), min_size=1, max_size=40))
def test_positional_bias_is_the_same_for_swapped_pairs(pairs: list[tuple[float, float]]) -> None:
    z_ab, z_ba = zip(*pairs, strict=True)
    assert positional_bias(z_ab, z_ba, seed=3) == positional_bias(z_ba, z_ab, seed=3)


@settings(max_examples=20, deadline=None)
@given(MARGINS)
def test_positional_bias_of_a_fair_ranker_is_none(margins: list[float]) -> None:
    found = positional_bias(margins, [-z for z in margins], seed=0)
    assert (found.mean.value, found.spread, found.flips.value) == (0, 0, 0)


def test_accuracy_in_each_order_shows_what_the_mean_of_both_hides() -> None:
    draws = np.random.default_rng(4)
    margin, slot = draws.normal(1, 1, 2_000), draws.normal(8, 2, 2_000)
    found = in_each_order(margin + slot, slot - margin)
    assert found.chosen_first.value > 0.99 and found.chosen_second.value < 0.01
    assert found.bias == pytest.approx(slot.mean()) and found.spread == pytest.approx(slot.std())
    assert judge(margin, [0] * 2_000).accuracy.value == np.mean(margin > 0)
    assert found.figures["accuracy_chosen_second_high"] == found.chosen_second.high


@given(st.lists(st.tuples(st.floats(-30, 30), st.floats(-30, 30)), min_size=1, max_size=40))
def test_accuracy_in_each_order_is_the_plain_count(logits: list[tuple[float, float]]) -> None:
    found = in_each_order(*zip(*logits, strict=True))
    first = [0.5 if z == 0 else float(z > 0) for z, _ in logits]
    second = [0.5 if z == 0 else float(z < 0) for _, z in logits]
    assert found.chosen_first.value == pytest.approx(np.mean(first))
    assert found.chosen_second.value == pytest.approx(np.mean(second))
    biases = [(a + b) / 2 for a, b in logits]
    assert found.bias == pytest.approx(np.mean(biases), abs=1e-9)
    assert found.spread == pytest.approx(np.std(biases), abs=1e-9)


@pytest.mark.parametrize(
    ("bias_spread", "reward_spread", "flips", "is_warned_of"),
    [
        (0.5, 1.0, 0.1, False),
        (1.0, 1.0, 1 / 3, False),
        (1.1, 1.0, 0.1, True),
        (0.5, 1.0, 0.34, True),
        (3.7, 2.7, 1.0, True),
    ],
)
def test_bias_advice_speaks_where_a_verdict_is_the_order_s(
    bias_spread: float, reward_spread: float, flips: float, is_warned_of: bool
) -> None:
    counters = {
        "flipped_pairs": 128,
        "positional_bias_spread": bias_spread,
        "verdicts_flipped": flips,
        "reward_spread_sum": 72 * reward_spread,
        "prompts": 72,
    }
    sentence = bias_advice(counters, "baseline-first")
    assert (sentence is not None) == is_warned_of
    if sentence is not None:
        for part in (
            "128 pairs",
            f"a spread of {bias_spread:.2f}",
            f"one of {reward_spread:.2f}",
            f"in {flips:.0%} of",
            "score.orders: both",
            "train_ranker.orders: mean",
            "bias_penalty",
        ):
            assert part in sentence


def test_bias_advice_with_both_orders_does_not_ask_for_them() -> None:
    counters = {"flipped_pairs": 8, "positional_bias_spread": 2.0, "verdicts_flipped": 1.0}
    sentence = bias_advice(counters | {"reward_spread_sum": 1.0, "prompts": 1}, "both")
    assert sentence is not None
    assert "score.orders" not in sentence and "train_ranker.orders: mean" in sentence


def test_bias_advice_without_pairs_says_nothing() -> None:
    counters = {"prompts": 5, "reward_spread_sum": 0.0, "flipped_pairs": 0}
    assert bias_advice(counters, "both") is None
