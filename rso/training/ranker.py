"""Training of the pairwise ranker on comparisons."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from rso import seeds
from rso.config import Compute, Templates, TrainRanker
from rso.errors import UserError
from rso.prefix import Row, last_logits
from rso.statistics import Interval, wilson
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

# Fewer than so many comparisons tell nothing of a bin.
_LEAST_IN_A_BIN, _MOST_BINS = 12, 4


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
class HeldOut:
    """The ranker on validation comparisons; a margin of exactly zero counts one half.

    `by_margin` and `by_length` are in bins: by the ranker's own |margin|, nats, and by how many
    characters the chosen text has more than the rejected one.

    `longer` is the accuracy of preferring the text with more characters. `chosen_longer` and
    `chosen_shorter` are the ranker's accuracy where the chosen text is the longer or the shorter
    one; a ranker that only likes length has nearly 1 and 0 there.
    """

    accuracy: Interval
    longer: Interval
    chosen_longer: Interval | None
    chosen_shorter: Interval | None
    mean_loss: float
    by_margin: tuple["Bin", ...]
    by_length: tuple["Bin", ...]


@dataclass(frozen=True)
class Bin:
    """Accuracy on the comparisons whose value lies in [low, high].

    `probability` is what the ranker gave its own preference, on average: where it exceeds the
    accuracy the ranker is too sure.
    """

    low: float
    high: float
    accuracy: Interval
    probability: float


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

    def evaluate(model: PreTrainedModel) -> HeldOut:
        return judge(validation, _held_out_margins(model, examples, trainer, compute.token_budget))

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


def judge(comparisons: Sequence[LabelledComparison], margins: Sequence[float]) -> HeldOut:
    """Accuracy of `margins` [comparison] in all, and by which of the texts is the longer one."""
    hits = [0.5 if z == 0 else float(z > 0) for z in margins]
    excess = [len(c.chosen) - len(c.rejected) for c in comparisons]
    return HeldOut(
        accuracy=wilson(sum(hits), len(hits)),
        longer=wilson(sum(0.5 if e == 0 else float(e > 0) for e in excess), len(excess)),
        chosen_longer=_accuracy([h for h, e in zip(hits, excess, strict=True) if e > 0]),
        chosen_shorter=_accuracy([h for h, e in zip(hits, excess, strict=True) if e < 0]),
        mean_loss=float(-functional.logsigmoid(torch.tensor(margins)).mean()),
        by_margin=_bins([abs(z) for z in margins], hits, margins),
        by_length=_bins(excess, hits, margins),
    )


def _bins(
    values: Sequence[float], hits: Sequence[float], margins: Sequence[float]
) -> tuple[Bin, ...]:
    """Every comparison in one bin; below, at and above zero apart, equal values together."""
    bins = []
    for sign in (-1, 0, 1):
        order = sorted(
            (i for i, v in enumerate(values) if (v > 0) - (v < 0) == sign), key=lambda i: values[i]
        )
        num_bins = max(1, min(_MOST_BINS, len(order) // _LEAST_IN_A_BIN))
        sorted_values = [values[i] for i in order]
        # A bin begins where a new value does.
        starts = {
            bisect_left(sorted_values, sorted_values[len(order) * k // num_bins])
            for k in range(num_bins)
            if order
        }
        for first, last in pairwise([*sorted(starts), len(order)]):
            inside = order[first:last]
            sure = torch.tensor([margins[i] for i in inside]).abs().sigmoid()
            bins.append(
                Bin(
                    float(values[inside[0]]),
                    float(values[inside[-1]]),
                    wilson(sum(hits[i] for i in inside), len(inside)),
                    float(sure.mean()),
                )
            )
    return tuple(bins)


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


def _accuracy(hits: Sequence[float]) -> Interval | None:
    return wilson(sum(hits), len(hits)) if hits else None
