"""Conversions between Arrow tables and the rows of one shard."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from rso import seeds
from schemas import SCHEMAS

IDS = ["prompt_id", "response_id"]


def table_of(name: str, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Return the rows as a table with the schema `name`."""
    return pa.Table.from_pylist([dict(row) for row in rows], schema=SCHEMAS[name])


def select_ids(table: pa.Table, ids: Sequence[str]) -> pa.Table:
    """Return the rows whose prompt_id is among `ids`, in the order of the table."""
    return table.filter(pc.is_in(table["prompt_id"], value_set=pa.array(list(ids), pa.string())))


def by_prompt(table: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    """Yield each prompt_id with its rows; the table must be sorted by prompt_id, as shards are."""
    ids = table["prompt_id"].to_numpy(zero_copy_only=False)
    if not len(ids):
        return
    starts = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]])
    for start, end in zip(starts, np.r_[starts[1:], len(ids)], strict=True):
        yield str(ids[start]), table.slice(start, end - start)


def prompt_runs(table: pa.Table) -> tuple[pa.Array, npt.NDArray[np.intp]]:
    """Return the distinct prompt_ids of a table and the number of rows of each.

    The table must be sorted by prompt_id, as shards are.
    """
    runs = pc.run_end_encode(table["prompt_id"].combine_chunks())
    ends = runs.run_ends.to_numpy().astype(np.intp)
    return runs.values, np.diff(ends, prepend=0)


def require_same_ids(stage: str, **tables: pa.Table) -> None:
    """Check that two tables, given by their names, hold the same responses in the same order.

    Shards are sorted by their unique ids, so tables with the same ids have the same id columns.

    Raises:
        ValueError: they do not.
    """
    (name, table), (other_name, other) = tables.items()
    if all(table[column].equals(other[column]) for column in IDS):
        return
    shared = table.select(IDS).join(other.select(IDS), IDS, join_type="inner")
    raise ValueError(
        f"{stage}: {len(table)} {name} and {len(other)} {other_name} share {len(shared)} ids,"
        f" expected all: make {name} again from these {other_name}"
    )


def id_hashes(ids: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    """Return `seeds.hashes` of a column of ids; a column of 16-byte ids makes no Python objects."""
    column = ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids
    width = seeds.HEX_DIGITS
    if len(column) and pc.all(pc.equal(pc.binary_length(column), width)).as_py():
        fixed = column.cast(pa.binary()).cast(pa.binary(width))
        start = fixed.offset * width
        data = np.frombuffer(fixed.buffers()[1], dtype=f"S{width}", count=len(fixed), offset=start)
        return seeds.hashes(data)
    return seeds.hashes(column.to_pylist())
