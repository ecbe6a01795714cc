"""Where the gain of a run is lost: the known gold replaces the ranker, stage by stage.

Each rung repeats the run of `--config` with the synthetic gold instead of the ranker in some
stages. The stages before them are those of the run:

- `default`: the run itself;
- `checkpoint`: the gold chooses the policy's checkpoint (`train_policy`);
- `rewards`: the gold gives the rewards for rejection sampling (`score`);
- `labels`: the gold labels the pairs (`pair`);
- `rewards+labels`: both of these;
- `all`: all three;
- `sft`: no preferences: SFT on as many tokens as the whole run trained on, against the run's SFT.

The gap between two rungs is the possible gain from improving a stage. The gold judges every rung on
the same prompts. The artifacts of a rung are in `<store>-ladder/<rung>-seed<seed>-<digest of the
gold>`. A finished rung is not run again. One JSON file per seed is written to benchmarks/results/.

Run: python benchmarks/ladder.py [--config FILE] [--seed 0] [--set KEY=VALUE] [--rungs labels all]
     python benchmarks/ladder.py --table benchmarks/results/ladder-seed*.json    # as Markdown
"""

import argparse
import hashlib
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from _gold import GoldSource
from _sides import machine

from rso.artifact import Artifact, Store
from rso.code_digest import code_digest
from rso.config import Config, load_config, resolve_auto
from rso.evaluation import POLICY, REFERENCE, find
from stages.runner import Graph, run_stage

RUNGS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "checkpoint": ("train_policy",),
    "rewards": ("score",),
    "labels": ("pair",),
    "rewards+labels": ("score", "pair"),
    "all": ("score", "pair", "train_policy"),
}
SFT = "sft"
CHAIN = ("score", "reject", "pair", "logps", "train_policy", "evaluate")
SHOWN = (
    "mean_words",
    "gold_score",
    "top_first_word_share",
    "distinct_first_words",
    "repeated_share",
)


def main() -> None:
    """Run the chosen rungs and write their figures."""
    arguments = _arguments()
    if arguments.table:
        table([json.loads(Path(path).read_text(encoding="utf-8")) for path in arguments.table])
        return
    config = resolve_auto(load_config(arguments.config, [f"seed={arguments.seed}", *arguments.set]))
    _check(config)
    graph = Graph(config, Store(config.store))
    for name in graph.table:
        if name != "report":
            print(f"{name} …", file=sys.stderr, flush=True)
            run_stage(graph, name)
            graph = Graph(config, Store(config.store))
    path = Path(arguments.out or f"benchmarks/results/ladder-seed{arguments.seed}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    rungs = {}
    for rung in arguments.rungs:
        started = time.monotonic()
        metrics = _more_sft(graph) if rung == SFT else _rung(graph, rung)
        rungs[rung] = figures(metrics)
        _show(rung, rungs[rung], time.monotonic() - started)
        result = {
            "command": " ".join(["python", *sys.argv]),
            "machine": machine(("torch", "transformers"), config.compute.device),
            "threads": torch.get_num_threads(),
            "dtype": config.compute.dtype,
            "seed": arguments.seed,
            "rungs": rungs,
        }
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")


def table(results: Sequence[Mapping[str, Any]]) -> None:
    """Print the figures of each rung: the mean over seeds, then each seed."""
    seeds = ", ".join(str(result["seed"]) for result in results)
    print(
        f"| rung (seeds {seeds}) | gold, greedy, % | sampled, % | first words, greedy | KL, nats |"
    )
    print("|---|---|---|---|---|")
    for rung in (*RUNGS, SFT):
        found = [result["rungs"][rung] for result in results if rung in result["rungs"]]
        if found:
            cells = [
                _cell([100 * f["greedy"]["gold_win_rate"][0] for f in found], 1),
                _cell([100 * f["sampled"]["gold_win_rate"][0] for f in found], 1),
                _cell([f["greedy"]["distinct_first_words"][0] for f in found], 0),
                _cell([f["kl_nats"] for f in found], 2),
            ]
            print(f"| {rung} |", " | ".join(cells), "|")


def _cell(values: Sequence[float], digits: int) -> str:
    each = ", ".join(f"{value:.{digits}f}" for value in values)
    return f"**{statistics.mean(values):.{digits}f}** ({each})"


def _check(config: Config) -> None:
    """Exit unless the gold can replace the ranker: it replaces only one ranker, in this process.

    In other processes the ranker itself would be used.
    """
    if config.compute.num_processes > 1 or config.beam.num_workers > 1:
        sys.exit("ladder: set compute.num_processes and beam.num_workers to 1")
    if config.objectives.rankers:
        sys.exit("ladder: objectives.rankers names rankers; expected the trained one alone")


def figures(metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures that the ladder compares, for greedy and for sampled answers.

    `gold_win_rate` is [value, low, high]. Other figures are [policy, reference].
    """
    found: dict[str, Any] = {}
    for sampling in ("greedy", "sampled"):
        rate = find(metrics, "win_rate", opponent=REFERENCE, judge="gold", sampling=sampling)
        if rate is None:
            continue
        found[sampling] = {"gold_win_rate": [rate[k] for k in ("value", "low", "high")]}
        for metric in SHOWN:
            rows = [find(metrics, metric, system=s, sampling=sampling) for s in (POLICY, REFERENCE)]
            found[sampling][metric] = [row["value"] if row else None for row in rows]
    kl = find(metrics, "kl", opponent=REFERENCE, sampling="ancestral")
    return found | {"kl_nats": kl["value"] if kl else math.nan}


def _rung(graph: Graph, rung: str) -> list[dict[str, Any]]:
    """Return the metrics of a rung; stages before the first one with the gold are the run's."""
    golden = RUNGS[rung]
    config = graph.config
    if not golden:
        return _metrics(_artifact(graph, "evaluate"))
    store = _store(config, rung)
    made: dict[str, Artifact] = {}
    for name in CHAIN[CHAIN.index(golden[0]) :]:
        # The gold chose the checkpoint that the run chose: the answers are the run's.
        if name == "evaluate" and _policy(made["train_policy"]) == _policy(
            _artifact(graph, "train_policy")
        ):
            break
        with _gold_in(name if name in golden or name == "evaluate" else None, config):
            made[name] = _again(graph, store, name, made)
    return _metrics(made.get("evaluate") or _artifact(graph, "evaluate"))


def _more_sft(graph: Graph) -> list[dict[str, Any]]:
    """Return the metrics of SFT on as many tokens as the run trained on, judged like its policy."""
    config = graph.config
    trained = [name for name in graph.table if name.startswith("train_")]
    tokens = {name: _artifact(graph, name).manifest.counters["tokens"] for name in trained}
    examples = config.train_sft.max_examples
    assert examples is not None, "train_sft.max_examples is not set: nothing to have more of"
    more = round(examples * sum(tokens.values()) / tokens["train_sft"])
    longer = config.model_copy(
        update={"train_sft": config.train_sft.model_copy(update={"max_examples": more})}
    )
    store = _store(config, SFT)
    made = {"train_sft": _again(Graph(longer, graph.store), store, "train_sft", {})}
    learnt = made["train_sft"].manifest.counters["tokens"]
    if learnt < 0.9 * sum(tokens.values()):
        sys.exit(
            f"ladder: {more} demonstrations are wanted for {sum(tokens.values()):.0f} tokens and "
            f"there are only {learnt:.0f} tokens of them; give train_sft fewer examples"
        )
    given = {"policy": made["train_sft"].output("reference")}
    with _gold_in("evaluate", config):
        return _metrics(_again(graph, store, "evaluate", {}, given))


def _policy(train_policy: Artifact) -> str:
    return train_policy.digest("policy")


def _metrics(evaluate: Artifact) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = evaluate.read("metrics").to_pylist()
    return rows


def _store(config: Config, rung: str) -> Store:
    """Return the store of a rung. Each gold has its own, because fingerprints do not include it."""
    gold = code_digest("rso.labelling").digest
    digest = hashlib.sha256((gold + Path(__file__).with_name("_gold.py").read_text()).encode())
    name = f"{rung.replace('+', '-')}-seed{config.seed}-{digest.hexdigest()[:8]}"
    return Store(f"{config.store}-ladder/{name}")


def _again(
    graph: Graph,
    store: Store,
    name: str,
    made: Mapping[str, Artifact],
    given: Mapping[str, str] | None = None,
) -> Artifact:
    """Run a stage into `store`; its inputs are `given`, else `made` there, else the run's own."""
    inputs = {}
    for key, feed in graph.stage(name).reads.items():
        producer, output = feed.split("/")
        artifact = made.get(producer) or _artifact(graph, producer)
        inputs[key] = artifact.output(output)
    return run_stage(Graph(graph.config, store), name, given=inputs | dict(given or {})).artifact


@contextmanager
def _gold_in(name: str | None, config: Config) -> Iterator[None]:
    """Make the stage `name` load the gold wherever it would load a ranker; None changes nothing."""
    if name is None:
        yield
        return
    source = GoldSource(str(config.comparisons.labeller))
    attribute, value = ("ranker_of_run", source)
    replacement: Any = lambda context: value  # noqa: E731
    if name == "score":
        attribute = "objective_rankers"
        replacement = lambda context: {"ranker": source}  # noqa: E731
    __import__(f"stages.{name}")
    with mock.patch.object(sys.modules[f"stages.{name}"], attribute, replacement):
        yield


def _artifact(graph: Graph, name: str) -> Artifact:
    artifact = graph.find(name)
    assert artifact is not None, f"{name} has no artifact"
    return artifact


def _show(rung: str, found: Mapping[str, Any], seconds: float) -> None:
    for sampling in ("greedy", "sampled"):
        if sampling in found:
            value, low, high = (100 * x for x in found[sampling]["gold_win_rate"])
            rest = ", ".join(
                f"{name} {ours:.3g} (SFT {theirs:.3g})"
                for name, (ours, theirs) in (
                    (name, found[sampling][name]) for name in SHOWN if found[sampling][name][0]
                )
            )
            print(f"{rung:15} {sampling:8} {value:.1f} [{low:.1f}, {high:.1f}]  {rest}")
    print(f"{rung:15} KL {found['kl_nats']:.2f} nats, {seconds:.0f} s", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--rungs", nargs="+", default=[*RUNGS, SFT], choices=[*RUNGS, SFT])
    parser.add_argument("--table", nargs="+", metavar="FILE", help="print results as Markdown")
    parser.add_argument("--out", help="JSON file; default benchmarks/results/ladder-seedN.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
