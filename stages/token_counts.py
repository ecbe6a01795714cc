"""How many tokens each stage passes through a model, from the settings and the lengths of texts.

The counts are for an estimate of time. Templates and refused rows are ignored. Decoded responses
are assumed to be as long as those in the raw files.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from rso.config import Config, Optimisation, TrainRanker
from rso.losses import CROSS_ENTROPY
from rso.objectives import objectives_of

# Tokens of the marks that a ranker reads around a response.
MARK_TOKENS = 3


class Lengths(NamedTuple):
    """Mean tokens of a prompt and of a response, and numbers of rows by (kind of source, split)."""

    prompt: float
    response: float
    rows: Mapping[tuple[str, str], float]

    def prompts(self, split: str) -> float:
        """Return the rows of all kinds in a split, as an estimate of its prompts."""
        return sum(count for (_, side), count in self.rows.items() if side == split)


class Tokens(NamedTuple):
    """Tokens that pass through a model; a context shared by several responses counts once."""

    trained: float = 0.0
    prefilled: float = 0.0
    decoded: float = 0.0


def tokens(stage: str, config: Config, lengths: Lengths) -> Tokens:
    """Return about how many tokens a stage trains on, prefills and decodes."""
    count = _COUNTS.get(stage)
    return Tokens() if count is None else count(config, lengths)


def _train_sft(config: Config, lengths: Lengths) -> Tokens:
    settings = config.train_sft
    if settings.skip:
        return Tokens()
    examples = _most(settings.max_examples, lengths.rows.get(("demonstrations", "train"), 0.0))
    return Tokens(trained=_seen(settings, examples) * (lengths.prompt + lengths.response))


def _compare(config: Config, lengths: Lengths) -> Tokens:
    settings = config.comparisons
    prompts = _most(settings.num_prompts, lengths.prompts("train"))
    prompts += _most(settings.num_validation_prompts, lengths.prompts("validation"))
    answer = _most(settings.sampling.max_new_tokens, lengths.response)
    return Tokens(0.0, prompts * lengths.prompt, prompts * settings.num_samples * answer)


def _train_ranker(settings: TrainRanker, config: Config, lengths: Lengths) -> Tokens:
    each = config.comparisons.pairs_per_prompt if config.comparisons.labeller else 1
    train = _comparisons(config, lengths, "train") * len(settings.folds) / settings.num_folds
    held_out = _comparisons(config, lengths, "validation")
    seen = _seen(settings, _most(settings.max_comparisons, train))
    orders = 1 if settings.orders == "flip" else 2
    return Tokens(
        _judged(lengths, seen / each, seen, orders),
        settings.num_evaluations * _judged(lengths, held_out / each, held_out),
    )


def _decode(config: Config, lengths: Lengths) -> Tokens:
    prompts = _decoded_prompts(config, lengths)
    answer = _most(config.decode.sampling.max_new_tokens, lengths.response)
    return Tokens(0.0, prompts * lengths.prompt, prompts * config.decode.num_samples * answer)


def _score(config: Config, lengths: Lengths) -> Tokens:
    # With the baseline first, context and baseline are read once for all candidates. In the other
    # order each candidate comes before the baseline, so the baseline is read for each of them.
    prompts, marked = _decoded_prompts(config, lengths), lengths.response + MARK_TOKENS
    passes = 3 if config.score.orders == "both" else 1
    each = lengths.prompt + marked * (1 + passes * config.decode.num_samples)
    return Tokens(prefilled=len(objectives_of(config.objectives)) * prompts * each)


def _pair(config: Config, lengths: Lengths) -> Tokens:
    if config.pair.source == "direct":
        return Tokens()
    return Tokens(prefilled=_judged(lengths, *_pairs(config, lengths)))


def _logps(config: Config, lengths: Lengths) -> Tokens:
    prompts, pairs = _pairs(config, lengths)
    return Tokens(prefilled=prompts * lengths.prompt + 2 * pairs * lengths.response)


def _train_policy(config: Config, lengths: Lengths) -> Tokens:
    settings = config.train_policy
    prompts, pairs = _pairs(config, lengths)
    responses = 2.0
    if settings.loss == CROSS_ENTROPY:
        is_raft = config.targets.method == "raft"
        share = 1 / config.decode.num_samples if is_raft else 1 - config.targets.threshold
        responses, pairs = 1.0, prompts * config.decode.num_samples * share
    seen = _seen(settings, pairs)
    contexts = seen * min(1.0, prompts / pairs) if pairs else 0.0
    asked = settings.num_evaluations * _most(
        settings.num_validation_prompts, lengths.prompts("validation")
    )
    return Tokens(
        contexts * lengths.prompt + responses * seen * lengths.response,
        asked * lengths.prompt + _judged(lengths, asked, asked),
        asked * _most(settings.max_new_tokens, lengths.response),
    )


def _evaluate(config: Config, lengths: Lengths) -> Tokens:
    settings = config.evaluate
    prompts = _most(settings.num_prompts, lengths.prompts(settings.split))
    samplings = 2 if settings.sampling is not None else 1
    kl_samples = _most(settings.num_kl_prompts, prompts)
    answers = 2 * samplings * prompts + kl_samples
    answer = _most(settings.max_new_tokens, lengths.response)
    judges = 1 if config.train_gold_ranker is None else 2
    # Greedy answers: policy, reference and human target, each against each. Sampled answers: only
    # policy against reference.
    contests = (2 + samplings) * prompts
    judged = judges * _judged(lengths, contests, contests)
    read = answers * lengths.prompt + 2 * kl_samples * (lengths.prompt + answer)
    return Tokens(0.0, judged + read, answers * answer)


def _comparisons(config: Config, lengths: Lengths, split: str) -> float:
    settings = config.comparisons
    if settings.labeller is None:
        return lengths.rows.get(("comparisons", split), 0.0)
    wanted = settings.num_prompts if split == "train" else settings.num_validation_prompts
    return settings.pairs_per_prompt * _most(wanted, lengths.prompts(split))


def _decoded_prompts(config: Config, lengths: Lengths) -> float:
    return _most(config.decode.num_prompts, lengths.prompts("train"))


def _pairs(config: Config, lengths: Lengths) -> tuple[float, float]:
    """Return the numbers of prompts and of pairs that the policy is trained on."""
    if config.pair.source == "direct":
        pairs = _comparisons(config, lengths, "train")
        return min(pairs, lengths.prompts("train")), pairs
    prompts = _decoded_prompts(config, lengths)
    is_accepted = config.pair.source == "rso-sample-rank"
    samples = config.reject.num_samples if is_accepted else config.pair.num_samples
    each = {"first-round": samples / 2, "tournament": samples - 1}.get(config.pair.ranking, 1)
    return prompts, prompts * each


def _judged(lengths: Lengths, contexts: float, pairs: float, orders: int = 2) -> float:
    """Return the tokens a ranker reads: each context once, both responses of a pair per order."""
    return contexts * lengths.prompt + pairs * orders * 2 * (lengths.response + MARK_TOKENS)


def _seen(settings: Optimisation, items: float) -> float:
    """Return how many items a training sees; an item counts once per epoch."""
    seen = settings.epochs * items
    return (
        seen if settings.max_steps is None else min(seen, settings.max_steps * settings.batch_size)
    )


def _most(limit: int | None, count: float) -> float:
    return count if limit is None else min(limit, count)


_COUNTS: dict[str, Callable[[Config, Lengths], Tokens]] = {
    "train_sft": _train_sft,
    "compare": _compare,
    "train_ranker": lambda config, lengths: _train_ranker(config.train_ranker, config, lengths),
    "train_gold_ranker": lambda config, lengths: (
        _train_ranker(config.train_gold_ranker, config, lengths)
        if config.train_gold_ranker is not None
        else Tokens()
    ),
    "decode": _decode,
    "score": _score,
    "pair": _pair,
    "logps": _logps,
    "train_policy": _train_policy,
    "evaluate": _evaluate,
}
