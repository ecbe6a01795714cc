"""One figure of the evaluation."""

import pyarrow as pa

from schemas.fields import field, schema

SCHEMA = schema(
    "One figure of the evaluation.",
    sort_by=["system", "opponent", "judge", "sampling", "metric"],
    fields=[
        field("system", pa.string(), "system measured"),
        field(
            "opponent",
            pa.string(),
            "system compared with; empty for a figure of one system",
        ),
        field("judge", pa.string(), "judge; empty where none is involved"),
        field(
            "sampling",
            pa.string(),
            "greedy, sampled or ancestral: the responses measured; empty for human lines",
        ),
        field("metric", pa.string(), "name of the figure"),
        field("value", pa.float64(), "estimate", unit="see metric"),
        field(
            "low",
            pa.float64(),
            "lower end of the 95 % interval; null where none applies",
            nullable=True,
        ),
        field(
            "high",
            pa.float64(),
            "upper end of the 95 % interval; null where none applies",
            nullable=True,
        ),
        field(
            "text",
            pa.string(),
            "words that the figure counts, e.g. the most common opening; null for other figures",
            nullable=True,
        ),
        field("num_prompts", pa.int64(), "prompts behind the figure", unit="prompts"),
    ],
)
