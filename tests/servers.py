"""HTTP servers on loopback: one that answers by script, a recording proxy, and real vLLM."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Body = dict[str, Any]


def is_check(body: Body) -> bool:
    """Say whether a request is the engine's check of a server, not a prompt to decode."""
    return body["max_tokens"] == 1 and body.get("logprobs") == 2


class Scripted:
    """A server of completions. `script` gets number and body of a request and names an action.

    Actions are `ok`, a status with headers, `break` (no answer), `half` (an answer cut off) and
    `garbage`. Responses are a function of prompt, seed and sample.
    """

    def __init__(self, model: str, script: Callable[[int, Body], Any] | None = None) -> None:
        self.model, self.root, self.max_model_len = model, model, 256
        self.script = script or (lambda number, body: "ok")
        self.asked: list[Body] = []
        self.answered: list[Body] = []
        self.times: list[float] = []
        self.headers: list[dict[str, str]] = []
        self.num_checks = self.num_checks_refused = 0
        self.busiest = self._busy = 0
        self.shape: Callable[[Body, Body], Body] = lambda body, answer: answer
        self._lock = threading.Lock()

    def models(self) -> Body:
        """Return the list of models."""
        card = {"id": self.model, "root": self.root, "max_model_len": self.max_model_len}
        return {"object": "list", "data": [card]}

    def complete(self, handler: "_Handler", body: Body) -> None:
        """Answer a request as the script says."""
        if is_check(body):
            self.num_checks += 1
            if self.num_checks <= self.num_checks_refused:
                handler.answer(429, {"error": {"message": "busy"}})
            else:
                handler.answer(200, self.shape(body, self._answer(body)))
            return
        with self._lock:
            number = len(self.asked)
            self.asked.append(body)
            self.times.append(time.monotonic())
            self.headers.append(dict(handler.headers.items()))
            self._busy += 1
            self.busiest = max(self.busiest, self._busy)
        action = self.script(number, body)
        with self._lock:
            self._busy -= 1
        if action == "ok":
            self.answered.append(body)
            handler.answer(200, self.shape(body, self._answer(body)))
        elif action == "garbage":
            handler.send(200, b"<html>not here</html>")
        elif action in ("break", "half"):
            if action == "half":
                handler.send(200, b'{"choices": [', length=5000)
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)
        else:
            status, headers = action
            handler.answer(status, {"error": {"message": f"scripted {status}"}}, headers)

    def _answer(self, body: Body) -> Body:
        length = body["max_tokens"]
        choices = []
        for index in range(body.get("n", 1)):
            first = (sum(body["prompt"]) + body.get("seed", 0) + index) % 200
            tokens = [10 + (first + step) % 200 for step in range(length)]
            logprobs = {
                "token_logprobs": [-1.0] * length,
                "top_logprobs": [{"token_id:1": -0.5, "token_id:2": -1.5}] * length,
            }
            choice = {"index": index, "token_ids": tokens, "logprobs": logprobs}
            choices.append(choice | {"finish_reason": "length", "text": "the server's own"})
        # out of order, as nothing promises it
        return {"choices": choices[::-1]}


class Proxy:
    """Passes on what it is asked, and records it; `hold(number)` says when to wait with that."""

    def __init__(self, upstream: str) -> None:
        self._upstream = upstream
        self.asked: list[Body] = []
        self.hold: Callable[[int], bool] = lambda number: False

    def models(self) -> Body:
        """Return the list of models of the server behind."""
        with urllib.request.urlopen(f"{self._upstream}/models") as answer:
            found: Body = json.load(answer)
            return found

    def complete(self, handler: "_Handler", body: Body) -> None:
        """Pass a request on, once it is not held."""
        if not is_check(body):
            number = len(self.asked)
            self.asked.append(body)
            while self.hold(number):
                time.sleep(0.02)
        request = urllib.request.Request(
            f"{self._upstream}/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request) as answer:
                handler.send(200, answer.read())
        except urllib.error.HTTPError as error:
            handler.send(error.code, error.read())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def _behind(self) -> Any:
        return self.server.behind  # type: ignore[attr-defined]

    def do_GET(self) -> None:
        try:
            self.answer(200, self._behind.models())
        except OSError:
            self.close_connection = True

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            self._behind.complete(self, body)
        except OSError:
            # Who asked has gone, or the server behind: either way without an answer.
            self.close_connection = True

    def answer(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(value).encode(), headers)

    def send(
        self,
        status: int,
        content: bytes,
        headers: dict[str, str] | None = None,
        length: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def log_message(self, format: str, *arguments: Any) -> None:
        """Keep quiet."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep quiet of connections that are broken on purpose, between two requests."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


@contextmanager
def serving(behind: Scripted | Proxy, port: int = 0) -> Iterator[str]:
    """Serve on a port of loopback, by default a free one, and give the base URL."""
    server = _Server(("127.0.0.1", port), _Handler)
    server.behind = behind  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()


def free_port() -> int:
    """Return a port that nobody listens on just now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


class Vllm:
    """A real server, the leader of a process group of its own."""

    def __init__(self, command: str, log: Path) -> None:
        port = free_port()
        arguments = shlex.split(command)
        arguments[arguments.index("--port") + 1] = str(port)
        if arguments[0] == "python":
            arguments[0] = sys.executable
        # small and quick: no compilation, 64 MiB for keys and values, many steps a call
        arguments += ["--enforce-eager", "--kv-cache-memory-bytes", str(64 << 20)]
        arguments += ["--max-num-seqs", "16", "--max-num-batched-tokens", "256"]
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
        }
        self.url, self.log = f"http://127.0.0.1:{port}/v1", log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                arguments,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, seconds: float = 280.0) -> "Vllm":
        """Wait until it answers."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self._process.poll() is None:
            with suppress(OSError), urllib.request.urlopen(f"{self.url}/models", timeout=5):
                return self
            time.sleep(0.2)
        self.kill()
        raise AssertionError(self.log.read_text()[-4000:])

    def kill(self) -> None:
        """SIGKILL the server and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
