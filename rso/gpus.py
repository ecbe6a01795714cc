"""A GPU for each worker process of this machine, so that no engine is loaded beside another."""

import ctypes
import fcntl
import functools
import itertools
import os
import platform
import re
import tempfile

from rso.errors import UserError

# In a worker's environment: how many workers this machine has.
WORKERS = "RSO_WORKERS"
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_NAME = re.compile(r"\d+|(GPU|MIG)-.+")


def device_of_worker(device: str) -> str:
    """Return where this process puts a model: a worker's own GPU for auto and cuda, else `device`.

    Raises:
        UserError: no GPU is left for this worker, or its GPU does not work.
    """
    import torch

    is_shared_out = device == "cuda" or (device == "auto" and torch.version.cuda is not None)
    gpu = claim_gpu() if is_shared_out else None
    if gpu is None:
        return device
    try:
        torch.zeros(1, device="cuda")
    except (AssertionError, RuntimeError) as error:
        raise UserError(
            f"GPU {gpu} of {platform.node()}, which this worker claimed, cannot be used "
            f"({str(error).splitlines()[0]}); leave it out of {_VISIBLE} and set beam.num_workers "
            "to the number of the others, or set compute.device=cpu."
        ) from error
    return "cuda"


@functools.cache
def claim_gpu() -> str | None:
    """Claim a GPU for this worker until its process ends, and make it the only one CUDA sees.

    Returns its name in CUDA_VISIBLE_DEVICES; None where nothing is shared out: without GPUs, and in
    a process that is not one of several workers.

    Raises:
        UserError: there are more workers than GPUs, or other runs hold them.
    """
    num_workers = int(os.environ.get(WORKERS, "1"))
    gpus = visible_gpus() if num_workers > 1 else []
    if not gpus:
        return None
    where = f"{len(gpus)} GPU{'s' * (len(gpus) > 1)} ({', '.join(gpus)}) of {platform.node()}"
    if num_workers > len(gpus):
        raise UserError(
            f"beam.num_workers is {num_workers}, and each worker needs one of the {where} to "
            f"itself; set beam.num_workers={len(gpus)}, or compute.device=cpu."
        )
    # Too late, it would see them all and take the first.
    assert not _is_cuda_initialised(), (
        "a worker initialised CUDA before it claimed a GPU; where NVML is missing, counting GPUs "
        f"does that: set {_VISIBLE}"
    )
    for gpu in gpus:
        if _hold(gpu):
            os.environ[_VISIBLE] = gpu
            return gpu
    raise UserError(
        f"workers of other runs hold the {where}; wait for them, or give each run GPUs of its own "
        f"by {_VISIBLE}."
    )


def visible_gpus() -> list[str]:
    """Return the GPUs that CUDA would show this process, by their names in CUDA_VISIBLE_DEVICES."""
    given = os.environ.get(_VISIBLE)
    if given is None:
        import torch

        # By NVML, without initialising CUDA.
        return [str(index) for index in range(torch.cuda.device_count())]
    # As CUDA reads it: what is no name, such as -1, hides all after it.
    return list(itertools.takewhile(_NAME.fullmatch, map(str.strip, given.split(","))))


def _is_cuda_initialised() -> bool:
    """Whether this process has its list of GPUs already; asks the driver, as torch may not know."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return bool(driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) == 0)


def _hold(gpu: str) -> bool:
    """Lock the file of a GPU unless another process has; the kernel unlocks it for the dead."""
    # Jobs of a cluster may call different cards by the same number, and share none.
    job = os.environ.get("SLURM_JOB_ID", "alone")
    folder = os.path.join(tempfile.gettempdir(), f"rso-gpus-{os.getuid()}-{platform.node()}-{job}")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    # Never closed: held as long as the process is there.
    lock = os.open(os.path.join(folder, gpu.replace("/", "-")), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return False
    return True
