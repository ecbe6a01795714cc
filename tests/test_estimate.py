"""How long a run will take: counts of tokens, rates of a machine, and what earlier runs took."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import system
from hypothesis import given
from hypothesis import strategies as st

from rso import config as settings_module
from rso.artifact import Store
from rso.config import Config, dtype_reason, parse_config, resolve_auto
from stages.estimate import (
    DECODED,
    PREFILLED,
    START_SECONDS,
    TRAINED,
    Rates,
    estimate,
    look_ahead,
    num_parameters,
    rates,
    read_lengths,
    seconds,
)
from stages.machine import measure
from stages.token_counts import MARK_TOKENS, Lengths, Tokens, tokens

ROWS = {
    ("demonstrations", "train"): 1000.0,
    ("demonstrations", "validation"): 100.0,
    ("demonstrations", "test"): 100.0,
}
LENGTHS = Lengths(prompt=50.0, response=10.0, rows=ROWS)
JUDGED = 2 * (10 + MARK_TOKENS)


def config(**sections: Any) -> Config:
    """A config with some sections given."""
    base = {"model": "/model", "prepare": {"sources": []}, "comparisons": {"labeller": "length"}}
    merged = {**base, **sections}
    merged["comparisons"] = {**base["comparisons"], **sections.get("comparisons", {})}  # type: ignore[dict-item]
    return parse_config(merged, where="test")


@pytest.mark.parametrize(
    ("stage", "sections", "expected"),
    [
        ("prepare", {}, (0, 0, 0)),
        ("train_sft", {}, (1000 * 60, 0, 0)),
        ("train_sft", {"train_sft": {"max_examples": 200, "epochs": 2}}, (2 * 200 * 60, 0, 0)),
        ("train_sft", {"train_sft": {"max_steps": 5, "batch_size": 4}}, (20 * 60, 0, 0)),
        ("train_sft", {"train_sft": {"skip": True}}, (0, 0, 0)),
        (
            "compare",
            {"comparisons": {"num_prompts": 80, "num_validation_prompts": 20, "num_samples": 4}},
            (0, 100 * 50, 400 * 10),
        ),
        # Shorter than the responses of the files.
        (
            "decode",
            {"decode": {"num_prompts": 7, "num_samples": 16, "sampling": {"max_new_tokens": 8}}},
            (0, 7 * 50, 7 * 16 * 8),
        ),
        ("decode", {"decode": {"num_samples": 1}}, (0, 1000 * 50, 1000 * 10)),
        (
            "train_ranker",
            {
                "comparisons": {"num_prompts": 90, "num_validation_prompts": 6},
                "train_ranker": {"folds": [0, 1], "num_folds": 3},
            },
            (60 * (50 + 2 * JUDGED), 6 * (50 + 2 * JUDGED), 0),
        ),
        (
            "train_gold_ranker",
            {
                "comparisons": {"num_prompts": 90, "num_validation_prompts": 6},
                "train_gold_ranker": {"num_folds": 3, "max_comparisons": 12, "orders": "flip"},
            },
            (12 * (50 + JUDGED), 6 * (50 + 2 * JUDGED), 0),
        ),
        (
            "pair",
            {"decode": {"num_prompts": 10}, "reject": {"num_samples": 8}},
            (0, 10 * (50 + 4 * 2 * JUDGED), 0),
        ),
        ("pair", {"pair": {"source": "direct"}}, (0, 0, 0)),
        (
            "logps",
            {"decode": {"num_prompts": 10}, "pair": {"ranking": "tournament"}},
            (0, 10 * 50 + 10 * 7 * 20, 0),
        ),
        (
            "train_policy",
            {
                "decode": {"num_prompts": 10},
                "train_policy": {"num_evaluations": 2, "num_validation_prompts": 24},
            },
            (10 * 50 + 40 * 20, 48 * 50 + 48 * (50 + 2 * JUDGED), 48 * 10),
        ),
        (
            "train_policy",
            {
                "decode": {"num_prompts": 10},
                "targets": {"method": "raft"},
                "train_policy": {"loss": "cross_entropy", "num_validation_prompts": 1},
            },
            (10 * 60, 50 + 50 + 2 * JUDGED, 10),
        ),
    ],
)
def test_tokens_of_a_stage(
    stage: str, sections: dict[str, Any], expected: tuple[float, float, float]
) -> None:
    assert tokens(stage, config(**sections), LENGTHS) == pytest.approx(expected)


def test_tokens_of_evaluate_grow_with_judges_and_samplings() -> None:
    few = {"num_prompts": 20, "num_kl_prompts": 5}
    one = tokens("evaluate", config(evaluate={**few, "sampling": None}), LENGTHS)
    assert one.decoded == 45 * 10 and one.trained == 0
    both = tokens("evaluate", config(evaluate=few), LENGTHS)
    assert both.decoded == 85 * 10
    no_gold = tokens("evaluate", config(evaluate=few, train_gold_ranker=None), LENGTHS)
    assert both.prefilled - no_gold.prefilled == 4 * 20 * (50 + 2 * JUDGED)


def test_tokens_of_score_grow_with_rankers_and_orders() -> None:
    decode = {"num_prompts": 1, "num_samples": 4}
    one = tokens("score", config(decode=decode, score={"orders": "baseline-first"}), LENGTHS)
    assert one == Tokens(prefilled=50 + 5 * (10 + MARK_TOKENS))
    both = tokens("score", config(decode=decode, score={"orders": "both"}), LENGTHS)
    assert both.prefilled == one.prefilled + 8 * (10 + MARK_TOKENS)
    two = [{"name": "a"}, {"name": "b", "ranker": "/other"}]
    assert tokens("score", config(decode=decode, objectives={"rankers": two}), LENGTHS) == Tokens(
        prefilled=2 * both.prefilled
    )


def test_tokens_of_human_comparisons_are_those_of_the_files() -> None:
    rows = {("comparisons", "train"): 300.0, ("comparisons", "validation"): 30.0}
    people = config(comparisons={"labeller": None}, pair={"source": "direct"})
    counted = tokens("train_ranker", people, LENGTHS._replace(rows=rows))
    assert counted.trained == 300 / 2 * (50 + 2 * JUDGED)
    assert counted.prefilled == 30 * (50 + 2 * JUDGED)


def test_tokens_of_the_default_run_are_about_those_that_it_counted() -> None:
    """The budgets in the file are measured ones."""
    path = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
    loaded = system.load(path, "decode.engine=transformers")
    # Of 2,144 rows: 62 tokens a prompt, 12 a response.
    rows = {("demonstrations", "train"): 1560.0, ("demonstrations", "validation"): 257.0}
    lengths = Lengths(62.0, 11.7, {**rows, ("demonstrations", "test"): 321.0})
    examples = loaded.train_sft.max_examples or 1560
    counted = tokens("train_sft", loaded, lengths).trained
    assert counted == pytest.approx(74 * examples * loaded.train_sft.epochs, rel=0.1)
    answers = loaded.decode.num_samples * (loaded.decode.num_prompts or 1560)
    assert tokens("decode", loaded, lengths).decoded == pytest.approx(11.4 * answers, rel=0.1)


@given(st.floats(1e8, 1e15), st.floats(1e6, 1e12), st.floats(0, 1e9))
def test_time_is_linear_in_tokens_and_in_the_size_of_the_model(
    flops: float, parameters: float, count: float
) -> None:
    speed = rates(flops, parameters)
    for cost, work in zip(
        (TRAINED, PREFILLED, DECODED),
        (Tokens(count), Tokens(0, count), Tokens(0, 0, count)),
        strict=True,
    ):
        expected = START_SECONDS + cost * parameters * count / flops
        assert seconds(work, speed) == pytest.approx(expected)


def test_rates_are_those_that_were_seen_on_two_avx2_cores() -> None:
    found = rates(130e9, 135e6)
    assert found.trained == pytest.approx(200, rel=0.05)
    assert found.prefilled == pytest.approx(500, rel=0.05)
    assert 150 <= found.decoded <= 300
    assert seconds(Tokens(400, 600, 200), Rates(100, 200, 50)) == START_SECONDS + 4 + 3 + 4


def source(path: Path, **changes: Any) -> dict[str, Any]:
    return {"name": path.stem, "kind": "demonstrations", "path": str(path), **changes}


def test_lengths_are_means_of_the_first_rows(tmp_path: Path) -> None:
    people = [{"text": "x" * 40, "target": "y" * 8}, {"text": "x" * 80, "target": "y" * 16}]
    first = system.write_jsonl(tmp_path / "people.jsonl", [*people, {"text": "x" * 4000}])
    second = tmp_path / "asked.parquet"
    pq.write_table(pa.table({"prompt": ["x" * 40] * 5}), second)
    sources = [
        source(first, fields={"prompt": "text"}),
        source(second, kind="prompts", split="test"),
    ]
    prepare = {
        "sources": sources,
        "max_prompt_tokens": 100,
        "split": {"validation": 0.25, "test": 0},
    }
    found = read_lengths(config(prepare=prepare))
    assert found.prompt == pytest.approx((10 + 20 + 100 + 5 * 10) / 8)
    assert found.response == pytest.approx((2 + 4) / 2)
    assert found.rows[("demonstrations", "train")] == pytest.approx(0.75 * 3)
    assert found.rows[("prompts", "test")] == 5
    assert found.prompts("validation") == pytest.approx(0.75)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_rows_of_a_large_file_are_counted_from_the_first_ones(tmp_path: Path, suffix: str) -> None:
    rows = [{"prompt": f"{i:05d} " + "x" * (i % 7)} for i in range(2000)]
    path = tmp_path / f"asked.{suffix}"
    table = pa.Table.from_pylist(rows)
    if suffix == "jsonl":
        system.write_jsonl(path, rows)
    elif suffix == "csv":
        table.to_pandas().to_csv(path, index=False)
    else:
        pq.write_table(table, path)
    prepare = {"sources": [source(path, kind="prompts", split="train")]}
    asked = config(prepare=prepare, decode={"sampling": {"max_new_tokens": 17}})
    found = read_lengths(asked)
    assert found.prompts("train") == pytest.approx(2000, rel=0.1)
    # Nothing says how long responses are, so they are taken to be as long as they may be.
    assert found.response == 17


def test_parameters_of_models_by_their_files(
    tiny_llama_dir: str, make_adapters: Callable[..., str], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    expected = sum(p.numel() for p in model.parameters())
    assert num_parameters(tiny_llama_dir) == expected
    assert num_parameters(make_adapters(tiny_llama_dir, tmp_path / "adapters")) == expected
    # The sizes of files of SmolLM2-135M, 134.5 million parameters.
    for name, size in (("S-135M.Q4_1.gguf", 98_362_432), ("s.f16.gguf", 270_885_000)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
        assert num_parameters(str(tmp_path / name)) == pytest.approx(134.5e6, rel=0.1)
    (tmp_path / "unnamed.gguf").write_bytes(b"GGUF")
    assert num_parameters(str(tmp_path / "unnamed.gguf")) is None
    assert num_parameters("org/name@main") is None


def test_estimate_of_stages_that_ran_is_what_they_took(finished: system.Run) -> None:
    names = list(finished.graph().table)
    found = estimate(names, finished.config(), Store(str(finished.store)), None)
    took = [finished.artifact(name).manifest.timings["seconds"] for name in names]
    assert found.seconds == pytest.approx(sum(took) + len(names) * START_SECONDS)
    assert found.remembered == tuple(names) and not found.computed + found.unknown


def test_estimate_of_new_stages_is_by_tokens(finished: system.Run, tmp_path: Path) -> None:
    run, store = finished.config(), Store(str(tmp_path / "store"))
    names = list(finished.graph().table)
    size = num_parameters(run.model)
    assert size is not None
    lengths = read_lengths(run)
    found = estimate(names, run, store, 1e6)
    expected = [seconds(tokens(name, run, lengths), rates(1e6, size)) for name in names]
    assert found.seconds == pytest.approx(sum(expected))
    assert set(names) - set(found.computed) == {"prepare", "reject", "report"}
    assert not found.unknown + found.remembered
    # What is not known is left out, and named.
    gpu = estimate(names, run, store, None)
    assert gpu.seconds == 3 * START_SECONDS and gpu.unknown == found.computed
    hub = estimate(names, finished.config("model=org/name"), store, 1e6)
    assert hub.unknown == found.computed
    servers = ["compute.endpoints=[http://127.0.0.1:1/v1]", "decode.engine=vllm-server"]
    assert estimate(names, finished.config(*servers), store, 1e6).unknown == ("decode",)
    # The ranker's own size counts where it is what is run.
    other = estimate(["decode", "pair"], finished.config("decode.policy=org/name"), store, 1e6)
    assert (other.computed, other.unknown) == (("pair",), ("decode",))


def test_what_cannot_be_estimated_stops_no_run(
    finished: system.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path / "store"))
    absent = system.override("prepare.sources", [source(tmp_path / "absent.jsonl")])
    found = look_ahead(["prepare", "train_sft"], finished.config(absent), store)
    assert found.estimate is None
    # The machine was measured all the same.
    assert found.machine is not None and found.machine.threads == int(os.environ["OMP_NUM_THREADS"])
    assert found.machine.gpu is not None or found.machine.flops is not None
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert measure("float32", "cpu", seconds=0.0) is None


@pytest.mark.parametrize("answer", ["", "words", "[1]", "17", '{"threads": 1, "cores": 2}'])
def test_machine_is_unknown_where_the_answer_is_of_another_kind(
    answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{answer}'\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert measure("float32", "cpu", seconds=0.0) is None


def test_machine_is_measured_in_a_process_of_its_own() -> None:
    found = measure("float32", "cpu", seconds=0.2)
    assert found is not None and found.gpu is None
    assert found.flops is not None and found.flops > 1e6
    idle = measure("float32", "cpu", seconds=0.0)
    assert idle is not None and idle.flops is None


@pytest.mark.parametrize(
    ("flags", "asked", "dtype", "reason"),
    [
        ("fpu avx2", "auto", "float32", "this CPU has no bfloat16"),
        ("fpu avx512_bf16", "auto", "bfloat16", "this CPU computes in it (avx512_bf16)"),
        ("fpu amx_bf16", "auto", "bfloat16", "this CPU computes in it (amx_bf16)"),
        (None, "auto", "float32", "this CPU has no bfloat16"),
        ("fpu amx_bf16", "float32", "float32", "compute.dtype says so"),
        ("fpu amx_bf16", "bfloat16", "bfloat16", "compute.dtype says so"),
        (
            "fpu avx2",
            "bfloat16",
            "bfloat16",
            "compute.dtype says so; this CPU has no bfloat16 and emulates it slowly",
        ),
    ],
)
def test_dtype_has_the_reason_of_the_choice(
    flags: str | None,
    asked: str,
    dtype: str,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    cpuinfo = tmp_path / "cpuinfo"
    if flags is not None:
        cpuinfo.write_text(f"processor: 0\nflags: {flags}\n")
    monkeypatch.setattr(settings_module, "CPUINFO", cpuinfo)
    given = config(compute={"dtype": asked})
    assert dtype_reason(given.compute) == reason
    assert resolve_auto(given).compute.dtype == dtype
    # On the CPU of a machine with a GPU all is the same; `auto` takes the GPU.
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(settings_module, "DEVICES", tmp_path)
    on_cpu = config(compute={"dtype": asked, "device": "cpu"})
    assert dtype_reason(on_cpu.compute) == reason
    assert resolve_auto(on_cpu).compute.dtype == dtype
    if asked == "auto":
        assert dtype_reason(given.compute) == "the GPU computes in it"
        assert resolve_auto(given).compute.dtype == "bfloat16"
    else:
        assert dtype_reason(given.compute) == "compute.dtype says so"
