"""Pairs or new targets to the trained policy: the checkpoint that the ranker prefers."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from pipelines.tables import select_ids
from rso.config import REFERENCE
from rso.decoding import Request, Sampling
from rso.decoding.transformers_engine import TransformersDecoder
from rso.errors import UserError
from rso.files import write_json
from rso.losses import CROSS_ENTROPY
from rso.models import load_tokenizer
from rso.progress import is_first_process
from rso.ranking import Comparison, Ranker
from rso.templates import encode_prompt
from rso.training.loading import load_for_training
from rso.training.policy import (
    PolicyPair,
    PolicyResult,
    judged,
    train_policy,
    train_policy_on_targets,
)
from rso.training.sft import Demonstration
from stages.context import Context, Outcome
from stages.prompts import choose_prompts
from stages.rankers import ranker_of_run

logger = logging.getLogger(__name__)

_FIELDS = PolicyPair._fields
# Outside this range of the reference's mean probability, the contest hardly separates checkpoints.
LOWEST, HIGHEST = 0.1, 0.9


def run(context: Context) -> Outcome:
    """Train on all pairs, or on new targets, and keep the best checkpoint.

    Raises:
        UserError: no validation prompt can be judged, or the training data are unusable.
    """
    contest = _Contest(context)
    on_targets = context.config.train_policy.loss == CROSS_ENTROPY
    result = (_on_targets if on_targets else _on_pairs)(context, contest)
    assert result.selected is not None, "every training has an evaluation at its last step"
    counters = {
        "steps": result.training.num_steps,
        "tokens": result.training.num_tokens,
        "selected_step": result.selected_step,
        "validation_win_rate": result.selected.win_rate,
        "validation_mean_probability": result.selected.mean_probability,
        **_choice(result),
    }
    if result.step_zero_difference is not None:
        counters["max_step_zero_nats_per_token"] = result.step_zero_difference
    if contest.judges_reference:
        counters["reference_mean_probability"] = contest.reference_mean_probability
    evaluations = [
        {name: float(figure) for name, figure in asdict(e).items()} for e in result.evaluations
    ]
    return Outcome(
        counters,
        {"train_policy": result.training.curve, "train_policy_evaluations": evaluations},
    )


def _choice(result: PolicyResult) -> dict[str, float]:
    """Return the lead of the kept checkpoint over the next best; empty if there is no other."""
    if result.lead is None:
        return {}
    lead = result.lead.difference
    logger.info(
        "train_policy: step %d is kept. Over %d prompts its mean probability is %.3f [%.3f, %.3f] "
        "above that of step %d, the next best.",
        result.selected_step,
        lead.n,
        lead.value,
        lead.low,
        lead.high,
        result.lead.step,
    )
    return {
        "choice_difference": lead.value,
        "choice_difference_low": lead.low,
        "choice_difference_high": lead.high,
    }


def _on_pairs(context: Context, contest: "_Contest") -> PolicyResult:
    """Train on pairs, from the reference or from another model (`train_policy.init_from`).

    A policy that starts as the reference is checked at step 0 against the reference log-probs.
    """
    config = context.config
    settings = config.train_policy
    logps = context.table("logps")
    prompts = context.table("prompts", ["prompt_id", "target"]).to_pylist()
    return train_policy(
        context.model(settings.init_from),
        [
            PolicyPair(**{name: row[name] for name in _FIELDS})
            for row in context.table("pairs").to_pylist()
        ],
        {(row["prompt_id"], row["response_id"]): row["logps"] for row in logps.to_pylist()},
        settings,
        config.compute,
        config.templates,
        seed=config.seed,
        work_directory=context.work.scratch,
        output_directory=context.work.output("policy"),
        evaluate=contest.margins,
        targets={row["prompt_id"]: row["target"] for row in prompts if row["target"] is not None},
        starts_as_reference=settings.init_from == REFERENCE,
    )


def _on_targets(context: Context, contest: "_Contest") -> PolicyResult:
    config = context.config
    return train_policy_on_targets(
        context.model(config.train_policy.init_from),
        [
            Demonstration(row["prompt_id"], row["prompt"], row["target"])
            for row in context.table("demonstrations").to_pylist()
            if row["split"] == "train"
        ],
        config.train_policy,
        config.compute,
        config.templates,
        seed=config.seed,
        work_directory=context.work.scratch,
        output_directory=context.work.output("policy"),
        evaluate=contest.margins,
    )


class _Contest:
    """The run's ranker compares a model's greedy answers to validation prompts with other answers.

    The ranker and the other answers are loaded or decoded at the first evaluation: of several
    processes, only one evaluates.
    """

    def __init__(self, context: Context) -> None:
        self._context, self._settings = context, context.config.train_policy
        self._against = self._settings.selection.against
        self._rows = self._chosen_rows()
        self._tokenizer = load_tokenizer(context.directory("reference"))
        # With one evaluation no checkpoint is chosen, so the reference need not be judged.
        self.judges_reference = self._against == "target" and self._settings.num_evaluations > 1

    def margins(self, policy: Any) -> list[float]:
        """Return the margins of the policy's answers over the other answers, [prompt], nats."""
        if self.judges_reference:
            _ = self.reference_mean_probability
        return self._margins_of(self._answers(policy))

    @cached_property
    def reference_mean_probability(self) -> float:
        """The mean probability that the SFT policy's answers beat the targets.

        It is kept in the work folder, so an interrupted stage does not compute it again.
        """
        path = Path(self._context.work.scratch) / "reference.json"
        if not path.exists():
            figures = judged(self._margins_of(self._reference_answers)).figures
            write_json(path, figures["mean_probability"])
        probability = float(json.loads(path.read_text(encoding="utf-8")))
        if is_first_process() and not LOWEST <= probability <= HIGHEST:
            logger.warning(
                "train_policy: the contest that chooses the checkpoint is saturated. Against the "
                "targets the SFT policy itself has a mean probability of %.2f under the ranker, "
                "expected %g to %g, so checkpoints hardly differ; set "
                "train_policy.selection.against: reference.",
                probability,
                LOWEST,
                HIGHEST,
            )
        return probability

    def _chosen_rows(self) -> list[dict[str, Any]]:
        chosen = choose_prompts(self._context, "validation", None)
        prompts = select_ids(self._context.table("prompts"), chosen)
        rows: list[dict[str, Any]] = prompts.to_pylist()
        if self._against == "target":
            rows = [row for row in rows if row["target"] is not None]
        if not rows:
            raise UserError(
                "train_policy: no validation prompt has a target to compare answers with; give "
                "demonstrations for validation prompts, or set train_policy.selection.against: "
                "reference."
            )
        return rows[: self._settings.num_validation_prompts]

    def _margins_of(self, answers: Sequence[str]) -> list[float]:
        games = [
            Comparison(row["prompt"], answer, other)
            for row, answer, other in zip(self._rows, answers, self._others, strict=True)
        ]
        margins = self._ranker.preference(games)
        # A text is not better than itself, but rounding may give it a margin.
        return [0.0 if g.a == g.b else float(z) for g, z in zip(games, margins, strict=True)]

    def _answers(self, model: Any) -> list[str]:
        config = self._context.config
        requests = [
            Request(
                row["prompt_id"], encode_prompt(self._tokenizer, config.templates, row["prompt"])
            )
            for row in self._rows
        ]
        greedy = Sampling(
            temperature=0.0,
            top_k=0,
            max_new_tokens=self._settings.max_new_tokens,
            stop=config.templates.stop,
        )
        decoder = TransformersDecoder(model, self._tokenizer)
        return [found[0].text for found in decoder.decode(requests, greedy, seed=config.seed)]

    @cached_property
    def _others(self) -> list[str]:
        if self._against == "target":
            return [row["target"] for row in self._rows]
        return self._reference_answers

    @cached_property
    def _reference_answers(self) -> list[str]:
        # Nothing else refers to this model, so its memory is freed before the ranker is loaded.
        model, _ = load_for_training(
            self._context.directory("reference"), self._context.config.compute
        )
        return self._answers(model)

    @cached_property
    def _ranker(self) -> Ranker:
        return ranker_of_run(self._context).load()
