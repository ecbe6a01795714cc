"""What the pages say is what the code says: generated pages, settings shown, links."""

import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rso.config import Source, load_config

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SMALLEST: dict[str, Any] = {"model": "org/name", "prepare": {"sources": []}}


@pytest.mark.parametrize(
    ("script", "page"), [("schema_docs", "artifacts"), ("config_docs", "configuration")]
)
def test_generated_page_is_what_its_script_prints(script: str, page: str) -> None:
    command = [sys.executable, f"scripts/{script}.py"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    written = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    assert written == printed, f"run `python scripts/{script}.py > docs/{page}.md`"


def snippets() -> Iterator[Any]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL), 1):
            yield pytest.param(block, id=f"{page.name}-{number}")


@pytest.mark.parametrize("block", list(snippets()))
def test_yaml_snippet_is_accepted_as_settings(block: str, tmp_path: Path) -> None:
    """A block is a whole config, some sections of one, or a list of sources."""
    data = yaml.safe_load(block)
    if isinstance(data, list):
        assert [Source.model_validate(source) for source in data]
        return
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(SMALLEST | data), encoding="utf-8")
    load_config(file)


def links() -> Iterator[Any]:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target and not target.startswith("#"):
                yield pytest.param(page, target, id=f"{page.name}-{target}")


@pytest.mark.parametrize(("page", "target"), list(links()))
def test_link_leads_to_a_file(page: Path, target: str) -> None:
    assert (page.parent / target.partition("#")[0]).exists(), f"{page}: {target}"


def test_figure_of_shared_prefixes_is_what_its_script_draws() -> None:
    script = runpy.run_path(str(ROOT / "scripts/training_docs.py"))
    assert script["FIGURE"].read_text(encoding="utf-8") == script["figure"]()


@pytest.mark.slow
def test_rejection_page_has_what_its_script_measures() -> None:
    """Tables and figure: `keep` and `collapse`, convergence over n, figures over σ/β."""
    script = runpy.run_path(str(ROOT / "scripts/rejection_docs.py"))
    sizes, shown = script["SIZES"], script["SHOWN"]
    found = {size: script["distances"](size, (1, 8) if size in shown else (1,)) for size in sizes}
    page = (ROOT / "docs/rejection-sampling.md").read_text(encoding="utf-8")
    for table in (script["by_beta"](), script["by_duplicates"](), script["by_size"](found)):
        assert "\n".join(table) in page
    assert script["FIGURE"].read_text(encoding="utf-8") == script["figure"](found)


def test_places_that_the_architecture_page_names_exist() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    table = page.partition("## Where to look")[2].partition("\n## ")[0]
    places = re.findall(r"^\| [^|]+\? \| `([^`]+)` \| `(\w+)` \|$", table, re.MULTILINE)
    assert len(places) == 10
    for path, name in places:
        source = (ROOT / path).read_text(encoding="utf-8")
        assert re.search(rf"^(def|class) {name}\b|^{name}\b.* = ", source, re.MULTILINE), (
            path,
            name,
        )
