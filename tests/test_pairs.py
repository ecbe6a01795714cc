"""The pair pipeline with a real tiny ranker: rankings, margins, labels, and what is dropped."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import system
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pipelines import ONE, THREADS, read_all, reshard
from transformers import PreTrainedTokenizerBase

from pipelines.pair import PAIR_COLUMNS, DirectPairShard, PairShard
from pipelines.score import RankerSource
from pipelines.shards import Dataset, Plan, map_shards
from rso.aliases import Counters
from rso.config import Beam, Compute, Pair, Templates
from rso.errors import UserError
from rso.pairing import best_vs_random, best_vs_worst, first_round, tournament
from rso.ranking import Comparison, Ranker
from rso.templates import encode_response
from schemas import SCHEMAS
from stages.runner import run_stage

Row = dict[str, Any]
RANKINGS = ["first-round", "tournament", "best-vs-worst", "best-vs-random"]


@pytest.fixture(scope="module")
def source(tiny_ranker_dir: str) -> RankerSource:
    return RankerSource(tiny_ranker_dir, Compute(dtype="float32", device="cpu"), Templates())


@pytest.fixture(scope="module")
def ranker(source: RankerSource) -> Ranker:
    return source.load()


def logit(probability: float) -> float:
    return float(np.log(probability) - np.log1p(-probability))


def tables(samples: list[Row]) -> dict[str, pa.Table]:
    """Accepted candidates as rows of prompt_id, response_id, response, reward, token_ids."""
    given = {
        "candidates": samples,
        "accepted": [row | {"is_accepted": True} for row in samples],
        "prompts": [
            {"prompt_id": name, "prompt": f"a question {name}", "split": "train"}
            for name in sorted({row["prompt_id"] for row in samples})
        ],
    }
    return {
        name: pa.Table.from_pylist(
            [{column: row[column] for column in PAIR_COLUMNS[name]} for row in rows],
            schema=pa.schema([SCHEMAS[name].field(column) for column in PAIR_COLUMNS[name]]),
        )
        for name, rows in given.items()
    }


def samples(responses: list[tuple[str, float]], prompt_id: str = "p") -> list[Row]:
    """Responses to a prompt with their rewards; equal texts have equal tokens."""
    return [
        {
            "prompt_id": prompt_id,
            "response_id": f"{prompt_id}{index:02d}",
            "response": text,
            "reward": reward,
            "token_ids": list(text.encode()),
        }
        for index, (text, reward) in enumerate(responses)
    ]


def adds_up(counters: Counters) -> bool:
    dropped = counters["identical"] + counters["near_ties"]
    return counters["matches"] == counters["pairs"] + dropped


# --- against the pure functions, however sharded


def expected_games(ranking: str, rows: list[Row], prompt: str, ranker: Ranker) -> list[Any]:
    """The games of one prompt, labelled one at a time; rows in an order of their own."""
    ids, texts, rewards = (
        [row[name] for row in rows] for name in ("response_id", "response", "reward")
    )
    key = {"prompt_id": rows[0]["prompt_id"]}

    def better(i: int, j: int) -> bool:
        return bool(ranker.preference([Comparison(prompt, texts[i], texts[j])])[0] >= 0)

    if ranking == "first-round":
        return first_round(ids, **key, seed=3)
    if ranking == "tournament":
        return tournament(ids, **key, seed=3, better=better)
    if ranking == "best-vs-worst":
        return best_vs_worst(ids, texts, rewards, **key)
    return best_vs_random(ids, texts, rewards, **key, seed=3)


# Of forty shards some are empty.
@pytest.mark.parametrize(("total", "beam"), [(1, ONE), (5, THREADS), (40, ONE)])
@pytest.mark.parametrize("ranking", RANKINGS)
def test_pair_pipeline_however_sharded_equals_the_pure_functions(
    finished: system.Run,
    source: RankerSource,
    ranker: Ranker,
    tmp_path: Path,
    ranking: str,
    total: int,
    beam: Beam,
) -> None:
    rows = {
        "candidates": finished.rows("decode/candidates"),
        "accepted": finished.rows("reject/accepted"),
        "prompts": finished.rows("prepare/prompts"),
    }
    inputs = {
        # Written backwards: shards are sorted by their ids whatever comes.
        name: reshard(rows[name][::-1], tmp_path / name, name, total)._replace(columns=columns)
        for name, columns in PAIR_COLUMNS.items()
    }
    plan = Plan(
        "pair",
        inputs,
        {"pairs": Dataset(str(tmp_path / "pairs"), "pairs")},
        str(tmp_path / "counters"),
        total,
    )
    counters = map_shards(PairShard(source, Pair(ranking=ranking), seed=3), plan, beam)
    found = {
        (pair["chosen_id"], pair["rejected_id"], pair["match_round"]): pair["label_probability"]
        for pair in read_all(tmp_path / "pairs", "pairs")
    }

    texts = {row["response_id"]: row["response"] for row in rows["candidates"]}
    prompts = {row["prompt_id"]: row["prompt"] for row in rows["prompts"]}
    accepted = sorted(
        (r | {"response": texts[r["response_id"]]} for r in rows["accepted"] if r["is_accepted"]),
        key=lambda row: row["prompt_id"],
    )
    expected = {}
    num_games = 0
    for prompt_id, group in itertools.groupby(accepted, key=lambda row: row["prompt_id"]):
        mine = list(group)[::-1]
        for game in expected_games(ranking, mine, prompts[prompt_id], ranker):
            num_games += 1
            sides = [mine[game.first], mine[game.second]]
            responses = [row["response"] for row in sides]
            margin = ranker.preference([Comparison(prompts[prompt_id], *responses)])[0]
            if responses[0] != responses[1]:
                chosen, rejected = sides if margin >= 0 else sides[::-1]
                key = chosen["response_id"], rejected["response_id"], game.match_round
                expected[key] = 1 / (1 + np.exp(-abs(float(margin))))
    assert found.keys() == expected.keys()
    for key, probability in expected.items():
        assert found[key] == pytest.approx(probability, abs=1e-4)
    assert (counters["matches"], counters["pairs"]) == (num_games, len(expected))
    assert adds_up(counters)


# --- counters


@given(
    st.lists(
        st.lists(st.sampled_from(["one", "two", "three", "fox"]), min_size=1, max_size=9),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from(RANKINGS),
    st.sampled_from([0.0, 0.5, 2.0]),
)
@settings(max_examples=60, deadline=None)
def test_pair_every_sample_match_and_prompt_is_accounted_for(
    ranker: Ranker, source: RankerSource, texts: list[list[str]], ranking: str, min_margin: float
) -> None:
    reward = {"one": -1.0, "two": 0.0, "three": 0.5, "fox": 0.5}
    rows = [
        row
        for index, responses in enumerate(texts)
        for row in samples([(text, reward[text]) for text in responses], f"p{index}")
    ]
    function = PairShard(source, Pair(ranking=ranking, min_margin=min_margin), seed=0)
    shard = function(ranker, tables(rows))
    counters, pairs = shard.counters, shard.tables["pairs"].to_pylist()
    sizes = [len(responses) for responses in texts]
    assert counters["samples"] == sum(sizes) and counters["prompts"] == len(sizes)
    assert adds_up(counters) and counters["pairs"] == len(pairs)
    assert counters["prompts_without_pairs"] == len(sizes) - len({p["prompt_id"] for p in pairs})
    if ranking == "first-round":
        alone = sizes.count(1)
        assert counters["samples"] == 2 * counters["matches"] + counters["byes"] + alone
    elif ranking == "tournament":
        assert counters["matches"] == sum(size - 1 for size in sizes)
    else:
        assert counters["matches"] == sum(len(set(responses)) > 1 for responses in texts)
        assert counters["identical"] == counters["byes"] == 0
    below = sum(reward[pair["chosen"]] < reward[pair["rejected"]] for pair in pairs)
    assert counters["reward_disagrees"] == below
    assert all(logit(pair["label_probability"]) >= min_margin - 1e-3 for pair in pairs)


@pytest.mark.parametrize(("k", "ranking", "byes"), [(5, "first-round", 1), (5, "tournament", 2)])
def test_pair_of_odd_numbers_counts_byes(
    ranker: Ranker, source: RankerSource, k: int, ranking: str, byes: int
) -> None:
    rows = [
        row
        for prompt_id in ("p", "q")
        for row in samples([(f"answer {index}", 0.0) for index in range(k)], prompt_id)
    ]
    shard = PairShard(source, Pair(ranking=ranking), seed=0)(ranker, tables(rows))
    assert shard.counters["byes"] == 2 * byes


# --- margins


@pytest.mark.parametrize("ranking", RANKINGS)
def test_pair_min_margin_drops_near_ties_and_leaves_the_bracket_as_it_is(
    ranker: Ranker, source: RankerSource, ranking: str
) -> None:
    rows = samples([(f"{word} answer", float(i)) for i, word in enumerate("abcdefgh")])
    everything = PairShard(source, Pair(ranking=ranking), seed=1)(ranker, tables(rows))
    pairs = everything.tables["pairs"].to_pylist()
    margins = sorted(logit(pair["label_probability"]) for pair in pairs)
    # Between two margins, so that rounding decides nothing; or above the only one.
    middle = len(margins) // 2
    limit = (margins[middle - 1] + margins[middle]) / 2 if middle else margins[0] + 1
    shard = PairShard(source, Pair(ranking=ranking, min_margin=limit), seed=1)(ranker, tables(rows))
    assert shard.tables["pairs"].to_pylist() == [
        pair for pair in pairs if logit(pair["label_probability"]) > limit
    ]
    assert shard.counters["near_ties"] == max(middle, 1)
    assert shard.counters["prompts_without_pairs"] == (middle == 0)
    assert adds_up(shard.counters)


# --- identical responses


def test_pair_of_one_text_in_other_tokens_is_no_pair(
    ranker: Ranker, source: RankerSource, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    whole = tiny_tokenizer("the list", add_special_tokens=False)["input_ids"]
    split = [
        token
        for letter in "the list"
        for token in tiny_tokenizer(letter, add_special_tokens=False)["input_ids"]
    ]
    assert whole != split
    first, second = samples([("the list", 0.0), ("the list", 0.0)])
    first["token_ids"], second["token_ids"] = whole, split
    assert tiny_tokenizer.decode(whole) == tiny_tokenizer.decode(split) == "the list"
    for ranking in RANKINGS:
        function = PairShard(source, Pair(ranking=ranking), seed=0)
        shard = function(ranker, tables([first, second]))
        assert len(shard.tables["pairs"]) == 0
        # Rankings by reward do not even let them meet.
        assert shard.counters["identical"] == shard.counters["matches"]
        assert shard.counters["identical"] == (ranking in ("first-round", "tournament"))
        assert shard.counters["prompts_without_pairs"] == 1


def test_pair_of_the_same_tokens_is_no_pair(ranker: Ranker, source: RankerSource) -> None:
    first, second = samples([("one", 0.0), ("two", 1.0)])
    second["token_ids"] = first["token_ids"]
    shard = PairShard(source, Pair(), seed=0)(ranker, tables([first, second]))
    assert (shard.counters["identical"], shard.counters["pairs"]) == (1, 0)


# --- labels and rewards


@pytest.mark.parametrize("ranking", ["best-vs-worst", "best-vs-random"])
@pytest.mark.parametrize("agrees", [True, False])
def test_pair_by_reward_is_labelled_by_the_ranker_even_against_the_reward(
    ranker: Ranker, source: RankerSource, ranking: str, agrees: bool
) -> None:
    prompt = tables(samples([("one", 0.0)]))["prompts"]["prompt"][0].as_py()
    margin = ranker.preference([Comparison(prompt, "one", "two")])[0]
    assert abs(margin) > 1e-3
    better, worse = ("one", "two") if margin > 0 else ("two", "one")
    high, low = (better, worse) if agrees else (worse, better)
    given = tables(samples([(high, 3.0), (low, -3.0)]))
    shard = PairShard(source, Pair(ranking=ranking), seed=0)(ranker, given)
    (pair,) = shard.tables["pairs"].to_pylist()
    assert (pair["chosen"], pair["rejected"]) == (better, worse)
    assert shard.counters["reward_disagrees"] == (not agrees)


def test_pair_best_vs_worst_of_drawn_decodes_uses_those_alone(
    ranker: Ranker, source: RankerSource
) -> None:
    rows = samples([(f"answer {index}", float(index)) for index in range(20)])
    sides = set()
    for seed in range(6):
        options = Pair(source="sft-sample-rank", ranking="best-vs-worst", num_samples=3)
        shard = PairShard(source, options, seed=seed)(ranker, tables(rows))
        (pair,) = shard.tables["pairs"].to_pylist()
        assert shard.counters["samples"] == 3
        sides.add(frozenset((pair["chosen_id"], pair["rejected_id"])))
    # The best and the worst of the draw, not of all twenty.
    assert len(sides) > 1


def test_pair_of_rows_that_do_not_belong_together_refuses(
    ranker: Ranker, source: RankerSource
) -> None:
    given = tables(samples([("one", 0.0), ("two", 1.0)]))
    given["candidates"] = given["candidates"].slice(1)
    with pytest.raises(ValueError, match="pair: 2 accepted and 1 candidates share 1 ids"):
        PairShard(source, Pair(), seed=0)(ranker, given)


# --- direct


def comparison(number: int, chosen: str, rejected: str, split: str = "train") -> Row:
    return {
        "comparison_id": f"c{number}",
        "prompt_id": f"p{number}",
        "chosen_id": f"good{number}",
        "rejected_id": f"bad{number}",
        "prompt": "why",
        "chosen": chosen,
        "rejected": rejected,
        "split": split,
        "source": "people",
        "weight": 1.0,
    }


@pytest.fixture(scope="module")
def direct(tiny_llama_dir: str) -> Callable[..., tuple[list[Row], Counters]]:
    def make(
        rows: list[Row], limit: int | None = None, prefix: str = ""
    ) -> tuple[list[Row], Counters]:
        options = Pair(source="direct", max_response_tokens=limit, min_margin=100.0)
        function = DirectPairShard(tiny_llama_dir, options, Templates(response_prefix=prefix))
        table = pa.Table.from_pylist(rows, schema=SCHEMAS["comparisons"])
        shard = function(function.setup(), {"comparisons": table})
        return shard.tables["pairs"].to_pylist(), shard.counters

    return make


@pytest.mark.parametrize("prefix", ["", " "])
def test_direct_cuts_long_responses_which_then_have_no_end(
    direct: Callable[..., Any], tiny_tokenizer: PreTrainedTokenizerBase, prefix: str
) -> None:
    chosen, rejected = "Return the sum of all the numbers in a list", "no"
    rows = [comparison(0, chosen, rejected)]
    templates = Templates(response_prefix=prefix)
    whole = encode_response(tiny_tokenizer, templates, chosen, eos=True)
    short = encode_response(tiny_tokenizer, templates, rejected, eos=True)
    for limit in (len(short), len(whole) - 1, len(whole), None):
        (pair,), counters = direct(rows, limit, prefix)
        assert pair["chosen_token_ids"] == whole[:limit]
        assert prefix + pair["chosen"] == tiny_tokenizer.decode(
            pair["chosen_token_ids"], skip_special_tokens=True
        )
        assert (pair["rejected"], pair["rejected_token_ids"]) == (rejected, short)
        assert counters["cut"] == (limit is not None and limit < len(whole))
        assert pair["label_probability"] == 1.0


def test_direct_puts_the_prefix_before_decodes_once(direct: Callable[..., Any]) -> None:
    """The comparisons that `compare` decodes begin with it, those of people do not."""
    human, decoded = ([comparison(0, f"{begin}numbers", f"{begin}lines")] for begin in ("", " "))
    expected, _ = direct(human, prefix=" ")
    assert direct(decoded, prefix=" ")[0] == expected
    assert direct(human)[0][0]["chosen_token_ids"] != expected[0]["chosen_token_ids"]


def test_direct_comparisons_are_pairs_or_dropped_and_counted(direct: Callable[..., Any]) -> None:
    rows = [
        comparison(0, "the list of numbers", "the list of lines"),
        comparison(1, "numbers", "lines"),
        comparison(2, "numbers", "lines", split="validation"),
    ]
    pairs, counters = direct(rows)
    assert [pair["chosen_id"] for pair in pairs] == ["good0", "good1"]
    assert counters == {
        "comparisons": 3,
        "not_for_training": 1,
        "identical": 0,
        "pairs": 2,
        "cut": 0,
    }
    pairs, counters = direct(rows, limit=3)
    assert [pair["chosen_id"] for pair in pairs] == ["good1"]
    assert (counters["identical"], counters["pairs"]) == (1, 1)
    assert counters["cut"] >= 2
    parts = counters["pairs"] + counters["identical"] + counters["not_for_training"]
    assert counters["comparisons"] == parts


# --- the stage


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["pair.min_margin=1000"], r"no pairs .* 16 prompts .* closer than pair.min_margin: 1000"),
        (["pair.source=direct", "pair.max_response_tokens=1"], "raise that setting"),
    ],
)
def test_pair_stage_without_any_pair_says_what_to_change(
    finished: system.Run, tmp_path: Path, changes: list[str], sentence: str
) -> None:
    run = finished.copy(tmp_path / "store")
    given = {}
    if "pair.source=direct" in changes:
        rows = [comparison(0, "the list of numbers", "the list of lines")]
        reshard(rows, tmp_path / "comparisons", "comparisons", 1)
        given = {"comparisons": str(tmp_path / "comparisons")}
    with pytest.raises(UserError, match=sentence):
        run_stage(run.graph(*changes), "pair", given=given)


@pytest.mark.parametrize("ranking", RANKINGS[2:])
def test_pair_stage_by_reward_makes_one_pair_a_prompt(
    finished: system.Run, tmp_path: Path, ranking: str
) -> None:
    run = finished.copy(tmp_path / "store")
    change = f"pair.ranking={ranking}"
    run_stage(run.graph(change), "pair")
    pairs = run.rows("pair/pairs", change)
    assert len(pairs) == len({pair["prompt_id"] for pair in pairs}) == 16
    rewards = {r["response_id"]: r for r in run.rows("reject/accepted") if r["is_accepted"]}
    best: dict[str, float] = {}
    for row in rewards.values():
        best[row["prompt_id"]] = max(row["reward"], best.get(row["prompt_id"], row["reward"]))
    for pair in pairs:
        both = [rewards[pair[f"{side}_id"]]["reward"] for side in ("chosen", "rejected")]
        assert max(both) == best[pair["prompt_id"]]
    disagrees = sum(
        rewards[pair["chosen_id"]]["reward"] < rewards[pair["rejected_id"]]["reward"]
        for pair in pairs
    )
    counters = run.artifact("pair", change).manifest.counters
    assert counters["reward_disagrees"] == disagrees
