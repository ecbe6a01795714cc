"""The build of an artifact: a work directory that survives a killed run, and its commit."""

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from numbers import Integral
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from rso import parquet
from rso.code_digest import CodeDigest
from rso.content_digest import dataset_digest, files_digest, table_digest
from rso.files import (
    MANIFEST,
    Files,
    is_temporary,
    sync_directory,
    write_durably,
    writing,
)
from rso.fingerprint import file_sha256
from rso.manifest import FileEntry, Manifest
from schemas import SCHEMAS

if TYPE_CHECKING:
    from rso.artifact import Artifact

logger = logging.getLogger(__name__)

SCRATCH = "scratch"


class Work:
    """The build of one artifact, held by one run at a time.

    `existing` is the artifact if it is complete already: then there is nothing to do. It was in the
    store, or a killed run had finished it except for its publication. `directory` is local, and
    holds what a killed run finished.
    """

    def __init__(
        self,
        stage: str,
        fingerprint: str,
        directory: str,
        publish: "Callable[[Manifest], Artifact]",
        existing: "Artifact | None" = None,
    ) -> None:
        self.stage, self.fingerprint, self.directory = stage, fingerprint, directory
        self.existing = existing
        self._publish = publish

    @property
    def scratch(self) -> str:
        """A directory for checkpoints; it survives a kill and is not part of the artifact."""
        return self._made(SCRATCH)

    def output(self, name: str) -> str:
        """Return the local directory of an output."""
        assert name not in (SCRATCH, MANIFEST) and "/" not in name, f"{name!r} is no output name"
        return self._made(name)

    def write_shard(self, output: str, index: int, num_shards: int, table: pa.Table) -> int:
        """Write one shard of a dataset output and return its rows; see `parquet.write_shard`."""
        return parquet.write_shard(self.output(output), output, index, num_shards, table)

    def has_shard(self, output: str, index: int, num_shards: int) -> bool:
        """Say whether this run, or a killed run of the same build, finished a shard."""
        return parquet.has_shard(f"{self.directory}/{output}", index, num_shards)

    def shard(self, output: str, index: int, num_shards: int) -> pa.Table:
        """Return a finished shard."""
        return parquet.read_shard(self.output(output), output, index, num_shards)

    def commit(
        self,
        *,
        inputs: Mapping[str, str],
        settings: Mapping[str, Any],
        code: CodeDigest,
        externals: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
        counters: Mapping[str, int | float] | None = None,
        curves: Mapping[str, Sequence[Mapping[str, float]]] | None = None,
        timings: Mapping[str, float] | None = None,
        peak_memory_bytes: int | None = None,
        versions: Mapping[str, str] | None = None,
    ) -> "Artifact":
        """Make the artifact from the outputs written so far, and return it.

        Raises:
            UnreadableShard: shards of a dataset output are missing or broken.
            StoreError: the store is full or cannot be written.
            LockLost: another run took over this build.
        """
        assert self.existing is None, f"{self.stage}: the artifact exists, nothing to commit"
        with writing(self.directory):
            outputs = [describe(path) for path in self._outputs()]
            manifest = Manifest(
                stage=self.stage,
                fingerprint=self.fingerprint,
                inputs=dict(inputs),
                externals=dict(externals or {}),
                settings=dict(settings),
                config=dict(config or {}),
                code_digest=code.digest,
                code=dict(code.modules),
                files=tuple(entry for output in outputs for entry in output.files),
                rows={o.name: o.rows for o in outputs if o.rows is not None},
                digests={o.name: o.digest for o in outputs},
                counters={name: _number(n) for name, n in (counters or {}).items()},
                curves={name: [_floats(step) for step in c] for name, c in (curves or {}).items()},
                timings=_floats(timings or {}),
                peak_memory_bytes=peak_memory_bytes,
                versions=dict(versions or {}),
                created_at=datetime.now(UTC).isoformat(timespec="microseconds"),
            )
            write_durably(os.path.join(self.directory, MANIFEST), manifest.to_bytes())
            return self._publish(manifest)

    def _made(self, name: str) -> str:
        path = os.path.join(self.directory, name)
        with writing(self.directory):
            os.makedirs(path, exist_ok=True)
        return path

    def _outputs(self) -> list[str]:
        """Remove the temporary files of killed writers, and return the output directories."""
        for name in filter(is_temporary, walk(self.directory)):
            os.remove(os.path.join(self.directory, name))
        names = sorted(name for name in os.listdir(self.directory) if name != SCRATCH)
        paths = [os.path.join(self.directory, name) for name in names]
        outputs = [path for path in paths if os.path.isdir(path)]
        assert outputs, f"{self.stage}: committed without any output"
        return outputs


@dataclass(frozen=True)
class Output:
    """What the manifest says about one output; `rows` is None unless it is a dataset."""

    name: str
    files: tuple[FileEntry, ...]
    digest: str
    rows: int | None


def describe(directory: str) -> Output:
    """Return the files, rows and content digest of a local output directory.

    Raises:
        UnreadableShard: it is a dataset, and shards are missing or broken.
    """
    name = os.path.basename(directory)
    files = tuple(
        FileEntry(
            path=f"{name}/{relative}",
            size=os.path.getsize(os.path.join(directory, relative)),
            sha256=file_sha256(os.path.join(directory, relative)),
        )
        for relative in walk(directory)
    )
    if name not in SCHEMAS:
        return Output(name, files, directory_digest(directory, name), None)
    digest, rows = read_dataset(directory, name)
    return Output(name, files, digest, rows)


def directory_digest(directory: str, output: str) -> str:
    """Return the content digest of a local directory that holds `output`.

    An output with the name of a schema is a dataset. Other outputs are models or plain files.
    """
    if output in SCHEMAS:
        return read_dataset(directory, output)[0]
    names = os.listdir(directory)
    is_model = "config.json" in names or "adapter_config.json" in names
    if is_model and any(name.endswith(".safetensors") for name in names):
        from rso.models import model_digest

        return model_digest(directory)
    return files_digest(directory)


def read_dataset(directory: str, schema: str) -> tuple[str, int]:
    """Return the content digest and the number of rows of a dataset, read shard by shard."""
    total = parquet.num_shards(directory)
    digests, rows = [], 0
    for index in range(total):
        table = parquet.read_shard(directory, schema, index, total)
        digests.append(table_digest(table))
        rows += table.num_rows
    return dataset_digest(digests), rows


def walk(directory: str) -> list[str]:
    """Return the sorted paths of all files below a local directory, relative to it."""
    return sorted(
        os.path.relpath(os.path.join(folder, name), directory).replace(os.sep, "/")
        for folder, _, names in os.walk(directory)
        for name in names
    )


class Mirror:
    """Copies the finished files of a local work directory to a remote store.

    Files are uploaded in the order in which they were written. So the remote copy is always a state
    that a kill could have left here, and another machine can continue a killed stage from it.
    """

    def __init__(self, files: Files, local: str, remote: str, check: Callable[[], None]) -> None:
        self._files, self._local, self._remote, self._check = files, local, remote, check
        self._uploaded: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._is_finished = False

    def restore(self) -> None:
        """Download what a killed run left in the store to the local directory."""
        for name in self._files.sizes(self._remote):
            target = os.path.join(self._local, name)
            self._files.download(f"{self._remote}/{name}", target)
            self._uploaded[name] = _state(target)

    def finish(self) -> None:
        """Upload the remaining files, the manifest last; later updates do nothing."""
        with self._lock:
            self._update(walk(self._local))
            self._is_finished = True

    def update(self) -> None:
        """Upload new files and remove deleted ones; only `finish` uploads a manifest."""
        with self._lock:
            if not self._is_finished:
                self._update([name for name in walk(self._local) if name != MANIFEST])

    def _update(self, names: Sequence[str]) -> None:
        states: dict[str, tuple[int, int]] = {}
        for name in names:
            # The trainer may delete old checkpoints during this loop.
            with suppress(FileNotFoundError):
                if not is_temporary(name):
                    states[name] = _state(os.path.join(self._local, name))
        for name in sorted(states, key=lambda n: (n == MANIFEST, states[n][0], n)):
            if self._uploaded.get(name) == states[name]:
                continue
            self._check()
            with suppress(FileNotFoundError):
                self._files.upload(os.path.join(self._local, name), f"{self._remote}/{name}")
                self._uploaded[name] = states[name]
        for name in [name for name in self._uploaded if name not in states]:
            self._check()
            self._files.remove(f"{self._remote}/{name}")
            del self._uploaded[name]

    @contextmanager
    def running(self, seconds: float) -> Iterator[None]:
        """Update every `seconds` in a separate thread, and once more when the block ends."""
        stop = threading.Event()

        def attempt() -> None:
            try:
                self.update()
            except Exception as error:
                # The next update uploads what is missing, and the commit is the last chance.
                logger.warning("%s: not mirrored (%s)", self._remote, error)

        def loop() -> None:
            while not stop.wait(seconds):
                attempt()

        thread = threading.Thread(target=loop, name="mirror", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            attempt()


def _number(number: Any) -> int | float:
    """Return a Python number: a manifest refuses numpy's."""
    return int(number) if isinstance(number, Integral) else float(number)


def _floats(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: float(figure) for name, figure in figures.items()}


def _state(path: str) -> tuple[int, int]:
    stat = os.stat(path)
    return stat.st_mtime_ns, stat.st_size


def sync_tree(directory: str) -> None:
    """Flush a directory and everything below it to disk."""
    for folder, _, names in os.walk(directory):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                os.fsync(file.fileno())
        sync_directory(folder)
