"""The pairwise ranker: logits of "A" against "B", rewards (eq. 7) and preferences.

Signs: `compare` gives logit_A - logit_B, positive when the first response is better. A reward is
positive when the candidate is better than the baseline: logit_B - logit_A with the baseline in slot
A, averaged with logit_A - logit_B with the candidate in slot A where both orders are asked for. All
are fp32, in nats.

Responses with the same `judged_text` are equal to a ranker and computed once.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

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
    """The candidates of a prompt against its baseline: logit_A - logit_B [candidates] by order.

    `forward` has the baseline in slot A, `backward` the candidate; it is None where only the first
    order was asked for. `num_tokens` counts what was prefilled: shared prefixes and equal
    candidates once. An encoder-decoder model reads the prefix again for each candidate.
    """

    forward: Float32s
    backward: Float32s | None
    num_tokens: int

    @property
    def values(self) -> Float32s:
        """The rewards [candidates] (eq. 7), the mean over the orders that were asked for."""
        if self.backward is None:
            return -self.forward
        return (self.backward - self.forward) / np.float32(2)


class NonFiniteLogit(PromptError):
    """A ranker gave NaN or infinity."""


class Ranker(Protocol):
    """What stages need of a pairwise ranker, whatever computes it."""

    def compare(self, items: Sequence[Comparison], progress: Bar | None = None) -> Float32s:
        """Return logit_A - logit_B of each item as it stands, one order only: [items]."""
        ...

    def preference(self, items: Sequence[Comparison], progress: Bar | None = None) -> Float32s:
        """Return z = (z_AB - z_BA) / 2 of each item, [items]; P(`a` is better) = sigmoid(z)."""
        ...

    def both_orders(
        self, items: Sequence[Comparison], progress: Bar | None = None
    ) -> tuple[Float32s, Float32s]:
        """Return z_AB and z_BA, each logit_A - logit_B [items]: `a` first, and `b` first."""
        ...

    def rewards_many(
        self,
        items: Sequence[PromptCandidates],
        progress: Bar | None = None,
        *,
        orders: RewardOrders = "both",
    ) -> list[PromptRewards]:
        """Return the rewards of each item's responses (eq. 7)."""
        ...

    def count_cut(self, prompts: Sequence[str]) -> int:
        """Return how many prompts are longer than `max_context_tokens` and lose their end."""
        ...


class _Distinct(NamedTuple):
    """Responses whose judged texts differ; `places` [responses] gives each response its text."""

    texts: list[str]
    places: NDArray[np.intp]


class RowRanker(ABC):
    """A language model fine-tuned to say which slot holds the better response.

    It compares in rows: what comparisons of a prompt begin with, and a branch for each. An engine
    computes the margins of such rows.
    """

    def __init__(self, encoder: RankerEncoder, context_length: int) -> None:
        self._encoder, self._context_length = encoder, context_length

    @abstractmethod
    def margins(self, rows: Sequence[PrefixRow], progress: Bar | None) -> list[Float32s]:
        """Return logit_A - logit_B after every branch of every row, rows as given."""

    def compare(self, items: Sequence[Comparison], progress: Bar | None = None) -> Float32s:
        """Return logit_A - logit_B of each item as it stands, one order only: [items].

        Items of one prompt share its context; equal items are computed once.

        Raises:
            NonFiniteLogit: a logit is NaN or infinite; the prompt is named.
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
        margins = self._margins(list(distinct), rows, progress)
        for of_prompt, values in zip(distinct.values(), margins, strict=True):
            found.update(zip(of_prompt, values, strict=True))
        return np.array([found[key] for key in keys], dtype=np.float32)

    def preference(self, items: Sequence[Comparison], progress: Bar | None = None) -> Float32s:
        """Return z = (z_AB - z_BA) / 2 of each item, [items]; P(`a` is better) = sigmoid(z).

        Swapping the two responses negates z exactly in exact arithmetic.
        """
        forward, backward = self.both_orders(items, progress)
        return (forward - backward) / np.float32(2)

    def both_orders(
        self, items: Sequence[Comparison], progress: Bar | None = None
    ) -> tuple[Float32s, Float32s]:
        """Return z_AB and z_BA, each logit_A - logit_B [items], with `a` first and with `b` first.

        `progress` counts branches, at most two an item.
        """
        swapped = [Comparison(item.prompt, item.b, item.a) for item in items]
        margins = self.compare([*items, *swapped], progress)
        return margins[: len(items)], margins[len(items) :]

    def rewards(self, prompt: str, baseline: str, responses: Sequence[str]) -> Float32s:
        """Return the reward in both orders of each response against the baseline: [responses]."""
        return self.rewards_many([PromptCandidates(prompt, baseline, responses)])[0].values

    def rewards_many(
        self,
        items: Sequence[PromptCandidates],
        progress: Bar | None = None,
        *,
        orders: RewardOrders = "both",
    ) -> list[PromptRewards]:
        """Return the rewards of each item's responses (eq. 7).

        With the baseline first, context and baseline are computed once for all responses; with the
        candidate first, the context is. Equal responses are computed once. `progress` counts a
        distinct response once an order.

        Raises:
            NonFiniteLogit: a logit is NaN or infinite; the prompt is named.
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
        """Return logit_A - logit_B [responses] and the tokens of each item's row."""
        margins = self._margins([item.prompt for item in items], rows, progress)
        return [
            (values[one.places], row.num_tokens if row.branches else 0)
            for row, one, values in zip(rows, distinct, margins, strict=True)
        ]

    def _rows_of_baseline_first(
        self, items: Sequence[PromptCandidates], distinct: Sequence[_Distinct]
    ) -> list[PrefixRow]:
        """Return a row per item: context and baseline, then a branch per distinct response."""
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
        """Return a row per item: the context, then response and baseline in every branch."""
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

    def _margins(
        self, prompts: Sequence[str], rows: Sequence[PrefixRow], progress: Bar | None
    ) -> list[Float32s]:
        """Return the margins of the rows, checked; `prompts` [rows] names the prompt of each."""
        self._check_lengths(prompts, rows)
        found = self.margins(rows, progress)
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
    """Several rankers as one: each logit is the sum of theirs, each times its factor.

    Logits, preferences and rewards are linear in the rankers' logits, so all of them are the same
    weighted sum, taken in float64. A `progress` counts the branches of every ranker.
    """

    def __init__(self, rankers: Sequence[Ranker], factors: Sequence[float]) -> None:
        assert len(rankers) == len(factors) > 0
        self._rankers, self._factors = rankers, factors

    def compare(self, items: Sequence[Comparison], progress: Bar | None = None) -> Float32s:
        """Return logit_A - logit_B of each item as it stands, one order only: [items]."""
        return self._sum([ranker.compare(items, progress) for ranker in self._rankers])

    def preference(self, items: Sequence[Comparison], progress: Bar | None = None) -> Float32s:
        """Return z = (z_AB - z_BA) / 2 of each item, [items]."""
        return self._sum([ranker.preference(items, progress) for ranker in self._rankers])

    def both_orders(
        self, items: Sequence[Comparison], progress: Bar | None = None
    ) -> tuple[Float32s, Float32s]:
        """Return z_AB and z_BA, each logit_A - logit_B [items]: `a` first, and `b` first."""
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
        """Return the rewards of each item's responses (eq. 7); tokens are those of all rankers."""
        found = [ranker.rewards_many(items, progress, orders=orders) for ranker in self._rankers]
        return [self._sum_rewards(of_item) for of_item in zip(*found, strict=True)]

    def count_cut(self, prompts: Sequence[str]) -> int:
        """Return how many prompts lose their end, by the ranker that cuts most of them."""
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
    """Return the ranker in a model directory.

    Device, attention and token budget are for the transformers engine.

    Raises:
        UserError: model or tokenizer is missing, a label is not one token of the tokenizer, or the
            engine cannot start.
    """
    encoder = RankerEncoder(models.load_tokenizer(directory), templates)
    if engine == "vllm":
        from rso.ranking.vllm_engine import VllmRanker

        return VllmRanker(str(directory), encoder, dtype=str(dtype).removeprefix("torch."))
    from rso.ranking.transformers_engine import TransformersRanker

    model = models.load_model(directory, dtype=dtype, device=device, attention=attention)
    return TransformersRanker(model, encoder, token_budget=token_budget)


def _check_finite(prompt: str, values: Float32s) -> None:
    if not np.isfinite(values).all():
        raise NonFiniteLogit(
            prompt,
            f"ranker, prompt {prompt[:60]!r}: {int((~np.isfinite(values)).sum())} of "
            f"{len(values)} logit differences are NaN or infinite; check that the ranker's "
            "training did not diverge, or set compute.dtype to float32.",
        )
