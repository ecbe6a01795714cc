"""The default run with one seed: what it gained, whether it collapsed, and how long it took.

Runs `rso run --config` with the seed in a store of its own and writes one JSON file to
benchmarks/results/: the gold's win rate over SFT and the look of the answers, greedy and sampled,
every contest and paired difference, the ranker's figures, seconds per stage, machine, dtype and
commit. A run that was stopped goes on.
`--pool` reads the files of several seeds instead and prints the pooled win rate with an interval
that resamples seeds, and prompts within them.

Run: python benchmarks/default_run.py --seed 0 [--set KEY=VALUE]
     python benchmarks/default_run.py --pool benchmarks/results/default-*.json
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _sides import machine
from ladder import figures

from rso import seeds
from rso.artifact import Store
from rso.config import load_config, resolve
from rso.evaluation import POINTS, POLICY, REFERENCE
from stages.runner import Graph

RESAMPLES = 4000
RANKER = ("accuracy", "accuracy_low", "accuracy_high", "held_out_comparisons", "positional_bias")


def main() -> None:
    """Run a seed, or pool the results of several."""
    arguments = _arguments()
    if arguments.pool:
        pool([json.loads(Path(path).read_text(encoding="utf-8")) for path in arguments.pool])
        return
    overrides = [f"seed={arguments.seed}", *arguments.set]
    started = time.monotonic()
    command = [str(Path(sys.executable).parent / "rso"), "run", arguments.config]
    settings = [part for override in overrides for part in ("--set", override)]
    subprocess.run([*command, *settings], check=True)
    wall = time.monotonic() - started
    config = resolve(load_config(arguments.config, overrides))
    graph = Graph(config, Store(config.store))
    made = {name: found for name in graph.table if (found := graph.find(name)) is not None}
    ranker = made["train_ranker"].manifest.counters
    metrics = made["evaluate"].read("metrics").to_pylist()
    dtype = config.compute.dtype
    result = {
        "command": " ".join(["python", *sys.argv]),
        "commit": _commit(),
        "machine": machine(("torch", "transformers"), config.compute.device),
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "seed": arguments.seed,
        "wall_seconds": round(wall),
        "stage_seconds": {n: round(a.manifest.timings["seconds"]) for n, a in made.items()},
        "ranker": {name: ranker[name] for name in RANKER if name in ranker},
        "answers": figures(metrics),
        "metrics": [row for row in metrics if row["opponent"]],
        "verdicts": _verdicts(made["evaluate"].read("judgements").to_pylist()),
    }
    path = Path(f"benchmarks/results/default-{dtype}-seed{arguments.seed}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")


def pool(results: Sequence[Mapping[str, Any]]) -> None:
    """Print the gold's win rate per seed and pooled, greedy and sampled."""
    for sampling in ("greedy", "sampled"):
        per_seed = [np.array(result["verdicts"][sampling]) for result in results]
        for result, verdicts in zip(results, per_seed, strict=True):
            print(
                f"{sampling} seed {result['seed']} {result['dtype']}: {100 * verdicts.mean():.1f}"
            )
        value, low, high = (100 * share for share in two_level(per_seed))
        print(f"{sampling}, {len(results)} runs: {value:.1f} [{low:.1f}, {high:.1f}]")


def two_level(per_seed: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """Return the mean over seeds of their means, and its 95 % bootstrap interval over both."""
    draws = seeds.generator("pool", 0)
    means = []
    for _ in range(RESAMPLES):
        chosen = draws.integers(len(per_seed), size=len(per_seed))
        again = [
            per_seed[i][draws.integers(len(per_seed[i]), size=len(per_seed[i]))] for i in chosen
        ]
        means.append(np.mean([values.mean() for values in again]))
    low, high = np.quantile(means, [0.025, 0.975])
    return float(np.mean([values.mean() for values in per_seed])), float(low), float(high)


def _verdicts(judgements: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return the gold's verdicts on policy against SFT, by prompt_id, win 1, tie 0.5, loss 0."""
    found: dict[str, list[float]] = {}
    for row in sorted(judgements, key=lambda row: str(row["prompt_id"])):
        if (row["system"], row["opponent"], row["judge"]) == (POLICY, REFERENCE, "gold"):
            found.setdefault(row["sampling"], []).append(POINTS[row["verdict"]])
    return found


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--pool", nargs="+", metavar="FILE")
    return parser.parse_args()


if __name__ == "__main__":
    main()
