"""Progress bars for work of more than two seconds, quiet when nobody looks at a terminal."""

import os
import sys
import time
from types import TracebackType
from typing import Any

QUIET_SECONDS = 2.0
# In the environment of a worker of a pipeline: its number.
WORKER = "RSO_WORKER"


def is_first_process() -> bool:
    """Whether this process is alone, or the first of those that work together."""
    return os.environ.get("RANK", "0") == os.environ.get(WORKER, "0") == "0"


class progress:
    """A bar with rate and time left for `total` units; it shows once two seconds have passed.

    `done` counts the units so far.
    """

    def __init__(self, what: str, *, total: int, unit: str) -> None:
        self._what, self._total, self._unit = what, total, unit
        self.done = 0
        self._started = time.monotonic()
        self._bar: Any = None
        # Of several processes the first one alone: of a training it shows what all of them do.
        self._is_seen = sys.stderr.isatty() and is_first_process()

    def advance(self, count: int = 1) -> None:
        """Count `count` more units as done and redraw."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._is_seen and time.monotonic() - self._started > QUIET_SECONDS:
            from tqdm import tqdm

            self._bar = tqdm(
                total=self._total,
                desc=self._what,
                unit=f" {self._unit}",
                dynamic_ncols=True,
                leave=False,
            )
            self._bar.start_t -= time.monotonic() - self._started
            self._bar.update(self.done)

    def note(self, **figures: float) -> None:
        """Show figures such as the loss beside the bar."""
        if self._bar is not None:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in figures.items()})

    def __enter__(self) -> "progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
