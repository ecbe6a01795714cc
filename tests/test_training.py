"""Training: exact steps, the same gradients as plain computation, resuming, stopping, learning."""

import json
import math
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.special import expit
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from rso.config import Compute, Templates, TrainPolicy, TrainRanker, TrainSft, parse_config
from rso.errors import UserError
from rso.templates import RankerEncoder, encode_prompt, encode_response
from rso.training.base import PrefixTrainer, TrainingDiverged, TrainingResult, last_checkpoint
from rso.training.policy import PolicyPair, PolicyResult, judged, train_policy
from rso.training.ranker import (
    MARGIN_PENALTY,
    LabelledComparison,
    _Rows,
    margin_loss,
    margins,
    mean_loss,
    penalty_of,
    slot_bias,
    train_ranker,
)
from rso.training.selection import evaluation_steps
from rso.training.sft import Demonstration, train_sft
from rso.training.steps import choose, plan_steps

TEMPLATES = Templates()
FP32 = Compute(dtype="float32", device="cpu")
BF16 = Compute(dtype="bfloat16", device="cpu")
# A small budget, so that every step has several micro-batches of several rows.
BUDGET = 120
WORDS = ["sum", "list", "file", "lines", "fox", "dog", "number", "empty", "read", "open"]


def demonstrations() -> list[Demonstration]:
    """Ten prompts with one target each and two with another."""
    rows = [Demonstration(f"p{i}", f"the {w} of it", f"Return {w}.") for i, w in enumerate(WORDS)]
    return [*rows, *(Demonstration(r.prompt_id, r.prompt, "Read.") for r in rows[:2])]


def comparisons() -> list[LabelledComparison]:
    """Answers with the word good are preferred to those with bad; the longer one varies."""
    rows = []
    for i in range(48):
        tail = " " + WORDS[i % 10]
        chosen, rejected = ("good" + tail * (i % 3), "bad" + tail * (i // 3 % 3))
        split = "validation" if i >= 36 else "train"
        weight = 1.0 + i % 2
        prompt_id = f"p{i // 2}"
        rows.append(
            LabelledComparison(
                prompt_id, f"c{i}", f"a {WORDS[i // 2 % 10]}", chosen, rejected, weight, split
            )
        )
    return rows


def pairs(tokenizer: PreTrainedTokenizerBase) -> list[PolicyPair]:
    """Six prompts with three pairs of four responses each; a response is in several pairs."""
    rows = []
    for i in range(6):
        texts = [f"{w} {WORDS[i]}" for w in ("Return", "Open", "Read the", "A")]
        ids = [encode_response(tokenizer, TEMPLATES, t, eos=True) for t in texts]
        for a, b in ((0, 1), (2, 3), (0, 2)):
            rows.append(
                PolicyPair(f"p{i}", f"the {WORDS[i]}", f"r{i}{a}", f"r{i}{b}", ids[a], ids[b])
            )
    return rows


def sequence_logps(model: PreTrainedModel, prompt: list[int], response: Sequence[int]) -> Tensor:
    """One sequence alone, full logits: the summed log-prob of the response."""
    logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0].float()
    logps = torch.log_softmax(logits, dim=-1)
    places = range(len(prompt) - 1, len(prompt) + len(response) - 1)
    return torch.stack([logps[i, t] for i, t in zip(places, response, strict=True)]).sum()


def reference_logps(
    directory: str, tokenizer: PreTrainedTokenizerBase, rows: Sequence[PolicyPair]
) -> dict[tuple[str, str], float]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    found = {}
    with torch.no_grad():
        for row in rows:
            prompt = encode_prompt(tokenizer, TEMPLATES, row.prompt)
            for side, ids in (
                (row.chosen_id, row.chosen_token_ids),
                (row.rejected_id, row.rejected_token_ids),
            ):
                found[row.prompt_id, side] = float(sequence_logps(model, prompt, ids))
    return found


def settings(kind: type, **changes: Any) -> Any:
    plain: dict[str, Any] = {
        "optimizer": "adamw",
        "learning_rate": 3e-3,
        "batch_size": 5,
        "epochs": 2,
        "token_budget": BUDGET,
    }
    return kind(**(plain | changes))


def run_sft(base: str, directory: Path, compute: Compute = FP32, **changes: Any) -> TrainingResult:
    return train_sft(
        base,
        demonstrations(),
        settings(TrainSft, **changes),
        compute,
        TEMPLATES,
        seed=0,
        work_directory=str(directory / "work"),
        output_directory=str(directory / "model"),
    )


def run_ranker(base: str, directory: Path, **changes: Any) -> Any:
    return train_ranker(
        base,
        comparisons(),
        settings(TrainRanker, **changes),
        FP32,
        TEMPLATES,
        seed=0,
        work_directory=str(directory / "work"),
        output_directory=str(directory / "model"),
    )


def run_policy(
    base: str,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    logps: dict[tuple[str, str], float] | None = None,
    evaluate: Callable[[PreTrainedModel], list[float]] | None = None,
    **changes: Any,
) -> PolicyResult:
    rows = pairs(tokenizer)
    return train_policy(
        base,
        rows,
        reference_logps(base, tokenizer, rows) if logps is None else logps,
        settings(TrainPolicy, **changes),
        FP32,
        TEMPLATES,
        seed=0,
        work_directory=str(directory / "work"),
        output_directory=str(directory / "model"),
        evaluate=evaluate,
    )


def weights(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model" / "model.safetensors")


def assert_same_weights(first: Path, second: Path) -> None:
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def gradients_of_first_step(trainer: PrefixTrainer[Any]) -> tuple[float, dict[str, Tensor]]:
    step = trainer.steps[0]
    assert len(step.micro_batches) > 1
    loss = trainer.training_step(trainer.network, {"step": step})
    found = {n: p.grad.clone() for n, p in trainer.network.named_parameters()}
    trainer.network.zero_grad()
    return float(loss), found


def assert_step_equals(
    trainer: PrefixTrainer[Any], plain: Callable[[], Tensor], *, rounding: float = 2e-5
) -> None:
    """The first step's loss and gradients are those of the scalar `plain()`.

    `rounding` is a share of each parameter's largest gradient.
    """
    loss, found = gradients_of_first_step(trainer)
    expected = plain()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in trainer.network.named_parameters():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=rounding * scale)


@given(
    prompts=st.lists(st.integers(0, 6), min_size=1, max_size=30),
    batch_size=st.integers(1, 9),
    epochs=st.sampled_from([0.5, 1.0, 2.0, 2.5]),
)
def test_plan_steps_are_exact_and_cover_every_epoch(
    prompts: list[int], batch_size: int, epochs: float
) -> None:
    plan = plan_steps(
        [f"p{i}" for i in prompts], batch_size=batch_size, epochs=epochs, key=("t", 0)
    )
    sizes = [len(step) for step in plan]
    assert all(size == batch_size for size in sizes[:-1]) and 0 < sizes[-1] <= batch_size
    uses = Counter(item for step in plan for item in step)
    assert sum(sizes) == max(1, round(epochs * len(prompts)))
    assert all(int(epochs) <= uses[i] <= int(epochs) + 1 for i in range(len(prompts)))


def test_plan_steps_without_items_is_refused() -> None:
    with pytest.raises(ValueError, match="there are no items"):
        plan_steps([], batch_size=8, epochs=1, key=("t", 0))


def test_plan_steps_keeps_a_prompt_together_and_orders_epochs_apart() -> None:
    ids = [f"p{i // 4}" for i in range(40)]
    plan = plan_steps(ids, batch_size=8, epochs=2, key=("t", 0))
    for step in plan:
        assert Counter(ids[i] for i in step).most_common() == [(ids[step[0]], 4), (ids[step[4]], 4)]
    assert plan[:5] != plan[5:]
    assert plan != plan_steps(ids, batch_size=8, epochs=2, key=("t", 1))


def test_choose_takes_whole_prompts_up_to_the_limit() -> None:
    ids = [f"p{i // 4}" for i in range(40)]
    chosen = choose(ids, 10, ("t", 0))
    assert len(chosen) == 10 and chosen == sorted(chosen)
    assert sorted(Counter(ids[i] for i in chosen).values()) == [2, 4, 4]
    assert choose(ids, None, ("t", 0)) == choose(ids, 99, ("t", 0)) == list(range(40))


def test_sft_step_equals_plain_computation(
    tiny_llama_dir: str,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    captured: list[PrefixTrainer[Any]],
) -> None:
    run_sft(tiny_llama_dir, tmp_path, batch_size=12)
    rows = demonstrations()

    def plain() -> Tensor:
        total, num_tokens = torch.tensor(0.0), 0
        for row in rows:
            prompt = encode_prompt(tiny_tokenizer, TEMPLATES, row.prompt)
            target = encode_response(tiny_tokenizer, TEMPLATES, row.target, eos=True)
            total = total - sequence_logps(captured[0].network, prompt, target)
            num_tokens += len(target)
        return total / num_tokens

    assert_step_equals(captured[0], plain)


@pytest.mark.parametrize(
    ("orders", "bias_penalty"),
    [("margin", 0.0), ("margin", 0.3), ("mean", 0.0), ("mean", 0.3), ("flip", 0.0)],
)
def test_ranker_step_equals_plain_computation(
    tiny_ranker_dir: str,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    captured: list[PrefixTrainer[Any]],
    orders: str,
    bias_penalty: float,
) -> None:
    changes: dict[str, Any] = {"orders": orders, "bias_penalty": bias_penalty}
    run_ranker(tiny_ranker_dir, tmp_path, batch_size=36, **changes)
    encoder = RankerEncoder(tiny_tokenizer, TEMPLATES)
    step = captured[0].steps[0]
    if orders == "flip":
        signs = [sign for batch in step.micro_batches for e in batch for sign in e.signs]
        assert len(signs) == 36 and set(signs) == {1.0, -1.0}
    model = captured[0].network

    def z(row: LabelledComparison, a: str, b: str) -> Tensor:
        ids = [*encoder.context(row.prompt).ids, *encoder.branch(a, b)]
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1].float()
        return logits[encoder.labels.a] - logits[encoder.labels.b]

    def plain() -> Tensor:
        rows = [c for c in comparisons() if c.split == "train"]
        total = torch.tensor(0.0)
        kept = {e.prompt_id: iter(e.signs) for b in step.micro_batches for e in b}
        for row in rows:
            ab, ba = z(row, row.chosen, row.rejected), z(row, row.rejected, row.chosen)
            if orders == "margin":
                loss = functional.softplus(-(ab - ba) / 2)
            elif orders == "mean":
                loss = (functional.softplus(-ab) + functional.softplus(ba)) / 2
            else:
                loss = functional.softplus(-ab if next(kept[row.prompt_id]) > 0 else ba)
            total = total + row.weight * (loss + bias_penalty * ((ab + ba) / 2) ** 2)
        return total / len(rows)

    assert_step_equals(captured[0], plain)


def test_ranker_losses_at_margin_1_and_bias_3() -> None:
    bias = torch.tensor(3.0, requires_grad=True)
    z = torch.stack([1 + bias, 1 - bias])[None]
    assert slot_bias(z).item() == pytest.approx(3.0)
    assert margin_loss(z).item() == pytest.approx(0.313, abs=5e-4)
    assert mean_loss(z).item() == pytest.approx(1.073, abs=5e-4)
    (of_margin,) = torch.autograd.grad(margin_loss(z).sum(), bias, retain_graph=True)
    (of_mean,) = torch.autograd.grad(mean_loss(z).sum(), bias)
    assert of_margin.item() == 0 and of_mean.item() > 0.4


@hypothesis_settings(deadline=None)
@given(st.floats(-8, 8), st.floats(-8, 8))
def test_mean_loss_is_least_without_bias_and_the_margin_loss_there(
    margin: float, bias: float
) -> None:
    z = torch.tensor([[margin + bias, margin - bias]], dtype=torch.float64, requires_grad=True)
    least, found = margin_loss(z).sum(), mean_loss(z).sum()
    assert found.item() >= least.item() - 1e-12
    unbiased = mean_loss(torch.full((1, 2), margin, dtype=torch.float64))
    assert unbiased.item() == pytest.approx(least.item())
    (gradient,) = torch.autograd.grad(found, z)
    # Along the bias, which raises one margin and lowers the other.
    assert float(gradient[0, 0] - gradient[0, 1]) * bias >= -1e-12


def test_flip_is_on_average_the_mean_of_both_orders(
    tiny_ranker_dir: str, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    rows, encoder = comparisons()[:12], RankerEncoder(tiny_tokenizer, TEMPLATES)
    model = AutoModelForCausalLM.from_pretrained(tiny_ranker_dir, dtype=torch.float32).eval()

    def found(flip: tuple[str, int] | None) -> Tensor:
        examples = _Rows(encoder, rows, flip=flip).build(range(len(rows)))
        with torch.no_grad():
            return margins(model, examples, encoder.labels)

    both = found(None)
    assert both.shape == (12, 2)
    flips = torch.stack([mean_loss(found(("train_ranker", seed))) for seed in range(100)])
    # Four standard errors of the mean; the draws are keyed and so the same everywhere.
    expected, apart = mean_loss(both), 4 * flips.std(dim=0) / 10
    assert ((flips.mean(dim=0) - expected).abs() <= apart + 1e-5).all()
    assert (flips.std(dim=0) > 0.01).all()


@pytest.mark.parametrize("name", ["train_ranker", "train_gold_ranker"])
@pytest.mark.parametrize(
    ("ranker", "sentence"),
    [
        ({"orders": "both"}, "margin is the loss of the margin averaged over both orders, mean is"),
        ({"orders": "flip", "bias_penalty": 0.1}, "bias_penalty is 0.1 and orders is flip; .* set"),
        ({"bias_penalty": -1.0}, "bias_penalty"),
        ({"bias_penalty": float("inf")}, "bias_penalty"),
    ],
)
def test_config_refuses_orders_and_penalties(
    name: str, ranker: dict[str, Any], sentence: str
) -> None:
    data = {"model": "m", "prepare": {"sources": []}, name: ranker}
    with pytest.raises(UserError, match=f"here.yaml: {name}.*{sentence}"):
        parse_config(data, where="here.yaml")


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "sigmoid_norm"},
        {"loss": "hinge"},
        {"loss": "hinge_norm"},
        {"loss": "rrhf"},
        {"loss": "hinge", "regularisation": 0.5},
        {"loss": "rrhf", "regularisation": 0.5},
        {"loss": "sigmoid_norm", "soft_labels": True},
        {"loss": "hinge_norm", "label_smoothing": 0.2},
        {"loss": "sigmoid_norm", "soft_labels": True, "label_smoothing": 0.2},
    ],
    ids=lambda changes: "-".join(f"{value}" for value in changes.values()),
)
def test_policy_step_equals_plain_computation(
    tiny_llama_dir: str,
    tiny_ranker_dir: str,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    captured: list[PrefixTrainer[Any]],
    changes: dict[str, Any],
) -> None:
    gamma, lam = 0.3, changes.get("regularisation", 0.0)
    rows = [
        pair._replace(label_probability=0.5 + i / 40)
        for i, pair in enumerate(pairs(tiny_tokenizer))
    ]
    reference = reference_logps(tiny_ranker_dir, tiny_tokenizer, rows)
    targets = {row.prompt_id: f"Return {row.prompt}." for row in rows}
    train_policy(
        tiny_llama_dir,
        rows,
        reference,
        settings(TrainPolicy, batch_size=18, gamma=gamma, **changes),
        FP32,
        TEMPLATES,
        seed=0,
        work_directory=str(tmp_path / "work"),
        output_directory=str(tmp_path / "model"),
        targets=targets,
        starts_as_reference=False,
    )
    model = captured[0].network

    def logp(row: PolicyPair, token_ids: Sequence[int]) -> Tensor:
        return sequence_logps(
            model, encode_prompt(tiny_tokenizer, TEMPLATES, row.prompt), token_ids
        )

    def loss_of(row: PolicyPair, first: str, second: str) -> Tensor:
        sides = []
        for side in (first, second):
            token_ids, response_id = getattr(row, f"{side}_token_ids"), getattr(row, f"{side}_id")
            value = logp(row, token_ids)
            if changes["loss"] == "rrhf":
                value = value / len(token_ids)
            elif changes["loss"] != "hinge":
                value = value - reference[row.prompt_id, response_id]
            sides.append(value)
        margin = sides[0] - sides[1]
        if changes["loss"] == "rrhf":
            return (-margin).clamp(min=0)
        if changes["loss"] == "sigmoid_norm":
            return -functional.logsigmoid(gamma * margin)
        return (1 - gamma * margin).clamp(min=0)

    def plain() -> Tensor:
        total = torch.tensor(0.0)
        for row in rows:
            is_right = row.label_probability if changes.get("soft_labels") else 1.0
            wrong = changes.get("label_smoothing", 0.0)
            is_right = is_right * (1 - wrong) + (1 - is_right) * wrong
            total = total + is_right * loss_of(row, "chosen", "rejected")
            total = total + (1 - is_right) * loss_of(row, "rejected", "chosen")
            target = encode_response(tiny_tokenizer, TEMPLATES, targets[row.prompt_id], eos=True)
            scale = 1.0 if changes["loss"] == "rrhf" else gamma
            total = total - (scale * lam * logp(row, target) if lam else 0)
        return total / len(rows)

    assert_step_equals(captured[0], plain)


def test_regularisation_without_a_target_is_refused(
    tiny_llama_dir: str, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="6 of 6 have none, the first being p0"):
        run_policy(tiny_llama_dir, tiny_tokenizer, tmp_path, loss="hinge", regularisation=0.5)


@pytest.mark.parametrize(("compute", "dtype"), [(FP32, torch.float32), (BF16, torch.bfloat16)])
def test_sft_loss_falls_and_model_is_written_in_its_dtype(
    tiny_llama_dir: str, tmp_path: Path, compute: Compute, dtype: torch.dtype
) -> None:
    result = run_sft(tiny_llama_dir, tmp_path, compute, epochs=10)
    assert result.num_steps == 24
    assert [entry["num_items"] for entry in result.curve] == [5] * 24
    assert result.curve[-1]["loss"] < 0.5 * result.curve[0]["loss"]
    assert result.num_tokens == sum(entry["num_tokens"] for entry in result.curve)
    assert {w.dtype for w in weights(tmp_path).values()} == {dtype}


def test_adafactor_with_schedule_and_warmup_learns(tiny_llama_dir: str, tmp_path: Path) -> None:
    result = run_sft(
        tiny_llama_dir, tmp_path, optimizer="adafactor", schedule="cosine", warmup=0.25, epochs=10
    )
    rates = [entry["learning_rate"] for entry in result.curve]
    assert max(rates) == pytest.approx(3e-3) and rates[0] < 1e-3 and rates[-1] < 1e-4
    assert result.curve[-1]["loss"] < result.curve[0]["loss"]


@pytest.mark.parametrize("compute", [FP32, BF16])
def test_frozen_parts_stay_and_the_rest_moves(
    tiny_llama_dir: str, tmp_path: Path, compute: Compute
) -> None:
    run_sft(tiny_llama_dir, tmp_path, compute, freeze_embeddings=True, freeze_layers=1)
    before, after = load_file(Path(tiny_llama_dir) / "model.safetensors"), weights(tmp_path)
    for name in before:
        is_frozen = "embed_tokens" in name or "layers.0." in name
        written = before[name].to(after[name].dtype)
        assert torch.equal(written, after[name]) == is_frozen, name


def test_more_frozen_layers_than_layers_is_refused(tiny_llama_dir: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="freeze_layers is 3, but the model has 2"):
        run_sft(tiny_llama_dir, tmp_path, freeze_layers=3)


def test_same_seed_gives_the_same_weights(tiny_llama_dir: str, tmp_path: Path) -> None:
    run_sft(tiny_llama_dir, tmp_path / "a")
    run_sft(tiny_llama_dir, tmp_path / "b")
    assert_same_weights(tmp_path / "a", tmp_path / "b")


INTERRUPTED: dict[str, Any] = {"epochs": 4, "schedule": "linear", "checkpoint_steps": 2}
KILLED_WHILE_SAVING = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from transformers import Trainer
import test_training

save = Trainer._save_checkpoint
def save_and_die(self, model, trial):
    save(self, model, trial)
    if self.state.global_step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
Trainer._save_checkpoint = save_and_die
test_training.run_sft({base!r}, Path({directory!r}), **test_training.INTERRUPTED)
"""


@pytest.mark.slow
def test_training_killed_while_saving_goes_on_to_the_same_weights(
    tiny_llama_dir: str, tmp_path: Path
) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    tests = Path(__file__).parent
    script = KILLED_WHILE_SAVING.format(
        tests=str(tests), base=tiny_llama_dir, directory=str(killed)
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tests.parent)
    assert done.returncode == -signal.SIGKILL
    assert (killed / "work" / "partial" / "checkpoint-4").exists()
    checkpoint = last_checkpoint(killed / "work")
    assert checkpoint is not None and checkpoint.name == "checkpoint-2"
    after = run_sft(tiny_llama_dir, killed, **INTERRUPTED)
    plain = run_sft(tiny_llama_dir, whole, **INTERRUPTED)
    assert_same_weights(killed, whole)
    assert [e["loss"] for e in after.curve] == [e["loss"] for e in plain.curve]


def test_interrupted_policy_keeps_its_evaluations_and_its_best_checkpoint(
    tiny_llama_dir: str, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    margins = [[3.0, 1.0], [-2.0, 1.0], None, [1.0, 1.0], [-1.0, -2.0]]
    calls: list[list[float] | None] = []

    def evaluate(model: PreTrainedModel) -> list[float]:
        found = margins[len(calls)]
        calls.append(found)
        if found is None:
            raise KeyboardInterrupt
        return found

    changes: dict[str, Any] = {"num_evaluations": 4, "checkpoint_steps": 3, "evaluate": evaluate}
    with pytest.raises(KeyboardInterrupt):
        run_policy(tiny_llama_dir, tiny_tokenizer, tmp_path, **changes)
    result = run_policy(tiny_llama_dir, tiny_tokenizer, tmp_path, **changes)
    assert [(e.step, e.mean_margin) for e in result.evaluations] == [
        (2, 2.0), (4, -0.5), (6, 1.0), (8, -1.5)
    ]  # fmt: skip
    assert result.selected_step == 2 and result.step_zero_difference is None
    # The probabilities of both sides of the interruption are there.
    assert result.lead is not None and result.lead.step == 6
    differences = expit([3.0, 1.0]) - expit([1.0, 1.0])
    assert result.lead.difference.value == pytest.approx(differences.mean())
    whole = tmp_path / "whole"
    falling = iter([[0.9], [0.5], [0.3], [0.1]])
    run_policy(
        tiny_llama_dir,
        tiny_tokenizer,
        whole,
        evaluate=lambda model: next(falling),
        num_evaluations=4,
    )
    assert_same_weights(tmp_path, whole)


def test_half_a_checkpoint_is_not_used(tmp_path: Path) -> None:
    for step, text in ((2, json.dumps({"global_step": 2})), (4, '{"global_st'), (6, None)):
        directory = tmp_path / f"checkpoint-{step}"
        directory.mkdir()
        if text is not None:
            (directory / "trainer_state.json").write_text(text)
    found = last_checkpoint(tmp_path)
    assert found is not None and found.name == "checkpoint-2"


def test_divergence_names_step_and_prompts_and_writes_nothing(
    tiny_llama_dir: str, tmp_path: Path
) -> None:
    with pytest.raises(TrainingDiverged, match=r"step [2-5] of 5: .*Prompts of the batch: p\d"):
        run_sft(tiny_llama_dir, tmp_path, learning_rate=1e30, max_grad_norm=1e30)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("orders", ["margin", "mean"])
def test_ranker_learns_a_planted_preference(
    tiny_ranker_dir: str, tmp_path: Path, orders: str
) -> None:
    result = run_ranker(tiny_ranker_dir, tmp_path, epochs=8, batch_size=6, orders=orders)
    held_out = result.held_out
    assert held_out.accuracy.n == 12
    assert held_out.accuracy.value >= 0.9
    assert held_out.longer.value < 0.8
    assert held_out.chosen_shorter.value >= 0.75
    assert result.training.curve[-1]["accuracy"] >= 0.9
    assert result.num_truncated == 0


def test_bias_penalty_by_default_belongs_to_the_loss_that_does_not_see_the_bias() -> None:
    found = {
        orders: penalty_of(TrainRanker(orders=orders)) for orders in ("margin", "mean", "flip")
    }
    assert found == {"margin": MARGIN_PENALTY, "mean": 0.0, "flip": 0.0}
    assert penalty_of(TrainRanker()) == MARGIN_PENALTY > 0
    assert penalty_of(TrainRanker(bias_penalty=0.0)) == 0.0


def test_bias_penalty_holds_down_the_positional_bias(
    make_llama: Callable[..., str], tmp_path: Path
) -> None:
    # Of five seeds the one whose ranker likes a slot most: 3.9 nats, 0.4 with the penalty.
    base = make_llama(tmp_path / "base", seed=4)
    sizes = []
    for penalty in (0.0, 1.0):
        changes: dict[str, Any] = {"orders": "margin", "bias_penalty": penalty}
        result = run_ranker(base, tmp_path / f"{penalty}", batch_size=6, **changes)
        found = result.each_order
        sizes.append((found.bias**2 + found.spread**2) ** 0.5)
    assert sizes[1] < sizes[0] / 2


def test_ranker_stops_early_and_keeps_its_best_checkpoint(
    tiny_ranker_dir: str, tmp_path: Path
) -> None:
    """A rate so high that accuracy is soon at its best; patience 2 ends it two evaluations on."""
    changes: dict[str, Any] = {"epochs": 8, "num_evaluations": 10, "patience": 2}
    result = run_ranker(tiny_ranker_dir, tmp_path / "a", **changes)
    keys = [(e["accuracy"], -e["held_out_loss"]) for e in result.evaluations]
    best = max(range(len(keys)), key=lambda i: (keys[i], -i))
    assert result.selected_step == result.evaluations[best]["step"]
    assert result.held_out.accuracy.value == result.evaluations[best]["accuracy"]
    stopped = len(keys) < 10
    assert stopped == (len(keys) - 1 - best == 2)
    assert result.training.num_steps == result.evaluations[-1]["step"]
    # Interrupted between evaluations it stops at the same step with the same weights.
    script = KILLED_WHILE_SAVING.format(
        tests=str(Path(__file__).parent), base=tiny_ranker_dir, directory=str(tmp_path / "b")
    )
    given = f"checkpoint_steps=2, **{changes}"
    script = script.replace("run_sft", "run_ranker").replace("**test_training.INTERRUPTED", given)
    command = [sys.executable, "-c", script]
    assert subprocess.run(command, timeout=300).returncode == -signal.SIGKILL
    again = run_ranker(tiny_ranker_dir, tmp_path / "b", checkpoint_steps=2, **changes)
    assert again.evaluations == result.evaluations
    assert_same_weights(tmp_path / "a", tmp_path / "b")


def test_evaluations_without_held_out_comparisons_are_refused(
    tiny_ranker_dir: str, tmp_path: Path
) -> None:
    rows = [c for c in comparisons() if c.split == "train"]
    with pytest.raises(UserError, match="no comparison is held out"):
        train_ranker(
            tiny_ranker_dir,
            rows,
            settings(TrainRanker, num_evaluations=3),
            FP32,
            TEMPLATES,
            seed=0,
            work_directory=str(tmp_path / "work"),
            output_directory=str(tmp_path / "model"),
        )


def test_patience_that_could_never_stop_is_refused() -> None:
    with pytest.raises(ValueError, match="raise num_evaluations"):
        TrainRanker(patience=3, num_evaluations=3)


def test_policy_raises_the_margin(
    tiny_llama_dir: str, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    result = run_policy(tiny_llama_dir, tiny_tokenizer, tmp_path, epochs=4)
    assert result.step_zero_difference == pytest.approx(0, abs=1e-5)
    first, last = result.training.curve[0], result.training.curve[-1]
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert last["margin"] > 1 > abs(first["margin"])
    assert result.selected_step == result.training.num_steps == 15


def test_step_zero_check_fires_when_a_reference_logp_is_off(
    tiny_llama_dir: str, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    logps = reference_logps(tiny_llama_dir, tiny_tokenizer, pairs(tiny_tokenizer))
    logps["p3", "r32"] += 1.0
    with pytest.raises(UserError, match="response r32 of prompt p3"):
        run_policy(tiny_llama_dir, tiny_tokenizer, tmp_path, logps=logps)


def test_step_zero_check_fires_when_some_responses_are_not_finite_under_the_policy(
    tiny_llama_dir: str, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """The last response is finite: a NaN before it must not be forgotten."""
    rows = pairs(tiny_tokenizer)
    first, last = rows[0].chosen_token_ids, rows[-1].rejected_token_ids
    spoilt = next(i for i in first if all(i not in r.rejected_token_ids for r in rows))
    assert spoilt not in last
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight[spoilt] = float("nan")
    model.save_pretrained(tmp_path / "spoilt")
    tiny_tokenizer.save_pretrained(tmp_path / "spoilt")
    logps = reference_logps(tiny_llama_dir, tiny_tokenizer, rows)
    with pytest.raises(UserError, match=r"not the reference: response .* has nan nats"):
        run_policy(str(tmp_path / "spoilt"), tiny_tokenizer, tmp_path, logps=logps)


@pytest.mark.parametrize("change", [{}, {("p3", "r32"): float("nan")}])
def test_missing_or_bad_reference_logps_are_refused(
    tiny_llama_dir: str,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    change: dict[tuple[str, str], float],
) -> None:
    logps = reference_logps(tiny_llama_dir, tiny_tokenizer, pairs(tiny_tokenizer))
    del logps["p3", "r32"]
    with pytest.raises(UserError, match=r"prompt p3, .* response r32: .*run logps"):
        run_policy(tiny_llama_dir, tiny_tokenizer, tmp_path, logps=logps | change)


def test_policy_keeps_the_checkpoint_with_the_highest_mean_probability(
    tiny_llama_dir: str, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """The second wins two of three contests, the third one alone, and clearly."""
    margins = [[0.1, -4.0, -4.0], [0.1, 0.1, -4.0], [6.0, -0.1, -0.1], [-1.0, -1.0, -1.0]]
    seen: list[dict[str, Tensor]] = []

    def evaluate(model: PreTrainedModel) -> list[float]:
        assert not model.training
        torch.rand(3)
        seen.append({n: w.clone() for n, w in model.state_dict().items()})
        return margins[len(seen) - 1]

    result = run_policy(
        tiny_llama_dir, tiny_tokenizer, tmp_path / "a", evaluate=evaluate, num_evaluations=4
    )
    assert [e.step for e in result.evaluations] == [2, 4, 6, 8]
    assert [e.win_rate for e in result.evaluations] == pytest.approx([1 / 3, 2 / 3, 1 / 3, 0])
    for found, given_ in zip(result.evaluations, margins, strict=True):
        assert found.mean_probability == pytest.approx(expit(given_).mean())
        assert found.mean_margin == pytest.approx(np.mean(given_))
    assert result.selected_step == 6 and result.selected == result.evaluations[2]
    assert result.lead is not None and result.lead.step == 4
    differences = expit(margins[2]) - expit(margins[1])
    assert result.lead.difference.value == pytest.approx(differences.mean())
    assert differences.min() <= result.lead.difference.low < result.lead.difference.high
    for name, weight in weights(tmp_path / "a").items():
        assert torch.equal(weight, seen[2][name])
    last = run_policy(tiny_llama_dir, tiny_tokenizer, tmp_path / "b")
    assert last.selected is None and last.lead is None
    for name, weight in weights(tmp_path / "b").items():
        assert torch.equal(weight, seen[3][name])


@pytest.mark.parametrize(
    ("margins", "kept"),
    [
        # Beyond 40 nats all probabilities are 1.
        ([[50.0], [90.0], [70.0], [60.0]], 4),
        ([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0], [0.0, 0.0]], 2),
    ],
    ids=["margin", "step"],
)
def test_checkpoints_of_one_mean_probability_go_by_margin_and_then_by_step(
    tiny_llama_dir: str,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    margins: list[list[float]],
    kept: int,
) -> None:
    left = iter(margins)
    result = run_policy(
        tiny_llama_dir,
        tiny_tokenizer,
        tmp_path,
        evaluate=lambda model: next(left),
        num_evaluations=4,
    )
    assert result.selected_step == kept


def test_margin_that_is_nan_stops_the_choice() -> None:
    with pytest.raises(ValueError, match="logit is NaN"):
        judged([1.0, math.nan])


def test_judged_figures_hold_at_extreme_margins() -> None:
    found = judged([-1e4, 0.0, 1e4])
    assert found.values == pytest.approx([0.0, 0.5, 1.0])
    expected = {"win_rate": 0.5, "mean_probability": 0.5, "mean_margin": 0.0}
    assert found.figures == pytest.approx(expected)


def test_evaluation_steps_are_even_and_end_with_the_last() -> None:
    assert evaluation_steps(10, 1) == {10}
    assert evaluation_steps(10, 4) == {3, 5, 8, 10}
    assert evaluation_steps(2, 4) == {1, 2}
