"""The checkpoint that is kept: evaluated at planned steps, remembered over interruptions."""

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, TrainerCallback

from rso.config import Compute
from rso.training.base import PrefixTrainer
from rso.training.loading import load

Figures = Mapping[str, float]


class Judged(NamedTuple):
    """The figures of a model with a value for each item it was judged on, in one order."""

    figures: Figures
    values: Sequence[float]


Evaluate = Callable[[PreTrainedModel], Figures | Judged]
_VALUES = "values"


class Selection(TrainerCallback):
    """Keeps the checkpoint whose figures rank highest; the first of equals.

    `evaluate` gives the figures of a model in evaluation mode, loaded as it would be written, alone
    or with the values that two checkpoints are compared by. `rank` turns the figures into what is
    compared. With `patience`, training stops after so many evaluations that rank no higher than an
    earlier one. Without `evaluate` the last state is kept.

    `evaluations` has one entry for each evaluation: `step` and the figures.
    """

    def __init__(
        self,
        trainer: PrefixTrainer[Any],
        compute: Compute,
        *,
        num_evaluations: int,
        evaluate: Evaluate | None,
        rank: Callable[[Figures], tuple[float, ...]],
        patience: int | None = None,
    ) -> None:
        self._trainer, self._compute = trainer, compute
        self._evaluate, self._rank, self._patience = evaluate, rank, patience
        self._directory = trainer.work_directory
        self._due = evaluation_steps(len(trainer.steps), num_evaluations)
        self._entries = self._read() if evaluate else []

    @property
    def evaluations(self) -> list[Figures]:
        """Step and figures of every evaluation so far, in their order."""
        return [
            {name: figure for name, figure in entry.items() if name != _VALUES}
            for entry in self._entries
        ]

    @property
    def ranking(self) -> list[Figures]:
        """The evaluations so far, the best one first, the first of equals before the others."""
        return sorted(self.evaluations, key=lambda e: (self._rank(e), -e["step"]), reverse=True)

    @property
    def best(self) -> Figures | None:
        """The evaluation that ranks highest so far, the first of equals."""
        return next(iter(self.ranking), None)

    def values(self, step: float) -> list[float]:
        """The values of the evaluation at `step`, one for each item; none where it has none."""
        (found,) = (entry.get(_VALUES, []) for entry in self._entries if entry["step"] == step)
        return list(found)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate the model as it would be written, and write it where it is the best so far."""
        step = state.global_step
        if self._evaluate is None or step not in self._due:
            return
        if step not in {e["step"] for e in self.evaluations}:
            written = self._place(step)
            self._trainer.write(written)
            if self._trainer.is_world_process_zero():
                self._judge(step, written, self._evaluate)
            self._trainer.accelerator.wait_for_everyone()
            self._entries = self._read()
        control.should_training_stop |= self._is_enough(step)

    def write(self, output_directory: str) -> int:
        """Write the kept model to `output_directory`; its step."""
        if self.best is None:
            self._trainer.write(output_directory)
            return int(self._trainer.state.global_step)
        step = int(self.best["step"])
        if self._trainer.is_world_process_zero():
            shutil.copytree(self._place(step), output_directory, dirs_exist_ok=True)
        self._trainer.accelerator.wait_for_everyone()
        return step

    def _judge(self, step: int, written: Path, evaluate: Evaluate) -> None:
        model, _ = load(str(written), self._compute)
        # Decoding may draw random numbers; training must go on as if it had not.
        with torch.no_grad(), torch.random.fork_rng():
            found = evaluate(model)
        judged = found if isinstance(found, Judged) else Judged(found, ())
        entry = {"step": step, **judged.figures}
        self._entries.append(entry | ({_VALUES: list(judged.values)} if judged.values else {}))
        self._write()
        for other in self._directory.glob("best-*"):
            if self.best and other != self._place(int(self.best["step"])):
                shutil.rmtree(other)

    def _is_enough(self, step: int) -> bool:
        """Whether the best of the evaluations up to `step` is `patience` evaluations old."""
        if self._patience is None:
            return False
        seen = [e for e in self.evaluations if e["step"] <= step]
        best = max(range(len(seen)), key=lambda i: (self._rank(seen[i]), -i))
        return len(seen) - 1 - best >= self._patience

    def _place(self, step: int) -> Path:
        return self._directory / f"best-{step}"

    def _read(self) -> list[dict[str, Any]]:
        path = self._directory / "evaluations.json"
        if not path.exists():
            return []
        found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def _write(self) -> None:
        path = self._directory / "evaluations.json"
        aside = path.with_suffix(".partial")
        aside.write_text(json.dumps(self._entries), encoding="utf-8")
        os.replace(aside, path)


def evaluation_steps(num_steps: int, num_evaluations: int) -> set[int]:
    """Evenly spaced steps, from 1, the last one among them."""
    return {math.ceil(i * num_steps / num_evaluations) for i in range(1, num_evaluations + 1)}
