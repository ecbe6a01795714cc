"""Prompts to synthetic comparisons, for runs without human comparisons."""

from pipelines.compare import CompareShard
from pipelines.decode import Decoding
from rso.decoding import Sampling
from rso.errors import UserError
from stages.context import Context, Outcome
from stages.prompts import choose_prompts


def run(context: Context) -> Outcome:
    """Decode responses to training and validation prompts, and label pairs by the known gold.

    Raises:
        UserError: a split has no prompts, or no comparison was made.
    """
    settings = context.config.comparisons
    assert settings.labeller is not None, "the graph has compare only with a labeller"
    prompt_ids = [
        *choose_prompts(context, "train", settings.num_prompts),
        *choose_prompts(context, "validation", settings.num_validation_prompts),
    ]
    decoding = Decoding(
        label="compare",
        model=context.directory("reference"),
        engine=settings.engine,
        compute=context.config.compute,
        templates=context.config.templates,
        sampling=Sampling(**settings.sampling.model_dump(), num_samples=settings.num_samples),
        seed=context.config.seed + 1_000_003,
        journal=f"{context.work.scratch}/answers",
    )
    counters = context.map(
        "compare",
        CompareShard(decoding, prompt_ids, settings.labeller, settings.pairs_per_prompt),
        inputs=["prompts"],
        outputs=["comparisons"],
    )
    if not counters["comparisons"]:
        raise UserError(
            f"compare: the labeller {settings.labeller!r} preferred none of "
            f"{counters['responses']:.0f} responses to another; raise comparisons.num_samples or "
            "the temperature, or choose another labeller."
        )
    return Outcome(counters)
