"""Train the policy on labelled pairs (eq. 1, 8, 9, 10, RRHF) or on new targets (RAFT, ReST).

With every loss, the checkpoint that the ranker prefers is kept.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rso import losses
from rso.config import Compute, Templates, TrainPolicy
from rso.errors import UserError
from rso.evaluation import POINTS, verdict_from_logit
from rso.losses import Side
from rso.prefix import PrefixRow, branch_logps
from rso.statistics import Interval, paired_bootstrap_difference
from rso.templates import encode_prompt, encode_response
from rso.training.base import (
    PrefixTrainer,
    Sums,
    TrainingResult,
    batch_of,
    last_checkpoint,
)
from rso.training.loading import load_for_training
from rso.training.selection import CheckpointSelection, Judged
from rso.training.sft import Demonstration, sft_trainer
from rso.training.steps import TrainingExample, group_by_prompt, micro_batches

_WHAT = "train_policy"
ReferenceLogps = Mapping[tuple[str, str], float]
JudgeAnswers = Callable[[PreTrainedModel], Sequence[float]]
"""Takes a policy; returns the ranker's margins of its answers over others, [prompt], nats."""


class PolicyPair(NamedTuple):
    """Two responses to a prompt with their token ids; `chosen` is the preferred one.

    `label_probability` is the probability that this preference is right.
    """

    prompt_id: str
    prompt: str
    chosen_id: str
    rejected_id: str
    chosen_token_ids: Sequence[int]
    rejected_token_ids: Sequence[int]
    label_probability: float = 1.0


@dataclass(frozen=True)
class Evaluation:
    """The ranker compares the policy's answers after `step` optimiser steps with other answers.

    `win_rate` is the share of prompts won, ties one half. `mean_probability` is the mean over
    prompts of the probability that the policy's answer is better. `mean_margin` is the mean over
    prompts of the ranker's margin, nats.
    """

    step: int
    win_rate: float
    mean_probability: float
    mean_margin: float


class Lead(NamedTuple):
    """How far the kept checkpoint leads the next best one, which has `step` optimiser steps.

    `difference` is the kept checkpoint's mean probability minus that of the other, with an interval
    paired over prompts.
    """

    step: int
    difference: Interval


@dataclass(frozen=True)
class PolicyResult:
    """The result of a training, and which checkpoint was kept.

    `step_zero_difference` is the result of `check_step_zero`. It is None without that check: after
    an interruption, for new targets, or with `starts_as_reference` False. `lead` is None with fewer
    than two evaluations.
    """

    training: TrainingResult
    evaluations: list[Evaluation]
    selected_step: int
    step_zero_difference: float | None
    lead: Lead | None

    @property
    def selected(self) -> Evaluation | None:
        """The evaluation of the kept checkpoint; None if there was no evaluation."""
        return next((e for e in self.evaluations if e.step == self.selected_step), None)


@dataclass(frozen=True)
class PolicyExample(TrainingExample):
    """Pairs of one prompt; the branches of its row are the responses.

    `pairs` are branch numbers (chosen, rejected), and each pair has one of `label_probabilities`.
    `response_ids` and `reference_logps` (nats, summed over tokens) have one entry per response.
    With `has_target` the row has one more branch, the last: the prompt's fine-tuning target. It is
    in no pair and has no reference log-prob.
    """

    response_ids: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]
    reference_logps: tuple[float, ...]
    label_probabilities: tuple[float, ...]
    has_target: bool = False


class PolicyTrainer(PrefixTrainer[PolicyExample]):
    """A preference loss over pairs whose responses are branches of their prompt's row.

    There is no dropout, because the reference log-probs are computed without it.
    """

    has_dropout = False
    loss: TrainPolicy

    def sums(self, model: PreTrainedModel, examples: Sequence[PolicyExample]) -> Sums:
        """The loss, and the figures `accuracy` and `margin` (nats), summed over pairs.

        The margin is normalised by the reference policy. Accuracy counts a margin of 0 one half.
        """
        rows = branch_logps(model, self.collate(examples))
        sides, targets = _sides(examples, rows)
        chosen, rejected = sides
        loss = pair_losses(self.loss, chosen, rejected, _labels(examples, chosen.policy.device))
        if self.loss.regularisation:
            loss = loss + losses.regulariser(targets, regulariser_strength(self.loss))
        gains = [side.policy.detach() - side.reference for side in sides]
        margin = gains[0] - gains[1]
        hits = torch.where(margin == 0, 0.5, (margin > 0).float())
        return Sums(loss.sum(), {"accuracy": float(hits.sum()), "margin": float(margin.sum())})


def train_policy(
    init_directory: str,
    pairs: Sequence[PolicyPair],
    reference_logps: ReferenceLogps,
    settings: TrainPolicy,
    compute: Compute,
    templates: Templates,
    *,
    seed: int,
    work_directory: str,
    output_directory: str,
    evaluate: JudgeAnswers | None = None,
    targets: Mapping[str, str] | None = None,
    starts_as_reference: bool = True,
) -> PolicyResult:
    """Train the model at `init_directory` on `pairs` and write the best checkpoint.

    `reference_logps` maps (prompt_id, response_id) to the log-prob under the reference policy,
    nats, summed over tokens. `targets` maps a prompt_id to its fine-tuning target, which
    `regularisation` needs. The loss of a step is the mean over its pairs.

    `evaluate` takes a model in evaluation mode and returns the ranker's margins. Of
    `num_evaluations` evenly spaced checkpoints the one with the highest mean probability is
    written. Among equals it is the one with the largest mean margin, then the first. Without
    `evaluate` the model after the last step is written. Training continues from a checkpoint in
    `work_directory` if there is one.

    Raises:
        UserError: there are no pairs, a response is empty, a reference log-prob or a target is
            missing, the settings do not fit the model, or the disk is full. With
            `starts_as_reference` also if `check_step_zero` fails.
        TrainingDiverged: a loss or a gradient is not finite.
        ValueError: a margin of `evaluate` is NaN.
    """
    _check(pairs, reference_logps)
    wanted = _targets_of(pairs, targets or {}) if settings.regularisation else {}
    model, tokenizer = load_for_training(init_directory, compute, settings.lora)
    rows = _Rows(pairs, reference_logps, wanted, tokenizer, templates)
    difference = None
    if starts_as_reference and last_checkpoint(Path(work_directory)) is None:
        examples = rows.build(range(len(pairs)))
        difference = check_step_zero(model, examples, settings)
    trainer = PolicyTrainer.of_items(
        model,
        tokenizer,
        rows.prompt_ids,
        rows.build,
        settings=settings,
        compute=compute,
        seed=seed,
        work_directory=work_directory,
        what=_WHAT,
    )
    trainer.loss = settings
    selection = _selection(trainer, settings, compute, evaluate)
    return _result(trainer.run(), selection, output_directory, difference, seed)


def train_policy_on_targets(
    init_directory: str,
    rows: Sequence[Demonstration],
    settings: TrainPolicy,
    compute: Compute,
    templates: Templates,
    *,
    seed: int,
    work_directory: str,
    output_directory: str,
    evaluate: JudgeAnswers | None = None,
) -> PolicyResult:
    """Fine-tune the model at `init_directory` on selected responses (RAFT, ReST; section 5).

    The loss is the loss of `train_sft`. The checkpoint is chosen as in `train_policy`. There is no
    check at step 0, because the loss has no reference policy.

    Raises:
        UserError: there are no rows, the settings do not fit the model, or the disk is full.
        TrainingDiverged: a loss or a gradient is not finite.
        ValueError: a margin of `evaluate` is NaN.
    """
    model, tokenizer = load_for_training(init_directory, compute, settings.lora)
    trainer = sft_trainer(
        model,
        tokenizer,
        rows,
        settings,
        compute,
        templates,
        seed=seed,
        work_directory=work_directory,
        what=_WHAT,
    )
    selection = _selection(trainer, settings, compute, evaluate)
    return _result(trainer.run(), selection, output_directory, None, seed)


def pair_losses(
    settings: TrainPolicy, chosen: Side, rejected: Side, label_probability: Tensor
) -> Tensor:
    """The loss of each pair, [pair], with soft labels or label smoothing if `settings` ask for it.

    `label_probability` is [pair]; only soft labels use it.
    """
    of_pairs = losses.LOSSES[settings.loss].of_pairs
    loss = of_pairs(chosen, rejected, settings.gamma)
    if not (settings.soft_labels or settings.label_smoothing):
        return loss
    is_right = label_probability if settings.soft_labels else torch.ones_like(label_probability)
    is_right = is_right + settings.label_smoothing * (1 - 2 * is_right)
    return losses.soften(loss, of_pairs(rejected, chosen, settings.gamma), is_right)


def regulariser_strength(settings: TrainPolicy) -> float:
    """lambda times gamma (eq. 1 and 9), or lambda for a loss that has no gamma."""
    has_gamma = losses.LOSSES[settings.loss].has_gamma
    return settings.regularisation * (settings.gamma if has_gamma else 1.0)


@torch.no_grad()
def check_step_zero(
    model: PreTrainedModel,
    examples: Sequence[PolicyExample],
    settings: TrainPolicy,
) -> float:
    """The largest |policy - reference| log-prob over all responses, nats per token.

    `model` must be in evaluation mode and in the dtype that computed the reference log-probs.

    Raises:
        UserError: the result exceeds `step_zero_tolerance`. The message names the response.
    """
    worst, where = -1.0, ""
    for batch in micro_batches(examples, settings.token_budget):
        found = branch_logps(model, batch_of([e.row for e in batch], model))
        for example, logps in zip(batch, found, strict=True):
            known = zip(logps.tolist(), example.reference_logps, strict=not example.has_target)
            for branch, (logp, reference) in enumerate(known):
                difference = abs(logp - reference) / len(example.row.branches[branch])
                # A NaN stays the worst: nothing compares with it.
                if not (math.isnan(worst) or difference <= worst):
                    worst = difference
                    where = (
                        f"response {example.response_ids[branch]} of prompt {example.prompt_id} has"
                        f" {logp:.3f} nats under the policy and {reference:.3f} in logps"
                    )
    if not worst <= settings.step_zero_tolerance:
        raise UserError(
            f"{_WHAT}: before the first step the policy is not the reference: {where}, {worst:.4f}"
            f" per token, expected at most step_zero_tolerance = {settings.step_zero_tolerance}."
            " Rerun logps with the model that training starts from, or state the tolerance of this"
            " dtype."
        )
    return worst


def _selection(
    trainer: PrefixTrainer[Any],
    settings: TrainPolicy,
    compute: Compute,
    evaluate: JudgeAnswers | None,
) -> CheckpointSelection:
    def figures(model: PreTrainedModel) -> Judged:
        assert evaluate is not None
        return judged(evaluate(model))

    selection = CheckpointSelection(
        trainer,
        compute,
        num_evaluations=settings.num_evaluations,
        evaluate=figures if evaluate else None,
        rank=lambda found: (found["mean_probability"], found["mean_margin"]),
    )
    trainer.add_callback(selection)
    return selection


def judged(margins: Sequence[float]) -> Judged:
    """The figures of `Evaluation`, and the probability of each prompt, from the prompts' margins.

    Raises:
        ValueError: a margin is NaN.
    """
    points = [POINTS[verdict_from_logit(float(margin))] for margin in margins]
    values = np.asarray(margins, dtype=np.float64)
    # log(1 + exp(-z)), which does not overflow.
    probabilities = np.exp(-np.logaddexp(0.0, -values))
    figures = {
        "win_rate": float(np.mean(points)),
        "mean_probability": float(probabilities.mean()),
        "mean_margin": float(values.mean()),
    }
    return Judged(figures, probabilities.tolist())


def _result(
    training: TrainingResult,
    selection: CheckpointSelection,
    output_directory: str,
    difference: float | None,
    seed: int,
) -> PolicyResult:
    selected = selection.write(output_directory)
    evaluations = [
        Evaluation(int(e["step"]), e["win_rate"], e["mean_probability"], e["mean_margin"])
        for e in selection.evaluations
    ]
    return PolicyResult(training, evaluations, selected, difference, _lead(selection, seed))


def _lead(selection: CheckpointSelection, seed: int) -> Lead | None:
    if len(selection.ranking) < 2:
        return None
    best, second = (selection.values(entry["step"]) for entry in selection.ranking[:2])
    difference = paired_bootstrap_difference(best, second, seed=seed)
    return Lead(int(selection.ranking[1]["step"]), difference)


class _Rows:
    """Turns the pairs of a prompt into one row: each distinct response is one branch."""

    def __init__(
        self,
        pairs: Sequence[PolicyPair],
        reference_logps: ReferenceLogps,
        targets: Mapping[str, str],
        tokenizer: PreTrainedTokenizerBase,
        templates: Templates,
    ) -> None:
        self.prompt_ids = [pair.prompt_id for pair in pairs]
        self._pairs, self._reference = pairs, reference_logps
        texts = {pair.prompt_id: pair.prompt for pair in pairs}
        self._prompts = {i: encode_prompt(tokenizer, templates, t) for i, t in texts.items()}
        self._targets = {
            i: encode_response(tokenizer, templates, t, eos=True) for i, t in targets.items()
        }

    def build(self, items: Sequence[int]) -> list[PolicyExample]:
        groups = group_by_prompt(items, self.prompt_ids)
        return [self._example(prompt_id, group) for prompt_id, group in groups]

    def _example(self, prompt_id: str, group: Sequence[int]) -> PolicyExample:
        responses: dict[str, list[int]] = {}
        for item in group:
            pair = self._pairs[item]
            responses.setdefault(pair.chosen_id, list(pair.chosen_token_ids))
            responses.setdefault(pair.rejected_id, list(pair.rejected_token_ids))
        branch = {response_id: number for number, response_id in enumerate(responses)}
        sides = [(self._pairs[item].chosen_id, self._pairs[item].rejected_id) for item in group]
        has_target = prompt_id in self._targets
        target = [self._targets[prompt_id]] if has_target else []
        return PolicyExample(
            prompt_id=prompt_id,
            row=PrefixRow(self._prompts[prompt_id], [*responses.values(), *target]),
            response_ids=tuple(responses),
            pairs=tuple((branch[chosen], branch[rejected]) for chosen, rejected in sides),
            reference_logps=tuple(self._reference[prompt_id, r] for r in responses),
            label_probabilities=tuple(self._pairs[item].label_probability for item in group),
            has_target=has_target,
        )


def _sides(
    examples: Sequence[PolicyExample], rows: Sequence[Tensor]
) -> tuple[tuple[Side, Side], Tensor]:
    """Both sides of all pairs, and the log-prob of each pair's target [pair], nats.

    The log-probs of targets mean nothing for an example without `has_target`. `rows` are the summed
    log-probs of the branches of each example.
    """
    device = rows[0].device
    policy = torch.cat(list(rows))
    reference, num_tokens = [], []
    chosen, rejected, target = [], [], []
    offset = 0
    for example in examples:
        chosen += [offset + c for c, _ in example.pairs]
        rejected += [offset + r for _, r in example.pairs]
        branches = example.row.branches
        offset += len(branches)
        target += [offset - 1] * len(example.pairs)
        num_tokens += [len(branch) for branch in branches]
        reference += [*example.reference_logps, *([math.nan] * example.has_target)]
    known = policy.new_tensor(reference)
    sizes = policy.new_tensor(num_tokens)
    index = [torch.tensor(places, device=device) for places in (chosen, rejected)]
    first, second = (Side(policy[i], known[i], sizes[i]) for i in index)
    return (first, second), policy[torch.tensor(target, device=device)]


def _labels(examples: Sequence[PolicyExample], device: torch.device) -> Tensor:
    return torch.tensor([p for e in examples for p in e.label_probabilities], device=device)


def _check(pairs: Sequence[PolicyPair], reference_logps: ReferenceLogps) -> None:
    if not pairs:
        raise UserError(f"{_WHAT}: no training pairs; check the counts of reject and pair.")
    for pair in pairs:
        sides = (
            ("chosen", pair.chosen_id, pair.chosen_token_ids),
            ("rejected", pair.rejected_id, pair.rejected_token_ids),
        )
        for side, response_id, token_ids in sides:
            where = f"{_WHAT}: pair of prompt {pair.prompt_id}, {side} response {response_id}"
            if not len(token_ids):
                raise UserError(f"{where}: no tokens, expected at least one; rerun pair.")
            logp = reference_logps.get((pair.prompt_id, response_id))
            if logp is None or not math.isfinite(logp):
                raise UserError(
                    f"{where}: the reference log-prob is {'missing' if logp is None else logp},"
                    " expected a finite number; run logps on these pairs."
                )


def _targets_of(pairs: Sequence[PolicyPair], targets: Mapping[str, str]) -> dict[str, str]:
    wanted = dict.fromkeys(pair.prompt_id for pair in pairs)
    missing = [prompt_id for prompt_id in wanted if prompt_id not in targets]
    if missing:
        raise UserError(
            f"{_WHAT}: regularisation wants the fine-tuning target of every prompt, and"
            f" {len(missing)} of {len(wanted)} have none, the first being {missing[0]}; give"
            f" demonstrations for them, or set {_WHAT}.regularisation to 0."
        )
    return {prompt_id: targets[prompt_id] for prompt_id in wanted}
