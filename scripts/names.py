"""List public names that two modules define, but for those in `SHARED`.

python scripts/names.py
"""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("rso", "schemas", "pipelines", "stages")
# Names that mean the same thing in every module that has them.
SHARED = {
    "run": "what a stage does: the runner calls it",
    "main": "what a module does as a program",
    "SCHEMA": "the schema of the dataset that the module is named after",
    "logger": "the module's logger",
}


def twice(root: Path = ROOT) -> dict[str, list[str]]:
    """Return the modules of each public name that several define, without those in `SHARED`."""
    modules: dict[str, list[str]] = defaultdict(list)
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            for name in defined(path.read_text(encoding="utf-8")):
                modules[name].append(str(path.relative_to(root)))
    return {
        name: found
        for name, found in sorted(modules.items())
        if len(found) > 1 and name not in SHARED
    }


def defined(source: str) -> set[str]:
    """Return the public names of classes, functions and constants at the top of a module."""
    found: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in found if not name.startswith("_")}


if __name__ == "__main__":
    for name, paths in twice().items():
        print(f"{name}: {', '.join(paths)}")
