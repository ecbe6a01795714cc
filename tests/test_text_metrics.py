"""Text metrics against sacrebleu and hand-counted figures."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rso.text_metrics import chrf, distinct_words, rouge_l

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
