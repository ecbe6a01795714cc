"""Rewards to accepted candidates: statistical rejection sampling, a shard at a time."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipelines.shards import Counters, Shard
from pipelines.tables import hashes, prompt_runs
from rso import config
from rso.rejection import (
    Candidates,
    Diagnostics,
    NonFiniteReward,
    Selections,
    diagnose,
    select_many,
    states_of,
)
from schemas import SCHEMAS

IDS = ("prompt_id", "response_id")
COLUMNS = {"candidates": (*IDS, "response"), "rewards": (*IDS, "reward")}


@dataclass(frozen=True)
class RejectShard:
    """Rewards to `accepted` by algorithm 1; the declined stay in the table."""

    settings: config.Reject
    seed: int

    def setup(self) -> None:
        """Nothing to load."""

    def __call__(self, engine: None, tables: Mapping[str, pa.Table]) -> Shard:
        """Return every candidate with its verdict; rows belong together by their ids."""
        rewards, texts = tables["rewards"], tables["candidates"]
        _check_ids(rewards, texts)
        prompt_ids, sizes = prompt_runs(rewards)
        candidates = Candidates(
            sizes=sizes,
            states=states_of(hashes(prompt_ids), sizes, hashes(rewards["response_id"]), self.seed),
            texts=_numbers(texts["response"]),
            rewards=rewards["reward"].to_numpy().astype(np.float64),
        )
        _check_finite(rewards, candidates)
        selections = select_many(
            candidates,
            beta=self.settings.beta,
            num_samples=self.settings.num_samples,
            duplicates=self.settings.duplicates,
        )
        figures = diagnose(candidates, selections, self.settings.beta)
        return Shard(
            {"accepted": _accepted(rewards, selections)}, _counters(sizes, selections, figures)
        )


def _counters(sizes: np.ndarray, selections: Selections, figures: Diagnostics) -> Counters:
    total: Counters = {
        "prompts": len(sizes),
        "candidates": int(sizes.sum()),
        "accepted": int(selections.is_accepted.sum()),
        "draws": int(selections.num_draws.sum()),
        "rounds": int(selections.num_rounds.sum()),
        "shortfall": int(selections.num_shortfall.sum()),
        "prompts_short": int((selections.num_shortfall > 0).sum()),
        "prompts_with_best": int(figures.has_best.sum()),
    }
    for name in ("reward_gain", "expected_acceptance", "effective_samples", "kl"):
        total[f"{name}_sum"] = float(getattr(figures, name).sum())
    return total


def _numbers(texts: pa.ChunkedArray) -> np.ndarray:
    """Return a number for each text, equal for equal texts."""
    encoded = texts.combine_chunks().dictionary_encode()
    numbers: np.ndarray = encoded.indices.to_numpy().astype(np.intp)
    return numbers


def _check_ids(rewards: pa.Table, candidates: pa.Table) -> None:
    """Shards are sorted by their unique ids, so the same ids make the same columns."""
    if all(rewards[name].equals(candidates[name]) for name in IDS):
        return
    shared = rewards.select(IDS).join(candidates.select(IDS), list(IDS), join_type="inner")
    raise ValueError(
        f"reject: {len(rewards)} rewards and {len(candidates)} candidates share {len(shared)} ids, "
        "expected all: run score again on these candidates"
    )


def _check_finite(rewards: pa.Table, candidates: Candidates) -> None:
    bad = np.flatnonzero(~np.isfinite(candidates.rewards))
    if bad.size:
        row = rewards.slice(int(bad[0]), 1).to_pylist()[0]
        raise NonFiniteReward(
            f"prompt {row['prompt_id']}: candidate {row['response_id']} has reward {row['reward']},"
            f" expected a finite number ({bad.size} rewards of this shard are not): look at the"
            " ranker that scored it"
        )


def _accepted(rewards: pa.Table, selections: Selections) -> pa.Table:
    return pa.Table.from_arrays(
        [
            *(rewards[name] for name in (*IDS, "reward")),
            *(
                pa.array(getattr(selections, name))
                for name in ("is_accepted", "round", "position", "acceptance_probability")
            ),
        ],
        schema=SCHEMAS["accepted"],
    )
