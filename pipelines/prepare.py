"""Raw files to prompts, demonstrations, comparisons and quarantine, sharded by prompt.

Only this pipeline has a GroupByKey: it makes the shards that every later stage keeps.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam

from pipelines.shards import Dataset, Plan, Shard, finish_shard, run_and_sum
from pipelines.tables import table_of
from rso import config
from rso.aliases import Counters
from rso.ids import shard_of
from rso.progress import progress
from rso.sources import (
    RefusedRow,
    SourceRow,
    TokenCounter,
    check_settings,
    parse_row,
    prepare_rows,
    read_source,
)

Item = SourceRow | RefusedRow
PREPARE_OUTPUTS = ("prompts", "demonstrations", "comparisons", "quarantine")


def prepare_shards(
    settings: config.Prepare,
    *,
    seed: int,
    load_counter: Callable[[], TokenCounter],
    outputs: Mapping[str, str],
    counters: str,
    beam_settings: config.Beam,
) -> Counters:
    """Write the shards of the four datasets to the folders in `outputs`; return the counters.

    The number of shards is the number of rows in all sources over `prompts_per_shard`, rounded up.

    Raises:
        UserError: the settings contradict each other, or a file is missing, empty or not as the
            settings describe it (see `rso.sources`).
    """
    check_settings(settings)
    num_rows = [sum(1 for _ in read_source(source)) for source in settings.sources]
    num_shards = max(1, math.ceil(sum(num_rows) / settings.prompts_per_shard))
    plan = Plan(
        "prepare",
        {},
        {name: Dataset(outputs[name], name) for name in PREPARE_OUTPUTS},
        counters,
        num_shards,
    )

    def build(root: Any) -> Any:
        items = (
            root
            | "sources" >> beam.Create(list(range(len(settings.sources))))
            | "parse" >> beam.ParDo(_Parse(settings, load_counter, num_rows, num_shards))
        )
        # A shard without rows is written too, because all datasets have the same shards.
        empty = root | "shards" >> beam.Create([(index, None) for index in range(num_shards)])
        return (
            (items, empty)
            | "all" >> beam.Flatten()
            | "by shard" >> beam.GroupByKey()
            | "write" >> beam.ParDo(_Write(plan, seed, settings.split))
        )

    return run_and_sum(build, plan, beam_settings)


class _Parse(beam.DoFn):
    """The rows of one source, each checked by itself and keyed by its shard.

    `num_rows` has the number of rows of each source, for its progress bar.
    """

    def __init__(
        self,
        settings: config.Prepare,
        load_counter: Callable[[], TokenCounter],
        num_rows: Sequence[int],
        num_shards: int,
    ) -> None:
        self._settings, self._load_counter = settings, load_counter
        self._num_rows, self._num_shards = num_rows, num_shards

    def setup(self) -> None:
        self._count_tokens = self._load_counter()

    def process(self, index: int) -> Iterator[tuple[int, Item]]:
        source = self._settings.sources[index]
        with progress(f"prepare {source.name}", total=self._num_rows[index], unit="rows") as bar:
            for raw in read_source(source):
                bar.advance()
                item = parse_row(
                    raw,
                    source,
                    source_index=index,
                    task=self._settings.task,
                    count_tokens=self._count_tokens,
                    max_prompt_tokens=self._settings.max_prompt_tokens,
                )
                yield shard_of(_key(item), self._num_shards), item


class _Write(beam.DoFn):
    """Merges all rows of a shard, prompt by prompt, and writes the shard."""

    def __init__(self, plan: Plan, seed: int, shares: config.SplitShares) -> None:
        self._plan, self._seed, self._shares = plan, seed, shares

    def process(self, element: tuple[int, Iterable[Item | None]]) -> Iterator[int]:
        index, items = element
        prepared = prepare_rows(
            (item for item in items if item is not None), seed=self._seed, shares=self._shares
        )
        tables = {name: table_of(name, getattr(prepared, name)) for name in PREPARE_OUTPUTS}
        finish_shard(self._plan, index, Shard(tables, dict(prepared.counts)))
        yield index


def _key(item: Item) -> str:
    # A row that was refused by itself has no prompt. Its position spreads such rows over shards.
    return item.prompt_id if isinstance(item, SourceRow) else f"{item.order[0]}:{item.order[1]}"
