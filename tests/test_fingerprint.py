"""Fingerprints: stable where values are the same, different where they are not, else refused."""

import enum
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rso.fingerprint import (
    UnstableValue,
    canonical_json,
    fingerprint,
    from_plain_json,
    plain_json,
)

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
KEYS = st.text().filter(lambda key: key != "$float")
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


def same(first: Any, second: Any) -> bool:
    """Compare values and types: 1, 1.0 and True are three values, and so are 0.0 and -0.0."""
    if type(first) is not type(second):
        return False
    if isinstance(first, list):
        pairs = zip(first, second, strict=False)
        return len(first) == len(second) and all(same(a, b) for a, b in pairs)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    return repr(first) == repr(second)


@given(VALUES, VALUES)
def test_canonical_json_is_equal_only_for_equal_values(first: Any, second: Any) -> None:
    assert (canonical_json(first) == canonical_json(second)) == same(first, second)


@given(VALUES)
def test_canonical_json_is_json_and_comes_back(value: Any) -> None:
    assert same(from_plain_json(json.loads(canonical_json(value))), value)


@given(st.dictionaries(KEYS, st.integers(), max_size=5))
def test_fingerprint_order_of_keys_does_not_count(value: dict[str, int]) -> None:
    assert fingerprint(value) == fingerprint(dict(reversed(list(value.items()))))


def test_fingerprint_is_what_it_was() -> None:
    # Written down once: a change here reruns every stage of every store.
    value = {"b": [1, 1.5, None, True], "a": {"text": "γ", "beta": math.inf}}
    assert canonical_json(value) == (
        '{"a":{"beta":{"$float":"inf"},"text":"\\u03b3"},"b":[1,1.5,null,true]}'
    )
    assert fingerprint(value) == "0e6ebfadc82be6bbe6935bf5d64f06c74a4ddb7207ae6098fe5b526b6eb0b330"


def test_fingerprint_none_differs_from_absent() -> None:
    assert fingerprint({"a": None}) != fingerprint({})


def test_plain_json_keeps_values_that_are_not_finite() -> None:
    back = from_plain_json(plain_json([math.inf, -math.inf, math.nan]))
    assert back[:2] == [math.inf, -math.inf] and math.isnan(back[2])


class Colour(enum.StrEnum):
    RED = "red"


@pytest.mark.parametrize(
    "value",
    [{1}, b"x", Path("x"), object(), np.float64(1), np.int64(1), Colour.RED, 1j, len, np.ones(1)],
)
def test_fingerprint_value_without_stable_encoding_is_refused_with_its_path(value: Any) -> None:
    with pytest.raises(UnstableValue, match=r"value\.settings\.list\[1\]"):
        fingerprint({"settings": {"list": [0, value]}})


@pytest.mark.parametrize("key", [1, None, Colour.RED, "$float"])
def test_fingerprint_key_that_is_no_plain_string_is_refused(key: Any) -> None:
    with pytest.raises(UnstableValue, match=r"value\.a has the key"):
        fingerprint({"a": {key: 1}})
