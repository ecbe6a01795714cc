"""Prompts to decoded responses: candidates for rejection sampling, and decodes for comparisons."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pyarrow as pa

from pipelines.shards import Shard
from pipelines.tables import select_ids, table_of
from rso import config, ids, seeds
from rso.aliases import Counters
from rso.decoding import (
    Decoded,
    Decoder,
    Request,
    Sampling,
    Servers,
    load_decoder,
    require_room,
)
from rso.models import load_tokenizer
from rso.progress import progress
from rso.templates import encode_prompt


class Engine(NamedTuple):
    """A loaded decoder and the tokenizer of its model."""

    decoder: Decoder
    tokenizer: Any


@dataclass(frozen=True)
class Decoding:
    """How to load a decoder and draw from it; picklable, so that it can be sent to workers.

    `journal` is a folder for this model only. There the vllm-server engine keeps finished answers,
    so that a killed shard asks only for the rest when it runs again.
    """

    label: str
    model: str
    engine: str
    compute: config.Compute
    templates: config.Templates
    sampling: Sampling
    seed: int
    max_prompt_tokens: int | None = None
    journal: str | None = None

    def load(self) -> Engine:
        """Load and return the decoder and its tokenizer."""
        longest = self.max_prompt_tokens
        decoder = load_decoder(
            self.engine,
            self.model,
            dtype=self.compute.dtype,
            device=self.compute.device,
            max_model_len=longest + self.sampling.max_new_tokens if longest else None,
            servers=Servers(
                self.compute.endpoints,
                self.compute.server_concurrency,
                self.compute.server_patience,
                self.compute.server_timeout,
                self.journal,
            ),
        )
        return Engine(decoder, load_tokenizer(self.model))

    def decode(self, engine: Engine, prompts: pa.Table) -> list[list[Decoded]]:
        """Return the responses to each row of `prompts`, in order.

        Raises:
            UserError: a prompt leaves no room for an answer in the model's context.
        """
        requests = [
            Request(prompt_id, encode_prompt(engine.tokenizer, self.templates, prompt))
            for prompt_id, prompt in zip(
                prompts["prompt_id"].to_pylist(), prompts["prompt"].to_pylist(), strict=True
            )
        ]
        require_room(requests, engine.decoder.context_length, self.sampling.max_new_tokens)
        sampling = replace(self.sampling, stop=self.templates.stop)
        total = len(requests) * sampling.num_samples
        with progress(self.label, total=total, unit="responses") as bar:
            return engine.decoder.decode(requests, sampling, seed=self.seed, progress=bar.advance)


def longest_prompt(tokenizer: Any, templates: config.Templates, prompts: Sequence[str]) -> int:
    """Return the number of tokens of the longest prompt in its template, 0 without prompts."""
    return max((len(encode_prompt(tokenizer, templates, prompt)) for prompt in prompts), default=0)


@dataclass(frozen=True)
class DecodeShard:
    """Prompts to `candidates`: n samples per prompt, one of which is its baseline (eq. 7)."""

    decoding: Decoding
    prompt_ids: Sequence[str]

    def setup(self) -> Engine:
        """Load the decoder."""
        return self.decoding.load()

    def __call__(self, engine: Engine, tables: Mapping[str, pa.Table]) -> Shard:
        """Return the candidates of the shard's chosen prompts."""
        prompts = select_ids(tables["prompts"], self.prompt_ids)
        decoded = self.decoding.decode(engine, prompts)
        rows = [
            row
            for prompt_id, responses in zip(prompts["prompt_id"].to_pylist(), decoded, strict=True)
            for row in candidate_rows(prompt_id, responses, seed=self.decoding.seed)
        ]
        return Shard(
            {"candidates": table_of("candidates", rows)},
            {"prompts": len(prompts), **response_counters(decoded)},
        )


def candidate_rows(
    prompt_id: str, responses: Sequence[Decoded], *, seed: int
) -> list[dict[str, Any]]:
    """Return the `candidates` rows of one prompt; the baseline is drawn by (seed, prompt_id)."""
    baseline = int(seeds.generator("baseline", seed, prompt_id).integers(len(responses)))
    return [
        {
            "prompt_id": prompt_id,
            "response_id": ids.response_id(prompt_id, "decode", index),
            "sample_index": index,
            "response": response.text,
            "token_ids": response.token_ids,
            "num_tokens": len(response.token_ids),
            "finish_reason": response.finish_reason,
            "cumulative_logp": response.cumulative_logp,
            "is_baseline": index == baseline,
        }
        for index, response in enumerate(responses)
    ]


def response_counters(decoded: Sequence[Sequence[Decoded]]) -> Counters:
    """Count responses, tokens, and responses that are cut off, blank, or copies within a prompt."""
    flat = [response for responses in decoded for response in responses]
    return {
        "responses": len(flat),
        "tokens": sum(len(response.token_ids) for response in flat),
        "cut_off": sum(response.finish_reason == "length" for response in flat),
        "blank": sum(not response.text.strip() for response in flat),
        "copies": sum(len(r) - len({d.text for d in r}) for r in decoded),
    }
