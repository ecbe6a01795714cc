"""Waves decoded side by side: a thread each, with its share of the processors."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from rso.decoding import Progress

T = TypeVar("T")


def side_by_side(work: Callable[[T], None], items: Sequence[T], num_workers: int) -> None:
    """Call `work` with each item, in inference mode, up to `num_workers` at a time.

    The processors that torch uses are shared out among the workers. The first error is raised once
    those at work have ended; what has not begun is left.
    """
    num_workers = min(num_workers, len(items))
    if num_workers < 2:
        with torch.inference_mode():
            for item in items:
                work(item)
        return
    num_threads, failed = torch.get_num_threads(), threading.Event()

    def run(item: T) -> None:
        # both are settings of the thread
        torch.set_num_threads(max(1, num_threads // num_workers))
        with torch.inference_mode():
            if not failed.is_set():
                try:
                    work(item)
                except BaseException:
                    failed.set()
                    raise

    try:
        with ThreadPoolExecutor(num_workers) as workers:
            for done in [workers.submit(run, item) for item in items]:
                done.result()
    finally:
        torch.set_num_threads(num_threads)


class Total:
    """What several waves report as done, to one `progress`."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress, self._lock = progress, threading.Lock()

    @contextmanager
    def taken_back_if_it_fails(self) -> Iterator[Progress]:
        """What one wave reports, less all of it when the wave fails and is done again."""
        reported = 0

        def report(count: int) -> None:
            nonlocal reported
            reported += count
            if self._progress is not None:
                with self._lock:
                    self._progress(count)

        try:
            yield report
        except BaseException:
            report(-reported)
            raise
