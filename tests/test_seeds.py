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


def _uniforms(seed: int, prompt_id: str, names: list[str], round: int) -> np.ndarray:
    states = seeds.bases_of(seeds.hashes([prompt_id]), seeds.hashes(names), "draws", seed)
    return seeds.uniforms_at(states, round)


@given(st.lists(st.text("abcdef0123456789"), unique=True, min_size=1), st.randoms())
def test_uniforms_of_any_subset_in_any_order_are_the_same_draws(names, random) -> None:
    together = dict(zip(names, _uniforms(3, "prompt", names, 2), strict=True))
    some = random.sample(names, random.randint(1, len(names)))
    assert list(_uniforms(3, "prompt", some, 2)) == [together[name] for name in some]


@pytest.mark.parametrize(
    "other",
    [
        _uniforms(1, "p", SOME_IDS, 0),
        _uniforms(0, "q", SOME_IDS, 0),
        _uniforms(0, "p", SOME_IDS, 1),
        _uniforms(0, "p", [*SOME_IDS[1:], SOME_IDS[0]], 0),
    ],
    ids=["seed", "prompt", "round", "neighbouring id"],
)
def test_uniforms_under_another_key_are_uncorrelated(other) -> None:
    here = _uniforms(0, "p", SOME_IDS, 0)
    assert abs(np.corrcoef(here, other)[0, 1]) < 4 / np.sqrt(len(here))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**70])
def test_uniforms_are_uniform_over_ids_and_over_rounds(seed: int) -> None:
    over_ids = _uniforms(seed, "p", SOME_IDS, 0)
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


def test_hashes_spell_hex_ids_and_digest_all_others() -> None:
    ids = ["0123456789abcdef", "ffffffffffffffff", "0123456789ABCDEF", "short", "sixteen-letters!"]
    found = seeds.hashes(ids)
    assert found[0] == 0x0123456789ABCDEF and found[1] == 2**64 - 1
    assert len(set(found.tolist())) == len(ids)
    for one, number in zip(ids, found, strict=True):
        assert seeds.hashes([one]) == [number]


@given(st.lists(st.integers(0, 2**64 - 1), max_size=20))
def test_hashes_of_bytes_are_those_of_text(numbers: list[int]) -> None:
    ids = [f"{number:016x}" for number in numbers]
    assert (
        seeds.hashes(np.array(ids, dtype="S16")).tolist() == numbers == seeds.hashes(ids).tolist()
    )


def test_bases_of_depend_on_prompt_id_and_purpose() -> None:
    def of(prompt: str, one: str, *parts: str | int) -> int:
        return int(seeds.bases_of(seeds.hashes([prompt]), seeds.hashes([one]), *parts)[0])

    states = {
        of("p", "a", "x", 0),
        of("q", "a", "x", 0),
        of("p", "b", "x", 0),
        of("p", "a", "y", 0),
    }
    assert len(states | {of("p", "a", "x", 1)}) == 5
