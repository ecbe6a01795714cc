"""An input row that was refused."""

import pyarrow as pa

from schemas.fields import field, schema

SCHEMA = schema(
    "An input row that was refused.",
    sort_by=["source", "line", "field"],
    fields=[
        field("source", pa.string(), "name of the data source the row came from"),
        field("line", pa.int64(), "1-based row number in the source"),
        field("field", pa.string(), "the field at fault; empty for the whole row"),
        field("reason", pa.string(), "why the row was refused"),
        field("raw", pa.string(), "the row as it was read, cut to 2,000 characters"),
    ],
)
