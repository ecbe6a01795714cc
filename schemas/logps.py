"""A response under the reference policy."""

import pyarrow as pa

from schemas.fields import field, schema

SCHEMA = schema(
    "A response under the reference policy.",
    sort_by=["prompt_id", "response_id"],
    fields=[
        field("prompt_id", pa.string(), "16 hex digits of SHA-256 over (task, NFC prompt)"),
        field("response_id", pa.string(), "16 hex digits over (prompt_id, origin, index)"),
        field(
            "logps",
            pa.float64(),
            "log-probability of the response, summed over its tokens",
            unit="nats",
        ),
        field("num_tokens", pa.int32(), "tokens summed over", unit="tokens"),
    ],
)
