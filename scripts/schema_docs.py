"""Print docs/artifacts.md from `schemas` and the stage table.

python scripts/schema_docs.py > docs/artifacts.md
"""

from collections import defaultdict
from collections.abc import Iterator

from rso.config import parse_config
from schemas import SCHEMAS, sort_keys
from stages import DOCUMENTS, MODELS, stages

INTRO = """\
# Artifacts

Written by `scripts/schema_docs.py` from `schemas/`; `rso schema NAME` prints the same for one
dataset.

An artifact is the folder `<store>/<stage>/<fingerprint>/`: one folder an output and
`manifest.json`. A dataset output is a folder of Parquet files, `part-00000-of-00003.parquet` and
so on, that plain `pandas.read_parquet(folder)` opens; `rso path pair/pairs` prints the folder.
Each column's meaning and unit are also in the metadata of the files' Arrow schema.

Rows belong to the shard that a keyed hash of their `prompt_id` names, and are sorted within it by
the columns given as the key below, which are unique in the dataset. All datasets of a run have
the same number of shards, except `metrics` and `objectives`, which have one. Join on ids, never
on position.

`prompt_id` is 16 hex digits of SHA-256 over the task and the NFC-normalised prompt; `response_id`
is 16 hex digits over the prompt_id, the origin of the response and its index there, so that
decodes, human targets and both sides of comparisons all have one.
"""

OTHERS = """\
## Models and documents

- {models} are model directories in Hugging Face format: configuration, safetensors, tokenizer,
  chat template, generation config. `transformers` and vLLM open them by their path (`rso path
  train_policy/policy`).
- `report` is one file, `report.html`, that needs no network and no other file.
"""


def page() -> str:
    """Return the whole page."""
    makers = _makers()
    datasets = (line for name in SCHEMAS for line in _dataset(name, makers[name]))
    models = ", ".join(f"`{name}` ({', '.join(makers[name])})" for name in MODELS)
    assert DOCUMENTS == ("report",), "describe the other documents too"
    return "\n".join([INTRO, *datasets, OTHERS.format(models=models)])


def _makers() -> dict[str, list[str]]:
    """Return for each output the stages that may write it."""
    makers: dict[str, dict[str, None]] = defaultdict(dict)
    for labeller in (None, "summary_quality"):
        data = {
            "model": "m",
            "prepare": {"sources": []},
            "comparisons": {"labeller": labeller},
            "targets": {"method": "rest"},
        }
        for stage in stages(parse_config(data, where="schema_docs")):
            for output in stage.writes:
                makers[output][f"`{stage.name}`"] = None
    return {output: list(names) for output, names in makers.items()}


def _dataset(name: str, makers: list[str]) -> Iterator[str]:
    schema = SCHEMAS[name]
    keys = ", ".join(f"`{key}`" for key in sort_keys(name))
    yield f"## {name}\n"
    yield f"{schema.metadata[b'meaning'].decode()} Written by {' or '.join(makers)}. Key: {keys}.\n"
    yield "| column | type | unit | meaning |\n|---|---|---|---|"
    for field in schema:
        kind = f"{field.type} or null" if field.nullable else str(field.type)
        meaning = _cell(field.metadata[b"meaning"].decode())
        unit = field.metadata.get(b"unit", b"").decode()
        yield f"| `{field.name}` | {_cell(kind)} | {unit} | {meaning} |"
    yield ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    print(page(), end="")
