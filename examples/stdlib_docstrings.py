"""Write the docstrings of Python's standard library as prompts and summaries, one JSON line each.

    python examples/stdlib_docstrings.py                  # data/stdlib_docstrings.jsonl
    python examples/stdlib_docstrings.py --max-words 120  # longer bodies
    python examples/stdlib_docstrings.py --by-module      # and how many come from which module

A record is {module, name, body, summary}: by PEP 257 the first line of a docstring sums up the
rest, so the rest is the text and the first line is its human summary. Sources are read by `ast`
and never imported. Only the standard library is needed. The records depend on the version of
Python that runs this, which the last line printed names; the order is by module and place.
"""

import argparse
import ast
import inspect
import json
import platform
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# Tests and demonstrations document themselves, not an interface; __phello__ and lib2to3's
# fixtures are data in the shape of code.
SKIPPED_PARTS = frozenset(
    {"test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "turtledemo"}
    | {"__phello__", "__hello__", "ensurepip", "pydoc_data"}
)
MIN_BODY_WORDS = 12
MAX_BODY_CHARACTERS = 900
SUMMARY_WORDS = range(3, 21)
# Bodies that begin alike are copies of one text with other names (posixpath and ntpath, _pyio).
COPY_WORDS = 10


class Record(NamedTuple):
    """A docstring: where it is, its first line (`summary`) and the rest of it (`body`)."""

    module: str
    name: str
    body: str
    summary: str


def main() -> None:
    """Write the file and say how many records it holds."""
    arguments = _arguments()
    library = Path(sysconfig.get_path("stdlib"))
    records = collect(library, arguments.max_words)
    if not records:
        sys.exit(
            f"stdlib_docstrings: {library} holds no Python sources with docstrings; "
            "run this with a Python that ships its standard library as .py files."
        )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record._asdict(), ensure_ascii=False) + "\n" for record in records]
    # Renamed into place, so that an interrupted run leaves no half a data set for `make` to keep.
    unfinished = arguments.output.with_name(arguments.output.name + ".part")
    unfinished.write_text("".join(lines), encoding="utf-8", newline="\n")
    unfinished.replace(arguments.output)
    _print_counts(records, arguments.output, by_module=arguments.by_module)


def collect(library: Path, max_words: int) -> list[Record]:
    """Return the clean records of all modules under `library`, without copies, in a fixed order."""
    records: list[Record] = []
    seen: set[str] = set()
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if SKIPPED_PARTS.intersection(relative.parts) or relative.name.startswith("_sysconfigdata"):
            continue
        for record in read_module(path, _module_name(relative), max_words):
            keys = {"summary " + _plain(record.summary), "body " + _plain(record.body, COPY_WORDS)}
            if not keys & seen:
                records.append(record)
            seen |= keys
    return records


def read_module(path: Path, module: str, max_words: int) -> Iterator[Record]:
    """Yield the clean records of one source file in the order of its text."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        # lib2to3 and a few others ship files in another language version.
        return
    for name, docstring in _docstrings(tree, ""):
        pair = split_docstring(docstring, max_words)
        if pair is not None:
            body, summary = pair
            yield Record(module, name or module, body, summary)


def split_docstring(docstring: str, max_words: int) -> tuple[str, str] | None:
    """Return (body, summary) of a docstring, or None where one of them is no plain prose.

    The summary is the first sentence of the first paragraph, which is the first line wherever PEP
    257 is kept; it gets its full stop where the author left it out.
    """
    first, _, rest = inspect.cleandoc(docstring).partition("\n\n")
    opening = " ".join(first.split())
    sentence = re.search(r"(?<=[\w)'\"`]{2}\.) (?=[A-Z])", opening)
    summary = opening[: sentence.start()] if sentence else opening
    summary += "." if re.search(r"\w$", summary) else ""
    remainder = first.split(None, len(summary.split()))[-1] if sentence else ""
    body = cut(_prose(remainder + "\n\n" + rest), max_words)
    return (body, summary) if _is_summary(summary) and _is_body(body) else None


def cut(text: str, max_words: int) -> str:
    """Return the beginning of `text`: at most `max_words` words and 900 characters.

    The cut is after a sentence where one ends in the second half, and after a word otherwise.
    """
    words = list(re.finditer(r"\S+", text))
    end = words[max_words - 1].end() if len(words) > max_words else len(text)
    if end > MAX_BODY_CHARACTERS:
        end = text.rfind(" ", 0, MAX_BODY_CHARACTERS)
    if end >= len(text):
        return text
    sentence = [m.end() for m in re.finditer(r"[.!?](?=\s)", text[: end + 1]) if m.end() > end // 2]
    return text[: sentence[-1] if sentence else end].rstrip()


def _docstrings(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    if isinstance(node, documented):
        docstring = ast.get_docstring(node, clean=False)
        if docstring:
            yield prefix, docstring
    for child in ast.iter_child_nodes(node):
        name = getattr(child, "name", "") if isinstance(child, documented) else ""
        yield from _docstrings(child, ".".join(part for part in (prefix, name) if part))


def _prose(text: str) -> str:
    """Return `text` without doctests and the words that announce them, a paragraph a line."""
    paragraphs = [p for p in re.split(r"\n\s*\n", text) if not p.lstrip().startswith(">>>")]
    joined = [" ".join(p.partition(">>>")[0].split()) for p in paragraphs]
    prose = "\n".join(p for p in joined if p)
    return re.sub(r"(?:^|(?<=[.!?])\s|\n)[^.\n]{0,60}:$", "", prose)


def _is_summary(text: str) -> bool:
    """Return whether `text` is one sentence in words: no signature, heading, question or list."""
    is_sentence = re.match(r"[A-Z][\w'/-]* .*[\w)'\"`]{2}\.$", text)
    is_code = re.search(r"->|=|[\[{<>|]|[.!?:;] [A-Z]|^\w+\(", text)
    return bool(is_sentence and not is_code and len(text.split()) in SUMMARY_WORDS)


def _is_body(text: str) -> bool:
    """Return whether `text` is long enough, has a sentence in it and is mostly letters."""
    letters = sum(character.isalpha() or character.isspace() for character in text)
    has_sentence = re.search(r"[a-z]{2} [^.]*[a-z]{2}[\w)'\"`]*[.:]", text)
    is_long = len(text.split()) >= MIN_BODY_WORDS
    is_prose = letters >= 0.8 * len(text) and text.count(",") <= 0.25 * len(text.split())
    return bool(is_long and has_sentence and is_prose)


def _plain(text: str, num_words: int | None = None) -> str:
    return " ".join(re.findall(r"\w+", text.lower())[:num_words])


def _module_name(relative: Path) -> str:
    parts = relative.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _print_counts(records: list[Record], output: Path, *, by_module: bool) -> None:
    modules = Counter(record.module for record in records)
    ordered = sorted(modules.items(), key=lambda item: (-item[1], item[0]))
    for module, count in ordered if by_module else []:
        print(f"{count:5d}  {module}")
    print(
        f"{len(records)} pairs from {len(modules)} modules of Python "
        f"{platform.python_version()} -> {output}"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "output", nargs="?", type=Path, default=Path("data/stdlib_docstrings.jsonl")
    )
    parser.add_argument("--max-words", type=int, default=90, help="longest body (default: 90)")
    parser.add_argument("--by-module", action="store_true", help="print the pairs of each module")
    arguments = parser.parse_args()
    if arguments.max_words < MIN_BODY_WORDS:
        parser.error(f"--max-words is {arguments.max_words}, expected at least {MIN_BODY_WORDS}")
    return arguments


if __name__ == "__main__":
    main()
