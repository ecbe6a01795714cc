"""Builders of Arrow schemas whose fields carry their meaning and unit in their metadata."""

from collections.abc import Sequence

import pyarrow as pa


def field(
    name: str,
    type_: pa.DataType,
    meaning: str,
    *,
    unit: str | None = None,
    nullable: bool = False,
) -> pa.Field:
    """Return an Arrow field with its meaning and unit in its metadata."""
    metadata = {"meaning": meaning} | ({"unit": unit} if unit else {})
    return pa.field(name, type_, nullable=nullable, metadata=metadata)


def schema(meaning: str, *, sort_by: Sequence[str], fields: Sequence[pa.Field]) -> pa.Schema:
    """Return an Arrow schema whose rows are sorted by `sort_by`, which identifies each row."""
    return pa.schema(list(fields), metadata={"meaning": meaning, "sort_by": ",".join(sort_by)})
