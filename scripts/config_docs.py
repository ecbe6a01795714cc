"""Print docs/configuration.md from `rso.config` and the stage table.

python scripts/config_docs.py > docs/configuration.md
"""

import json
import types
from collections import defaultdict
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from rso import config
from rso.config import Config, Optimisation, Section, is_identity, parse_config
from stages import stages

INTRO = """\
# Configuration

Written by `scripts/config_docs.py` from `rso/config.py`, which is the one statement of all
settings.

A run is one YAML file. Unknown keys are refused, and the nearest known one is named. `--set
section.key=value` overrides one setting (the value is read as YAML; lists are given whole, e.g.
`--set train_ranker.folds=[0,1]`). Only `model` and `prepare.sources` have no default.

**Identity** says whether a setting takes part in the fingerprint of the stages that see it, so
that changing it runs them again. A stage sees only the sections listed for it. Settings that are
not identity say where and how fast, not what; the resolved config of every artifact records them
all the same. Before a fingerprint is taken, `auto` is replaced by what it means on this machine,
except in `compute.device` and in a source's `format`.
"""

SHARED = "Settings that `train_sft`, `train_ranker`, `train_gold_ranker` and `train_policy` share"


def page() -> str:
    """Return the whole page."""
    return "\n".join([INTRO, *_top(), *_sections()])


def _top() -> Iterator[str]:
    yield "## Top level\n"
    yield from _table(
        {n: f for n, f in Config.model_fields.items() if _inner(f.annotation) is None}
    )
    yield "Which stages see which settings; `beam` runs them and is hidden from all:\n"
    yield "| setting | seen by |\n|---|---|"
    seen = _seen()
    for name, field in Config.model_fields.items():
        if name in seen or _inner(field.annotation) is not None:
            yield f"| `{name}` | {', '.join(seen.get(name, ['none']))} |"
    yield ""


def _seen() -> dict[str, list[str]]:
    """Return for each section the stages that see it, in a run that has every stage."""
    data = {
        "model": "m",
        "prepare": {"sources": []},
        "comparisons": {"labeller": "summary_quality"},
        "targets": {"method": "rest"},
    }
    seen: dict[str, list[str]] = defaultdict(list)
    for stage in stages(parse_config(data, where="config_docs")):
        for name in stage.sees:
            seen[name].append(f"`{stage.name}`")
    return seen


def _sections() -> Iterator[str]:
    shown: set[type[Section]] = set()
    for field in Config.model_fields.values():
        section = _inner(field.annotation)
        if section is None or section in shown:
            continue
        if issubclass(section, Optimisation) and Optimisation not in shown:
            shown.add(Optimisation)
            yield f"## Trainers\n\n{SHARED}.\n"
            yield from _table(Optimisation.model_fields)
        shown.add(section)
        same = [n for n, f in Config.model_fields.items() if _inner(f.annotation) is section]
        yield f"## {', '.join(same)}\n\n{_sentence(section)}\n"
        yield from _own(section, shown, is_runtime=not is_identity(field))


def _own(section: type[Section], shown: set[type[Section]], *, is_runtime: bool) -> Iterator[str]:
    shared = Optimisation.model_fields if issubclass(section, Optimisation) else {}
    fields = {n: f for n, f in section.model_fields.items() if n not in shared}
    if shared:
        yield "And the settings shared by the trainers, above.\n"
    if not fields:
        yield "No settings yet.\n"
        return
    yield from _table(fields, is_runtime=is_runtime)
    for field in fields.values():
        inner = _inner(field.annotation)
        if inner is not None and inner not in shown:
            shown.add(inner)
            yield f"### {', '.join(_places(inner))}\n\n{_sentence(inner)}\n"
            yield from _table(inner.model_fields)


def _places(inner: type[Section]) -> list[str]:
    """Return the settings whose value is a section of this class, e.g. `decode.sampling`."""
    return [
        f"{name}.{inner_name}"
        for name, field in Config.model_fields.items()
        if (section := _inner(field.annotation)) is not None
        for inner_name, inner_field in section.model_fields.items()
        if _inner(inner_field.annotation) is inner
    ]


def _table(fields: dict[str, FieldInfo], *, is_runtime: bool = False) -> Iterator[str]:
    yield "| setting | values | default | identity | meaning |\n|---|---|---|---|---|"
    for name, field in fields.items():
        cells = (
            f"`{name}`",
            _values(field),
            _default(field),
            "no" if is_runtime or not is_identity(field) else "yes",
            str(field.description),
        )
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""


def _default(field: FieldInfo) -> str:
    if _inner(field.annotation) is not None and field.default_factory is not None:
        return "see below"
    default = field.get_default(call_default_factory=True, validated_data={})
    if default is PydanticUndefined:
        return "required"
    if isinstance(default, tuple):
        default = list(default)
    text = f"{default:g}" if isinstance(default, float) else json.dumps(default)
    return f"`{text}`"


def _values(field: FieldInfo) -> str:
    return " ".join([_type(field.annotation), *_bounds(field.metadata)])


def _bounds(metadata: list[Any]) -> list[str]:
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return [
        f"{word} {getattr(bound, name):g}"
        for bound in metadata
        for name, word in words.items()
        if getattr(bound, name, None) is not None
    ]


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return " ".join([_type(arguments[0]), *_bounds(list(annotation.__metadata__))])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(argument) for argument in arguments)
    if origin is tuple:
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return f"mapping of {_type(arguments[0])} to {_type(arguments[1])}"
    if _is_section(annotation):
        return "section"
    names = {str: "text", int: "integer", float: "number", bool: "true or false"}
    return names.get(annotation, "null")


def _inner(annotation: Any) -> type[Section] | None:
    """Return the section class in a setting's type: the type itself, in a list, or optional."""
    if get_origin(annotation) in (tuple, Union, types.UnionType):
        annotation = get_args(annotation)[0]
    return annotation if _is_section(annotation) else None


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, config.Section)


def _sentence(section: type[Section]) -> str:
    return " ".join(str(section.__doc__).split())


if __name__ == "__main__":
    print(page(), end="")
