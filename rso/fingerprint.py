"""Hashes of canonical JSON: a value has the same fingerprint on every machine and version."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from rso.errors import UserError

# JSON has no NaN and no infinity. This key marks their encoding, and no other dict may have it.
_FLOAT_KEY = "$float"


class UnstableValue(UserError):
    """A value has no stable encoding, so it has no fingerprint."""


def fingerprint(value: Any) -> str:
    """Return the SHA-256 of the canonical JSON of `value`, in hex.

    Raises:
        UnstableValue: as `canonical_json`.
    """
    return hashlib.sha256(canonical_json(value).encode("ascii")).hexdigest()


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a local file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: Any) -> str:
    """Return `value` as ASCII JSON with sorted keys and no spaces.

    A list equals a tuple with the same items. 1, 1.0 and True are three different values. A key
    with the value None differs from an absent key. Floats are written by `repr`. Infinities and NaN
    are written as `{"$float": "inf"}`.

    Raises:
        UnstableValue: a type is not exactly None, bool, int, float, str, list, tuple or dict, or a
            key is not a string or is `$float`; the message names the place.
    """
    encoded = plain_json(value)
    return json.dumps(encoded, sort_keys=True, separators=(",", ":"), allow_nan=False)


def plain_json(value: Any, path: str = "value") -> Any:
    """Return `value` as JSON's own types: tuples as lists, infinities and NaN as marked dicts.

    Raises:
        UnstableValue: as `canonical_json`.
    """
    # Exact types only: subclasses (enums, numpy floats) print differently in other versions.
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {_FLOAT_KEY: repr(value)}
    if type(value) in (list, tuple):
        return [plain_json(item, f"{path}[{i}]") for i, item in enumerate(value)]
    if type(value) is dict:
        return {_key(key, path): plain_json(item, f"{path}.{key}") for key, item in value.items()}
    raise UnstableValue(
        f"{path} is {value!r:.80} of type {type(value).__module__}.{type(value).__qualname__}, "
        "which has no stable encoding; expected None, bool, int, float, str, list or dict: convert "
        "it before it is fingerprinted."
    )


def from_plain_json(value: Any) -> Any:
    """Return the value that `plain_json` encoded, with lists in place of tuples."""
    if isinstance(value, list):
        return [from_plain_json(item) for item in value]
    if isinstance(value, dict):
        if set(value) == {_FLOAT_KEY}:
            return float(value[_FLOAT_KEY])
        return {key: from_plain_json(item) for key, item in value.items()}
    return value


def _key(key: Any, path: str) -> str:
    if type(key) is not str or key == _FLOAT_KEY:
        raise UnstableValue(
            f"{path} has the key {key!r:.80} of type {type(key).__qualname__}; expected a string "
            f"other than {_FLOAT_KEY!r}: rename or convert the key."
        )
    return key
