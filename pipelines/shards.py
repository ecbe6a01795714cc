"""Map shard files to shard files: the shape of every data-parallel stage.

The element of the pipeline is a shard. In all input datasets a keyed hash of prompt_id chooses the
shard of a row. So no GroupByKey is needed, and no result can depend on bundling. The counters file
of a shard is written after its Parquet files. A shard with a counters file is done and is not run
again.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import apache_beam as beam
import pyarrow as pa
import pyarrow.compute as pc
from apache_beam.metrics import Metrics
from apache_beam.utils.shared import Shared

from pipelines.workers import Workers
from rso.aliases import Counters
from rso.config import Beam
from rso.errors import PromptError, UserError
from rso.files import write_json
from rso.parquet import read_shard, write_shard


class Dataset(NamedTuple):
    """The folder of a dataset's shards, their schema, and the columns to read (None: all)."""

    directory: str
    schema: str
    columns: tuple[str, ...] | None = None


class Shard(NamedTuple):
    """The result of one shard: one table per output, the counters, and groups of counters.

    The shards of a map have the same groups in the same order, for example one per β.
    """

    tables: Mapping[str, pa.Table]
    counters: Counters
    groups: Sequence[Counters] = ()


class ShardFunction(Protocol):
    """Work on one shard. `setup` loads models and the like, once per worker process."""

    def setup(self) -> Any:
        """Return the loaded engine, or None."""

    def __call__(self, engine: Any, tables: Mapping[str, pa.Table], /) -> Shard:
        """Return the outputs for one shard; `tables` has one table per input."""


@dataclass(frozen=True)
class Plan:
    """Inputs and outputs of a shard map; `counters` is the folder of the counters files."""

    label: str
    inputs: Mapping[str, Dataset]
    outputs: Mapping[str, Dataset]
    counters: str
    num_shards: int


class MapShards(beam.PTransform):
    """Apply a `ShardFunction` to each shard index; emits the index of every shard that is done."""

    def __init__(self, function: ShardFunction, plan: Plan) -> None:
        super().__init__()
        self._function, self._plan = function, plan

    def expand(self, indices: Any) -> Any:
        """Spread the shards over the workers and map them."""
        return (
            indices
            | f"spread {self._plan.label}" >> beam.Reshuffle()
            | f"map {self._plan.label}" >> beam.ParDo(_MapShard(self._function, self._plan))
        )


class _MapShard(beam.DoFn):
    def __init__(self, function: ShardFunction, plan: Plan) -> None:
        self._function, self._plan = function, plan
        self._shared = Shared()

    def setup(self) -> None:
        self._engine: Any = None

    def process(self, index: int) -> Iterator[int]:
        if _is_done(self._plan, index):
            yield index
            return
        if _failures(self._plan):
            return
        try:
            shard = self._map(index)
        except UserError as error:
            # Not raised here, because Beam would log stack traces. `run_and_sum` raises it.
            write_json(_failure_file(self._plan, index), str(error))
            return
        finish_shard(self._plan, index, shard)
        yield index

    def _map(self, index: int) -> Shard:
        if self._engine is None:
            # Load at the first shard that needs it: if all shards are done, nothing is loaded.
            self._engine = self._shared.acquire(lambda: _Engine(self._function.setup()))
        tables = {
            name: read_shard(
                dataset.directory, dataset.schema, index, self._plan.num_shards, dataset.columns
            )
            for name, dataset in self._plan.inputs.items()
        }
        try:
            return self._function(self._engine.value, tables)
        except PromptError as error:
            raise UserError(f"prompt {_id_of(error.prompt, tables)}: {error}") from error


def _id_of(prompt: str, tables: Mapping[str, pa.Table]) -> str:
    """Return the prompt_id of a prompt, given its text."""
    for table in tables.values():
        if {"prompt_id", "prompt"} <= set(table.column_names):
            place = pc.index(table["prompt"], prompt).as_py()
            if place >= 0:
                return str(table["prompt_id"][place].as_py())
    raise AssertionError(f"no table of the shard has the prompt {prompt[:60]!r}")


class _Engine:
    """`Shared` keeps weak references, which None and some engines do not allow."""

    def __init__(self, value: Any) -> None:
        self.value = value


def map_shards(function: ShardFunction, plan: Plan, settings: Beam) -> Counters:
    """Run `MapShards` over all shards of `plan` and return the sums of the shards' counters.

    Counters are summed in the order of the shards, so the sums do not depend on bundling.

    Raises:
        UserError: as `run_and_sum`.
    """

    def build(root: Any) -> Any:
        # Beam divides the elements among the workers at the start, so give it only unfinished ones.
        left = [index for index in range(plan.num_shards) if not _is_done(plan, index)]
        return root | beam.Create(left) | MapShards(function, plan)

    return run_and_sum(build, plan, settings)


def run_and_sum(build: Callable[[Any], Any], plan: Plan, settings: Beam) -> Counters:
    """Run the pipeline that `build` adds to a root, and return the sums of its shards' counters.

    If every shard is done, nothing is started.

    Raises:
        UserError: a shard raised `UserError` (the message is that of the first such shard), or a
            worker process died.
    """
    os.makedirs(plan.counters, exist_ok=True)
    indices = range(plan.num_shards)
    for index in indices:
        with contextlib.suppress(FileNotFoundError):
            os.remove(_failure_file(plan, index))
    if not all(_is_done(plan, index) for index in indices):
        workers = Workers(plan.label, settings.num_workers)
        options = workers.options(settings.options)
        pipeline = beam.Pipeline(runner=settings.runner, options=options)
        build(pipeline)
        with workers.watched():
            pipeline.run().wait_until_finish()
        for mistake in _failures(plan):
            raise UserError(mistake)
    return sum_counters([_counted(plan, index)["counters"] for index in indices])


def sum_groups(plan: Plan) -> list[Counters]:
    """Return the sums of each group of counters over the shards of a map that has run."""
    groups = [_counted(plan, index)["groups"] for index in range(plan.num_shards)]
    return [sum_counters(group) for group in zip(*groups, strict=True)]


def finish_shard(plan: Plan, index: int, shard: Shard) -> None:
    """Write the tables of a shard and then its counters file, which marks the shard as done."""
    for name, dataset in plan.outputs.items():
        write_shard(dataset.directory, dataset.schema, index, plan.num_shards, shard.tables[name])
    counted = {"counters": shard.counters, "groups": list(shard.groups)}
    write_json(_counters_file(plan, index), counted)
    for name, count in shard.counters.items():
        if isinstance(count, int):
            Metrics.counter(plan.label, name).inc(count)


def sum_counters(shards: Sequence[Counters]) -> Counters:
    """Return the sums of the counters over shards."""
    total: Counters = {}
    for counters in shards:
        for name, count in counters.items():
            total[name] = total.get(name, 0) + count
    return total


def _is_done(plan: Plan, index: int) -> bool:
    return os.path.exists(_counters_file(plan, index))


def _counters_file(plan: Plan, index: int) -> str:
    return os.path.join(plan.counters, f"{plan.label}-{index:05d}-of-{plan.num_shards:05d}.json")


def _counted(plan: Plan, index: int) -> Any:
    return _read_json(_counters_file(plan, index))


def _failure_file(plan: Plan, index: int) -> str:
    return os.path.join(plan.counters, f"{plan.label}-{index:05d}.failure.json")


def _failures(plan: Plan) -> list[str]:
    """Return the messages of the shards that raised `UserError`, in the order of the shards."""
    files = [_failure_file(plan, index) for index in range(plan.num_shards)]
    return [_read_json(file) for file in files if os.path.exists(file)]


def _read_json(path: str) -> Any:
    with open(path, encoding="utf-8") as file:
        return json.load(file)
