"""Training of the pairwise ranker on comparisons."""

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
    """How the training went and how good the ranker is.

    `held_out` and `each_order` are None without validation. `evaluations` are those that chose the
    checkpoint: step, accuracy and loss on validation.
    """

    training: TrainingResult
    held_out: HeldOut | None
    each_order: EachOrder | None
    num_truncated: int
    evaluations: list[Figures]
    selected_step: int


@dataclass(frozen=True)
class RankerExample(Example):
    """The comparisons of a prompt, all of them in one order or all in both.

    Branches are those of the first comparison, then those of the next. Where `signs[i]` is +1 the
    chosen response is in slot A of branch i, where it is -1 in slot B. Of both orders that with the
    chosen response in slot A comes first.
    """

    signs: tuple[float, ...]
    weights: tuple[float, ...]


class RankerTrainer(PrefixTrainer[RankerExample]):
    """Logistic loss by `orders` and the bias penalty, times the weights of the comparisons."""

    label_ids: LabelIds
    settings: TrainRanker

    def sums(self, model: PreTrainedModel, examples: Sequence[RankerExample]) -> Sums:
        """The weighted losses summed over comparisons; figures are those of the mean margin."""
        z = margins(model, examples, self.label_ids)
        weights = torch.tensor([w for e in examples for w in e.weights], device=z.device)
        losses = LOSSES[self.settings.orders](z)
        if self.settings.bias_penalty:
            losses = losses + self.settings.bias_penalty * slot_bias(z).square()
        mean = z.detach().mean(dim=1)
        figures = {"accuracy": float(_hits(mean).sum()), "margin": float(mean.sum())}
        return Sums((losses * weights).sum(), figures)


def margin_loss(z: Tensor) -> Tensor:
    """Return -log sigmoid(mean margin) [comparison], nats, of margins z [comparison, order].

    It does not see the positional bias, which cancels in the mean of both orders.
    """
    return -functional.logsigmoid(z.mean(dim=1))


def mean_loss(z: Tensor) -> Tensor:
    """Return the mean over orders of -log sigmoid(margin) [comparison], nats.

    The margins z are [comparison, order]. With both orders this is the expectation of the loss of
    one random order, the paper's flip.
    """
    return -functional.logsigmoid(z).mean(dim=1)


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "margin": margin_loss,
    "mean": mean_loss,
    "flip": mean_loss,
}


def slot_bias(z: Tensor) -> Tensor:
    """Return (z_AB + z_BA) / 2 [comparison], nats, of margins z [comparison, 2]."""
    return (z[:, 0] - z[:, 1]) / 2


def margins(
    model: PreTrainedModel,
    examples: Sequence[RankerExample],
    label_ids: LabelIds,
) -> Tensor:
    """Margin of chosen over rejected in each order [comparison, order], nats, fp32.

    A margin is logit_A - logit_B where the chosen response is in slot A, and minus that where it is
    in slot B; of both orders they are z_AB and -z_BA.
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
    held_out, each_order = None, None
    if validation:
        held_out, each_order = evaluate(load(output_directory, compute)[0])
    return RankerResult(
        result,
        held_out,
        each_order,
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
        branches, signs = [], []
        for item in group:
            for sign in self._orders[item]:
                branches.append(self._branch(self.comparisons[item], sign))
                signs.append(sign)
        return RankerExample(
            prompt_id=prompt_id,
            row=Row(self._contexts[prompt_id].ids, branches),
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
    """Return `margins` of all comparisons in both orders, [comparison, 2], examples in order."""
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
