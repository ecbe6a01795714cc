"""Shards: the Parquet files of a dataset, sorted, checked, and either complete or absent."""

import os
import re
from collections.abc import Sequence
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rso.files import write_durably, writing
from schemas import SCHEMAS, check, sort_keys

# Constant, so that the same rows give the same bytes in every run.
ROW_GROUP = 32_768
_SHARD_NAME = re.compile(r"part-(\d{5})-of-(\d{5})\.parquet")


class DuplicateRows(ValueError):
    """Two rows of a shard have the same key."""


class UnreadableShard(ValueError):
    """A shard is missing, or its bytes are not those that were written."""


def shard_name(index: int, num_shards: int) -> str:
    """Return the file name of a shard, e.g. `part-00000-of-00003.parquet`."""
    if not 0 <= index < num_shards <= 99_999:
        raise ValueError(
            f"shard {index} of {num_shards}: expected 0 <= index < num_shards <= 99999"
        )
    return f"part-{index:05d}-of-{num_shards:05d}.parquet"


def write_shard(directory: str, name: str, index: int, num_shards: int, table: pa.Table) -> int:
    """Write the rows of schema `name` as one shard in a local directory; return how many.

    Rows are sorted by the schema's keys, so the same rows give the same bytes. The file appears
    complete or not at all. It replaces an existing shard of the same name.

    Raises:
        SchemaMismatch: the columns, types or nulls are not those of the schema.
        DuplicateRows: two rows have the same key.
        StoreError: the directory is full or cannot be written.
    """
    where = f"{directory}/{shard_name(index, num_shards)}"
    check(table, name, where)
    rows = _sorted(table, name, where)
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink, rows.schema, compression="zstd", compression_level=3, write_page_checksum=True
    ) as writer:
        writer.write_table(rows, row_group_size=ROW_GROUP)
    with writing(directory):
        os.makedirs(directory, exist_ok=True)
        write_durably(where, sink.getvalue())
    return int(rows.num_rows)


def read_shard(
    directory: str,
    name: str,
    index: int,
    num_shards: int,
    columns: Sequence[str] | None = None,
) -> pa.Table:
    """Return the rows of one shard from a directory or URL, with `columns` or all columns.

    Raises:
        UnreadableShard: the file is missing or broken.
        SchemaMismatch: the file does not have schema `name`.
    """
    path = f"{directory.rstrip('/')}/{shard_name(index, num_shards)}"
    table = read_parquet(path, columns)
    schema = SCHEMAS[name]
    names = schema.names if columns is None else list(columns)
    check(table, name, path, columns=columns)
    # Parquet adds field ids to the metadata. Replace it by the schema's own metadata.
    wanted = pa.schema([schema.field(column) for column in names], metadata=schema.metadata)
    return pa.Table.from_arrays(table.select(names).columns, schema=wanted)


def read_parquet(path: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Return the table in the Parquet file at a path or URL, with its page checksums verified.

    The table has all columns, or those of `columns` that the file has.

    Raises:
        UnreadableShard: the file is missing or broken.
    """
    try:
        source = _fetch(path) if "://" in path else path
        # Not `read_table`: it would make columns of folder names such as `a=b`.
        with pq.ParquetFile(source, memory_map=True, page_checksum_verification=True) as parquet:
            return parquet.read(columns=None if columns is None else list(columns))
    except (OSError, pa.ArrowException) as error:
        raise UnreadableShard(
            f"{path}: not a whole Parquet file ({error}); `rso verify` sets the artifact aside and "
            "the next run makes it again."
        ) from error


def has_shard(directory: str, index: int, num_shards: int) -> bool:
    """Say whether a shard was written to a directory or URL."""
    path = f"{directory.rstrip('/')}/{shard_name(index, num_shards)}"
    if "://" in path:
        fs, inner = fsspec.core.url_to_fs(path)
        return bool(fs.exists(inner))
    return os.path.exists(path)


def num_shards(directory: str) -> int:
    """Return how many shards the dataset in a directory or URL has.

    Raises:
        UnreadableShard: there are no shards, some are missing, or two shard counts are mixed.
    """
    return len(complete_shards(_names(directory), directory))


def complete_shards(names: Sequence[str], where: str) -> list[str]:
    """Return the shard names among `names`, in order.

    Raises:
        UnreadableShard: as `num_shards`; the message begins with `where`.
    """
    shards = sorted(name for name in names if _SHARD_NAME.fullmatch(name))
    totals = {int(m[2]) for name in shards if (m := _SHARD_NAME.fullmatch(name))}
    total = max(totals, default=0)
    expected = [shard_name(index, total) for index in range(total)]
    if shards != expected or not shards:
        missing = sorted(set(expected) - set(shards))
        found = f"{len(shards)} files of {sorted(totals)}" if shards else "no part-*.parquet file"
        raise UnreadableShard(
            f"{where}: expected shards 0 to N-1 of one N, found {found}"
            f"{f', {missing[0]} is missing' if missing else ''}; give the folder of a whole "
            "dataset."
        )
    return shards


def _fetch(url: str) -> pa.BufferReader:
    """Return the bytes of a remote file in Arrow's own memory.

    Arrow's threads would call the interpreter to read a Python file. If they do so while the
    interpreter shuts down, the process aborts although its work is done.
    """
    sink = pa.BufferOutputStream()
    with fsspec.open(url, "rb") as file:
        while block := file.read(1 << 20):
            sink.write(block)
    return pa.BufferReader(sink.getvalue())


def _names(directory: str) -> list[str]:
    try:
        if "://" in directory:
            fs, path = fsspec.core.url_to_fs(directory)
            return [str(p).rsplit("/", 1)[-1] for p in fs.ls(path, detail=False)]
        return os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _sorted(table: pa.Table, name: str, where: str) -> pa.Table:
    schema = SCHEMAS[name]
    rows = table.select(schema.names)
    keys = sort_keys(name)
    order = pc.sort_indices(rows.select(keys), sort_keys=[(key, "ascending") for key in keys])
    rows = rows.take(order).combine_chunks()
    _refuse_duplicates(rows, keys, where)
    return pa.Table.from_arrays(rows.columns, schema=schema)


def _refuse_duplicates(rows: pa.Table, keys: Sequence[str], where: str) -> None:
    if rows.num_rows < 2:
        return
    same: Any = None
    for key in keys:
        equal = pc.equal(rows[key].slice(1), rows[key].slice(0, rows.num_rows - 1))
        same = equal if same is None else pc.and_(same, equal)
    at = pc.index(same, True).as_py()
    if at >= 0:
        row = {key: rows[key][at].as_py() for key in keys}
        raise DuplicateRows(
            f"{where}: {pc.sum(same).as_py()} rows repeat the key of another, the first is {row}; "
            f"expected unique ({', '.join(keys)}): remove the duplicates before they are written."
        )
