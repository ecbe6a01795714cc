"""Text metrics against sacrebleu, plain transcriptions and hand-counted figures."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rso.text_metrics import (
    chrf,
    distinct_first_words,
    distinct_words,
    mean_similarity,
    num_repeated,
    rouge_l,
    top_opening,
)

TEXTS = st.text("ab c\n", max_size=25) | st.text(max_size=15)


@pytest.fixture(scope="module")
def sacrebleu():
    return pytest.importorskip("sacrebleu", reason="sacrebleu, the reference, is not installed")


@given(hypothesis=TEXTS, reference=TEXTS)
@example(hypothesis="Return the list sorted.", reference="Return a sorted list of names.")
@example(hypothesis="", reference="a")
@example(hypothesis="abc", reference="abcdefgh")
def test_chrf_is_that_of_sacrebleu(sacrebleu, hypothesis: str, reference: str) -> None:
    expected = sacrebleu.sentence_chrf(hypothesis, [reference]).score / 100
    assert chrf(hypothesis, reference) == pytest.approx(expected, abs=1e-12)


def test_chrf_of_equal_texts_is_one_and_of_strange_ones_zero() -> None:
    assert chrf("some text", "some  text\n") == 1
    assert chrf("abc", "xyz") == chrf("", "xyz") == chrf("xyz", " ") == 0


def test_chrf_of_two_characters_is_as_counted() -> None:
    """ab against abb: n = 1 gives P 1, R 2/3; n = 2 gives P 1, R 1/2; so P 1, R 7/12."""
    recall = 7 / 12
    assert chrf("ab", "abb") == pytest.approx(5 * recall / (4 + recall))


@pytest.mark.parametrize(
    ("hypothesis", "reference", "expected"),
    [
        ("police killed the gunman", "police kill the gunman", 3 / 4),  # Lin (2004), section 3
        ("police kill the gunman", "the gunman kill police", 2 / 4),
        ("Return the list.", "return THE sorted list", 2 * (3 / 3) * (3 / 4) / (3 / 3 + 3 / 4)),
        ("a b", "c d", 0),
        ("", "a", 0),
        ("...", "...", 0),
    ],
)
def test_rouge_l_of_counted_cases_is_as_counted(hypothesis, reference, expected) -> None:
    assert rouge_l(hypothesis, reference) == pytest.approx(expected)


WORDS = st.lists(st.sampled_from("abc"), max_size=8).map(" ".join)


@given(WORDS, WORDS)
def test_rouge_l_is_symmetric_and_one_only_for_equal_words(ours: str, theirs: str) -> None:
    score = rouge_l(ours, theirs)
    assert score == rouge_l(theirs, ours)
    assert (score == 1) == (ours == theirs != "")


def test_distinct_words_is_types_by_tokens_over_all_texts() -> None:
    assert distinct_words(["The cat", "the dog."]) == 3 / 4
    assert distinct_words(["", "!"]) == 0


ANSWERS = st.lists(st.lists(st.sampled_from(["a", "B", "b", "c."]), max_size=5).map(" ".join))


def words(text: str) -> list[str]:
    """Words of an answer of `ANSWERS`."""
    return text.lower().replace(".", "").split()


@given(ANSWERS.filter(bool), st.integers(1, 3))
def test_top_opening_is_the_most_common_prefix_of_words(texts: list[str], num_words: int) -> None:
    openings = [" ".join(words(text)[:num_words]) for text in texts]
    found = top_opening(texts, num_words)
    assert found.num_texts == openings.count(found.words)
    assert all(openings.count(other) <= found.num_texts for other in openings)
    assert all(openings.count(o) < found.num_texts for o in openings if o < found.words)
    assert top_opening(texts[::-1], num_words) == found


def test_top_opening_looks_at_words_not_at_marks_or_case() -> None:
    texts = ["`Return` the list.", "return THE list", "Return it.", "Read."]
    assert top_opening(texts, 1) == ("return", 3)
    assert top_opening(texts, 3) == ("return the list", 2)
    assert top_opening(["...", "", "a"], 1) == ("", 2)
    assert distinct_first_words([*texts, "..."]) == 2


@given(ANSWERS)
def test_distinct_first_words_is_the_size_of_their_set(texts: list[str]) -> None:
    assert distinct_first_words(texts) == len({w[0] for w in map(words, texts) if w})


@given(ANSWERS)
def test_num_repeated_counts_those_that_have_an_equal(texts: list[str]) -> None:
    plain = [text.lower() for text in texts]
    assert num_repeated(texts) == sum(plain.count(text) > 1 for text in plain)


def test_num_repeated_ignores_case_and_white_space_alone() -> None:
    assert num_repeated(["A  list.", "a list.\n", "a list", "b"]) == 2


@given(ANSWERS.filter(lambda texts: len(texts) > 1))
def test_mean_similarity_is_the_mean_jaccard_index_of_all_pairs(texts: list[str]) -> None:
    pairs = [(set(words(a)), set(words(b))) for a, b in itertools.combinations(texts, 2)]
    expected = [len(a & b) / len(a | b) if a | b else 1.0 for a, b in pairs]
    found = mean_similarity(texts, seed=0)
    assert found == pytest.approx(sum(expected) / len(expected))
    assert found == pytest.approx(mean_similarity(texts[::-1], seed=1))


def test_mean_similarity_of_drawn_pairs_is_keyed_and_near_that_of_all() -> None:
    texts = [f"return the list {i % 7} of {i % 11}" for i in range(300)]
    drawn = [mean_similarity(texts, seed=seed, max_pairs=4000) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] == pytest.approx(mean_similarity(texts, seed=0, max_pairs=10**6), abs=0.02)


def test_mean_similarity_of_drawn_pairs_never_compares_a_text_with_itself() -> None:
    assert mean_similarity(["a", "b", "c", "d"], seed=0, max_pairs=3) == 0


@pytest.mark.parametrize(
    ("figure", "texts", "expected"),
    [
        (lambda texts: top_opening(texts, 1), [], "at least one"),
        (lambda texts: mean_similarity(texts, seed=0), ["a"], "at least two"),
    ],
)
def test_figures_of_too_few_texts_are_refused(
    figure: Callable[[list[str]], Any], texts: list[str], expected: str
) -> None:
    with pytest.raises(ValueError, match=f"expected {expected}: leave out the figure"):
        figure(texts)
