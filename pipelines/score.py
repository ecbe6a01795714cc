"""Candidates to rewards: each against its prompt's baseline (eq. 7), by one ranker or several."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipelines.shards import Shard
from pipelines.tables import IDS, by_prompt, require_same_ids
from rso import config
from rso.objectives import weighted_sum
from rso.progress import progress
from rso.ranking import Candidates, Ranker, WeightedRanker, load_ranker
from schemas import SCHEMAS


@dataclass(frozen=True)
class RankerSource:
    """How to load a ranker; picklable, so that workers can."""

    model: str
    compute: config.Compute
    templates: config.Templates

    def load(self) -> Ranker:
        """Return the ranker, loaded."""
        return load_ranker(
            self.model,
            self.templates,
            dtype=self.compute.dtype,
            token_budget=self.compute.token_budget,
            device=self.compute.device,
            attention=self.compute.attention,
        )


@dataclass(frozen=True)
class WeightedSource:
    """How to load several rankers as one, each with its factor; picklable."""

    rankers: Sequence[RankerSource]
    factors: Sequence[float]

    def load(self) -> Ranker:
        """Return the weighted sum of the rankers, all of them loaded."""
        return WeightedRanker([source.load() for source in self.rankers], self.factors)


AnyRanker = RankerSource | WeightedSource


@dataclass(frozen=True)
class ScoreShard:
    """Candidates to `rewards`: baseline in slot A, candidate in slot B, logit_B - logit_A."""

    ranker: RankerSource

    def setup(self) -> Ranker:
        """Load the ranker."""
        return self.ranker.load()

    def __call__(self, ranker: Ranker, tables: Mapping[str, pa.Table]) -> Shard:
        """Return the rewards of the shard's candidates; every prompt has exactly one baseline."""
        candidates = tables["candidates"]
        prompts = dict(
            zip(
                tables["prompts"]["prompt_id"].to_pylist(),
                tables["prompts"]["prompt"].to_pylist(),
                strict=True,
            )
        )
        scored, baseline_ids = [], []
        for prompt_id, group in by_prompt(candidates):
            responses = group["response"].to_pylist()
            (baseline,) = np.flatnonzero(group["is_baseline"].to_numpy(zero_copy_only=False))
            baseline_ids += [group["response_id"][int(baseline)].as_py()] * len(group)
            scored.append(Candidates(prompts[prompt_id], responses[int(baseline)], responses))
        with progress("score", total=len(candidates), unit="responses") as bar:
            rewards = ranker.rewards_many(scored, progress=bar)
        flat = np.concatenate([*rewards, np.empty(0, np.float32)]).astype(np.float32)
        table = pa.Table.from_arrays(
            [
                candidates["prompt_id"],
                candidates["response_id"],
                pa.array(flat),
                pa.array(baseline_ids, pa.string()),
                pa.nulls(len(flat), SCHEMAS["rewards"].field("objectives").type),
            ],
            schema=SCHEMAS["rewards"],
        )
        distinct = sum(len(set(one.responses)) for one in scored)
        return Shard(
            {"rewards": table},
            {
                "prompts": len(scored),
                "responses": len(candidates),
                "scored_once_for_copies": len(candidates) - distinct,
                "reward_sum": float(flat.astype(np.float64).sum()),
                "reward_spread_sum": float(sum(np.std(r.astype(np.float64)) for r in rewards)),
                "reward_variance_sum": float(sum(np.var(r.astype(np.float64)) for r in rewards)),
            },
        )


def scored_by(name: str) -> str:
    """Return the name of the table of rewards by the objective `name`."""
    return f"score_{name}"


@dataclass(frozen=True)
class CombineShard:
    """The `rewards` by each objective to those of the run: sums with `factors`, by name."""

    factors: Mapping[str, float]

    def setup(self) -> None:
        """Nothing to load."""

    def __call__(self, engine: None, tables: Mapping[str, pa.Table]) -> Shard:
        """Return the combined rewards, with those by each objective beside them."""
        found = {scored_by(name): tables[scored_by(name)] for name in self.factors}
        for name, table in found.items():
            require_same_ids("score", **{name: table, "candidates": tables["candidates"]})
        rewards = [table["reward"].to_numpy() for table in found.values()]
        size, number = len(tables["candidates"]), len(rewards)
        by_name = pa.MapArray.from_arrays(
            pa.array(np.arange(0, (size + 1) * number, number), pa.int32()),
            pa.array(list(self.factors) * size, pa.string()),
            pa.array(np.stack(rewards, axis=1).ravel(), pa.float32()),
        )
        first = next(iter(found.values()))
        combined = pa.Table.from_arrays(
            [
                *(first[name] for name in IDS),
                pa.array(weighted_sum(rewards, list(self.factors.values()))),
                first["baseline_id"],
                by_name,
            ],
            schema=SCHEMAS["rewards"],
        )
        return Shard({"rewards": combined}, {})
