"""Evaluate checkpoints at planned steps and keep the best; a restarted training knows them all."""

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, TrainerCallback

from rso.config import Compute
from rso.files import write_json
from rso.training.base import PrefixTrainer
from rso.training.loading import load_for_training

Figures = Mapping[str, float]


class Judged(NamedTuple):
    """The figures of a model, and one value per item that it was judged on.

    The order of the items must be the same at every evaluation.
    """

    figures: Figures
    values: Sequence[float]


JudgeCheckpoint = Callable[[PreTrainedModel], Figures | Judged]
_VALUES = "values"


class CheckpointSelection(TrainerCallback):
    """Keeps the checkpoint whose figures rank highest, and the first of those that rank equal.

    Training writes the model at `num_evaluations` evenly spaced steps. `evaluate` takes the written
    model, loaded again in evaluation mode. It returns figures, or figures with the values by which
    two checkpoints are compared. `rank` turns figures into a tuple; the largest tuple ranks
    highest. With `patience`, training stops once this many evaluations follow the best one. Without
    `evaluate` the last state of the model is kept.
    """

    def __init__(
        self,
        trainer: PrefixTrainer[Any],
        compute: Compute,
        *,
        num_evaluations: int,
        evaluate: JudgeCheckpoint | None,
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
        """One entry per evaluation so far, in order of steps: `step` and the figures."""
        return [
            {name: figure for name, figure in entry.items() if name != _VALUES}
            for entry in self._entries
        ]

    @property
    def ranking(self) -> list[Figures]:
        """The evaluations so far, the best one first; equal ones in order of steps."""
        return sorted(self.evaluations, key=lambda e: (self._rank(e), -e["step"]), reverse=True)

    @property
    def best(self) -> Figures | None:
        """The first entry of `ranking`; None without evaluations."""
        return next(iter(self.ranking), None)

    def values(self, step: float) -> list[float]:
        """The values of the evaluation at `step`, one per item; [] if it has only figures."""
        (found,) = (entry.get(_VALUES, []) for entry in self._entries if entry["step"] == step)
        return list(found)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """At a planned step, write the model, evaluate it, and keep the best one written so far.

        A step that was evaluated before an interruption is not evaluated again.
        """
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
        """Write the kept model to `output_directory`; return its step."""
        if self.best is None:
            self._trainer.write(output_directory)
            return int(self._trainer.state.global_step)
        step = int(self.best["step"])
        if self._trainer.is_world_process_zero():
            shutil.copytree(self._place(step), output_directory, dirs_exist_ok=True)
        self._trainer.accelerator.wait_for_everyone()
        return step

    def _judge(self, step: int, written: Path, evaluate: JudgeCheckpoint) -> None:
        model, _ = load_for_training(str(written), self._compute)
        # Decoding may draw random numbers. Training must go on as if it had drawn none.
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
        """Whether `patience` evaluations up to `step` follow the best of them."""
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
        write_json(self._directory / "evaluations.json", self._entries)


def evaluation_steps(num_steps: int, num_evaluations: int) -> set[int]:
    """`num_evaluations` evenly spaced steps, counted from 1, with the last step among them.

    There are fewer if `num_steps` is smaller.
    """
    return {math.ceil(i * num_steps / num_evaluations) for i in range(1, num_evaluations + 1)}
