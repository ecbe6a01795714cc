"""Keep freed memory in the process instead of returning it to the kernel at every step.

Tensors of some megabytes are allocated and freed thousands of times per step. By default glibc
returns each to the kernel and then faults new memory in, page by page. On virtual machines this
costs more than the mathematics. A training step of SmolLM2-135M (16 rows of 71 tokens, bf16
autocast, 2 cores) took 6.3 to 16 s by default and 2.6 to 3.7 s with these settings. A step of 32
rows took 22 s and 7 s.
"""

import ctypes
import sys

from rso.config import has_gpu

# From glibc's malloc.h. Take large blocks from the heap: a block from mmap returns to the kernel
# when it is freed. Use one arena: those of other threads (autograd's) unmap themselves when empty.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_SETTINGS = {_TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 2**28, _MMAP_MAX: 0, _ARENA_MAX: 1}


def keep_freed_memory(device: str = "cpu") -> bool:
    """Tell malloc to keep freed memory; return whether it accepted (False without glibc).

    If tensors may lie on a GPU, nothing is done and False is returned: with one arena, a
    tokenizer's threads wait for one another (docs/lab-notes.md).
    """
    if device != "cpu" and has_gpu():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and all(mallopt(name, value) for name, value in _SETTINGS.items())
