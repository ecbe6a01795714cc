"""Rejection sampling: the core against the paper's listing, and the pipeline over Parquet.

Core: 10,000 prompts x 64 candidates, k = 8, beta = 0.5, rewards of standard deviation sigma. The
listing is timed twice: as the paper prints it, and with functions of the standard library instead
of numpy's. Ours draws by key. Two more times are printed: that of hashing the ids, which is needed
once for all beta, and that of ours when a tenth of the candidates are copies of one text. Repeats
alternate. The times are medians.

Pipeline: `reject`, as the stage runs it, on Parquet files of 10,000 and of 100,000 prompts x 64
candidates. Each size runs in a separate process, whose peak memory is printed.

Run: .venv/bin/python benchmarks/sampling.py [--quick]
"""

import argparse
import json
import math
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rso import seeds
from rso.aliases import UInt64s
from rso.config import Beam, Reject
from rso.parquet import read_shard, write_shard
from rso.rejection import Candidates, select_many, states_of
from schemas import SCHEMAS

NUM_CANDIDATES, NUM_SAMPLES, BETA = 64, 8, 0.5
SIGMAS = (0.25, 0.5, 1.0, 2.0)
PROMPTS_PER_SHARD = 2048


def main() -> None:
    """Print both tables, or measure one pipeline if this is the child process."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the sizes")
    parser.add_argument("--measure", metavar="DIRECTORY", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(Path(arguments.measure))))
        return
    print(f"numpy {np.__version__}, pyarrow {pa.__version__}, {os.cpu_count()} cores", end=", ")
    print(f"{platform.processor() or platform.machine()}")
    scale = 10 if arguments.quick else 1
    core(10_000 // scale)
    pipeline([10_000 // scale, 100_000 // scale])


def listing(
    texts: list[str],
    rewards: list[float],
    uniform: Callable[[], float],
    exp: Callable[[float], float],
) -> list[str]:
    """Return the accepted texts as appendix A.1 of the paper computes them, draw by draw.

    The paper uses numpy's scalar functions for `uniform` and `exp`.
    """
    candidates = dict(zip(texts, rewards, strict=True))
    accepted: list[str] = []
    while len(accepted) < NUM_SAMPLES:
        max_reward = max(candidates.values())
        to_remove = []
        for text, reward in candidates.items():
            if uniform() >= exp((reward - max_reward) / BETA):
                continue
            accepted.append(text)
            to_remove.append(text)
            if len(accepted) == NUM_SAMPLES:
                break
        for text in to_remove:
            candidates.pop(text)
    return accepted


def core(num_prompts: int) -> None:
    """Print times of the listing, of ours and of hashing ids, for several spreads of rewards."""
    size = num_prompts * NUM_CANDIDATES
    draw = np.random.default_rng(0)
    prompt_ids = [f"{i:016x}" for i in draw.integers(0, 2**63, num_prompts)]
    numbers = draw.integers(0, 2**63, size)
    ids = np.array([f"{i:016x}" for i in numbers], dtype="S16")
    texts = [[f"response {i}" for i in range(NUM_CANDIDATES)]] * num_prompts
    sizes = np.full(num_prompts, NUM_CANDIDATES)

    def states() -> UInt64s:
        return states_of(seeds.hashes(prompt_ids), sizes, seeds.hashes(ids), seed=0)

    print(f"\ncore: {num_prompts:,} prompts x {NUM_CANDIDATES}, k = {NUM_SAMPLES}")
    print(
        f"{'sigma/beta':>10} {'printed, s':>11} {'lean, s':>8} {'ours, s':>8} {'times':>6}"
        f" {'times lean':>11} {'copies, s':>10} {'ids, s':>7} {'rounds':>7}"
    )
    is_copy = draw.random(size) < 0.1
    for sigma in SIGMAS:
        rewards = draw.normal(0, sigma, (num_prompts, NUM_CANDIDATES))
        rows = rewards.tolist()
        candidates = Candidates(
            sizes,
            states(),
            np.tile(np.arange(NUM_CANDIDATES), num_prompts),
            rewards.ravel(),
        )

        def printed(rows: list[list[float]] = rows) -> None:
            for names, row in zip(texts, rows, strict=True):
                listing(names, row, np.random.uniform, np.exp)

        def lean(rows: list[list[float]] = rows) -> None:
            for names, row in zip(texts, rows, strict=True):
                listing(names, row, random.random, math.exp)

        def ours(candidates: Candidates = candidates) -> Any:
            return select_many(candidates, beta=BETA, num_samples=NUM_SAMPLES)

        def with_copies(candidates: Candidates = candidates) -> Any:
            some = candidates._replace(texts=np.where(is_copy, 0, candidates.texts))
            return select_many(some, beta=BETA, num_samples=NUM_SAMPLES)

        work: list[Callable[[], Any]] = [printed, lean, ours, with_copies, states]
        printed_s, lean_s, ours_s, copies_s, ids_s = alternate(work, repeats=5)
        rounds = float(ours().num_rounds.mean())
        print(
            f"{sigma / BETA:>10.1f} {printed_s:>11.3f} {lean_s:>8.3f} {ours_s:>8.4f}"
            f" {printed_s / ours_s:>6.0f} {lean_s / ours_s:>11.1f} {copies_s:>10.4f} {ids_s:>7.4f}"
            f" {rounds:>7.2f}"
        )


def alternate(work: list[Callable[[], Any]], repeats: int) -> list[float]:
    """Return the median seconds of each function; they run in turns, after one warm-up each."""
    seconds: list[list[float]] = [[] for _ in work]
    for repeat in range(repeats + 1):
        for function, found in zip(work, seconds, strict=True):
            started = time.perf_counter()
            function()
            if repeat:
                found.append(time.perf_counter() - started)
    return [statistics.median(found) for found in seconds]


def pipeline(sizes: list[int]) -> None:
    """Print the measurements of the pipeline for each size, each made in a separate process."""
    print("\npipeline `reject`, FnApiRunner, one process")
    print(
        f"{'prompts':>9} {'rows':>10} {'seconds':>8} {'rows/s':>10} {'peak MiB':>9}"
        f" {'read':>6} {'sample':>7} {'write':>6} {'Beam and rest':>14}"
    )
    for num_prompts in sizes:
        with tempfile.TemporaryDirectory() as directory:
            write_inputs(Path(directory), num_prompts)
            child = subprocess.run(
                [sys.executable, __file__, "--measure", directory],
                check=True,
                capture_output=True,
                text=True,
            )
        found = json.loads(child.stdout.splitlines()[-1])
        rows = num_prompts * NUM_CANDIDATES
        rest = found["seconds"] - found["read"] - found["sample"] - found["write"]
        print(
            f"{num_prompts:>9,} {rows:>10,} {found['seconds']:>8.1f}"
            f" {rows / found['seconds']:>10,.0f} {found['peak_mib']:>9.0f} {found['read']:>6.1f}"
            f" {found['sample']:>7.1f} {found['write']:>6.1f} {rest:>14.1f}"
        )


def write_inputs(directory: Path, num_prompts: int) -> None:
    """Write rewards and candidates in shards of PROMPTS_PER_SHARD prompts."""
    total = -(-num_prompts // PROMPTS_PER_SHARD)
    draw = np.random.default_rng(0)
    for index in range(total):
        count = min(PROMPTS_PER_SHARD, num_prompts - index * PROMPTS_PER_SHARD)
        size = count * NUM_CANDIDATES
        prompt_ids = np.repeat(
            [f"{i:016x}" for i in draw.integers(0, 2**63, count)], NUM_CANDIDATES
        )
        response_ids = [f"{i:016x}" for i in draw.integers(0, 2**63, size)]
        tokens = draw.integers(0, 49_152, (size, 12), dtype=np.int32)
        texts = [f"Return the {a} of the {b} number {c}." for a, b, c in tokens[:, :3].tolist()]
        columns: dict[str, Any] = {
            "prompt_id": prompt_ids,
            "response_id": response_ids,
            "sample_index": np.tile(np.arange(NUM_CANDIDATES, dtype=np.int32), count),
            "response": texts,
            "token_ids": pa.array(list(tokens), pa.list_(pa.int32())),
            "num_tokens": np.full(size, 12, dtype=np.int32),
            "finish_reason": ["stop"] * size,
            "cumulative_logp": draw.normal(-20, 4, size).astype(np.float32),
            "is_baseline": np.arange(size) % NUM_CANDIDATES == 0,
            "reward": draw.normal(0, 1, size).astype(np.float32),
            "baseline_id": response_ids,
        }
        for name in ("candidates", "rewards"):
            schema = SCHEMAS[name]
            arrays = [
                pa.nulls(size, field.type)
                if field.name not in columns
                else pa.array(columns[field.name]).cast(field.type)
                for field in schema
            ]
            table = pa.Table.from_arrays(arrays, schema=schema)
            write_shard(str(directory / name), name, index, total, table)


def measure(directory: Path) -> dict[str, float]:
    """Return seconds and peak MiB of the pipeline, then seconds of its parts, run one by one."""
    from pipelines.reject import REJECT_COLUMNS, RejectShard
    from pipelines.shards import Dataset, Plan, map_shards
    from rso.parquet import num_shards

    total = num_shards(str(directory / "rewards"))
    inputs = {
        name: Dataset(str(directory / name), name, columns)
        for name, columns in REJECT_COLUMNS.items()
    }
    outputs = {name: Dataset(str(directory / name), name) for name in ("accepted", "diagnostics")}
    function = RejectShard(Reject(beta=BETA, num_samples=NUM_SAMPLES), seed=0)
    plan = Plan("reject", inputs, outputs, str(directory / "counters"), total)
    started = time.perf_counter()
    map_shards(function, plan, Beam())
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    parts = {"read": 0.0, "sample": 0.0, "write": 0.0}
    for index in range(total):
        at = time.perf_counter()
        tables = {
            name: read_shard(source.directory, name, index, total, source.columns)
            for name, source in inputs.items()
        }
        read = time.perf_counter()
        made = function(None, tables).tables
        sampled = time.perf_counter()
        for name, table in made.items():
            write_shard(str(directory / "again" / name), name, index, total, table)
        parts["read"] += read - at
        parts["sample"] += sampled - read
        parts["write"] += time.perf_counter() - sampled
    return {"seconds": seconds, "peak_mib": peak, **parts}


if __name__ == "__main__":
    main()
