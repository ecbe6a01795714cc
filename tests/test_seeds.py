"""Keys, keyed draws and ids."""

import hashlib
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rso import ids, seeds

SOME_IDS = [f"{number:016x}" for number in range(20_000)]


def test_key_of_parts_is_sha256_of_their_json_list() -> None:
    expected = hashlib.sha256(b'["decode",7,"caf\\u00e9"]').digest()[:8]
    assert seeds.key("decode", 7, "café") == int.from_bytes(expected, "big")


def test_key_of_parts_that_join_equally_differs() -> None:
    made = {seeds.key("a", "bc"), seeds.key("ab", "c"), seeds.key("abc"), seeds.key('a","bc')}
    assert len(made | {seeds.key(1), seeds.key("1"), seeds.key(0), seeds.key()}) == 8


def test_generator_with_one_key_repeats_and_with_another_does_not() -> None:
    first = seeds.generator("a", 0).random(5)
    assert np.array_equal(first, seeds.generator("a", 0).random(5))
    assert not np.array_equal(first, seeds.generator("a", 1).random(5))


@given(st.lists(st.text("abcdef0123456789"), unique=True, min_size=1), st.randoms())
def test_uniforms_of_any_subset_in_any_order_are_the_same_draws(names, random) -> None:
    together = dict(zip(names, seeds.uniforms(3, "prompt", names, 2), strict=True))
    some = random.sample(names, random.randint(1, len(names)))
    assert list(seeds.uniforms(3, "prompt", some, 2)) == [together[name] for name in some]


@pytest.mark.parametrize(
    "other",
    [
        seeds.uniforms(1, "p", SOME_IDS, 0),
        seeds.uniforms(0, "q", SOME_IDS, 0),
        seeds.uniforms(0, "p", SOME_IDS, 1),
        seeds.uniforms(0, "p", [*SOME_IDS[1:], SOME_IDS[0]], 0),
    ],
    ids=["seed", "prompt", "round", "neighbouring id"],
)
def test_uniforms_under_another_key_are_uncorrelated(other) -> None:
    here = seeds.uniforms(0, "p", SOME_IDS, 0)
    assert abs(np.corrcoef(here, other)[0, 1]) < 4 / np.sqrt(len(here))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**70])
def test_uniforms_are_uniform_over_ids_and_over_rounds(seed: int) -> None:
    over_ids = seeds.uniforms(seed, "p", SOME_IDS, 0)
    states = seeds.bases(SOME_IDS[:1], "p", seed)
    over_rounds = np.concatenate([seeds.uniforms_at(states, round) for round in range(5_000)])
    for draws in (over_ids, over_rounds):
        assert draws.min() >= 0 and draws.max() < 1
        assert stats.kstest(draws, "uniform").pvalue > 1e-4


def test_order_of_ids_in_another_order_is_the_same_order() -> None:
    names = SOME_IDS[:50]
    expected = [names[index] for index in seeds.order(names, "a")]
    assert sorted(expected) == names and expected != names
    assert [names[::-1][index] for index in seeds.order(names[::-1], "a")] == expected
    assert [names[index] for index in seeds.order(names, "b")] != expected


def test_order_puts_each_id_first_equally_often() -> None:
    names = ["a", "b", "c", "d"]
    firsts = [seeds.order(names, "case", seed)[0] for seed in range(4_000)]
    assert stats.chisquare(np.bincount(firsts, minlength=4)).pvalue > 1e-4


def test_prompt_id_is_that_of_the_nfc_form_and_of_the_task() -> None:
    decomposed = unicodedata.normalize("NFD", "café")
    assert decomposed != "café"
    assert ids.prompt_id("t", decomposed) == ids.prompt_id("t", "café")
    assert ids.prompt_id("u", "café") != ids.prompt_id("t", "café")
    assert ids.prompt_id("t", "x") == hashlib.sha256(b'["t","x"]').hexdigest()[:16]


def test_ids_of_different_things_differ() -> None:
    made = [
        ids.response_id("p", "decode", 1),
        ids.response_id("p", "decode", 11),
        ids.response_id("p", "target", 1),
        ids.response_id("q", "decode", 1),
        ids.pair_id("p", "a", "b"),
        ids.pair_id("p", "b", "a"),
        ids.comparison_id("p", "a", "b"),
        ids.comparison_id("p", "b", "a"),
    ]
    assert len(set(made)) == len(made)
    assert all(len(identifier) == 16 and int(identifier, 16) >= 0 for identifier in made)


def test_shard_of_prompts_spreads_them_evenly() -> None:
    shards = np.bincount([ids.shard_of(name, 7) for name in SOME_IDS], minlength=7)
    assert len(shards) == 7 and stats.chisquare(shards).pvalue > 1e-4


def test_shard_of_no_shards_raises() -> None:
    with pytest.raises(ValueError, match="num_shards is 0"):
        ids.shard_of("p", 0)


def test_numeric_modules_import_numpy_alone() -> None:
    code = (
        "import sys, numpy.random; before = set(sys.modules)\n"
        "import rso.rejection, rso.pairing, rso.statistics, rso.text_metrics, rso.ids\n"
        "known = set(sys.stdlib_module_names) | {'rso', 'numpy'}\n"
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before} - known))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
