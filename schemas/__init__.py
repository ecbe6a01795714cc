"""One Arrow schema per dataset, checked on write and on read."""

from collections.abc import Sequence

import pyarrow as pa

from schemas import (
    accepted,
    candidates,
    checks,
    comparisons,
    demonstrations,
    diagnostics,
    generations,
    judgements,
    logps,
    metrics,
    objectives,
    pairs,
    prompts,
    quarantine,
    rewards,
)

SCHEMAS: dict[str, pa.Schema] = {
    "prompts": prompts.SCHEMA,
    "demonstrations": demonstrations.SCHEMA,
    "comparisons": comparisons.SCHEMA,
    "quarantine": quarantine.SCHEMA,
    "candidates": candidates.SCHEMA,
    "rewards": rewards.SCHEMA,
    "objectives": objectives.SCHEMA,
    "checks": checks.SCHEMA,
    "accepted": accepted.SCHEMA,
    "diagnostics": diagnostics.SCHEMA,
    "pairs": pairs.SCHEMA,
    "logps": logps.SCHEMA,
    "generations": generations.SCHEMA,
    "judgements": judgements.SCHEMA,
    "metrics": metrics.SCHEMA,
}


class SchemaMismatch(ValueError):
    """A table does not have the columns, types or nulls that its schema states."""


def sort_keys(name: str) -> list[str]:
    """Return the columns whose values identify a row of `name` and order the rows of a shard."""
    return str(SCHEMAS[name].metadata[b"sort_by"].decode()).split(",")


def check(table: pa.Table, name: str, where: str, columns: Sequence[str] | None = None) -> None:
    """Raise `SchemaMismatch` unless `table` has the columns and types of schema `name`.

    It must have no other columns, and nulls only in nullable ones; the order is free. With
    `columns` it must have exactly those. `where` names the file or the step in the message.
    """
    expected = [f for f in SCHEMAS[name] if columns is None or f.name in columns]
    found = {f.name: f.type for f in table.schema}
    wanted = {f.name: f.type for f in expected}
    problems = [f"column {c!r} is missing" for c in wanted if c not in found]
    problems += [f"column {c!r} is not in the schema" for c in found if c not in wanted]
    problems += [
        f"column {c!r} is {found[c]}, expected {wanted[c]}"
        for c in wanted
        if c in found and found[c] != wanted[c]
    ]
    problems += [
        f"column {f.name!r} holds {table.column(f.name).null_count} nulls, expected none"
        for f in expected
        if not f.nullable and f.name in found and table.column(f.name).null_count
    ]
    if problems:
        raise SchemaMismatch(
            f"{where}: not a {name!r} table: {'; '.join(problems)}. `rso schema {name}` prints it."
        )
