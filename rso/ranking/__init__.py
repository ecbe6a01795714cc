"""The pairwise ranker: logits of "A" against "B", rewards (eq. 7) and preferences.

`compare` gives logit_A - logit_B, which is positive when the response in slot A is better. A reward
is positive when the candidate is better than the baseline. In the order with the baseline in slot A
it is logit_B - logit_A. With both orders it is the mean of this and of logit_A - logit_B with the
candidate in slot A. All are float32, in nats.

Responses with the same `judged_text` are equal to a ranker, which computes them once.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from rso import models
from rso.aliases import Float32s
from rso.config import RewardOrders, Templates
from rso.errors import PromptError, UserError
from rso.objectives import weighted_sum
from rso.prefix import PrefixRow
from rso.progress import progress as Bar
from rso.templates import RankerEncoder, judged_text


class Comparison(NamedTuple):
    """Two responses to a prompt; `a` goes into slot A."""

    prompt: str
    a: str
    b: str


class PromptCandidates(NamedTuple):
    """The candidates of a prompt and the baseline they are scored against."""

    prompt: str
    baseline: str
    responses: Sequence[str]


@dataclass(frozen=True)
class PromptRewards:
    """The candidates of one prompt against its baseline: logit_A - logit_B [candidates] per order.

    `forward` has the baseline in slot A. `backward` has the candidate in slot A. It is None if only
    the order with the baseline first was asked for. `num_tokens` counts the tokens of the rows. A
    shared prefix counts once, and so do equal candidates. (An encoder-decoder model reads the
    prefix again for each candidate.)
    """

    forward: Float32s
    backward: Float32s | None
    num_tokens: int

    @property
    def values(self) -> Float32s:
        """The rewards [candidates] (eq. 7), each the mean over the orders that were asked for."""
        if self.backward is None:
            return -self.forward
        return (self.backward - self.forward) / np.float32(2)


class NonFiniteLogit(PromptError):
    """A ranker gave NaN or infinity."""


class Ranker(Protocol):
    """What stages need of a pairwise ranker, whatever computes it."""

    def compare(self, items: Sequence[Comparison], progress: Bar | None = None) -> Float32s:
        """Return logit_A - logit_B [items] of each item in its own order only."""
        ...

    def preference(self, items: Sequence[Comparison], progress: Bar | None = None) -> Float32s:
        """Return z = (z_AB - z_BA) / 2 [items]; P(`a` is better) = sigmoid(z)."""
        ...

    def both_orders(
        self, items: Sequence[Comparison], progress: Bar | None = None
    ) -> tuple[Float32s, Float32s]:
        """Return logit_A - logit_B [items] twice: z_AB, `a` in slot A, and z_BA, `b` in slot A."""
        ...

    def rewards_many(
        self,
        items: Sequence[PromptCandidates],
        progress: Bar | None = None,
        *,
        orders: RewardOrders = "both",
    ) -> list[PromptRewards]:
        """Return the rewards of the responses of each item (eq. 7)."""
        ...

    def count_cut(self, prompts: Sequence[str]) -> int:
        """Return how many prompts are longer than `max_context_tokens` and lose their end."""
        ...


class _Distinct(NamedTuple):
    """Responses without repeated judged texts.

    `places` [responses] is the index in `texts` of each given response.
    """

    texts: list[str]
    places: NDArray[np.intp]


class RowRanker(ABC):
    """A language model fine-tuned to say which slot holds the better response.

    It compares in rows. A row holds the shared prefix of some comparisons of one prompt, and one
    branch per comparison. A subclass is an engine: it implements `label_logits`.
    """

    def __init__(self, encoder: RankerEncoder, context_length: int) -> None:
        self._encoder, self._context_length = encoder, context_length

    @abstractmethod
    def label_logits(self, rows: Sequence[PrefixRow], progress: Bar | None) -> list[Float32s]:
        """Return logit_A - logit_B after each branch: [branches] for each row, in the given order.

        `progress` advances by one per branch.
        """

    def compare(self, items: Sequence[Comparison], progress: Bar | None = None) -> Float32s:
        """Return logit_A - logit_B [items] of each item in its own order only.

        Items of one prompt share its context. Equal items are computed once.

        Raises:
            NonFiniteLogit: a logit is NaN or infinite. The message names the prompt.
            UserError: a comparison is longer than the model's context.
        """
        keys = [(item.prompt, self._judged(item.a), self._judged(item.b)) for item in items]
        distinct: dict[str, dict[tuple[str, str, str], Comparison]] = {}
        for key, item in zip(keys, items, strict=True):
            distinct.setdefault(item.prompt, {}).setdefault(key, item)
        chosen = [item for of_prompt in distinct.values() for item in of_prompt.values()]
        sides = zip(
            self._encoder.sides("A", [item.a for item in chosen]),
            self._encoder.sides("B", [item.b for item in chosen]),
            strict=True,
        )
        branches = (a + b + self._encoder.suffix for a, b in sides)
        rows = [
            PrefixRow(self._encoder.context(prompt).ids, [next(branches) for _ in of_prompt])
            for prompt, of_prompt in distinct.items()
        ]
        found: dict[tuple[str, str, str], np.float32] = {}
        logits = self._checked_logits(list(distinct), rows, progress)
        for of_prompt, values in zip(distinct.values(), logits, strict=True):
            found.update(zip(of_prompt, values, strict=True))
        return np.array([found[key] for key in keys], dtype=np.float32)

    def preference(self, items: Sequence[Comparison], progress: Bar | None = None) -> Float32s:
        """Return z = (z_AB - z_BA) / 2 [items]; P(`a` is better) = sigmoid(z).

        Exchanging the two responses negates z, up to rounding.
        """
        forward, backward = self.both_orders(items, progress)
        return (forward - backward) / np.float32(2)

    def both_orders(
        self, items: Sequence[Comparison], progress: Bar | None = None
    ) -> tuple[Float32s, Float32s]:
        """Return logit_A - logit_B [items] twice: z_AB, `a` in slot A, and z_BA, `b` in slot A.

        `progress` counts branches, at most two per item.
        """
        swapped = [Comparison(item.prompt, item.b, item.a) for item in items]
        logits = self.compare([*items, *swapped], progress)
        return logits[: len(items)], logits[len(items) :]

    def rewards(self, prompt: str, baseline: str, responses: Sequence[str]) -> Float32s:
        """Return the rewards [responses] against the baseline (eq. 7), the mean of both orders."""
        return self.rewards_many([PromptCandidates(prompt, baseline, responses)])[0].values

    def rewards_many(
        self,
        items: Sequence[PromptCandidates],
        progress: Bar | None = None,
        *,
        orders: RewardOrders = "both",
    ) -> list[PromptRewards]:
        """Return the rewards of the responses of each item (eq. 7).

        With the baseline first, all responses share context and baseline, which are computed once.
        With the candidate first, they share the context only. Equal responses are computed once.
        `progress` advances by one per distinct response and order.

        Raises:
            NonFiniteLogit: a logit is NaN or infinite. The message names the prompt.
            UserError: a comparison is longer than the model's context.
        """
        distinct = [self._distinct(item.responses) for item in items]
        rows = self._rows_of_baseline_first(items, distinct)
        forward = self._in_order(items, distinct, rows, progress)
        if orders == "baseline-first":
            return [PromptRewards(z_ab, None, num_tokens) for z_ab, num_tokens in forward]
        rows = self._rows_of_candidate_first(items, distinct)
        backward = self._in_order(items, distinct, rows, progress)
        return [
            PromptRewards(z_ab, z_ba, num_tokens + num_more)
            for (z_ab, num_tokens), (z_ba, num_more) in zip(forward, backward, strict=True)
        ]

    def _in_order(
        self,
        items: Sequence[PromptCandidates],
        distinct: Sequence[_Distinct],
        rows: Sequence[PrefixRow],
        progress: Bar | None,
    ) -> list[tuple[Float32s, int]]:
        """Return logit_A - logit_B [responses] and the number of tokens of the row, per item."""
        logits = self._checked_logits([item.prompt for item in items], rows, progress)
        return [
            (values[one.places], row.num_tokens if row.branches else 0)
            for row, one, values in zip(rows, distinct, logits, strict=True)
        ]

    def _rows_of_baseline_first(
        self, items: Sequence[PromptCandidates], distinct: Sequence[_Distinct]
    ) -> list[PrefixRow]:
        """Return one row per item: context and baseline, then one branch per distinct response."""
        baselines = self._encoder.sides("A", [item.baseline for item in items])
        texts = iter(self._encoder.sides("B", [text for one in distinct for text in one.texts]))
        return [
            PrefixRow(
                self._encoder.context(item.prompt).ids + baseline,
                [next(texts) + self._encoder.suffix for _ in one.texts],
            )
            for item, baseline, one in zip(items, baselines, distinct, strict=True)
        ]

    def _rows_of_candidate_first(
        self, items: Sequence[PromptCandidates], distinct: Sequence[_Distinct]
    ) -> list[PrefixRow]:
        """Return one row per item: the context, then response and baseline in each branch."""
        baselines = self._encoder.sides("B", [item.baseline for item in items])
        texts = iter(self._encoder.sides("A", [text for one in distinct for text in one.texts]))
        return [
            PrefixRow(
                self._encoder.context(item.prompt).ids,
                [next(texts) + baseline + self._encoder.suffix for _ in one.texts],
            )
            for item, baseline, one in zip(items, baselines, distinct, strict=True)
        ]

    def _distinct(self, responses: Sequence[str]) -> _Distinct:
        numbers: dict[str, int] = {}
        texts: list[str] = []
        for response in responses:
            if self._judged(response) not in numbers:
                numbers[self._judged(response)] = len(texts)
                texts.append(response)
        places = [numbers[self._judged(response)] for response in responses]
        return _Distinct(texts, np.array(places, dtype=np.intp))

    def _judged(self, response: str) -> str:
        return judged_text(self._encoder.templates, response)

    def count_cut(self, prompts: Sequence[str]) -> int:
        """Return how many prompts are longer than `max_context_tokens` and lose their end."""
        return sum(self._encoder.context(prompt).num_cut > 0 for prompt in prompts)

    def _checked_logits(
        self, prompts: Sequence[str], rows: Sequence[PrefixRow], progress: Bar | None
    ) -> list[Float32s]:
        """Return `label_logits` of the rows, checked; `prompts` [rows] are their prompts."""
        self._check_lengths(prompts, rows)
        found = self.label_logits(rows, progress)
        for prompt, values in zip(prompts, found, strict=True):
            _check_finite(prompt, values)
        return found

    def _check_lengths(self, prompts: Sequence[str], rows: Sequence[PrefixRow]) -> None:
        for prompt, row in zip(prompts, rows, strict=True):
            longest = len(row.prefix) + max(map(len, row.branches), default=0)
            if longest > self._context_length:
                raise UserError(
                    f"ranker, prompt {prompt[:60]!r}: context and responses are {longest} tokens, "
                    f"the model's context is {self._context_length}; lower "
                    "templates.max_context_tokens or the longest response."
                )


class WeightedRanker:
    """Several rankers as one: each logit is the sum of the rankers' logits times their factors.

    Preferences and rewards are linear in the logits. So they are the same weighted sum, which is
    computed in float64. A `progress` counts the branches of every ranker.
    """

    def __init__(self, rankers: Sequence[Ranker], factors: Sequence[float]) -> None:
        assert len(rankers) == len(factors) > 0
        self._rankers, self._factors = rankers, factors

    def compare(self, items: Sequence[Comparison], progress: Bar | None = None) -> Float32s:
        """Return logit_A - logit_B [items] of each item in its own order only."""
        return self._sum([ranker.compare(items, progress) for ranker in self._rankers])

    def preference(self, items: Sequence[Comparison], progress: Bar | None = None) -> Float32s:
        """Return z = (z_AB - z_BA) / 2 [items]; P(`a` is better) = sigmoid(z)."""
        return self._sum([ranker.preference(items, progress) for ranker in self._rankers])

    def both_orders(
        self, items: Sequence[Comparison], progress: Bar | None = None
    ) -> tuple[Float32s, Float32s]:
        """Return logit_A - logit_B [items] twice: z_AB, `a` in slot A, and z_BA, `b` in slot A."""
        found = [ranker.both_orders(items, progress) for ranker in self._rankers]
        forward, backward = zip(*found, strict=True)
        return self._sum(forward), self._sum(backward)

    def rewards_many(
        self,
        items: Sequence[PromptCandidates],
        progress: Bar | None = None,
        *,
        orders: RewardOrders = "both",
    ) -> list[PromptRewards]:
        """Return the rewards of the responses of each item (eq. 7).

        `num_tokens` is the sum over rankers.
        """
        found = [ranker.rewards_many(items, progress, orders=orders) for ranker in self._rankers]
        return [self._sum_rewards(of_item) for of_item in zip(*found, strict=True)]

    def count_cut(self, prompts: Sequence[str]) -> int:
        """Return how many prompts lose their end for the ranker that cuts the most prompts."""
        return max(ranker.count_cut(prompts) for ranker in self._rankers)

    def _sum(self, values: Sequence[Float32s]) -> Float32s:
        return weighted_sum(values, self._factors)

    def _sum_rewards(self, parts: Sequence[PromptRewards]) -> PromptRewards:
        backward = [part.backward for part in parts if part.backward is not None]
        return PromptRewards(
            self._sum([part.forward for part in parts]),
            self._sum(backward) if backward else None,
            sum(part.num_tokens for part in parts),
        )


@dataclass(frozen=True)
class RankerLoading:
    """How a ranker is loaded. Only `transformers` uses device, attention and token budget."""

    directory: str
    dtype: torch.dtype | str
    device: torch.device | str
    attention: str
    token_budget: int

    def model(self) -> PreTrainedModel:
        """Return the model as transformers loads it."""
        return models.load_model(
            self.directory, dtype=self.dtype, device=self.device, attention=self.attention
        )


def _transformers(loading: RankerLoading, encoder: RankerEncoder) -> RowRanker:
    from rso.ranking.transformers_engine import TransformersRanker

    return TransformersRanker(loading.model(), encoder, token_budget=loading.token_budget)


def _vllm(loading: RankerLoading, encoder: RankerEncoder) -> RowRanker:
    from rso.ranking.vllm_engine import VllmRanker

    dtype = str(loading.dtype).removeprefix("torch.")
    return VllmRanker(loading.directory, encoder, dtype=dtype)


# The engines that `compute.ranker_engine` can name.
RANKER_ENGINES: dict[str, Callable[[RankerLoading, RankerEncoder], RowRanker]] = {
    "transformers": _transformers,
    "vllm": _vllm,
}


def load_ranker(
    directory: str | Path,
    templates: Templates,
    *,
    dtype: torch.dtype | str,
    token_budget: int,
    device: torch.device | str = "cpu",
    attention: str = "sdpa",
    engine: str = "transformers",
) -> RowRanker:
    """Return the ranker in a model directory, computed by one of `RANKER_ENGINES`.

    Raises:
        UserError: the model or the tokenizer is missing, `RankerEncoder` refuses templates or
            labels, or the engine cannot start.
    """
    encoder = RankerEncoder(models.load_tokenizer(directory), templates)
    loading = RankerLoading(str(directory), dtype, device, attention, token_budget)
    return RANKER_ENGINES[engine](loading, encoder)


def _check_finite(prompt: str, values: Float32s) -> None:
    if not np.isfinite(values).all():
        raise NonFiniteLogit(
            prompt,
            f"ranker, prompt {prompt[:60]!r}: {int((~np.isfinite(values)).sum())} of "
            f"{len(values)} logit differences are NaN or infinite; check that the ranker's "
            "training did not diverge, or set compute.dtype to float32.",
        )
