"""Plan all optimiser steps before training.

An optimiser step has exactly `batch_size` items (examples, comparisons or pairs), however they are
packed into rows and micro-batches. The items of a prompt stand together, because they share one
row. Only the end of a step can separate them. All epochs form one sequence, so only the last step
can be smaller.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Generic, TypeVar

from torch.utils.data import Dataset

from rso import seeds
from rso.prefix import PrefixRow, plan_batches


@dataclass(frozen=True)
class TrainingExample:
    """One shared-prefix row; trainers add the fields that their losses need."""

    prompt_id: str
    row: PrefixRow


ExampleT = TypeVar("ExampleT", bound=TrainingExample)


@dataclass(frozen=True)
class Step(Generic[ExampleT]):
    """One optimiser step. Its loss is the sum over all its rows, divided by `divisor`."""

    examples: list[ExampleT]
    num_items: int
    divisor: float
    token_budget: int

    @property
    def micro_batches(self) -> list[list[ExampleT]]:
        """All rows, packed to the token budget, in the order of computation."""
        return micro_batches(self.examples, self.token_budget)

    def share(self, rank: int, num_processes: int) -> "ProcessShare[ExampleT]":
        """The part of process `rank`: rows are dealt out by length, then packed.

        All processes get the same number of micro-batches, because they exchange weights or
        gradients in them. Stand-ins for missing micro-batches repeat a row and must not count.
        """
        longest = sorted(self.examples, key=lambda e: -e.row.num_tokens)
        hands = [
            micro_batches(longest[i::num_processes], self.token_budget)
            for i in range(num_processes)
        ]
        missing = max(map(len, hands)) - len(hands[rank])
        return ProcessShare(hands[rank], [[longest[0]]] * missing)

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows; a shared prefix counts once."""
        return sum(e.row.num_tokens for e in self.examples)

    @property
    def prompt_ids(self) -> list[str]:
        """The prompt of each row."""
        return [e.prompt_id for e in self.examples]


@dataclass(frozen=True)
class ProcessShare(Generic[ExampleT]):
    """What one process computes of a step; only `micro_batches` count, `stand_ins` do not."""

    micro_batches: list[list[ExampleT]]
    stand_ins: list[list[ExampleT]]


class Steps(Dataset[Step[ExampleT]]):
    """The optimiser steps of a training; each is built from its item indices on access.

    `build` turns the item indices of a step into examples. Neighbouring items of one prompt become
    one example. `weigh` returns the divisor of the step's summed loss.
    """

    def __init__(
        self,
        plan: Sequence[Sequence[int]],
        build: Callable[[Sequence[int]], list[ExampleT]],
        weigh: Callable[[Sequence[int]], float],
        *,
        token_budget: int,
    ) -> None:
        self._plan, self._build, self._weigh = plan, build, weigh
        self._token_budget = token_budget

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, index: int) -> Step[ExampleT]:
        items = self._plan[index]
        return Step(
            self._build(items),
            num_items=len(items),
            divisor=self._weigh(items),
            token_budget=self._token_budget,
        )

    def __iter__(self) -> Iterator[Step[ExampleT]]:
        return (self[index] for index in range(len(self)))


def plan_steps(
    prompt_ids: Sequence[str],
    *,
    batch_size: int,
    epochs: float,
    key: Sequence[str | int],
    max_steps: int | None = None,
) -> list[list[int]]:
    """The item indices of each optimiser step; only the first `max_steps` steps are returned.

    `prompt_ids` [item] names the prompt of each item. Every epoch has its own
    random order of the prompts, which depends only on `key`, the epoch and the ids. The items of a
    prompt keep their order. A fraction of an epoch takes the first items of the epoch's order.

    Raises:
        ValueError: there are no items.
    """
    if not prompt_ids:
        raise ValueError("plan_steps: there are no items; expected at least one")
    by_prompt: dict[str, list[int]] = {}
    for item, prompt_id in enumerate(prompt_ids):
        by_prompt.setdefault(prompt_id, []).append(item)
    unique = list(by_prompt)
    num_items = max(1, round(epochs * len(prompt_ids)))
    sequence: list[int] = []
    epoch = 0
    while len(sequence) < num_items:
        order = seeds.order(unique, *key, "epoch", epoch)
        sequence += [item for prompt in order for item in by_prompt[unique[prompt]]]
        epoch += 1
    sequence = sequence[:num_items]
    steps = [sequence[i : i + batch_size] for i in range(0, num_items, batch_size)]
    return steps[:max_steps]


def choose(prompt_ids: Sequence[str], limit: int | None, key: Sequence[str | int]) -> list[int]:
    """Indices of at most `limit` items, ascending; None takes all items.

    Whole prompts are taken in a random order that `key` determines. Only the last prompt taken may
    lose some of its items.
    """
    if limit is None or limit >= len(prompt_ids):
        return list(range(len(prompt_ids)))
    (chosen,) = plan_steps(
        prompt_ids, batch_size=limit, epochs=limit / len(prompt_ids), key=(*key, "choose")
    )
    return sorted(chosen)


def group_by_prompt(items: Sequence[int], prompt_ids: Sequence[str]) -> list[tuple[str, list[int]]]:
    """The items in groups (prompt_id, items), in order; a group is neighbours of one prompt."""
    return [(key, list(group)) for key, group in groupby(items, key=lambda i: prompt_ids[i])]


def micro_batches(examples: Sequence[ExampleT], token_budget: int) -> list[list[ExampleT]]:
    """The examples in batches of at most `token_budget` tokens, the longest rows first.

    A row longer than the budget is a batch of its own.
    """
    batches = plan_batches([e.row.num_tokens for e in examples], token_budget)
    return [[examples[i] for i in batch] for batch in batches]
