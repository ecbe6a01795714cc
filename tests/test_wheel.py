"""The built wheel works alone: command, schemas, the report's template and style, types."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import processes
import pytest
import system

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the tracked files, so that nothing else can get into it."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.check_output(["git", "ls-files", "-z"], cwd=processes.ROOT, text=True)
    for name in filter(None, listed.split("\0")):
        if (processes.ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((processes.ROOT / name).read_bytes())
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(built), str(source)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-qq", *options], check=True)
    (found,) = built.glob("*.whl")
    return found


def test_wheel_says_of_every_package_that_it_is_typed(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    packages = {name.split("/")[0] for name in names if name.endswith("/__init__.py")}
    assert packages == {"rso", "schemas", "pipelines", "stages"}
    assert {f"{package}/py.typed" for package in packages} <= set(names)


def test_wheel_runs_a_whole_run_without_the_repository(
    wheel: Path, tiny_run: system.Run, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    options = ["-qq", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options], check=True)
    environment = {
        **os.environ,
        "PYTHONPATH": str(site),
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }

    def run(*command: str) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = "import rso, schemas, pipelines, stages, flows as f; print(rso.__file__, f.__file__)"
    assert all(str(site) in path for path in run(sys.executable, "-c", where).split())
    rso = str(site / "bin" / "rso")
    assert "Usage" in run(rso, "--help")
    run(rso, "run", str(tiny_run.path), "--set", f"store={tmp_path / 'store'}")
    (page,) = (tmp_path / "store" / "report").glob("*/report/report.html")
    assert "<style" in page.read_text(encoding="utf-8")
