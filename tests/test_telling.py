"""What a run says: what to expect, one line and a telling figure for each stage, and no more."""

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import processes
import pytest
import system
from processes import rso

from rso.artifact import Artifact, Store
from rso.progress import duration
from stages.estimate import Ahead, Estimate
from stages.machine import Machine
from stages.runner import plan
from stages.telling import FIGURES, ToDo, began, ended, expectation, figure, to_do


def with_counters(artifact: Artifact, counters: dict[str, Any], **curves: Any) -> Artifact:
    """The artifact as if it had counted other things."""
    update = {"counters": counters, "curves": curves}
    return Artifact(artifact._files, artifact.manifest.model_copy(update=update))


def test_every_stage_has_a_telling_figure(finished: system.Run) -> None:
    names = list(finished.graph().table)
    for number, name in enumerate(names, 1):
        artifact = finished.artifact(name)
        told = figure(artifact)
        assert told and "\n" not in told and len(told) < 200 + len(str(finished.store))
        assert began(names, name) == f"stage {number} of {len(names)}: {name}"
        line = ended(names, artifact, is_cached=True)
        assert line == f"stage {number} of {len(names)}: {name}, cached: {told}"
        seconds = duration(artifact.manifest.timings["seconds"])
        assert ended(names, artifact, is_cached=False) == f"{name} done in {seconds}: {told}"


def test_figures_are_those_of_the_rows(finished: system.Run) -> None:
    told = {name: figure(finished.artifact(name)) for name in finished.graph().table}
    prompts, refused = finished.rows("prepare/prompts"), finished.rows("prepare/quarantine")
    assert told["prepare"] == f"{len(prompts)} prompts, {len(refused)} of 64 rows refused"
    curve = finished.artifact("train_sft").manifest.curves["train_sft"]
    examples = sum(row["split"] == "train" for row in finished.rows("prepare/demonstrations"))
    assert told["train_sft"] == (
        f"{examples} examples in {len(curve)} steps, last loss {curve[-1]['loss']:.2f}"
    )
    assert told["compare"].startswith(f"{len(finished.rows('compare/comparisons'))} comparisons, ")
    candidates = finished.rows("decode/candidates")
    mean = sum(len(row["token_ids"]) for row in candidates) / len(candidates)
    assert told["decode"] == f"{len(candidates)} responses, {mean:.1f} tokens each on average"
    rewards: dict[str, list[float]] = {}
    for row in finished.rows("score/rewards"):
        rewards.setdefault(row["prompt_id"], []).append(row["reward"])
    deviations = [
        (sum((r - sum(rs) / len(rs)) ** 2 for r in rs) / len(rs)) ** 0.5 for rs in rewards.values()
    ]
    spread = sum(deviations) / len(deviations)
    found = re.search(r"spread by ([\d.]+) nats", told["score"])
    assert found is not None and float(found[1]) == pytest.approx(spread, abs=0.006)
    assert re.search(r"the order decides [01]\.\d\d \[.*\] of \d+ pairs", told["score"])
    assert told["pair"] == f"{len(finished.rows('pair/pairs'))} pairs"
    assert told["logps"] == f"{len(finished.rows('logps/logps'))} responses"
    assert Path(told["report"]).is_file()


def test_figure_of_reject_is_its_share_of_the_gain_of_the_best(finished: system.Run) -> None:
    rewards: dict[str, list[float]] = {}
    for row in finished.rows("score/rewards"):
        rewards.setdefault(row["prompt_id"], []).append(row["reward"])
    reward_of = {
        (row["prompt_id"], row["response_id"]): row["reward"]
        for row in finished.rows("score/rewards")
    }
    text_of = {row["response_id"]: row["response"] for row in finished.rows("decode/candidates")}
    gained, most = 0.0, 0.0
    accepted = [row for row in finished.rows("reject/accepted") if row["is_accepted"]]
    for prompt_id, values in rewards.items():
        mean = sum(values) / len(values)
        kept = [
            reward_of[prompt_id, row["response_id"]]
            for row in accepted
            if row["prompt_id"] == prompt_id
        ]
        gained += sum(kept) / len(kept) - mean
        # The best of the different candidates, as many as were kept: a text is accepted once.
        different = {
            text_of[response_id]: reward
            for (of_prompt, response_id), reward in reward_of.items()
            if of_prompt == prompt_id
        }
        most += sum(sorted(different.values())[-len(kept) :]) / len(kept) - mean
    told = figure(finished.artifact("reject"))
    found = re.fullmatch(
        r"(.*) of draws accepted, (.*) effective samples of 6, "
        "(.*) of the gain of the best 4 of 6",
        told,
    )
    assert found is not None, told
    assert float(found[3]) == pytest.approx(gained / most, abs=0.006)
    assert 1 <= float(found[2]) <= 6 and 0 < float(found[1]) <= 1


def test_figure_of_rankers_has_the_interval_and_the_bias_where_it_is_known(
    finished: system.Run,
) -> None:
    artifact = finished.artifact("train_ranker")
    counters = {
        "accuracy": 0.798,
        "accuracy_low": 0.71,
        "accuracy_high": 0.87,
        "held_out_comparisons": 94,
    }
    accuracy = "right on 0.80 [0.71, 0.87] of 94 held-out comparisons"
    assert figure(with_counters(artifact, counters)) == accuracy
    bias = {"positional_bias": 0.12, "positional_bias_spread": 1.04}
    found = figure(with_counters(artifact, counters | bias))
    assert found == f"{accuracy}, slot bias 0.1 nats (spread 1.0)"


def test_figure_of_evaluate_is_the_win_rate_under_the_gold(finished: system.Run) -> None:
    points = {"win": 1.0, "tie": 0.5, "loss": 0.0}
    verdicts = [
        points[row["verdict"]]
        for row in finished.rows("evaluate/judgements")
        if (row["judge"], row["system"], row["opponent"]) == ("gold", "policy", "reference")
        and row.get("sampling", "greedy") == "greedy"
    ]
    rate = 100 * sum(verdicts) / len(verdicts)
    found = re.fullmatch(
        r"the policy wins ([\d.]+) % \[([\d.]+), ([\d.]+)\] of (\d+) prompts against SFT under "
        "the known synthetic gold",
        figure(finished.artifact("evaluate")),
    )
    assert found is not None
    assert float(found[1]) == pytest.approx(rate, abs=0.06)
    assert float(found[2]) <= rate <= float(found[3]) and int(found[4]) == len(verdicts)


@pytest.mark.parametrize("name", FIGURES)
def test_missing_counters_leave_the_figure_out(finished: system.Run, name: str) -> None:
    if name in finished.graph().table:
        artifact = with_counters(finished.artifact(name), {})
        names = list(finished.graph().table)
        line = ended(names, artifact, is_cached=True)
        # These two tell of files.
        if name not in ("evaluate", "report"):
            assert line == f"{began(names, name)}, cached"


def test_no_draws_and_no_gain_are_told_without_a_crash(finished: system.Run) -> None:
    reject = finished.artifact("reject")
    counters = dict(reject.manifest.counters)
    assert figure(with_counters(reject, counters | {"draws": 0}, betas=[])) == ""
    flat = [{"beta": 0.0, "reward_gain": 0.0}]
    assert "gain" not in figure(with_counters(reject, counters, betas=flat))
    skipped = with_counters(finished.artifact("train_sft"), {"steps": 0, "tokens": 0})
    assert figure(skipped) == "the model as it is"


def test_unreadable_rows_leave_the_figure_out(finished: system.Run, tmp_path: Path) -> None:
    run = finished.real_copy(tmp_path / "store")
    names, artifact = list(run.graph().table), run.artifact("evaluate")
    (shard,) = artifact.shards("metrics")
    assert ended(names, artifact, is_cached=True) != f"{began(names, 'evaluate')}, cached"
    seconds = duration(artifact.manifest.timings["seconds"])
    for spoil in (lambda: Path(shard).write_bytes(b"PAR1"), lambda: Path(shard).unlink()):
        spoil()
        assert ended(names, artifact, is_cached=True) == f"{began(names, 'evaluate')}, cached"
        assert ended(names, artifact, is_cached=False) == f"evaluate done in {seconds}"


CPU = Machine(threads=2, gpu=None, flops=1e11)


@pytest.mark.parametrize(
    ("machine", "line"),
    [
        (CPU, "cpu, float32: this CPU has no bfloat16; 2 threads"),
        (Machine(1, None, None), "cpu, float32: this CPU has no bfloat16; 1 thread"),
        (Machine(8, "NVIDIA X", None), "cuda: NVIDIA X, float32: this CPU has no bfloat16"),
        (None, "float32: this CPU has no bfloat16"),
    ],
)
def test_expectation_names_what_computes(machine: Machine | None, line: str) -> None:
    reason = "this CPU has no bfloat16"
    told = expectation("float32", reason, ToDo(3, 0, 13), Ahead(machine, None))
    assert told == [line, "3 of 13 stages have to run: no estimate of the time"]


@pytest.mark.parametrize(
    ("estimate", "words"),
    [
        (
            Estimate(1210, computed=("decode",)),
            "about 20 minutes, from a one-second measurement of this machine; a first estimate",
        ),
        (Estimate(70, remembered=("decode",)), "about 1 minute, from earlier runs in this store"),
        (
            Estimate(6000, remembered=("decode",), computed=("pair",)),
            "about 1.7 hours, from a one-second measurement of this machine and from earlier runs "
            "in this store; a first estimate",
        ),
        (
            Estimate(600, remembered=("decode",), unknown=("pair", "logps")),
            "about 10 minutes, from earlier runs in this store; more for pair, logps, which have "
            "no estimate",
        ),
        (Estimate(24, unknown=("pair",)), "no estimate of the time"),
        (Estimate(8), "about 1 minute"),
        (None, "no estimate of the time"),
    ],
)
def test_expectation_says_what_the_estimate_is_made_from(
    estimate: Estimate | None, words: str
) -> None:
    told = expectation("float32", "so", ToDo(3, 0, 13), Ahead(CPU, estimate))
    assert told[1] == f"3 of 13 stages have to run: {words}"
    told = expectation("float32", "so", ToDo(1, 4, 13), Ahead(CPU, estimate))
    most = f"at most {words}" if words.startswith("about") else words
    assert told[1] == f"1 stage has to run, up to 4 more depend on it: {most}"


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (ToDo(12, 0, 12), "12 of 12 stages have to run: about 1 minute"),
        (ToDo(1, 0, 13), "1 of 13 stages has to run: about 1 minute"),
        (ToDo(1, 1, 13), "1 stage has to run, up to 1 more depends on it: at most about 1 minute"),
        (
            ToDo(2, 3, 13),
            "2 stages have to run, up to 3 more depend on them: at most about 1 minute",
        ),
    ],
)
def test_expectation_counts_the_stages(stages: ToDo, words: str) -> None:
    assert expectation("float32", "so", stages, Ahead(CPU, Estimate(8)))[1] == words


def to_do_of(run: system.Run) -> ToDo:
    graph = run.graph()
    return to_do(plan(graph), Store(graph.config.store))


def test_stages_that_wait_have_to_run_where_none_of_them_was_ever_made(
    finished: system.Run, tmp_path: Path
) -> None:
    assert to_do_of(system.Run(finished.path, tmp_path / "empty")) == ToDo(13, 0, 13)
    run = finished.copy(tmp_path / "store")
    assert to_do_of(run) == ToDo(0, 0, 13)
    for name in ("report", "evaluate"):
        shutil.rmtree(run.store / name)
    assert to_do_of(run) == ToDo(2, 0, 13)
    # The artifacts of the four below may fit the pairs when these are made again.
    run = finished.copy(tmp_path / "other")
    shutil.rmtree(run.store / "pair")
    assert to_do_of(run) == ToDo(1, 4, 13)


LEVEL, CONSOLE = "PREFECT_LOGGING_LEVEL", "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"
TELL = """
import logging
from rso.cli import _show_stages
_show_stages()
logging.getLogger("prefect.task_runs.telling").info("stage 1 of 1: prepare")
logging.getLogger("prefect.flow_runs").info("words of Prefect")
"""


@pytest.mark.parametrize(
    ("levels", "is_plain", "has_others"),
    [
        ({}, True, False),
        ({LEVEL: "WARNING"}, True, False),
        ({LEVEL: "info"}, False, True),
        ({CONSOLE: "INFO"}, False, True),
        ({LEVEL: "INFO", CONSOLE: "ERROR"}, True, False),
        ({LEVEL: "ERROR", CONSOLE: "DEBUG"}, False, False),
    ],
)
def test_each_line_appears_once_at_every_level_of_prefect(
    levels: dict[str, str], is_plain: bool, has_others: bool, tmp_path: Path
) -> None:
    with processes.marked(tmp_path / "prefect") as starter:
        quiet = {"PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore"}
        starter.environment.update(levels | quiet)
        done = starter.run([sys.executable, "-c", TELL], timeout=120)
    assert done.returncode == 0, done.stderr
    (line,) = (li for li in done.stderr.splitlines() if li.endswith("stage 1 of 1: prepare"))
    assert (line == "stage 1 of 1: prepare") is is_plain
    assert ("words of Prefect" in done.stderr) is has_others


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_run_tells_each_stage_and_hides_what_prefect_says(
    finished: system.Run, tmp_path: Path
) -> None:
    run = finished.copy(tmp_path / "store")
    shutil.rmtree(run.store / "report")
    command = rso("run", run.path, "--set", f"store={run.store}")
    with processes.marked(tmp_path / "prefect") as starter:
        quiet = starter.run(command, timeout=300)
        assert quiet.returncode == 0, quiet.stderr
        names = list(run.graph().table)
        lines = quiet.stderr.splitlines()
        started = lines.index("stage 1 of 13: prepare, cached: " + figure(run.artifact("prepare")))
        # A server that starts for the first time may have something to say.
        device, stages = (
            line for line in lines[:started] if re.match("cpu, |1 of 13 stages", line)
        )
        assert device == "cpu, float32: compute.dtype says so; 1 thread"
        assert stages == "1 of 13 stages has to run: about 1 minute"
        assert lines[started:] == [
            *(ended(names, run.artifact(name), is_cached=True) for name in names[:-1]),
            "stage 13 of 13: report",
            ended(names, run.artifact("report"), is_cached=False),
        ]
        assert "stage 1 of 13" not in quiet.stdout and "Finished in state" not in quiet.stderr
        shutil.rmtree(run.store / "report")
        starter.environment[LEVEL] = "INFO"
        shown = starter.run(command, timeout=300)
    assert shown.returncode == 0, shown.stderr
    lines = shown.stderr.splitlines()
    assert sum(line.endswith("stage 13 of 13: report") for line in lines) == 1
    assert "Finished in state Completed(" in shown.stderr
