"""Code digests: what counts, what does not, and what is followed."""

import ast
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from rso import code_digest as module
from rso import config
from rso.code_digest import CodeDigest, CodeDigestError, code_digest, is_plumbing, syntax_digest

PROJECT = {
    "rso/__init__.py": "",
    "rso/config.py": "BETA = 1\n",
    "rso/losses.py": "GAMMA = 0.05\n\ndef hinge(x):\n    return x * GAMMA\n",
    "rso/deep/__init__.py": "FLAG = 1\n",
    "rso/deep/inner.py": "from . import sibling\nfrom ..lone import LONE\n",
    "rso/deep/sibling.py": "VALUE = 1\n",
    "rso/lone.py": "LONE = 1\n",
    "rso/unused.py": "UNUSED = 1\n",
    "rso/report.py": "NAME = 'report'\n",
    "rso/report.html": "<p></p>",
    "rso/report.css": "p {}",
    "rso/artifact.py": "from schemas import rewards\nfrom rso import lone\n",
    "schemas/__init__.py": "",
    "schemas/rewards.py": "FIELDS = 1\n",
    "stages/__init__.py": "TABLE = 1\n",
    "stages/train.py": (
        '"""A stage."""\n'
        "import math\n"
        "from rso.config import BETA\n"
        "def run(x):\n"
        '    """Return."""\n'
        "    from rso.losses import hinge\n"
        "    return hinge(x) + math.pi\n"
    ),
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name, text in PROJECT.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def digest(root: Path) -> CodeDigest:
    return code_digest("stages.train", root=root)


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def stage(root: Path, body: str) -> CodeDigest:
    (root / "stages/train.py").write_text(body)
    return digest(root)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "# a comment\n" + text,
        lambda text: text.replace("A stage.", "Another text."),
        lambda text: text.replace('    """Return."""\n', ""),
        lambda text: text.replace("hinge(x) + math.pi", "(hinge( x )\n            + math.pi)"),
        lambda text: text.replace("\n", "\n\n"),
    ],
)
def test_code_digest_comments_docstrings_and_layout_do_not_count(
    project: Path, change: Callable[[str], str]
) -> None:
    before = digest(project)
    path = project / "stages/train.py"
    assert change(path.read_text()) != path.read_text()
    path.write_text(change(path.read_text()))
    assert digest(project) == before


def test_code_digest_function_level_import_is_followed_and_its_constant_counts(
    project: Path,
) -> None:
    before = digest(project)
    assert "rso.losses" in before.modules and "rso.unused" not in before.modules
    path = project / "rso/losses.py"
    path.write_text(path.read_text().replace("0.05", "0.06"))
    after = digest(project)
    assert after.digest != before.digest
    changed = [name for name in after.modules if after.modules[name] != before.modules[name]]
    assert changed == ["rso.losses"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("from rso import losses", {"rso", "rso.losses"}),
        ("import rso.deep.sibling as s", {"rso", "rso.deep", "rso.deep.sibling"}),
        ("import rso\nx = rso.deep.sibling.VALUE", {"rso", "rso.deep", "rso.deep.sibling"}),
        ("from rso import deep as d\nx = d.sibling.VALUE", {"rso", "rso.deep", "rso.deep.sibling"}),
        (
            "from rso.deep.inner import LONE",
            {"rso", "rso.deep", "rso.deep.inner", "rso.deep.sibling", "rso.lone"},
        ),
        ("class A:\n    def f(self):\n        import rso.lone", {"rso", "rso.lone"}),
        ("try:\n    import rso.lone\nexcept ImportError: pass", {"rso", "rso.lone"}),
    ],
)
def test_code_digest_every_form_of_import_is_followed_with_its_parents(
    project: Path, body: str, expected: set[str]
) -> None:
    assert set(stage(project, body).modules) == {"stages.train", *expected}


def test_code_digest_parent_package_counts(project: Path) -> None:
    before = stage(project, "import rso.deep.sibling")
    append(project / "rso/deep/__init__.py", "MORE = 1\n")
    assert digest(project).digest != before.digest


@pytest.mark.parametrize(
    "body",
    [
        "import importlib\nimportlib.import_module('rso.losses')",
        "from importlib import import_module as i",
        "def f():\n    return __import__('rso')",
        "import runpy\nrunpy.run_module('rso')",
        "exec('import rso.losses')",
        "from rso.losses import *",
        "import rso.absent",
    ],
)
def test_code_digest_import_that_cannot_be_followed_is_refused_with_its_place(
    project: Path, body: str
) -> None:
    with pytest.raises(CodeDigestError, match=r"stages/train\.py:\d: .*"):
        stage(project, body)


def test_code_digest_model_eval_and_compile_are_no_dynamic_imports(project: Path) -> None:
    stage(project, "def f(model):\n    return model.eval().compile()")


@pytest.mark.parametrize("name", ["report.html", "report.css"])
def test_code_digest_data_file_beside_an_imported_module_counts(project: Path, name: str) -> None:
    before = stage(project, "import rso.report")
    append(project / "rso" / name, " ")
    assert digest(project).digest != before.digest


def test_code_digest_other_files_do_not_count(project: Path) -> None:
    before = stage(project, "import rso.report")
    for name in ("other.html", "report.html~", ".report.html.swp", "report.py.orig"):
        (project / "rso" / name).write_text("x")
    assert digest(project) == before


@pytest.mark.parametrize("name", ["rso/config.py", "stages/__init__.py", "rso/unused.py"])
def test_code_digest_plumbing_and_unused_modules_do_not_count(project: Path, name: str) -> None:
    before = digest(project)
    append(project / name, "MORE = 1\n")
    assert digest(project) == before


def test_code_digest_schemas_count_even_through_the_artifact_writer(project: Path) -> None:
    before = stage(project, "from rso.artifact import write")
    assert set(before.modules) == {"stages.train", "rso", "schemas", "schemas.rewards"}
    append(project / "schemas/rewards.py", "MORE = 1\n")
    assert digest(project).digest != before.digest


def test_code_digest_format_of_plumbing_counts(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digest(project)
    monkeypatch.setattr(module, "PLUMBING_FORMAT", module.PLUMBING_FORMAT + 1)
    assert digest(project).digest != before.digest


def test_plumbing_names_exist_and_hide_nothing_of_the_method() -> None:
    root = Path(module.__file__).parents[1]
    for name in module.PLUMBING:
        path = root.joinpath(*name.split("."))
        assert path.is_dir() or path.with_suffix(".py").is_file(), name
    counted = ("rso.losses", "rso.rejection", "rso.models", "schemas", "schemas.pairs", "rso.seeds")
    assert not any(is_plumbing(name) for name in counted)


def test_store_modules_import_only_plumbing_schemas_and_models() -> None:
    # What plumbing imports is not followed, so nothing that computes may be reached through it.
    root = Path(module.__file__).parents[1]
    project = module._Project(root, module.PACKAGES)
    names = ("artifact", "work", "manifest", "files", "lock", "parquet", "content_digest")
    for name in names:
        found = project.find(f"rso.{name}")
        assert found is not None
        for imported in project.imports(found) - {"rso", "rso.models"}:
            assert is_plumbing(imported) or imported.split(".")[0] == "schemas", (name, imported)


SOURCE = '''
"""Doc."""
from __future__ import annotations
import a.b as c, d
from . import e
X: int = -1_000 if d else +2j
class K(c.B, metaclass=M):
    """Doc."""
    y: str = 'é\\ud800' "z"
@c.deco(1, *a, k=2, **b)
async def f(p, /, q=1.5e300, *r, s: int | None = None, **t) -> None:
    """Doc."""
    async with g() as h, i: await j
    async for k in l: yield k
    return_ = [m async for m in n if m if not m]
def g(x):
    global X
    while x < 1 <= 2 != 3: x += 1; continue
    else: pass
    try: del x[1:2, ::3], x.y
    except* (A, B) as e: raise C from e
    finally: assert x, f"a{x!r:>{w}.2f}b{y=}{{}}" f"c" "d" f"{z:}"
    match x:
        case {"k": 1, **rest} | [1, *_] | K(a=1) if rest: return lambda *a, k=1: (yield)
        case None | True | -1: nonlocal_ = {**a, 'b': {*c}, **{d: e for d in f}}
        case _: print(x := 1, b"\\x00", ..., None)
'''
SYNTAX = "34037a80b94ec939973bf07256200b2f5766477b7883308c9f34b697572c14f7"


def test_syntax_digest_is_what_it_was() -> None:
    # Written down once: a change here reruns every stage of every store.
    assert syntax_digest(SOURCE) == SYNTAX


@pytest.mark.parametrize("version", ["3.12", "3.13", "3.14"])
def test_syntax_digest_does_not_depend_on_the_python_version(version: str, tmp_path: Path) -> None:
    python = shutil.which(f"python{version}")
    if python is None or subprocess.run([python, "-V"], capture_output=True).returncode:
        pytest.skip(f"no python{version} here")
    (tmp_path / "source.py").write_text(SOURCE, encoding="utf-8")
    text = (
        "import sys; sys.path.insert(0, sys.argv[1]); from rso.code_digest import syntax_digest; "
        "print(syntax_digest(open(sys.argv[2], encoding='utf-8').read()))"
    )
    root = str(Path(module.__file__).parents[1])
    command = [python, "-B", "-c", text, root, str(tmp_path / "source.py")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert printed.strip() == SYNTAX


def test_syntax_digest_unknown_empty_fields_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    before = syntax_digest("def f(): return 1")
    # As Python 3.12 did with `type_params`.
    monkeypatch.setattr(ast.FunctionDef, "_fields", (*ast.FunctionDef._fields, "later"))
    monkeypatch.setattr(ast.FunctionDef, "later", [], raising=False)
    assert syntax_digest("def f(): return 1") == before


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("x = 1", "x = 1.0"),
        ("x = 1", "x = True"),
        ("x = '1'", "x = b'1'"),
        ("x = None", "x = ..."),
        ("x = -0.0", "x = 0.0"),
        ("a < b", "a <= b"),
        ("def f(a, b): 1 + 1", "def f(a, *, b): 1 + 1"),
        ("def f(): return", "def f(): yield"),
        ("f'{x}'", "f'{x!r}'"),
        ("f'{x}'", "'{x}'"),
        ("x[1:]", "x[:1]"),
        ("{**a}", "{None: a}"),
        ("a; b", "b; a"),
        ("if a: b\nc", "if a:\n  b\n  c"),
    ],
)
def test_syntax_digest_differs_where_the_meaning_does(first: str, second: str) -> None:
    assert syntax_digest(first) != syntax_digest(second)


def test_classes_of_settings_hold_values_and_validators_alone() -> None:
    """The digest leaves `rso.config` out: a method there could change artifacts, and no digest."""
    path = Path(config.__file__)
    classes = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef)]
    functions = [
        (c.name, part)
        for c in classes
        for part in ast.walk(c)
        if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    ]
    assert len(classes) > 20
    assert functions
    for name, function in functions:
        decorators = [ast.unparse(d) for d in getattr(function, "decorator_list", [])]
        is_validator = any(d.startswith(("field_validator", "model_validator")) for d in decorators)
        assert is_validator, f"{name}: {ast.unparse(function)}"
