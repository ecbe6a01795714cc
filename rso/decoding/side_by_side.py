"""Waves decoded side by side: one thread per wave, with its share of the processors."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from rso.decoding import Progress

_T = TypeVar("_T")


def side_by_side(work: Callable[[_T], None], items: Sequence[_T], num_workers: int) -> None:
    """Call `work` with each item, in inference mode, up to `num_workers` at a time.

    The workers share the threads of torch equally. After an error no further item begins. When the
    running ones have ended, the error is raised; of several errors, that of the earliest item.
    """
    num_workers = min(num_workers, len(items))
    if num_workers < 2:
        with torch.inference_mode():
            for item in items:
                work(item)
        return
    num_threads, failed = torch.get_num_threads(), threading.Event()

    def run(item: _T) -> None:
        # Both settings belong to the thread, so each worker makes them.
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
    """Passes the reports of several waves on to one `progress`, one at a time."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress, self._lock = progress, threading.Lock()

    @contextmanager
    def taken_back_if_it_fails(self) -> Iterator[Progress]:
        """Give the `report` of one wave; if the wave fails, all its reports are subtracted again.

        A failed wave may be decoded again, and then reports the same responses a second time.
        """
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
