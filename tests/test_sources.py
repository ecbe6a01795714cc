"""Raw files to rows: what is accepted, what is refused and why, and that nothing is lost."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import schemas
from rso import sources
from rso.config import Prepare, Source, SplitShares
from rso.errors import UserError
from rso.sources import Prepared, prepare, read_source

Rows = list[dict[str, Any]]
EXAMPLE = Path(__file__).parent.parent / "examples" / "stdlib_docstrings.py"


def write(path: Path, rows: Rows | str | bytes) -> Path:
    if isinstance(rows, bytes):
        path.write_bytes(rows)
    elif isinstance(rows, str):
        path.write_text(rows, encoding="utf-8", newline="")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(path: Path, kind: str = "demonstrations", seed: int = 0, **settings: Any) -> Prepared:
    source = Source(path=str(path), name="s", kind=kind, **settings)  # type: ignore[arg-type]
    return prepare(Prepare(sources=(source,)), seed=seed)


def reasons(prepared: Prepared) -> list[tuple[int, str, str]]:
    return [(row["line"], row["field"], row["reason"]) for row in prepared.quarantine]


def test_prepare_each_format_gives_the_same_rows(tmp_path: Path) -> None:
    rows = [{"body": "text, one", "line": 'a "b"'}, {"body": "text\ntwo", "line": "ü"}]
    files = [
        write(tmp_path / "a.jsonl", rows),
        write(tmp_path / "a.csv", 'body,line\n"text, one","a ""b"""\r\n"text\ntwo",ü\n'),
        tmp_path / "a.parquet",
    ]
    pq.write_table(pa.Table.from_pylist(rows), files[2])
    results = [run(path, fields={"prompt": "body", "target": "line"}) for path in files]
    assert results[0].demonstrations == results[1].demonstrations == results[2].demonstrations
    assert {(r["prompt"], r["target"]) for r in results[0].demonstrations} == {
        ("text, one", 'a "b"'),
        ("text\ntwo", "ü"),
    }


def test_prepare_rows_have_the_shape_of_their_schemas(tmp_path: Path) -> None:
    prepared = prepare(
        Prepare(
            sources=(
                Source(
                    path=str(write(tmp_path / "d.jsonl", [{"prompt": "p", "target": "t"}, {}])),
                    name="d",
                    kind="demonstrations",
                ),
                Source(
                    path=str(
                        write(
                            tmp_path / "c.csv", "prompt,chosen,rejected,weight\nq,a,b,2\nq,b,c,\n"
                        )
                    ),
                    name="c",
                    kind="comparisons",
                ),
            )
        ),
        seed=0,
    )
    for name in ("prompts", "demonstrations", "comparisons", "quarantine"):
        rows = getattr(prepared, name)
        assert rows
        table = pa.Table.from_pylist(rows, schema=schemas.SCHEMAS[name])
        schemas.check(table, name, "test")
        assert all(set(row) == set(table.schema.names) for row in rows)
    assert [row["weight"] for row in prepared.comparisons] == [2.0, 1.0]
    assert prepared.comparisons[0]["rejected_id"] == prepared.comparisons[1]["chosen_id"]
    assert {row["target"] for row in prepared.prompts} == {"t", None}


def test_prepare_bad_rows_are_refused_with_field_and_reason(tmp_path: Path) -> None:
    lines = [
        '{"prompt": "good", "target": "t"}',
        "{broken",
        "[1]",
        '{"prompt": 5, "target": "t"}',
        '{"prompt": "p"}',
        '{"prompt": "  ", "target": "t"}',
        '{"prompt": "p", "target": "\\ud800"}',
        "",
        '{"prompt": "good", "target": "t"}',
        '{"prompt": "good", "target": "u"}',
        "[" * 100_000,
    ]
    prepared = run(write(tmp_path / "a.jsonl", "\n".join(lines)))
    found = reasons(prepared)
    assert [(line, field) for line, field, _ in found] == [
        (2, ""),
        (3, ""),
        (4, "prompt"),
        (5, "target"),
        (6, "prompt"),
        (7, "target"),
        (9, ""),
        (11, ""),
    ]
    assert found[2][2] == "prompt is the int 5, expected text"
    assert found[6][2] == "duplicate of line 1"
    assert [(r["target"], r["reference_index"]) for r in prepared.demonstrations] == [
        ("t", 0),
        ("u", 1),
    ]
    assert len({row["response_id"] for row in prepared.demonstrations}) == 2
    assert prepared.counts["rows_read"] == 10 == len(prepared.demonstrations) + len(found)


def test_prepare_csv_rows_with_wrong_cells_or_quotes_are_refused(tmp_path: Path) -> None:
    text = 'prompt,target\na,b\nonly one\nx,y,z\n"q"r,s\nc,d\n'
    prepared = run(write(tmp_path / "a.csv", text))
    assert [line for line, _, _ in reasons(prepared)] == [3, 4, 5]
    assert {row["prompt"] for row in prepared.demonstrations} == {"a", "c"}


def test_prepare_comparisons_refuses_equal_sides_copies_and_wrong_weights(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "b", "rejected": "a"},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "e\u0301", "rejected": "\u00e9"},
        {"prompt": "p", "chosen": "a", "rejected": "c", "weight": -1},
        {"prompt": "p", "chosen": "a", "rejected": "c", "weight": True},
        {"prompt": "p", "chosen": "a", "rejected": "c", "weight": "0.5"},
    ]
    prepared = run(write(tmp_path / "a.jsonl", rows), kind="comparisons")
    assert [line for line, _, _ in reasons(prepared)] == [3, 4, 5, 6]
    assert [row["weight"] for row in prepared.comparisons] == [1.0, 1.0, 0.5]
    assert len({row["comparison_id"] for row in prepared.comparisons}) == 3


def test_prepare_same_prompt_in_two_splits_first_wins(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [{"prompt": "p", "target": "t"}])
    second = write(tmp_path / "b.jsonl", [{"prompt": "p", "target": "u"}, {"prompt": "q"}])
    both = Prepare(
        sources=(
            Source(path=str(first), name="a", kind="demonstrations", split="train"),
            Source(path=str(second), name="b", kind="prompts", split="test"),
        )
    )
    prepared = prepare(both, seed=0)
    assert {(row["prompt"], row["split"]) for row in prepared.prompts} == {
        ("p", "train"),
        ("q", "test"),
    }
    assert "belongs to train since line 1 of source 'a'" in prepared.quarantine[0]["reason"]


def test_prepare_group_stays_on_one_side(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "target": "t", "g": f"g{i % 40}"} for i in range(400)]
    prepared = run(write(tmp_path / "a.jsonl", rows), group="g")
    group_of = {row["prompt"]: row["g"] for row in rows}
    sides: dict[str, set[str]] = {}
    for row in prepared.prompts:
        sides.setdefault(group_of[row["prompt"]], set()).add(row["split"])
    assert all(len(side) == 1 for side in sides.values())
    assert len({row["split"] for row in prepared.prompts}) == 3


def test_split_of_shares_are_as_asked() -> None:
    shares = SplitShares(validation=0.2, test=0.3)
    sides = [sources.split_of(7, f"group {i}", shares) for i in range(5000)]
    assert sides.count("test") / 5000 == pytest.approx(0.3, abs=0.03)
    assert sides.count("validation") / 5000 == pytest.approx(0.2, abs=0.03)
    assert sides != [sources.split_of(8, f"group {i}", shares) for i in range(5000)]


def test_prepare_long_prompt_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "a b c"}, {"prompt": "a b"}])
    source = Source(path=str(path), name="s", kind="prompts")
    settings = Prepare(sources=(source,), max_prompt_tokens=2)
    prepared = prepare(settings, seed=0, count_tokens=lambda text: len(text.split()))
    assert reasons(prepared)[0][2].startswith("prompt has 3 tokens, expected at most 2")
    assert len(prepared.prompts) == 1


@given(
    st.lists(
        st.tuples(st.sampled_from("pqr"), st.sampled_from(["t", "u", ""]), st.sampled_from("gh")),
        min_size=1,
        max_size=30,
    ),
    st.randoms(use_true_random=False),
)
def test_prepare_rows_any_order_loses_nothing(
    rows: list[tuple[str, str, str]], random: Any
) -> None:
    source = Source(path="a.jsonl", name="s", kind="demonstrations", group="g")
    parsed = [
        sources.parse_row(
            sources.RawRow(line, {"prompt": p, "target": t, "g": g}, ""),
            source,
            source_index=0,
            task="t",
        )
        for line, (p, t, g) in enumerate(rows, start=1)
    ]
    shares = SplitShares(validation=0.3, test=0.3)
    whole = sources.prepare_rows(parsed, seed=1, shares=shares)
    random.shuffle(parsed)
    assert sources.prepare_rows(parsed, seed=1, shares=shares) == whole
    assert len(whole.demonstrations) + len(whole.quarantine) == len(rows)
    sides = {(row["prompt_id"], row["split"]) for row in whole.demonstrations}
    assert len(sides) == len({prompt_id for prompt_id, _ in sides})


@pytest.mark.parametrize(
    ("name", "content", "settings", "message"),
    [
        ("missing.jsonl", None, {}, "cannot be read"),
        ("empty.jsonl", "", {}, "is empty"),
        ("blank.jsonl", "\n\n", {}, "no rows"),
        ("header.csv", "prompt,target\n", {}, "no rows"),
        ("latin.jsonl", b'{"prompt": "caf\xe9"}', {}, "byte 0xe9 is not UTF-8"),
        ("wide.csv", "prompt,target\n".encode("utf-16"), {}, "is not UTF-8"),
        ("quote.csv", 'prompt,target\na,"b\nc,d\n', {}, "line 2: a quote opened here"),
        ("twice.csv", "prompt,prompt\na,b\n", {}, "occurs twice"),
        ("rows.txt", "x", {}, "state `format"),
        ("no.parquet", "PAR1 but not really", {}, "cannot be read as Parquet"),
        ("a.jsonl", '{"text": "p"}', {}, "no field 'prompt'; it has 'text'"),
        ("a.jsonl", '{"prompt": "p", "target": "t"}', {"group": "g"}, "no field 'g'"),
        ("a.jsonl", '{"prompt": "p"}', {"fields": {"promt": "p"}}, "maps 'promt'"),
        ("a.jsonl", '{"prompt": "", "target": ""}', {}, "all 1 rows"),
        ("a.jsonl", '{"prompt"', {}, "all 1 rows"),
    ],
)
def test_prepare_bad_file_is_told_in_one_sentence(
    tmp_path: Path, name: str, content: str | bytes | None, settings: Any, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        write(path, content)
    with pytest.raises(UserError, match=message):
        run(path, **settings)


def test_prepare_two_sources_of_one_name_is_refused(tmp_path: Path) -> None:
    source = Source(
        path=str(write(tmp_path / "a.jsonl", [{"prompt": "p"}])), name="s", kind="prompts"
    )
    with pytest.raises(UserError, match="given twice"):
        prepare(Prepare(sources=(source, source)), seed=0)


def test_read_source_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b"\xef\xbb\xbfprompt\nx\n")
    source = Source(path=str(path), name="s", kind="prompts")
    assert [row.row for row in read_source(source)] == [{"prompt": "x"}]


def test_stdlib_docstrings_pairs_are_prose() -> None:
    spec = importlib.util.spec_from_file_location("stdlib_docstrings", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    body = "The lines are read one by one and given back in the order in which they were found."
    assert example.split_docstring(f"Read all lines.\n\n{body}\n\n>>> 1\n1", 90) == (
        body,
        "Read all lines.",
    )
    assert example.split_docstring(f"Read all lines. {body}", 90) == (body, "Read all lines.")
    assert example.split_docstring("f(x) -> int\n\n" + body, 90) is None
    assert example.split_docstring("Read all lines.\n\n>>> f(1)\n2\n>>> f(2)\n3", 90) is None
    assert len(example.cut(body * 9, 20).split()) <= 20
