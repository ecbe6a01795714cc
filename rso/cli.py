"""The `rso` command: the composition root. Heavy libraries are imported inside the commands."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rso.errors import UserError

if TYPE_CHECKING:
    from rso.artifact import Artifact, Store
    from stages.runner import Graph, Planned

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""RSO: from an SFT policy and comparisons to an aligned policy, and a report to believe.

    Start with `rso run configs/quickstart.yaml`. A stage runs again only when its inputs, its
    settings or its code changed; `rso plan` says which and why.
    """,
)

ConfigArgument = Annotated[
    Path, typer.Argument(envvar="RSO_CONFIG", help="YAML file with the settings of the run.")
]
ConfigOption = Annotated[
    Path, typer.Option("--config", "-c", envvar="RSO_CONFIG", help="YAML file of the run.")
]
SetOption = Annotated[
    list[str],
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override one setting, e.g. --set reject.beta=0.25."
    ),
]
VerifyOption = Annotated[
    bool, typer.Option("--verify", help="Check every byte of what is reused; sizes always are.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace what is there already.")]
DEFAULT_CONFIG = Path("configs/quickstart.yaml")
CONSOLE_LEVEL = "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"

export = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Write datasets as files that other trainers read.",
)
app.add_typer(export, name="export")


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show stack traces.")] = False,
) -> None:
    """Options before the command; `main` reads --debug from the command line."""


@app.command("run")
def run_command(
    config: ConfigArgument = DEFAULT_CONFIG,
    set_: SetOption = [],  # noqa: B006 - typer reads the default, nothing changes it
    verify_bytes: VerifyOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run every stage that has something to do, then print the results.

    A finished run answers from the store at once. A killed run goes on where it stopped.
    """
    graph = _graph(config, set_, verify=verify_bytes)
    planned = _plan(graph)
    cached = {p.stage.name for p in planned if p.status == "cached"}
    if len(cached) < len(planned):
        _tell_what_to_expect(graph, planned, config, set_)
        _run_flow(config, set_)
        graph = _graph(config, set_)
    else:
        typer.echo(f"all {len(planned)} stages are cached", err=True)
    _print_results(graph, as_json, cached)


@app.command("plan")
def plan_command(
    config: ConfigArgument = DEFAULT_CONFIG,
    set_: SetOption = [],  # noqa: B006
    as_json: JsonOption = False,
) -> None:
    """Say of each stage whether it would run and why: which input, setting or code changed."""
    planned = _plan(_graph(config, set_))
    if as_json:
        _print_json(
            [
                {
                    "stage": p.stage.name,
                    "status": p.status,
                    "reason": p.reason,
                    "fingerprint": p.fingerprint,
                    "warnings": list(p.warnings),
                }
                for p in planned
            ]
        )
        return
    from rich.table import Table

    table = Table("stage", "status", "fingerprint", "why", box=None, header_style="bold")
    colours = {"cached": "green", "run": "yellow", "waits": "dim"}
    for p in planned:
        table.add_row(
            p.stage.name,
            f"[{colours[p.status]}]{p.status}[/]",
            (p.fingerprint or "")[:12],
            "; ".join([p.reason, *p.warnings]),
        )
    _console().print(table)


@app.command()
def stage(
    name: Annotated[str, typer.Argument(help="Name of the stage, see `rso plan`.")],
    config: ConfigOption = DEFAULT_CONFIG,
    set_: SetOption = [],  # noqa: B006
    force: Annotated[bool, typer.Option(help="Run even if the artifact is there.")] = False,
    inputs: Annotated[
        list[str],
        typer.Option("--input", metavar="NAME=PATH", help="Read this input from a folder."),
    ] = [],  # noqa: B006
    as_json: JsonOption = False,
) -> None:
    """Run one stage alone, in this process, with its inputs from the store or from folders."""
    from stages.runner import run_stage

    given = dict(_pair(text) for text in inputs)
    ran = run_stage(_graph(config, set_), name, force=force, given=given)
    if as_json:
        _print_json({"is_cached": ran.is_cached, **_summary(ran.artifact)})
        return
    word = "was there already" if ran.is_cached else "done"
    _console().print(f"{name} {word}: {ran.artifact.directory}", soft_wrap=True)


@app.command("ls")
def list_artifacts(
    config: ConfigOption = DEFAULT_CONFIG,
    set_: SetOption = [],  # noqa: B006
    as_json: JsonOption = False,
) -> None:
    """List the artifacts of the store, newest first."""
    artifacts = _store(config, set_).artifacts()
    if as_json:
        _print_json([_summary(artifact) for artifact in artifacts])
        return
    from rich.table import Table

    table = Table("stage", "fingerprint", "made", "rows", "size", "seconds", box=None)
    for artifact in artifacts:
        manifest = artifact.manifest
        table.add_row(
            artifact.stage,
            artifact.fingerprint[:12],
            manifest.created_at[:19].replace("T", " "),
            ", ".join(f"{name} {rows:,}" for name, rows in manifest.rows.items()),
            _size(sum(file.size for file in manifest.files)),
            f"{manifest.timings.get('seconds', 0):.1f}",
        )
    _console().print(table)


@app.command()
def show(
    artifact: Annotated[
        str, typer.Argument(help="STAGE, STAGE/OUTPUT or STAGE@FINGERPRINT-PREFIX.")
    ],
    config: ConfigOption = DEFAULT_CONFIG,
    set_: SetOption = [],  # noqa: B006
    rows: Annotated[int, typer.Option(help="First rows of each dataset to print.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """Print an artifact: counts, settings, schema and first rows."""
    name, _, output = artifact.partition("/")
    found = _artifact(_graph(config, set_), name)
    if as_json:
        _print_json(found.manifest.model_dump(mode="json"))
        return
    console = _console()
    console.print(f"[bold]{found.stage}[/] {found.fingerprint}\n{found.directory}", soft_wrap=True)
    for counter, value in found.manifest.counters.items():
        console.print(f"  {counter:32} {value:,.6g}")
    for dataset, count in found.manifest.rows.items():
        if output and dataset != output:
            continue
        console.print(
            f"\n[bold]{dataset}[/]: {count:,} rows in {found.output(dataset)}", soft_wrap=True
        )
        for row in found.read(dataset).slice(0, rows).to_pylist():
            console.print(_short(row))


@app.command("schema")
def schema_command(
    name: Annotated[str, typer.Argument(help="Name of a dataset artifact, e.g. pairs.")],
    as_json: JsonOption = False,
) -> None:
    """Print the columns of a dataset artifact, with their meanings and units."""
    from schemas import SCHEMAS, sort_keys

    if name not in SCHEMAS:
        raise UserError(f"there is no schema {name!r}; expected one of {', '.join(SCHEMAS)}.")
    fields = [
        {
            "name": field.name,
            "type": str(field.type),
            "nullable": field.nullable,
            "meaning": field.metadata[b"meaning"].decode(),
            "unit": field.metadata.get(b"unit", b"").decode(),
        }
        for field in SCHEMAS[name]
    ]
    if as_json:
        _print_json({"name": name, "sort_by": sort_keys(name), "fields": fields})
        return
    from rich.table import Table

    table = Table("column", "type", "unit", "meaning", box=None, header_style="bold")
    for field in fields:
        kind = f"{field['type']}{' or null' if field['nullable'] else ''}"
        table.add_row(str(field["name"]), kind, str(field["unit"]), str(field["meaning"]))
    _console().print(SCHEMAS[name].metadata[b"meaning"].decode())
    _console().print(table)
    _console().print(f"unique by and sorted by {', '.join(sort_keys(name))}", style="dim")


@app.command()
def path(
    target: Annotated[str, typer.Argument(metavar="STAGE[/OUTPUT]", help="e.g. pair/pairs.")],
    config: ConfigOption = DEFAULT_CONFIG,
    set_: SetOption = [],  # noqa: B006
) -> None:
    """Print the folder of a stage or of one output, e.g. for `pandas.read_parquet`."""
    name, _, output = target.partition("/")
    artifact = _artifact(_graph(config, set_), name)
    typer.echo(artifact.output(output) if output else artifact.directory)


@app.command()
def verify(
    artifact: Annotated[
        str | None, typer.Argument(help="STAGE or STAGE@FINGERPRINT-PREFIX; all by default.")
    ] = None,
    config: ConfigOption = DEFAULT_CONFIG,
    set_: SetOption = [],  # noqa: B006
) -> None:
    """Check every byte of the artifacts against the digests in their manifests."""
    store = _store(config, set_)
    artifacts = [_artifact(_graph(config, set_), artifact)] if artifact else store.artifacts()
    problems = {f"{a.stage}@{a.fingerprint[:12]}": store.verify(a) for a in artifacts}
    for name, found in problems.items():
        for problem in found:
            typer.echo(f"{name}: {problem}")
    bad = sum(bool(found) for found in problems.values())
    typer.echo(f"{len(artifacts) - bad} artifacts are whole, {bad} are not")
    if bad:
        typer.echo("`rso run --verify` sets aside what it would use and builds it again")
        raise typer.Exit(1)


@app.command()
def report(
    config: ConfigArgument = DEFAULT_CONFIG,
    set_: SetOption = [],  # noqa: B006
    as_json: JsonOption = False,
) -> None:
    """Print the results of a finished run and where its HTML report is."""
    graph = _graph(config, set_)
    _print_results(graph, as_json, set(graph.table))


@export.command("pairs")
def export_pairs_command(
    form: Annotated[
        str, typer.Option("--format", metavar="trl|openrlhf|llama-factory", help="Which trainer.")
    ],
    out: Annotated[Path, typer.Option(help="File to write, .jsonl or .parquet.")],
    config: ConfigOption = DEFAULT_CONFIG,
    set_: SetOption = [],  # noqa: B006
    split: Annotated[
        str | None, typer.Option(help="Pairs of this split alone; all by default.")
    ] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write the preference pairs as one file for DPO training in another library.

    Each trainer builds from it the text that `rso` trains on. docs/export.md says how to start one.
    """
    from rso.export import export_pairs
    from rso.models import load_tokenizer, resolve_model

    graph = _graph(config, set_)
    done = export_pairs(
        _artifact(graph, "pair"),
        form,
        out,
        graph.config.templates,
        lambda: load_tokenizer(resolve_model(graph.config.model).location),
        split=split,
        force=force,
    )
    if as_json:
        _print_json({"format": form, **done._asdict(), "load": done.load})
        return
    typer.echo(f"{done.rows:,} pairs  {done.path}")
    if done.dataset_info is not None:
        typer.echo(f"described as {done.path.stem!r} in {done.dataset_info}")
    typer.echo(done.load)


def main() -> None:
    """Run the command line; exit code 2 is for the user's mistakes, 1 for defects of rso."""
    debug = "--debug" in sys.argv
    try:
        app(args=[argument for argument in sys.argv[1:] if argument != "--debug"])
    except UserError as error:
        if debug:
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except Exception as error:
        if debug:
            raise
        typer.echo(f"internal error: {type(error).__name__}: {error}", err=True)
        typer.echo("this is a defect of rso; run again with --debug for the stack trace", err=True)
        sys.exit(1)


def _graph(config: Path, overrides: list[str], *, verify: bool = False) -> "Graph":
    from rso.artifact import Store
    from rso.config import load_config, resolve_auto
    from stages.runner import Graph

    settings = resolve_auto(load_config(config, overrides))
    return Graph(settings, Store(settings.store), verify=verify)


def _store(config: Path, overrides: list[str]) -> "Store":
    from rso.artifact import Store
    from rso.config import load_config

    return Store(load_config(config, overrides).store)


def _plan(graph: "Graph") -> "list[Planned]":
    from stages.runner import plan as plan_stages

    return plan_stages(graph)


def _artifact(graph: "Graph", name: str) -> "Artifact":
    stage_name, _, prefix = name.partition("@")
    if prefix:
        return graph.store.open(f"{stage_name}/{prefix}")
    graph.stage(stage_name)
    artifact = graph.find(stage_name)
    if artifact is None:
        raise UserError(
            f"stage {stage_name} has no artifact with these settings in {graph.config.store}; "
            "`rso run` makes it, `rso ls` lists what there is."
        )
    return artifact


def _tell_what_to_expect(
    graph: "Graph", planned: "list[Planned]", config: Path, overrides: list[str]
) -> None:
    from rso.config import dtype_reason, load_config
    from stages.estimate import look_ahead
    from stages.telling import expectation, to_do

    names = [p.stage.name for p in planned if p.status != "cached"]
    ahead = look_ahead(names, graph.config, graph.store)
    # Load the settings again: the graph's have `auto` resolved.
    reason = dtype_reason(load_config(config, overrides).compute)
    stages = to_do(planned, graph.store)
    for line in expectation(graph.config.compute.dtype, reason, stages, ahead):
        typer.echo(line, err=True)


def _run_flow(config: Path, overrides: list[str]) -> None:
    from stages.process import guard_this_run

    # Before Prefect is imported: its temporary server must end with this run too.
    guard_this_run()
    _show_stages()
    from flows import REFUSED, rso_full

    state = rso_full(str(config), overrides, return_state=True)
    if not state.is_completed():
        raise typer.Exit(2 if state.name == REFUSED else 1)


def _show_stages() -> None:
    """Import Prefect so that one console handler, its or ours, prints each line about a stage."""
    level = os.environ.get("PREFECT_LOGGING_LEVEL") or "WARNING"
    console = os.environ.get(CONSOLE_LEVEL) or ("NOTSET" if _shows_info(level) else "WARNING")
    # This is the level of the console only: a server still gets all lines. Prefect reads it once.
    os.environ[CONSOLE_LEVEL] = console
    from flows import tell_on_stderr

    tell_on_stderr(is_on_console=_shows_info(console))


def _shows_info(level: str) -> bool:
    # Prefect refuses an unknown level itself.
    return logging.getLevelNamesMapping().get(level.upper(), logging.INFO) <= logging.INFO


def _print_results(graph: "Graph", as_json: bool, cached: set[str]) -> None:
    artifact = _artifact(graph, "report")
    metrics = _artifact(graph, "evaluate").read("metrics").to_pylist()
    places = {
        "report": f"{artifact.output('report')}/report.html",
        **{
            f"{name}/{output}": found.output(output)
            for name in graph.table
            if (found := graph.find(name)) is not None
            for output in graph.table[name].writes
        },
    }
    if as_json:
        _print_json({"metrics": metrics, "places": places})
        return
    from rso.report import stage_summary, terminal_table

    console = _console()
    stages = [
        stage_summary(found, is_cached=name in cached)
        for name in graph.table
        if (found := graph.find(name)) is not None
    ]
    console.print(terminal_table(metrics, stages))
    console.print(f"report   {places['report']}", soft_wrap=True)
    console.print(f"parquet  {graph.config.store}  (`rso path pair/pairs` prints one folder)")


def _summary(artifact: "Artifact") -> dict[str, Any]:
    return {
        "stage": artifact.stage,
        "fingerprint": artifact.fingerprint,
        "directory": artifact.directory,
        "created_at": artifact.manifest.created_at,
        "rows": dict(artifact.manifest.rows),
        "seconds": artifact.manifest.timings.get("seconds"),
    }


def _pair(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        raise UserError(f"--input {text}: expected NAME=PATH, e.g. --input pairs=my/pairs.")
    return name, value


def _short(row: dict[str, Any]) -> str:
    def cut(value: Any) -> str:
        text = repr(value)
        return text if len(text) <= 80 else f"{text[:77]}..."

    return "  " + "\n    ".join(f"{name} = {cut(value)}" for name, value in row.items())


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _console() -> Any:
    from rich.console import Console

    return Console(highlight=False)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, default=str))
