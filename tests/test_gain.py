"""The policy gains under the gold, and does not collapse: the promise of the default run."""

from pathlib import Path

import gain
import pytest

from rso.evaluation import POLICY, REFERENCE


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_gains_under_the_gold_and_keeps_its_openings(tmp_path: Path, dtype: str) -> None:
    found = gain.figures(tmp_path, 0, dtype)

    assert found["win_rate"]["low"] > 0.5
    share, distinct = found["top_first_word_share"], found["distinct_first_words"]
    assert share[POLICY] <= share[REFERENCE]
    assert distinct[POLICY] >= distinct[REFERENCE]
