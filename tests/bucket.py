"""An object store on a disk, as `bucket:///path`: objects are whole, and never renamed.

It lets several processes contend for one "remote" store without a server.
"""

import os
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem


class BucketFileSystem(LocalFileSystem):  # type: ignore[misc]
    """Object-store semantics over a directory; Store must treat it as remote."""

    protocol = "bucket"

    def __init__(self, **options: Any) -> None:
        super().__init__(auto_mkdir=True, **options)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(path).removeprefix("bucket://").rstrip("/") or "/"

    def unstrip_protocol(self, name: str) -> str:
        return f"bucket://{self._strip_protocol(name)}"

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        path = self._strip_protocol(path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = f"/{path.strip('/')}.{os.getpid()}.{os.urandom(4).hex()}.upload"
        with open(temporary, "wb") as file:
            file.write(value)
        try:
            if mode == "create":
                os.link(temporary, path)
            else:
                os.rename(temporary, path)
        finally:
            if os.path.exists(temporary):
                os.remove(temporary)

    def put_file(self, lpath: str, rpath: str, **_: Any) -> None:
        with open(lpath, "rb") as file:
            self.pipe_file(rpath, file.read())

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        with open(self._strip_protocol(path1), "rb") as file:
            self.pipe_file(path2, file.read())

    def mv(self, *_: Any, **__: Any) -> None:
        raise AssertionError("an object store cannot rename")


fsspec.register_implementation("bucket", BucketFileSystem, clobber=True)
