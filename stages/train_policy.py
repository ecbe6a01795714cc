"""Pairs or new targets to the aligned policy: the checkpoint with the highest win rate."""

from collections.abc import Callable
from functools import cache
from typing import Any

from pipelines.tables import select_ids
from rso.config import REFERENCE
from rso.decoding import Request, Sampling
from rso.decoding.transformers_engine import TransformersDecoder
from rso.errors import UserError
from rso.evaluation import POINTS, verdict_from_logit
from rso.models import load_tokenizer
from rso.ranking import Comparison
from rso.templates import encode_prompt
from rso.training.policy import (
    PolicyPair,
    PolicyResult,
    train_policy,
    train_policy_on_targets,
)
from rso.training.sft import Demonstration
from stages.context import Context, Outcome
from stages.prompts import choose_prompts
from stages.rankers import ranker_of_run

FIELDS = PolicyPair._fields


def run(context: Context) -> Outcome:
    """Train on all pairs, or on new targets, and keep the best checkpoint."""
    on_targets = context.config.train_policy.loss == "cross_entropy"
    result = _on_targets(context) if on_targets else _on_pairs(context)
    counters = {
        "steps": result.training.num_steps,
        "tokens": result.training.num_tokens,
        "selected_step": result.selected_step,
        "validation_win_rate": max(e.win_rate for e in result.evaluations),
    }
    if result.step_zero_difference is not None:
        counters["max_step_zero_nats_per_token"] = result.step_zero_difference
    evaluations = [{"step": float(e.step), "win_rate": e.win_rate} for e in result.evaluations]
    return Outcome(
        counters,
        {"train_policy": result.training.curve, "train_policy_evaluations": evaluations},
    )


def _on_pairs(context: Context) -> PolicyResult:
    """From the reference, checked at step 0 against its log-probs, or from another model."""
    config = context.config
    settings = config.train_policy
    logps = context.table("logps")
    prompts = context.table("prompts", ["prompt_id", "target"]).to_pylist()
    return train_policy(
        context.model(settings.init_from),
        [
            PolicyPair(**{name: row[name] for name in FIELDS})
            for row in context.table("pairs").to_pylist()
        ],
        {(row["prompt_id"], row["response_id"]): row["logps"] for row in logps.to_pylist()},
        settings,
        config.compute,
        config.templates,
        seed=config.seed,
        work_directory=context.work.scratch,
        output_directory=context.work.output("policy"),
        evaluate=_win_rate(context),
        targets={row["prompt_id"]: row["target"] for row in prompts if row["target"] is not None},
        starts_as_reference=settings.init_from == REFERENCE,
    )


def _on_targets(context: Context) -> PolicyResult:
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
        evaluate=_win_rate(context),
    )


def _win_rate(context: Context) -> Callable[[Any], float]:
    """Return a function of a model: its win rate against the human line under the ranker."""
    config = context.config
    prompts = context.table("prompts")
    chosen = choose_prompts(context, "validation", None)
    rows = [row for row in select_ids(prompts, chosen).to_pylist() if row["target"] is not None]
    rows = rows[: config.train_policy.num_validation_prompts]
    if not rows:
        raise UserError(
            "train_policy: no validation prompt has a target to compare answers with; give "
            "demonstrations for validation prompts."
        )
    tokenizer = load_tokenizer(context.directory("reference"))
    requests = [
        Request(row["prompt_id"], encode_prompt(tokenizer, config.templates, row["prompt"]))
        for row in rows
    ]
    greedy = Sampling(
        temperature=0.0,
        top_k=0,
        max_new_tokens=config.train_policy.max_new_tokens,
        stop=config.templates.stop,
    )
    source = ranker_of_run(context)
    # Once, and by the process that evaluates alone.
    load = cache(source.load)

    def win_rate(model: Any) -> float:
        decoded = TransformersDecoder(model, tokenizer).decode(requests, greedy, seed=config.seed)
        logits = load().preference(
            [
                Comparison(row["prompt"], responses[0].text, row["target"])
                for row, responses in zip(rows, decoded, strict=True)
            ]
        )
        return sum(POINTS[verdict_from_logit(float(logit))] for logit in logits) / len(rows)

    return win_rate
