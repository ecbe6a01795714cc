"""What all trainers share: `transformers.Trainer` runs optimiser steps that are planned beforehand.

Each element of `Trainer`'s dataset is one whole optimiser step. So its step count, schedule,
clipping, logging and resuming are exact. `training_step` runs the micro-batches of the step.
"""

import functools
import importlib.util
import json
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, Self

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from rso.config import Compute, Optimisation
from rso.errors import UserError
from rso.files import FULL
from rso.models import save_model
from rso.prefix import Batch, PrefixRow, collate
from rso.progress import progress
from rso.training.adapters import is_adapted, merged_state
from rso.training.loading import autocast, drop_nothing, on_cpu, trainable, weights_dtype
from rso.training.steps import ExampleT, Step, Steps, plan_steps

_STATE_FILE = "trainer_state.json"
_PARTIAL = "partial"
_SHOWN_IDS = 8


class TrainingDiverged(UserError):
    """The loss or its gradient is NaN or infinite."""


@dataclass(frozen=True)
class TrainingResult:
    """The curve of a training and its totals.

    `curve` has one entry per optimiser step: `step`, `loss` (the summed loss divided by
    `Step.divisor`, before the update), `grad_norm` (before clipping), `learning_rate`, `num_items`,
    `num_tokens`, `seconds`, and the figures of the trainer (means over items).

    `num_tokens` counts a shared prefix once. `seconds` is the time within steps. Both totals
    include the steps before an interruption.
    """

    num_steps: int
    num_tokens: int
    seconds: float
    curve: list[dict[str, float]]


class Sums(NamedTuple):
    """The loss of a micro-batch (scalar, with graph) and its figures, summed over its items."""

    loss: Tensor
    figures: Mapping[str, float]


class PrefixTrainer(Trainer, Generic[ExampleT]):
    """A `Trainer` over planned steps of shared-prefix rows; a subclass implements `sums`.

    Dropout follows the model's configuration, unless a subclass sets `has_dropout` to False. `what`
    names the stage in messages.

    Raises:
        UserError: the settings do not fit the model or one another, or a reporter is not installed.
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
        if not self.has_dropout:
            drop_nothing(model)
        model = trainable(model, settings, seed, where=what)
        if weights_dtype(compute) == torch.bfloat16:
            autocast(model)
        arguments = _arguments(settings, compute, len(steps), seed, work_directory)
        self.steps, self.what, self.network = steps, what, model
        self.tokenizer, self.dtype = tokenizer, weights_dtype(compute)
        self.work_directory = Path(work_directory)
        _answer_examples(model, self.sums)
        self._figures: dict[str, float] = {}
        self._started = time.monotonic()
        self._current_ids: list[str] = []
        super().__init__(model=model, args=arguments, train_dataset=steps, data_collator=_only)
        if self.is_fsdp_enabled and settings.lora and settings.lora.quantise != "none":
            raise UserError(
                f"{what}.lora.quantise is {settings.lora.quantise} and accelerate's configuration"
                " shards the model by FSDP, which cannot gather a quantised weight; drop one of"
                " them: 4-bit weights rarely need sharding."
            )
        self.remove_callback(PrinterCallback)
        self._checkpoint_steps = settings.checkpoint_steps

    @classmethod
    def of_items(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompt_ids: Sequence[str],
        build: Callable[[Sequence[int]], list[ExampleT]],
        weigh: Callable[[Sequence[int]], float] = len,
        *,
        settings: Optimisation,
        compute: Compute,
        seed: int,
        work_directory: str,
        what: str,
    ) -> Self:
        """A trainer whose steps are planned by `plan_steps` from the items' `prompt_ids` [item].

        `build` and `weigh` are those of `Steps`. `what` names the stage in messages and is part of
        the key of the order of prompts.

        Raises:
            UserError: the settings do not fit the model.
        """
        plan = plan_steps(
            prompt_ids,
            batch_size=settings.batch_size,
            epochs=settings.epochs,
            max_steps=settings.max_steps,
            key=(what, seed),
        )
        return cls(
            model,
            Steps(plan, build, weigh, token_budget=settings.token_budget),
            settings=settings,
            compute=compute,
            tokenizer=tokenizer,
            seed=seed,
            work_directory=work_directory,
            what=what,
        )

    def sums(self, model: PreTrainedModel, examples: Sequence[ExampleT]) -> Sums:
        """The loss and the figures of one micro-batch, summed over its items."""
        raise NotImplementedError

    def collate(self, examples: Sequence[ExampleT]) -> Batch:
        """The rows of a micro-batch as tensors on the model's device."""
        return batch_of([e.row for e in examples], self.network)

    def run(self) -> TrainingResult:
        """Train, starting from the newest checkpoint in the work directory if there is one.

        Raises:
            TrainingDiverged: a loss or a gradient is not finite.
            UserError: the disk is full.
        """
        total = sum(step.num_tokens for step in self.steps)
        checkpoint = last_checkpoint(self.work_directory)
        with progress(self.what, total=total, unit="tokens") as bar:
            self.add_callback(_Watch(self, bar))
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        curve = [entry for entry in self.state.log_history if "loss" in entry]
        return TrainingResult(
            num_steps=self.state.global_step,
            num_tokens=round(sum(entry["num_tokens"] for entry in curve)),
            seconds=sum(entry["seconds"] for entry in curve),
            curve=curve,
        )

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The loss of one optimiser step (scalar, detached); its gradients are accumulated.

        Raises:
            TrainingDiverged: the loss is not finite.
        """
        self._started = time.monotonic()
        step: Step[ExampleT] = inputs["step"]
        self._current_ids = step.prompt_ids
        model.train()
        num_processes = self.accelerator.num_processes
        share = step.share(self.accelerator.process_index, num_processes)
        batches = [*share.micro_batches, *share.stand_ins]
        losses, figures = [], Counter[str]()
        for number, examples in enumerate(batches):
            # Processes exchange gradients once per step, in the last micro-batch.
            is_last = number == len(batches) - 1
            with nullcontext() if is_last else self.accelerator.no_sync(model):
                sums: Sums = model(examples=examples)
                counts = number < len(share.micro_batches)
                # Processes average their gradients, but the step needs the sum.
                weight = counts * num_processes / step.divisor
                self.accelerator.backward(sums.loss * weight)
            if counts:
                losses.append(float(sums.loss.detach()) / step.divisor)
                figures.update(sums.figures)
        total = self._summed({"loss": sum(losses), **figures}, step)
        loss = total.pop("loss")
        self._check_finite(loss, losses, step)
        self._figures = {name: value / step.num_items for name, value in total.items()}
        self._figures |= {"num_items": step.num_items, "num_tokens": step.num_tokens}
        return torch.tensor(loss, device=self.args.device)

    def _summed(self, figures: Mapping[str, float], step: Step[ExampleT]) -> dict[str, float]:
        """Figures summed over processes; a process without rows in this step has none."""
        if self.accelerator.num_processes == 1:
            return dict(figures)
        everyone = gather_object([dict(figures)])
        return {
            name: math.fsum(given.get(name, 0.0) for given in everyone)
            for name in dict.fromkeys(name for given in everyone for name in given)
        }

    def get_train_dataloader(self) -> DataLoader[Step[ExampleT]]:
        """The steps in order; every process gets all of them."""
        return DataLoader(self.steps, batch_size=1, shuffle=False, collate_fn=_only)

    def write(self, directory: str | Path) -> None:
        """Write the current model, adapters merged, in `weights_dtype`.

        Every process must call this; only the first one writes.

        Raises:
            UserError: the disk is full.
        """
        state = _whole_state(self.network, self.accelerator, self.model_wrapped)
        if self.is_world_process_zero():
            with _room_on_disk(directory, self.what):
                model: Any = self.network
                if is_adapted(model):
                    model, state = model.get_base_model(), merged_state(model, state)
                save_model(model, self.tokenizer, directory, dtype=self.dtype, state=state)
        self.accelerator.wait_for_everyone()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the figures of the step to its entry in the log history."""
        if "loss" in logs:
            logs.update(self._figures, seconds=time.monotonic() - self._started)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Zero, because `Trainer`'s estimate needs one tensor of inputs and a step has none."""
        return 0

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        norm: Tensor = super()._clip_grad_norm(model)
        if not math.isfinite(float(norm)):
            raise self._diverged(f"the gradient's norm is {float(norm)}", self._current_ids)
        return norm

    def _check_finite(self, total: float, losses: list[float], step: Step[ExampleT]) -> None:
        if math.isfinite(total):
            return
        share = step.share(self.accelerator.process_index, self.accelerator.num_processes)
        for loss, examples in zip(losses, share.micro_batches, strict=True):
            if not math.isfinite(loss):
                raise self._diverged(f"the loss is {loss}", [e.prompt_id for e in examples])
        # The micro-batch is in another process. All processes stop at this step.
        raise self._diverged(f"the loss is {total}", step.prompt_ids)

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
        """Write a checkpoint aside, rename it, then delete the older ones.

        After a kill or a full disk at any moment, the newest complete checkpoint is still there.
        """
        partial = self.work_directory / _PARTIAL
        if self.is_world_process_zero():
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        with _room_on_disk(partial, self.what):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        name = f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero():
            os.replace(partial / name, self.work_directory / name)
            for other in _checkpoints(self.work_directory):
                if other.name != name:
                    shutil.rmtree(other)
        self.accelerator.wait_for_everyone()


class _Watch(TrainerCallback):
    """Shows progress and decides when to write a checkpoint.

    The last step writes none, because the model itself is written then.
    """

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


def batch_of(rows: Sequence[PrefixRow], model: PreTrainedModel) -> Batch:
    """The rows as one batch on the device of `model`."""
    return collate(rows, device=model.device)


def last_checkpoint(work_directory: Path) -> Path | None:
    """The newest complete checkpoint; None if there is none."""
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


def _answer_examples(model: nn.Module, sums: Callable[..., Sums]) -> None:
    """Make `model(examples=...)` compute `sums`, so that DDP and FSDP see a forward pass."""
    forward = model.forward

    def answer(*args: Any, examples: Sequence[Any] | None = None, **kwargs: Any) -> Any:
        return forward(*args, **kwargs) if examples is None else sums(model, examples)

    # Trainer reads the signature of `forward`.
    model.forward = functools.update_wrapper(answer, forward)


def _whole_state(network: nn.Module, accelerator: Any, wrapped: nn.Module) -> dict[str, Tensor]:
    """All weights. If processes hold parts of them, only the first process gets them all."""
    if accelerator.num_processes > 1:
        state: dict[str, Tensor] = accelerator.get_state_dict(wrapped)
        return state
    return network.state_dict()


@contextmanager
def _room_on_disk(path: str | Path, what: str) -> Iterator[None]:
    """Turn the error of a full disk into a clear message; every library words it differently.

    Raises:
        UserError: the disk is full.
    """
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        words = str(error)
        if number in FULL or any(os.strerror(n) in words for n in FULL):
            free = shutil.disk_usage(Path(path).parent).free
            raise UserError(
                f"{what}: the disk is full: {path} could not be written ({words}),"
                f" {free / 2**20:.0f} MiB are free. Nothing earlier was touched: make room and"
                " run again, which goes on from the last checkpoint."
            ) from error
        raise


def _check_reporters(settings: Optimisation) -> None:
    # By default TensorBoard logs to the work directory, which is deleted when the stage is done.
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", "logs")
    missing = [name for name in settings.report_to if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"report_to names {missing[0]}, which is not installed; `pip install {missing[0]}`, or"
            " remove it. The curve is in the manifest and in the report either way."
        )


def _arguments(
    settings: Optimisation, compute: Compute, num_steps: int, seed: int, work_directory: str
) -> TrainingArguments:
    _check_reporters(settings)
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
        use_cpu=on_cpu(compute),
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=list(settings.report_to) or "none",
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        # The other processes wait while the first one evaluates.
        ddp_timeout=7 * 24 * 3600,
        disable_tqdm=True,
        log_level="error",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    # Every process uses one GPU. With more, Trainer would split a step between them.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments
