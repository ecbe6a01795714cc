"""Keyed randomness: a draw depends on its purpose, never on when or where it is made.

There are two kinds. `generator` gives a stream of draws under one key. `uniforms_at` gives one draw
per id and round, so that bundling, sharding, retries and row order cannot change a result.
"""

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rso.aliases import Floats, Indices, UInt64s

# splitmix64 (Steele, Lea, Flood 2014): the golden-ratio increment and the multipliers of the mix.
_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))

HEX_DIGITS = 16
_DIGIT_OF = np.full(256, 255, dtype=np.uint8)
_DIGIT_OF[np.frombuffer(b"0123456789abcdef", dtype=np.uint8)] = np.arange(16)


def key(*parts: str | int) -> int:
    """The 64-bit key of `parts`: the first eight bytes of the SHA-256 of their JSON list."""
    encoded = json.dumps(parts, separators=(",", ":"), allow_nan=False).encode()
    return int.from_bytes(hashlib.sha256(encoded).digest()[:8], "big")


def generator(*parts: str | int) -> np.random.Generator:
    """A counter-based generator (Philox); `parts` determine its whole stream."""
    return np.random.Generator(np.random.Philox(key=key(*parts)))


def hashes(ids: Sequence[str] | npt.NDArray[np.bytes_]) -> UInt64s:
    """uint64 [n]: one number per id, which depends on the id alone.

    16 lower-case hex digits, the form of our own ids, give the number that they spell, in some
    nanoseconds. Any other text gives its BLAKE2b hash, in about a microsecond. An array of bytes
    holds ids of 16 bytes.
    """
    if isinstance(ids, np.ndarray):
        return _hashes_of_16(ids)
    fits = np.fromiter((len(i) == HEX_DIGITS and i.isascii() for i in ids), np.bool_, len(ids))
    hashed = np.zeros(len(ids), dtype=np.uint64)
    hashed[fits] = _hashes_of_16(np.array([ids[i] for i in np.flatnonzero(fits)], dtype="S16"))
    for index in np.flatnonzero(~fits):
        hashed[index] = _digest(ids[index].encode())
    return hashed


def bases(ids: Sequence[str], *parts: str | int) -> UInt64s:
    """uint64 [n]: one state per id under the key `parts`; `uniforms_at` draws from it.

    Any text may be an id. Each id costs a hash of about a microsecond.
    """
    hashed = np.array([_digest(i.encode()) for i in ids], dtype=np.uint64)
    return _mix(hashed ^ np.uint64(key(*parts)))


def bases_of(prompt_hashes: UInt64s, id_hashes: UInt64s, *parts: str | int) -> UInt64s:
    """uint64 [...]: one state per prompt and id under the key `parts`, from their `hashes`.

    The two arrays broadcast. This is fast enough for millions of candidates at a time. The states
    differ from those of `bases`.
    """
    purpose = np.array([key(*parts)], dtype=np.uint64)
    return _states(id_hashes, _states(prompt_hashes, purpose))


def uniforms_at(states: UInt64s, round: int) -> Floats:
    """float64 in [0, 1), shaped as `states`: one draw of 53 random bits per state in `round`.

    Rounds count from 0.
    """
    # Python integers: numpy warns when a product of two scalars wraps around.
    offset = np.uint64((round + 1) * int(_INCREMENT) % 2**64)
    bits: UInt64s = _mix(states + offset) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


def order(ids: Sequence[str], *parts: str | int) -> Indices:
    """intp [n]: indices that put `ids` into a random order, which the key `parts` determines.

    The resulting order of distinct ids does not depend on the order in which they are given.
    """
    return np.argsort(bases(ids, "order", *parts), kind="stable")


def _hashes_of_16(ids: npt.NDArray[np.bytes_]) -> UInt64s:
    raw = np.ascontiguousarray(ids).view(np.uint8).reshape(-1, HEX_DIGITS)
    digits = _DIGIT_OF[raw]
    # Two digits make a byte, the high digit first. Eight big-endian bytes make the number.
    pairs = np.ascontiguousarray(digits[:, 0::2] << 4 | digits[:, 1::2])
    hashed: UInt64s = pairs.view(">u8")[:, 0].astype(np.uint64)
    for index in np.flatnonzero((digits > 15).any(axis=1)):
        hashed[index] = _digest(raw[index].tobytes())
    return hashed


def _digest(text: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _states(hashed: UInt64s, keys: UInt64s) -> UInt64s:
    return _mix(hashed ^ _mix(keys))


def _mix(states: UInt64s) -> UInt64s:
    mixed: UInt64s = states ^ (states >> np.uint64(30))
    mixed *= _MULTIPLIERS[0]
    mixed ^= mixed >> np.uint64(27)
    mixed *= _MULTIPLIERS[1]
    mixed ^= mixed >> np.uint64(31)
    return mixed
