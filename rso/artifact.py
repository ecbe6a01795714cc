"""The only reader and writer of artifacts.

`<store>/<stage>/<fingerprint>/` holds one directory per output, and `manifest.json`, which is
written last. The store is a local directory or an fsspec URL.
"""

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property

import pyarrow as pa

from rso import parquet
from rso.errors import UserError
from rso.files import MANIFEST, Files, StoreError, sync_directory, writing
from rso.fingerprint import file_sha256
from rso.fingerprint import fingerprint as fingerprint_of
from rso.lock import (
    Lease,
    LockLost,
    file_lock,
    is_leased,
    is_locked,
    lease,
    private_directory,
)
from rso.manifest import BadManifest, Manifest, read_manifest
from rso.work import SCRATCH, Mirror, Work, directory_digest, sync_tree
from schemas import SchemaMismatch

__all__ = ["Artifact", "LockLost", "Manifest", "Store", "StoreError", "Work", "digest_directory"]

logger = logging.getLogger(__name__)

LEASE_SECONDS = 60.0
_STAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_FINGERPRINT = re.compile(r"[0-9a-f]{8,64}")


class Artifact:
    """A finished, immutable result of a stage.

    A method that takes the name of an output raises `UserError` if there is no such output. A
    method for dataset outputs also raises it for any other output.
    """

    def __init__(self, files: Files, manifest: Manifest) -> None:
        self._files, self.manifest = files, manifest
        self.stage, self.fingerprint = manifest.stage, manifest.fingerprint

    def __repr__(self) -> str:
        return f"Artifact({self.directory!r})"

    @property
    def directory(self) -> str:
        """Path or URL of the artifact."""
        return self._files.url(self._path)

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs."""
        return sorted(self.manifest.digests)

    def output(self, name: str) -> str:
        """Return the path or URL of an output's directory."""
        self._known(name)
        return f"{self.directory}/{name}"

    def digest(self, name: str) -> str:
        """Return the content digest of an output; it is part of the next stage's fingerprint."""
        self._known(name)
        return self.manifest.digests[name]

    def rows(self, name: str) -> int:
        """Return the number of rows of a dataset output."""
        self._dataset(name)
        return self.manifest.rows[name]

    def num_shards(self, name: str) -> int:
        """Return the number of shards of a dataset output."""
        return len(self._shard_names(name))

    def shards(self, name: str) -> list[str]:
        """Return the paths or URLs of the shards of a dataset output, in order."""
        return [f"{self.output(name)}/{shard}" for shard in self._shard_names(name)]

    def shard(self, name: str, index: int) -> pa.Table:
        """Return one shard of a dataset output, checked against its schema.

        Raises:
            UnreadableShard: the file is missing or broken.
            SchemaMismatch: the file does not have the schema of the output.
        """
        return parquet.read_shard(self.output(name), name, index, self.num_shards(name))

    def read(self, name: str) -> pa.Table:
        """Return all rows of a dataset output, shard after shard; raises as `shard` does."""
        return pa.concat_tables([self.shard(name, i) for i in range(self.num_shards(name))])

    def local(self, name: str) -> str:
        """Return a local directory with an output's files; a remote output is downloaded once.

        The download lies in `cache_directory()`, under the output's content digest.

        Raises:
            StoreError: a downloaded file does not have the bytes that the manifest states.
        """
        self._known(name)
        if self._files.is_local:
            return self.output(name)
        target = os.path.join(cache_directory(), "outputs", self.digest(name))
        if not os.path.isdir(target):
            with writing(target):
                self._download(name, target)
        return target

    def _download(self, name: str, target: str) -> None:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with tempfile.TemporaryDirectory(dir=os.path.dirname(target)) as temporary:
            made = os.path.join(temporary, name)
            for entry in self.manifest.files:
                if entry.path.startswith(f"{name}/"):
                    path = os.path.join(temporary, entry.path)
                    self._files.download(f"{self._path}/{entry.path}", path)
                    if file_sha256(path) != entry.sha256:
                        raise StoreError(
                            f"{self.directory}/{entry.path}: its bytes are not those of the "
                            "manifest; run `rso verify`, then run the stage again."
                        )
            try:
                os.rename(made, target)
            except OSError:
                # Another process downloaded the same content first.
                if not os.path.isdir(target):
                    raise

    @property
    def _path(self) -> str:
        return f"{self.stage}/{self.fingerprint}"

    def _shard_names(self, name: str) -> list[str]:
        self._dataset(name)
        prefix = f"{name}/"
        paths = [
            e.path.removeprefix(prefix) for e in self.manifest.files if e.path.startswith(prefix)
        ]
        return parquet.complete_shards(paths, self.output(name))

    def _dataset(self, name: str) -> None:
        self._known(name)
        if name not in self.manifest.rows:
            raise UserError(
                f"{self.directory}/{name} is no dataset; expected one of "
                f"{', '.join(self.manifest.rows) or 'none'}."
            )

    def _known(self, name: str) -> None:
        if name not in self.manifest.digests:
            raise UserError(
                f"{self.directory} has no output {name!r}; expected one of "
                f"{', '.join(self.outputs)}."
            )


class Store:
    """The artifacts below a local directory or an fsspec URL."""

    def __init__(self, root: str, *, lease_seconds: float = LEASE_SECONDS) -> None:
        self._lease_seconds = lease_seconds
        self._files = Files(root)

    @cached_property
    def root(self) -> str:
        """Path or URL of the store."""
        return self._files.url("")

    def find(self, stage: str, fingerprint: str, *, verify: bool = False) -> Artifact | None:
        """Return the artifact, or None if there is none that is complete.

        The manifest, the files and their sizes are always checked; every byte is checked with
        `verify`. A broken artifact is renamed to `<fingerprint>.corrupt-N` with a warning, unless
        another run is building it.
        """
        artifact, problems = self._inspect(stage, fingerprint, verify=verify)
        if not problems:
            return artifact
        if self._is_being_built(_path(stage, fingerprint)):
            return None
        return self._find_or_set_aside(stage, fingerprint, verify=verify)

    def artifacts(self, stage: str | None = None) -> list[Artifact]:
        """Return all artifacts of one stage or of all stages, newest first.

        Files are not checked. An artifact with a broken manifest is left out with a warning.
        """
        stages = [stage] if stage is not None else self._files.children("")
        found = [
            artifact
            for name in stages
            if _STAGE.fullmatch(name)
            for artifact in self._artifacts(name)
        ]
        return sorted(found, key=lambda a: (a.manifest.created_at, a.fingerprint), reverse=True)

    def open(self, text: str) -> Artifact:
        """Return the artifact named by `stage` (its newest) or by `stage/fingerprint-prefix`.

        Raises:
            UserError: there is no such artifact, or several fingerprints begin with the prefix.
        """
        stage, _, prefix = text.partition("/")
        every = self.artifacts(stage) if _STAGE.fullmatch(stage) else []
        found = [a for a in every if a.fingerprint.startswith(prefix)]
        if not found:
            there = ", ".join(f"{stage}/{a.fingerprint[:12]}" for a in every[:5])
            there = there or ", ".join(sorted({a.stage for a in self.artifacts()}))
            raise UserError(
                f"store {self.root} has no artifact {text!r}; it has {there or 'none yet'}: name "
                "one of these, or run the stage."
            )
        if prefix and len(found) > 1:
            raise UserError(
                f"{text!r} fits {len(found)} artifacts in {self.root}: "
                f"{', '.join(a.fingerprint[:16] for a in found[:5])}; give more digits."
            )
        return found[0]

    def verify(self, artifact: Artifact) -> list[str]:
        """Return the problems of an artifact after reading every byte; nothing is set aside."""
        found, problems = self._inspect(artifact.stage, artifact.fingerprint, verify=True)
        if found is None and not problems:
            return [f"{artifact.directory}: it is gone"]
        return problems

    @contextmanager
    def build(self, stage: str, fingerprint: str, *, force: bool = False) -> Iterator[Work]:
        """Hold the only build of an artifact; see `Work`.

        Waits while another run builds the same artifact. `work.existing` is the artifact if it
        exists by then. With `force` an existing artifact is built again, and the old one is renamed
        to `<fingerprint>.replaced-N` once the new one is complete. The work of an unfinished build
        is kept, and the next attempt continues from it.

        Raises:
            StoreError: the store cannot be written.
            LockLost: on a remote store, another run took over the lease of this run.
        """
        hold = self._local_build if self._files.is_local else self._remote_build
        with hold(stage, fingerprint, _path(stage, fingerprint), force) as work:
            yield work

    @contextmanager
    def _local_build(
        self, stage: str, fingerprint: str, directory: str, force: bool
    ) -> Iterator[Work]:
        path = self._files.path(f"{directory}.work")

        def publish(manifest: Manifest) -> Artifact:
            return self._publish_locally(directory, manifest)

        with file_lock(self._files.path(f"{directory}.lock"), directory):
            existing = None if force else self._find_or_set_aside(stage, fingerprint)
            if existing is None:
                with writing(self.root):
                    os.makedirs(path, exist_ok=True)
                    existing = _finish(path, publish)
            try:
                yield Work(stage, fingerprint, path, publish, existing)
            finally:
                _remove_empty(path)

    def _publish_locally(self, directory: str, manifest: Manifest) -> Artifact:
        path, final = self._files.path(f"{directory}.work"), self._files.path(directory)
        shutil.rmtree(os.path.join(path, SCRATCH), ignore_errors=True)
        sync_tree(path)
        self._files.set_aside(directory, "replaced")
        os.rename(path, final)
        sync_directory(os.path.dirname(final))
        return Artifact(self._files, manifest)

    @contextmanager
    def _remote_build(
        self, stage: str, fingerprint: str, directory: str, force: bool
    ) -> Iterator[Work]:
        with (
            lease(self._files, f"{directory}.lease", directory, self._lease_seconds) as held,
            private_directory(_work_directory(self.root, stage, fingerprint)) as path,
        ):
            mirror = Mirror(self._files, path, f"{directory}.work", held.check)

            def publish(manifest: Manifest) -> Artifact:
                return self._publish_remotely(directory, manifest, mirror, held)

            existing = None if force else self._find_or_set_aside(stage, fingerprint)
            if existing is None:
                with writing(path):
                    mirror.restore()
                    existing = _finish(path, publish)
            if existing is not None:
                # A build that was killed after it wrote the manifest has not removed its work.
                self._files.remove_tree(f"{directory}.work")
                yield Work(stage, fingerprint, path, publish, existing)
                return
            with mirror.running(self._lease_seconds / 4):
                yield Work(stage, fingerprint, path, publish, existing)

    def _publish_remotely(
        self, directory: str, manifest: Manifest, mirror: Mirror, held: Lease
    ) -> Artifact:
        held.confirm()
        mirror.finish()
        if MANIFEST in self._files.sizes(directory):
            self._files.set_aside(directory, "replaced")
        self._files.remove_tree(directory)
        for entry in manifest.files:
            held.check()
            self._files.copy(f"{directory}.work/{entry.path}", f"{directory}/{entry.path}")
        held.confirm()
        if not self._files.create(f"{directory}/{MANIFEST}", manifest.to_bytes()):
            raise LockLost(
                f"{self._files.url(directory)}: another run committed it first; run the stage "
                "again to take its result."
            )
        self._files.remove_tree(f"{directory}.work")
        return Artifact(self._files, manifest)

    def _find_or_set_aside(
        self, stage: str, fingerprint: str, *, verify: bool = False
    ) -> Artifact | None:
        """Return the artifact, or None after setting a broken one aside.

        Call it only while no other run builds the artifact.
        """
        artifact, problems = self._inspect(stage, fingerprint, verify=verify)
        if not problems:
            return artifact
        directory = _path(stage, fingerprint)
        with writing(self.root):
            aside = self._files.set_aside(directory, "corrupt")
        if aside is not None:
            logger.warning(
                "%s is corrupt and was set aside as %s: %s",
                self._files.url(directory),
                self._files.url(aside),
                "; ".join(problems[:3]),
            )
        return None

    def _inspect(
        self, stage: str, fingerprint: str, *, verify: bool
    ) -> tuple[Artifact | None, list[str]]:
        """Return the artifact, or None and its problems; an absent artifact has no problems."""
        directory = _path(stage, fingerprint)
        data = self._files.read(f"{directory}/{MANIFEST}")
        if data is None:
            # On a remote store, an artifact that is being published has no manifest yet.
            is_broken = self._files.is_local and os.path.isdir(self._files.path(directory))
            return None, [f"{MANIFEST} is missing"] if is_broken else []
        try:
            manifest = read_manifest(data, MANIFEST)
        except BadManifest as error:
            return None, [str(error)]
        if (manifest.stage, manifest.fingerprint) != (stage, fingerprint):
            return None, [f"{MANIFEST} is of {manifest.stage}/{manifest.fingerprint}"]
        problems = self._wrong_files(directory, manifest)
        if verify and not problems:
            problems = self._wrong_bytes(directory, manifest, data)
        return (None, problems) if problems else (Artifact(self._files, manifest), [])

    def _wrong_files(self, directory: str, manifest: Manifest) -> list[str]:
        sizes = self._files.sizes(directory)
        missing = [f"{e.path} is missing" for e in manifest.files if e.path not in sizes]
        return missing + [
            f"{e.path} has {sizes[e.path]} bytes, expected {e.size}"
            for e in manifest.files
            if e.path in sizes and sizes[e.path] != e.size
        ]

    def _wrong_bytes(self, directory: str, manifest: Manifest, data: bytes) -> list[str]:
        known = {MANIFEST, *(entry.path for entry in manifest.files)}
        problems = [
            f"{path} is in no manifest"
            for path in self._files.sizes(directory)
            if path not in known
        ]
        if data != manifest.to_bytes():
            problems.append(f"{MANIFEST} is not the text that was written")
        return problems + [
            f"{entry.path} has other bytes than were written"
            for entry in manifest.files
            if self._files.sha256(f"{directory}/{entry.path}") != entry.sha256
        ]

    def _artifacts(self, stage: str) -> Iterator[Artifact]:
        for name in self._files.children(stage):
            if not _FINGERPRINT.fullmatch(name):
                continue
            data = self._files.read(f"{stage}/{name}/{MANIFEST}")
            if data is None:
                continue
            try:
                yield Artifact(self._files, read_manifest(data, f"{stage}/{name}/{MANIFEST}"))
            except BadManifest as error:
                logger.warning("%s; run `rso verify`", error)

    def _is_being_built(self, directory: str) -> bool:
        if self._files.is_local:
            return is_locked(self._files.path(f"{directory}.lock"))
        return is_leased(self._files, f"{directory}.lease")


def digest_directory(directory: str, output: str) -> str:
    """Return the content digest of an output in a local directory, which may have any name.

    The digest equals that of the same output in the store.

    Raises:
        UserError: the directory is missing, or `output` is a dataset and the directory is not.
    """
    if not os.path.isdir(directory):
        raise UserError(
            f"{os.path.abspath(directory)}: expected a directory with {output}, found "
            f"{'a file' if os.path.exists(directory) else 'nothing'}; give its path."
        )
    try:
        return directory_digest(directory, output)
    except (parquet.UnreadableShard, SchemaMismatch) as error:
        raise UserError(str(error)) from error


def cache_directory() -> str:
    """Return the local directory for copies of remote files: `$RSO_CACHE_DIR`, or ~/.cache/rso."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.abspath(os.environ.get("RSO_CACHE_DIR") or os.path.join(base, "rso"))


def _path(stage: str, fingerprint: str) -> str:
    if not _STAGE.fullmatch(stage) or not _FINGERPRINT.fullmatch(fingerprint):
        raise ValueError(f"{stage!r}, {fingerprint!r}: expected a stage name and hex digits")
    return f"{stage}/{fingerprint}"


def _work_directory(root: str, stage: str, fingerprint: str) -> str:
    return os.path.join(cache_directory(), "work", fingerprint_of([root, stage, fingerprint]))


def _finish(path: str, publish: Callable[[Manifest], Artifact]) -> Artifact | None:
    """Publish a build that was killed after it wrote its manifest; return None if there is none."""
    manifest_path = os.path.join(path, MANIFEST)
    try:
        with open(manifest_path, "rb") as file:
            manifest = read_manifest(file.read(), manifest_path)
    except FileNotFoundError:
        return None
    except BadManifest as error:
        logger.warning("%s; the stage goes on from its shards and checkpoints", error)
        os.remove(manifest_path)
        return None
    return publish(manifest)


def _remove_empty(path: str) -> None:
    """Remove a work directory if it holds nothing."""
    for directory in (os.path.join(path, SCRATCH), path):
        with suppress(OSError):
            os.rmdir(directory)
