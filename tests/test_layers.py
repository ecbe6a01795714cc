"""Imports point one way, and light modules stay light."""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {
    "apache_beam",
    "fsspec",
    "numpy",
    "pandas",
    "prefect",
    "pyarrow",
    "pydantic",
    "rich",
    "scipy",
    "torch",
    "transformers",
    "typer",
    "vllm",
    "yaml",
}


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("schemas", {"pyarrow", "numpy"}),
        ("rso.config", {"pydantic"}),
        ("rso.rejection", {"numpy"}),
        ("rso.diagnostics", {"numpy"}),
        ("rso.pairing", {"numpy"}),
        ("rso.targets", {"numpy"}),
        ("rso.statistics", {"numpy"}),
        ("rso.seeds", {"numpy"}),
        ("rso.ids", set()),
        ("rso.cli", {"typer", "rich"}),
        ("rso.artifact", {"pyarrow", "numpy", "pydantic", "fsspec", "pandas"}),
        ("rso.losses", {"torch", "numpy"}),
        ("stages", {"numpy", "pydantic"}),
        ("stages.process", {"numpy", "pydantic"}),
    ],
)
def test_import_of_a_module_brings_only_what_it_needs(module: str, allowed: set[str]) -> None:
    code = f"import sys, {module}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) <= allowed


def test_layers_hold() -> None:
    command = "from importlinter.cli import lint_imports_command as c; c(['--no-cache'])"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_layers_can_fail(tmp_path: Path) -> None:
    """A copy in which the method imports a pipeline is refused."""
    for package in ("pipelines", "rso", "schemas", "stages"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignore)
    shutil.copy(ROOT / "flows.py", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "rso" / "losses.py").open("a") as file:
        file.write("\nimport pipelines.shards\n")
    command = "from importlinter.cli import lint_imports_command as c; c(['--no-cache'])"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, '.'); {command}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
    )
    assert done.returncode == 1 and "rso.losses" in done.stdout, done.stdout + done.stderr


def test_no_public_name_means_two_things(tmp_path: Path) -> None:
    names = runpy.run_path(str(ROOT / "scripts/names.py"))
    assert names["twice"]() == {}, "rename one, or say in SHARED why they are the same"
    for module, text in {"a": "def load(): ...\nX = 1\n", "b": "load: int = 1\n_x = 1\n"}.items():
        (tmp_path / "rso").mkdir(exist_ok=True)
        (tmp_path / f"rso/{module}.py").write_text(text)
    assert names["twice"](tmp_path) == {"load": ["rso/a.py", "rso/b.py"]}
