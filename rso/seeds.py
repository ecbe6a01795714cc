"""Keyed randomness: every draw is a function of what it is for, never of when or where it is made.

Two kinds: `generator` for a stream of draws under one key, and `uniforms` for one draw per id and
round, so that bundling, sharding, retries and row order cannot change a result.
"""

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

UInt64s = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

# splitmix64 (Steele, Lea, Flood 2014): the golden-ratio increment and the finaliser's multipliers.
_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def key(*parts: str | int) -> int:
    """64-bit key of `parts`: the first eight bytes of SHA-256 over their canonical JSON list."""
    encoded = json.dumps(parts, separators=(",", ":"), allow_nan=False).encode()
    return int.from_bytes(hashlib.sha256(encoded).digest()[:8], "big")


def generator(*parts: str | int) -> np.random.Generator:
    """A counter-based generator (Philox) whose whole stream is fixed by `parts`."""
    return np.random.Generator(np.random.Philox(key=key(*parts)))


def bases(ids: Sequence[str], *parts: str | int) -> UInt64s:
    """uint64 [n]: one 64-bit state per id under the key `parts`; `uniforms_at` draws from it.

    Hashing ids is the slow part (about a microsecond each), so it is done once and not per round.
    """
    hashed = b"".join(hashlib.blake2b(i.encode(), digest_size=8).digest() for i in ids)
    return _mix(np.frombuffer(hashed, dtype="<u8").astype(np.uint64) ^ np.uint64(key(*parts)))


def uniforms_at(states: UInt64s, round: int) -> Floats:
    """float64 [n] in [0, 1): the draw of each state in `round` (0, 1, ...), 53 random bits each."""
    # In Python integers, since numpy warns when a product of two scalars wraps around.
    offset = np.uint64((round + 1) * int(_INCREMENT) % 2**64)
    bits: UInt64s = _mix(states + offset) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


def uniforms(seed: int, prompt_id: str, response_ids: Sequence[str], round: int) -> Floats:
    """float64 [n] in [0, 1): one draw per response for algorithm 1, in the order of the ids.

    A draw depends only on its own (seed, prompt_id, response_id, round).
    """
    return uniforms_at(bases(response_ids, "uniforms", seed, prompt_id), round)


def order(ids: Sequence[str], *parts: str | int) -> Indices:
    """intp [n]: indices that put `ids` into the random order that belongs to the key `parts`.

    The order is one of the ids, whichever way they are given, provided that they are distinct.
    """
    return np.argsort(bases(ids, "order", *parts), kind="stable")


def _mix(states: UInt64s) -> UInt64s:
    states = (states ^ (states >> np.uint64(30))) * _MULTIPLIERS[0]
    states = (states ^ (states >> np.uint64(27))) * _MULTIPLIERS[1]
    return states ^ (states >> np.uint64(31))
