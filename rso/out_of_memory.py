"""What happens where a batch does not fit: half of it is tried, once, and said so."""

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from rso.errors import UserError

logger = logging.getLogger(__name__)
T = TypeVar("T")


class BatchSize:
    """The size of a batch, halved for good the first time that memory runs out.

    Args:
        unit: what is counted, e.g. `tokens`.
        what: who computes, first words of the warning and the error.
        advice: what makes the work smaller where half a batch does not fit either.
    """

    def __init__(self, size: int, unit: str, *, what: str, advice: str) -> None:
        self.size, self._is_halved = size, False
        self._unit, self._what, self._advice = unit, what, advice

    def attempt(self, run: Callable[[int], T], most: int | None = None) -> T:
        """Return `run(size)`, of half the size where memory runs out.

        `most` is what there is to do: a batch that had less than `size` is halved itself.

        Raises:
            UserError: memory ran out with half the size too.
        """
        size = self.size if most is None else min(self.size, most)
        try:
            return run(size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).strip().splitlines()[0]
            if self._is_halved:
                raise UserError(
                    f"{self._what}: memory ran out in batches of {size} {self._unit}, half of "
                    f"what was tried first ({reason}); {self._advice}."
                ) from error
        # Out of the handler, whose traceback holds the tensors that did not fit.
        self.size, self._is_halved = max(1, size // 2), True
        logger.warning(
            "%s: memory ran out (%s); going on in batches of %d %s, half as many",
            self._what,
            reason,
            self.size,
            self._unit,
        )
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return self.attempt(run, most)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether memory ran out, on a GPU or (torch has no type for it) on the CPU."""
    is_cpus = "DefaultCPUAllocator: can't allocate memory" in str(error)
    return is_cpus or isinstance(error, torch.OutOfMemoryError | MemoryError)
