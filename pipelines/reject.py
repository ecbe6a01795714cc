"""Rewards to accepted candidates: statistical rejection sampling, prompt by prompt."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipelines.shards import Counters, Shard
from pipelines.tables import by_prompt
from rso import config
from rso.rejection import (
    Selection,
    acceptance_probabilities,
    effective_sample_size,
    select,
)
from schemas import SCHEMAS


@dataclass(frozen=True)
class RejectShard:
    """Rewards to `accepted` by algorithm 1; the declined stay in the table."""

    settings: config.Reject
    seed: int

    def setup(self) -> None:
        """Nothing to load."""

    def __call__(self, engine: None, tables: Mapping[str, pa.Table]) -> Shard:
        """Return every candidate with its verdict; rows join on ids, never on position."""
        texts = tables["candidates"].select(["prompt_id", "response_id", "response"])
        # Arrow joins no maps, and `objectives` is one.
        rewards = tables["rewards"].select(["prompt_id", "response_id", "reward"])
        joined = rewards.join(texts, ["prompt_id", "response_id"], join_type="inner")
        joined = joined.sort_by([("prompt_id", "ascending"), ("response_id", "ascending")])
        if len(joined) != len(tables["rewards"]) or len(joined) != len(texts):
            raise ValueError(
                f"reject: {len(tables['rewards'])} rewards and {len(texts)} candidates share "
                f"{len(joined)} ids, expected all: run score again on these candidates"
            )
        groups, selections = [], []
        for prompt_id, group in by_prompt(joined):
            groups.append(group)
            selections.append(
                select(
                    group["response_id"].to_pylist(),
                    group["response"].to_pylist(),
                    group["reward"].to_numpy(),
                    prompt_id=prompt_id,
                    beta=self.settings.beta,
                    num_samples=self.settings.num_samples,
                    seed=self.seed,
                    duplicates=self.settings.duplicates,
                )
            )
        return Shard(
            {"accepted": _accepted(joined, selections)}, self._counters(groups, selections)
        )

    def _counters(self, groups: list[pa.Table], selections: list[Selection]) -> Counters:
        total: Counters = {
            "prompts": len(groups),
            "candidates": sum(len(group) for group in groups),
            "accepted": sum(int(selection.is_accepted.sum()) for selection in selections),
            "draws": sum(selection.num_draws for selection in selections),
            "rounds": sum(selection.num_rounds for selection in selections),
            "shortfall": sum(selection.num_shortfall for selection in selections),
            "prompts_short": sum(selection.num_shortfall > 0 for selection in selections),
            "reward_gain_sum": 0.0,
            "expected_acceptance_sum": 0.0,
            "effective_samples_sum": 0.0,
        }
        for group, selection in zip(groups, selections, strict=True):
            rewards = group["reward"].to_numpy().astype(np.float64)
            kept = rewards[selection.is_accepted]
            total["reward_gain_sum"] += float(kept.mean() - rewards.mean())
            # Theorem 1: the expected acceptance rate of a draw from the reference policy.
            probabilities = acceptance_probabilities(rewards, self.settings.beta)
            total["expected_acceptance_sum"] += float(probabilities.mean())
            if 0 < self.settings.beta < np.inf:
                total["effective_samples_sum"] += effective_sample_size(rewards, self.settings.beta)
        return total


def _accepted(joined: pa.Table, selections: list[Selection]) -> pa.Table:
    def column(name: str, dtype: type) -> pa.Array:
        parts = [np.asarray(getattr(selection, name)) for selection in selections]
        return pa.array(np.concatenate([*parts, np.empty(0, dtype)]).astype(dtype))

    return pa.Table.from_arrays(
        [
            joined["prompt_id"],
            joined["response_id"],
            joined["reward"],
            column("is_accepted", np.bool_),
            column("round", np.int32),
            column("position", np.int32),
            column("acceptance_probability", np.float64),
        ],
        schema=SCHEMAS["accepted"],
    )
