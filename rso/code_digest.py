"""A digest of the code that can change what a stage writes.

It covers the stage's module and every project module that it imports, except `PLUMBING`. Modules
are compared as syntax trees: comments, docstrings and layout do not count, and all Python versions
give the same digest. A data file beside an imported module with the same stem (`report.py`,
`report.css`) counts byte by byte.
"""

import ast
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from rso.errors import UserError
from rso.fingerprint import fingerprint

PACKAGES = ("schemas", "rso", "pipelines", "stages", "flows")

# Modules that cannot change what is computed from the same settings and inputs. A name stands for
# the module and all modules below it. Only "stages" stands for its `__init__` alone.
PLUMBING = (
    "flows",
    "pipelines.workers",
    "rso.allocator",
    "rso.artifact",
    "rso.cli",
    "rso.code_digest",
    "rso.config",
    "rso.content_digest",
    "rso.errors",
    "rso.files",
    "rso.fingerprint",
    "rso.gpus",
    "rso.lock",
    "rso.manifest",
    "rso.parquet",
    "rso.progress",
    "rso.work",
    "stages",
    "stages.__main__",
    "stages.context",
    "stages.launch",
    "stages.process",
    "stages.runner",
)
# Raise this when a change to plumbing changes what stages write: every stage then runs again.
PLUMBING_FORMAT = 1
# Schemas determine what plumbing writes. So imports of this package count in plumbing too.
FOLLOWED_FROM_PLUMBING = "schemas"

_ENCODING_FORMAT = 1
_DYNAMIC = frozenset(
    (
        "__import__",
        "exec_module",
        "find_loader",
        "import_module",
        "load_module",
        "module_from_spec",
        "resolve_name",
        "run_module",
        "run_path",
        "spec_from_file_location",
    )
)
_EXECUTING_BUILTINS = frozenset(("eval", "exec"))
_PYTHON_SUFFIXES = frozenset((".py", ".pyc", ".pyi", ".so"))


class CodeDigestError(UserError):
    """A module imports something that cannot be followed."""


@dataclass(frozen=True)
class CodeDigest:
    """The digest of a stage's code, and the digest of each module in it."""

    digest: str
    modules: dict[str, str]


@dataclass(frozen=True)
class _Module:
    name: str
    path: Path
    is_package: bool


def code_digest(
    module: str, *, root: Path | None = None, packages: tuple[str, ...] = PACKAGES
) -> CodeDigest:
    """Return the digest of `module` and of all project modules that it imports.

    Imports inside functions count, and so do imports of imported modules. `root` is the directory
    that holds the `packages`, by default the directory above this package.

    Raises:
        CodeDigestError: a module does not exist, has a star import from the project, or (outside
            `PLUMBING`) imports or runs code dynamically; the message says where.
    """
    root = root or Path(__file__).resolve().parents[1]
    project = _project(root, packages, _state(root, packages))
    modules = {found.name: _module_digest(found) for found in project.closure(module)}
    digest = fingerprint(
        {"encoding": _ENCODING_FORMAT, "plumbing": PLUMBING_FORMAT, "modules": modules}
    )
    return CodeDigest(digest, modules)


def is_plumbing(name: str) -> bool:
    """Say whether a module is left out of code digests."""
    return any(
        name == plumbing or (plumbing != "stages" and name.startswith(f"{plumbing}."))
        for plumbing in PLUMBING
    )


def syntax_digest(source: str) -> str:
    """Return the SHA-256, in hex, of the syntax tree of `source`.

    Comments and layout do not count. Statements that do nothing (`pass`, bare strings) do not count
    either, so adding or removing a docstring does not change the digest.
    """
    encoded = json.dumps(_encode(ast.parse(source)), separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(encoded.encode()).hexdigest()


class _Project:
    """The source files of the project packages under a root."""

    def __init__(self, root: Path, packages: tuple[str, ...]) -> None:
        self._root, self._packages = root, packages
        self._imports: dict[str, set[str]] = {}

    def closure(self, name: str) -> list[_Module]:
        """Return `name` and all its direct and indirect imports, sorted by name, less plumbing."""
        start = self.find(name)
        if start is None:
            raise CodeDigestError(
                f"{self._root}: there is no module {name!r} among {', '.join(self._packages)}; "
                "name a module of the project."
            )
        seen: dict[str, _Module] = {}
        waiting = [*self._parents(name), start]
        while waiting:
            module = waiting.pop()
            if module.name in seen:
                continue
            seen[module.name] = module
            waiting += self._followed(module)
        return [seen[n] for n in sorted(seen) if not is_plumbing(n)]

    def _followed(self, module: _Module) -> Iterator[_Module]:
        hidden = is_plumbing(module.name)
        for name in self.imports(module):
            if not hidden or name.split(".")[0] == FOLLOWED_FROM_PLUMBING:
                found = self.find(name)
                assert found is not None, name
                yield found

    def imports(self, module: _Module) -> set[str]:
        """Return the project modules that a module imports, and their parent packages."""
        if module.name not in self._imports:
            self._imports[module.name] = self._read_imports(module)
        return self._imports[module.name]

    def _read_imports(self, module: _Module) -> set[str]:
        tree = _parse(module.path)
        imports = _Imports(self, module, refuse=not is_plumbing(module.name))
        imports.visit(tree)
        imports.follow_attributes(tree)
        return {p.name for name in imports.names for p in [*self._parents(name)]} | imports.names

    def find(self, name: str) -> _Module | None:
        """Return the project module with this name, or None if it has no file."""
        parts = name.split(".")
        if parts[0] not in self._packages:
            return None
        path = self._root.joinpath(*parts)
        if (path / "__init__.py").is_file():
            return _Module(name, path / "__init__.py", is_package=True)
        file = path.with_name(f"{path.name}.py")
        return _Module(name, file, is_package=False) if file.is_file() else None

    def is_project(self, name: str) -> bool:
        return name.split(".")[0] in self._packages

    def _parents(self, name: str) -> Iterator[_Module]:
        parts = name.split(".")
        for end in range(1, len(parts)):
            found = self.find(".".join(parts[:end]))
            if found is not None:
                yield found


def _state(root: Path, packages: tuple[str, ...]) -> tuple[tuple[str, int, int], ...]:
    """Return path, modification time and size of every source file of the packages."""
    files = [root / f"{package}.py" for package in packages]
    files += [path for package in packages for path in (root / package).rglob("*.py")]
    stats = [(str(path), path.stat()) for path in sorted(files) if path.is_file()]
    return tuple((path, stat.st_mtime_ns, stat.st_size) for path, stat in stats)


@lru_cache(maxsize=4)
def _project(root: Path, packages: tuple[str, ...], _state: object) -> _Project:
    """Return the project, cached by `_state`, so that imports are read once and not per stage."""
    return _Project(root, packages)


class _Imports(ast.NodeVisitor):
    """Collect the project modules that a module names in its imports."""

    def __init__(self, project: _Project, module: _Module, *, refuse: bool) -> None:
        self._project, self._module, self._refuse = project, module, refuse
        self.names: set[str] = set()
        self._bound: dict[str, str] = {}

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if self._project.is_project(alias.name):
                self._add(alias.name, node)
                bound = alias.name if alias.asname else alias.name.split(".")[0]
                self._bound[alias.asname or bound] = bound

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        source = self._source(node)
        for alias in node.names:
            if alias.name in _DYNAMIC:
                self._refuse_dynamic(node, alias.name)
        if not self._project.is_project(source):
            return
        self._add(source, node)
        for alias in node.names:
            if alias.name == "*":
                raise CodeDigestError(
                    f"{self._place(node)}: `from {source} import *` hides what is used; name it."
                )
            submodule = f"{source}.{alias.name}"
            if self._project.find(submodule) is not None:
                self.names.add(submodule)
                self._bound[alias.asname or alias.name] = submodule

    def visit_Name(self, node: ast.Name) -> None:
        if node.id in _DYNAMIC or node.id in _EXECUTING_BUILTINS:
            self._refuse_dynamic(node, node.id)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in _DYNAMIC:
            self._refuse_dynamic(node, node.attr)
        self.generic_visit(node)

    def follow_attributes(self, tree: ast.AST) -> None:
        """Add the modules reached as attributes: `import rso` and then `rso.losses.hinge`."""
        for node in ast.walk(tree):
            chain = _dotted(node) if isinstance(node, ast.Attribute) else None
            if chain is None or chain[0] not in self._bound:
                continue
            name = self._bound[chain[0]]
            for attribute in chain[1:]:
                name = f"{name}.{attribute}"
                if self._project.find(name) is None:
                    break
                self.names.add(name)

    def _source(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = self._module.name.split(".")
        drop = node.level - (1 if self._module.is_package else 0)
        base = parts[: len(parts) - drop]
        return ".".join([*base, *([node.module] if node.module else [])])

    def _add(self, name: str, node: ast.AST) -> None:
        if self._project.find(name) is None:
            raise CodeDigestError(
                f"{self._place(node)}: imports {name}, which is no file of the project; "
                "correct the import."
            )
        self.names.add(name)

    def _refuse_dynamic(self, node: ast.AST, what: str) -> None:
        if self._refuse:
            raise CodeDigestError(
                f"{self._place(node)}: `{what}` imports or runs code that cannot be followed, so a "
                "change in it would rerun nothing; use an import statement."
            )

    def _place(self, node: ast.AST) -> str:
        return f"{self._module.path}:{getattr(node, 'lineno', 0)}"


def _dotted(node: ast.expr) -> list[str] | None:
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [node.id, *reversed(names)] if isinstance(node, ast.Name) else None


def _module_digest(module: _Module) -> str:
    stat = module.path.stat()
    return fingerprint(
        {
            "syntax": _file_digest(module.path, stat.st_mtime_ns, stat.st_size),
            "data": {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in _data(module)},
        }
    )


def _data(module: _Module) -> list[Path]:
    if module.is_package:
        return []
    beside = module.path.parent.glob(f"{module.path.stem}.*")
    return sorted(
        path
        for path in beside
        # Exactly one suffix: an editor's `report.css~` or `report.py.orig` must not count.
        if path.is_file()
        and path.stem == module.path.stem
        and path.suffix not in _PYTHON_SUFFIXES
        and not path.name.endswith("~")
    )


@cache
def _file_digest(path: Path, _mtime: int, _size: int) -> str:
    return syntax_digest(path.read_text(encoding="utf-8"))


def _parse(path: Path) -> ast.Module:
    stat = path.stat()
    return _parsed(path, stat.st_mtime_ns, stat.st_size)


@cache
def _parsed(path: Path, _mtime: int, _size: int) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


# `ctx` follows from the position of a node. The others do not change what is run.
_SILENT_FIELDS = frozenset(("ctx", "type_comment", "type_ignores", "kind"))


def _encode(node: Any) -> Any:
    """Return a node as JSON's own types.

    Fields that are None or empty are left out. So code that does not use an optional field has the
    same encoding in a Python version that adds the field.
    """
    if isinstance(node, ast.Constant):
        return ["Constant", type(node.value).__name__, _constant(node.value)]
    if isinstance(node, ast.JoinedStr):
        return ["JoinedStr", _encode(_merged(node.values))]
    if isinstance(node, ast.AST):
        fields = {name: _encode(getattr(node, name, None)) for name in node._fields}
        kept = {n: v for n, v in fields.items() if n not in _SILENT_FIELDS and v not in (None, [])}
        return [type(node).__name__, kept]
    if isinstance(node, list):
        return [_encode(item) for item in node if not _does_nothing(item)]
    assert node is None or type(node) in (str, int, bool), f"unknown syntax field {node!r}"
    return node


def _constant(value: object) -> Any:
    # Only optimised trees hold frozensets. All other types have the same repr in every version.
    return value if isinstance(value, str) else repr(value)


def _does_nothing(node: Any) -> bool:
    if isinstance(node, ast.Pass):
        return True
    is_bare = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_bare and isinstance(node.value.value, str)


def _merged(values: list[ast.expr]) -> list[ast.expr]:
    """Join adjacent texts of an f-string: Python versions split them differently."""
    merged: list[ast.expr] = []
    for value in values:
        text = value.value if isinstance(value, ast.Constant) else None
        if text == "":
            continue
        last = merged[-1] if merged else None
        if isinstance(text, str) and isinstance(last, ast.Constant):
            merged[-1] = ast.Constant(str(last.value) + text)
        else:
            merged.append(value)
    return merged
