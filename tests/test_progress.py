"""What long work shows: a line a minute where there is no terminal, a bar where there is one."""

import io
import sys
from pathlib import Path

import pytest
import system

from rso import progress as module
from rso.progress import WORKER, duration, progress, progress_line
from stages.runner import run_stage


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """The name of a work that no other test has: bars of one name are one work."""
    return str(request.node.name)


def test_line_each_minute_says_how_much_is_done_and_left(
    clock: Clock, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress(name, total=75, unit="steps", clock=clock) as bar:
        for step in range(1, 76):
            clock.now += 4
            bar.advance()
            bar.note(loss=0.6137, accuracy=step / 100)
    # The first step is at 4 s, so the 14 steps after it took 56 s.
    assert capsys.readouterr().err.splitlines() == [
        f"{name}: 15 of 75 steps, 1 min 00 s, about 4 min 00 s left, loss 0.614, accuracy 0.14",
        f"{name}: 30 of 75 steps, 2 min 00 s, about 3 min 00 s left, loss 0.614, accuracy 0.29",
        f"{name}: 45 of 75 steps, 3 min 00 s, about 2 min 00 s left, loss 0.614, accuracy 0.44",
        f"{name}: 60 of 75 steps, 4 min 00 s, about 1 min 00 s left, loss 0.614, accuracy 0.59",
        f"{name}: 75 of 75 steps, 5 min 00 s, about 0 s left, loss 0.614, accuracy 0.74",
    ]


def test_nothing_is_shown_for_what_ends_within_a_minute(
    clock: Clock, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress(name, total=3, unit="rows", clock=clock) as bar:
        for _ in range(3):
            clock.now += 19
            bar.advance()
            bar.note(loss=1.0)
    assert bar.done == 3
    assert capsys.readouterr() == ("", "")


def test_work_done_before_an_interruption_does_not_change_the_rate(
    clock: Clock, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress(name, total=1000, unit="tokens", clock=clock) as bar:
        bar.advance(900)
        clock.now += 60
        bar.advance(20)
    said = f"{name}: 920 of 1,000 tokens, 1 min 00 s, about 4 min 00 s left\n"
    assert capsys.readouterr().err == said


def test_first_line_leaves_out_the_rest_until_there_is_a_rate(
    clock: Clock, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress(name, total=10, unit="responses", clock=clock) as bar:
        clock.now += 90
        bar.advance(2)
    assert capsys.readouterr().err == f"{name}: 2 of 10 responses, 1 min 30 s\n"


def test_short_shards_are_one_work_that_shows_a_line_a_minute(
    clock: Clock, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(5):
        with progress(name, total=2, unit="rows", clock=clock) as bar:
            for _ in range(2):
                clock.now += 14
                bar.advance()
        # Time between shards is not work under this name.
        clock.now += 500
    assert capsys.readouterr().err.splitlines() == [
        f"{name}, part 3: 1 of 2 rows, 14 s",
        f"{name}, part 5: 2 of 2 rows, 28 s, about 0 s left",
    ]


@pytest.mark.parametrize("variable", ["RANK", WORKER])
def test_only_the_first_process_shows_anything(
    clock: Clock,
    name: str,
    variable: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for number, is_seen in (("1", False), ("0", True)):
        monkeypatch.setenv(variable, number)
        with progress(f"{name} {number}", total=2, unit="rows", clock=clock) as bar:
            clock.now += 61
            bar.advance()
        assert bool(capsys.readouterr().err) is is_seen


def test_terminal_has_a_bar_after_two_seconds_and_no_lines(
    clock: Clock, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress(name, total=4, unit="rows", clock=clock) as bar:
        clock.now += 1
        bar.advance()
        assert terminal.getvalue() == ""
        clock.now += 100
        bar.advance()
        bar.note(loss=0.5)
        shown = terminal.getvalue()
    assert f"{name}:  50%" in shown and "2/4" in shown and "loss=0.5" in shown
    assert "\n" not in shown


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (192, "3 min 12 s"),
        (3599.7, "1 h 00 min"),
        (7440, "2 h 04 min"),
    ],
)
def test_duration_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_line_of_a_training() -> None:
    line = progress_line("train_ranker", "41 of 75 steps", 192, 160, {"loss": 0.6091})
    assert line == "train_ranker: 41 of 75 steps, 3 min 12 s, about 2 min 40 s left, loss 0.609"


def test_training_shows_its_tokens_and_its_loss(
    finished: system.Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = finished.copy(tmp_path / "store")
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.0)
    for stage in ("train_sft", "train_policy"):
        made = run_stage(run.graph(), stage, force=True).artifact
        curve, tokens = made.manifest.curves[stage], made.manifest.counters["tokens"]
        lines = [li for li in capsys.readouterr().err.splitlines() if li.startswith(f"{stage}")]
        # The loss of a step is known when the step is done, so the next line has it.
        assert f": {tokens:,.0f} of {tokens:,.0f} tokens, " in lines[-1]
        assert f", loss {curve[-2]['loss']:.3g}" in lines[-1]


def test_each_source_of_prepare_has_a_bar_of_its_own_rows(
    finished: system.Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    people = system.write_human_comparisons(tmp_path / "people.jsonl")
    sources = [*finished.config().model_dump()["prepare"]["sources"], people]
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.0)
    changes = [f"store={tmp_path / 'store'}", system.override("prepare.sources", sources)]
    run_stage(system.graph_of(system.load(finished.path, *changes)), "prepare")
    lines = capsys.readouterr().err.splitlines()
    for name, num_rows in (("questions", 64), ("people", 60)):
        of_source = [line for line in lines if line.startswith(f"prepare {name}")]
        assert f": {num_rows} of {num_rows} rows, " in of_source[-1]
