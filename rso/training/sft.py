"""Supervised fine-tuning on demonstrations: for the reference policy, and for RAFT and ReST."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rso.config import Compute, Optimisation, Templates, TrainSft
from rso.errors import UserError
from rso.prefix import PrefixRow, branch_logps
from rso.templates import encode_prompt, encode_response
from rso.training.base import PrefixTrainer, Sums, TrainingResult
from rso.training.loading import load_for_training
from rso.training.steps import TrainingExample, choose, group_by_prompt

_WHAT = "train_sft"


class Demonstration(NamedTuple):
    """A prompt and the response to imitate."""

    prompt_id: str
    prompt: str
    target: str


class SftTrainer(PrefixTrainer[TrainingExample]):
    """Cross-entropy of target tokens, end of sequence included; prompt tokens add no loss."""

    def sums(self, model: PreTrainedModel, examples: Sequence[TrainingExample]) -> Sums:
        """Negative log-probability, nats, summed over all target tokens."""
        return Sums(-torch.cat(branch_logps(model, self.collate(examples))).sum(), {})


def train_sft(
    base_location: str,
    examples: Sequence[Demonstration | tuple[str, str, str]],
    settings: TrainSft,
    compute: Compute,
    templates: Templates,
    *,
    seed: int,
    work_directory: str,
    output_directory: str,
) -> TrainingResult:
    """Fine-tune the model at `base_location` and write it to `output_directory`.

    The loss of a step is the mean over all target tokens of its `batch_size` examples. The targets
    of one prompt in a step are branches of one row. Training continues from a checkpoint in
    `work_directory` if there is one.

    Raises:
        UserError: there are no examples, the settings do not fit the model, or the disk is full.
        TrainingDiverged: a loss or a gradient is not finite.
    """
    rows = [Demonstration(*example) for example in examples]
    chosen = choose([r.prompt_id for r in rows], settings.max_examples, (_WHAT, seed))
    model, tokenizer = load_for_training(base_location, compute, settings.lora)
    trainer = sft_trainer(
        model,
        tokenizer,
        [rows[i] for i in chosen],
        settings,
        compute,
        templates,
        seed=seed,
        work_directory=work_directory,
        what=_WHAT,
    )
    result = trainer.run()
    trainer.write(output_directory)
    return result


def sft_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Demonstration],
    settings: Optimisation,
    compute: Compute,
    templates: Templates,
    *,
    seed: int,
    work_directory: str,
    what: str,
) -> SftTrainer:
    """A trainer of `model` on `rows`.

    `what` names the stage in messages and is part of the key of the order of prompts.

    Raises:
        UserError: there are no rows, or the settings do not fit the model.
    """
    if not rows:
        raise UserError(f"{what}: no training demonstrations; check the counts of what it reads.")
    prompt_ids = [r.prompt_id for r in rows]
    prompts = {r.prompt_id: encode_prompt(tokenizer, templates, r.prompt) for r in rows}
    targets = [encode_response(tokenizer, templates, r.target, eos=True) for r in rows]

    def build(items: Sequence[int]) -> list[TrainingExample]:
        return [
            TrainingExample(prompt_id, PrefixRow(prompts[prompt_id], [targets[i] for i in group]))
            for prompt_id, group in group_by_prompt(items, prompt_ids)
        ]

    return SftTrainer.of_items(
        model,
        tokenizer,
        prompt_ids,
        build,
        lambda items: sum(len(targets[i]) for i in items),
        settings=settings,
        compute=compute,
        seed=seed,
        work_directory=work_directory,
        what=what,
    )
