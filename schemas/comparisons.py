"""A preference between two responses to one prompt."""

import pyarrow as pa

from schemas.fields import field, schema

SCHEMA = schema(
    "A preference between two responses to one prompt.",
    sort_by=["prompt_id", "comparison_id"],
    fields=[
        field(
            "comparison_id",
            pa.string(),
            "16 hex digits over (prompt_id, chosen_id, rejected_id)",
        ),
        field("prompt_id", pa.string(), "16 hex digits of SHA-256 over (task, NFC prompt)"),
        field("chosen_id", pa.string(), "response_id of the preferred response"),
        field("rejected_id", pa.string(), "response_id of the other response"),
        field("prompt", pa.string(), "prompt text"),
        field("chosen", pa.string(), "the preferred response"),
        field("rejected", pa.string(), "the other response"),
        field("split", pa.string(), "train, validation or test; a prompt is in one only"),
        field("source", pa.string(), "name of the data source the row came from"),
        field(
            "weight",
            pa.float32(),
            "weight of the comparison in training; 1 unless given",
        ),
    ],
)
