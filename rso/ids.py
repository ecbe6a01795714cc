"""Identifiers made from content: the same prompt or response has the same id in every run.

All are the first 16 hex digits of SHA-256 over a canonical JSON list, so no separator inside a
text can make two different lists collide.
"""

import hashlib
import json
import unicodedata

# Constant: which shard a prompt falls into is part of the layout of every artifact.
_SHARD_KEY = b"rso-shard"


def prompt_id(task: str, prompt: str) -> str:
    """Id of a prompt of `task`; prompts equal after Unicode NFC normalisation share it."""
    return _digest(task, unicodedata.normalize("NFC", prompt))


def response_id(prompt_id: str, origin: str, index: int) -> str:
    """Id of the `index`-th response of `origin` ("decode", "target", ...) to a prompt."""
    return _digest(prompt_id, origin, index)


def pair_id(prompt_id: str, chosen_id: str, rejected_id: str) -> str:
    """Id of a preference pair; the swapped pair has another."""
    return _digest("pair", prompt_id, chosen_id, rejected_id)


def comparison_id(prompt_id: str, chosen_id: str, rejected_id: str) -> str:
    """Id of a human (or synthetic) comparison; the swapped comparison has another."""
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
