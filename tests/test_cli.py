"""The command line: what it prints, and one clear sentence with exit code 2 for bad input."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pandas
import pyarrow.parquet as pq
import pytest
import system
import yaml
from transformers import PreTrainedTokenizerBase

from rso import cli
from rso.config import load_config
from rso.errors import UserError
from rso.templates import encode_prompt
from schemas import SCHEMAS, sort_keys

ROOT = Path(__file__).resolve().parents[1]


class Answer(NamedTuple):
    """What a command answered."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The answer to --json."""
        assert self.code == 0, self.err
        return json.loads(self.out)


Rso = Callable[..., Answer]


@pytest.fixture
def rso(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Rso:
    """Return a function that answers a command line in this process."""

    def call(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["rso", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        return Answer(code, *capsys.readouterr())

    monkeypatch.delenv("RSO_CONFIG", raising=False)
    # As wide as a page: tables are not broken.
    monkeypatch.setenv("COLUMNS", "200")
    return call


def refusal(answer: Answer) -> str:
    """Return the one sentence with which a user's mistake was refused."""
    assert answer.code == 2, answer
    assert "Traceback" not in answer.out + answer.err
    errors = [line for line in answer.err.splitlines() if line.startswith("error: ")]
    (line,) = errors
    assert answer.err.strip().splitlines()[-1] == line and len(line) < 700, answer.err
    return line


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, resource; sys.argv = ['rso', '--help']\n"
        "from rso.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "use = resource.getrusage(resource.RUSAGE_SELF)\n"
        "heavy = {'torch', 'vllm', 'pyarrow', 'transformers', 'prefect', 'apache_beam', 'pandas'}\n"
        "print(use.ru_utime + use.ru_stime, sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    seconds = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        taken, _, modules = done.stderr.strip().partition(" ")
        assert modules == "[]"
        assert "run" in done.stdout and "plan" in done.stdout
        seconds.append(float(taken))
    assert min(seconds) < 0.5


def test_plan_of_a_finished_run_as_json(rso: Rso, finished: system.Run) -> None:
    planned = rso("plan", finished.path, "--json").json
    assert [p["stage"] for p in planned] == list(finished.graph().table)
    assert {p["status"] for p in planned} == {"cached"}
    assert all(re.fullmatch("[0-9a-f]{64}", p["fingerprint"]) for p in planned)


def test_plan_prints_the_reason(rso: Rso, finished: system.Run) -> None:
    answer = rso("plan", finished.path, "--set", "train_policy.gamma=0.5")
    assert answer.code == 0
    assert "train_policy.gamma: 0.05 -> 0.5" in answer.out
    assert "depends on train_policy" in answer.out


def test_run_of_a_finished_run_prints_the_results(
    rso: Rso, finished: system.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_run_flow", lambda *_: pytest.fail("the flow was started"))
    answer = rso("run", finished.path)
    assert (answer.code, answer.err) == (0, "all 13 stages are cached\n")
    assert "win rate" in answer.out.lower() and "gold" in answer.out
    page = re.search(r"report +(\S+report\.html)", answer.out)
    assert page is not None and Path(page[1]).is_file()
    found = rso("run", finished.path, "--json").json
    assert found["metrics"] == finished.rows("evaluate/metrics")
    assert all(Path(place).exists() for place in found["places"].values())
    assert len(found["places"]) == sum(len(s.writes) for s in finished.graph().table.values()) + 1
    assert rso("report", finished.path, "--json").json == found


def test_path_prints_a_folder_for_pandas(rso: Rso, finished: system.Run) -> None:
    answer = rso("path", "pair/pairs", "--config", finished.path)
    assert answer.out.count("\n") == 1
    assert len(pandas.read_parquet(answer.out.strip())) == len(finished.rows("pair/pairs"))
    whole = rso("path", "pair", "-c", finished.path)
    assert answer.out.strip() == f"{whole.out.strip()}/pairs"


def test_show_prints_counts_and_rows(rso: Rso, finished: system.Run) -> None:
    answer = rso("show", "decode", "--config", finished.path, "--rows", 2)
    assert "candidates: 96 rows" in answer.out and answer.out.count("response_id = ") == 2
    manifest = rso("show", "decode", "--config", finished.path, "--json").json
    assert manifest["rows"] == {"candidates": 96}
    by_prefix = f"decode@{manifest['fingerprint'][:10]}"
    assert rso("show", by_prefix, "--config", finished.path, "--json").json == manifest
    only = rso("show", "prepare/prompts", "--config", finished.path)
    assert "prompts: 60 rows" in only.out and "quarantine:" not in only.out


def test_ls_lists_the_artifacts_newest_first(rso: Rso, finished: system.Run) -> None:
    listed = rso("ls", "--config", finished.path, "--json").json
    assert [row["stage"] for row in listed] == [*reversed(finished.graph().table)]
    assert "candidates 96" in rso("ls", "--config", finished.path).out


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema_prints_every_column(rso: Rso, name: str) -> None:
    answer = rso("schema", name)
    assert answer.code == 0
    found = rso("schema", name, "--json").json
    assert [f["name"] for f in found["fields"]] == SCHEMAS[name].names
    assert found["sort_by"] == sort_keys(name) and all(f["meaning"] for f in found["fields"])
    assert all(field.name in answer.out for field in SCHEMAS[name])


def test_stage_alone_answers_from_the_store_and_forces(
    rso: Rso, finished: system.Run, tmp_path: Path
) -> None:
    run = finished.copy(tmp_path / "store")
    here = ("--config", run.path, "--set", f"store={run.store}", "--json")
    assert rso("stage", "reject", *here).json["is_cached"]
    forced = rso("stage", "reject", *here, "--force").json
    assert not forced["is_cached"] and forced["rows"] == {"accepted": 96, "diagnostics": 64}


def test_stage_with_an_input_from_a_folder_is_another_artifact(
    rso: Rso, finished: system.Run, tmp_path: Path
) -> None:
    run = finished.copy(tmp_path / "store")
    folder = tmp_path / "my rewards"
    shutil.copytree(run.artifact("score").output("rewards"), folder)
    here = ("--config", run.path, "--set", f"store={run.store}", "--json")
    # The same rows in another folder are the same input.
    same = rso("stage", "reject", *here, "--input", f"rewards={folder}").json
    assert same["is_cached"]
    for path in folder.iterdir():
        table = pq.read_table(path)
        rewards = pandas.Series(table["reward"].to_pylist(), dtype="float32") * 2
        index = table.schema.get_field_index("reward")
        table = table.set_column(index, table.schema.field("reward"), [rewards.to_numpy()])
        pq.write_table(table, path)
    other = rso("stage", "reject", *here, "--input", f"rewards={folder}").json
    assert not other["is_cached"] and other["fingerprint"] != same["fingerprint"]
    assert system.statuses(run)["pair"] == "cached"


def test_export_writes_the_pairs_for_another_trainer(
    rso: Rso, finished: system.Run, tmp_path: Path
) -> None:
    out = tmp_path / "pairs.jsonl"
    here = ("export", "pairs", "--config", finished.path, "--out", out, "--format", "trl")
    answer = rso(*here)
    pairs = finished.rows("pair/pairs")
    load = f'datasets.load_dataset("json", data_files="{out}", split="train")'
    assert answer.out.splitlines() == [f"{len(pairs)} pairs  {out}", load]
    written = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["pair_id"] for row in written] == [row["pair_id"] for row in pairs]
    assert "--force" in refusal(rso(*here))
    assert rso(*here, "--force", "--split", "train", "--json").json == {
        "format": "trl",
        "rows": len(pairs),
        "path": str(out),
        "dataset_info": None,
        "load": load,
    }


def test_export_holds_the_text_of_the_ids_of_direct_pairs(
    rso: Rso,
    finished: system.Run,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    people = system.write_human_comparisons(tmp_path / "people.jsonl")
    sources = [*finished.config().model_dump()["prepare"]["sources"], people]
    changes = [
        f"store={tmp_path / 'store'}",
        system.override("prepare.sources", sources),
        "comparisons.labeller=null",
        "pair.source=direct",
        "templates.prompt='{prompt} In short:'",
        "templates.response_prefix=' '",
    ]
    here = ("--config", finished.path, *(word for change in changes for word in ("--set", change)))
    out = ("--format", "llama-factory", "--out", tmp_path / "pairs.parquet")
    assert "stage pair has no artifact" in refusal(rso("export", "pairs", *here, *out))
    config = system.load(finished.path, *changes)
    system.run_all(config, until="pair")
    answer = rso("export", "pairs", *here, *out)
    assert answer.code == 0, answer.err
    assert f"described as 'pairs' in {tmp_path / 'dataset_info.json'}" in answer.out
    artifact = system.graph_of(config).find("pair")
    assert artifact is not None
    pairs = artifact.read("pairs").to_pylist()
    written = pq.read_table(tmp_path / "pairs.parquet").to_pylist()
    assert len(written) == len(pairs) > 0
    for row, pair in zip(written, pairs, strict=True):
        prompt = tiny_tokenizer.encode(row["instruction"], add_special_tokens=False)
        assert prompt == encode_prompt(tiny_tokenizer, config.templates, pair["prompt"])
        for side in ("chosen", "rejected"):
            ids = tiny_tokenizer.encode(row[side], add_special_tokens=False)
            assert ids == pair[f"{side}_token_ids"]


def flip_a_byte(run: system.Run, place: str) -> None:
    stage, output = place.split("/")
    path = Path(run.artifact(stage).shards(output)[0])
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_verify_says_which_artifact_is_spoilt_with_exit_code_1(
    rso: Rso, finished: system.Run, tmp_path: Path
) -> None:
    run = finished.real_copy(tmp_path / "store")
    here = ("--config", run.path, "--set", f"store={run.store}")
    whole = rso("verify", *here)
    assert (whole.code, whole.out) == (0, "13 artifacts are whole, 0 are not\n")
    flip_a_byte(run, "pair/pairs")
    spoilt = rso("verify", *here)
    file = "pairs/part-00000-of-00003.parquet"
    assert spoilt.code == 1 and "12 artifacts are whole, 1 are not" in spoilt.out
    assert re.search(rf"^pair@[0-9a-f]{{12}}: {file} has other bytes", spoilt.out)
    assert rso("verify", "pair", *here).code == 1
    assert rso("verify", "logps", *here).code == 0
    # Looking changes nothing.
    assert system.statuses(run)["pair"] == "cached"


def test_plan_and_run_with_verify_notice_a_flipped_byte(
    rso: Rso, finished: system.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished.real_copy(tmp_path / "store")
    flip_a_byte(run, "pair/pairs")

    def flow(config: Path, overrides: list[str]) -> None:
        assert system.run_all(system.load(config, *overrides))["pair"] is False

    monkeypatch.setattr(cli, "_run_flow", flow)
    answer = rso("run", run.path, "--set", f"store={run.store}", "--verify")
    assert answer.code == 0
    device, stages = answer.err.splitlines()[-2:]
    assert re.fullmatch(r"cpu, float32: compute.dtype says so; \d+ threads?", device)
    # All that follow `pair` wait for it. Only `pair` has no artifact to tell how long it takes.
    assert re.match(
        "1 stage has to run, up to 4 more depend on it: at most about .* from a one-second", stages
    )
    assert "to run" not in answer.out
    assert list((run.store / "pair").glob("*.corrupt-1"))
    assert rso("verify", "--config", run.path, "--set", f"store={run.store}").code == 0


def test_bad_input_missing_config(rso: Rso, tmp_path: Path) -> None:
    said = refusal(rso("plan", tmp_path / "absent.yaml"))
    assert "absent.yaml" in said and "No such file" in said and "quickstart.yaml" in said


@pytest.mark.parametrize("text", ["a: [1", "- a\n- b\n", "", "just words"])
def test_bad_input_config_that_is_no_mapping(rso: Rso, tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    sentence = refusal(rso("plan", tmp_path / "bad.yaml"))
    assert sentence.startswith("error: config ") and "bad.yaml" in sentence


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("decode.num_sample=3", ["'decode.num_sample'", "did you mean 'num_samples'"]),
        ("rejct.beta=3", ["'rejct'", "did you mean 'reject'"]),
        ("decode.sampling.temprature=1", ["did you mean 'temperature'"]),
        ("decode.num_samples=many", ["decode.num_samples", "integer", "'many'"]),
        ("decode.num_samples=0", ["decode.num_samples", "greater than or equal to 1", "0"]),
        ("reject=3", ["reject", "3"]),
        ("reject.beta.x=3", ["'beta' is a value"]),
        ("reject.beta", ["expected stage.key=value"]),
        ("reject.beta=[", ["reject.beta"]),
        ("train_policy.loss=dpo", ["train_policy.loss", "sigmoid_norm", "'dpo'"]),
        ("train_policy={loss: rrhf, gamma: 0.1}", ["train_policy.gamma", "0.1", "rrhf"]),
        ("comparisons.labeller=people", ["comparisons.labeller", "'people'", "summary_quality"]),
    ],
)
def test_bad_input_settings(rso: Rso, finished: system.Run, setting: str, said: list[str]) -> None:
    sentence = refusal(rso("plan", finished.path, "--set", setting))
    assert all(part in sentence for part in said), sentence


def with_source(run: system.Run, path: Path, **changes: object) -> str:
    (source,) = run.config().model_dump()["prepare"]["sources"]
    return system.override("prepare.sources", [{**source, "path": str(path), **changes}])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, ["absent.jsonl", "No such file", "prepare.sources"]),
        ("", ["questions", "empty"]),
        ("\n\n", ["holds no rows"]),
        (
            '{"body": "", "line": "x", "module": "m"}\n',
            ["all 1 rows", "prepare.sources"],
        ),
        ('{"text": "a", "line": "x", "module": "m"}\n', ["no field 'body'", "'text'"]),
        ("not json\n", ["all 1 rows", "refused"]),
    ],
)
def test_bad_input_data(
    rso: Rso, finished: system.Run, tmp_path: Path, content: str | None, said: list[str]
) -> None:
    path = tmp_path / "absent.jsonl"
    if content is not None:
        path.write_text(content)
    store = tmp_path / "store"
    here = ("--set", f"store={store}", "--set", with_source(finished, path))
    sentence = refusal(rso("stage", "prepare", "--config", finished.path, *here))
    assert all(part in sentence for part in said), sentence
    assert not list(store.rglob("manifest.json"))


def test_bad_input_prompt_longer_than_the_context_names_it(
    rso: Rso, finished: system.Run, tmp_path: Path, make_llama: Callable[..., str]
) -> None:
    run = finished.copy(tmp_path / "store")
    short = make_llama(tmp_path / "short", max_position_embeddings=32)
    here = ("--config", run.path, "--set", f"store={run.store}")
    sentence = refusal(rso("stage", "decode", *here, "--input", f"reference={short}"))
    ids = {row["prompt_id"] for row in run.rows("prepare/prompts")}
    assert set(re.findall(r"\b[0-9a-f]{16}\b", sentence)) <= ids
    assert re.search(r"prompt [0-9a-f]{16} has \d+ tokens, expected 1 to 24", sentence)
    assert "max_new_tokens" in sentence
    assert system.statuses(run)["decode"] == "cached"


def test_bad_input_model_without_a_tokenizer(
    rso: Rso, finished: system.Run, tiny_llama_dir: str, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_llama_dir, bare, ignore=shutil.ignore_patterns("*token*", "*.jinja"))
    here = ("--set", f"store={tmp_path / 'store'}", "--set", f"model={bare}")
    sentence = refusal(rso("stage", "prepare", "--config", finished.path, *here))
    assert str(bare) in sentence and "no tokenizer" in sentence and "save the tokenizer" in sentence


@pytest.mark.parametrize("model", ["/nowhere/at/all", "package:no_such_package/model.gguf"])
def test_bad_input_model_that_is_not_there(
    rso: Rso, finished: system.Run, tmp_path: Path, model: str
) -> None:
    here = ("--set", f"store={tmp_path / 'store'}", "--set", f"model={model}")
    sentence = refusal(rso("stage", "prepare", "--config", finished.path, *here))
    assert model.split(":")[-1].split("/")[0] in sentence


def test_bad_input_store_that_cannot_be_written(
    rso: Rso, finished: system.Run, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("precious")
    for store in (tmp_path / "file", tmp_path / "file" / "store"):
        here = ("--config", finished.path, "--set", f"store={store}")
        sentence = refusal(rso("stage", "prepare", *here))
        assert str(store) in sentence and "cannot be written" in sentence, sentence
        assert "set `store`" in sentence
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["stage", "distil"], ["'distil'", "prepare, train_sft"]),
        (["path", "distil"], ["'distil'", "prepare, train_sft"]),
        (["show", "pair@ffffffff"], ["pair/ffffffff"]),
        (["path", "pair/words"], ["'words'", "pairs"]),
        (["stage", "reject", "--input", "answers=x"], ["'answers'", "candidates, rewards"]),
        (["stage", "reject", "--input", "rewards"], ["NAME=PATH"]),
        (["stage", "reject", "--input", "rewards=/nowhere"], ["/nowhere", "rewards"]),
        (["verify", "distil"], ["'distil'"]),
        (
            ["export", "pairs", "--format", "dpo", "--out", "x.jsonl"],
            ["--format dpo", "trl, openrlhf, llama-factory"],
        ),
    ],
)
def test_bad_input_names(
    rso: Rso, finished: system.Run, command: list[str], said: list[str]
) -> None:
    sentence = refusal(rso(*command, "--config", finished.path))
    assert all(part in sentence for part in said), sentence


def test_bad_input_unknown_schema(rso: Rso) -> None:
    assert "candidates" in refusal(rso("schema", "candidate"))


def test_stage_whose_inputs_have_not_run_says_which(
    rso: Rso, finished: system.Run, tmp_path: Path
) -> None:
    here = ("--config", finished.path, "--set", f"store={tmp_path / 'store'}")
    sentence = refusal(rso("stage", "reject", *here))
    assert "decode, score" in sentence and "rso run" in sentence


def test_debug_shows_the_stack_trace(rso: Rso, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        rso("--debug", "plan", tmp_path / "absent.yaml")


def test_our_own_defect_is_exit_code_1(
    rso: Rso, finished: system.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_graph", lambda *_, **__: 1 / 0)
    answer = rso("plan", finished.path)
    assert answer.code == 1 and "Traceback" not in answer.err
    assert "internal error: ZeroDivisionError" in answer.err and "--debug" in answer.err


def test_override_under_a_yaml_alias_changes_the_place_named_alone(
    finished: system.Run, tmp_path: Path
) -> None:
    data = yaml.safe_load(finished.path.read_text())
    data["decode"]["sampling"] = data["comparisons"]["sampling"]
    path = system.write_config(tmp_path / "alias.yaml", data)
    assert "*id" in path.read_text()
    config = load_config(path, ["decode.sampling.temperature=0.3"])
    assert config.decode.sampling.temperature == 0.3
    assert config.comparisons.sampling.temperature == 1.0


def test_stage_process_ends_with_2_and_one_sentence(finished: system.Run, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "stages", "prepare", "--config", str(finished.path)]
    changes = ["--set", f"store={tmp_path}", "--set", with_source(finished, tmp_path / "absent")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *changes], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: .*absent.*\n", done.stderr)


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> None:
    logging.getLogger().setLevel(logging.WARNING)
