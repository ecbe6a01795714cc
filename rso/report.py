"""The report of a run: a self-contained HTML page, and tables of its figures for a terminal.

Everything that the page shows is in `ReportData`. The page has no script and loads nothing.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rso import charts, seeds
from rso.aliases import Row
from rso.artifact import Artifact
from rso.evaluation import (
    ANCESTRAL,
    ANSWERED,
    CONTESTS,
    GREEDY,
    HUMAN,
    JUDGES,
    POLICY,
    REFERENCE,
    SAMPLED,
    find,
    gains,
    warnings_of,
    words_of,
)

SYSTEM_NAMES = {POLICY: "Policy", REFERENCE: "SFT", HUMAN: "Human"}
HISTOGRAM_BINS = 24
KL_NAME = "KL from SFT, nats per response"


class TextFigure(NamedTuple):
    """A row of the table of answers: a metric, and how it is shown.

    The value is multiplied by `scale` and shown with `digits` decimals. `opponent` is the system
    with which the metric compares, if any.
    """

    metric: str
    name: str
    digits: int
    scale: float = 1.0
    opponent: str = ""


class Cell(NamedTuple):
    """A figure as shown, and the words that it counts, if any."""

    value: str
    words: str = ""


TEXT_FIGURES = (
    TextFigure("mean_words", "Words per response", 1),
    TextFigure("rouge_l", "ROUGE-L with the human line", 3),
    TextFigure("chrf", "chrF with the human line", 3),
    TextFigure("distinct_words", "Distinct words, share of all", 3),
    TextFigure("top_first_word_share", "Most common first word, %", 1, 100.0),
    TextFigure("top_opening_share", "Most common first 3 words, %", 1, 100.0),
    TextFigure("distinct_first_words", "Different first words", 0),
    TextFigure("repeated_share", "Repeat another answer, %", 1, 100.0),
    TextFigure("mean_similarity", "Similarity of two answers", 3),
    TextFigure("same_as_reference_share", "Repeat SFT's answer, %", 1, 100.0, REFERENCE),
    TextFigure("gold_score", "Gold points (synthetic)", 2),
    TextFigure("truncated_share", "Cut off at the longest length, %", 1, 100.0),
    TextFigure("empty_share", "Empty, %", 1, 100.0),
)


@dataclass(frozen=True)
class StageSummary:
    """What a stage cost and counted. `rows` maps each output to its number of rows."""

    name: str
    seconds: float
    peak_memory_bytes: int
    rows: Mapping[str, int] = field(default_factory=dict)
    counters: Mapping[str, float] = field(default_factory=dict)
    cached: bool = False
    fingerprint: str = ""


@dataclass(frozen=True)
class HeldOutRanker:
    """A ranker on held-out comparisons, in bins of its margin and of the difference in length.

    `advice` comes from `length_advice`.
    """

    stage: str
    by_margin: Sequence[Row]
    by_length: Sequence[Row]
    advice: str | None = None


@dataclass(frozen=True)
class ScoringRanker:
    """How reliable the ranker of `score` is: the counters of the stage, and bins of the margin.

    Without held-out comparisons there are no bins. Without pairs in both orders the counters hold
    no positional bias. `advice` comes from `bias_advice`.
    """

    counters: Mapping[str, float]
    by_margin: Sequence[Row] = ()
    advice: str | None = None


@dataclass(frozen=True)
class ShownCurve:
    """A training curve: points of (optimiser step, value)."""

    stage: str
    metric: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Rejection:
    """What algorithm 1 did to the candidates at `beta`, and what it would do at other values.

    The two counts are histograms with the bins of `edges`, of all candidates and of the accepted
    ones. Their x axis is how far the reward is below the best reward of its prompt, in units of
    beta. `points` and `advice` are those of `rso.diagnostics`.
    """

    beta: float
    num_prompts: int
    num_candidates: int
    num_accepted: int
    edges: Sequence[float]
    candidate_counts: Sequence[int]
    accepted_counts: Sequence[int]
    points: Sequence[Mapping[str, float]] = ()
    advice: Sequence[str] = ()

    @property
    def acceptance_rates(self) -> list[float]:
        """The share of draws that are accepted in each pass at `beta`."""
        (point,) = (point for point in self.points if point["beta"] == self.beta)
        rates: list[float] = []
        while (name := f"acceptance_rate_round_{len(rates) + 1}") in point:
            rates.append(point[name])
        return rates


@dataclass(frozen=True)
class SideBySide:
    """Answers to one prompt side by side, with the verdict of each judge on policy against SFT."""

    prompt_id: str
    prompt: str
    human: str | None
    reference: str
    policy: str
    verdicts: Mapping[str, str]


@dataclass(frozen=True)
class ReportData:
    """Everything the report shows."""

    title: str
    config: Mapping[str, Any]
    metrics: Sequence[Row]
    examples: Sequence[SideBySide] = ()
    stages: Sequence[StageSummary] = ()
    curves: Sequence[ShownCurve] = ()
    rejection: Rejection | None = None
    scoring: ScoringRanker | None = None
    rankers: Sequence[HeldOutRanker] = ()
    quarantine: Mapping[str, int] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    hardware: str = ""
    labeller: str = ""


def build(data: ReportData) -> str:
    """Return the report as one HTML document."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=_percent, signed=_signed, duration=_duration, memory=_memory, count=_count
    )
    return environment.get_template("report.html").render(
        data=data,
        css=(Path(__file__).parent / "report.css").read_text(encoding="utf-8"),
        warnings=warnings_of(data.metrics),
        gains=gains(data.metrics),
        contests=win_rate_blocks(data.metrics),
        axis=charts.forest_axis(),
        text_blocks=text_blocks(data.metrics),
        kl=_kl(data.metrics),
        kl_name=KL_NAME,
        agreements=_agreements(data.metrics),
        system_names=SYSTEM_NAMES,
        judges=JUDGES,
        judge_meanings=_judge_meanings(data),
        reliability=_reliability(data.scoring),
        histogram=_histogram(data.rejection),
        curves=[(c, charts.line(c.points, c.metric)) for c in data.curves if len(c.points) > 1],
        total_seconds=sum(stage.seconds for stage in data.stages),
        longest=max((stage.seconds for stage in data.stages), default=0.0),
        peak=max((stage.peak_memory_bytes for stage in data.stages), default=0),
        settings=list(_flat(data.config)),
    )


def terminal_table(metrics: Sequence[Row], stages: Sequence[StageSummary] = ()) -> RenderableType:
    """Return tables for a rich console: win rates, figures of the answers, and times of stages.

    Below them are the warnings about the answers and the gains.
    """
    parts: list[RenderableType] = [_win_rate_table(metrics), _text_table(metrics)]
    if stages:
        parts.append(_stage_table(stages))
    parts += [Text(sentence, style="bold yellow") for sentence in warnings_of(metrics)]
    parts += [Text(text, style="bold") for text in gains(metrics)]
    return Group(*parts)


def stage_summary(artifact: Artifact, *, is_cached: bool = False) -> StageSummary:
    """Return what a stage cost and counted."""
    manifest = artifact.manifest
    return StageSummary(
        artifact.stage,
        manifest.timings["seconds"],
        manifest.peak_memory_bytes or 0,
        manifest.rows,
        manifest.counters,
        is_cached,
        artifact.fingerprint,
    )


def rejection_summary(
    accepted: pa.Table,
    *,
    beta: float,
    points: Sequence[Mapping[str, float]] = (),
    advice: Sequence[str] = (),
) -> Rejection:
    """Return what the report shows of an `accepted` table.

    `beta` is in nats. Where it is 0 or infinite the unit of the histograms is 1 nat. Their last
    bin also holds what is beyond the 99th percentile of candidates. `points` and `advice` pass
    through.
    """
    _, prompts = np.unique(_column(accepted, "prompt_id"), return_inverse=True)
    rewards = _column(accepted, "reward").astype(np.float64)
    is_accepted = _column(accepted, "is_accepted").astype(bool)
    num_prompts = int(prompts.max()) + 1 if len(prompts) else 0
    best = np.full(num_prompts, -np.inf)
    np.maximum.at(best, prompts, rewards)
    unit = beta if _is_unit(beta) else 1.0
    below = (best[prompts] - rewards) / unit
    edges = np.linspace(0.0, float(np.quantile(below, 0.99)) or 1.0, HISTOGRAM_BINS + 1)
    clipped = np.minimum(below, edges[-1])
    return Rejection(
        beta=beta,
        num_prompts=num_prompts,
        num_candidates=len(rewards),
        num_accepted=int(is_accepted.sum()),
        edges=edges.tolist(),
        candidate_counts=np.histogram(clipped, edges)[0].tolist(),
        accepted_counts=np.histogram(clipped[is_accepted], edges)[0].tolist(),
        points=points,
        advice=advice,
    )


def pick_examples(
    generations: Sequence[Row],
    judgements: Sequence[Row],
    prompts: Sequence[Row],
    *,
    num_examples: int,
    seed: int,
) -> list[SideBySide]:
    """Return random examples from all prompts with greedy answers of policy and reference.

    `seed` keys the draw, so nobody chooses the examples. Responses and verdicts are the greedy
    ones.
    """
    prompt_of = {row["prompt_id"]: row for row in prompts}
    texts: dict[str, dict[str, str]] = {}
    for row in generations:
        if row["sampling"] == GREEDY:
            texts.setdefault(row["prompt_id"], {})[row["system"]] = row["response"]
    complete = sorted(i for i, found in texts.items() if {POLICY, REFERENCE} <= found.keys())
    drawn = [complete[i] for i in seeds.order(complete, "examples", seed)[:num_examples]]
    verdicts: dict[str, dict[str, str]] = {prompt_id: {} for prompt_id in drawn}
    for row in judgements:
        contest = row["system"], row["opponent"], row["sampling"]
        if contest == (POLICY, REFERENCE, GREEDY) and row["prompt_id"] in verdicts:
            verdicts[row["prompt_id"]][row["judge"]] = row["verdict"]
    return [
        SideBySide(
            prompt_id=prompt_id,
            prompt=prompt_of[prompt_id]["prompt"],
            human=prompt_of[prompt_id]["target"],
            reference=texts[prompt_id][REFERENCE],
            policy=texts[prompt_id][POLICY],
            verdicts={j: verdicts[prompt_id][j] for j in JUDGES if j in verdicts[prompt_id]},
        )
        for prompt_id in drawn
    ]


def win_rate_blocks(metrics: Sequence[Row]) -> list[dict[str, Any]]:
    """Return one block per contest that was judged: its name and rows.

    A row holds the figures and the forest plot of one judge.
    """
    blocks = []
    for contest in CONTESTS:
        rows = []
        for judge in JUDGES:
            place = {**contest._asdict(), "judge": judge}
            rate = find(metrics, "win_rate", **place)
            if rate is not None:
                rows.append(
                    {
                        "judge": JUDGES[judge].heading,
                        "is_synthetic": judge == "gold",
                        "is_control": judge == "length",
                        "rate": rate,
                        "ties": find(metrics, "tie_share", **place),
                        "forest": charts.forest(rate["value"], rate["low"], rate["high"]),
                    }
                )
        if rows:
            name = f"{SYSTEM_NAMES[contest.system]} against {_opponent_name(contest.opponent)}"
            is_sampled = contest.sampling == SAMPLED
            blocks.append({"name": f"{name}, sampled" if is_sampled else name, "rows": rows})
    return blocks


def text_blocks(metrics: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the tables of greedy and of sampled answers, each with its name and `text_rows`."""
    blocks = [
        {"name": f"{sampling.capitalize()} answers", "rows": text_rows(metrics, sampling)}
        for sampling in ANSWERED
    ]
    return [block for block in blocks if block["rows"]]


def text_rows(metrics: Sequence[Row], sampling: str) -> list[dict[str, Any]]:
    """Return the table of answers: one row per figure, with a cell per system and policy - SFT.

    The cells of the human line are the same for greedy and for sampled answers.
    """
    rows = []
    for figure in TEXT_FIGURES:
        found = {
            system: find(
                metrics,
                figure.metric,
                system=system,
                opponent=figure.opponent,
                sampling="" if system == HUMAN else sampling,
            )
            for system in (POLICY, REFERENCE, HUMAN)
        }
        if found[POLICY] is None and found[REFERENCE] is None:
            continue
        difference = find(
            metrics, f"{figure.metric}_difference", opponent=REFERENCE, sampling=sampling
        )
        rows.append(
            {
                "name": figure.name,
                "cells": [_cell(row, figure) for row in found.values()],
                "difference": _difference_cell(difference, figure),
                "is_clear": difference is not None
                and (difference["low"] > 0 or difference["high"] < 0),
            }
        )
    return rows


def _kl(metrics: Sequence[Row]) -> Row | None:
    return find(metrics, "kl", opponent=REFERENCE, sampling=ANCESTRAL)


def _judge_meanings(data: ReportData) -> dict[str, str]:
    used = {row["judge"] for row in data.metrics}
    meanings = {name: judge.meaning for name, judge in JUDGES.items() if name in used}
    if data.labeller and "gold" in meanings:
        meanings["gold"] += f" (labeller {data.labeller})"
    return meanings


def _agreements(metrics: Sequence[Row]) -> list[dict[str, Any]]:
    rows = []
    for judge in JUDGES:
        row = find(metrics, "agreement_with_gold", opponent=REFERENCE, judge=judge)
        if row is not None:
            forest = charts.forest(row["value"], row["low"], row["high"])
            rows.append({"judge": JUDGES[judge].heading, "row": row, "forest": forest})
    return rows


def _reliability(scoring: ScoringRanker | None) -> str:
    if scoring is None or not scoring.by_margin:
        return ""
    return charts.reliability(
        [row["probability"] for row in scoring.by_margin],
        [(row["accuracy"], row["accuracy_low"], row["accuracy_high"]) for row in scoring.by_margin],
        [int(row["comparisons"]) for row in scoring.by_margin],
    )


def _histogram(rejection: Rejection | None) -> str:
    if rejection is None or not rejection.num_candidates:
        return ""
    unit = "in units of β" if _is_unit(rejection.beta) else "nats"
    counts = rejection.candidate_counts, rejection.accepted_counts
    return charts.histogram(rejection.edges, *counts, unit)


def _is_unit(beta: float) -> bool:
    """Return whether rewards can be shown in units of β: not for best-of-N, nor for uniform."""
    return 0 < beta < np.inf


def _win_rate_table(metrics: Sequence[Row]) -> Table:
    table = Table(title="Win rates, ties one half", title_justify="left")
    table.add_column("contest")
    table.add_column("judge")
    for heading in ("win rate", "95 % interval", "ties", "prompts"):
        table.add_column(heading, justify="right")
    for block in win_rate_blocks(metrics):
        for index, row in enumerate(block["rows"]):
            rate, ties = row["rate"], row["ties"]
            table.add_row(
                block["name"] if index == 0 else "",
                Text(row["judge"]),
                f"{_percent(rate['value'])} %",
                f"{_percent(rate['low'])} – {_percent(rate['high'])}",
                f"{_percent(ties['value'])} %" if ties else "",
                str(rate["num_prompts"]),
                end_section=index == len(block["rows"]) - 1,
            )
    return table


def _text_table(metrics: Sequence[Row]) -> Table:
    table = Table(title="Answers", title_justify="left")
    table.add_column("")
    for heading in ("policy", "SFT", "human", "policy - SFT [95 %]"):
        table.add_column(Text(heading), justify="right")
    for block in text_blocks(metrics):
        table.add_row(Text(block["name"], style="bold"))
        for row in block["rows"]:
            cells = ["\n".join(filter(None, cell)) for cell in row["cells"]]
            table.add_row(row["name"], *map(Text, (*cells, row["difference"])))
        table.add_section()
    kl = _kl(metrics)
    if kl is not None:
        interval = f"[{kl['low']:.2f}, {kl['high']:.2f}]"
        table.add_row(KL_NAME, f"{kl['value']:.2f}", "", "", Text(interval))
    return table


def _stage_table(stages: Sequence[StageSummary]) -> Table:
    table = Table(title="Stages", title_justify="left")
    table.add_column("stage")
    for heading in ("time", "peak memory", "rows"):
        table.add_column(heading, justify="right")
    for stage in stages:
        rows = ", ".join(f"{_count(n)} {name}" for name, n in stage.rows.items())
        time = _duration(stage.seconds) + (" (cached)" if stage.cached else "")
        table.add_row(stage.name, time, _memory(stage.peak_memory_bytes), rows)
    table.add_section()
    peak = max(stage.peak_memory_bytes for stage in stages)
    table.add_row("all", _duration(sum(s.seconds for s in stages)), _memory(peak), "")
    return table


def _cell(row: Row | None, figure: TextFigure) -> Cell:
    if row is None:
        return Cell("–")
    words = "" if row["text"] is None else words_of(row)
    return Cell(f"{figure.scale * row['value']:.{figure.digits}f}", words)


def _difference_cell(row: Row | None, figure: TextFigure) -> str:
    if row is None:
        return ""
    value, low, high = (
        f"{figure.scale * row[k]:+.{figure.digits}f}".replace("-", "−")
        for k in ("value", "low", "high")
    )
    return f"{value} [{low}, {high}]"


def _opponent_name(opponent: str) -> str:
    return "the human line" if opponent == HUMAN else SYSTEM_NAMES[opponent]


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return the settings as (dotted key, JSON value), in the order of `config`."""
    rows: list[tuple[str, str]] = []
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            rows += _flat(value, f"{name}.")
        else:
            rows.append((name, json.dumps(value, ensure_ascii=False, default=str)))
    return rows


def _column(table: pa.Table, name: str) -> npt.NDArray[Any]:
    return np.asarray(table.column(name).to_numpy(zero_copy_only=False))


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _memory(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _count(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.4g}"
