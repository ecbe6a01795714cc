"""Locks that end with their holder: one run builds an artifact, the others wait.

On a disk the lock is `flock`. On an object store it is a lease: numbered objects that can be
created only once (the number is the fencing token), and a heartbeat object that the holder
rewrites. A waiter takes over when its own clock has counted the length of the lease without a new
heartbeat. A holder checks before it writes: it stops if another run took over or if it could not
renew the lease in time.
"""

import fcntl
import json
import logging
import os
import platform
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rso.files import Files, writing

logger = logging.getLogger(__name__)

_POLL_SECONDS = 1.0
_held: "weakref.WeakSet[_Held]" = weakref.WeakSet()


class LockLost(RuntimeError):
    """The lease was not renewed in time or another run took it over; that run's result counts."""


class _Held:
    """An open lock file. A child made by `fork` closes its copy, which would hold the lock too."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        _held.add(self)


def _close_in_child() -> None:
    for held in list(_held):
        with suppress(OSError):
            os.close(held.descriptor)


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def file_lock(path: str, what: str) -> Iterator[None]:
    """Hold the lock file at `path`, after waiting for another holder; the wait is logged once."""
    with writing(os.path.dirname(path)):
        os.makedirs(os.path.dirname(path), exist_ok=True)
    held = _acquire(path, what)
    try:
        yield
    finally:
        # Remove it while it is locked: a waiter then sees that its open file is gone, and retries.
        with suppress(OSError):
            os.remove(path)
        _held.discard(held)
        os.close(held.descriptor)


def is_locked(path: str) -> bool:
    """Say whether a process holds the lock file at `path`."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextmanager
def private_directory(parent: str) -> Iterator[str]:
    """Make a directory below `parent` for this run only, and remove it at the end.

    The directories of killed runs below `parent` are removed first.
    """
    with writing(parent):
        os.makedirs(parent, exist_ok=True)
    for name in {entry.removesuffix(".lock") for entry in os.listdir(parent)}:
        if not is_locked(os.path.join(parent, f"{name}.lock")):
            shutil.rmtree(os.path.join(parent, name), ignore_errors=True)
            with suppress(FileNotFoundError):
                os.remove(os.path.join(parent, f"{name}.lock"))
    path = os.path.join(parent, os.urandom(8).hex())
    with file_lock(f"{path}.lock", path):
        os.makedirs(path)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


def _acquire(path: str, what: str) -> _Held:
    waited = False
    while True:
        with writing(os.path.dirname(path)):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not waited:
                    logger.warning("%s: another run is making it; waiting for its result", what)
                waited = True
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_at(descriptor, path):
                return _Held(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_at(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


class Lease:
    """A held lease on a directory of a remote store."""

    def __init__(self, files: Files, directory: str, token: int, holder: str, seconds: float):
        self._files, self._directory = files, directory
        self._token, self._holder, self._seconds = token, holder, seconds
        self._renewed = time.monotonic()
        self._beats = 0
        self._lost = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise `LockLost` unless the lease is held; the store is not asked, see `confirm`."""
        # Half the length of the lease: the holder must stop before a waiter, whose clock differs,
        # takes over.
        if self._lost or time.monotonic() - self._renewed > self._seconds / 2:
            raise LockLost(
                f"{self._files.url(self._directory)}: the lease was not renewed in "
                f"{self._seconds / 2:.0f} seconds or another run took it over; this run gives up, "
                "run it again to take the other's result."
            )

    def confirm(self) -> None:
        """Ask the store, and raise `LockLost` unless the lease is held."""
        self.check()
        self._renew()
        self.check()

    def release(self) -> None:
        """End the heartbeat and give the lease back."""
        self._stop.set()
        self._thread.join()
        if not self._lost and _top(self._files, self._directory) == (self._token, self._holder):
            # Remove this run's token last: while it exists, nobody can start again at token 1.
            names = sorted(self._files.children(self._directory), reverse=True)
            own = f"{self._token:08d}.json"
            for name in [n for n in names if n != own] + [own]:
                self._files.remove(f"{self._directory}/{name}")

    def _beat(self) -> None:
        while not self._stop.wait(self._seconds / 8):
            try:
                self._renew()
            except Exception as error:
                # The store may recover. `check` measures the time after the last renewal.
                logger.warning("lease %s: not renewed (%s)", self._directory, error)
            if self._lost:
                return

    def _renew(self) -> None:
        started = time.monotonic()
        if _top(self._files, self._directory) != (self._token, self._holder):
            self._lost = True
            return
        self._beats += 1
        beat = f"{self._directory}/{self._token:08d}.{self._holder}.beat"
        self._files.write(beat, str(self._beats).encode())
        self._renewed = started


@contextmanager
def lease(files: Files, directory: str, what: str, seconds: float) -> Iterator[Lease]:
    """Hold the lease in `directory`, after waiting for another holder; the wait is logged once."""
    held = _wait_for_lease(files, directory, what, seconds, time.monotonic)
    try:
        yield held
    finally:
        held.release()


def is_leased(files: Files, directory: str) -> bool:
    """Say whether a run holds the lease in `directory`, or held it when it was killed."""
    return _top(files, directory)[0] > 0


def _wait_for_lease(
    files: Files, directory: str, what: str, seconds: float, clock: Callable[[], float]
) -> Lease:
    holder = os.urandom(8).hex()
    content = {"holder": holder, "host": platform.node(), "pid": os.getpid()}
    seen: object = None
    since = clock()
    waited = False
    while True:
        state = _state(files, directory)
        if state != seen:
            seen, since = state, clock()
        token = state[0]
        if token == 0 or clock() - since > seconds:
            path = f"{directory}/{token + 1:08d}.json"
            if files.create(path, json.dumps(content).encode()):
                if token:
                    logger.warning(
                        "%s: its run gave no sign for %.0f s; taking over", what, seconds
                    )
                return Lease(files, directory, token + 1, holder, seconds)
            continue
        if not waited:
            logger.warning("%s: another run is making it; waiting for its result", what)
        waited = True
        time.sleep(min(_POLL_SECONDS, seconds / 8))


def _state(files: Files, directory: str) -> tuple[int, str, str]:
    token, holder = _top(files, directory)
    beat = files.read(f"{directory}/{token:08d}.{holder}.beat") if token else None
    return token, holder, (beat or b"").decode()


def _top(files: Files, directory: str) -> tuple[int, str]:
    """Return the highest token and its holder, or (0, "") if the lease is free."""
    tokens = [int(n[:8]) for n in files.children(directory) if n.endswith(".json")]
    if not tokens:
        return 0, ""
    content = files.read(f"{directory}/{max(tokens):08d}.json")
    try:
        return max(tokens), str(json.loads(content or b"")["holder"])
    except ValueError:
        # The file was removed between the listing and the reading. A waiter looks again.
        return max(tokens), ""
