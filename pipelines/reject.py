"""Rewards to accepted candidates: statistical rejection sampling, a shard at a time."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipelines.rewards import finite_rewards, text_numbers
from pipelines.shards import Shard
from pipelines.tables import IDS, hashes, prompt_runs, require_same_ids
from rso import config
from rso.diagnostics import Diagnostics, diagnose, sums
from rso.rejection import Candidates, Selections, select_many, states_of
from schemas import SCHEMAS

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
        require_same_ids("reject", rewards=rewards, candidates=texts)
        prompt_ids, sizes = prompt_runs(rewards)
        candidates = Candidates(
            sizes=sizes,
            states=states_of(hashes(prompt_ids), sizes, hashes(rewards["response_id"]), self.seed),
            texts=text_numbers(texts["response"]),
            rewards=finite_rewards(rewards, "reject"),
        )
        settings, tried = self.settings, {}
        for beta in settings.all_betas:
            selections = select_many(
                candidates,
                beta=beta,
                num_samples=settings.num_samples,
                duplicates=settings.duplicates,
            )
            tried[beta] = selections, diagnose(candidates, selections, beta)
        counters = {
            counter(beta, name): count
            for beta, (selections, figures) in tried.items()
            for name, count in sums(candidates, selections, figures).items()
        }
        return Shard(
            {
                "accepted": _accepted(rewards, tried[settings.beta][0]),
                "diagnostics": _diagnostics(prompt_ids, candidates, tried),
            },
            counters,
        )


def counter(beta: float, name: str) -> str:
    """Return the name under which a shard counts what was found at `beta`."""
    return f"beta={beta!r}/{name}"


def _diagnostics(
    prompt_ids: pa.Array,
    candidates: Candidates,
    tried: Mapping[float, tuple[Selections, Diagnostics]],
) -> pa.Table:
    """Return a row for each prompt and β, those of a prompt together."""
    starts = np.cumsum(candidates.sizes) - candidates.sizes
    columns: dict[str, list[np.ndarray]] = defaultdict(list)
    for beta, (selections, figures) in sorted(tried.items()):
        columns["beta"].append(np.full(len(prompt_ids), beta))
        columns["num_candidates"].append(candidates.sizes.astype(np.int64))
        columns["num_accepted"].append(np.add.reduceat(selections.is_accepted, starts, dtype=int))
        for name in ("num_shortfall", "num_rounds", "num_draws"):
            columns[name].append(getattr(selections, name))
        for name, values in figures._asdict().items():
            columns[name].append(values)
    arrays = {name: pa.array(np.stack(found, axis=1).ravel()) for name, found in columns.items()}
    prompts = prompt_ids.take(pa.array(np.repeat(np.arange(len(prompt_ids)), len(tried))))
    return pa.table({"prompt_id": prompts, **arrays}).cast(SCHEMAS["diagnostics"])


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
