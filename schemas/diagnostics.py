"""The result of statistical rejection sampling for one prompt at one β."""

import pyarrow as pa

from schemas.fields import field, schema

SCHEMA = schema(
    "What statistical rejection sampling made of a prompt at one of the β that were tried.",
    sort_by=["prompt_id", "beta"],
    fields=[
        field("prompt_id", pa.string(), "16 hex digits of SHA-256 over (task, NFC prompt)"),
        field("beta", pa.float64(), "sampling temperature", unit="nats"),
        field("num_candidates", pa.int64(), "candidates, copies of a text included"),
        field("num_accepted", pa.int64(), "accepted candidates"),
        field("num_shortfall", pa.int64(), "samples asked for less those accepted"),
        field("num_rounds", pa.int64(), "passes of algorithm 1"),
        field("num_draws", pa.int64(), "uniforms compared"),
        field("has_best", pa.bool_(), "a candidate with the largest reward is accepted"),
        field(
            "reward_gain",
            pa.float64(),
            "mean reward of the accepted less that of all candidates",
            unit="nats",
        ),
        field(
            "reward_spread",
            pa.float64(),
            "standard deviation of the candidates' rewards",
            unit="nats",
        ),
        field(
            "expected_acceptance",
            pa.float64(),
            "theorem 1: acceptance rate of a draw, with the largest reward of the candidates",
        ),
        field(
            "effective_samples",
            pa.float64(),
            "Kish's effective number of candidates weighted exp(reward/beta)",
        ),
        field(
            "kl",
            pa.float64(),
            "estimate of KL(pi_r || pi_sft) over the candidates; at most ln n",
            unit="nats",
        ),
    ],
)
