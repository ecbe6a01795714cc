"""A scored response."""

import pyarrow as pa

from schemas.fields import field, schema

SCHEMA = schema(
    "A scored response.",
    sort_by=["prompt_id", "response_id"],
    fields=[
        field("prompt_id", pa.string(), "16 hex digits of SHA-256 over (task, NFC prompt)"),
        field("response_id", pa.string(), "16 hex digits over (prompt_id, origin, index)"),
        field(
            "reward",
            pa.float32(),
            "eq. 7: logit of the ranker preferring this response to the baseline",
            unit="nats",
        ),
        field("baseline_id", pa.string(), "response_id of the baseline"),
        field(
            "objectives",
            pa.map_(pa.string(), pa.float32()),
            "rewards per objective where several rankers are combined; null with one",
            unit="nats",
            nullable=True,
        ),
    ],
)
