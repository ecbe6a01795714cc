"""Which loss gives the best ranker per trained token: accuracy, slot bias, agreement with the gold.

Every ranker starts from the SFT policy of `--config` and learns from the run's own comparisons. The
settings are those of `train_ranker`, except for the loss. All kinds train on about the same number
of tokens. So `flip`, which reads only one order of a pair, sees more pairs. Another seed draws
other comparisons in another order.

The rankers are judged in both orders. On all held-out comparisons: accuracy, accuracy in single
orders, log loss (ln 2 is a coin), calibration error, slot bias and its spread. On the candidates of
NUM_PROMPTS prompts of `decode`: the correlation of rewards with gold points within a prompt, for
rewards with the baseline first and for rewards in both orders.

A finished training is kept in `<store>-rankers/` and not repeated. Every result is one line of
benchmarks/results/rankers.jsonl.

The default run holds out too few comparisons to tell rankers apart. Set more validation prompts.

Run: python benchmarks/rankers.py --set comparisons.num_validation_prompts=140
     python benchmarks/rankers.py [--config FILE] [--seeds 0 1 2 3 4] [--kinds mean margin]
     python benchmarks/rankers.py --table     # the results as Markdown, and paired differences
"""

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from _sides import machine

from pipelines.score import RankerSource
from rso.artifact import Store
from rso.calibration import judge, positional_bias
from rso.code_digest import code_digest
from rso.config import Config, TrainRanker, identity, load_config, resolve_auto
from rso.fingerprint import fingerprint
from rso.labelling import labeller
from rso.ranking import Comparison, PromptCandidates
from rso.training import ranker as training
from stages.runner import Graph, run_stage
from stages.train_ranker import FIELDS, fold

KINDS: Mapping[str, Mapping[str, Any]] = {
    "margin": {"orders": "margin", "bias_penalty": 0.0},
    "margin+penalty": {"orders": "margin", "bias_penalty": 0.02},
    "mean": {"orders": "mean", "bias_penalty": 0.0},
    "flip": {"orders": "flip", "bias_penalty": 0.0},
}
NUM_PROMPTS = 24
# What `--table` shows, and its digits.
SHOWN = {
    "accuracy": 3,
    "accuracy_chosen_first": 2,
    "accuracy_chosen_second": 2,
    "log_loss": 3,
    "log_loss_one_order": 3,
    "calibration_error": 3,
    "bias": 2,
    "bias_spread": 2,
    "verdicts_flipped": 2,
    "correlation_both": 3,
    "correlation_baseline_first": 3,
}


def main() -> None:
    """Train and judge every kind with every seed."""
    arguments = _arguments()
    if arguments.table:
        table([json.loads(line) for line in arguments.out.read_text().splitlines()])
        return
    config = resolve_auto(load_config(arguments.config, arguments.set))
    for name in ("prepare", "train_sft", "compare", "decode"):
        run_stage(Graph(config, Store(config.store)), name)
    graph = Graph(config, Store(config.store))
    data = _Data(graph)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds:
        for kind in arguments.kinds:
            found = _one(config, data, kind, seed)
            line = {"kind": kind, "seed": seed, **found, "dtype": config.compute.dtype}
            line["machine"] = machine(("torch", "transformers"), config.compute.device)
            with open(arguments.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(kind, seed, {k: round(v, 3) for k, v in found.items()}, flush=True)


def table(results: Sequence[Mapping[str, Any]]) -> None:
    """Print the mean, lowest and highest figure of each kind, and differences seed by seed."""
    by_kind: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in results:
        by_kind.setdefault(row["kind"], {})[row["seed"]] = row
    print("| figure |", " | ".join(f"{kind}, {len(by_kind[kind])} seeds" for kind in by_kind), "|")
    print("|---" * (1 + len(by_kind)) + "|")
    for name, digits in SHOWN.items():
        cells = []
        for rows in by_kind.values():
            values = [row[name] for row in rows.values()]
            mean, low, high = (f"{f(values):.{digits}f}" for f in (statistics.mean, min, max))
            cells.append(f"{mean} ({low} to {high})")
        print(f"| {name} |", " | ".join(cells), "|")
    for first, second in combinations(by_kind, 2):
        seeds = sorted(by_kind[first].keys() & by_kind[second].keys())
        for name in ("accuracy", "log_loss", "correlation_both"):
            gaps = [by_kind[first][seed][name] - by_kind[second][seed][name] for seed in seeds]
            error = statistics.stdev(gaps) / len(gaps) ** 0.5
            print(f"{first} - {second}, {name}: {statistics.mean(gaps):+.3f} ± {error:.3f}")


class _Data:
    """The data that all rankers learn from and are judged on."""

    def __init__(self, graph: Graph) -> None:
        found = {name: graph.find(name) for name in ("prepare", "train_sft", "compare", "decode")}
        prepare, sft, compare, decode = (a for a in found.values() if a is not None)
        self.reference = sft.local("reference")
        self.digests = [sft.digest("reference"), compare.digest("comparisons")]
        rows = compare.read("comparisons").to_pylist()
        settings = graph.config.train_ranker
        self.comparisons = [
            training.LabelledComparison(**{name: row[name] for name in FIELDS})
            for row in rows
            if row["split"] == "validation"
            or fold(row["prompt_id"], settings.num_folds) in settings.folds
        ]
        self.held_out = [c for c in self.comparisons if c.split == "validation"]
        prompts = {r["prompt_id"]: r["prompt"] for r in prepare.read("prompts").to_pylist()}
        texts: dict[str, list[dict[str, Any]]] = {}
        for row in decode.read("candidates").to_pylist():
            texts.setdefault(row["prompt_id"], []).append(row)
        self.candidates = [
            PromptCandidates(
                prompts[prompt_id],
                next(r["response"] for r in group if r["is_baseline"]),
                [r["response"] for r in group],
            )
            for prompt_id, group in sorted(texts.items())[:NUM_PROMPTS]
        ]


def _one(config: Config, data: _Data, kind: str, seed: int) -> dict[str, float]:
    settings = config.train_ranker.model_copy(update=KINDS[kind])
    settings = settings.model_copy(update={"max_comparisons": _budget(config, data, settings)})
    folder = Path(f"{config.store}-rankers/{kind}-{seed}-{_key(data, settings)}")
    started = time.monotonic()
    if not (folder / "done.json").exists():
        (folder / "work").mkdir(parents=True, exist_ok=True)
        result = training.train_ranker(
            data.reference,
            data.comparisons,
            settings,
            config.compute,
            config.templates,
            seed=seed,
            work_directory=str(folder / "work"),
            output_directory=str(folder / "ranker"),
        )
        figures = {
            "comparisons": settings.max_comparisons,
            "tokens": result.training.num_tokens,
            "seconds": time.monotonic() - started,
        }
        (folder / "done.json").write_text(json.dumps(figures), encoding="utf-8")
    done: dict[str, float] = json.loads((folder / "done.json").read_text(encoding="utf-8"))
    return done | _judged(config, data, str(folder / "ranker"), seed)


def _key(data: _Data, settings: TrainRanker) -> str:
    """Return a hash of everything that a training depends on, so that no two share a folder."""
    return fingerprint(
        {
            "settings": identity(settings),
            "data": data.digests,
            "code": code_digest("stages.train_ranker").digest,
        }
    )[:12]


def _budget(config: Config, data: _Data, settings: TrainRanker) -> int:
    """Return the comparisons that cost as many tokens as `max_comparisons` do in both orders."""
    most = settings.max_comparisons or len(data.comparisons)
    if settings.orders != "flip":
        return most
    side = np.mean([len(c.chosen) + len(c.rejected) for c in data.comparisons])
    context = (
        np.mean([len(c.prompt) for c in data.comparisons]) / config.comparisons.pairs_per_prompt
    )
    return min(len(data.comparisons), round(most * (context + 2 * side) / (context + side)))


def _judged(config: Config, data: _Data, folder: str, seed: int) -> dict[str, float]:
    ranker = RankerSource(folder, config.compute, config.templates).load()
    items = [Comparison(c.prompt, c.chosen, c.rejected) for c in data.held_out]
    forward, backward = (z.astype(np.float64) for z in ranker.both_orders(items))
    excess = [len(c.chosen) - len(c.rejected) for c in data.held_out]
    held_out = judge((forward - backward) / 2, excess)
    bias = positional_bias(forward, backward, seed=seed)
    score = labeller(str(config.comparisons.labeller)).score
    together: dict[str, list[float]] = {"baseline_first": [], "both": []}
    spreads = []
    for item, rewards in zip(data.candidates, ranker.rewards_many(data.candidates), strict=True):
        points = [score(item.prompt, text, None) for text in item.responses]
        spreads.append(float(np.std(rewards.values)))
        for name, values in (("baseline_first", -rewards.forward), ("both", rewards.values)):
            if np.std(points) > 0 and np.std(values) > 0:
                together[name].append(float(np.corrcoef(values, points)[0, 1]))
    return {
        "held_out": len(items),
        "accuracy": held_out.accuracy.value,
        "accuracy_chosen_first": float((forward > 0).mean()),
        "accuracy_chosen_second": float((backward < 0).mean()),
        "log_loss": held_out.mean_loss,
        "log_loss_one_order": float(
            (np.logaddexp(0, -forward).mean() + np.logaddexp(0, backward).mean()) / 2
        ),
        "calibration_error": held_out.calibration_error,
        "bias": bias.mean.value,
        "bias_spread": bias.spread,
        "verdicts_flipped": bias.flips.value,
        "margin_deviation": float(((forward - backward) / 2).std()),
        "reward_spread": float(np.median(spreads)),
        "correlation_baseline_first": float(np.mean(together["baseline_first"])),
        "correlation_both": float(np.mean(together["both"])),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--kinds", nargs="+", default=[*KINDS], choices=[*KINDS])
    parser.add_argument("--table", action="store_true", help="print the results of --out")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/rankers.jsonl"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
