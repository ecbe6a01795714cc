"""A response decoded for evaluation."""

import pyarrow as pa

from schemas.fields import field, schema

SCHEMA = schema(
    "A response decoded for evaluation.",
    sort_by=["prompt_id", "system", "sampling", "sample_index"],
    fields=[
        field("prompt_id", pa.string(), "16 hex digits of SHA-256 over (task, NFC prompt)"),
        field("response_id", pa.string(), "16 hex digits over (prompt_id, origin, index)"),
        field("system", pa.string(), "policy, reference or another system's name"),
        field("sample_index", pa.int32(), "index of the sample"),
        field(
            "sampling",
            pa.string(),
            "greedy, sampled (`evaluate.sampling`), or ancestral (temperature 1, untruncated; KL)",
        ),
        field("response", pa.string(), "decoded text"),
        field("token_ids", pa.list_(pa.int32()), "generated tokens"),
        field("num_tokens", pa.int32(), "length of token_ids", unit="tokens"),
        field("finish_reason", pa.string(), "stop or length"),
        field(
            "policy_logps",
            pa.float64(),
            "summed log-probability under the policy; null unless computed",
            unit="nats",
            nullable=True,
        ),
        field(
            "reference_logps",
            pa.float64(),
            "summed log-probability under the reference; null unless computed",
            unit="nats",
            nullable=True,
        ),
    ],
)
