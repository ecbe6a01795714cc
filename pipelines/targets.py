"""Rewards to new targets of supervised fine-tuning (RAFT, ReST), shard by shard."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.rewards import reward_column, text_numbers
from pipelines.shards import Shard
from pipelines.tables import IDS, prompt_runs, require_same_ids
from rso import config
from rso.aliases import Indices
from rso.targets import Bounds, distinct_by_reward, raft_targets, ranks, rest_targets
from schemas import SCHEMAS

TARGET_COLUMNS = {
    "candidates": (*IDS, "response", "finish_reason"),
    "rewards": (*IDS, "reward"),
    "prompts": ("prompt_id", "prompt", "split"),
}


@dataclass(frozen=True)
class TargetShard:
    """Candidates to `demonstrations`; `bounds` are for `normalise: dataset`, otherwise None."""

    settings: config.Targets
    response_prefix: str
    bounds: Bounds | None

    def setup(self) -> None:
        """Nothing to load."""

    def __call__(self, engine: None, tables: Mapping[str, pa.Table]) -> Shard:
        """Return the targets of the shard.

        Every candidate counts as a target, as declined or as a copy of another candidate's text.

        Raises:
            NonFiniteReward: a reward is NaN or infinite.
            ValueError: rewards and candidates hold different responses, or a prompt is missing.
        """
        candidates = tables["candidates"]
        require_same_ids("targets", rewards=tables["rewards"], candidates=candidates)
        rewards = reward_column(tables["rewards"], "targets")
        _, sizes = prompt_runs(candidates)
        texts = text_numbers(candidates["response"])
        if self.settings.method == "raft":
            index = raft_targets(sizes, texts, rewards)
        else:
            index = rest_targets(
                sizes, texts, rewards, threshold=self.settings.threshold, bounds=self.bounds
            )
        num_distinct = len(distinct_by_reward(sizes, texts, rewards))
        chosen = candidates.take(index)
        prompt = np.repeat(np.arange(len(sizes)), sizes)[index]
        return Shard(
            {"demonstrations": self._rows(chosen, tables["prompts"], ranks(prompt))},
            {
                "prompts": len(sizes),
                "prompts_without_targets": len(sizes) - len(np.unique(prompt)),
                "candidates": len(candidates),
                "copies": len(candidates) - num_distinct,
                "declined": num_distinct - len(index),
                "targets": len(index),
                "cut_off": pc.sum(pc.equal(chosen["finish_reason"], "length")).as_py() or 0,
            },
        )

    def _rows(self, chosen: pa.Table, prompts: pa.Table, rank: Indices) -> pa.Table:
        place = pc.index_in(chosen["prompt_id"], value_set=prompts["prompt_id"])
        if place.null_count:
            missing = chosen["prompt_id"].filter(pc.is_null(place))[0]
            raise ValueError(
                f"targets: candidates have prompt {missing}, which prompts have not; expected all:"
                " give the prompts that were decoded"
            )
        prompt = prompts.take(place)
        columns = {
            "prompt_id": chosen["prompt_id"],
            "response_id": chosen["response_id"],
            "prompt": prompt["prompt"],
            "target": self._without_prefix(chosen["response"]),
            "reference_index": pa.array(rank.astype(np.int32)),
            "split": prompt["split"],
            "source": pa.array([self.settings.method] * len(chosen), pa.string()),
        }
        return pa.table(columns, schema=SCHEMAS["demonstrations"])

    def _without_prefix(self, responses: pa.ChunkedArray) -> pa.ChunkedArray:
        """Remove the prefix that decodes have: training adds it before every target."""
        prefix = self.response_prefix
        rest = pc.utf8_slice_codeunits(responses, start=len(prefix))
        return pc.if_else(pc.starts_with(responses, prefix), rest, responses)
