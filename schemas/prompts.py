"""A prompt to decode."""

import pyarrow as pa

from schemas.fields import field, schema

SCHEMA = schema(
    "A prompt to decode.",
    sort_by=["prompt_id"],
    fields=[
        field("prompt_id", pa.string(), "16 hex digits of SHA-256 over (task, NFC prompt)"),
        field("prompt", pa.string(), "prompt text, as given"),
        field(
            "target",
            pa.string(),
            "first human response; null where none is known",
            nullable=True,
        ),
        field("split", pa.string(), "train, validation or test; a prompt is in one only"),
        field("source", pa.string(), "name of the data source the row came from"),
    ],
)
