"""All artifacts of a run to one page for a reader."""

import platform
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rso import length_bias
from rso.artifact import Artifact
from rso.calibration import bias_advice
from rso.diagnostics import sampling_advice
from rso.manifest import Manifest
from rso.report import (
    HeldOutRanker,
    ReportData,
    ScoringRanker,
    ShownCurve,
    build,
    pick_examples,
    rejection_summary,
    stage_summary,
)
from stages.context import Context, Outcome

# Figures of training curves that the report draws, with their names on the page.
METRICS = {
    "loss": "loss",
    "win_rate": "win rate under the ranker",
    "mean_probability": "mean probability under the ranker",
    "accuracy": "accuracy",
}


def run(context: Context) -> Outcome:
    """Write report.html, which needs no network and no other files."""
    artifacts = _artifacts(context)
    evaluation = artifacts["evaluate"].manifest
    accepted = context.inputs.get("reject/accepted")
    data = ReportData(
        title=context.config.report.title,
        config=evaluation.config,
        metrics=context.table("evaluate/metrics").to_pylist(),
        examples=pick_examples(
            context.table("evaluate/generations").to_pylist(),
            context.table("evaluate/judgements").to_pylist(),
            context.table("prepare/prompts").to_pylist(),
            num_examples=context.config.report.num_examples,
            seed=0,
        ),
        stages=[stage_summary(artifact) for artifact in artifacts.values()],
        curves=list(_curves(artifacts)),
        rejection=rejection_summary(
            context.table("reject/accepted"),
            **_sampling(artifacts["reject"].manifest),
        )
        if accepted is not None
        else None,
        scoring=_scoring(artifacts["score"].manifest) if "score" in artifacts else None,
        rankers=list(_rankers(artifacts)),
        quarantine=Counter(
            row["reason"] for row in context.table("prepare/quarantine").to_pylist()
        ),
        versions=evaluation.versions,
        hardware=hardware(),
        labeller=evaluation.config["comparisons"]["labeller"] or "",
    )
    folder = Path(context.work.output("report"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.html").write_text(build(data), encoding="utf-8")
    return Outcome({"examples": len(data.examples), "figures": len(data.metrics)})


def hardware() -> str:
    """Return the processor, the number of logical cores and the memory of this machine."""
    import psutil

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = models[0] if models else platform.processor()
    memory = psutil.virtual_memory().total / 2**30
    return f"{name}, {psutil.cpu_count()} cores, {memory:.0f} GiB of memory"


def _artifacts(context: Context) -> dict[str, Artifact]:
    found = {}
    for name, source in context.inputs.items():
        if source.artifact is not None:
            found[name.split("/")[0]] = source.artifact
    return found


def _rankers(artifacts: dict[str, Artifact]) -> Iterator[HeldOutRanker]:
    for name, artifact in artifacts.items():
        curves = artifact.manifest.curves
        if f"{name}_by_length" in curves:
            yield HeldOutRanker(
                stage=name,
                by_margin=curves[f"{name}_by_margin"],
                by_length=curves[f"{name}_by_length"],
                advice=length_bias.length_advice(name, dict(artifact.manifest.counters)),
            )


def _bias_advice(manifest: Manifest) -> str | None:
    return bias_advice(manifest.counters, manifest.config["score"]["orders"])


def _scoring(manifest: Manifest) -> ScoringRanker:
    reliability = manifest.curves.get("reliability", ())
    return ScoringRanker(manifest.counters, reliability, _bias_advice(manifest))


def _sampling(manifest: Manifest) -> dict[str, Any]:
    settings, points = manifest.config["reject"], manifest.curves["betas"]
    asked = {name: settings[name] for name in ("beta", "beta_unit", "num_samples")}
    return {
        "beta": manifest.counters["beta_nats"],
        "points": points,
        "advice": sampling_advice(points, manifest.counters, **asked),
    }


def _curves(artifacts: dict[str, Artifact]) -> Iterator[ShownCurve]:
    for artifact in artifacts.values():
        for stage, points in artifact.manifest.curves.items():
            for metric, name in METRICS.items():
                drawn = [(p["step"], p[metric]) for p in points if {"step", metric} <= p.keys()]
                if drawn:
                    yield ShownCurve(stage, name, drawn)
