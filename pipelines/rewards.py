"""Columns of scored responses as arrays for the sampler and its kin."""

import numpy as np
import pyarrow as pa

from rso.rejection import Floats, Indices, NonFiniteReward


def finite_rewards(table: pa.Table, stage: str) -> Floats:
    """Return the column `reward` as float64 [n]; raises NonFiniteReward that names a candidate."""
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
    """Return a number from 0 for each text, [n], equal for equal texts."""
    numbers: Indices = texts.combine_chunks().dictionary_encode().indices.to_numpy().astype(np.intp)
    return numbers
