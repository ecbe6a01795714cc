"""What runs again and what does not: settings, code, data, paths, spoilt artifacts."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import system

from stages.runner import installed_versions, plan, run_stage

ROOT = Path(__file__).resolve().parents[1]
AFTER = {
    "report": ["report"],
    "evaluate": ["evaluate", "report"],
    "train_policy": ["train_policy", "evaluate", "report"],
    "pair": ["pair", "logps", "train_policy", "evaluate", "report"],
    "reject": ["reject", "pair", "logps", "train_policy", "evaluate", "report"],
    "decode": ["decode", "score", "reject", "pair", "logps", "train_policy", "evaluate", "report"],
    "gold": ["train_gold_ranker", "evaluate", "report"],
}
AFTER["ranker"] = ["train_ranker", *AFTER["decode"][1:]]
AFTER["compare"] = ["compare", "train_ranker", "train_gold_ranker", *AFTER["decode"][1:]]
AFTER["sft"] = ["train_sft", *AFTER["compare"][:3], *AFTER["decode"]]
EVERYTHING = ["prepare", *AFTER["sft"]]


def not_cached(run: system.Run, *overrides: str) -> list[str]:
    return [name for name, status in system.statuses(run, *overrides).items() if status != "cached"]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("report.title=Another", AFTER["report"]),
        ("evaluate.num_prompts=7", AFTER["evaluate"]),
        ("evaluate.num_kl_prompts=0", AFTER["evaluate"]),
        ("train_policy.gamma=0.5", AFTER["train_policy"]),
        ("train_policy.loss=hinge_norm", AFTER["train_policy"]),
        ("train_policy.freeze_layers=1", AFTER["train_policy"]),
        ("pair.ranking=tournament", AFTER["pair"]),
        ("reject.beta=0.25", AFTER["reject"]),
        ("reject.duplicates=collapse", AFTER["reject"]),
        ("decode.num_samples=8", AFTER["decode"]),
        ("decode.sampling.temperature=0.9", AFTER["decode"]),
        ("train_gold_ranker.learning_rate=0.01", AFTER["gold"]),
        ("train_ranker.orders=flip", AFTER["ranker"]),
        ("comparisons.num_samples=5", AFTER["compare"]),
        ("train_sft.epochs=2", AFTER["sft"]),
        ("templates.instruction='Say: {prompt}'", AFTER["sft"]),
        ("compute.attention=eager", AFTER["sft"]),
        ("prepare.max_prompt_tokens=119", EVERYTHING),
        ("seed=1", EVERYTHING),
    ],
)
def test_plan_with_a_setting_changed_runs_what_sees_it_and_what_follows(
    finished: system.Run, setting: str, expected: list[str]
) -> None:
    assert not_cached(finished, setting) == expected


@pytest.mark.parametrize(
    "setting",
    [
        "compute.token_budget=512",
        "compute.device=auto",
        "train_policy.token_budget=512",
        "train_sft.checkpoint_steps=7",
        "beam.options={direct_num_workers: 2}",
        # The default, written out.
        "train_policy.gamma=0.05",
    ],
)
def test_plan_with_nothing_that_changes_a_result_runs_nothing(
    finished: system.Run, setting: str
) -> None:
    assert not_cached(finished, setting) == []


def test_plan_with_gamma_changed_names_it(finished: system.Run) -> None:
    reasons = system.reasons(finished, "train_policy.gamma=0.5")
    assert reasons["train_policy"] == "train_policy.gamma: 0.05 -> 0.5"
    assert reasons["evaluate"] == "depends on train_policy"
    assert reasons["pair"] == "nothing changed"


def test_run_with_gamma_changed_makes_only_policy_evaluation_and_report(
    finished: system.Run, tmp_path: Path
) -> None:
    run = finished.copy(tmp_path / "store")
    was_cached = system.run_all(run.config("train_policy.gamma=0.5"))
    made = [name for name, cached in was_cached.items() if not cached]
    assert made == ["train_policy", "evaluate", "report"]
    # Both results are in the store now, and each config finds its own.
    assert not_cached(run) == not_cached(run, "train_policy.gamma=0.5") == []


def test_plan_in_an_empty_store_waits_for_what_is_above(
    finished: system.Run, tmp_path: Path
) -> None:
    empty = system.Run(finished.path, tmp_path / "store")
    assert system.reasons(empty)["prepare"] == "never run in this store"
    statuses = system.statuses(empty)
    assert statuses.pop("prepare") == "run" and set(statuses.values()) == {"waits"}
    assert not (tmp_path / "store").exists()


def test_plan_with_model_data_and_store_elsewhere_runs_nothing(
    finished: system.Run, tiny_llama_dir: str, tmp_path: Path
) -> None:
    run = finished.copy(tmp_path / "another store")
    shutil.copytree(tiny_llama_dir, tmp_path / "model")
    (source,) = finished.config().model_dump()["prepare"]["sources"]
    renamed = shutil.copy(source["path"], tmp_path / "renamed.jsonl")
    changes = [
        f"model={tmp_path / 'model'}",
        system.override("prepare.sources", [{**source, "path": str(renamed)}]),
    ]
    assert not_cached(run, *changes) == []


def test_plan_with_one_word_of_the_data_changed_says_so(
    finished: system.Run, tmp_path: Path
) -> None:
    (source,) = finished.config().model_dump()["prepare"]["sources"]
    changed = tmp_path / "changed.jsonl"
    changed.write_text(Path(source["path"]).read_text().replace("fox", "hen", 1))
    change = system.override("prepare.sources", [{**source, "path": str(changed)}])
    assert system.statuses(finished, change)["prepare"] == "run"
    assert system.reasons(finished, change)["prepare"] == "sources changed"


def test_plan_with_another_model_says_so(finished: system.Run, tiny_ranker_dir: str) -> None:
    reasons = system.reasons(finished, f"model={tiny_ranker_dir}")
    assert "model changed" in reasons["prepare"]
    assert system.statuses(finished, f"model={tiny_ranker_dir}")["train_sft"] == "waits"


def test_plan_with_an_input_changed_names_it(finished: system.Run, tmp_path: Path) -> None:
    run = finished.copy(tmp_path / "store")
    run_stage(run.graph("reject.beta=0"), "reject")
    reasons = system.reasons(run, "reject.beta=0")
    assert reasons["pair"] == "input accepted changed"
    assert reasons["logps"] == "depends on pair"


def test_plan_with_other_library_versions_warns_and_runs_nothing(
    finished: system.Run,
) -> None:
    planned = plan(finished.graph(), versions={**installed_versions(), "torch": "99.0"})
    assert {p.status for p in planned} == {"cached"}
    assert all("now 99.0" in p.warnings[0] and "torch" in p.warnings[0] for p in planned)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project's code."""
    root = tmp_path / "project"
    for package in ("schemas", "rso", "pipelines", "stages"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, root / package, ignore=ignore)
    shutil.copy(ROOT / "flows.py", root)
    return root


@pytest.fixture
def elsewhere(finished: system.Run, project: Path) -> system.Run:
    """The finished run as the copied code sees it."""
    return replace(finished, code=project)


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")


def test_plan_with_the_code_copied_elsewhere_runs_nothing(
    elsewhere: system.Run, project: Path
) -> None:
    assert not_cached(elsewhere) == []


def test_plan_with_comments_docstrings_and_layout_changed_runs_nothing(
    elsewhere: system.Run, project: Path
) -> None:
    files = list(project.rglob("*.py"))
    assert len(files) > 60
    for path in files:
        text = path.read_text(encoding="utf-8").replace('"""', '"""Changed. ', 1)
        path.write_text(f"# A comment.\n\n{text}\n\n\n# The end.\n", encoding="utf-8")
    assert not_cached(elsewhere) == []


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("rso/losses.py", AFTER["train_policy"]),
        ("rso/training/policy.py", AFTER["train_policy"]),
        ("rso/rejection.py", AFTER["reject"]),
        ("rso/pairing.py", AFTER["pair"]),
        ("stages/reject.py", AFTER["reject"]),
        ("stages/decode.py", AFTER["decode"]),
        ("rso/sources.py", EVERYTHING),
        ("rso/training/sft.py", AFTER["sft"]),
        ("stages/report.py", AFTER["report"]),
        ("rso/cli.py", []),
        ("rso/progress.py", []),
        ("flows.py", []),
        ("stages/runner.py", []),
    ],
)
def test_plan_with_code_changed_runs_the_stages_made_of_it_and_what_follows(
    elsewhere: system.Run, project: Path, file: str, expected: list[str]
) -> None:
    append(project / file, "\n_CHANGED = 1\n")
    assert not_cached(elsewhere) == expected
    if expected:
        module = file.removesuffix(".py").replace("/", ".")
        assert system.reasons(elsewhere)[expected[0]] == f"code of {module} changed"


def test_plan_with_the_style_of_the_report_changed_runs_only_the_report(
    elsewhere: system.Run, project: Path
) -> None:
    append(project / "rso/report.css", "\nbody { color: black }\n")
    assert not_cached(elsewhere) == ["report"]
    assert system.reasons(elsewhere)["report"] == "code of rso.report changed"


def test_run_with_code_changed_but_not_the_result_stops_there(
    elsewhere: system.Run, project: Path, tmp_path: Path
) -> None:
    run = elsewhere.copy(tmp_path / "store")
    append(project / "stages/reject.py", "\n_CHANGED = 1\n")
    assert not run_stage(run.graph(), "reject").is_cached
    assert not_cached(run) == []


def first_shard(run: system.Run, place: str) -> Path:
    stage, output = place.split("/")
    return Path(run.artifact(stage).shards(output)[0])


def flip(path: Path) -> None:
    """Flip a bit of the last byte of the first column."""
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start + column.total_compressed_size - 1] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def remove_manifest(path: Path) -> None:
    (path.parents[1] / "manifest.json").unlink()


@pytest.mark.parametrize("spoil", [truncate, Path.unlink, remove_manifest])
def test_run_with_a_spoilt_artifact_sets_it_aside_and_makes_it_again(
    finished: system.Run,
    tmp_path: Path,
    spoil: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = finished.real_copy(tmp_path / "store")
    before = {name: run.artifact(name).manifest for name in run.graph().table}
    spoil(first_shard(run, "score/rewards"))
    was_cached = system.run_all(run.config())
    assert [name for name, cached in was_cached.items() if not cached] == ["score"]
    fingerprint = before["score"].fingerprint
    assert (run.store / "score" / f"{fingerprint}.corrupt-1").is_dir()
    assert "set aside" in caplog.text and str(run.store) in caplog.text
    again = system.Run(run.path, run.store)
    for name, manifest in before.items():
        found = again.artifact(name).manifest
        assert found.digests == manifest.digests
        assert (found.created_at == manifest.created_at) == (name != "score")


def test_verify_reads_every_byte_where_use_looks_at_sizes(
    finished: system.Run, tmp_path: Path
) -> None:
    run = finished.real_copy(tmp_path / "store")
    flip(first_shard(run, "pair/pairs"))
    assert not_cached(run) == []
    graph = run.graph()
    problems = {name: graph.store.verify(run.artifact(name)) for name in graph.table}
    (problem,) = problems.pop("pair")
    assert "other bytes" in problem and not any(problems.values())


def test_stage_reading_a_flipped_byte_refuses_instead_of_training_on_it(
    finished: system.Run, tmp_path: Path
) -> None:
    run = finished.real_copy(tmp_path / "store")
    flip(first_shard(run, "reject/accepted"))
    with pytest.raises(Exception, match="rso verify"):
        run_stage(run.graph(), "pair", force=True)
    assert not_cached(run) == []


def test_plan_with_an_artifact_deleted_says_so(finished: system.Run, tmp_path: Path) -> None:
    run = finished.copy(tmp_path / "store")
    shutil.rmtree(Path(run.artifact("logps").directory))
    assert system.statuses(run)["logps"] == "run"
    assert system.reasons(run)["logps"] in (
        "the artifact was removed or set aside",
        "never run in this store",
    )
    # Its content is not known until it is made again.
    assert system.statuses(run)["train_policy"] == "waits"


@pytest.fixture(autouse=True)
def _the_shared_run_is_left_as_it_was(finished: system.Run) -> Iterator[None]:
    before = sorted(finished.store.rglob("*"))
    yield
    assert sorted(finished.store.rglob("*")) == before
