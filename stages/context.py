"""What a stage receives and what it returns."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from pipelines.shards import Dataset, Plan, ShardFunction, map_shards, sum_groups
from rso.aliases import Counters
from rso.artifact import Artifact, Work
from rso.config import REFERENCE, Beam, Config
from rso.models import locate
from rso.parquet import num_shards, read_shard

Curve = list[dict[str, float]]


@dataclass(frozen=True)
class Input:
    """A dataset or model that a stage reads.

    `artifact` is None for a folder given by `--input`, and in the processes of `stages.launch`.
    """

    output: str
    directory: str
    artifact: Artifact | None


@dataclass(frozen=True)
class Outcome:
    """The counters of a stage, and its curves for the report: for each name a list of points."""

    counters: Mapping[str, float]
    curves: Mapping[str, Curve] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """The settings, inputs and work folder of a stage; other config sections are hidden from it."""

    stage: str
    config: Config
    inputs: Mapping[str, Input]
    work: Work
    beam: Beam

    def directory(self, name: str) -> str:
        """Return the folder of an input, e.g. a model directory."""
        return self.inputs[name].directory

    def model(self, source: str) -> str:
        """Return the folder or file of the model that a setting names.

        `source` is `reference` or a model source.

        Raises:
            UserError: the model is missing.
        """
        if source == REFERENCE:
            return self.directory(REFERENCE)
        # Not `resolve`: it reads all weights, and the plan has already read them for the identity.
        return locate(source)

    def table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Return all rows of a dataset input, shard after shard; they must fit in memory."""
        source = self.inputs[name]
        return _read(source.directory, source.output, columns)

    def shards(self, name: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Yield the shards of a dataset input, one at a time."""
        source = self.inputs[name]
        return _shards(source.directory, source.output, columns)

    def written(self, name: str) -> pa.Table:
        """Return all rows of a dataset that this stage has written; they must fit in memory."""
        return _read(self.work.output(name), name)

    def map(
        self,
        label: str,
        function: ShardFunction,
        *,
        inputs: Sequence[str] | Mapping[str, tuple[str, ...]],
        outputs: Sequence[str],
        work_inputs: Sequence[str] = (),
        scratch_inputs: Mapping[str, str] | None = None,
        scratch_output: str | None = None,
    ) -> Counters:
        """Map shard files to shard files by a Beam pipeline and return the summed counters.

        `inputs` names the inputs, or maps each name to the columns to read. A list reads all
        columns. The first input fixes the number of shards.

        A stage may need several passes. `work_inputs` are outputs of the stage that an earlier pass
        wrote. With `scratch_output` the outputs of this pass are for a later pass only: each is
        written to `scratch_output/output` in the scratch folder. `scratch_inputs` maps each such
        place to its schema.

        Raises:
            UserError: the function found a mistake of the user, or a worker process died.
        """
        plan = self._plan(label, inputs, outputs, work_inputs, scratch_inputs, scratch_output)
        return map_shards(function, plan, self.beam)

    def map_groups(
        self,
        label: str,
        function: ShardFunction,
        *,
        inputs: Mapping[str, tuple[str, ...]],
        outputs: Sequence[str],
    ) -> list[Counters]:
        """Map shard files to shard files like `map`, and return the sums of `Shard.groups`."""
        plan = self._plan(label, inputs, outputs)
        map_shards(function, plan, self.beam)
        return sum_groups(plan)

    def _plan(
        self,
        label: str,
        inputs: Sequence[str] | Mapping[str, tuple[str, ...]],
        outputs: Sequence[str],
        work_inputs: Sequence[str] = (),
        scratch_inputs: Mapping[str, str] | None = None,
        scratch_output: str | None = None,
    ) -> Plan:
        columns = inputs if isinstance(inputs, Mapping) else dict.fromkeys(inputs)
        sources = {
            name: Dataset(self.inputs[name].directory, self.inputs[name].output, wanted)
            for name, wanted in columns.items()
        }
        total = num_shards(next(iter(sources.values())).directory)
        sources |= {name: Dataset(self.work.output(name), name) for name in work_inputs}
        sources |= {
            place: Dataset(f"{self.work.scratch}/{place}", schema)
            for place, schema in (scratch_inputs or {}).items()
        }
        targets = {name: Dataset(self.work.output(name), name) for name in outputs}
        if scratch_output is not None:
            targets = {
                name: Dataset(f"{self.work.scratch}/{scratch_output}/{name}", name)
                for name in outputs
            }
        return Plan(label, sources, targets, f"{self.work.scratch}/counters", total)


def _read(directory: str, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    return pa.concat_tables(_shards(directory, name, columns))


def _shards(directory: str, name: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    total = num_shards(directory)
    for index in range(total):
        yield read_shard(directory, name, index, total, columns)
