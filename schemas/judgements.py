"""One verdict of one judge on two systems' responses to one prompt."""

import pyarrow as pa

from schemas.fields import field, schema

SCHEMA = schema(
    "One verdict of one judge on two systems' responses to one prompt.",
    sort_by=["prompt_id", "system", "opponent", "judge", "sampling"],
    fields=[
        field("prompt_id", pa.string(), "16 hex digits of SHA-256 over (task, NFC prompt)"),
        field("system", pa.string(), "system whose win is counted"),
        field("opponent", pa.string(), "system it is compared with"),
        field("judge", pa.string(), "ranker, gold_ranker, gold or length"),
        field("sampling", pa.string(), "greedy or sampled: the systems' responses"),
        field("verdict", pa.string(), "win, tie or loss of the system"),
        field(
            "probability",
            pa.float64(),
            "judge's probability that the system's response is better",
        ),
    ],
)
