"""Train the pairwise ranker on comparisons."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from rso import seeds
from rso.calibration import EachOrder, HeldOut, in_each_order, judge
from rso.config import Compute, Templates, TrainRanker
from rso.errors import UserError
from rso.prefix import PrefixRow, last_logits
from rso.templates import LabelIds, RankerEncoder
from rso.training.base import (
    PrefixTrainer,
    Sums,
    TrainingResult,
    batch_of,
)
from rso.training.loading import load_for_training
from rso.training.selection import CheckpointSelection, Figures
from rso.training.steps import (
    TrainingExample,
    choose,
    group_by_prompt,
    micro_batches,
)


class LabelledComparison(NamedTuple):
    """Two responses to a prompt; `chosen` is the preferred one. `weight` multiplies its loss."""

    prompt_id: str
    comparison_id: str
    prompt: str
    chosen: str
    rejected: str
    weight: float
    split: str


@dataclass(frozen=True)
class RankerResult:
    """The result of a training, and the quality of the ranker that was written.

    `held_out` and `each_order` are None without validation comparisons. `num_truncated` counts
    prompts whose ranker context was cut, in training and in validation. `evaluations` have `step`,
    `accuracy` and `held_out_loss` of each checkpoint that was compared; [] if `num_evaluations` is
    1.
    """

    training: TrainingResult
    held_out: HeldOut | None
    each_order: EachOrder | None
    num_truncated: int
    evaluations: list[Figures]
    selected_step: int


# The loss of the margin does not see the slot bias, so without a penalty the slot may decide every
# verdict of one order. docs/lab-notes.md has the measurements on five seeds.
MARGIN_PENALTY = 0.02


@dataclass(frozen=True)
class RankerExample(TrainingExample):
    """The comparisons of a prompt, each in one order or each in both orders.

    The row has the branches of the first comparison, then those of the next. A branch is one order
    of a comparison. The chosen response of branch i is in slot A if `signs[i]` is +1, and in slot B
    if it is -1. Of both orders, the one with the chosen response in slot A comes first. `weights`
    has one entry per comparison.
    """

    signs: tuple[float, ...]
    weights: tuple[float, ...]


class RankerTrainer(PrefixTrainer[RankerExample]):
    """The logistic loss of `orders` plus the bias penalty, times the weight of the comparison."""

    label_ids: LabelIds
    settings: TrainRanker

    def sums(self, model: PreTrainedModel, examples: Sequence[RankerExample]) -> Sums:
        """The weighted loss and the figures `accuracy` and `margin`, summed over comparisons.

        `margin` (nats) is averaged over orders. `accuracy` counts a positive margin as one and a
        margin of 0 as one half.
        """
        z = margins(model, examples, self.label_ids)
        weights = torch.tensor([w for e in examples for w in e.weights], device=z.device)
        losses = ORDER_LOSSES[self.settings.orders](z)
        penalty = penalty_of(self.settings)
        if penalty:
            losses = losses + penalty * slot_bias(z).square()
        mean = z.detach().mean(dim=1)
        figures = {"accuracy": float(_hits(mean).sum()), "margin": float(mean.sum())}
        return Sums((losses * weights).sum(), figures)


def penalty_of(settings: TrainRanker) -> float:
    """Return the weight of the squared slot bias in the loss of a comparison."""
    if settings.bias_penalty is not None:
        return settings.bias_penalty
    return MARGIN_PENALTY if settings.orders == "margin" else 0.0


def margin_loss(z: Tensor) -> Tensor:
    """Return -log sigmoid(mean margin) [comparison], nats, for margins z [comparison, order].

    The positional bias cancels in the mean of both orders, so the loss does not depend on it.
    """
    return -functional.logsigmoid(z.mean(dim=1))


def mean_loss(z: Tensor) -> Tensor:
    """Return the mean over orders of -log sigmoid(margin) [comparison], nats.

    The margins z are [comparison, order]. With both orders the result is the expected loss of one
    random order, the paper's flip.
    """
    return -functional.logsigmoid(z).mean(dim=1)


ORDER_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "margin": margin_loss,
    "mean": mean_loss,
    "flip": mean_loss,
}


def slot_bias(z: Tensor) -> Tensor:
    """Return (z_AB + z_BA) / 2 [comparison], nats, for margins z [comparison, 2].

    It is positive if the ranker favours slot A.
    """
    return (z[:, 0] - z[:, 1]) / 2


def margins(
    model: PreTrainedModel,
    examples: Sequence[RankerExample],
    label_ids: LabelIds,
) -> Tensor:
    """Margins of chosen over rejected in each order, fp32 [comparison, order], nats.

    A margin is logit_A - logit_B if the chosen response is in slot A, and logit_B - logit_A if it
    is in slot B. The margins of both orders are z_AB and -z_BA.
    """
    batch = batch_of([e.row for e in examples], model)
    logits = last_logits(model, batch, label_ids)
    signs = torch.tensor([s for e in examples for s in e.signs], device=logits.device)
    num_comparisons = sum(len(e.weights) for e in examples)
    return ((logits[:, 0] - logits[:, 1]) * signs).view(num_comparisons, -1)


def train_ranker(
    init_directory: str,
    comparisons: Sequence[LabelledComparison],
    settings: TrainRanker,
    compute: Compute,
    templates: Templates,
    *,
    seed: int,
    work_directory: str,
    output_directory: str,
    what: str = "train_ranker",
) -> RankerResult:
    """Train the model at `init_directory` as a ranker, write it, and judge it on validation.

    Comparisons of the split `train` are used for training and those of `validation` are held out.
    All others are ignored. `what` names the stage in messages and is part of the key of its
    randomness. The loss of a step is the sum of the weighted losses of its comparisons, divided by
    their number.

    With more than one of `num_evaluations`, the checkpoint with the highest held-out accuracy is
    written. Among equals it is the one with the lowest held-out loss, then the first. `patience`
    may stop the training early. With one evaluation the model after the last step is written.
    Training continues from a checkpoint in `work_directory` if there is one.

    Raises:
        UserError: there are no training comparisons, there are several evaluations and no
            validation comparisons, the settings do not fit the model, or the disk is full.
        TrainingDiverged: a loss or a gradient is not finite.
    """
    training = [c for c in comparisons if c.split == "train"]
    validation = [c for c in comparisons if c.split == "validation"]
    if not training:
        raise UserError(f"{what}: no training comparisons among {len(comparisons)}; check splits.")
    if settings.num_evaluations > 1 and not validation:
        raise UserError(
            f"{what}.num_evaluations is {settings.num_evaluations}, and no comparison is held out"
            " to evaluate on; put some into the validation split, or set it to 1."
        )
    chosen = choose([c.prompt_id for c in training], settings.max_comparisons, (what, seed))
    training = [training[i] for i in chosen]
    model, tokenizer = load_for_training(init_directory, compute, settings.lora)
    encoder = RankerEncoder(tokenizer, templates)
    rows = _Rows(encoder, training, flip=(what, seed) if settings.orders == "flip" else None)
    trainer = RankerTrainer.of_items(
        model,
        tokenizer,
        rows.prompt_ids,
        rows.build,
        settings=settings,
        compute=compute,
        seed=seed,
        work_directory=work_directory,
        what=what,
    )
    trainer.label_ids, trainer.settings = encoder.labels, settings
    held_out_rows = _Rows(encoder, validation, flip=None)
    examples = held_out_rows.build(range(len(validation)))
    excess = [len(c.chosen) - len(c.rejected) for c in validation]

    def evaluate(model: PreTrainedModel) -> tuple[HeldOut, EachOrder]:
        found = _held_out_margins(model, examples, trainer.label_ids, compute.token_budget)
        forward, backward = found[:, 0].numpy(), -found[:, 1].numpy()
        return judge((forward - backward) / 2, excess), in_each_order(forward, backward)

    def figures(model: PreTrainedModel) -> Figures:
        held_out, _ = evaluate(model)
        return {"accuracy": held_out.accuracy.value, "held_out_loss": held_out.mean_loss}

    selection = CheckpointSelection(
        trainer,
        compute,
        num_evaluations=settings.num_evaluations,
        evaluate=figures if settings.num_evaluations > 1 else None,
        rank=lambda found: (found["accuracy"], -found["held_out_loss"]),
        patience=settings.patience,
    )
    trainer.add_callback(selection)
    result = trainer.run()
    selected = selection.write(output_directory)
    held_out, each_order = None, None
    if validation:
        held_out, each_order = evaluate(load_for_training(output_directory, compute)[0])
    return RankerResult(
        result,
        held_out,
        each_order,
        rows.num_truncated + held_out_rows.num_truncated,
        selection.evaluations,
        selected,
    )


class _Rows:
    """Turns the comparisons of a prompt into one row: the context, then a branch for each order.

    Without `flip` every comparison has both orders. With `flip`, which is a key, it has one random
    order.
    """

    def __init__(
        self,
        encoder: RankerEncoder,
        comparisons: Sequence[LabelledComparison],
        *,
        flip: tuple[str, int] | None,
    ) -> None:
        self.comparisons = list(comparisons)
        self.prompt_ids = [c.prompt_id for c in comparisons]
        self._encoder = encoder
        self._contexts = {c.prompt_id: encoder.context(c.prompt) for c in comparisons}
        self._orders = [self._signs(c, flip) for c in comparisons]

    @property
    def num_truncated(self) -> int:
        """The number of contexts that were cut to `max_context_tokens`, one context per prompt."""
        return sum(context.num_cut > 0 for context in self._contexts.values())

    def build(self, items: Sequence[int]) -> list[RankerExample]:
        groups = group_by_prompt(items, self.prompt_ids)
        return [self._example(prompt_id, group) for prompt_id, group in groups]

    def _example(self, prompt_id: str, group: Sequence[int]) -> RankerExample:
        branches, signs = [], []
        for item in group:
            for sign in self._orders[item]:
                branches.append(self._branch(self.comparisons[item], sign))
                signs.append(sign)
        return RankerExample(
            prompt_id=prompt_id,
            row=PrefixRow(self._contexts[prompt_id].ids, branches),
            signs=tuple(signs),
            weights=tuple(self.comparisons[item].weight for item in group),
        )

    def _branch(self, comparison: LabelledComparison, sign: float) -> list[int]:
        a, b = comparison.chosen, comparison.rejected
        return self._encoder.branch(a, b) if sign > 0 else self._encoder.branch(b, a)

    @staticmethod
    def _signs(comparison: LabelledComparison, flip: tuple[str, int] | None) -> tuple[float, ...]:
        if flip is None:
            return (1.0, -1.0)
        (draw,) = seeds.uniforms_at(seeds.bases([comparison.comparison_id], *flip, "flip"), 0)
        return (1.0,) if draw < 0.5 else (-1.0,)


@torch.no_grad()
def _held_out_margins(
    model: PreTrainedModel,
    examples: Sequence[RankerExample],
    label_ids: LabelIds,
    token_budget: int,
) -> Tensor:
    """Return `margins` of all comparisons in both orders, [comparison, 2], in order of examples."""
    found: dict[int, Tensor] = {}
    for batch in micro_batches(examples, token_budget):
        z = margins(model, batch, label_ids).cpu()
        for example, part in zip(
            batch, torch.split(z, [len(e.weights) for e in batch]), strict=True
        ):
            found[id(example)] = part
    return torch.cat([found[id(example)] for example in examples])


def _hits(z: Tensor) -> Tensor:
    return torch.where(z == 0, 0.5, (z > 0).float())
