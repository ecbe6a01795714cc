"""The hardware and speed of this machine, measured in a short-lived process.

`python -m stages.machine DTYPE DEVICE SECONDS` prints them as JSON. This process sees the threads
and the GPU that a stage will see. So the process that starts a run need not load torch.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from rso.parent import die_with

# The size of matrix products in a small model. Larger products reach rates that it never reaches.
ROWS, WIDTH = 256, 512
# A CPU with bfloat16 trains and prefills a small model at most this many times as fast as in
# float32, even if it multiplies large matrices much faster (docs/lab-notes.md).
MOST_BY_BFLOAT16 = 3.0
PATIENCE_SECONDS = 120.0


@dataclass(frozen=True)
class Machine:
    """The threads of torch, the name of the GPU if there is one, and FLOP/s in matrix products.

    `flops` is for the CPU. It is None with a GPU, and if nothing was measured.
    """

    threads: int
    gpu: str | None
    flops: float | None


def measure(dtype: str, device: str, *, seconds: float) -> Machine | None:
    """Return the machine, or None if the measuring process fails.

    `seconds` is the time spent on multiplying matrices; 0 measures nothing.
    """
    command = [sys.executable, "-m", "stages.machine", dtype, device, str(seconds)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            preexec_fn=partial(die_with, os.getpid()),
            check=True,
        )
        return Machine(**json.loads(done.stdout.splitlines()[-1]))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError, TypeError):
        return None


def main(dtype: str, device: str, seconds: float) -> None:
    """Print the machine as one line of JSON."""
    import torch

    gpu = None
    if device != "cpu" and torch.cuda.is_available():
        gpu = torch.cuda.get_device_name(device if device.startswith("cuda") else None)
    flops = None
    if gpu is None and seconds > 0:
        flops = _flops(torch, torch.float32, seconds / 2)
        if dtype == "bfloat16":
            flops = min(_flops(torch, torch.bfloat16, seconds / 2), MOST_BY_BFLOAT16 * flops)
    print(json.dumps(asdict(Machine(torch.get_num_threads(), gpu, flops))))


def _flops(torch: Any, dtype: Any, seconds: float) -> float:
    left, right = (torch.ones(shape, dtype=dtype) for shape in ((ROWS, WIDTH), (WIDTH, WIDTH)))
    left @ right
    started, products = time.perf_counter(), 0
    while (taken := time.perf_counter() - started) < seconds:
        left @ right
        products += 1
    return 2 * ROWS * WIDTH * WIDTH * products / taken


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
