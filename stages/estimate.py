"""How long the stages of a run will take: a first estimate, made before the run starts.

For a stage that has an artifact in this store, the estimate is the seconds of its newest artifact.
For any other stage, the tokens that pass through a model are divided by the rates of this CPU.
"""

import json
import logging
import re
import struct
from collections import defaultdict
from collections.abc import Sequence
from itertools import islice
from math import prod
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import pyarrow.parquet as pq

from rso.artifact import Store
from rso.config import REFERENCE, Config, Source, SplitShares
from rso.models import base_of, locate, parse_source
from rso.sources import RawRow, read_source
from stages.machine import Machine, measure
from stages.token_counts import Lengths, Tokens, tokens

logger = logging.getLogger(__name__)

CHARACTERS_PER_TOKEN = 4
ROWS_READ = 300
# Each stage is a process that imports its libraries.
START_SECONDS = 8.0
# Floating-point operations per token and parameter, at the rate of plain matrix products. Fitted to
# SmolLM2-135M in float32 on two AVX2 cores of 130 GFLOP/s. They trained about 200 tokens/s with a
# third of the layers frozen, prefilled 500 and decoded 150 to 300.
TRAINED, PREFILLED, DECODED = 4.8, 2.0, 4.4
PACKED_BYTES = {"F32": 4.0, "F16": 2.0, "BF16": 2.0}


class Rates(NamedTuple):
    """Tokens per second."""

    trained: float
    prefilled: float
    decoded: float


class Estimate(NamedTuple):
    """The seconds of all stages that can be estimated; `unknown` names the other stages.

    `remembered` stages are estimated by an earlier artifact, `computed` stages by their tokens.
    Stages without tokens add to the seconds but have no name here.
    """

    seconds: float
    remembered: tuple[str, ...] = ()
    computed: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


class Ahead(NamedTuple):
    """What to expect of a run; None means that it could not be determined."""

    machine: Machine | None
    estimate: Estimate | None


def rates(flops: float, parameters: float) -> Rates:
    """Return the rates of a model on a CPU that reaches `flops` FLOP/s in matrix products."""
    return Rates(*(flops / (cost * parameters) for cost in (TRAINED, PREFILLED, DECODED)))


def seconds(counts: Tokens, speed: Rates) -> float:
    """Return the seconds of a stage, including its start."""
    return START_SECONDS + sum(count / rate for count, rate in zip(counts, speed, strict=True))


def look_ahead(names: Sequence[str], config: Config, store: Store) -> Ahead:
    """Return the machine that will run the stages `names`, and how long they will take."""
    is_new = any(not store.artifacts(name) for name in names)
    compute = config.compute
    machine = measure(compute.dtype, compute.device, seconds=1.0 if is_new else 0.0)
    try:
        flops = machine.flops if machine is not None else None
        return Ahead(machine, estimate(names, config, store, flops))
    except Exception as error:
        # The stage that needs a broken file or model reports it.
        logger.debug("no estimate: %s", error, exc_info=True)
        return Ahead(machine, None)


def estimate(names: Sequence[str], config: Config, store: Store, flops: float | None) -> Estimate:
    """Return how long the stages `names` will take; `flops` is the CPU's FLOP/s, None if unknown.

    Raises:
        OSError, UserError: the raw files or the model cannot be read.
    """
    earlier = {name: artifacts[0] for name in names if (artifacts := store.artifacts(name))}
    total = sum(START_SECONDS + a.manifest.timings.get("seconds", 0.0) for a in earlier.values())
    new = [name for name in names if name not in earlier]
    lengths = read_lengths(config) if new else Lengths(0.0, 0.0, {})
    computed, unknown = [], []
    for name in new:
        counts = tokens(name, config, lengths)
        size = _parameters(name, config) if any(counts) else None
        if not any(counts):
            total += START_SECONDS
        elif flops and size:
            total += seconds(counts, rates(flops, size))
            computed.append(name)
        else:
            unknown.append(name)
    return Estimate(total, tuple(earlier), tuple(computed), tuple(unknown))


def read_lengths(config: Config) -> Lengths:
    """Return mean lengths over the first rows of each source, and estimated numbers of rows.

    Lengths are in tokens, estimated from characters. If no source has responses, their length is
    `decode.sampling.max_new_tokens`.
    """
    settings = config.prepare
    prompts: list[float] = []
    responses: list[float] = []
    rows: dict[tuple[str, str], float] = defaultdict(float)
    for source in settings.sources:
        read = list(islice(read_source(source), ROWS_READ))
        prompts += _lengths(read, source, "prompt")
        responses += _lengths(read, source, "target") + _lengths(read, source, "chosen")
        count = _num_rows(source, read)
        for split, share in _shares(source, settings.split).items():
            rows[source.kind, split] += share * count
    kept = [min(length, settings.max_prompt_tokens) for length in prompts]
    longest = float(config.decode.sampling.max_new_tokens)
    return Lengths(fmean(kept) if kept else 0.0, fmean(responses) if responses else longest, rows)


def _lengths(read: Sequence[RawRow], source: Source, role: str) -> list[float]:
    name = source.fields.get(role, role)
    found = [raw.row.get(name) for raw in read if raw.row is not None]
    return [len(text) / CHARACTERS_PER_TOKEN for text in found if isinstance(text, str)]


def _num_rows(source: Source, read: Sequence[RawRow]) -> float:
    if len(read) < ROWS_READ:
        return len(read)
    path = Path(source.path)
    if path.suffix in (".parquet", ".pq") or source.format == "parquet":
        return float(pq.read_metadata(path).num_rows)
    return path.stat().st_size / fmean(len(raw.raw.encode()) + 1 for raw in read)


def _shares(source: Source, shares: SplitShares) -> dict[str, float]:
    if source.split is not None:
        return {source.split: 1.0}
    rest = 1 - shares.validation - shares.test
    return {"train": rest, "validation": shares.validation, "test": shares.test}


def _parameters(stage: str, config: Config) -> float | None:
    """Return the parameters of the model that a stage spends its time on; None if unknown."""
    asked = getattr(config, {"compare": "comparisons"}.get(stage, stage))
    if getattr(asked, "engine", None) == "vllm-server":
        return None
    given = {
        "train_ranker": config.train_ranker.init_from,
        "score": config.train_ranker.init_from,
        "pair": config.train_ranker.init_from,
        "evaluate": config.train_ranker.init_from,
        "train_gold_ranker": getattr(config.train_gold_ranker, "init_from", REFERENCE),
        "decode": config.decode.policy,
        "train_policy": config.train_policy.init_from,
    }.get(stage, REFERENCE)
    return num_parameters(config.model if given == REFERENCE else given)


def num_parameters(source: str) -> float | None:
    """Return the number of parameters of a local model; None for a hub model or unknown files.

    Safetensors headers give the number. For a GGUF file, it is the size of the file divided by the
    bytes per weight, which the file name tells, e.g. Q4_1. Adapters count as their base model.
    """
    if parse_source(source).kind == "hub":
        return None
    location = locate(source)
    path = Path(base_of(location) or location)
    if path.suffix == ".gguf":
        packed = re.search(r"(?:^|[-._])(?:I?Q(\d)|(B?F(?:16|32)))", path.name, re.IGNORECASE)
        if packed is None:
            return None
        # The file also holds scales, and some tensors have more bits. Add 1.5 bits for them.
        size = PACKED_BYTES[packed[2].upper()] if packed[2] else (int(packed[1]) + 1.5) / 8
        return path.stat().st_size / size
    shapes = [shape for file in path.glob("*.safetensors") for shape in _shapes(file)]
    return float(sum(map(prod, shapes))) or None


def _shapes(path: Path) -> list[list[int]]:
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    return [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
