"""Synthetic labellers: bounded, deterministic, and not to be won by degenerate answers."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rso import labelling
from rso.errors import UserError
from rso.labelling import label, labeller, summary_quality

PROMPT = (
    "The connection to the server is closed when the last reader has finished. If a reader is "
    "still waiting for data, the call blocks until the data has arrived or the timeout has passed. "
    "A timeout of None waits without limit."
)
GOOD = "Close the server connection after all waiting readers have finished."

texts = st.text(max_size=200)


@given(texts, texts)
def test_summary_quality_is_bounded_and_repeatable(prompt: str, response: str) -> None:
    score = summary_quality(prompt, response)
    assert 0.0 <= score <= 10.0
    assert score == summary_quality(prompt, response)


@pytest.mark.parametrize(
    "degenerate",
    [
        "",
        "...",
        "Connection server closed reader waiting data timeout.",
        "Closed server connection reader finished waiting data timeout passed arrived",
        "The connection the server the reader the data the timeout the call.",
        "Connection connection connection connection connection connection connection.",
        "Close the server connection. Close the server connection. Close the server connection.",
        "The connection to the server is closed when the last reader has finished.",
        PROMPT,
        "Return the value of the object.",
        "Close.",
        "close the server connection after all waiting readers have finished",
    ],
)
def test_summary_quality_degenerate_text_scores_below_a_good_line(degenerate: str) -> None:
    assert summary_quality(PROMPT, degenerate) < summary_quality(PROMPT, GOOD) - 0.5


@pytest.mark.parametrize(
    ("term", "better", "worse"),
    [
        ("content", GOOD, "Open the file given by the name of the user."),
        ("length", GOOD, GOOD.rstrip(".") + " and then wait for it" * 3 + "."),
        ("grammar", GOOD, "Close server connection, waiting readers finished."),
        ("variety", GOOD, "Close the server and the server and the server and the server."),
        ("form", GOOD, GOOD.lower()),
        ("wording", GOOD, "The call blocks until the data has arrived or the timeout has passed."),
        ("opening", GOOD, "Return the server connection after waiting readers have finished."),
    ],
)
def test_quality_terms_each_answers_to_its_own_fault(term: str, better: str, worse: str) -> None:
    terms = [labelling.quality_terms(PROMPT, text) for text in (better, worse)]
    assert getattr(terms[0], term) > getattr(terms[1], term)


def test_summary_quality_opening_that_fits_every_prompt_costs_points() -> None:
    particular = "Close the server connection after the last reader."
    collapsed = "Return the server connection of the last reader."
    assert summary_quality(PROMPT, particular) > summary_quality(PROMPT, collapsed) + 0.5


@pytest.mark.parametrize(
    "opening", ["Return", "Returns", "returning", "A", "The", "Sets", "Setting", "Uses", "Sees"]
)
def test_quality_terms_generic_opening_is_known_in_every_form(opening: str) -> None:
    text = f"{opening} server connection after waiting readers have finished."
    assert labelling.quality_terms(PROMPT, text).opening == labelling.GENERIC_OPENING
    assert labelling.quality_terms(PROMPT, GOOD).opening == 1.0


def test_summary_quality_one_more_word_changes_little() -> None:
    words = GOOD.rstrip(".").split()
    scores = [summary_quality(PROMPT, " ".join(words[:n]) + ".") for n in range(5, len(words) + 1)]
    assert max(abs(a - b) for a, b in pairwise(scores)) < 2.5


def test_coverage_rewards_telegraphic_text_as_is_known() -> None:
    telegraphic = "Connection server closed reader waiting data timeout."
    assert labelling.coverage(PROMPT, telegraphic) > labelling.coverage(PROMPT, GOOD)
    assert labelling.coverage(PROMPT, "x " * 12) == -2.0


def test_chrf_without_target_tells_what_to_do() -> None:
    assert labelling.chrf_to_target(PROMPT, "a line", "a line") == pytest.approx(100.0)
    with pytest.raises(UserError, match="human target"):
        labelling.chrf_to_target(PROMPT, "a line", None)


def test_labeller_unknown_lists_the_known() -> None:
    assert labeller("coverage").score is labelling.coverage
    with pytest.raises(UserError, match="summary_quality, chrf, coverage, length"):
        labeller("covrage")


def test_label_prefers_the_higher_and_leaves_ties() -> None:
    assert (label(2.0, 1.0), label(1.0, 2.0), label(1.0, 1.0)) == ("a", "b", None)
    assert label(1.0, 1.4, min_gap=0.5) is None
