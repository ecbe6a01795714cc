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
            "eq. 7: logit of the ranker preferring this response to the baseline; of several "
            "rankers the weighted mean, in units of `objectives.scale` where standardised",
            unit="nats",
        ),
        field("baseline_id", pa.string(), "response_id of the baseline"),
        field(
            "objectives",
            pa.map_(pa.string(), pa.float32()),
            "reward by each ranker, before weights and scales; null with one ranker as it is",
            unit="nats",
            nullable=True,
        ),
    ],
)
