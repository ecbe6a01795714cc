"""Finished answers of one `decode` call on disk, so that a repeated call asks only for the rest."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from types import TracebackType
from typing import BinaryIO

from rso.decoding import Decoded, Request, Sampling
from rso.files import writing


class Journal:
    """Answers by the number of the request, one JSON line each; a context manager that appends.

    The name of the file is the SHA-256 of sampling, seed, prompt ids and tokens. So a call finds
    only the answers of an equal call. The model is not in the name: use one folder per model.
    """

    def __init__(
        self, directory: str, requests: Sequence[Request], sampling: Sampling, seed: int
    ) -> None:
        call = [dataclasses.asdict(sampling), seed, [list(request) for request in requests]]
        name = hashlib.sha256(json.dumps(call).encode()).hexdigest()
        os.makedirs(directory, exist_ok=True)
        self.path = os.path.join(directory, f"{name}.jsonl")

    def __enter__(self) -> "Journal":
        """Read the answers on disk, and open the file to append more."""
        self._file: BinaryIO = open(self.path, "a+b")
        self._file.seek(0)
        content = self._file.read()
        # A kill can leave the last line unfinished. Drop it: its answer is asked for again.
        whole = content[: content.rfind(b"\n") + 1]
        self._file.truncate(len(whole))
        self.answers: dict[int, list[Decoded]] = {}
        for line in whole.splitlines():
            index, responses = json.loads(line)
            self.answers[index] = [Decoded(*response) for response in responses]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file, and keep it."""
        self._file.close()

    def add(self, index: int, responses: list[Decoded]) -> None:
        """Keep the answers to one request; after this returns, a killed process keeps them."""
        self.answers[index] = responses
        with writing(self.path):
            self._file.write(json.dumps([index, responses]).encode() + b"\n")
            self._file.flush()
