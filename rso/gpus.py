"""One GPU per worker process of this machine, so that no two workers load models on one GPU."""

import ctypes
import fcntl
import functools
import itertools
import os
import platform
import re
import tempfile

from rso.errors import UserError

# Environment variable of a worker: the number of workers on this machine.
WORKERS = "RSO_WORKERS"
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_NAME = re.compile(r"\d+|(GPU|MIG)-.+")


def device_of_worker(device: str) -> str:
    """Return the device for this process's models.

    For `auto` and `cuda`, one of several workers claims a GPU for itself, and `cuda` is returned.
    In all other cases `device` is returned.

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
    """Claim a GPU for this worker until its process ends, and make it the only one that CUDA sees.

    Returns the GPU's name in CUDA_VISIBLE_DEVICES. Returns None without GPUs, and in a process that
    is not one of several workers.

    Raises:
        UserError: there are more workers than GPUs, or other runs hold all GPUs.
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
    # CUDA reads the variable once, when it is initialised. After that, a claim has no effect: the
    # worker would see all GPUs and use the first.
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
    """Return the GPUs that CUDA shows this process, by their names in CUDA_VISIBLE_DEVICES."""
    given = os.environ.get(_VISIBLE)
    if given is None:
        import torch

        # torch counts by NVML, without initialising CUDA.
        return [str(index) for index in range(torch.cuda.device_count())]
    # Like CUDA, stop at the first entry that is not a device name, for example -1.
    return list(itertools.takewhile(_NAME.fullmatch, map(str.strip, given.split(","))))


def _is_cuda_initialised() -> bool:
    """Whether CUDA has read its list of GPUs; asks the driver, because torch may not know."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return bool(driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) == 0)


def _hold(gpu: str) -> bool:
    """Lock the file of a GPU; return False if another process holds it.

    The kernel releases the lock when the process ends.
    """
    # Two Slurm jobs share no GPU but may use the same number for different GPUs. So each job has
    # its own folder.
    job = os.environ.get("SLURM_JOB_ID", "alone")
    folder = os.path.join(tempfile.gettempdir(), f"rso-gpus-{os.getuid()}-{platform.node()}-{job}")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    # Never closed, so the process holds the lock until it ends.
    lock = os.open(os.path.join(folder, gpu.replace("/", "-")), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return False
    return True
