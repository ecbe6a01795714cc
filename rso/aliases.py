"""Names for types that many modules use."""

from typing import Any

import numpy as np
import numpy.typing as npt

Row = dict[str, Any]
"""A row of a dataset: its values by column."""
Counters = dict[str, float]
"""Figures of a shard or a stage by name."""

Bools = npt.NDArray[np.bool_]
Float32s = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]
UInt64s = npt.NDArray[np.uint64]
