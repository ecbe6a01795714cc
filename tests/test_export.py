"""Pairs as files of other trainers: what is in them, and what the trainers make of it."""

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
import system
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerBase

from rso.artifact import Artifact, Store
from rso.code_digest import CodeDigest
from rso.config import Templates
from rso.errors import UserError
from rso.export import FORMATS, Exported, SpecialTexts, export_pairs, special_texts
from rso.templates import encode_prompt, encode_response
from schemas import SCHEMAS

CHAT = Templates(instruction="Shorten:\n{prompt}")
PLAIN = Templates(prompt="{prompt}\n\nSummary:", response_prefix=" ")
NONE = SpecialTexts("", "")
TEXTS = [
    "read a file",
    "größer als 日本 🦊",
    'two\nlines\r\nand\ttabs, "quotes" \\n',
    "separators \u2028 and \u0085",
    " a space before, newlines after\n\n",
    "2020-01-01",
    "{prompt} {}",
    "null",
]


def pair(index: int, *, origin: str = "rso-sample-rank", split: str = "train") -> dict[str, Any]:
    text = TEXTS[index % len(TEXTS)]
    return {
        "pair_id": f"{index:016x}",
        "prompt_id": f"{index // 2:016x}",
        "prompt": text,
        "chosen_id": "c" * 16,
        "rejected_id": "d" * 16,
        "chosen": f"{text} yes",
        "rejected": text,
        "chosen_token_ids": [1, 2],
        "rejected_token_ids": [1],
        "label_probability": 0.75,
        "match_round": 0,
        "origin": origin,
        "split": split,
    }


PAIRS = [pair(index) for index in range(20)]


def stored(store: Path, *shards: list[dict[str, Any]]) -> Artifact:
    """Return an artifact of `pair` with these rows."""
    with Store(str(store)).build("pair", "ab" * 32) as work:
        for index, rows in enumerate(shards):
            table = pa.Table.from_pylist(rows, schema=SCHEMAS["pairs"])
            work.write_shard("pairs", index, len(shards), table)
        return work.commit(inputs={}, settings={}, code=CodeDigest("c" * 64, {"m": "d"}))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Twenty pairs; the first shard has none."""
    return stored(tmp_path_factory.mktemp("store"), [], PAIRS[:12], PAIRS[12:])


@pytest.fixture(scope="session")
def bare_tokenizer(tiny_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tiny tokenizer without a beginning-of-sequence token put first."""
    bare = copy.deepcopy(tiny_tokenizer)
    bare.backend_tokenizer.post_processor = processors.ByteLevel()
    return bare


def no_tokenizer() -> PreTrainedTokenizerBase:
    pytest.fail("the tokenizer was asked for")


def opened(done: Exported) -> list[dict[str, Any]]:
    """Return the rows as a trainer's user reads them."""
    kind = {".jsonl": "json", ".parquet": "parquet"}[done.path.suffix]
    assert done.load.startswith(f'datasets.load_dataset("{kind}", ')
    cache = str(done.path.parent / "cache")
    table = datasets.load_dataset(kind, data_files=str(done.path), split="train", cache_dir=cache)
    return list(table)


def expected(name: str, templates: Templates, special: SpecialTexts) -> list[dict[str, Any]]:
    return [FORMATS[name].row(row, templates, special) for row in PAIRS]


@pytest.mark.parametrize("name", ["trl", "openrlhf"])
def test_chat_rows_are_messages(name: str) -> None:
    assert FORMATS[name].row(PAIRS[1], CHAT, NONE) == {
        "prompt": [{"role": "user", "content": f"Shorten:\n{TEXTS[1]}"}],
        "chosen": [{"role": "assistant", "content": f"{TEXTS[1]} yes"}],
        "rejected": [{"role": "assistant", "content": TEXTS[1]}],
        "pair_id": f"{1:016x}",
        "prompt_id": f"{0:016x}",
        "label_probability": 0.75,
    }


def test_chat_rows_of_llama_factory_are_sharegpt() -> None:
    row = FORMATS["llama-factory"].row(PAIRS[0], CHAT, NONE)
    assert row["conversations"] == [{"from": "human", "value": "Shorten:\nread a file"}]
    assert row["chosen"] == {"from": "gpt", "value": "read a file yes"}
    assert row["rejected"] == {"from": "gpt", "value": "read a file"}
    assert {"pair_id", "prompt_id", "label_probability"} < set(row)


@pytest.mark.parametrize(
    ("name", "prompt", "bos", "eos"),
    [
        ("trl", "prompt", "", ""),
        ("openrlhf", "prompt", "<s>", "</s>"),
        ("llama-factory", "instruction", "<s>", "</s>"),
    ],
)
def test_plain_rows_are_strings(name: str, prompt: str, bos: str, eos: str) -> None:
    row = FORMATS[name].row(pair(0, origin="direct"), PLAIN, SpecialTexts("<s>", "</s>"))
    assert row == {
        prompt: f"{bos}read a file\n\nSummary:",
        "chosen": f" read a file yes{eos}",
        "rejected": f" read a file{eos}",
        "pair_id": f"{0:016x}",
        "prompt_id": f"{0:016x}",
        "label_probability": 0.75,
    }


@given(prompt=st.text(), response=st.text())
def test_every_format_holds_the_texts_as_they_are(prompt: str, response: str) -> None:
    row = {**PAIRS[0], "prompt": prompt, "chosen": response, "rejected": prompt}
    for name, form in FORMATS.items():
        plain = form.row(row, PLAIN, NONE)
        question = plain["instruction" if name == "llama-factory" else "prompt"]
        assert question == f"{prompt}\n\nSummary:"
        assert (plain["chosen"], plain["rejected"]) == (response, prompt)


def trl_ids(
    tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]
) -> tuple[list[int], list[int]]:
    """Return prompt and chosen ids as DPOTrainer of TRL 1.16 makes them."""
    if isinstance(row["prompt"], list):
        prompt = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        both = tokenizer.apply_chat_template(row["prompt"] + row["chosen"], return_dict=True)
        return prompt, both["input_ids"][len(prompt) :]
    chosen = row["chosen"]
    if not chosen.endswith(tokenizer.eos_token):
        chosen += tokenizer.eos_token
    prompt = tokenizer(row["prompt"])["input_ids"]
    return prompt, tokenizer(row["prompt"] + chosen)["input_ids"][len(prompt) :]


def openrlhf_ids(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> list[int]:
    """Return the ids of prompt and chosen as RewardDataset of OpenRLHF 0.11 makes them."""
    if isinstance(row["prompt"], list):
        text = tokenizer.apply_chat_template(row["prompt"] + row["chosen"], tokenize=False)
    else:
        text = row["prompt"] + row["chosen"]
    text = text.rstrip("\n")
    if not text.endswith(tokenizer.eos_token):
        text += " " + tokenizer.eos_token
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def llama_factory_ids(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> list[int]:
    """Return the ids of an alpaca row as LLaMA-Factory 0.9.5 makes them with template `empty`."""
    sides = (row["instruction"], row["chosen"])
    return [i for text in sides for i in tokenizer.encode(text, add_special_tokens=False)]


@pytest.mark.parametrize("kind", ["tiny_tokenizer", "bare_tokenizer"])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    "templates", [CHAT, PLAIN, Templates(prompt="<|bos|>{prompt}:", response_prefix=" ")]
)
def test_trainers_make_the_ids_that_we_train_on(
    request: pytest.FixtureRequest, kind: str, text: str, templates: Templates
) -> None:
    tokenizer = request.getfixturevalue(kind)
    row = {**pair(0, origin="direct"), "prompt": text, "chosen": text}
    special = special_texts(tokenizer, templates)
    prompt = encode_prompt(tokenizer, templates, text)
    chosen = encode_response(tokenizer, templates, text, eos=True)
    made = trl_ids(tokenizer, FORMATS["trl"].row(row, templates, special))
    made_openrlhf = openrlhf_ids(tokenizer, FORMATS["openrlhf"].row(row, templates, special))
    assert made_openrlhf == prompt + chosen
    if templates is CHAT:
        # What the chat template writes after the end of a turn is the trainer's, not ours.
        after = tokenizer.encode("\n", add_special_tokens=False)
        assert made == (prompt, chosen + after)
        return
    if not templates.prompt.startswith("<|bos|>"):
        assert made == (prompt, chosen)
    row = FORMATS["llama-factory"].row(row, templates, special)
    assert llama_factory_ids(tokenizer, row) == prompt + chosen


def test_prefix_is_put_before_texts_of_files_alone(
    finished: system.Run, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    """The text exported is the text of the ids trained on; decoded ones hold their prefix."""
    decoded = finished.rows("pair/pairs")
    direct = {
        **decoded[0],
        "origin": "direct",
        "chosen_token_ids": encode_response(tiny_tokenizer, PLAIN, decoded[0]["chosen"], eos=True),
    }
    for row in [*decoded, direct]:
        text = tiny_tokenizer.decode(row["chosen_token_ids"], skip_special_tokens=True)
        assert FORMATS["trl"].row(row, PLAIN, NONE)["chosen"] == text
    assert FORMATS["trl"].row(direct, PLAIN, NONE)["chosen"] != direct["chosen"]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("templates", [CHAT, PLAIN], ids=["chat", "plain"])
@pytest.mark.parametrize("name", FORMATS)
def test_file_opens_in_datasets_with_every_row(
    artifact: Artifact,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    name: str,
    templates: Templates,
    suffix: str,
) -> None:
    out = tmp_path / "new" / f"pairs.{suffix}"
    done = export_pairs(artifact, name, out, templates, lambda: tiny_tokenizer)
    assert (done.rows, done.path) == (len(PAIRS), out)
    special = SpecialTexts("<|bos|>", "<|eos|>")
    assert opened(done) == expected(name, templates, special)
    described = {"dataset_info.json"} if name == "llama-factory" else set()
    assert {path.name for path in out.parent.iterdir()} - {"cache"} == {out.name} | described


def test_jsonl_is_utf8_with_a_row_a_line(artifact: Artifact, tmp_path: Path) -> None:
    done = export_pairs(artifact, "trl", tmp_path / "pairs.jsonl", PLAIN, no_tokenizer)
    data = done.path.read_bytes()
    assert "größer als 日本 🦊".encode() in data
    lines = data.removesuffix(b"\n").split(b"\n")
    assert [json.loads(line) for line in lines] == expected("trl", PLAIN, NONE)


@pytest.mark.parametrize("name", FORMATS)
def test_chat_needs_no_tokenizer(artifact: Artifact, tmp_path: Path, name: str) -> None:
    assert export_pairs(artifact, name, tmp_path / "pairs.jsonl", CHAT, no_tokenizer).rows == 20


def test_split_keeps_its_rows_alone(tmp_path: Path) -> None:
    rows = [*PAIRS, pair(20, split="validation"), pair(21, split="validation")]
    artifact = stored(tmp_path / "store", rows[:10], rows[10:])
    out = tmp_path / "pairs.parquet"
    done = export_pairs(artifact, "trl", out, PLAIN, no_tokenizer, split="validation")
    assert [row["pair_id"] for row in opened(done)] == [f"{i:016x}" for i in (20, 21)]
    everything = export_pairs(artifact, "trl", out, PLAIN, no_tokenizer, force=True)
    assert everything.rows == len(opened(everything)) == 22
    other = tmp_path / "other.parquet"
    with pytest.raises(UserError, match="no rows of split test, of 22 in all"):
        export_pairs(artifact, "trl", other, PLAIN, no_tokenizer, split="test")
    assert not other.exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("name", "out", "split", "said"),
    [
        ("trl", "pairs.csv", None, "suffix '.csv', expected .jsonl or .parquet"),
        ("trl", "pairs", None, "suffix '', expected .jsonl or .parquet"),
        ("trl", "taken.jsonl", None, "taken.jsonl: is there already; .* --force"),
        ("trl", "folder.jsonl", None, "folder.jsonl: is a folder"),
        ("dpo", "pairs.jsonl", None, "--format dpo: expected one of trl, openrlhf, llama-factory"),
        ("trl", "pairs.jsonl", "dev", "--split dev: expected one of train, validation, test"),
        ("trl", "taken.jsonl/pairs.jsonl", None, "cannot be written"),
    ],
)
def test_bad_input_is_refused_and_writes_nothing(
    artifact: Artifact, tmp_path: Path, name: str, out: str, split: str | None, said: str
) -> None:
    (tmp_path / "taken.jsonl").write_text("precious")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UserError, match=said):
        export_pairs(artifact, name, tmp_path / out, CHAT, no_tokenizer, split=split)
    assert {path.name for path in tmp_path.iterdir()} == {"taken.jsonl", "folder.jsonl"}
    assert (tmp_path / "taken.jsonl").read_text() == "precious"


def test_failed_export_leaves_the_old_file(artifact: Artifact, tmp_path: Path) -> None:
    out = tmp_path / "pairs.jsonl"
    out.write_text("old")
    whole = Path(artifact.shards("pairs")[2])
    spoilt = stored(tmp_path / "store", PAIRS[:10], PAIRS[10:])
    last = Path(spoilt.shards("pairs")[1])
    last.write_bytes(whole.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a whole Parquet file"):
        export_pairs(spoilt, "trl", out, PLAIN, no_tokenizer, force=True)
    assert out.read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"pairs.jsonl", "store"}


def info(folder: Path) -> Any:
    return json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))


def test_dataset_info_keeps_its_other_entries(
    artifact: Artifact, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    other = {"file_name": "größe.json", "columns": {"prompt": "frage"}}
    text = json.dumps({"other": other}, ensure_ascii=False)
    (tmp_path / "dataset_info.json").write_text(text, encoding="utf-8")
    out = tmp_path / "rso pairs.jsonl"
    done = export_pairs(artifact, "llama-factory", out, CHAT, no_tokenizer)
    assert done.dataset_info == tmp_path / "dataset_info.json"
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    entry = {
        "file_name": "rso pairs.jsonl",
        "formatting": "sharegpt",
        "ranking": True,
        "columns": columns,
    }
    assert info(tmp_path) == {"other": other, "rso pairs": entry}
    plain = tmp_path / "plain.parquet"
    done = export_pairs(artifact, "llama-factory", plain, PLAIN, lambda: tiny_tokenizer)
    assert list(info(tmp_path)) == ["other", "rso pairs", "plain"]
    described = info(tmp_path)["plain"]
    assert described["formatting"] == "alpaca" and described["file_name"] == "plain.parquet"
    assert set(described["columns"].values()) < set(opened(done)[0])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "expected an object of dataset descriptions, found list"),
        ('{"pairs": {"file_name": "mine.json"}}', "already describes another dataset 'pairs'"),
    ],
)
def test_dataset_info_that_cannot_take_the_entry_is_refused(
    artifact: Artifact, tmp_path: Path, text: str, said: str
) -> None:
    (tmp_path / "dataset_info.json").write_text(text)
    out = tmp_path / "pairs.jsonl"
    with pytest.raises(UserError, match=re.escape(said)):
        export_pairs(artifact, "llama-factory", out, CHAT, no_tokenizer)
    assert not out.exists() and (tmp_path / "dataset_info.json").read_text() == text


def test_dataset_info_entry_is_replaced_by_force(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text('{"pairs": {"file_name": "mine.json"}}')
    out = tmp_path / "pairs.jsonl"
    export_pairs(artifact, "llama-factory", out, CHAT, no_tokenizer, force=True)
    assert info(tmp_path)["pairs"]["file_name"] == "pairs.jsonl"
