"""The default run with one seed: what it gained, whether it collapsed, and how long it took.

Runs `rso run --config` with the seed in a store of its own and writes one JSON file to
benchmarks/results/: the gold's win rate over SFT and the look of the answers, greedy and sampled,
every contest and paired difference, the ranker's figures, seconds per stage, machine, dtype and
commit. A run that was stopped goes on.
`--pool` reads the files of several seeds instead. It prints them as Markdown tables, with the
pooled win rate under the gold and an interval that resamples seeds, and prompts within them.

Run: python benchmarks/default_run.py --seed 0 [--set KEY=VALUE]
     python benchmarks/default_run.py --pool benchmarks/results/default-*.json
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _sides import machine
from ladder import figures

from rso import seeds
from rso.artifact import Store
from rso.config import load_config, resolve_auto
from rso.evaluation import HUMAN, POINTS, POLICY, REFERENCE
from stages.runner import Graph

RESAMPLES = 4000
RANKER = ("accuracy", "accuracy_low", "accuracy_high", "held_out_comparisons", "positional_bias")


GAIN = (
    "seed",
    "dtype",
    "gold, greedy",
    "gold, sampled",
    "ranker, greedy",
    "length, greedy",
    "gold, policy against the human line",
    "gold, SFT against it",
    "ranker's held-out accuracy",
)
LOOK = (
    "seed",
    "dtype",
    "most common first word, greedy",
    "sampled",
    "distinct first words, greedy",
    "sampled",
    "words, greedy",
    "ROUGE-L, greedy",
    "sampled",
    "chrF, greedy",
    "sampled",
    "KL, nats",
)


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
    config = resolve_auto(load_config(arguments.config, overrides))
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
    """Print, as Markdown, the gain and the look of the answers of each run, and the pooled gain."""
    results = sorted(results, key=lambda result: (result["dtype"], result["seed"]))
    _head(GAIN)
    for result in results:
        found = partial(_metric, result)
        accuracy = [result["ranker"][name] for name in RANKER[:3]]
        print(
            f"| {result['seed']} | {result['dtype']} |",
            _percent(found("win_rate", judge="gold", opponent=REFERENCE)),
            _percent(found("win_rate", judge="gold", opponent=REFERENCE, sampling="sampled")),
            _percent(found("win_rate", judge="ranker", opponent=REFERENCE)),
            _percent(found("win_rate", judge="length", opponent=REFERENCE)),
            _percent(found("win_rate", judge="gold", opponent=HUMAN)),
            _percent(found("win_rate", judge="gold", opponent=HUMAN, system=REFERENCE)),
            _percent(accuracy),
        )
    pooled = [
        _percent(two_level([np.array(result["verdicts"][sampling]) for result in results]))
        for sampling in ("greedy", "sampled")
    ]
    print(f"| {len(results)} runs, pooled | |", *pooled, "| | | | |")
    print()
    _head(LOOK)
    for result in results:
        greedy, sampled = result["answers"]["greedy"], result["answers"]["sampled"]
        found = partial(_metric, result)
        cells = ["{:.0%}, {:.0%}".format(*a["top_first_word_share"]) for a in (greedy, sampled)]
        cells += ["{:.0f}, {:.0f}".format(*a["distinct_first_words"]) for a in (greedy, sampled)]
        cells += ["{:.1f}, {:.1f}".format(*greedy["mean_words"])]
        cells += [
            _signed(found(f"{name}_difference", judge="", opponent=REFERENCE, sampling=sampling))
            for name in ("rouge_l", "chrf")
            for sampling in ("greedy", "sampled")
        ]
        cells += [f"{result['answers']['kl_nats']:.2f}"]
        print(f"| {result['seed']} | {result['dtype']} |", " | ".join(cells), "|")


def _head(names: Sequence[str]) -> None:
    print("|", " | ".join(names), "|")
    print("|" + "---|" * len(names))


def _metric(
    result: Mapping[str, Any],
    metric: str,
    *,
    judge: str,
    opponent: str,
    system: str = POLICY,
    sampling: str = "greedy",
) -> list[float]:
    """Return estimate, lower and upper end of a figure."""
    wanted = (metric, judge, opponent, system, sampling)
    names = ("metric", "judge", "opponent", "system", "sampling")
    (row,) = (r for r in result["metrics"] if tuple(r[name] for name in names) == wanted)
    return [row[name] for name in ("value", "low", "high")]


def _percent(estimate: Sequence[float]) -> str:
    return "{:.1f} [{:.1f}, {:.1f}] |".format(*(100 * share for share in estimate))


def _signed(estimate: Sequence[float]) -> str:
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*estimate)


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
