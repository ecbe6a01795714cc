"""Pairs to the reference policy's log-probabilities of their responses."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa

from pipelines.shards import Shard
from pipelines.tables import table_of
from rso import config
from rso.logps import response_logps
from rso.models import load_model, load_tokenizer
from rso.prefix import PrefixRow
from rso.progress import progress
from rso.templates import encode_prompt


class Policy(NamedTuple):
    """A loaded language model and its tokenizer."""

    model: Any
    tokenizer: Any


@dataclass(frozen=True)
class PolicySource:
    """How to load a policy for scoring; picklable, so that it can be sent to workers."""

    model: str
    compute: config.Compute
    templates: config.Templates

    def load(self) -> Policy:
        """Load and return the model, in evaluation mode, and its tokenizer."""
        model = load_model(
            self.model,
            dtype=self.compute.dtype,
            device=self.compute.device,
            attention=self.compute.attention,
        )
        return Policy(model, load_tokenizer(self.model))


@dataclass(frozen=True)
class LogpsShard:
    """`pairs` to `logps`: each response once, and each prompt in one row with its responses."""

    policy: PolicySource

    def setup(self) -> Policy:
        """Load the reference policy."""
        return self.policy.load()

    def __call__(self, policy: Policy, tables: Mapping[str, pa.Table]) -> Shard:
        """Return the log-probabilities of the shard's responses, summed over their tokens, nats."""
        prompts, responses = responses_of(tables["pairs"])
        rows = [
            PrefixRow(
                encode_prompt(policy.tokenizer, self.policy.templates, prompts[prompt_id]),
                list(branches.values()),
            )
            for prompt_id, branches in responses.items()
        ]
        total = sum(len(row.branches) for row in rows)
        with progress("logps", total=total, unit="responses") as bar:
            logps = response_logps(
                policy.model,
                rows,
                token_budget=self.policy.compute.token_budget,
                progress=bar,
            )
        out = [
            {
                "prompt_id": prompt_id,
                "response_id": response_id,
                "logps": value,
                "num_tokens": len(token_ids),
            }
            for (prompt_id, branches), values in zip(responses.items(), logps, strict=True)
            for (response_id, token_ids), value in zip(branches.items(), values, strict=True)
        ]
        return Shard(
            {"logps": table_of("logps", out)},
            {
                "prompts": len(rows),
                "responses": len(out),
                "tokens": sum(
                    len(ids) for branches in responses.values() for ids in branches.values()
                ),
            },
        )


def responses_of(pairs: pa.Table) -> tuple[dict[str, str], dict[str, dict[str, list[int]]]]:
    """Return {prompt_id: prompt} and {prompt_id: {response_id: token ids}} for a pairs table."""
    prompts: dict[str, str] = {}
    responses: dict[str, dict[str, list[int]]] = {}
    for row in pairs.to_pylist():
        prompts[row["prompt_id"]] = row["prompt"]
        branches = responses.setdefault(row["prompt_id"], {})
        for side in ("chosen", "rejected"):
            branches[row[f"{side}_id"]] = row[f"{side}_token_ids"]
    return prompts, responses
