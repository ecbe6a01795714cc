"""Preference pairs as files for other trainers: TRL, OpenRLHF and LLaMA-Factory.

A trainer makes of a row the same text that our own policy training tokenises. docs/export.md says
what each trainer adds, according to the code of TRL 1.16, OpenRLHF 0.11 and LLaMA-Factory 0.9.5.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, get_args

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rso.aliases import Row
from rso.artifact import Artifact
from rso.config import Split, Templates
from rso.errors import UserError
from rso.files import replaced
from rso.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATASET_INFO = "dataset_info.json"
LOADERS = {".jsonl": "json", ".parquet": "parquet"}
BATCH_ROWS = 4096


class SpecialTexts(NamedTuple):
    """The special tokens that our tokenisation puts around a plain prompt and response, as text."""

    bos: str
    """Before the prompt; empty where the tokenizer adds none."""
    eos: str
    """After the response."""


class Exported(NamedTuple):
    """What `export_pairs` wrote."""

    rows: int
    path: Path
    dataset_info: Path | None
    """The file that describes `path` to LLaMA-Factory."""

    @property
    def load(self) -> str:
        """One line of Python that opens the file."""
        loader = LOADERS[self.path.suffix]
        return f'datasets.load_dataset("{loader}", data_files="{self.path}", split="train")'


def export_pairs(
    artifact: Artifact,
    name: str,
    out: Path,
    templates: Templates,
    tokenizer: "Callable[[], PreTrainedTokenizerBase]",
    *,
    split: str | None = None,
    force: bool = False,
) -> Exported:
    """Write the `pairs` of an artifact to `out` in the format `name`; return what was written.

    `split` limits the pairs to one split. They keep the order of the artifact. The file appears
    only when it is complete. One shard is in memory at a time. `tokenizer` is called only if the
    format needs the texts of special tokens. `force` replaces an existing file and its description.

    Raises:
        UserError: the format, suffix or split is unknown, `out` is a folder, a file or another
            description exists and `force` is not set, there are no rows, or a file cannot be
            written.
    """
    out = Path(os.path.abspath(out))
    if name not in FORMATS:
        raise UserError(f"--format {name}: expected one of {', '.join(FORMATS)}.")
    _check_target(out, split, force)
    form, is_chat = FORMATS[name], templates.prompt == "chat"
    entry = _dataset_entry(out, is_chat=is_chat) if form.has_dataset_info else None
    described = None if entry is None else _described(out, entry, force)
    special = SpecialTexts("", "")
    if form.writes_special and not is_chat:
        special = special_texts(tokenizer(), templates)
    batches = _batches(artifact, split, lambda pair: form.row(pair, templates, special))
    write = _write_jsonl if out.suffix == ".jsonl" else _write_parquet
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replaced(str(out)) as temporary:
            rows = write(temporary, batches)
        if described is None:
            return Exported(rows, out, None)
        with replaced(str(out.parent / DATASET_INFO)) as temporary:
            # ASCII only: LLaMA-Factory opens the file in the encoding of the locale.
            Path(temporary).write_text(json.dumps(described, indent=2) + "\n", encoding="ascii")
    except OSError as error:
        raise UserError(
            f"--out {out}: cannot be written ({error.strerror or error}); name a file in a folder "
            "that you may write to and that has room."
        ) from error
    return Exported(rows, out, out.parent / DATASET_INFO)


def trl_row(pair: Row, templates: Templates, special: SpecialTexts) -> Row:
    """Return the pair as TRL's preference type, with an explicit prompt.

    `special` is not used: TRL itself puts the special tokens around plain text.
    """
    if templates.prompt == "chat":
        return _messages(pair, templates)
    return _plain(pair, templates, SpecialTexts("", ""))


def openrlhf_row(pair: Row, templates: Templates, special: SpecialTexts) -> Row:
    """Return the pair for OpenRLHF, whose `prompt_key` must be `prompt`.

    Plain text holds its special tokens. OpenRLHF adds none before the text. After the text it would
    add a space together with the token.
    """
    if templates.prompt == "chat":
        return _messages(pair, templates)
    return _plain(pair, templates, special)


def llama_factory_row(pair: Row, templates: Templates, special: SpecialTexts) -> Row:
    """Return the pair as LLaMA-Factory's preference type: sharegpt for chat, alpaca for plain text.

    Plain text holds its special tokens: the template `empty` adds none.
    """
    if templates.prompt == "chat":
        user = templates.instruction.replace("{prompt}", pair["prompt"])
        return {
            "conversations": [{"from": "human", "value": user}],
            "chosen": {"from": "gpt", "value": _response(pair, "chosen", templates)},
            "rejected": {"from": "gpt", "value": _response(pair, "rejected", templates)},
            **_ours(pair),
        }
    row = _plain(pair, templates, special)
    return {"instruction": row.pop("prompt"), **row}


@dataclass(frozen=True)
class Format:
    """The format of a trainer's rows."""

    row: Callable[[Row, Templates, SpecialTexts], Row]
    writes_special: bool
    """Whether plain text holds the texts of the special tokens."""
    has_dataset_info: bool = False


FORMATS = {
    "trl": Format(trl_row, writes_special=False),
    "openrlhf": Format(openrlhf_row, writes_special=True),
    "llama-factory": Format(llama_factory_row, writes_special=True, has_dataset_info=True),
}


def special_texts(tokenizer: "PreTrainedTokenizerBase", templates: Templates) -> SpecialTexts:
    """Return the special tokens that our tokenisation puts around the text of a plain template.

    `bos` is empty if the template itself begins with it.
    """
    from rso.templates import encode_prompt

    begins = encode_prompt(tokenizer, templates, "x")[:1] == [tokenizer.bos_token_id]
    is_written = begins and templates.prompt.startswith(str(tokenizer.bos_token))
    bos = str(tokenizer.bos_token) if begins and not is_written else ""
    return SpecialTexts(bos, str(tokenizer.eos_token))


def _messages(pair: Row, templates: Templates) -> Row:
    user = templates.instruction.replace("{prompt}", pair["prompt"])
    return {
        "prompt": [{"role": "user", "content": user}],
        "chosen": [{"role": "assistant", "content": _response(pair, "chosen", templates)}],
        "rejected": [{"role": "assistant", "content": _response(pair, "rejected", templates)}],
        **_ours(pair),
    }


def _plain(pair: Row, templates: Templates, special: SpecialTexts) -> Row:
    return {
        "prompt": special.bos + templates.prompt.replace("{prompt}", pair["prompt"]),
        "chosen": _response(pair, "chosen", templates) + special.eos,
        "rejected": _response(pair, "rejected", templates) + special.eos,
        **_ours(pair),
    }


def _response(pair: Row, side: str, templates: Templates) -> str:
    # A decoded response already begins with the prefix, which the policy learnt to write.
    prefix = templates.response_prefix if pair["origin"] == "direct" else ""
    return f"{prefix}{pair[side]}"


def _ours(pair: Row) -> Row:
    return {name: pair[name] for name in ("pair_id", "prompt_id", "label_probability")}


def _check_target(out: Path, split: str | None, force: bool) -> None:
    if out.suffix not in LOADERS:
        raise UserError(
            f"--out {out}: found the suffix {out.suffix!r}, expected {' or '.join(LOADERS)}; it "
            "says which kind of file to write."
        )
    if split is not None and split not in get_args(Split):
        raise UserError(f"--split {split}: expected one of {', '.join(get_args(Split))}.")
    if out.is_dir() or (out.exists() and not force):
        what = "a folder" if out.is_dir() else "there already"
        raise UserError(f"--out {out}: is {what}; name another file, or replace a file by --force.")


def _batches(
    artifact: Artifact, split: str | None, row: Callable[[Row], Row]
) -> Iterator[list[Row]]:
    num_rows = 0
    with progress("export", total=artifact.rows("pairs"), unit="pairs") as bar:
        for index in range(artifact.num_shards("pairs")):
            table = artifact.shard("pairs", index)
            kept = table if split is None else table.filter(pc.field("split") == split)
            for batch in kept.to_batches(max_chunksize=BATCH_ROWS):
                yield [row(pair) for pair in batch.to_pylist()]
            num_rows += kept.num_rows
            bar.advance(table.num_rows)
    if num_rows == 0:
        of_split = "" if split is None else f" of split {split}, of {artifact.rows('pairs')} in all"
        raise UserError(
            f"{artifact.output('pairs')}: no rows{of_split}; nothing was written: pairs are made "
            "of training prompts, so leave --split out or see the counters of `rso show pair`."
        )


def _write_jsonl(path: str, batches: Iterator[list[Row]]) -> int:
    num_rows = 0
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for rows in batches:
            file.writelines(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
            num_rows += len(rows)
    return num_rows


def _write_parquet(path: str, batches: Iterator[list[Row]]) -> int:
    first = pa.Table.from_pylist(next(batches))
    num_rows: int = first.num_rows
    with pq.ParquetWriter(path, first.schema, compression="zstd") as writer:
        writer.write_table(first)
        for rows in batches:
            writer.write_table(pa.Table.from_pylist(rows, schema=first.schema))
            num_rows += len(rows)
    return num_rows


def _dataset_entry(out: Path, *, is_chat: bool) -> Row:
    """Return the description of the file for LLaMA-Factory."""
    prompt = {"messages": "conversations"} if is_chat else {"prompt": "instruction"}
    return {
        "file_name": out.name,
        "formatting": "sharegpt" if is_chat else "alpaca",
        "ranking": True,
        "columns": {**prompt, "chosen": "chosen", "rejected": "rejected"},
    }


def _described(out: Path, entry: Row, force: bool) -> Row:
    """Return the descriptions in the folder of `out`, with `entry` under the file's stem.

    Raises:
        UserError: the descriptions cannot be read, or they describe another dataset of this name
            and `force` is not set.
    """
    path = out.parent / DATASET_INFO
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        found = {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); mend or move it.") from error
    if not isinstance(found, dict):
        raise UserError(
            f"{path}: expected an object of dataset descriptions, found {type(found).__name__}; "
            "mend or move it."
        )
    if found.get(out.stem, entry) != entry and not force:
        raise UserError(
            f"{path}: already describes another dataset {out.stem!r}; name another file, or "
            "replace the description by --force."
        )
    return {**found, out.stem: entry}
