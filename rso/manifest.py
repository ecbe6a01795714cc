"""The manifest: what an artifact holds, what it was computed from, and what it cost."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rso.fingerprint import from_plain_json, plain_json

FORMAT = 1


class BadManifest(ValueError):
    """The bytes of a manifest are not those that were written."""


class FileEntry(BaseModel):
    """One file of an artifact; `path` is relative to the artifact's directory."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    size: int
    sha256: str


class Manifest(BaseModel):
    """The content of `manifest.json`, written last: a directory without it is no artifact."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    stage: str
    fingerprint: str
    inputs: dict[str, str] = Field(description="content digest of every input, by its name")
    externals: dict[str, Any] = Field(description="identity of what comes from outside the store")
    settings: dict[str, Any] = Field(description="the settings that can change the result")
    config: dict[str, Any] = Field(description="the whole resolved config of the run")
    code_digest: str
    code: dict[str, str] = Field(description="digest of every module the stage is made of")
    files: tuple[FileEntry, ...]
    rows: dict[str, int] = Field(description="rows of every output that is a dataset")
    digests: dict[str, str] = Field(description="content digest of every output")
    counters: dict[str, int | float]
    curves: dict[str, list[dict[str, float]]] = Field(description="figures step by step")
    timings: dict[str, float] = Field(description="seconds")
    peak_memory_bytes: int | None
    versions: dict[str, str]
    created_at: str = Field(description="UTC, ISO 8601")

    @model_validator(mode="after")
    def _knows_format(self) -> "Manifest":
        if self.format != FORMAT:
            raise ValueError(f"format {self.format}, expected {FORMAT}")
        return self

    def to_bytes(self) -> bytes:
        """Return the JSON text with a checksum over all other fields, encoded as UTF-8."""
        body: dict[str, Any] = plain_json(self.model_dump(mode="python", warnings="error"))
        return _render({**body, "checksum": _checksum(body)})


def read_manifest(data: bytes, where: str) -> Manifest:
    """Return the manifest in `data`.

    Raises:
        BadManifest: the text is cut off, was changed, or has another format.
    """
    try:
        found = json.loads(data)
        checksum = found.pop("checksum")
        manifest = Manifest.model_validate(from_plain_json(found))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        detail = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise BadManifest(f"{where}: not a manifest of format {FORMAT} ({detail})") from error
    if checksum != _checksum(found):
        raise BadManifest(f"{where}: its checksum does not fit its content")
    return manifest


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(_render(body)).hexdigest()


def _render(body: Mapping[str, Any]) -> bytes:
    return (json.dumps(body, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
