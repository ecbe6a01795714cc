"""Synthetic comparisons: pairs of decodes of the reference policy, judged by a labeller."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pyarrow as pa

from pipelines.decode import Decoding, Engine, response_counters
from pipelines.shards import Shard
from pipelines.tables import select_ids, table_of
from rso import ids, seeds
from rso.decoding import Decoded
from rso.labelling import label, labeller
from rso.templates import judged_text


@dataclass(frozen=True)
class CompareShard:
    """Prompts to `comparisons`: pairs of decodes, labelled by the known gold instead of people."""

    decoding: Decoding
    prompt_ids: Sequence[str]
    labeller: str
    pairs_per_prompt: int

    def setup(self) -> Engine:
        """Load the decoder."""
        return self.decoding.load()

    def __call__(self, engine: Engine, tables: Mapping[str, pa.Table]) -> Shard:
        """Return the comparisons for the shard's chosen prompts; ties are dropped and counted."""
        prompts = select_ids(tables["prompts"], self.prompt_ids)
        decoded = self.decoding.decode(engine, prompts)
        counts: Counter[str] = Counter()
        rows = [
            row
            for prompt, responses in zip(prompts.to_pylist(), decoded, strict=True)
            for row in self._comparisons(prompt, responses, counts)
        ]
        return Shard(
            {"comparisons": table_of("comparisons", rows)},
            {
                "prompts": len(prompts),
                **response_counters(decoded),
                "comparisons": len(rows),
                "ties": counts["ties"],
                "prompts_without_two_distinct": counts["single"],
            },
        )

    def _comparisons(
        self, prompt: Mapping[str, Any], responses: Sequence[Decoded], counts: Counter[str]
    ) -> Iterator[dict[str, Any]]:
        distinct: dict[str, int] = {}
        for index, response in enumerate(responses):
            distinct.setdefault(judged_text(self.decoding.templates, response.text), index)
        first = {responses[index].text: index for index in distinct.values()}
        if len(first) < 2:
            counts["single"] += 1
        pairs = list(combinations(first, 2))
        gold = labeller(self.labeller).score
        random = seeds.generator("compare", self.decoding.seed, prompt["prompt_id"])
        for chosen_pair in random.permutation(len(pairs))[: self.pairs_per_prompt]:
            a, b = pairs[int(chosen_pair)]
            judged = (judged_text(self.decoding.templates, text) for text in (a, b))
            better = label(*(gold(prompt["prompt"], text, prompt["target"]) for text in judged))
            if better is None:
                counts["ties"] += 1
                continue
            chosen, rejected = (a, b) if better == "a" else (b, a)
            yield comparison_row(prompt, chosen, rejected, first[chosen], first[rejected])


def comparison_row(
    prompt: Mapping[str, Any], chosen: str, rejected: str, chosen_index: int, rejected_index: int
) -> dict[str, Any]:
    """Return the `comparisons` row of two decodes of one prompt."""
    prompt_id = prompt["prompt_id"]
    chosen_id = ids.response_id(prompt_id, "compare", chosen_index)
    rejected_id = ids.response_id(prompt_id, "compare", rejected_index)
    return {
        "comparison_id": ids.comparison_id(prompt_id, chosen_id, rejected_id),
        "prompt_id": prompt_id,
        "chosen_id": chosen_id,
        "rejected_id": rejected_id,
        "prompt": prompt["prompt"],
        "chosen": chosen,
        "rejected": rejected,
        "split": prompt["split"],
        "source": "synthetic",
        "weight": 1.0,
    }
