"""The sides of a benchmark, which take turns: each side is a process that keeps its model loaded.

So a change of the machine's speed affects all sides alike, and sides share no memory or threads. A
side is this interpreter running the benchmark's file with `--worker NAME`. It writes `ready` when
its model is loaded, and only then does the next side start. After that it answers every line on its
standard input with one line of JSON. Output of libraries goes to standard error.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

Figures = dict[str, float]

held: dict[str, Any] = {}
"""Loaded objects for a side's pipeline. Beam pickles its functions but refers to this by name."""


def take_turns(
    commands: Mapping[str, Sequence[str]],
    rounds: int,
    *,
    what: str,
    replicas: Mapping[str, int] | None = None,
) -> dict[str, list[Figures]]:
    """Start the sides, let each answer in turn, `rounds` times, and return the answers by side.

    `replicas` gives the number of processes of a side, by default 1. They share the cores and work
    at the same time. Their turn ends when the last of them ends, and their figures are summed.

    Raises:
        SystemExit: a process of a side ended.
    """
    sides = {
        side: _start(side, command, (replicas or {}).get(side, 1))
        for side, command in commands.items()
    }
    answers: dict[str, list[Figures]] = {side: [] for side in sides}
    for number in range(1, rounds + 1):
        for side, processes in sides.items():
            answers[side].append(_turn(side, processes))
            seconds = answers[side][-1]["seconds"]
            print(
                f"\r{what}: {number} of {rounds}, {side} {seconds:.1f} s   ",
                end="",
                file=sys.stderr,
                flush=True,
            )
    print(file=sys.stderr)
    for processes in sides.values():
        for process in processes:
            process.communicate("", timeout=600)
    return answers


def _start(side: str, command: Sequence[str], count: int) -> "list[subprocess.Popen[str]]":
    print(f"\rstarting {side}    ", end="", file=sys.stderr, flush=True)
    environment = dict(os.environ)
    if count > 1:
        # Each process gets a share of the cores, as in `pipelines.worker`.
        num_threads = max(1, len(os.sched_getaffinity(0)) // count)
        environment["OMP_NUM_THREADS"] = str(num_threads)
    processes = []
    for _ in range(count):
        process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        _answer(side, process)
        processes.append(process)
    return processes


def _turn(side: str, processes: "Sequence[subprocess.Popen[str]]") -> Figures:
    started = time.perf_counter()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    found: list[Figures] = [json.loads(_answer(side, process)) for process in processes]
    if len(found) == 1:
        return found[0]
    total = {name: sum(answer[name] for answer in found) for name in found[0]}
    return {**total, "seconds": time.perf_counter() - started}


def _answer(side: str, process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"{side} ended with {process.wait()}; its own output says why")
    return line


class Turns:
    """The turns of a side, for the side's process: wait for a turn, and answer with its figures."""

    def __init__(self, *, on_gpu: bool = False) -> None:
        self._answers, self._on_gpu = os.fdopen(os.dup(1), "w"), on_gpu
        os.dup2(2, 1)
        self._is_ready = False
        self._started = self._cpu = 0.0

    def begin(self) -> bool:
        """Wait for the next turn and start the clock; return False if there are no more turns."""
        if not self._is_ready:
            self._write("ready")
            self._is_ready = True
        is_turn = bool(sys.stdin.readline())
        self._cpu, self._started = time.process_time(), time.perf_counter()
        return is_turn

    def end(self, **figures: float) -> None:
        """Answer with `figures`, the seconds and CPU seconds, and the peak memory so far, bytes."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self._on_gpu:
            import torch

            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        seconds = time.perf_counter() - self._started
        cpu = time.process_time() - self._cpu
        answer = {**figures, "seconds": seconds, "cpu_seconds": cpu, "peak": peak}
        if self._on_gpu:
            # The other sides share the GPU and need the memory for their turns.
            torch.cuda.empty_cache()
        self._write(json.dumps(answer))

    def _write(self, line: str) -> None:
        self._answers.write(f"{line}\n")
        self._answers.flush()


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Return the text "median (lowest to highest)"."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def machine(packages: Sequence[str], device: str = "cpu") -> str:
    """Return the hardware and the versions of Python and `packages`, in one line."""
    import torch

    if device == "cuda":
        hardware = torch.cuda.get_device_name()
    else:
        hardware = f"{torch.get_num_threads()} threads on {os.cpu_count()} cores of {_processor()}"
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{hardware}; Python {platform.python_version()}, {versions}"


def _processor() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
        else:
            name = platform.machine()
    with open("/proc/cpuinfo", encoding="utf-8") as text:
        flags = text.read().split()
    kinds = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags]
    return f"{name} ({', '.join(kinds) or 'no bfloat16'})"
