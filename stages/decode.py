"""Prompts to candidates: many responses per prompt, from the reference policy or another model."""

from pipelines.decode import DecodeShard, Decoding, longest_prompt
from rso.decoding import Sampling
from rso.models import load_tokenizer
from stages.context import Context, Outcome
from stages.prompts import choose_prompts


def run(context: Context) -> Outcome:
    """Decode `num_samples` responses to each chosen training prompt."""
    settings = context.config.decode
    # `compare` takes prompts from the other end of this order. So the ranker has not learnt from
    # these prompts, if the split has enough for both.
    prompt_ids = choose_prompts(context, "train", settings.num_prompts, from_end=True)
    decoding = Decoding(
        label="decode",
        model=context.model(settings.policy),
        engine=settings.engine,
        compute=context.config.compute,
        templates=context.config.templates,
        sampling=Sampling(
            **settings.sampling.model_dump(), num_samples=settings.num_samples, logprobs=True
        ),
        seed=context.config.seed,
        max_prompt_tokens=_longest(context, prompt_ids),
        journal=f"{context.work.scratch}/answers",
    )
    counters = context.map(
        "decode", DecodeShard(decoding, prompt_ids), inputs=["prompts"], outputs=["candidates"]
    )
    assert counters["responses"] == len(prompt_ids) * settings.num_samples
    return Outcome(counters)


def _longest(context: Context, prompt_ids: list[str]) -> int:
    chosen = set(prompt_ids)
    prompts = context.table("prompts", ["prompt_id", "prompt"])
    texts = [row["prompt"] for row in prompts.to_pylist() if row["prompt_id"] in chosen]
    tokenizer = load_tokenizer(context.model(context.config.decode.policy))
    return longest_prompt(tokenizer, context.config.templates, texts)
