"""Several processes, full disks, memory savers, adapters: whatever surrounds the steps."""

import importlib.util
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_training import (
    BUDGET,
    INTERRUPTED,
    assert_same_weights,
    reference_logps,
    run_policy,
    run_ranker,
    run_sft,
    weights,
)
from test_training import pairs as policy_pairs
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from rso.config import Lora
from rso.decoding import Request, Sampling, load_decoder
from rso.errors import UserError
from rso.prefix import PrefixRow
from rso.training.steps import Step, TrainingExample

TESTS = str(Path(__file__).parent)
TRAIN = """
import json, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_training
from rso.models import load_tokenizer
from rso.training.base import TrainingDiverged

base, directory, what = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
changes = json.loads(sys.argv[4])
try:
    if what == "policy":
        tokenizer = load_tokenizer(base)
        evaluate = lambda model: [float(sum(p.double().sum() for p in model.parameters()))]
        result = test_training.run_policy(base, tokenizer, directory, evaluate=evaluate, **changes)
        curve = result.training.curve
    elif what == "ranker":
        curve = test_training.run_ranker(base, directory, **changes).training.curve
    else:
        curve = test_training.run_sft(base, directory, **changes).curve
except TrainingDiverged as error:
    print("diverged:", error)
    sys.exit(3)
(directory / f"curve-{{__import__('os').environ['RANK']}}.json").write_text(json.dumps(curve))
"""


def launch(
    tmp_path: Path, base: str, what: str, changes: dict[str, Any]
) -> "subprocess.CompletedProcess[str]":
    """Train by `accelerate launch` on two processes."""
    script = tmp_path / "train.py"
    script.write_text(TRAIN.format(tests=TESTS))
    directory = tmp_path / "two"
    directory.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    # On a CPU the launcher starts several processes under this name alone; they speak gloo.
    command += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "--main_process_port", "0"]
    command += [str(script), base, str(directory), what, json.dumps(changes)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def assert_same_curves(first: list[dict[str, float]], second: list[dict[str, float]]) -> None:
    assert len(first) == len(second)
    for ours, theirs in zip(first, second, strict=True):
        # before its first update all margins of a policy are rounding, and so are their signs
        has_signs = abs(ours.get("margin", 1.0)) > 1e-4
        ignored = {"seconds", "total_flos"} if has_signs else {"seconds", "total_flos", "accuracy"}
        for name in ours.keys() - ignored:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), (name, ours)
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


@pytest.mark.parametrize("what", ["sft", "ranker", "policy"])
def test_two_processes_give_the_curve_of_one(
    tiny_llama_dir: str, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, what: str
) -> None:
    """Five items a step and a last step of few, so that shares are uneven."""
    changes: dict[str, Any] = {"learning_rate": 1e-3, "checkpoint_steps": 2}
    if what == "policy":
        changes["num_evaluations"] = 2
    done = launch(tmp_path, tiny_llama_dir, what, changes)
    assert done.returncode == 0, done.stderr[-3000:]
    one = tmp_path / "one"
    if what == "policy":
        score = lambda model: [float(sum(p.double().sum() for p in model.parameters()))]  # noqa: E731
        result: Any = run_policy(tiny_llama_dir, tiny_tokenizer, one, evaluate=score, **changes)
        curve = result.training.curve
    elif what == "ranker":
        curve = run_ranker(tiny_llama_dir, one, **changes).training.curve
    else:
        curve = run_sft(tiny_llama_dir, one, **changes).curve
    for rank in (0, 1):
        found = json.loads((tmp_path / "two" / f"curve-{rank}.json").read_text())
        assert_same_curves(found, curve)
    ours, theirs = weights(tmp_path / "two"), weights(one)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)


def test_divergence_ends_all_processes_at_the_same_step(
    tiny_llama_dir: str, tmp_path: Path
) -> None:
    done = launch(tmp_path, tiny_llama_dir, "sft", {"learning_rate": 1e30, "max_grad_norm": 1e30})
    assert done.returncode != 0
    # Where one ends first, the launcher ends the other, maybe before it has said why.
    assert len(set(re.findall(r"diverged: train_sft, step (\d+) of", done.stdout))) == 1
    assert not (tmp_path / "two" / "model").exists()


@pytest.mark.parametrize("num_processes", [1, 2, 3, 7])
def test_shares_hold_every_row_once_and_have_one_length(num_processes: int) -> None:
    rows = [PrefixRow([1] * (3 + i % 4), [[2] * (1 + i)]) for i in range(5)]
    examples = [TrainingExample(f"p{i}", row) for i, row in enumerate(rows)]
    step = Step(examples, num_items=5, divisor=5.0, token_budget=12)
    shares = [step.share(rank, num_processes) for rank in range(num_processes)]
    dealt = [e.prompt_id for s in shares for batch in s.micro_batches for e in batch]
    assert sorted(dealt) == [f"p{i}" for i in range(5)]
    assert len({len(s.micro_batches) + len(s.stand_ins) for s in shares}) == 1


FULL = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_training
from rso.errors import UserError
from transformers import Trainer

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save = Trainer._save_checkpoint
def save_on_a_full_disk(self, model, trial):
    if self.state.global_step == 6:
        # No file may grow further: what a write to a full disk does, by another number.
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    save(self, model, trial)
Trainer._save_checkpoint = save_on_a_full_disk
try:
    test_training.run_sft(sys.argv[1], Path(sys.argv[2]), **test_training.INTERRUPTED)
except UserError as error:
    print(error)
    sys.exit(2)
"""


@pytest.mark.slow
def test_full_disk_while_saving_says_so_and_keeps_the_earlier_checkpoint(
    tiny_llama_dir: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", FULL.format(tests=TESTS), tiny_llama_dir, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr[-3000:]
    assert "train_sft: the disk is full" in done.stdout and "run again" in done.stdout
    assert [p.name for p in (tmp_path / "work").glob("checkpoint-*")] == ["checkpoint-4"]
    # With room again it goes on, to the weights of a run that met no full disk.
    run_sft(tiny_llama_dir, tmp_path, **INTERRUPTED)
    run_sft(tiny_llama_dir, tmp_path / "whole", **INTERRUPTED)
    assert_same_weights(tmp_path, tmp_path / "whole")


def test_gradient_checkpointing_gives_the_same_weights(
    tiny_llama_dir: str,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    backward = torch.utils.checkpoint.checkpoint

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[0])
        return backward(*args, **kwargs)

    run_policy(tiny_llama_dir, tiny_tokenizer, tmp_path / "plain")
    monkeypatch.setattr("transformers.modeling_utils.checkpoint", counted)
    run_policy(tiny_llama_dir, tiny_tokenizer, tmp_path / "saved", gradient_checkpointing=True)
    assert calls, "nothing was checkpointed"
    for name, ours in weights(tmp_path / "saved").items():
        torch.testing.assert_close(ours, weights(tmp_path / "plain")[name], rtol=1e-5, atol=1e-6)


def test_max_steps_stops_there(tiny_llama_dir: str, tmp_path: Path) -> None:
    whole = run_sft(tiny_llama_dir, tmp_path / "a")
    part = run_sft(tiny_llama_dir, tmp_path / "b", max_steps=2)
    assert part.num_steps == 2 < whole.num_steps
    assert [e["loss"] for e in part.curve] == [e["loss"] for e in whole.curve[:2]]


def test_reporter_that_is_not_installed_is_named(tiny_llama_dir: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="report_to names wandb, which is not installed"):
        run_sft(tiny_llama_dir, tmp_path, report_to=("wandb",))


LORA = Lora(rank=4, alpha=8.0)


def test_adapters_are_merged_into_what_is_written(
    tiny_llama_dir: str, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """The written model, plain, has the win rates' logits that training saw in its last step."""
    seen: list[Tensor] = []
    ids = torch.tensor([[5, 6, 7, 8]])

    def evaluate(model: nn.Module) -> list[float]:
        seen.append(model(input_ids=ids).logits)
        return [float(len(seen))]

    result = run_policy(
        tiny_llama_dir,
        tiny_tokenizer,
        tmp_path,
        evaluate=evaluate,
        lora=LORA,
        epochs=4,
        learning_rate=1e-2,
    )
    assert result.step_zero_difference == pytest.approx(0, abs=1e-5)
    assert result.training.curve[-1]["margin"] > 1
    before, after = load_file(Path(tiny_llama_dir) / "model.safetensors"), weights(tmp_path)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("_proj" in name for name in changed)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    torch.testing.assert_close(opened(input_ids=ids).logits, seen[-1])
    # What was written is what was trained: its margins are those of the last steps.
    rows = policy_pairs(tiny_tokenizer)
    trained = reference_logps(str(tmp_path / "model"), tiny_tokenizer, rows)
    reference = reference_logps(tiny_llama_dir, tiny_tokenizer, rows)
    gain = {key: trained[key] - reference[key] for key in trained}
    margins = [gain[r.prompt_id, r.chosen_id] - gain[r.prompt_id, r.rejected_id] for r in rows]
    assert sum(margins) / len(margins) > 1


@pytest.mark.slow
def test_merged_adapters_open_with_vllm(tiny_llama_dir: str, tmp_path: Path) -> None:
    run_sft(tiny_llama_dir, tmp_path, lora=LORA, epochs=4, learning_rate=1e-2)
    directory = str(tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = [5, 6, 7, 8]
    expected = plain.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=8)[0, 4:]
    decoder = load_decoder("vllm", directory, dtype="float32", max_model_len=64)
    greedy = Sampling(temperature=0.0, top_k=0, max_new_tokens=8)
    ((found,),) = decoder.decode([Request("p", ids)], greedy, seed=0)
    decoder.close()
    assert found.token_ids == expected.tolist()


def test_tensorboard_gets_the_curve(
    tiny_llama_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("tensorboard") is None:
        with pytest.raises(UserError, match="report_to names tensorboard, which is not installed"):
            run_sft(tiny_llama_dir, tmp_path, report_to=("tensorboard",))
        return
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    result = run_sft(tiny_llama_dir, tmp_path, report_to=("tensorboard",))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = (tmp_path / "logs").rglob("events.*")
    events = EventAccumulator(str(file))
    events.Reload()
    losses = [scalar.value for scalar in events.Scalars("train/loss")]
    assert losses == pytest.approx([entry["loss"] for entry in result.curve], rel=1e-3)


def test_adapters_resume_to_the_same_weights(tiny_llama_dir: str, tmp_path: Path) -> None:
    script = f"""
import os, signal, sys
sys.path.insert(0, {TESTS!r})
from pathlib import Path
import test_training, test_training_operations as here
from transformers import Trainer
save = Trainer._save_checkpoint
def save_and_die(self, model, trial):
    save(self, model, trial)
    if self.state.global_step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
Trainer._save_checkpoint = save_and_die
test_training.run_sft(sys.argv[1], Path(sys.argv[2]), lora=here.LORA, **test_training.INTERRUPTED)
"""
    command = [sys.executable, "-c", script, tiny_llama_dir, str(tmp_path / "a")]
    assert subprocess.run(command, timeout=300).returncode == -signal.SIGKILL
    run_sft(tiny_llama_dir, tmp_path / "a", lora=LORA, **INTERRUPTED)
    run_sft(tiny_llama_dir, tmp_path / "b", lora=LORA, **INTERRUPTED)
    assert_same_weights(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": LORA, "freeze_layers": 1}, "lora trains adapters alone"),
        ({"lora": Lora(modules=("nothing",))}, "train_sft.lora.modules: nothing fits no layer"),
        (
            {"lora": Lora(modules=("embed_tokens",))},
            "train_sft.lora.modules: model.embed_tokens is a Embedding; adapters are for linear",
        ),
    ],
)
def test_adapters_that_cannot_be_are_refused(
    tiny_llama_dir: str, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run_sft(tiny_llama_dir, tmp_path, **changes)


def test_four_bits_without_bitsandbytes_are_refused(tiny_llama_dir: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="nf4 needs bitsandbytes"):
            run_sft(tiny_llama_dir, tmp_path, lora=Lora(quantise="nf4"))
    else:
        result = run_sft(tiny_llama_dir, tmp_path, lora=Lora(quantise="nf4"), epochs=4)
        assert result.curve[-1]["loss"] < result.curve[0]["loss"]
        before, after = load_file(Path(tiny_llama_dir) / "model.safetensors"), weights(tmp_path)
        assert before.keys() == after.keys()


assert BUDGET < 200, "two processes must have several micro-batches"
