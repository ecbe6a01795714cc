"""A whole run in miniature: sixty questions, a tiny Llama, every stage in a second or two."""

import json
import os
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from rso.artifact import Artifact, Store
from rso.config import Config, load_config, resolve_auto
from stages.runner import Graph, run_stage

WORDS = ["list", "file", "lines", "numbers", "error", "value", "empty", "question", "answer", "fox"]
NUM_GOOD = 60
SEED = 7


def examples(count: int = NUM_GOOD) -> list[dict[str, Any]]:
    """Return rows of prompt, target and group; five prompts are a group."""
    draw = random.Random(SEED)
    return [
        {
            "body": f"{index}: the " + " ".join(draw.choices(WORDS, k=draw.randint(3, 9))) + ".",
            "line": "Return the " + " ".join(draw.choices(WORDS, k=3)) + ".",
            "module": f"m{index // 5}",
        }
        for index in range(count)
    ]


def bad_rows() -> list[dict[str, Any]]:
    """Return rows that are refused: no target, wrong type, a copy, too long a prompt."""
    first = examples(1)[0]
    return [
        {"body": "no target", "module": "m0"},
        {"body": 17, "line": "a number for a prompt", "module": "m0"},
        first,
        {"body": "word " * 400, "line": "long", "module": "m1"},
    ]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write one JSON object a line."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def demonstrations(path: Path) -> dict[str, Any]:
    """Return the source of demonstrations at `path`."""
    return {
        "name": "questions",
        "kind": "demonstrations",
        "path": str(path),
        "fields": {"prompt": "body", "target": "line"},
        "group": "module",
    }


def write_human_comparisons(path: Path) -> dict[str, Any]:
    """Write a comparison for every example, the human line preferred, and return its source."""
    rows = [
        {"q": row["body"], "good": row["line"], "bad": f"bad {row['module']}", "m": row["module"]}
        for row in examples()
    ]
    write_jsonl(path, rows)
    return {
        "name": "people",
        "kind": "comparisons",
        "path": str(path),
        "fields": {"prompt": "q", "chosen": "good", "rejected": "bad"},
        "group": "m",
    }


def settings(model: str, store: Path, sources: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the config of the tiny run as plain data."""
    train = {"optimizer": "adamw", "learning_rate": 0.003, "batch_size": 8, "checkpoint_steps": 2}
    sampling = {"temperature": 1.0, "top_k": 40, "max_new_tokens": 8}
    ranker = {**train, "num_folds": 3}
    return {
        "store": str(store),
        "model": model,
        "compute": {"dtype": "float32", "device": "cpu"},
        "prepare": {
            "task": "tiny",
            "sources": sources,
            "split": {"validation": 0.2, "test": 0.2},
            "max_prompt_tokens": 120,
            "prompts_per_shard": 24,
        },
        "train_sft": train,
        "comparisons": {
            "labeller": "length",
            "num_prompts": 24,
            "num_validation_prompts": 6,
            "num_samples": 4,
            "pairs_per_prompt": 2,
            "sampling": sampling,
        },
        "train_ranker": {**ranker, "folds": [0, 1]},
        "train_gold_ranker": {**ranker, "folds": [2]},
        "decode": {
            "engine": "transformers",
            "num_prompts": 16,
            "num_samples": 6,
            "sampling": sampling,
        },
        "reject": {"beta": 0.5, "betas": [0.05, 5.0], "num_samples": 4},
        "train_policy": {**train, "num_validation_prompts": 4, "max_new_tokens": 8},
        "evaluate": {"num_prompts": 8, "max_new_tokens": 8},
        "report": {"num_examples": 3},
    }


def write_config(path: Path, data: Mapping[str, Any]) -> Path:
    """Write a config file."""
    path.write_text(yaml.safe_dump(dict(data), sort_keys=False), encoding="utf-8")
    return path


def load(config: Path, *overrides: str) -> Config:
    """Return a config as every entrance of the system loads it."""
    return resolve_auto(load_config(config, overrides))


def graph_of(config: Config) -> Graph:
    """Return the graph of a config over its store, as the store is now."""
    return Graph(config, Store(config.store))


def run_all(config: Config, until: str | None = None) -> dict[str, bool]:
    """Run the stages in this process, to `until`; return of each whether it was there already."""
    was_cached = {}
    for name in graph_of(config).table:
        was_cached[name] = run_stage(graph_of(config), name).is_cached
        if name == until:
            break
    return was_cached


@dataclass(frozen=True)
class Run:
    """A config file and the store that it names; `code` is where another copy of the code lies."""

    path: Path
    store: Path
    code: Path | None = None
    _found: dict[tuple[str, ...], Artifact] = field(default_factory=dict, compare=False, repr=False)

    def config(self, *overrides: str) -> Config:
        """Return the config with overrides; the store is this run's."""
        return load(self.path, f"store={self.store}", *overrides)

    def graph(self, *overrides: str) -> Graph:
        """Return the graph over this run's store, as it is now."""
        config = self.config(*overrides)
        return Graph(config, Store(config.store), code=self.code)

    def artifact(self, stage: str, *overrides: str) -> Artifact:
        """Return the artifact of a stage, looked up once."""
        key = (stage, *overrides)
        if key not in self._found:
            found = self.graph(*overrides).find(stage)
            assert found is not None, f"{stage} has not run"
            self._found[key] = found
        return self._found[key]

    def rows(self, place: str, *overrides: str) -> list[dict[str, Any]]:
        """Return the rows of `stage/output`."""
        stage, output = place.split("/")
        rows: list[dict[str, Any]] = self.artifact(stage, *overrides).read(output).to_pylist()
        return rows

    def copy(self, store: Path) -> "Run":
        """Return this run over a copy of its store, hard links where nothing is rewritten."""
        shutil.copytree(self.store, store, copy_function=os.link)
        return replace(self, store=store, _found={})

    def real_copy(self, store: Path) -> "Run":
        """Return this run over a copy of its bytes."""
        shutil.copytree(self.store, store)
        return replace(self, store=store, _found={})


def override(key: str, value: Any) -> str:
    """Return `--set` text for any value; JSON is YAML."""
    return f"{key}={json.dumps(value)}"


def statuses(run: Run, *overrides: str) -> dict[str, str]:
    """Return what `rso plan` says of each stage: cached, run or waits."""
    from stages.runner import plan

    return {p.stage.name: p.status for p in plan(run.graph(*overrides))}


def reasons(run: Run, *overrides: str) -> dict[str, str]:
    """Return why, stage by stage."""
    from stages.runner import plan

    return {p.stage.name: p.reason for p in plan(run.graph(*overrides))}
