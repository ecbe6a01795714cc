"""What all trainers share: prepared steps run by `transformers.Trainer`.

One element of the data set is one whole optimiser step, so the step count, the schedule, clipping,
logging and resuming of `Trainer` are exact; `training_step` walks the micro-batches.

Weights in training are float32. Where `compute.dtype` is bfloat16, matrix products compute in it
by autocast, which on a CPU took 0.7 of the time of bfloat16 weights with float32 masters
(SmolLM2-135M, 8 × 130 tokens, one core), and the model is written in bfloat16.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from rso.config import Compute, Optimisation
from rso.errors import UserError
from rso.models import load_model, load_tokenizer
from rso.prefix import Batch, Row, collate
from rso.progress import progress
from rso.training.steps import ExampleT, Step, Steps

_STATE_FILE = "trainer_state.json"
_PARTIAL = "partial"
_SHOWN_IDS = 8


class TrainingDiverged(UserError):
    """The loss or its gradient is NaN or infinite."""


@dataclass(frozen=True)
class TrainingResult:
    """How a training went.

    `curve` has one entry an optimiser step: `step`, `loss` (mean over its items; before the
    update), `grad_norm` (before clipping), `learning_rate`, `num_items`, `num_tokens`, `seconds`,
    and the trainer's own figures. `num_tokens` counts shared prefixes once; `seconds` is the time
    within steps, those before an interruption included.
    """

    num_steps: int
    num_tokens: int
    seconds: float
    curve: list[dict[str, float]]


class Sums(NamedTuple):
    """A micro-batch: summed loss (scalar, with graph) and figures summed over its items."""

    loss: Tensor
    figures: Mapping[str, float]


class PrefixTrainer(Trainer, Generic[ExampleT]):
    """A `Trainer` over prepared steps of shared-prefix rows; subclasses give `sums`.

    Dropout is as the model's configuration says, unless a subclass trains without.
    """

    has_dropout = True

    def __init__(
        self,
        model: PreTrainedModel,
        steps: Steps[ExampleT],
        *,
        settings: Optimisation,
        compute: Compute,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        work_directory: str,
        what: str,
    ) -> None:
        freeze(model, settings, where=what)
        model.float()
        if weights_dtype(compute) == torch.bfloat16:
            _autocast(model)
        self._attention = partial(_attention, compute)
        arguments = _arguments(settings, compute, len(steps), seed, work_directory)
        self.steps, self.what, self.network = steps, what, model
        self.pad_id = int(tokenizer.pad_token_id)
        self.work_directory = Path(work_directory)
        self._figures: dict[str, float] = {}
        self._started = time.monotonic()
        self._current_ids: list[str] = []
        super().__init__(model=model, args=arguments, train_dataset=steps, data_collator=_only)
        self.remove_callback(PrinterCallback)
        self._checkpoint_steps = settings.checkpoint_steps

    def sums(self, model: PreTrainedModel, examples: Sequence[ExampleT]) -> Sums:
        """Loss and figures of one micro-batch, summed over its items."""
        raise NotImplementedError

    def collate(self, examples: Sequence[ExampleT]) -> Batch:
        """The rows of a micro-batch as tensors on the model's device."""
        return batch_of([e.row for e in examples], self.network, self.pad_id)

    def run(self) -> TrainingResult:
        """Train, going on from the newest checkpoint in the work directory."""
        total = sum(step.num_tokens for step in self.steps)
        checkpoint = last_checkpoint(self.work_directory)
        with progress(self.what, total=total, unit="tokens") as bar:
            self.add_callback(_Watch(self, bar))
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        curve = [entry for entry in self.state.log_history if "loss" in entry]
        return TrainingResult(
            num_steps=self.state.global_step,
            num_tokens=total,
            seconds=sum(entry["seconds"] for entry in curve),
            curve=curve,
        )

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Loss of one optimiser step (scalar, detached), its gradients accumulated.

        Raises:
            TrainingDiverged: a micro-batch has a loss that is not finite.
        """
        self._started = time.monotonic()
        step: Step[ExampleT] = inputs["step"]
        self._current_ids = step.prompt_ids
        model.train(self.has_dropout)
        figures: dict[str, float] = {}
        losses = []
        with self._attention():
            for examples in step.micro_batches:
                sums = self.sums(self.network, examples)
                self.accelerator.backward(sums.loss / step.divisor)
                losses.append(sums.loss.detach() / step.divisor)
                for name, value in sums.figures.items():
                    figures[name] = figures.get(name, 0.0) + value
        total = torch.stack(losses)
        self._check_finite(total.tolist(), step)
        self._figures = {name: value / step.num_items for name, value in figures.items()}
        self._figures |= {"num_items": step.num_items, "num_tokens": step.num_tokens}
        return total.sum()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the figures of the step to its entry in the history."""
        if "loss" in logs:
            logs.update(self._figures, seconds=time.monotonic() - self._started)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Zero: `Trainer`'s estimate wants one tensor of inputs, which a step has not."""
        return 0

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        norm: Tensor = super()._clip_grad_norm(model)
        if not math.isfinite(float(norm)):
            raise self._diverged(f"the gradient's norm is {float(norm)}", self._current_ids)
        return norm

    def _check_finite(self, losses: list[float], step: Step[ExampleT]) -> None:
        for loss, examples in zip(losses, step.micro_batches, strict=True):
            if not math.isfinite(loss):
                raise self._diverged(f"the loss is {loss}", [e.prompt_id for e in examples])

    def _diverged(self, found: str, prompt_ids: Sequence[str]) -> TrainingDiverged:
        shown = ", ".join(prompt_ids[:_SHOWN_IDS])
        more = f" and {len(prompt_ids) - _SHOWN_IDS} more" if len(prompt_ids) > _SHOWN_IDS else ""
        return TrainingDiverged(
            f"{self.what}, step {self.state.global_step + 1} of {len(self.steps)}: {found},"
            f" expected a finite number. Prompts of the batch: {shown}{more}. Lower"
            f" {self.what}.learning_rate or max_grad_norm, add warmup, or look at these prompts;"
            " nothing was written."
        )

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.work_directory / _PARTIAL)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint aside, rename it, then drop the older ones.

        So that a kill or a full disk at any moment leaves the newest whole checkpoint in place.
        """
        partial = self.work_directory / _PARTIAL
        shutil.rmtree(partial, ignore_errors=True)
        super()._save_checkpoint(model, trial)
        name = f"checkpoint-{self.state.global_step}"
        os.replace(partial / name, self.work_directory / name)
        for other in _checkpoints(self.work_directory):
            if other.name != name:
                shutil.rmtree(other)


class _Watch(TrainerCallback):
    """Shows progress and says when a checkpoint is due: never at the end, which saves the model."""

    def __init__(self, trainer: PrefixTrainer[Any], bar: progress) -> None:
        self._trainer, self._bar = trainer, bar

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = range(state.global_step)
        self._bar.advance(sum(self._trainer.steps[i].num_tokens for i in done))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, last = state.global_step, len(self._trainer.steps)
        control.should_save = step % self._trainer._checkpoint_steps == 0 and step < last

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" not in logs:
            return
        self._bar.advance(logs["num_tokens"])
        shown = ("loss", "margin", "accuracy")
        self._bar.note(**{name: logs[name] for name in shown if name in logs})


def weights_dtype(compute: Compute) -> torch.dtype:
    """The type of weights as loaded and written; `compute.dtype` is resolved, never auto."""
    assert compute.dtype != "auto", "resolve the config before training"
    return torch.bfloat16 if compute.dtype == "bfloat16" else torch.float32


def load(location: str, compute: Compute) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model at `location` in the type of `compute` on the training device; its tokenizer."""
    # Bars of loading and saving would break into the bar of the training.
    logging.disable_progress_bar()
    tokenizer = load_tokenizer(location)
    model = load_model(
        location,
        dtype=weights_dtype(compute),
        device="cpu" if _on_cpu(compute) else "cuda",
        attention=compute.attention,
    )
    return model, tokenizer


def freeze(model: PreTrainedModel, settings: Optimisation, *, where: str) -> None:
    """Take the frozen parts out of training, so that backward stops at the lowest trained layer.

    Raises:
        UserError: there are fewer layers than `freeze_layers`, or nothing is left to train.
    """
    stacks = _layers(model)
    most = min(map(len, stacks))
    if settings.freeze_layers > most:
        raise UserError(
            f"{where}.freeze_layers is {settings.freeze_layers}, but the model has {most}"
            f" layers; give a number from 0 to {most}."
        )
    model.requires_grad_(True)
    if settings.freeze_embeddings:
        model.get_input_embeddings().requires_grad_(False)
    for layers in stacks:
        for layer in layers[: settings.freeze_layers]:
            layer.requires_grad_(False)


def batch_of(rows: Sequence[Row], model: PreTrainedModel, pad_id: int) -> Batch:
    """The rows as tensors on the device of `model`."""
    return collate(rows, device=model.device)


def last_checkpoint(work_directory: Path) -> Path | None:
    """The newest whole checkpoint; None where there is none."""
    whole = [c for c in _checkpoints(work_directory) if _is_whole(c)]
    return max(whole, key=_step_of, default=None)


def _checkpoints(work_directory: Path) -> list[Path]:
    return [p for p in work_directory.glob("checkpoint-*") if p.name.split("-")[1].isdigit()]


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def _is_whole(checkpoint: Path) -> bool:
    try:
        state = json.loads((checkpoint / _STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(state["global_step"] == _step_of(checkpoint))


def _only(elements: list[Step[ExampleT]]) -> dict[str, Step[ExampleT]]:
    (step,) = elements
    return {"step": step}


def _on_cpu(compute: Compute) -> bool:
    return compute.device == "cpu" or not torch.cuda.is_available()


def _layers(model: PreTrainedModel) -> list[nn.ModuleList]:
    """Layers from the lowest: of the decoder, or of the encoder and of the decoder."""
    if model.config.is_encoder_decoder:
        return [model.get_encoder().block, model.get_decoder().block]
    return [model.get_decoder().layers]


def _autocast(model: PreTrainedModel) -> None:
    """Let the decoder, the encoder where there is one, and the head compute in bfloat16.

    Not the whole step: the ranker projects on its two labels in float32 by the head's weights.
    """
    modules = [model.get_decoder(), model.get_output_embeddings()]
    if model.config.is_encoder_decoder:
        modules.append(model.get_encoder())
    for module in modules:
        module.forward = torch.autocast(model.device.type, torch.bfloat16)(module.forward)


def _attention(compute: Compute) -> AbstractContextManager[None]:
    """The choice of attention kernels for a training step.

    Not the fused one in bfloat16 on a CPU: its backward pass took 41 ms where the plain one takes 4
    (8 rows of 75 tokens, 9 heads of 64, 2 cores), a third of the whole step.
    """
    slow = _on_cpu(compute) and weights_dtype(compute) == torch.bfloat16
    return sdpa_kernel(SDPBackend.MATH) if slow else nullcontext()


def _arguments(
    settings: Optimisation, compute: Compute, num_steps: int, seed: int, work_directory: str
) -> TrainingArguments:
    optimisers = {"adamw": "adamw_torch_fused", "adafactor": "adafactor"}
    schedules = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
    arguments = TrainingArguments(
        output_dir=work_directory,
        per_device_train_batch_size=1,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        learning_rate=settings.learning_rate,
        optim=optimisers[settings.optimizer],
        lr_scheduler_type=schedules[settings.schedule],
        warmup_steps=math.ceil(settings.warmup * num_steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        seed=seed % 2**32,
        use_cpu=_on_cpu(compute),
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    # Several GPUs are used by several processes; in one, Trainer would split a step between them.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments
