"""`rso-full/local` on a real Prefect server with a real process worker, on loopback."""

import json
import shutil
import socket
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
import system

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
PREFECT = [sys.executable, "-m", "prefect", "--no-prompt"]
# The deployment makes these; the stages above are there already.
TO_MAKE = ["train_policy", "evaluate", "report"]


class Server:
    """A Prefect server and its API."""

    def __init__(self, starter: processes.Marked, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/api"
        self.starter, self.folder = starter, folder
        starter.environment["PREFECT_API_URL"] = self.url
        # `prefect.yaml` takes the folder from it, as a shell would set it.
        starter.environment["PWD"] = str(processes.ROOT)
        command = [*PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(port)]
        self._process = starter.start(command, folder / "server.log")
        self._wait()

    def _wait(self) -> None:
        end = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                    assert answer.status == 200
                return
            except OSError:
                log = (self.folder / "server.log").read_text()
                assert self._process.poll() is None and time.monotonic() < end, log
                time.sleep(0.3)

    def ask(self, what: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """Return what the API's filter finds."""
        request = urllib.request.Request(
            f"{self.url}/{what}/filter",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            found: list[dict[str, Any]] = json.load(answer)
            return found

    def prefect(self, *arguments: str, timeout: float = 120) -> str:
        """Run a `prefect` command that must succeed."""
        done = self.starter.run([*PREFECT, *arguments], timeout)
        worker = self.folder / "worker.log"
        log = worker.read_text() if worker.exists() else ""
        assert done.returncode == 0, done.stdout + done.stderr + log
        return done.stdout

    def run_deployment(self, run: system.Run) -> dict[str, str]:
        """Run the deployment to its end; return the names of its tasks' states, by stage."""
        parameters = {"config": str(run.path), "overrides": [f"store={run.store}"]}
        before = {flow_run["id"] for flow_run in self.ask("flow_runs", {})}
        self.prefect(
            "deployment",
            "run",
            "rso-full/local",
            "--params",
            json.dumps(parameters),
            "--watch",
            timeout=300,
        )
        (flow_run,) = [f for f in self.ask("flow_runs", {}) if f["id"] not in before]
        assert flow_run["state"]["type"] == "COMPLETED"
        tasks = self.ask("task_runs", {"flow_runs": {"id": {"any_": [flow_run["id"]]}}})
        tasks.sort(key=lambda task: task["start_time"])
        return {task["name"]: task["state"]["name"] for task in tasks}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with processes.marked(tmp_path / "prefect") as starter:
        yield Server(starter, tmp_path)


def test_deployment_runs_and_shows_finished_stages_as_cached(
    finished: system.Run, server: Server, tmp_path: Path
) -> None:
    run = finished.copy(tmp_path / "store")
    for name in TO_MAKE:
        shutil.rmtree(run.store / name)
    server.prefect("work-pool", "create", "local", "--type", "process")
    server.prefect("deploy", "--all")
    command = [*PREFECT, "worker", "start", "--pool", "local", "--type", "process"]
    server.starter.start(command, tmp_path / "worker.log")
    first = server.run_deployment(run)
    stages = list(run.graph().table)
    assert list(first) == stages
    assert first == {name: "Completed" if name in TO_MAKE else "Cached" for name in stages}
    assert set(system.statuses(run).values()) == {"cached"}
    told = [log["message"] for log in server.ask("logs", {"limit": 200})]
    names = [f"stage {number} of {len(stages)}: {name}" for number, name in enumerate(stages, 1)]
    assert all(any(line.startswith(name) for line in told) for name in names), told
    second = server.run_deployment(run)
    assert second == dict.fromkeys(stages, "Cached")
    for name in ("train_policy", "evaluate"):
        assert run.artifact(name).manifest.digests == finished.artifact(name).manifest.digests
