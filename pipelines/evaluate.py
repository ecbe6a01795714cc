"""Held-out prompts to generations and judgements: decode, log-probabilities, judge."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa

from pipelines.decode import Decoding, Engine, response_counters
from pipelines.logps import Policy, PolicySource
from pipelines.score import AnyRanker
from pipelines.shards import Shard
from pipelines.tables import select_ids, table_of
from rso import config, ids
from rso.evaluation import ANCESTRAL, judge_by_gold, judge_by_length, judge_by_logits, matches
from rso.labelling import labeller
from rso.logps import response_logps
from rso.prefix import PrefixRow
from rso.progress import progress
from rso.ranking import Comparison, Ranker
from rso.templates import encode_prompt, judged_text


@dataclass(frozen=True)
class GenerateShard:
    """Prompts to `generations` of one system; log-probabilities are left null.

    `decodings` and `prompt_ids` give a decoding and the prompts for each way of sampling.
    """

    decodings: Mapping[str, Decoding]
    system: str
    prompt_ids: Mapping[str, Sequence[str]]

    def setup(self) -> Engine:
        """Load the decoder, which all ways of sampling share."""
        return next(iter(self.decodings.values())).load()

    def __call__(self, engine: Engine, tables: Mapping[str, pa.Table]) -> Shard:
        """Return the generations for the shard's chosen prompts, by every way of sampling."""
        rows = []
        counters = {}
        for sampling, decoding in self.decodings.items():
            prompts = select_ids(tables["prompts"], self.prompt_ids[sampling])
            decoded = decoding.decode(engine, prompts)
            for name, count in response_counters(decoded).items():
                counters[f"{self.system}_{sampling}_{name}"] = count
            rows += [
                self._row(prompt_id, sampling, index, response)
                for prompt_id, responses in zip(
                    prompts["prompt_id"].to_pylist(), decoded, strict=True
                )
                for index, response in enumerate(responses)
            ]
        return Shard({"generations": table_of("generations", rows)}, counters)

    def _row(self, prompt_id: str, sampling: str, index: int, response: Any) -> dict[str, Any]:
        return {
            "prompt_id": prompt_id,
            "response_id": ids.response_id(prompt_id, f"{self.system}-{sampling}", index),
            "system": self.system,
            "sample_index": index,
            "sampling": sampling,
            "response": response.text,
            "token_ids": response.token_ids,
            "num_tokens": len(response.token_ids),
            "finish_reason": response.finish_reason,
            "policy_logps": None,
            "reference_logps": None,
        }


class Policies(NamedTuple):
    """The two models between which the KL is measured."""

    policy: Policy
    reference: Policy


@dataclass(frozen=True)
class MergeShard:
    """Generations of all systems to one table, in which ancestral samples have log-probabilities.

    They are summed over response tokens, nats, under policy and reference.
    """

    policy: PolicySource
    reference: PolicySource

    def setup(self) -> Policies:
        """Load both models."""
        return Policies(self.policy.load(), self.reference.load())

    def __call__(self, policies: Policies, tables: Mapping[str, pa.Table]) -> Shard:
        """Return the shard's generations; each model makes one pass over the ancestral samples."""
        prompts = dict(
            zip(
                tables["prompts"]["prompt_id"].to_pylist(),
                tables["prompts"]["prompt"].to_pylist(),
                strict=True,
            )
        )
        generations = [table for name, table in tables.items() if name != "prompts"]
        rows = [row for table in generations for row in table.to_pylist()]
        ancestral = [row for row in rows if row["sampling"] == ANCESTRAL and row["token_ids"]]
        for name, policy, source in (
            ("policy_logps", policies.policy, self.policy),
            ("reference_logps", policies.reference, self.reference),
        ):
            packed = [
                PrefixRow(
                    encode_prompt(policy.tokenizer, source.templates, prompts[row["prompt_id"]]),
                    [row["token_ids"]],
                )
                for row in ancestral
            ]
            with progress(name, total=len(packed), unit="responses") as bar:
                logps = response_logps(
                    policy.model,
                    packed,
                    token_budget=source.compute.token_budget,
                    progress=bar,
                )
            for row, (value,) in zip(ancestral, logps, strict=True):
                row[name] = value
        return Shard({"generations": table_of("generations", rows)}, {"kl_samples": len(ancestral)})


@dataclass(frozen=True)
class JudgeShard:
    """Greedy and sampled generations to `judgements` by every judge.

    Rankers average both orders. No judge sees `templates.response_prefix` or outer white space.
    Without a `labeller` there is no gold judge.
    """

    rankers: Mapping[str, AnyRanker]
    labeller: str | None
    templates: config.Templates

    def setup(self) -> dict[str, Ranker]:
        """Load the rankers."""
        return {name: source.load() for name, source in self.rankers.items()}

    def __call__(self, rankers: Mapping[str, Ranker], tables: Mapping[str, pa.Table]) -> Shard:
        """Return the shard's verdicts; a prompt without a human target has only some matches."""
        generations = tables["generations"].to_pylist()
        judged = {row["prompt_id"] for row in generations}
        prompts = select_ids(tables["prompts"], sorted(judged)).to_pylist()
        played = matches(generations, prompts)
        comparisons = [Comparison(m.prompt, m.response, m.opponent_response) for m in played]
        # Rankers get the texts unchanged, because they remove the prefix themselves.
        read = matches(as_judged(self.templates, generations), prompts)
        rows = judge_by_length(read)
        for judge, ranker in rankers.items():
            with progress(judge, total=2 * len(played), unit="comparisons") as bar:
                logits = ranker.preference(comparisons, progress=bar)
            rows += judge_by_logits(judge, played, map(float, logits))
        if self.labeller is not None:
            rows += judge_by_gold(labeller(self.labeller), read)
        return Shard(
            {"judgements": table_of("judgements", rows)},
            {
                "prompts": len(prompts),
                "prompts_without_target": sum(row["target"] is None for row in prompts),
                "matches": len(played),
                "judgements": len(rows),
            },
        )


def as_judged(
    templates: config.Templates, generations: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return rows of `generations` whose responses are as judges read them (`judged_text`)."""
    return [{**row, "response": judged_text(templates, row["response"])} for row in generations]
