"""Training of the pairwise ranker on comparisons."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from rso import seeds
from rso.calibration import HeldOut, judge
from rso.config import Compute, Templates, TrainRanker
from rso.errors import UserError
from rso.prefix import Row, last_logits
from rso.templates import LabelIds, RankerEncoder
from rso.training.base import (
    PrefixTrainer,
    Sums,
    TrainingResult,
    batch_of,
)
from rso.training.loading import load
from rso.training.selection import Figures, Selection
from rso.training.steps import Example, Steps, by_prompt, choose, micro_batches, plan_steps


class LabelledComparison(NamedTuple):
    """Two responses to a prompt and which is preferred."""

    prompt_id: str
    comparison_id: str
    prompt: str
    chosen: str
    rejected: str
    weight: float
    split: str


@dataclass(frozen=True)
class RankerResult:
    """How the training went and how good the ranker is; `held_out` is None without validation.

    `evaluations` are those that chose the checkpoint: step, accuracy and loss on validation.
    """

    training: TrainingResult
    held_out: HeldOut | None
    num_truncated: int
    evaluations: list[Figures]
    selected_step: int


@dataclass(frozen=True)
class RankerExample(Example):
    """The comparisons of a prompt. Branch i belongs to comparison `owners[i]` of the example.

    Where `signs[i]` is +1 the chosen response is in slot A of branch i, where it is -1 in slot B.
    """

    owners: tuple[int, ...]
    signs: tuple[float, ...]
    weights: tuple[float, ...]


class RankerTrainer(PrefixTrainer[RankerExample]):
    """Logistic loss of the margin, the orders of a comparison averaged within it."""

    label_ids: LabelIds

    def sums(self, model: PreTrainedModel, examples: Sequence[RankerExample]) -> Sums:
        """-log sigmoid(margin) times the comparison's weight, summed over comparisons."""
        z = margins(model, examples, self.label_ids)
        weights = torch.tensor([w for e in examples for w in e.weights], device=z.device)
        loss = -(functional.logsigmoid(z) * weights).sum()
        return Sums(loss, {"accuracy": float(_hits(z).sum()), "margin": float(z.detach().sum())})


def margins(
    model: PreTrainedModel,
    examples: Sequence[RankerExample],
    label_ids: LabelIds,
) -> Tensor:
    """Margin of chosen over rejected [comparison], nats, fp32: the signed logit_A - logit_B.

    With both orders it is (z_AB - z_BA) / 2, in which a constant preference for a slot cancels.
    """
    batch = batch_of([e.row for e in examples], model)
    logits = last_logits(model, batch, label_ids)
    signs = torch.tensor([s for e in examples for s in e.signs], device=logits.device)
    signed = (logits[:, 0] - logits[:, 1]) * signs
    owners: list[int] = []
    num_comparisons = 0
    for example in examples:
        owners += [num_comparisons + owner for owner in example.owners]
        num_comparisons += len(example.weights)
    index = torch.tensor(owners, device=logits.device)
    total = signed.new_zeros(num_comparisons).index_add(0, index, signed)
    return total / torch.bincount(index, minlength=num_comparisons)


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

    Comparisons whose split is `train` are learnt, those of `validation` are held out, others are
    left alone. `what` names the stage in messages and keys its randomness. The loss of a step is
    the sum of its weighted losses over its `batch_size` comparisons. With several
    `num_evaluations` the checkpoint with the highest held-out accuracy is written, of equals the
    one with the lowest loss, and `patience` may stop before the end. Goes on from a checkpoint in
    `work_directory`.

    Raises:
        UserError: no comparisons, or settings that do not fit the model.
        TrainingDiverged: the loss is not finite.
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
    model, tokenizer = load(init_directory, compute, settings.lora)
    encoder = RankerEncoder(tokenizer, templates)
    rows = _Rows(encoder, training, flip=(what, seed) if settings.orders == "flip" else None)
    plan = plan_steps(
        rows.prompt_ids,
        batch_size=settings.batch_size,
        epochs=settings.epochs,
        max_steps=settings.max_steps,
        key=(what, seed),
    )
    steps = Steps(plan, rows.build, weigh=len, token_budget=settings.token_budget)
    trainer = RankerTrainer(
        model,
        steps,
        settings=settings,
        compute=compute,
        tokenizer=tokenizer,
        seed=seed,
        work_directory=work_directory,
        what=what,
    )
    trainer.label_ids = encoder.labels
    held_out_rows = _Rows(encoder, validation, flip=None)
    examples = held_out_rows.build(range(len(validation)))
    excess = [len(c.chosen) - len(c.rejected) for c in validation]

    def evaluate(model: PreTrainedModel) -> HeldOut:
        return judge(_held_out_margins(model, examples, trainer, compute.token_budget), excess)

    def figures(model: PreTrainedModel) -> Figures:
        held_out = evaluate(model)
        return {"accuracy": held_out.accuracy.value, "held_out_loss": held_out.mean_loss}

    selection = Selection(
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
    held_out = evaluate(load(output_directory, compute)[0]) if validation else None
    return RankerResult(
        result,
        held_out,
        rows.num_truncated + held_out_rows.num_truncated,
        selection.evaluations,
        selected,
    )


class _Rows:
    """Comparisons as rows: the context once, then the sides of every comparison in its orders."""

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
        """Contexts that were cut to `max_context_tokens`."""
        return sum(context.num_cut > 0 for context in self._contexts.values())

    def build(self, items: Sequence[int]) -> list[RankerExample]:
        groups = by_prompt(items, self.prompt_ids)
        return [self._example(prompt_id, group) for prompt_id, group in groups]

    def _example(self, prompt_id: str, group: Sequence[int]) -> RankerExample:
        branches, owners, signs = [], [], []
        for owner, item in enumerate(group):
            for sign in self._orders[item]:
                branches.append(self._branch(self.comparisons[item], sign))
                owners.append(owner)
                signs.append(sign)
        return RankerExample(
            prompt_id=prompt_id,
            row=Row(self._contexts[prompt_id].ids, branches),
            owners=tuple(owners),
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
    trainer: RankerTrainer,
    token_budget: int,
) -> list[float]:
    found: dict[int, Tensor] = {}
    for batch in micro_batches(examples, token_budget):
        z = margins(model, batch, trainer.label_ids).cpu()
        for example, part in zip(
            batch, torch.split(z, [len(e.weights) for e in batch]), strict=True
        ):
            found[id(example)] = part
    return [float(z) for example in examples for z in found[id(example)]]


def _hits(z: Tensor) -> Tensor:
    return torch.where(z == 0, 0.5, (z > 0).float())
