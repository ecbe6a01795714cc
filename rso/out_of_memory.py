"""A batch that does not fit in memory is halved, once, with a warning."""

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from rso.errors import UserError

logger = logging.getLogger(__name__)
_T = TypeVar("_T")


class BatchSize:
    """The size of a batch; it is halved for good the first time that memory runs out.

    Args:
        unit: what `size` counts, e.g. `tokens`.
        what: the part that computes; the first words of the warning and the error.
        advice: how to make the work smaller, for the error when half a batch does not fit.
    """

    def __init__(self, size: int, unit: str, *, what: str, advice: str) -> None:
        self.size, self._is_halved = size, False
        self._unit, self._what, self._advice = unit, what, advice

    def attempt(self, run: Callable[[int], _T], most: int | None = None) -> _T:
        """Return `run(size)`; if memory runs out, halve the size and try again.

        `most` is the number of units that there are. If it is below `size`, the first batch has
        `most` units, and half of `most` is tried next.

        Raises:
            UserError: memory ran out after the size was halved, now or in another call.
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
        # Try again outside the handler: its traceback holds the tensors that did not fit.
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
    """Return whether memory ran out, on a GPU or on the CPU, for which torch has no error type."""
    is_cpus = "DefaultCPUAllocator: can't allocate memory" in str(error)
    return is_cpus or isinstance(error, torch.OutOfMemoryError | MemoryError)
