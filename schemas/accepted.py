"""A candidate after statistical rejection sampling."""

import pyarrow as pa

from schemas.fields import field, schema

SCHEMA = schema(
    "A candidate after statistical rejection sampling; the declined are kept too.",
    sort_by=["prompt_id", "response_id"],
    fields=[
        field("prompt_id", pa.string(), "16 hex digits of SHA-256 over (task, NFC prompt)"),
        field("response_id", pa.string(), "16 hex digits over (prompt_id, origin, index)"),
        field("reward", pa.float32(), "reward of eq. 7", unit="nats"),
        field("is_accepted", pa.bool_(), "algorithm 1 accepted the candidate"),
        field("round", pa.int32(), "round (pass) of acceptance, from 0; -1 when declined"),
        field("position", pa.int32(), "order of acceptance, from 0; -1 when declined"),
        field(
            "acceptance_probability",
            pa.float64(),
            "exp((reward - max)/beta) when the candidate was last considered",
        ),
    ],
)
