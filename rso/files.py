"""The files of a store, on a disk or behind an fsspec URL, with errors that a user can act on."""

import errno
import hashlib
import inspect
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from rso.errors import UserError

MANIFEST = "manifest.json"

FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
_REFUSED = frozenset((errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST))


class StoreError(UserError):
    """The store cannot be reached, read or written; the message says what to do."""


@contextmanager
def writing(where: str) -> Iterator[None]:
    """Turn the error of a full or read-only store into a `StoreError` that says what to do."""
    try:
        yield
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        reason = error.strerror or str(error) or type(error).__name__
        if error.errno in FULL:
            raise StoreError(
                f"store {where} is full ({reason}): free space, or set `store` to another place; "
                "finished work is kept and the next run goes on from it."
            ) from error
        if error.errno in _REFUSED or isinstance(error, PermissionError | FileExistsError):
            raise StoreError(
                f"store {where} cannot be written ({reason}): make it a directory that you may "
                "write to, or set `store` to another place."
            ) from error
        raise


class Files:
    """The files below a root. Every path argument is relative to the root, with forward slashes."""

    def __init__(self, root: str) -> None:
        if not root:
            raise StoreError("store is empty; set it to a directory or a URL such as s3://bucket/x")
        try:
            self.fs, self.root = fsspec.core.url_to_fs(root)
        except (ImportError, ValueError) as error:
            raise StoreError(
                f"store {root} cannot be opened ({error}): install what the message names, or set "
                "`store` to a directory."
            ) from error
        self.is_local = type(self.fs) is LocalFileSystem
        if self.is_local:
            self.root = os.path.abspath(self.root)
        elif not _creates_exclusively(self.fs):
            raise StoreError(
                f"store {root}: this file system has no conditional write, so two runs could spoil "
                "each other's artifacts; use a directory, s3://, gs:// or abfs://."
            )

    def path(self, path: str) -> str:
        """Return the path that the file system takes."""
        return f"{str(self.root).rstrip('/')}/{path}" if path else str(self.root)

    def url(self, path: str) -> str:
        """Return the path that users and other libraries take: a local path or a URL."""
        return self.path(path) if self.is_local else str(self.fs.unstrip_protocol(self.path(path)))

    def read(self, path: str) -> bytes | None:
        """Return the bytes of a file, or None if there is no such file.

        Raises:
            StoreError: the file may not be read.
        """
        try:
            return bytes(self.fs.cat_file(self.path(path)))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except PermissionError as error:
            raise StoreError(
                f"store {self.url(path)} cannot be read ({error.strerror or error}): ask for the "
                "right to read it, or set `store` to another place."
            ) from error

    def write(self, path: str, data: bytes) -> None:
        """Write a file. Remote only: there a file appears complete or not at all."""
        assert not self.is_local
        self.fs.pipe_file(self.path(path), data)

    def create(self, path: str, data: bytes) -> bool:
        """Write a file unless it exists; say whether this call made it. Remote only."""
        assert not self.is_local
        try:
            self.fs.pipe_file(self.path(path), data, mode="create")
        except FileExistsError:
            return False
        except OSError:
            # Some stores report the failed precondition as a plain OSError.
            found = self.read(path)
            if found is None:
                raise
            return found == data
        return True

    def sizes(self, directory: str) -> dict[str, int]:
        """Return the size in bytes of every file below a directory, by path relative to it."""
        self.fs.invalidate_cache()
        base = self.path(directory)
        try:
            found = self.fs.find(base, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return {p[len(base) + 1 :]: i["size"] for p, i in found.items() if len(p) > len(base)}

    def children(self, directory: str) -> list[str]:
        """Return the names in a directory, sorted."""
        self.fs.invalidate_cache()
        try:
            found = self.fs.ls(self.path(directory), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(str(p).rstrip("/").rsplit("/", 1)[-1] for p in found)

    def remove(self, path: str) -> None:
        """Remove a file, if it exists."""
        with suppress(FileNotFoundError):
            self.fs.rm_file(self.path(path))

    def remove_tree(self, directory: str) -> None:
        """Remove a directory.

        A remote removal is not atomic: the manifest goes first, so that the rest is no artifact.
        """
        if self.is_local:
            shutil.rmtree(self.path(directory), ignore_errors=True)
            return
        names = self.sizes(directory)
        for name in sorted(names, key=lambda n: n != MANIFEST):
            self.remove(f"{directory}/{name}")

    def copy(self, source: str, target: str) -> None:
        """Copy a file within the store; remote only."""
        self.fs.cp_file(self.path(source), self.path(target))

    def sha256(self, path: str) -> str:
        """Return the SHA-256 of a file, in hex."""
        digest = hashlib.sha256()
        with self.fs.open(self.path(path), "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    def set_aside(self, directory: str, why: str) -> str | None:
        """Rename a directory to `<directory>.<why>-N` with the first free N; return the new path.

        Returns None if a local directory is already gone.
        """
        number = 1
        while True:
            target = f"{directory}.{why}-{number}"
            number += 1
            if self.is_local:
                try:
                    os.rename(self.path(directory), self.path(target))
                except FileNotFoundError:
                    return None
                except OSError as error:
                    if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                        continue
                    raise
                return target
            if not self.sizes(target):
                for name in sorted(self.sizes(directory), key=lambda n: n == MANIFEST):
                    self.copy(f"{directory}/{name}", f"{target}/{name}")
                self.remove_tree(directory)
                return target

    def download(self, path: str, target: str) -> None:
        """Copy a file of the store to a local path, where it appears complete or not at all."""
        os.makedirs(os.path.dirname(target), exist_ok=True)
        temporary = temporary_name(target)
        with self.fs.open(self.path(path), "rb") as source, open(temporary, "wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
        os.replace(temporary, target)

    def upload(self, source: str, path: str) -> None:
        """Copy a local file to the store."""
        self.fs.put_file(source, self.path(path))


def temporary_name(path: str) -> str:
    """Return the path of a new hidden file beside `path`, to write and then rename to `path`."""
    directory, name = os.path.split(path)
    return os.path.join(directory, f".{name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")


def is_temporary(path: str) -> bool:
    """Say whether a file has the name of an unfinished write, see `temporary_name`."""
    name = path.rsplit("/", 1)[-1]
    return name.startswith(".") and name.endswith(".tmp")


def write_durably(path: str, data: Any) -> None:
    """Write a local file completely or not at all: temporary file, flush to disk, rename."""
    with replaced(path) as temporary, open(temporary, "wb") as file:
        file.write(data)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as a local JSON file, completely or not at all."""
    write_durably(str(path), json.dumps(value).encode())


@contextmanager
def replaced(path: str) -> Iterator[str]:
    """Yield a temporary path; at the end flush the file there to disk and rename it to `path`.

    After an exception the temporary file is removed, and `path` is unchanged.
    """
    temporary = temporary_name(path)
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.remove(temporary)
        raise


def sync_directory(path: str) -> None:
    """Flush a directory's entries to disk, so that a rename survives a power cut."""
    _flush(path)


def _flush(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _creates_exclusively(fs: Any) -> bool:
    # The base class checks that the file is absent and then writes it: two runs may both succeed.
    method = getattr(type(fs), "_pipe_file", None) or type(fs).pipe_file
    if method is fsspec.AbstractFileSystem.pipe_file:
        return False
    return "mode" in inspect.signature(method).parameters
