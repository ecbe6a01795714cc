"""Keep freed memory in the process instead of handing it back to the kernel at every step.

Tensors of some megabytes come and go thousands of times a step. By default glibc returns each to
the kernel and faults it in again, page by page, which on virtual machines costs more than the
mathematics: a training step of SmolLM2-135M (16 rows of 71 tokens, bf16 autocast, 2 cores) took
6.3 to 16 s by default and 2.6 to 3.7 s with these settings, one of 32 rows 22 s and 7 s.
"""

import ctypes
import sys

from rso.config import has_gpu

# malloc.h of glibc. Large blocks come from the heap, not from mmap, which would give each back; one
# arena, since those of other threads (autograd's) unmap themselves when they run empty.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_SETTINGS = {_TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 2**28, _MMAP_MAX: 0, _ARENA_MAX: 1}


def keep_freed_memory(device: str = "cpu") -> bool:
    """Tell malloc to keep what is freed; return whether it agreed (False off glibc).

    Where tensors lie on a GPU nothing is done: in one arena a tokenizer's threads wait for one
    another (docs/lab-notes.md).
    """
    if device != "cpu" and has_gpu():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and all(mallopt(name, value) for name, value in _SETTINGS.items())
