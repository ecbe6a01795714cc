"""The synthetic gold in the place of a ranker, for studies of where a gain is lost."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rso.aliases import Float32s
from rso.labelling import labeller
from rso.ranking import Comparison, PromptCandidates, PromptRewards


@dataclass(frozen=True)
class GoldSource:
    """Loads the gold where a stage loads its ranker; picklable."""

    labeller: str

    def load(self) -> "GoldRanker":
        """Return the gold as a ranker."""
        return GoldRanker(self.labeller)


class GoldRanker:
    """A `Ranker` whose logits are differences of gold points: exact, and fair to both slots."""

    def __init__(self, name: str) -> None:
        found = labeller(name)
        if found.needs_target:
            raise ValueError(f"labeller {name} needs a human target, which rankers do not see")
        self._score = found.score

    def compare(self, items: Sequence[Comparison], progress: Any = None) -> Float32s:
        """Return the points of `a` less those of `b` [items]."""
        gaps = [self._points(i.prompt, i.a) - self._points(i.prompt, i.b) for i in items]
        return np.array(gaps, dtype=np.float32)

    preference = compare

    def both_orders(
        self, items: Sequence[Comparison], progress: Any = None
    ) -> tuple[Float32s, Float32s]:
        """Return the margins of both orders [items], which are each other's negative."""
        forward = self.compare(items)
        return forward, -forward

    def rewards_many(
        self, items: Sequence[PromptCandidates], progress: Any = None, *, orders: str = "both"
    ) -> list[PromptRewards]:
        """Return the points of each item's responses less the baseline's."""
        found = []
        for item in items:
            base = self._points(item.prompt, item.baseline)
            gains = [self._points(item.prompt, text) - base for text in item.responses]
            values = np.array(gains, dtype=np.float32)
            found.append(PromptRewards(-values, values if orders == "both" else None, 0))
        return found

    def count_cut(self, prompts: Sequence[str]) -> int:
        """Return 0: the gold reads whole prompts."""
        return 0

    def _points(self, prompt: str, response: str) -> float:
        return self._score(prompt, response, None)
