"""What a stage is given and what it gives back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from pipelines.shards import Counters, Dataset, Plan, ShardFunction, map_shards
from rso.artifact import Artifact, Work
from rso.config import REFERENCE, Beam, Config
from rso.models import locate
from rso.parquet import num_shards, read_shard

Curve = list[dict[str, float]]


@dataclass(frozen=True)
class Input:
    """A dataset or model that a stage reads; `artifact` is None for a folder given by hand."""

    output: str
    directory: str
    artifact: Artifact | None


@dataclass(frozen=True)
class Outcome:
    """What a stage counted, and the curves it leaves for the report (figures step by step)."""

    counters: Mapping[str, float]
    curves: Mapping[str, Curve] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """One stage's settings (only the sections it declares), inputs, and place to work."""

    stage: str
    config: Config
    inputs: Mapping[str, Input]
    work: Work
    beam: Beam

    def directory(self, name: str) -> str:
        """Return the folder of an input, e.g. a model directory."""
        return self.inputs[name].directory

    def model(self, source: str) -> str:
        """Return the folder of the model that a setting names: `reference`, or a model source."""
        if source == REFERENCE:
            return self.directory(REFERENCE)
        # the plan has read it for its identity, and a stage asks more than once
        return locate(source)

    def table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Return a whole dataset input, shard after shard; only for what fits in memory."""
        source = self.inputs[name]
        return _read(source.directory, source.output, columns)

    def written(self, name: str) -> pa.Table:
        """Return a whole dataset that this stage has written; only for what fits in memory."""
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

        `inputs` may map each name to the columns that are read; otherwise all are. A stage of
        several passes reads its own `work_inputs` (outputs of an earlier pass) and
        `scratch_inputs` (place to schema); `scratch_output` is the folder in which the outputs of
        this pass are kept for a later one: `folder/output` is the place of each.
        """
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
        plan = Plan(label, sources, targets, f"{self.work.scratch}/counters", total)
        return map_shards(function, plan, self.beam)


def _read(directory: str, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    total = num_shards(directory)
    return pa.concat_tables([read_shard(directory, name, i, total, columns) for i in range(total)])
