"""The pairwise ranker: logits of "A" against "B", rewards (eq. 7) and preferences.

Signs: `compare` gives logit_A - logit_B, positive when the first response is better. A reward has
the baseline in slot A and the candidate in slot B, so it is logit_B - logit_A, positive when the
candidate is better. All are fp32, in nats.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from rso import models
from rso.config import Templates
from rso.errors import PromptError, UserError
from rso.objectives import weighted_sum
from rso.prefix import Row
from rso.progress import progress as Bar
from rso.templates import RankerEncoder

Float32 = NDArray[np.float32]


class Comparison(NamedTuple):
    """Two responses to a prompt; `a` goes into slot A."""

    prompt: str
    a: str
    b: str


class Candidates(NamedTuple):
    """The candidates of a prompt and the baseline they are scored against."""

    prompt: str
    baseline: str
    responses: Sequence[str]


class NonFiniteLogit(PromptError):
    """A ranker gave NaN or infinity."""


class Ranker(Protocol):
    """What stages need of a pairwise ranker, whatever computes it."""

    def compare(self, items: Sequence[Comparison], progress: Bar | None = None) -> Float32:
        """Return logit_A - logit_B of each item as it stands, one order only: [items]."""
        ...

    def preference(self, items: Sequence[Comparison], progress: Bar | None = None) -> Float32:
        """Return z = (z_AB - z_BA) / 2 of each item, [items]; P(`a` is better) = sigmoid(z)."""
        ...

    def both_orders(
        self, items: Sequence[Comparison], progress: Bar | None = None
    ) -> tuple[Float32, Float32]:
        """Return z_AB and z_BA, each logit_A - logit_B [items]: `a` first, and `b` first."""
        ...

    def rewards_many(
        self, items: Sequence[Candidates], progress: Bar | None = None
    ) -> list[Float32]:
        """Return the rewards of each item's responses (eq. 7)."""
        ...

    def count_cut(self, prompts: Sequence[str]) -> int:
        """Return how many prompts are longer than `max_context_tokens` and lose their end."""
        ...


class RowRanker(ABC):
    """A language model fine-tuned to say which slot holds the better response.

    It compares in rows: what comparisons of a prompt begin with, and a branch for each. An engine
    computes the margins of such rows.
    """

    def __init__(self, encoder: RankerEncoder, context_length: int) -> None:
        self._encoder, self._context_length = encoder, context_length

    @abstractmethod
    def margins(self, rows: Sequence[Row], progress: Bar | None) -> list[Float32]:
        """Return logit_A - logit_B after every branch of every row, rows as given."""

    def compare(self, items: Sequence[Comparison], progress: Bar | None = None) -> Float32:
        """Return logit_A - logit_B of each item as it stands, one order only: [items].

        Items of one prompt share its context; equal items are computed once.

        Raises:
            NonFiniteLogit: a logit is NaN or infinite; the prompt is named.
            UserError: a comparison is longer than the model's context.
        """
        numbers: dict[str, dict[tuple[str, str], int]] = {}
        for item in items:
            of_prompt = numbers.setdefault(item.prompt, {})
            of_prompt.setdefault((item.a, item.b), len(of_prompt))
        pairs = [pair for of_prompt in numbers.values() for pair in of_prompt]
        sides = zip(
            self._encoder.sides("A", [a for a, _ in pairs]),
            self._encoder.sides("B", [b for _, b in pairs]),
            strict=True,
        )
        branches = (a + b + self._encoder.suffix for a, b in sides)
        rows = [
            Row(self._encoder.context(prompt).ids, [next(branches) for _ in of_prompt])
            for prompt, of_prompt in numbers.items()
        ]
        found = dict(zip(numbers, self._margins(list(numbers), rows, progress), strict=True))
        return np.array(
            [found[item.prompt][numbers[item.prompt][item.a, item.b]] for item in items],
            dtype=np.float32,
        )

    def preference(self, items: Sequence[Comparison], progress: Bar | None = None) -> Float32:
        """Return z = (z_AB - z_BA) / 2 of each item, [items]; P(`a` is better) = sigmoid(z).

        Swapping the two responses negates z exactly in exact arithmetic.
        """
        forward, backward = self.both_orders(items, progress)
        return (forward - backward) / np.float32(2)

    def both_orders(
        self, items: Sequence[Comparison], progress: Bar | None = None
    ) -> tuple[Float32, Float32]:
        """Return z_AB and z_BA, each logit_A - logit_B [items], with `a` first and with `b` first.

        `progress` counts branches, at most two an item.
        """
        swapped = [Comparison(item.prompt, item.b, item.a) for item in items]
        margins = self.compare([*items, *swapped], progress)
        return margins[: len(items)], margins[len(items) :]

    def rewards(self, prompt: str, baseline: str, responses: Sequence[str]) -> Float32:
        """Return the reward of each response against the baseline: [responses] (eq. 7)."""
        return self.rewards_many([Candidates(prompt, baseline, responses)])[0]

    def rewards_many(
        self, items: Sequence[Candidates], progress: Bar | None = None
    ) -> list[Float32]:
        """Return the rewards of each item's responses: logit_B - logit_A, the candidate in B.

        Context and baseline are computed once for all responses, equal responses once.

        Raises:
            NonFiniteLogit: a logit is NaN or infinite; the prompt is named.
            UserError: a comparison is longer than the model's context.
        """
        texts = [
            {text: number for number, text in enumerate(dict.fromkeys(item.responses))}
            for item in items
        ]
        prefixes = self._encoder.sides("A", [item.baseline for item in items])
        branches = iter(self._encoder.sides("B", [text for distinct in texts for text in distinct]))
        rows = [
            Row(
                self._encoder.context(item.prompt).ids + prefix,
                [next(branches) + self._encoder.suffix for _ in distinct],
            )
            for item, prefix, distinct in zip(items, prefixes, texts, strict=True)
        ]
        margins = self._margins([item.prompt for item in items], rows, progress)
        return [
            -values[[distinct[text] for text in item.responses]]
            if distinct
            else np.empty(0, np.float32)
            for item, distinct, values in zip(items, texts, margins, strict=True)
        ]

    def count_cut(self, prompts: Sequence[str]) -> int:
        """Return how many prompts are longer than `max_context_tokens` and lose their end."""
        return sum(self._encoder.context(prompt).num_cut > 0 for prompt in prompts)

    def _margins(
        self, prompts: Sequence[str], rows: Sequence[Row], progress: Bar | None
    ) -> list[Float32]:
        """Return the margins of the rows, one a prompt, checked."""
        self._check_lengths(prompts, rows)
        found = self.margins(rows, progress)
        for prompt, values in zip(prompts, found, strict=True):
            _check_finite(prompt, values)
        return found

    def _check_lengths(self, prompts: Sequence[str], rows: Sequence[Row]) -> None:
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

    def compare(self, items: Sequence[Comparison], progress: Bar | None = None) -> Float32:
        """Return logit_A - logit_B of each item as it stands, one order only: [items]."""
        return self._sum([ranker.compare(items, progress) for ranker in self._rankers])

    def preference(self, items: Sequence[Comparison], progress: Bar | None = None) -> Float32:
        """Return z = (z_AB - z_BA) / 2 of each item, [items]."""
        return self._sum([ranker.preference(items, progress) for ranker in self._rankers])

    def both_orders(
        self, items: Sequence[Comparison], progress: Bar | None = None
    ) -> tuple[Float32, Float32]:
        """Return z_AB and z_BA, each logit_A - logit_B [items]: `a` first, and `b` first."""
        found = [ranker.both_orders(items, progress) for ranker in self._rankers]
        forward, backward = zip(*found, strict=True)
        return self._sum(forward), self._sum(backward)

    def rewards_many(
        self, items: Sequence[Candidates], progress: Bar | None = None
    ) -> list[Float32]:
        """Return the rewards of each item's responses (eq. 7)."""
        found = [ranker.rewards_many(items, progress) for ranker in self._rankers]
        return [self._sum(rewards) for rewards in zip(*found, strict=True)]

    def count_cut(self, prompts: Sequence[str]) -> int:
        """Return how many prompts lose their end, by the ranker that cuts most of them."""
        return max(ranker.count_cut(prompts) for ranker in self._rankers)

    def _sum(self, values: Sequence[Float32]) -> Float32:
        return weighted_sum(values, self._factors)


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


def _check_finite(prompt: str, values: Float32) -> None:
    if not np.isfinite(values).all():
        raise NonFiniteLogit(
            prompt,
            f"ranker, prompt {prompt[:60]!r}: {int((~np.isfinite(values)).sum())} of "
            f"{len(values)} logit differences are NaN or infinite; check that the ranker's "
            "training did not diverge, or set compute.dtype to float32.",
        )
