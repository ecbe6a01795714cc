"""Columns of scored responses as arrays, for rejection sampling, pairing and targets."""

import numpy as np
import pyarrow as pa

from rso.aliases import Floats, Indices
from rso.rejection import NonFiniteReward


def reward_column(table: pa.Table, stage: str) -> Floats:
    """Return the column `reward` as float64 [n].

    Raises:
        NonFiniteReward: a reward is NaN or infinite; the message names the first such candidate.
    """
    values: Floats = table["reward"].to_numpy().astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        row = table.slice(int(bad[0]), 1).to_pylist()[0]
        raise NonFiniteReward(
            f"{stage}, prompt {row['prompt_id']}: candidate {row['response_id']} has reward"
            f" {row['reward']}, expected a finite number ({bad.size} of this shard are not): look"
            " at the ranker that scored it"
        )
    return values


def text_numbers(texts: pa.ChunkedArray) -> Indices:
    """Return one number per text, from 0, [n]; equal texts have equal numbers."""
    numbers: Indices = texts.combine_chunks().dictionary_encode().indices.to_numpy().astype(np.intp)
    return numbers
