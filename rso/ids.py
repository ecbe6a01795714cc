"""Identifiers made from content: the same prompt or response has the same id in every run.

An id is the first 16 hex digits of the SHA-256 of a canonical JSON list. JSON quotes its texts, so
no separator inside a text can make two different lists equal.
"""

import hashlib
import json
import unicodedata

# Constant: the layout of every artifact depends on which shard a prompt falls into.
_SHARD_KEY = b"rso-shard"


def prompt_id(task: str, prompt: str) -> str:
    """Id of a prompt of `task`; prompts that are equal after Unicode NFC normalisation share it."""
    return _digest(task, unicodedata.normalize("NFC", prompt))


def response_id(prompt_id: str, origin: str, index: int) -> str:
    """Id of the `index`-th response of `origin` ("decode", "target", ...) to a prompt."""
    return _digest(prompt_id, origin, index)


def pair_id(prompt_id: str, chosen_id: str, rejected_id: str) -> str:
    """Id of a preference pair; the swapped pair has another id."""
    return _digest("pair", prompt_id, chosen_id, rejected_id)


def comparison_id(prompt_id: str, chosen_id: str, rejected_id: str) -> str:
    """Id of a human or synthetic comparison; the swapped comparison has another id."""
    return _digest("comparison", prompt_id, chosen_id, rejected_id)


def shard_of(prompt_id: str, num_shards: int) -> int:
    """The shard in [0, num_shards) that holds all rows of a prompt."""
    if num_shards < 1:
        raise ValueError(f"num_shards is {num_shards}, expected at least 1: fix the caller")
    hashed = hashlib.blake2b(prompt_id.encode(), key=_SHARD_KEY, digest_size=8).digest()
    return int.from_bytes(hashed, "big") % num_shards


def _digest(*parts: str | int) -> str:
    encoded = json.dumps(parts, separators=(",", ":"), allow_nan=False).encode()
    return hashlib.sha256(encoded).hexdigest()[:16]
