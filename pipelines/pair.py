"""Samples to labelled preference pairs (section 5.2)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.rewards import reward_column
from pipelines.score import AnyRanker
from pipelines.shards import Shard
from pipelines.tables import IDS, by_prompt, require_same_ids, table_of
from rso import config, ids, seeds
from rso.aliases import Row
from rso.models import load_tokenizer
from rso.pairing import Game, Tournament, best_vs_random, best_vs_worst
from rso.progress import progress
from rso.ranking import Comparison, Ranker
from rso.templates import encode_response

PAIR_COLUMNS = {
    "candidates": (*IDS, "response", "token_ids"),
    "accepted": (*IDS, "reward", "is_accepted"),
    "prompts": ("prompt_id", "prompt", "split"),
}


class Samples(NamedTuple):
    """The responses to one prompt that are paired: rows of `candidates` with their rewards."""

    prompt: Row
    rows: list[Row]

    @property
    def prompt_id(self) -> str:
        """The prompt_id of the responses."""
        return str(self.prompt["prompt_id"])

    def column(self, name: str) -> list[Any]:
        """Return one field of every response."""
        return [row[name] for row in self.rows]


class PlayedGame(NamedTuple):
    """A game and its logit, averaged over both orders; positive if the first response is better."""

    samples: Samples
    game: Game
    logit: float

    @property
    def sides(self) -> tuple[Row, Row]:
        """The chosen and the rejected response; at logit 0 the first response is chosen."""
        first, second = (self.samples.rows[index] for index in self.game[:2])
        return (first, second) if self.logit >= 0 else (second, first)


@dataclass(frozen=True)
class PairShard:
    """Candidates to `pairs`; the ranker compares the two responses directly to label a pair."""

    ranker: AnyRanker
    settings: config.Pair
    seed: int

    def setup(self) -> Ranker:
        """Load the ranker."""
        return self.ranker.load()

    def __call__(self, ranker: Ranker, tables: Mapping[str, pa.Table]) -> Shard:
        """Return the shard's pairs; every match counts as a pair, as `identical` or as a near-tie.

        A logit of exactly 0 is a near-tie for every `min_margin`: the ranker gives it to two texts
        that it reads as the same text.

        Raises:
            NonFiniteReward: a reward is NaN or infinite.
            ValueError: `accepted` and `candidates` hold different responses.
        """
        samples = self._samples(tables)
        if self.settings.ranking in ("first-round", "tournament"):
            played, num_byes = self._draw(ranker, samples)
        else:
            played = self._label(ranker, samples, [self._by_reward(one) for one in samples])
            num_byes = 0
        different = [match for match in played if not is_identical(*match.sides)]
        kept = [
            match
            for match in different
            if match.logit and abs(match.logit) >= self.settings.min_margin
        ]
        rows = [pair_row(match, self.settings.source) for match in kept]
        sides = [match.sides for match in kept]
        return Shard(
            {"pairs": table_of("pairs", rows)},
            {
                "prompts": len(samples),
                "samples": sum(len(one.rows) for one in samples),
                "byes": num_byes,
                "matches": len(played),
                "identical": len(played) - len(different),
                "near_ties": len(different) - len(kept),
                "pairs": len(rows),
                "prompts_without_pairs": len(samples) - len({row["prompt_id"] for row in rows}),
                "reward_disagrees": sum(c["reward"] < r["reward"] for c, r in sides),
                "label_probability_sum": float(sum(row["label_probability"] for row in rows)),
            },
        )

    def _samples(self, tables: Mapping[str, pa.Table]) -> list[Samples]:
        prompts = {row["prompt_id"]: row for row in tables["prompts"].to_pylist()}
        chosen, rows = tables["accepted"], tables["candidates"]
        reward_column(chosen, "pair")
        if self.settings.source == "rso-sample-rank":
            chosen = chosen.filter(pc.field("is_accepted"))
        rows = rows.filter(pc.is_in(rows["response_id"], value_set=chosen["response_id"]))
        require_same_ids("pair", accepted=chosen, candidates=rows)
        result = []
        for prompt_id, group in by_prompt(rows.append_column("reward", chosen["reward"])):
            if self.settings.source == "sft-sample-rank":
                order = seeds.order(
                    group["response_id"].to_pylist(), "sft-sample", self.seed, prompt_id
                )
                group = group.take(order[: self.settings.num_samples])
            result.append(Samples(prompts[prompt_id], group.to_pylist()))
        return result

    def _by_reward(self, samples: Samples) -> list[Game]:
        columns = [samples.column(name) for name in ("response_id", "response", "reward")]
        if self.settings.ranking == "best-vs-worst":
            return best_vs_worst(*columns, prompt_id=samples.prompt_id)
        return best_vs_random(*columns, prompt_id=samples.prompt_id, seed=self.seed)

    def _draw(self, ranker: Ranker, samples: Sequence[Samples]) -> tuple[list[PlayedGame], int]:
        """Play the first round or the whole tournament; return the matches and number of byes."""
        brackets = [
            Tournament(one.column("response_id"), prompt_id=one.prompt_id, seed=self.seed)
            for one in samples
        ]
        matches = self._label(ranker, samples, [b.next_round() for b in brackets])
        played = list(matches)
        while self.settings.ranking == "tournament" and matches:
            winners = _winners(matches, samples)
            games = [b.next_round(w) for b, w in zip(brackets, winners, strict=True)]
            matches = self._label(ranker, samples, games)
            played += matches
        return played, sum(bracket.num_byes for bracket in brackets)

    def _label(
        self, ranker: Ranker, samples: Sequence[Samples], games: Sequence[Sequence[Game]]
    ) -> list[PlayedGame]:
        flat = [(one, game) for one, played in zip(samples, games, strict=True) for game in played]
        comparisons = [
            Comparison(one.prompt["prompt"], *(one.rows[index]["response"] for index in game[:2]))
            for one, game in flat
        ]
        with progress("pair", total=2 * len(flat), unit="comparisons") as bar:
            logits = ranker.preference(comparisons, progress=bar)
        return [
            PlayedGame(one, game, float(logit))
            for (one, game), logit in zip(flat, logits, strict=True)
        ]


@dataclass(frozen=True)
class DirectPairShard:
    """`comparisons` to `pairs`: the preferences themselves become pairs (DPO, SLiC-HF-direct)."""

    model: str
    settings: config.Pair
    templates: config.Templates

    def setup(self) -> Any:
        """Load the tokenizer of the reference."""
        return load_tokenizer(self.model)

    def __call__(self, tokenizer: Any, tables: Mapping[str, pa.Table]) -> Shard:
        """Return the pairs of the shard's training comparisons.

        Every comparison counts as a pair, as `identical` or as `not_for_training`. `cut` counts the
        responses that were cut to `max_response_tokens`.
        """
        comparisons = tables["comparisons"].filter(pc.field("split") == "train").to_pylist()
        sides = [
            (self._response(tokenizer, row, "chosen"), self._response(tokenizer, row, "rejected"))
            for row in comparisons
        ]
        rows = [
            _row(row, chosen, rejected, probability=1.0, match_round=0, origin="direct")
            for row, (chosen, rejected) in zip(comparisons, sides, strict=True)
            if not is_identical(chosen, rejected)
        ]
        return Shard(
            {"pairs": table_of("pairs", rows)},
            {
                "comparisons": len(tables["comparisons"]),
                "not_for_training": len(tables["comparisons"]) - len(comparisons),
                "identical": len(comparisons) - len(rows),
                "pairs": len(rows),
                "cut": sum(response["is_cut"] for pair in sides for response in pair),
            },
        )

    def _response(self, tokenizer: Any, comparison: Row, side: str) -> Row:
        # Comparisons of our own decodes contain the prefix, and `encode_response` adds it again.
        text = comparison[side].removeprefix(self.templates.response_prefix)
        token_ids = encode_response(tokenizer, self.templates, text, eos=True)
        limit = self.settings.max_response_tokens
        is_cut = limit is not None and len(token_ids) > limit
        if is_cut:
            token_ids = token_ids[:limit]
            text = tokenizer.decode(token_ids, skip_special_tokens=True)
            text = text.removeprefix(self.templates.response_prefix)
        return {
            "response_id": comparison[f"{side}_id"],
            "response": text,
            "token_ids": token_ids,
            "is_cut": is_cut,
        }


def is_identical(first: Row, second: Row) -> bool:
    """Return whether two responses have equal texts or equal tokens, so that neither is better."""
    return any(first[name] == second[name] for name in ("response", "token_ids"))


def pair_row(match: PlayedGame, origin: str) -> Row:
    """Return the `pairs` row of a match; the response that the logit favours is chosen."""
    chosen, rejected = match.sides
    return _row(
        match.samples.prompt,
        chosen,
        rejected,
        probability=float(1 / (1 + np.exp(-abs(match.logit)))),
        match_round=match.game.match_round,
        origin=origin,
    )


def _row(
    prompt: Row, chosen: Row, rejected: Row, *, probability: float, match_round: int, origin: str
) -> Row:
    chosen_id, rejected_id = chosen["response_id"], rejected["response_id"]
    return {
        "pair_id": ids.pair_id(prompt["prompt_id"], chosen_id, rejected_id),
        "prompt_id": prompt["prompt_id"],
        "prompt": prompt["prompt"],
        "chosen_id": chosen_id,
        "rejected_id": rejected_id,
        "chosen": chosen["response"],
        "rejected": rejected["response"],
        "chosen_token_ids": chosen["token_ids"],
        "rejected_token_ids": rejected["token_ids"],
        "label_probability": probability,
        "match_round": match_round,
        "origin": origin,
        "split": prompt["split"],
    }


def _winners(matches: Sequence[PlayedGame], samples: Sequence[Samples]) -> list[list[int]]:
    winners: dict[str, list[int]] = {one.prompt_id: [] for one in samples}
    for match in matches:
        winner = match.game.first if match.logit >= 0 else match.game.second
        winners[match.samples.prompt_id].append(winner)
    return list(winners.values())
