"""Raw files to prompts, demonstrations and comparisons. A refused row keeps its reason.

There are three steps. `read_source` gives the rows of a file. `parse_row` accepts or refuses one
row by itself. `merge_prompt` compares all rows of one prompt. The last two are pure functions of
one row or one prompt, so they can run in any number of parallel pieces. `prepare` runs all three
steps in this process.
"""

import csv
import json
import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from rso import ids, seeds
from rso.aliases import Row
from rso.config import Prepare, Source, SplitShares
from rso.errors import UserError

TokenCounter = Callable[[str], int]

REQUIRED = {
    "demonstrations": ("prompt", "target"),
    "comparisons": ("prompt", "chosen", "rejected"),
    "prompts": ("prompt",),
}
OPTIONAL = {"demonstrations": (), "comparisons": ("weight",), "prompts": ()}
SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
RAW_CHARACTERS = 2000
# A JSONL file names its fields row by row. A field that is in none of this many first rows is
# unknown.
ROWS_TO_LEARN_FIELDS = 100
SPLIT_RANGE = 2.0**64


class RawRow(NamedTuple):
    """A row as read. `line` counts physical lines (JSONL, CSV) or rows (Parquet), from 1.

    `row` is None if the row could not be read. Then `problem` says why.
    """

    line: int
    row: Row | None
    raw: str
    problem: str = ""


@dataclass(frozen=True)
class SourceRow:
    """A row that is valid by itself. `order` is (index of the source, line)."""

    order: tuple[int, int]
    source: str
    kind: str
    prompt_id: str
    prompt: str
    responses: tuple[str, ...]
    weight: float
    group: str | None
    split: str | None
    raw: str


@dataclass(frozen=True)
class RefusedRow:
    """A refused row. `cause` is one or two words, for the counters. `reason` is a sentence."""

    order: tuple[int, int]
    source: str
    field: str
    cause: str
    reason: str
    raw: str

    def row(self) -> Row:
        """Return the row of `quarantine`."""
        return {
            "source": self.source,
            "line": self.order[1],
            "field": self.field,
            "reason": self.reason,
            "raw": _storable(self.raw)[:RAW_CHARACTERS],
        }


@dataclass
class Prepared:
    """Rows of four tables, in the form of their schemas and not in their order, and the counts."""

    prompts: list[Row] = field(default_factory=list)
    demonstrations: list[Row] = field(default_factory=list)
    comparisons: list[Row] = field(default_factory=list)
    quarantine: list[Row] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


class Merged(NamedTuple):
    """What becomes of all rows of one prompt: accepted rows for the tables, and refused rows."""

    prompt: Row
    demonstrations: list[Row]
    comparisons: list[Row]
    refusals: list[RefusedRow]
    num_accepted: int


class _Refused(Exception):
    """What is wrong with a row: the field of the file, the cause and the reason."""

    def __init__(self, field: str, cause: str, reason: str) -> None:
        super().__init__(reason)
        self.field, self.cause, self.reason = field, cause, reason


def prepare(settings: Prepare, *, seed: int, count_tokens: TokenCounter | None = None) -> Prepared:
    """Return the rows of all sources: the accepted rows, and the refused rows with their reasons.

    `count_tokens` gives the number of tokens of a prompt. If it is None, prompts have no limit.

    Raises:
        UserError: as `check_settings` and `read_source`, or every row is refused.
    """
    check_settings(settings)
    parsed: list[SourceRow | RefusedRow] = []
    for index, source in enumerate(settings.sources):
        limit = settings.max_prompt_tokens if count_tokens is not None else None
        for raw in read_source(source):
            parsed.append(
                parse_row(
                    raw,
                    source,
                    source_index=index,
                    task=settings.task,
                    count_tokens=count_tokens,
                    max_prompt_tokens=limit,
                )
            )
    prepared = prepare_rows(parsed, seed=seed, shares=settings.split)
    if not prepared.prompts:
        causes = Counter(str(row["reason"]) for row in prepared.quarantine)
        raise UserError(
            f"prepare: all {len(parsed)} rows of {', '.join(s.path for s in settings.sources)} "
            f"were refused; the usual reason: {causes.most_common(1)[0][0]}. "
            "Mend the file or the field names in `prepare.sources`."
        )
    return prepared


def prepare_rows(
    parsed: Iterable[SourceRow | RefusedRow], *, seed: int, shares: SplitShares
) -> Prepared:
    """Return the rows of the tables for `parsed` rows of all sources, which come in any order."""
    by_prompt: dict[str, list[SourceRow]] = defaultdict(list)
    refusals: list[RefusedRow] = []
    num_rows = 0
    for item in parsed:
        num_rows += 1
        if isinstance(item, RefusedRow):
            refusals.append(item)
        else:
            by_prompt[item.prompt_id].append(item)
    prepared = Prepared()
    num_accepted = 0
    for prompt_id in sorted(by_prompt):
        merged = merge_prompt(by_prompt[prompt_id], seed=seed, shares=shares)
        prepared.prompts.append(merged.prompt)
        prepared.demonstrations += merged.demonstrations
        prepared.comparisons += merged.comparisons
        refusals += merged.refusals
        num_accepted += merged.num_accepted
    assert num_rows == num_accepted + len(refusals), (num_rows, num_accepted, len(refusals))
    refusals.sort(key=lambda refusal: refusal.order)
    prepared.quarantine = [refusal.row() for refusal in refusals]
    prepared.counts = _counts(prepared, refusals, num_rows)
    return prepared


def merge_prompt(rows: Sequence[SourceRow], *, seed: int, shares: SplitShares) -> Merged:
    """Return what becomes of all rows of one prompt, in the order of sources and lines.

    The first row fixes the text and the split of the prompt. Exact copies are refused. So are rows
    that their source or group would put into another split. The first target is the prompt's own,
    and each further target is one more reference.
    """
    rows = sorted(rows, key=lambda row: row.order)
    first = rows[0]
    split = _split_of(first, seed, shares)
    seen: dict[tuple[str, ...], SourceRow] = {}
    accepted: list[SourceRow] = []
    refusals: list[RefusedRow] = []
    for row in rows:
        content = (row.kind, *map(_nfc, row.responses))
        own_split = _split_of(row, seed, shares)
        if content in seen:
            refusals.append(_duplicate(row, seen[content]))
        elif own_split != split:
            refusals.append(_other_split(row, own_split, first, split))
        else:
            seen[content] = row
            accepted.append(row)
    demonstrations = [row for row in accepted if row.kind == "demonstrations"]
    shared = {"prompt_id": first.prompt_id, "prompt": first.prompt, "split": split}
    return Merged(
        prompt={
            **shared,
            "target": demonstrations[0].responses[0] if demonstrations else None,
            "source": first.source,
        },
        demonstrations=[
            _demonstration(row, index, shared) for index, row in enumerate(demonstrations)
        ],
        comparisons=_comparisons([r for r in accepted if r.kind == "comparisons"], shared),
        refusals=refusals,
        num_accepted=len(accepted),
    )


def split_of(seed: int, key: str, shares: SplitShares) -> str:
    """Return train, validation or test for the group or prompt `key`, keyed by `seed`."""
    place = seeds.key("split", seed, key) / SPLIT_RANGE
    if place < shares.test:
        return "test"
    return "validation" if place < shares.test + shares.validation else "train"


def parse_row(
    raw: RawRow,
    source: Source,
    *,
    source_index: int,
    task: str,
    count_tokens: TokenCounter | None = None,
    max_prompt_tokens: int | None = None,
) -> SourceRow | RefusedRow:
    """Return the row with our field names and its prompt_id, or the refused row with its reason.

    The length of the prompt is checked if both `count_tokens` and `max_prompt_tokens` are given.
    """
    order = (source_index, raw.line)
    try:
        if raw.row is None:
            raise _Refused("", "unreadable row", raw.problem)
        prompt, *responses = (_text(raw.row, source, role) for role in REQUIRED[source.kind])
        if source.kind == "comparisons" and _nfc(responses[0]) == _nfc(responses[1]):
            name = source.fields.get("rejected", "rejected")
            raise _Refused(name, "equal sides", "chosen and rejected are the same text")
        weight = _weight(raw.row, source)
        group = _group(raw.row, source)
        if count_tokens is not None and max_prompt_tokens is not None:
            _check_length(prompt, source, count_tokens, max_prompt_tokens)
    except _Refused as refused:
        return RefusedRow(order, source.name, refused.field, refused.cause, refused.reason, raw.raw)
    return SourceRow(
        order=order,
        source=source.name,
        kind=source.kind,
        prompt_id=ids.prompt_id(task, prompt),
        prompt=prompt,
        responses=tuple(responses),
        weight=weight,
        group=group,
        split=source.split,
        raw=raw.raw,
    )


def read_source(source: Source) -> Iterator[RawRow]:
    """Yield the rows of a JSONL, CSV or Parquet file in order, without blank JSONL and CSV lines.

    Raises:
        UserError: the file is missing, empty, not UTF-8 or not of its format; `source` maps a field
            that its kind does not have; or a required or mapped field is in none of the first rows.
    """
    path = Path(source.path)
    _check_roles(source)
    _check_file(path, source)
    readers = {"jsonl": _read_jsonl, "csv": _read_csv, "parquet": _read_parquet}
    rows = readers[_format(path, source)](path, source)
    learned: list[RawRow] = []
    for row in rows:
        learned.append(row)
        if len(learned) == ROWS_TO_LEARN_FIELDS:
            break
    if not learned:
        raise UserError(f"source {source.name!r}: {path} holds no rows; expected at least one.")
    found = {name: None for raw in learned if raw.row is not None for name in raw.row}
    if found:
        _check_fields(source, list(found))
    yield from learned
    yield from rows


def _read_jsonl(path: Path, source: Source) -> Iterator[RawRow]:
    for line, text in _lines(path, source):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            yield RawRow(line, None, text, f"not JSON: {error.msg} at column {error.colno}")
            continue
        except (ValueError, RecursionError) as error:
            yield RawRow(line, None, text, f"not JSON that can be read: {error}")
            continue
        if isinstance(row, dict):
            yield RawRow(line, row, text)
        else:
            reason = f"expected a JSON object, found {_type_name(row)}"
            yield RawRow(line, None, text, reason)


def _read_csv(path: Path, source: Source) -> Iterator[RawRow]:
    # The module's own limit is 131,072 characters per cell. Real prompts can be longer.
    csv.field_size_limit(2**31 - 1)
    consumed: list[tuple[int, str]] = []

    def record() -> Iterator[str]:
        for line, text in _lines(path, source):
            consumed.append((line, text))
            yield text

    # Strict, because the lenient reader swallows the rest of a file after an unclosed quote.
    reader = csv.reader(record(), strict=True)
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise UserError(f"source {source.name!r}: {path}: header is not CSV: {error}.") from None
    if len(set(header)) != len(header):
        raise UserError(
            f"source {source.name!r}: {path}: a column name occurs twice in the header "
            f"{header}; rename one."
        )
    while True:
        consumed.clear()
        problem = ""
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            cells, problem = [], f"not CSV: {error}"
        line, raw = consumed[0][0], "".join(text for _, text in consumed)
        if problem.endswith("unexpected end of data"):
            raise UserError(
                f"source {source.name!r}: {path}, line {line}: a quote opened here is never "
                'closed; close it, or write quotes inside a cell as "".'
            )
        if problem:
            yield RawRow(line, None, raw, problem)
        elif not cells:
            continue
        elif len(cells) != len(header):
            reason = f"expected {len(header)} cells as in the header, found {len(cells)}"
            yield RawRow(line, None, raw, reason)
        else:
            yield RawRow(line, dict(zip(header, cells, strict=True)), raw)


def _read_parquet(path: Path, source: Source) -> Iterator[RawRow]:
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _check_fields(source, names)
            columns = [name for name in names if name in _field_names(source, names)]
            line = 0
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for row in batch.to_pylist():
                    line += 1
                    yield RawRow(line, row, json.dumps(row, ensure_ascii=False, default=str))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"source {source.name!r}: {path} cannot be read as Parquet ({error}); "
            "write it again, or state `format`."
        ) from None


def _lines(path: Path, source: Source) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for line, data in enumerate(file, start=1):
            try:
                text = data.decode("utf-8-sig" if line == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"source {source.name!r}: {path}, line {line}: byte "
                    f"0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8."
                ) from None
            yield line, text


def check_settings(settings: Prepare) -> None:
    """Raise `UserError` for settings of `prepare` that contradict each other."""
    if not settings.sources:
        raise UserError("prepare.sources is empty; name at least one file.")
    names = Counter(source.name for source in settings.sources)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise UserError(
            f"prepare.sources: the name {twice[0]!r} is given twice; the quarantine finds rows by "
            "the name of their source, so rename one."
        )
    if settings.split.validation + settings.split.test > 1:
        raise UserError(
            f"prepare.split: validation {settings.split.validation} and test "
            f"{settings.split.test} are more than 1 together; lower one."
        )


def _check_file(path: Path, source: Source) -> None:
    try:
        if path.is_dir():
            problem = "is a directory, expected a file"
        elif path.stat().st_size == 0:
            problem = "is empty (0 bytes), expected at least one row"
        else:
            return
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    raise UserError(f"source {source.name!r}: {path} {problem}; mend `path` in `prepare.sources`.")


def _format(path: Path, source: Source) -> str:
    if source.format != "auto":
        return source.format
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"source {source.name!r}: the suffix of {path} is none of {', '.join(SUFFIXES)}; "
            "state `format: jsonl`, `csv` or `parquet`."
        )
    return SUFFIXES[path.suffix.lower()]


def _check_roles(source: Source) -> None:
    roles = REQUIRED[source.kind] + OPTIONAL[source.kind]
    unknown = [role for role in source.fields if role not in roles]
    if unknown:
        raise UserError(
            f"source {source.name!r}: `fields` maps {unknown[0]!r}, which a source of "
            f"{source.kind} has not; it has {', '.join(roles)}."
        )


def _check_fields(source: Source, found: Sequence[str]) -> None:
    missing = [name for name in _field_names(source, ()) if name not in found]
    if missing:
        raise UserError(
            f"source {source.name!r}: {source.path} has no field {missing[0]!r}; it has "
            f"{', '.join(map(repr, found))}. Map it under `fields`, e.g. "
            f"{{prompt: {found[0] if found else 'text'}}}."
        )


def _field_names(source: Source, found: Sequence[str]) -> list[str]:
    """Return the file's names of the fields in use.

    An optional field is in use if it is mapped or in `found`.
    """
    names = [source.fields.get(role, role) for role in REQUIRED[source.kind]]
    names += [
        source.fields.get(role, role)
        for role in OPTIONAL[source.kind]
        if role in source.fields or role in found
    ]
    return names + ([source.group] if source.group else [])


def _text(row: Row, source: Source, role: str) -> str:
    name = source.fields.get(role, role)
    value = row.get(name)
    if value is None:
        raise _Refused(name, "missing field", f"{role} is missing, expected text")
    if not isinstance(value, str):
        reason = f"{role} is {_type_name(value)}, expected text"
        raise _Refused(name, "wrong type", reason)
    if not value.strip():
        raise _Refused(name, "empty text", f"{role} is empty, expected text")
    if _storable(value) != value:
        reason = f"{role} holds half a surrogate pair, which is no character"
        raise _Refused(name, "broken text", reason)
    return value


def _weight(row: Row, source: Source) -> float:
    name = source.fields.get("weight", "weight")
    value = row.get(name) if source.kind == "comparisons" else None
    if value is None or value == "":
        return 1.0
    try:
        weight = float(value) if isinstance(value, int | float | str) else math.nan
    except (ValueError, OverflowError):
        weight = math.nan
    if isinstance(value, bool) or not (math.isfinite(weight) and weight > 0):
        reason = f"weight is {str(value)[:80]!r}, expected a number above 0"
        raise _Refused(name, "wrong weight", reason)
    return weight


def _group(row: Row, source: Source) -> str | None:
    if source.group is None:
        return None
    value = row.get(source.group)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        found = "missing" if value is None else f"{str(value)[:80]!r}"
        reason = f"the group is {found}, expected text or an integer"
        raise _Refused(source.group, "wrong group", reason)
    return str(value)


def _check_length(
    prompt: str, source: Source, count_tokens: TokenCounter, max_prompt_tokens: int
) -> None:
    num_tokens = count_tokens(prompt)
    if num_tokens > max_prompt_tokens:
        raise _Refused(
            source.fields.get("prompt", "prompt"),
            "long prompt",
            f"prompt has {num_tokens} tokens, expected at most {max_prompt_tokens} "
            "(prepare.max_prompt_tokens)",
        )


def _split_of(row: SourceRow, seed: int, shares: SplitShares) -> str:
    return row.split or split_of(seed, row.group or row.prompt_id, shares)


def _duplicate(row: SourceRow, earlier: SourceRow) -> RefusedRow:
    place = f"line {earlier.order[1]}"
    if earlier.source != row.source:
        place += f" of source {earlier.source!r}"
    return RefusedRow(row.order, row.source, "", "duplicate", f"duplicate of {place}", row.raw)


def _other_split(row: SourceRow, own: str, first: SourceRow, split: str) -> RefusedRow:
    reason = (
        f"the prompt belongs to {split} since line {first.order[1]} of source {first.source!r}; "
        f"this row would put it into {own}"
    )
    return RefusedRow(row.order, row.source, "", "other split", reason, row.raw)


def _demonstration(row: SourceRow, index: int, shared: Row) -> Row:
    return {
        **shared,
        "response_id": ids.response_id(row.prompt_id, "target", index),
        "target": row.responses[0],
        "reference_index": index,
        "source": row.source,
    }


def _comparisons(rows: Sequence[SourceRow], shared: Row) -> list[Row]:
    """Return the rows of `comparisons`. Equal texts have one response_id, by first appearance."""
    index: dict[str, int] = {}
    result = []
    for row in rows:
        chosen_id, rejected_id = (
            ids.response_id(row.prompt_id, "comparison", index.setdefault(_nfc(text), len(index)))
            for text in row.responses
        )
        result.append(
            {
                **shared,
                "comparison_id": ids.comparison_id(row.prompt_id, chosen_id, rejected_id),
                "chosen_id": chosen_id,
                "rejected_id": rejected_id,
                "chosen": row.responses[0],
                "rejected": row.responses[1],
                "source": row.source,
                "weight": row.weight,
            }
        )
    return result


def _counts(prepared: Prepared, refusals: Sequence[RefusedRow], num_rows: int) -> dict[str, int]:
    splits = Counter(str(row["split"]) for row in prepared.prompts)
    causes = Counter(refusal.cause for refusal in refusals)
    return {
        "rows_read": num_rows,
        "rows_accepted": num_rows - len(refusals),
        "rows_refused": len(refusals),
        **{f"refused: {cause}": causes[cause] for cause in sorted(causes)},
        **{f"prompts_{split}": splits[split] for split in ("train", "validation", "test")},
    }


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _storable(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def _type_name(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return (
        "null" if value is None else names.get(type(value), f"the {type(value).__name__} {value}")
    )
