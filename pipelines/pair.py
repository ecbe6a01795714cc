"""Samples to labelled preference pairs (section 5.2)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.score import RankerSource
from pipelines.shards import Shard
from pipelines.tables import by_prompt, table_of
from rso import config, ids, seeds
from rso.models import load_tokenizer
from rso.pairing import Game, Tournament
from rso.progress import progress
from rso.ranking import Comparison, Ranker
from rso.templates import encode_response


class Samples(NamedTuple):
    """The responses of one prompt that meet: rows of `candidates`."""

    prompt_id: str
    prompt: str
    split: str
    rows: list[dict[str, Any]]


class Match(NamedTuple):
    """A game with the ranker's logit that the first response is better, both orders averaged."""

    samples: Samples
    game: Game
    logit: float


@dataclass(frozen=True)
class PairShard:
    """Candidates to `pairs`, labelled by the ranker on the two responses themselves."""

    ranker: RankerSource
    settings: config.Pair
    seed: int

    def setup(self) -> Ranker:
        """Load the ranker."""
        return self.ranker.load()

    def __call__(self, ranker: Ranker, tables: Mapping[str, pa.Table]) -> Shard:
        """Return the pairs of the shard; two copies of one text are no pair and are counted."""
        samples = self._samples(tables)
        brackets = [
            Tournament(
                [row["response_id"] for row in one.rows], prompt_id=one.prompt_id, seed=self.seed
            )
            for one in samples
        ]
        matches = self._round(ranker, samples, [b.next_round() for b in brackets])
        played = list(matches)
        while self.settings.ranking == "tournament" and matches:
            winners = _winners(matches, samples)
            games = [b.next_round(w) for b, w in zip(brackets, winners, strict=True)]
            matches = self._round(ranker, samples, games)
            played += matches
        rows = [pair_row(match, self.settings.source) for match in played if not _identical(match)]
        return Shard(
            {"pairs": table_of("pairs", rows)},
            {
                "prompts": len(samples),
                "samples": sum(len(one.rows) for one in samples),
                "matches": len(played),
                "pairs": len(rows),
                "identical": len(played) - len(rows),
                "label_probability_sum": float(sum(row["label_probability"] for row in rows)),
            },
        )

    def _samples(self, tables: Mapping[str, pa.Table]) -> list[Samples]:
        prompts = {row["prompt_id"]: row for row in tables["prompts"].to_pylist()}
        chosen = tables["accepted"]
        if self.settings.source == "rso-sample-rank":
            chosen = chosen.filter(pc.field("is_accepted"))
        rows = tables["candidates"]
        rows = rows.filter(pc.is_in(rows["response_id"], value_set=chosen["response_id"]))
        result = []
        for prompt_id, group in by_prompt(rows):
            samples = group.to_pylist()
            if self.settings.source == "sft-sample-rank":
                order = seeds.order(
                    [row["response_id"] for row in samples], "sft-sample", self.seed, prompt_id
                )
                samples = [samples[int(i)] for i in order[: self.settings.num_samples]]
            prompt = prompts[prompt_id]
            result.append(Samples(prompt_id, prompt["prompt"], prompt["split"], samples))
        return result

    def _round(
        self, ranker: Ranker, samples: Sequence[Samples], games: Sequence[Sequence[Game]]
    ) -> list[Match]:
        flat = [(one, game) for one, played in zip(samples, games, strict=True) for game in played]
        comparisons = [
            Comparison(
                one.prompt, one.rows[game.first]["response"], one.rows[game.second]["response"]
            )
            for one, game in flat
        ]
        with progress("pair", total=len(flat), unit="pairs") as bar:
            logits = ranker.preference(comparisons, progress=bar)
        return [
            Match(one, game, float(logit)) for (one, game), logit in zip(flat, logits, strict=True)
        ]


@dataclass(frozen=True)
class DirectPairShard:
    """`comparisons` to `pairs`: the preferences as they are (DPO, SLiC-HF-direct)."""

    model: str
    templates: config.Templates

    def setup(self) -> Any:
        """Load the tokenizer of the reference."""
        return load_tokenizer(self.model)

    def __call__(self, tokenizer: Any, tables: Mapping[str, pa.Table]) -> Shard:
        """Return a pair a training comparison."""
        rows = [
            {
                "pair_id": ids.pair_id(row["prompt_id"], row["chosen_id"], row["rejected_id"]),
                **{
                    name: row[name]
                    for name in (
                        "prompt_id",
                        "prompt",
                        "chosen_id",
                        "rejected_id",
                        "chosen",
                        "rejected",
                        "split",
                    )
                },
                "chosen_token_ids": encode_response(
                    tokenizer, self.templates, row["chosen"], eos=True
                ),
                "rejected_token_ids": encode_response(
                    tokenizer, self.templates, row["rejected"], eos=True
                ),
                "label_probability": 1.0,
                "match_round": 0,
                "origin": "direct",
            }
            for row in tables["comparisons"].to_pylist()
            if row["split"] == "train"
        ]
        return Shard(
            {"pairs": table_of("pairs", rows)},
            {
                "comparisons": len(tables["comparisons"]),
                "pairs": len(rows),
                "not_for_training": len(tables["comparisons"]) - len(rows),
            },
        )


def pair_row(match: Match, origin: str) -> dict[str, Any]:
    """Return the `pairs` row of a match; the response with the positive logit is chosen."""
    samples, game, logit = match
    first, second = samples.rows[game.first], samples.rows[game.second]
    chosen, rejected = (first, second) if logit >= 0 else (second, first)
    return {
        "pair_id": ids.pair_id(samples.prompt_id, chosen["response_id"], rejected["response_id"]),
        "prompt_id": samples.prompt_id,
        "prompt": samples.prompt,
        "chosen_id": chosen["response_id"],
        "rejected_id": rejected["response_id"],
        "chosen": chosen["response"],
        "rejected": rejected["response"],
        "chosen_token_ids": chosen["token_ids"],
        "rejected_token_ids": rejected["token_ids"],
        "label_probability": float(1 / (1 + np.exp(-abs(logit)))),
        "match_round": game.match_round,
        "origin": origin,
        "split": samples.split,
    }


def _winners(matches: Sequence[Match], samples: Sequence[Samples]) -> list[list[int]]:
    winners: dict[str, list[int]] = {one.prompt_id: [] for one in samples}
    for match in matches:
        winner = match.game.first if match.logit >= 0 else match.game.second
        winners[match.samples.prompt_id].append(winner)
    return list(winners.values())


def _identical(match: Match) -> bool:
    rows = match.samples.rows
    return bool(rows[match.game.first]["token_ids"] == rows[match.game.second]["token_ids"])
