"""One of the rankers that make up the reward."""

import pyarrow as pa

from schemas.fields import field, schema

SCHEMA = schema(
    "One of the rankers that make up the reward: the sum of weight times its reward over scale.",
    sort_by=["name"],
    fields=[
        field("name", pa.string(), "name of the objective; `ranker` where there is only one"),
        field("weight", pa.float64(), "share in the weighted mean; all sum to 1"),
        field(
            "scale",
            pa.float64(),
            "what its logits are divided by: 1, or the root of the mean variance of its rewards "
            "within a prompt where they are standardised",
            unit="nats",
        ),
        field(
            "ranker",
            pa.string(),
            "`trained` for the ranker of train_ranker, or what the model is, as JSON: the SHA-256 "
            "of its content or its hub commit",
        ),
    ],
)
