"""Digests of the content of an output, not of the layout of its files.

The digest of a dataset covers its shards in order and their rows in order. Row groups, compression
and the version of pyarrow do not change it.
"""

import hashlib
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rso.fingerprint import canonical_json, file_sha256, fingerprint

_FORMAT = 1


def dataset_digest(shards: Iterable[str]) -> str:
    """Return the digest of a dataset from the `table_digest` of each shard, in order."""
    return fingerprint({"kind": "dataset", "format": _FORMAT, "shards": list(shards)})


def table_digest(table: pa.Table) -> str:
    """Return the SHA-256, in hex, of the column names, types and values of a table.

    Each column contributes its validity bits and then its values: numbers little-endian, booleans
    as bits, texts as lengths and UTF-8, lists and maps as lengths and items. The bytes stored under
    a null do not count. All NaN have the same encoding.

    Raises:
        TypeError: a column has a type without an encoding.
    """
    digest = hashlib.sha256()
    names = [[name, _type_name(type_)] for name, type_ in _columns(table)]
    digest.update(canonical_json([_FORMAT, table.num_rows, names]).encode())
    for column in table.columns:
        _update(digest, [chunk for chunk in column.chunks if len(chunk)])
    return digest.hexdigest()


def files_digest(directory: str) -> str:
    """Return the digest of all files below a directory, by relative path and bytes."""
    found: dict[str, str] = {}
    for folder, _, names in os.walk(directory):
        for name in names:
            path = os.path.join(folder, name)
            relative = os.path.relpath(path, directory).replace(os.sep, "/")
            found[relative] = file_sha256(path)
    return fingerprint({"kind": "files", "format": _FORMAT, "files": found})


def _columns(table: pa.Table) -> list[tuple[str, pa.DataType]]:
    return [(field.name, field.type) for field in table.schema]


def _type_name(type_: pa.DataType) -> str:
    """Return our own name of a type; pyarrow's names change between versions."""
    if pa.types.is_string(type_) or pa.types.is_large_string(type_):
        return "string"
    if pa.types.is_binary(type_) or pa.types.is_large_binary(type_):
        return "binary"
    if pa.types.is_boolean(type_):
        return "bool"
    if pa.types.is_integer(type_) or pa.types.is_floating(type_):
        return str(np.dtype(type_.to_pandas_dtype()).name)
    if pa.types.is_map(type_):
        return f"map<{_type_name(type_.key_type)},{_type_name(type_.item_type)}>"
    if pa.types.is_list(type_) or pa.types.is_large_list(type_):
        return f"list<{_type_name(type_.value_type)}>"
    raise TypeError(
        f"a column of type {type_} has no digest; expected texts, bytes, numbers, booleans, lists "
        "or maps: choose one of them in the schema."
    )


def _update(digest: Any, chunks: list[pa.Array]) -> None:
    if not chunks:
        return
    valid = np.concatenate([_valid(chunk) for chunk in chunks])
    digest.update(np.packbits(valid).tobytes())
    type_ = chunks[0].type
    kind = _type_name(type_)
    if kind == "bool":
        values = [np.asarray(pc.fill_null(c, False).to_numpy(zero_copy_only=False)) for c in chunks]
        digest.update(np.packbits(np.concatenate(values)).tobytes())
    elif kind in ("string", "binary"):
        _update_texts(digest, chunks)
    elif kind.startswith(("list<", "map<")):
        _update_lists(digest, chunks, is_map=kind.startswith("map<"))
    else:
        for chunk in chunks:
            digest.update(_numbers(chunk))


def _valid(array: pa.Array) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.asarray(array.is_valid().to_numpy(zero_copy_only=False), dtype=np.bool_)


def _numbers(array: pa.Array) -> bytes:
    zero = pa.scalar(0, array.type) if array.null_count else None
    filled = pc.fill_null(array, zero) if array.null_count else array
    numbers = filled.to_numpy(zero_copy_only=False)
    if numbers.dtype.kind == "f" and np.isnan(numbers).any():
        numbers = np.where(np.isnan(numbers), np.array(np.nan, numbers.dtype), numbers)
    return bytes(numbers.astype(numbers.dtype.newbyteorder("<"), copy=False).tobytes())


def _update_texts(digest: Any, chunks: list[pa.Array]) -> None:
    is_text = pa.types.is_string(chunks[0].type) or pa.types.is_large_string(chunks[0].type)
    large = pa.large_string() if is_text else pa.large_binary()
    empty = pa.scalar("" if is_text else b"", large)
    whole = [pc.fill_null(chunk.cast(large), empty) for chunk in chunks]
    offsets = [_offsets(chunk) for chunk in whole]
    for found in offsets:
        digest.update(np.diff(found).astype("<i8").tobytes())
    for chunk, found in zip(whole, offsets, strict=True):
        data = chunk.buffers()[2]
        if data is not None:
            digest.update(memoryview(data)[int(found[0]) : int(found[-1])])


def _offsets(array: pa.Array) -> np.ndarray[Any, np.dtype[np.int64]]:
    found = np.frombuffer(array.buffers()[1], np.int64)
    return found[array.offset : array.offset + len(array) + 1]


def _update_lists(digest: Any, chunks: list[pa.Array], *, is_map: bool) -> None:
    for chunk in chunks:
        if is_map:
            lengths = np.diff(np.asarray(chunk.offsets.to_numpy(), dtype=np.int64))
        else:
            filled = pc.fill_null(pc.list_value_length(chunk), 0)
            lengths = np.asarray(filled.to_numpy(zero_copy_only=False), dtype=np.int64)
        digest.update(np.where(_valid(chunk), lengths, 0).astype("<i8").tobytes())
    # Drop the nulls first: Arrow may store items under a null.
    present = [chunk.drop_null() for chunk in chunks]
    if is_map:
        spans = [(c, int(c.offsets[0].as_py()), int(c.offsets[-1].as_py())) for c in present]
        _update(digest, [c.keys.slice(a, b - a) for c, a, b in spans if b > a])
        _update(digest, [c.items.slice(a, b - a) for c, a, b in spans if b > a])
    else:
        _update(digest, [f for f in (c.flatten() for c in present) if len(f)])
