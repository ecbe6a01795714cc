"""The lines that a run prints: what to expect before it starts, and how each stage went."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pyarrow as pa

from rso.aliases import Counters
from rso.artifact import Artifact, Store
from rso.evaluation import DECIDING, JUDGES, REFERENCE, find
from rso.progress import duration
from stages.estimate import Ahead, Estimate
from stages.machine import Machine
from stages.runner import Planned


class ToDo(NamedTuple):
    """How many of `num_stages` stages have to run, and how many others may have to run."""

    num_sure: int
    num_possible: int
    num_stages: int


def to_do(planned: Sequence[Planned], store: Store) -> ToDo:
    """Return how many of the planned stages have to run.

    A stage that waits for its inputs need not run if its inputs come out as before: then its old
    artifact fits. So waiting stages are sure to run only if none of them has an artifact.
    """
    num_run = sum(p.status == "run" for p in planned)
    waiting = [p.stage.name for p in planned if p.status == "waits"]
    if any(store.artifacts(name) for name in waiting):
        return ToDo(num_run, len(waiting), len(planned))
    return ToDo(num_run + len(waiting), 0, len(planned))


def expectation(dtype: str, reason: str, stages: ToDo, ahead: Ahead) -> list[str]:
    """Return the two lines before a run: device, dtype and its reason; then stages and minutes."""
    time = _time(ahead.estimate, is_upper_bound=stages.num_possible > 0)
    return [_computes_with(ahead.machine, dtype, reason), f"{_have_to_run(stages)}: {time}"]


def began(names: Sequence[str], name: str) -> str:
    """Return the line for a stage that starts; `names` are all stages of the run, in order."""
    return f"stage {names.index(name) + 1} of {len(names)}: {name}"


def ended(names: Sequence[str], artifact: Artifact, *, is_cached: bool) -> str:
    """Return the line for a stage that has its artifact, with its figure.

    The line has the time that the stage took, or says that the artifact was cached.
    """
    seconds = artifact.manifest.timings.get("seconds", 0.0)
    line = f"{artifact.stage} done in {duration(seconds)}"
    if is_cached:
        line = f"{began(names, artifact.stage)}, cached"
    told = figure(artifact)
    return f"{line}: {told}" if told else line


def figure(artifact: Artifact) -> str:
    """Return the main result of an artifact in words, or "" if the artifact does not hold it."""
    tell = FIGURES.get(artifact.stage)
    try:
        return tell(artifact.manifest.counters, artifact) if tell is not None else ""
    except (KeyError, IndexError, ZeroDivisionError, ValueError, OSError, pa.ArrowException):
        # Other code may have written an artifact with other counters, and a file may be unreadable
        # (UserError and UnreadableShard are ValueErrors). The stage is still done.
        return ""


def _computes_with(machine: Machine | None, dtype: str, reason: str) -> str:
    if machine is None:
        return f"{dtype}: {reason}"
    if machine.gpu is not None:
        return f"cuda: {machine.gpu}, {dtype}: {reason}"
    threads = "1 thread" if machine.threads == 1 else f"{machine.threads} threads"
    return f"cpu, {dtype}: {reason}; {threads}"


def _have_to_run(stages: ToDo) -> str:
    sure, possible, num_stages = stages
    verb = "has" if sure == 1 else "have"
    if not possible:
        return f"{sure} of {num_stages} stages {verb} to run"
    stage, those = ("stage", "it") if sure == 1 else ("stages", "them")
    depend = "depends" if possible == 1 else "depend"
    return f"{sure} {stage} {verb} to run, up to {possible} more {depend} on {those}"


def _time(estimate: Estimate | None, *, is_upper_bound: bool) -> str:
    if estimate is None:
        return "no estimate of the time"
    known = estimate.remembered + estimate.computed
    if estimate.unknown and not known:
        return "no estimate of the time"
    parts = [f"{'at most ' if is_upper_bound else ''}{_minutes(estimate.seconds)}"]
    if estimate.computed:
        parts.append("from a one-second measurement of this machine")
    if estimate.remembered:
        parts.append("from earlier runs in this store")
    line = " and ".join([", ".join(parts[:2]), *parts[2:]])
    line += "; a first estimate" if estimate.computed else ""
    if estimate.unknown:
        line += f"; more for {', '.join(estimate.unknown)}, which have no estimate"
    return line


def _minutes(seconds: float) -> str:
    minutes = max(1, round(seconds / 60))
    if minutes >= 90:
        return f"about {minutes / 60:.1f} hours"
    return "about 1 minute" if minutes == 1 else f"about {minutes} minutes"


def _prepare(counters: Counters, artifact: Artifact) -> str:
    prompts = sum(counters[f"prompts_{split}"] for split in ("train", "validation", "test"))
    refused, read = counters["rows_refused"], counters["rows_read"]
    return f"{prompts:,.0f} prompts, {refused:,.0f} of {read:,.0f} rows refused"


def _train_sft(counters: Counters, artifact: Artifact) -> str:
    if not counters["steps"]:
        return "the model as it is"
    curve = artifact.manifest.curves["train_sft"]
    examples = sum(step["num_items"] for step in curve)
    return (
        f"{examples:,.0f} examples in {counters['steps']:,.0f} steps, "
        f"last loss {curve[-1]['loss']:.2f}"
    )


def _compare(counters: Counters, artifact: Artifact) -> str:
    return f"{counters['comparisons']:,.0f} comparisons, {counters['ties']:,.0f} ties"


def _train_ranker(counters: Counters, artifact: Artifact) -> str:
    comparisons = counters["held_out_comparisons"]
    line = f"right on {_interval(counters, 'accuracy')} of {comparisons:,.0f} held-out comparisons"
    if {"positional_bias", "positional_bias_spread"} <= counters.keys():
        line += f", slot bias {counters['positional_bias']:.1f} nats"
        line += f" (spread {counters['positional_bias_spread']:.1f})"
    return line


def _decode(counters: Counters, artifact: Artifact) -> str:
    responses, tokens = counters["responses"], counters["tokens"]
    return f"{responses:,.0f} responses, {tokens / responses:.1f} tokens each on average"


def _score(counters: Counters, artifact: Artifact) -> str:
    parts = []
    if "reward_spread_sum" in counters:
        spread = counters["reward_spread_sum"] / counters["prompts"]
        parts.append(f"rewards of a prompt spread by {spread:.2f} nats")
    if "verdicts_flipped" in counters:
        flips, pairs = _interval(counters, "verdicts_flipped"), counters["flipped_pairs"]
        parts.append(f"the order decides {flips} of {pairs:,.0f} pairs")
    return ", ".join(parts)


def _reject(counters: Counters, artifact: Artifact) -> str:
    prompts = counters["prompts"]
    candidates = counters["candidates"] / prompts
    kept = artifact.manifest.config["reject"]["num_samples"]
    points = artifact.manifest.curves["betas"]
    greatest = next((p["reward_gain"] for p in points if p["beta"] == 0), 0.0)
    parts = [
        f"{counters['accepted'] / counters['draws']:.2f} of draws accepted",
        f"{counters['effective_samples_sum'] / prompts:.1f} effective samples of {candidates:.0f}",
    ]
    if greatest > 0:
        gain = counters["reward_gain_sum"] / prompts / greatest
        parts.append(f"{gain:.2f} of the gain of the best {kept} of {candidates:.0f}")
    return ", ".join(parts)


def _pair(counters: Counters, artifact: Artifact) -> str:
    return f"{counters['pairs']:,.0f} pairs"


def _logps(counters: Counters, artifact: Artifact) -> str:
    return f"{counters['responses']:,.0f} responses"


def _targets(counters: Counters, artifact: Artifact) -> str:
    return f"{counters['targets']:,.0f} targets for {counters['prompts']:,.0f} prompts"


def _train_policy(counters: Counters, artifact: Artifact) -> str:
    step, steps = counters["selected_step"], counters["steps"]
    rate = counters["validation_win_rate"]
    return f"step {step:,.0f} of {steps:,.0f} chosen, validation win rate {rate:.2f}"


def _evaluate(counters: Counters, artifact: Artifact) -> str:
    rows = artifact.read("metrics").to_pylist()
    for judge in DECIDING:
        row = find(rows, "win_rate", opponent=REFERENCE, judge=judge)
        if row is not None:
            value, low, high = (100 * row[key] for key in ("value", "low", "high"))
            return (
                f"the policy wins {value:.1f} % [{low:.1f}, {high:.1f}] of {row['num_prompts']:,} "
                f"prompts against SFT under {JUDGES[judge].name}"
            )
    return ""


def _report(counters: Counters, artifact: Artifact) -> str:
    return f"{artifact.output('report')}/report.html"


def _interval(counters: Counters, name: str) -> str:
    value, low, high = (counters[key] for key in (name, f"{name}_low", f"{name}_high"))
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


FIGURES: dict[str, Callable[[Counters, Artifact], str]] = {
    "prepare": _prepare,
    "train_sft": _train_sft,
    "compare": _compare,
    "train_ranker": _train_ranker,
    "train_gold_ranker": _train_ranker,
    "decode": _decode,
    "score": _score,
    "reject": _reject,
    "pair": _pair,
    "logps": _logps,
    "targets": _targets,
    "train_policy": _train_policy,
    "evaluate": _evaluate,
    "report": _report,
}
