"""A supervised fine-tuning example."""

import pyarrow as pa

from schemas.fields import field, schema

SCHEMA = schema(
    "A supervised fine-tuning example.",
    sort_by=["prompt_id", "response_id"],
    fields=[
        field("prompt_id", pa.string(), "16 hex digits of SHA-256 over (task, NFC prompt)"),
        field("response_id", pa.string(), "16 hex digits over (prompt_id, origin, index)"),
        field("prompt", pa.string(), "prompt text"),
        field("target", pa.string(), "response to imitate"),
        field(
            "reference_index",
            pa.int32(),
            "0 for the first human response of the prompt, 1 for the next; of RAFT and ReST "
            "targets, 0 for the one with the highest reward",
        ),
        field("split", pa.string(), "train, validation or test; a prompt is in one only"),
        field(
            "source",
            pa.string(),
            "name of the data source the row came from; raft or rest for such targets",
        ),
    ],
)
