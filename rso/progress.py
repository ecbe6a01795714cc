"""Progress of long work: a bar in a terminal, elsewhere one line per minute."""

import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

QUIET_SECONDS = 2.0
SECONDS_BETWEEN_LINES = 60.0
# Environment variable with the number of a pipeline worker, from 0.
WORKER = "RSO_WORKER"


class _Named:
    """The bars of one name in this process: their number, and the seconds since their last line."""

    def __init__(self) -> None:
        self.count, self.silent = 0, 0.0


# Each shard has its own bar. Together, many short shards must still print one line per minute.
_named: defaultdict[str, _Named] = defaultdict(_Named)


def is_first_process() -> bool:
    """Whether this process works alone, or is the first of several that work together."""
    return os.environ.get("RANK", "0") == os.environ.get(WORKER, "0") == "0"


def duration(seconds: float) -> str:
    """Return a time in words: `45 s`, `3 min 12 s` or `1 h 04 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


class progress:
    """Shows how many of `total` units are done, and the time left; `done` counts the units so far.

    In a terminal it shows a bar after two seconds. Elsewhere it prints one line per minute to
    standard error. Only the first of several processes shows anything. In training its figures
    cover all processes. `clock` returns seconds.
    """

    def __init__(
        self, what: str, *, total: int, unit: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._what, self._total, self._unit, self._clock = what, total, unit, clock
        self.done = 0
        self._started = clock()
        self._bar: Any = None
        self._figures: dict[str, float] = {}
        self._is_shown, self._has_terminal = is_first_process(), sys.stderr.isatty()
        # The rate counts from the first `advance`, which may report work of an interrupted run.
        self._first: tuple[float, int] | None = None
        self._named = _named[what]
        self._named.count += 1
        self._last_line = self._started - self._named.silent

    def advance(self, count: int = 1) -> None:
        """Count `count` more units as done, and show the progress."""
        self.done += count
        if self._is_shown and self._has_terminal:
            self._draw(count)
        elif self._is_shown:
            self._say()

    def note(self, **figures: float) -> None:
        """Show figures, such as the loss, beside the bar or in the next line."""
        self._figures = dict(figures)
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
        self._named.silent = self._clock() - self._last_line
        if self._bar is not None:
            self._bar.close()

    def _draw(self, count: int) -> None:
        if self._bar is not None:
            self._bar.update(count)
        elif self._clock() - self._started > QUIET_SECONDS:
            from tqdm import tqdm

            self._bar = tqdm(
                total=self._total,
                desc=self._what,
                unit=f" {self._unit}",
                dynamic_ncols=True,
                leave=False,
            )
            self._bar.start_t -= self._clock() - self._started
            self._bar.update(self.done)

    def _say(self) -> None:
        now = self._clock()
        if self._first is None:
            self._first = (now, self.done)
        if now - self._last_line < SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        started, done_then = self._first
        left = None
        if self.done > done_then:
            rest = max(0, self._total - self.done)
            left = rest * (now - started) / (self.done - done_then)
        part = f", part {self._named.count}" if self._named.count > 1 else ""
        amount = f"{self.done:,} of {self._total:,} {self._unit}"
        line = progress_line(
            f"{self._what}{part}", amount, now - self._started, left, self._figures
        )
        print(line, file=sys.stderr, flush=True)


def progress_line(
    what: str, amount: str, seconds: float, left: float | None, figures: Mapping[str, float]
) -> str:
    """Return one line of progress; `seconds` is the time so far, `left` that to come, if known."""
    parts = [f"{what}: {amount}", duration(seconds)]
    if left is not None:
        parts.append(f"about {duration(left)} left")
    return ", ".join([*parts, *(f"{name} {value:.3g}" for name, value in figures.items())])
