"""Rewards to accepted candidates: statistical rejection sampling, shard by shard."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipelines.rewards import reward_column, text_numbers
from pipelines.shards import Shard
from pipelines.tables import IDS, id_hashes, prompt_runs, require_same_ids
from rso import config
from rso.diagnostics import Diagnostics, diagnose, sums
from rso.errors import UserError
from rso.rejection import Candidates, Selections, select_many, states_of
from schemas import SCHEMAS

REJECT_COLUMNS = {"candidates": (*IDS, "response"), "rewards": (*IDS, "reward")}


@dataclass(frozen=True)
class RejectShard:
    """Rewards to `accepted` by algorithm 1; declined candidates stay in the table.

    Every β of `settings` must be in nats, as `in_nats` returns them.
    """

    settings: config.Reject
    seed: int

    def __post_init__(self) -> None:
        assert self.settings.beta_unit == "nats", self.settings

    def setup(self) -> None:
        """Nothing to load."""

    def __call__(self, engine: None, tables: Mapping[str, pa.Table]) -> Shard:
        """Return every candidate with its verdict, and the diagnostics of each prompt and β.

        The counters are the `sums` at `beta`. There is a group of counters per β of `all_betas`.

        Raises:
            NonFiniteReward: a reward is NaN or infinite.
            ValueError: rewards and candidates hold different responses.
        """
        rewards, texts = tables["rewards"], tables["candidates"]
        require_same_ids("reject", rewards=rewards, candidates=texts)
        prompt_ids, sizes = prompt_runs(rewards)
        candidates = Candidates(
            sizes=sizes,
            states=states_of(
                id_hashes(prompt_ids), sizes, id_hashes(rewards["response_id"]), self.seed
            ),
            texts=text_numbers(texts["response"]),
            rewards=reward_column(rewards, "reject"),
        )
        settings, tried = self.settings, {}
        for beta in all_betas(settings):
            selections = select_many(
                candidates,
                beta=beta,
                num_samples=settings.num_samples,
                duplicates=settings.duplicates,
            )
            tried[beta] = selections, diagnose(candidates, selections, beta)
        totals = {beta: sums(candidates, *found) for beta, found in tried.items()}
        return Shard(
            {
                "accepted": _accepted(rewards, tried[settings.beta][0]),
                "diagnostics": _diagnostics(prompt_ids, candidates, tried),
            },
            totals[settings.beta],
            list(totals.values()),
        )


def all_betas(settings: config.Reject) -> list[float]:
    """Return every β to try, ascending: `beta`, `betas`, and 0, which has the largest gain."""
    return sorted({0.0, settings.beta, *settings.betas})


def in_nats(settings: config.Reject, spread_median: float) -> config.Reject:
    """Return the settings with every β in nats; `spread_median` is the unit `spread` in nats.

    Raises:
        UserError: `beta_unit` is spread and the spread is 0, because at least half of the prompts
            have equal rewards.
    """
    if settings.beta_unit == "nats":
        return settings
    if spread_median == 0:
        raise UserError(
            "reject: beta_unit is spread, the median over prompts of the standard deviation of "
            "their rewards, and it is 0: the candidates of at least half of the prompts all have "
            "one reward; look at the ranker and at whether the candidates differ "
            "(decode.sampling.temperature), or set reject.beta_unit to nats."
        )
    in_nats = {
        "beta": settings.beta * spread_median,
        "betas": tuple(beta * spread_median for beta in settings.betas),
        "beta_unit": "nats",
    }
    return settings.model_copy(update=in_nats)


def _diagnostics(
    prompt_ids: pa.Array,
    candidates: Candidates,
    tried: Mapping[float, tuple[Selections, Diagnostics]],
) -> pa.Table:
    """Return one row per prompt and β; the rows of a prompt stand together."""
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
