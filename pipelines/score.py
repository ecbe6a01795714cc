"""Candidates to rewards: one or several rankers compare each with its prompt's baseline (eq. 7)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.shards import Shard
from pipelines.tables import by_prompt, require_same_ids, table_of
from rso import config, ids, seeds
from rso.aliases import Row
from rso.objectives import weighted_sum
from rso.progress import progress
from rso.ranking import (
    Comparison,
    PromptCandidates,
    PromptRewards,
    Ranker,
    WeightedRanker,
    load_ranker,
)
from rso.templates import judged_text
from schemas import SCHEMAS


@dataclass(frozen=True)
class RankerSource:
    """How to load a ranker; picklable, so that it can be sent to workers."""

    model: str
    compute: config.Compute
    templates: config.Templates

    def load(self) -> Ranker:
        """Load and return the ranker."""
        return load_ranker(
            self.model,
            self.templates,
            dtype=self.compute.dtype,
            token_budget=self.compute.token_budget,
            device=self.compute.device,
            attention=self.compute.attention,
            engine=self.compute.ranker_engine,
        )


@dataclass(frozen=True)
class WeightedSource:
    """How to load several rankers as one weighted ranker, with a factor for each; picklable."""

    rankers: Sequence[RankerSource]
    factors: Sequence[float]

    def load(self) -> Ranker:
        """Load all rankers and return their weighted sum."""
        return WeightedRanker([source.load() for source in self.rankers], self.factors)


AnyRanker = RankerSource | WeightedSource


HELD_OUT, CANDIDATES = "held_out", "candidates"


class Scored(NamedTuple):
    """The candidates of one prompt; `baseline` is the index of the one that is the baseline."""

    prompt_id: str
    response_ids: list[str]
    baseline: int
    texts: PromptCandidates

    @property
    def baseline_id(self) -> str:
        """The response_id of the baseline."""
        return self.response_ids[self.baseline]


@dataclass(frozen=True)
class ScoreShard:
    """Candidates to `rewards`, each against its prompt's baseline, in one order or in both.

    The second output, `checks`, has both orders of every held-out comparison. It also has both
    orders of one pair per prompt in `flipped`: the baseline and a keyed random candidate.
    `tokens_prefilled` counts the tokens of the rewards, without the checks.
    """

    ranker: RankerSource
    flipped: frozenset[str]
    seed: int
    orders: config.RewardOrders
    templates: config.Templates

    def setup(self) -> Ranker:
        """Load the ranker."""
        return self.ranker.load()

    def __call__(self, ranker: Ranker, tables: Mapping[str, pa.Table]) -> Shard:
        """Return rewards and checks of the shard; every prompt must have exactly one baseline."""
        candidates = tables["candidates"]
        scored = _scored(tables)
        num_orders = 2 if self.orders == "both" else 1
        with progress("score", total=num_orders * len(candidates), unit="comparisons") as bar:
            found = ranker.rewards_many(
                [one.texts for one in scored], progress=bar, orders=self.orders
            )
        rewards = [one.values for one in found]
        flat = np.concatenate([*rewards, np.empty(0, np.float32)]).astype(np.float32)
        baseline_ids = [one.baseline_id for one in scored for _ in one.response_ids]
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
        checks = self._flips(ranker, scored, found) + _held_out(ranker, tables["comparisons"])
        distinct = sum(len(set(map(self._judged, one.texts.responses))) for one in scored)
        return Shard(
            {"rewards": table, "checks": table_of("checks", checks)},
            {
                "prompts": len(scored),
                "responses": len(candidates),
                "scored_once_for_copies": len(candidates) - distinct,
                "tokens_prefilled": sum(one.num_tokens for one in found),
                "contexts_cut": ranker.count_cut([one.texts.prompt for one in scored]),
                "reward_sum": float(flat.astype(np.float64).sum()),
                "reward_spread_sum": float(sum(np.std(r.astype(np.float64)) for r in rewards)),
                "reward_variance_sum": float(sum(np.var(r.astype(np.float64)) for r in rewards)),
            },
        )

    def _flips(
        self, ranker: Ranker, scored: Sequence[Scored], rewards: Sequence[PromptRewards]
    ) -> list[Row]:
        """Return the check rows of one pair per prompt in `flipped`, with both orders.

        The rewards hold the logits with the baseline first. The ranker computes the other order
        here unless the rewards hold it too. A prompt has no pair if all its candidates have the
        text of the baseline.
        """
        pairs = [
            (one, found, other)
            for one, found in zip(scored, rewards, strict=True)
            if one.prompt_id in self.flipped
            for other in self._draw(one)
        ]
        known = [found.backward[other] for _, found, other in pairs if found.backward is not None]
        backward = known or ranker.compare(
            [
                Comparison(one.texts.prompt, one.texts.responses[other], one.texts.baseline)
                for one, _, other in pairs
            ]
        )
        return [
            {
                "prompt_id": one.prompt_id,
                "comparison_id": ids.pair_id(
                    one.prompt_id, one.baseline_id, one.response_ids[other]
                ),
                "origin": CANDIDATES,
                "first_id": one.baseline_id,
                "second_id": one.response_ids[other],
                "forward": float(found.forward[other]),
                "backward": float(z),
            }
            for (one, found, other), z in zip(pairs, backward, strict=True)
        ]

    def _draw(self, one: Scored) -> list[int]:
        """Return the index of a keyed random candidate whose text is not the baseline's, or []."""
        baseline = self._judged(one.texts.baseline)
        others = [i for i, text in enumerate(one.texts.responses) if self._judged(text) != baseline]
        order = seeds.order(
            [one.response_ids[i] for i in others], "flipped", self.seed, one.prompt_id
        )
        return [others[int(i)] for i in order[:1]]

    def _judged(self, text: str) -> str:
        return judged_text(self.templates, text)


def _scored(tables: Mapping[str, pa.Table]) -> list[Scored]:
    prompts = dict(
        zip(
            tables["prompts"]["prompt_id"].to_pylist(),
            tables["prompts"]["prompt"].to_pylist(),
            strict=True,
        )
    )
    scored = []
    for prompt_id, group in by_prompt(tables["candidates"]):
        responses = group["response"].to_pylist()
        (baseline,) = np.flatnonzero(group["is_baseline"].to_numpy(zero_copy_only=False))
        texts = PromptCandidates(prompts[prompt_id], responses[baseline], responses)
        scored.append(Scored(prompt_id, group["response_id"].to_pylist(), int(baseline), texts))
    return scored


def _held_out(ranker: Ranker, comparisons: pa.Table) -> list[Row]:
    rows = comparisons.filter(pc.field("split") == "validation").to_pylist()
    both = ranker.both_orders([Comparison(r["prompt"], r["chosen"], r["rejected"]) for r in rows])
    return [
        {
            "prompt_id": row["prompt_id"],
            "comparison_id": row["comparison_id"],
            "origin": HELD_OUT,
            "first_id": row["chosen_id"],
            "second_id": row["rejected_id"],
            "forward": float(forward),
            "backward": float(backward),
        }
        for row, forward, backward in zip(rows, *both, strict=True)
    ]


def scored_by(name: str) -> str:
    """Return the scratch folder for the tables that are scored by the objective `name`."""
    return f"score_{name}"


@dataclass(frozen=True)
class CombineShard:
    """`rewards` and `checks` of each objective to those of the run: sums weighted by `factors`.

    `factors` maps the name of each objective to its factor. Both tables are linear in the rankers'
    logits, so no ranker computes anything again. `reward_spread_sum` is over the combined rewards.
    """

    factors: Mapping[str, float]

    def setup(self) -> None:
        """Nothing to load."""

    def __call__(self, engine: None, tables: Mapping[str, pa.Table]) -> Shard:
        """Return the combined tables; each row of rewards also has the reward by each objective.

        Raises:
            ValueError: the rewards of an objective and the candidates hold different responses.
        """
        rewards, checks = (
            [tables[f"{scored_by(name)}/{output}"] for name in self.factors]
            for output in ("rewards", "checks")
        )
        for name, table in zip(self.factors, rewards, strict=True):
            require_same_ids(
                "score", **{scored_by(name): table, "candidates": tables["candidates"]}
            )
        size, number = len(tables["candidates"]), len(self.factors)
        values = [table["reward"].to_numpy() for table in rewards]
        by_name = pa.MapArray.from_arrays(
            pa.array(np.arange(0, (size + 1) * number, number), pa.int32()),
            pa.array(list(self.factors) * size, pa.string()),
            pa.array(np.stack(values, axis=1).ravel(), pa.float32()),
        )
        combined = _replaced(rewards[0], reward=self._sum(rewards, "reward"), objectives=by_name)
        spreads = [
            np.std(group["reward"].to_numpy().astype(np.float64))
            for _, group in by_prompt(combined)
        ]
        return Shard(
            {
                "rewards": combined,
                "checks": _replaced(
                    checks[0],
                    forward=self._sum(checks, "forward"),
                    backward=self._sum(checks, "backward"),
                ),
            },
            {"reward_spread_sum": float(sum(spreads))},
        )

    def _sum(self, tables: Sequence[pa.Table], column: str) -> pa.Array:
        values = [table[column].to_numpy() for table in tables]
        return pa.array(weighted_sum(values, list(self.factors.values())))


def _replaced(table: pa.Table, **columns: pa.Array) -> pa.Table:
    for name, values in columns.items():
        index = table.schema.get_field_index(name)
        table = table.set_column(index, table.schema.field(index), values)
    return table
