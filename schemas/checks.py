"""A comparison that the ranker made in both orders, to see how far it can be trusted."""

import pyarrow as pa

from schemas.fields import field, schema

SCHEMA = schema(
    "A comparison that the ranker made in both orders, to see how far it can be believed.",
    sort_by=["prompt_id", "comparison_id"],
    fields=[
        field("prompt_id", pa.string(), "16 hex digits of SHA-256 over (task, NFC prompt)"),
        field(
            "comparison_id",
            pa.string(),
            "that of `comparisons`; of candidates 16 hex digits over (prompt_id, first_id, "
            "second_id)",
        ),
        field(
            "origin",
            pa.string(),
            "held_out: a comparison of the validation split; candidates: a baseline and a "
            "candidate with another text",
        ),
        field("first_id", pa.string(), "response_id of the chosen response, or of the baseline"),
        field("second_id", pa.string(), "response_id of the other response"),
        field(
            "forward",
            pa.float32(),
            "logit_A - logit_B with the first response in slot A; combined as `rewards.reward` is",
            unit="nats",
        ),
        field(
            "backward",
            pa.float32(),
            "logit_A - logit_B with the second response in slot A",
            unit="nats",
        ),
    ],
)
