"""Held-out prompts to generations, judgements and metrics."""

from dataclasses import replace

from pipelines.decode import Decoding
from pipelines.evaluate import GenerateShard, JudgeShard, MergeShard, as_judged
from pipelines.logps import PolicySource
from pipelines.score import AnyRanker, RankerSource
from pipelines.tables import select_ids, table_of
from rso.aliases import Counters
from rso.decoding import Sampling
from rso.evaluation import ANCESTRAL, GREEDY, POLICY, REFERENCE, SAMPLED, metrics
from rso.labelling import labeller
from rso.parquet import write_shard
from stages.context import Context, Outcome
from stages.prompts import choose_prompts
from stages.rankers import ranker_of_run

SYSTEMS = (POLICY, REFERENCE)


def run(context: Context) -> Outcome:
    """Decode policy and reference, let every judge compare the answers, and write the metrics."""
    config = context.config
    settings = config.evaluate
    prompt_ids = choose_prompts(context, settings.split, settings.num_prompts)
    chosen = {
        GREEDY: prompt_ids,
        SAMPLED: prompt_ids,
        ANCESTRAL: prompt_ids[: settings.num_kl_prompts],
    }
    counters: Counters = {}
    for system in SYSTEMS:
        counters |= context.map(
            f"generate {system}",
            GenerateShard(_decodings(context, system), system, chosen),
            inputs=["prompts"],
            outputs=["generations"],
            scratch_output=system,
        )
    policies = [
        PolicySource(context.directory(system), config.compute, config.templates)
        for system in SYSTEMS
    ]
    counters |= context.map(
        "log-probabilities",
        MergeShard(*policies),
        inputs=["prompts"],
        scratch_inputs={f"{system}/generations": "generations" for system in SYSTEMS},
        outputs=["generations"],
    )
    counters |= context.map(
        "judge",
        JudgeShard(_rankers(context), config.comparisons.labeller, config.templates),
        inputs=["prompts"],
        work_inputs=["generations"],
        outputs=["judgements"],
    )
    _write_metrics(context, prompt_ids)
    return Outcome(counters)


def _rankers(context: Context) -> dict[str, AnyRanker]:
    """Return the judging rankers by name: the run's ranker, and the gold ranker if there is one."""
    rankers = {"ranker": ranker_of_run(context)}
    if "gold_ranker" in context.inputs:
        config = context.config
        directory = context.directory("gold_ranker")
        rankers["gold_ranker"] = RankerSource(directory, config.compute, config.templates)
    return rankers


def _decodings(context: Context, system: str) -> dict[str, Decoding]:
    """Return how a system is decoded: a `Decoding` for each way of sampling.

    Draws are keyed by seed and prompt, so both systems draw with the same random numbers.
    """
    settings = context.config.evaluate
    greedy = Decoding(
        label=f"{system} greedy",
        model=context.directory(system),
        engine=settings.engine,
        compute=context.config.compute,
        templates=context.config.templates,
        sampling=Sampling(temperature=0.0, top_k=0, max_new_tokens=settings.max_new_tokens),
        seed=context.config.seed,
        journal=f"{context.work.scratch}/answers/{system}",
    )
    decodings = {GREEDY: greedy}
    if settings.sampling is not None:
        sampling = replace(greedy.sampling, **settings.sampling.model_dump())
        decodings[SAMPLED] = replace(greedy, label=f"{system} sampled", sampling=sampling)
    if system == POLICY and settings.num_kl_prompts:
        # KL(policy || reference) needs samples of the policy only, at temperature 1 and without
        # top-k or top-p.
        sampling = replace(greedy.sampling, temperature=1.0)
        decodings[ANCESTRAL] = replace(greedy, label=f"{system} for the KL", sampling=sampling)
    return decodings


def _write_metrics(context: Context, prompt_ids: list[str]) -> None:
    gold = context.config.comparisons.labeller
    figures = metrics(
        as_judged(context.config.templates, context.written("generations").to_pylist()),
        context.written("judgements").to_pylist(),
        select_ids(context.table("prompts"), prompt_ids).to_pylist(),
        seed=context.config.seed,
        labeller=labeller(gold) if gold is not None else None,
    )
    write_shard(context.work.output("metrics"), "metrics", 0, 1, table_of("metrics", figures))
