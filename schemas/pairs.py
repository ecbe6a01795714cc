"""A labelled preference pair for policy training."""

import pyarrow as pa

from schemas.fields import field, schema

SCHEMA = schema(
    "A labelled preference pair for policy training.",
    sort_by=["prompt_id", "pair_id"],
    fields=[
        field(
            "pair_id",
            pa.string(),
            "16 hex digits over (prompt_id, chosen_id, rejected_id)",
        ),
        field("prompt_id", pa.string(), "16 hex digits of SHA-256 over (task, NFC prompt)"),
        field("prompt", pa.string(), "prompt text"),
        field("chosen_id", pa.string(), "response_id of the preferred response"),
        field("rejected_id", pa.string(), "response_id of the other response"),
        field("chosen", pa.string(), "preferred text"),
        field("rejected", pa.string(), "other text"),
        field(
            "chosen_token_ids",
            pa.list_(pa.int32()),
            "tokens of chosen, end of sequence included when generated",
        ),
        field(
            "rejected_token_ids",
            pa.list_(pa.int32()),
            "tokens of rejected, end of sequence included when generated",
        ),
        field(
            "label_probability",
            pa.float32(),
            "ranker's probability that chosen is preferred, both orders averaged in logit space; "
            "1 for direct",
        ),
        field(
            "match_round",
            pa.int32(),
            "round of the tournament; 0 for all other pairs",
        ),
        field("origin", pa.string(), "direct, sft-sample-rank or rso-sample-rank"),
        field("split", pa.string(), "train, validation or test; a prompt is in one only"),
    ],
)
