"""Progress bars for work of more than two seconds, quiet when nobody looks at a terminal."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

QUIET_SECONDS = 2.0


class Bar:
    """A progress bar with rate and time left; it appears once the work has lasted two seconds."""

    def __init__(self, what: str, total: int, unit: str) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._done = 0
        self._started = time.monotonic()
        self._bar: object | None = None

    def advance(self, count: int = 1) -> None:
        """Count `count` more units as done and redraw."""
        self._done += count
        if not sys.stderr.isatty() or time.monotonic() - self._started < QUIET_SECONDS:
            return
        from tqdm import tqdm

        if not isinstance(self._bar, tqdm):
            self._bar = tqdm(
                total=self._total,
                desc=self._what,
                unit=f" {self._unit}",
                initial=0,
                dynamic_ncols=True,
                leave=False,
            )
            self._bar.start_t -= time.monotonic() - self._started
            self._bar.update(self._done)
        else:
            self._bar.update(count)

    def note(self, **figures: float) -> None:
        """Show figures such as the loss beside the bar."""
        from tqdm import tqdm

        if isinstance(self._bar, tqdm):
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in figures.items()})

    def __enter__(self) -> "Bar":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        close = getattr(self._bar, "close", None)
        if close is not None:
            close()


@contextmanager
def progress(what: str, *, total: int, unit: str) -> Iterator[Bar]:
    """Yield a `Bar` for `total` units of work."""
    with Bar(what, total, unit) as bar:
        yield bar
