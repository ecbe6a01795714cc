"""A response decoded from the reference policy."""

import pyarrow as pa

from schemas.fields import field, schema

SCHEMA = schema(
    "A response decoded from the reference policy.",
    sort_by=["prompt_id", "response_id"],
    fields=[
        field("prompt_id", pa.string(), "16 hex digits of SHA-256 over (task, NFC prompt)"),
        field("response_id", pa.string(), "16 hex digits over (prompt_id, origin, index)"),
        field(
            "sample_index",
            pa.int32(),
            "index of the sample among the decodes of its prompt",
        ),
        field("response", pa.string(), "decoded text without special tokens, up to the stop text"),
        field(
            "token_ids",
            pa.list_(pa.int32()),
            "generated tokens, end of sequence or stop text included when generated",
        ),
        field("num_tokens", pa.int32(), "length of token_ids", unit="tokens"),
        field(
            "finish_reason",
            pa.string(),
            "stop (end of sequence, or a stop text, was generated) or length",
        ),
        field(
            "cumulative_logp",
            pa.float32(),
            "summed untempered log-probability under the reference; null if the engine gives none",
            unit="nats",
            nullable=True,
        ),
        field("is_baseline", pa.bool_(), "the prompt's baseline y_b of eq. 7"),
    ],
)
