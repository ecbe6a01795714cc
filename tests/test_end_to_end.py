"""`rso run` as a newcomer starts it: every stage in a process of its own, then from the store."""

import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pandas
import processes
import pytest
import system
from processes import rso

from schemas import SCHEMAS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[processes.Marked]:
    with processes.marked(tmp_path_factory.mktemp("prefect")) as starter:
        yield starter


@pytest.fixture(scope="module")
def ran(
    tiny_run: system.Run, starter: processes.Marked, tmp_path_factory: pytest.TempPathFactory
) -> tuple[system.Run, str]:
    """A run by `rso run`, and what it printed."""
    run = system.Run(tiny_run.path, tmp_path_factory.mktemp("ran") / "store")
    done = starter.run(rso("run", run.path, "--set", f"store={run.store}"), timeout=500)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return run, done.stdout


def test_run_makes_every_stage_and_prints_the_results(ran: tuple[system.Run, str]) -> None:
    run, printed = ran
    assert set(system.statuses(run).values()) == {"cached"}
    page = re.search(r"report +(\S+report\.html)", printed)
    assert page is not None and "<html" in Path(page[1]).read_text()
    assert "95 %" in printed or "[" in printed


def test_run_leaves_no_process_and_no_work_behind(
    ran: tuple[system.Run, str], starter: processes.Marked
) -> None:
    assert starter.gone_within(10) == []
    assert not list(ran[0].store.glob("*/*.work"))


def test_run_in_processes_makes_what_one_process_makes(
    ran: tuple[system.Run, str], finished: system.Run
) -> None:
    for name in finished.graph().table:
        if name != "report":
            digests = ran[0].artifact(name).manifest.digests
            assert digests == finished.artifact(name).manifest.digests, name


def test_run_a_second_time_answers_from_the_store_without_prefect(
    ran: tuple[system.Run, str], starter: processes.Marked
) -> None:
    run, first = ran
    code = (
        "import sys\nfrom rso.cli import main\n"
        "try: main()\n"
        "finally: print('LOADED', *({'prefect', 'torch'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, "run", str(run.path), "--set", f"store={run.store}"]
    started = time.monotonic()
    done = starter.run(command, timeout=60)
    assert time.monotonic() - started < 10
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "LOADED"
    assert first.splitlines()[-2:] == done.stdout.splitlines()[-3:-1]


def test_run_path_of_every_dataset_opens_in_pandas(
    ran: tuple[system.Run, str], starter: processes.Marked
) -> None:
    run, _ = ran
    command = rso("run", run.path, "--set", f"store={run.store}", "--json")
    places = json.loads(starter.run(command, timeout=60).stdout)["places"]
    datasets = [name for name in places if name.split("/")[-1] in SCHEMAS]
    assert len(datasets) == 16
    for name in datasets:
        assert list(pandas.read_parquet(places[name]).columns) == SCHEMAS[name.split("/")[1]].names


def test_run_with_a_mistake_in_a_stage_ends_with_2_and_one_sentence(
    ran: tuple[system.Run, str], starter: processes.Marked
) -> None:
    run, _ = ran
    # Found only by the stage itself, in its own process below Prefect.
    change = ("--set", f"store={run.store}", "--set", "decode.sampling.max_new_tokens=510")
    done = starter.run(rso("run", run.path, *change), timeout=120)
    assert done.returncode == 2
    assert re.search(r"^error: .*tokens, expected 1 to 2: .*max_new_tokens", done.stderr, re.M)
    assert "Traceback" not in done.stderr
    assert starter.gone_within(10) == []
    assert set(system.statuses(run).values()) == {"cached"}
