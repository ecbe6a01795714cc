"""The policy gains under the gold, and does not collapse: the promise of the default run.

Ten reruns with other seeds, two of them in bfloat16 and two with the kernels of a CPU without AVX,
ended with win rates of 0.79 to 0.92, whose lower ends were 0.73 to 0.88.
"""

from pathlib import Path

import gain
import pytest

from rso.evaluation import POLICY, REFERENCE


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_gains_under_the_gold_and_keeps_its_openings(tmp_path: Path, dtype: str) -> None:
    found = gain.figures(tmp_path, 0, dtype)

    assert found["win_rate"]["low"] > 0.6
    share, distinct = found["top_first_word_share"], found["distinct_first_words"]
    assert share[POLICY] <= share[REFERENCE]
    assert distinct[POLICY] >= distinct[REFERENCE]
