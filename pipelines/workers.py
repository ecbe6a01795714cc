"""The worker processes of a Beam pipeline on this machine.

The workers end when the run ends, and the run ends when a worker dies. Beam's own workers
(`direct_running_mode: multi_processing`) do neither. A shell starts them and may stay between the
run and the worker. And a pipeline waits forever for the answers of a dead worker.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import grpc
from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions
from apache_beam.portability import python_urns
from apache_beam.portability.api import beam_fn_api_pb2, endpoints_pb2
from apache_beam.runners.portability.fn_api_runner.worker_handlers import (
    BeamFnControlServicer,
    GrpcWorkerHandler,
    WorkerHandler,
)
from google.protobuf import text_format

from rso.errors import UserError

_SECONDS_BETWEEN_ANSWERS = 0.1
# This logger writes stack traces of errors that are raised as exceptions anyway.
_DATA_PLANE = "apache_beam.runners.worker.data_plane"


class Workers:
    """The worker processes of one run of a pipeline; a count of 1 starts none."""

    def __init__(self, label: str, count: int) -> None:
        self._label, self._count = label, count
        self._processes: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()
        self._death: str | None = None

    def options(self, given: Mapping[str, Any]) -> PipelineOptions:
        """Return the pipeline options that make FnApiRunner use these workers."""
        options = PipelineOptions.from_dictionary(dict(given))
        if self._count > 1:
            direct = options.view_as(DirectOptions)
            direct.direct_running_mode = "multi_processing"
            direct.direct_num_workers = self._count
            # This replaces Beam's own class for worker processes.
            WorkerHandler.register_environment(python_urns.SUBPROCESS_SDK, bytes)(
                partial(_Worker, self)
            )
        return options

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Raise `UserError` if the pipeline in the block fails because a worker died.

        Other exceptions pass unchanged. Beam's stack traces about lost connections are hidden.
        """
        hook, data_plane = threading.excepthook, logging.getLogger(_DATA_PLANE)
        threading.excepthook = partial(_pass_by_lost_connections, hook)
        data_plane.disabled = self._count > 1
        try:
            yield
        except Exception as error:
            if self._death is not None:
                raise UserError(self._death) from error
            raise
        finally:
            threading.excepthook, data_plane.disabled = hook, False

    def start(self, environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
        """Start one more worker; it dies with the calling thread."""
        with self._lock:
            number = str(len(self._processes))
            command = [sys.executable, "-m", "pipelines.worker"]
            command += [number, str(self._count), str(os.getpid())]
            process = subprocess.Popen(command, env={**os.environ, **environment})
            self._processes.append(process)
            if self._death is not None:
                process.kill()
        return process

    def end(self, dead: "subprocess.Popen[bytes]") -> str:
        """Record that a worker died, kill the others, and return the reason why the run ends.

        The reason names the first worker that died.
        """
        with self._lock:
            if self._death is None:
                self._death = (
                    f"{self._label}: a worker process ({dead.pid}, of {self._count}) "
                    f"{_ended(dead.returncode)}; finished shards are kept: run again, with a "
                    "smaller beam.num_workers if memory was short."
                )
                for process in self._processes:
                    process.kill()
            return self._death


def _ended(code: int) -> str:
    if code == -signal.SIGKILL:
        return "was killed (SIGKILL), as the kernel does where memory runs out"
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}, and its output says why"


def _pass_by_lost_connections(hook: Any, what: threading.ExceptHookArgs) -> None:
    # Beam's threads that listen to a worker end with this error when the worker dies.
    if not issubclass(what.exc_type, grpc.RpcError):
        hook(what)


class _Worker(GrpcWorkerHandler):
    """Beam's side of a worker process; if it dies, Beam gets an error for each awaited answer."""

    def __init__(
        self, workers: Workers, command: bytes, state: Any, provision_info: Any, server: Any
    ) -> None:
        super().__init__(state, provision_info, server)
        self._workers = workers
        self._is_closing = threading.Event()

    def start_worker(self) -> None:
        control = endpoints_pb2.ApiServiceDescriptor(url=self.control_address)
        self._process = self._workers.start(
            {
                "CONTROL_API_SERVICE_DESCRIPTOR": text_format.MessageToString(control),
                "WORKER_ID": self.worker_id,
            }
        )
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def close(self) -> None:
        # A worker that has not connected yet cannot learn that there is no more work.
        is_connected = self.control_conn._state != BeamFnControlServicer.UNSTARTED_STATE
        self._is_interrupted = not is_connected or bool(self.control_conn._futures_by_id)
        self._is_closing.set()
        if self._is_interrupted:
            # Beam would wait until the worker has done its current shards.
            self._process.kill()
        self.control_conn.close()
        with suppress(grpc.RpcError):
            # The connection to a dead worker is broken.
            self.data_conn.close()
        self.stop_worker()

    def stop_worker(self) -> None:
        self._watcher.join()

    def _watch(self) -> None:
        code = self._process.wait()
        if self._is_closing.is_set() and (code == 0 or self._is_interrupted):
            return
        death = self._workers.end(self._process)
        owed = self.control_conn._futures_by_id
        # Repeat, because Beam may send further requests.
        while not self._is_closing.wait(_SECONDS_BETWEEN_ANSWERS):
            while owed:
                name, future = owed.popitem()
                future.set(beam_fn_api_pb2.InstructionResponse(instruction_id=name, error=death))
