"""The engine that needs only transformers: one prefill per prompt, then all its samples together.

Prompts are decoded in *waves* of similar length. Each prompt is computed once, and its samples read
its keys in place. `causal` does this for decoder-only models, `encoder_decoder` for T5. A finished
sample leaves the batch at once.

On two cores a 135M model in bfloat16 gave 1,006 tokens/s for 64 samples of 64 tokens at prompts of
256 tokens. `generate` gave 141. docs/decoding.md has the whole table.

What can be repeated: sample i of a prompt depends only on (seed, prompt_id, i), the prompt's
tokens, the sampling and the model. Other prompts, their order and the batch size change only the
rounding of matrix products.
"""

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rso import models
from rso.decoding import (
    Decoded,
    Endings,
    Progress,
    Request,
    Sampling,
    draws,
    num_drawn,
    require_room,
)
from rso.decoding.causal import CausalWave
from rso.decoding.encoder_decoder import EncoderDecoderWave
from rso.decoding.side_by_side import Total, side_by_side
from rso.out_of_memory import BatchSize

# A larger wave is faster: a step reads the weights and starts kernels once for all its samples. On
# two CPU cores waves of 512 had 1.13 times the rate of waves of 256 (135M model, bfloat16, median
# of six pairs). A still larger wave takes more memory, and more time before its first report.
ROWS_PER_WAVE, ROWS_PER_WAVE_ON_GPU = 512, 4096
BYTES_PER_WAVE = 2 << 30

Wave = CausalWave | EncoderDecoderWave


def load_transformers(
    directory: str, *, dtype: str = "bfloat16", device: str = "auto"
) -> "TransformersDecoder":
    """Return the decoder of a model directory on `device`; auto is cuda where there is a GPU.

    Raises:
        UserError: as `models.load_model` and `models.load_tokenizer`, or the model's attention
            cannot be computed here.
    """
    model = models.load_model(directory, dtype=getattr(torch, dtype), device=device)
    return TransformersDecoder(model, models.load_tokenizer(directory))


class TransformersDecoder:
    """A `Decoder` over a loaded language model, which is left unchanged."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        wave_class(model).check(model)
        self._model: PreTrainedModel | None = model
        self._tokenizer = tokenizer
        self._stop_ids = models.stop_token_ids(model.generation_config, tokenizer)
        self._lock = threading.Lock()
        is_on_cpu = model.device.type == "cpu"
        self._rows_per_wave = BatchSize(
            ROWS_PER_WAVE if is_on_cpu else ROWS_PER_WAVE_ON_GPU,
            "samples",
            what="decode",
            advice="lower max_new_tokens or num_samples, set top_k where it is 0, or use a device "
            "with more free memory",
        )

    @property
    def context_length(self) -> int:
        """The most tokens that prompt and response may have together; `sys.maxsize` if no limit."""
        assert self._model is not None
        limit = wave_class(self._model).context_length(self._model.config)
        return sys.maxsize if limit is None else limit

    def decode(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        seed: int,
        progress: Progress | None = None,
    ) -> list[list[Decoded]]:
        """See `Decoder.decode`; raises `UserError` for a prompt without room (`check_room`)."""
        require_room(requests, self.context_length, sampling.max_new_tokens)
        assert self._model is not None, "the decoder is closed"
        if not requests:
            return []
        endings = Endings(self._tokenizer, self._stop_ids, sampling.stop)
        model, samples = self._model, dict[int, list[_Sample]]()
        total = Total(progress)

        def decode_wave(wave: Sequence[int]) -> None:
            prompts = [requests[index] for index in wave]
            with total.taken_back_if_it_fails() as report:
                decoded = _decode_wave(model, prompts, sampling, endings, seed, report)
            samples.update(zip(wave, decoded, strict=True))

        def decode_missing(rows_per_wave: int) -> None:
            missing = [index for index in range(len(requests)) if index not in samples]
            waves = list(plan_waves(requests, missing, sampling, model, rows_per_wave))
            side_by_side(decode_wave, waves, num_workers)

        # On a CPU each thread has its own wave: threads that share small operations wait for one
        # another.
        num_workers = torch.get_num_threads() if model.device.type == "cpu" else 1
        num_rows = len(requests) * num_drawn(sampling)
        # Make the waves small enough that each processor has one.
        most_rows = min(wave_limits(model, sampling)[0], -(-num_rows // num_workers))
        with self._lock, _attention_of_waves(model):
            self._rows_per_wave.attempt(decode_missing, most_rows)
        return [
            [
                endings.finish(sample.token_ids, sample.logp if sampling.logprobs else None)
                for sample in samples[index]
            ]
            * _num_repeats(sampling)
            for index in range(len(requests))
        ]

    def close(self) -> None:
        """Drop the model."""
        self._model = None


def wave_class(model: PreTrainedModel) -> type[CausalWave] | type[EncoderDecoderWave]:
    """Return the class that decodes a wave of the model's architecture."""
    return EncoderDecoderWave if model.config.is_encoder_decoder else CausalWave


def plan_waves(
    requests: Sequence[Request],
    chosen: Sequence[int],
    sampling: Sampling,
    model: PreTrainedModel,
    rows_per_wave: int,
) -> Iterator[list[int]]:
    """Yield the `chosen` indices into `requests` in waves of similar length, shortest first.

    A wave has at most `rows_per_wave` samples and at most the bytes of `wave_limits` of keys and
    values, but at least one prompt.
    """
    _, most_bytes = wave_limits(model, sampling)
    by_length = sorted(chosen, key=lambda i: (len(requests[i].token_ids), i))
    wave: list[int] = []
    for index in by_length:
        # A wave is as wide as its longest prompt, which is the last one.
        length = len(requests[index].token_ids)
        num_elements = wave_class(model).num_elements(model.config, length, sampling)
        num_prompts = len(wave) + 1
        is_too_large = num_prompts * num_elements * model.dtype.itemsize > most_bytes
        if wave and (is_too_large or num_prompts * num_drawn(sampling) > rows_per_wave):
            yield wave
            wave = []
        wave.append(index)
    yield wave


def wave_limits(model: PreTrainedModel, sampling: Sampling) -> tuple[int, int]:
    """Return the most samples of a wave, and the most bytes of their keys and values.

    On a GPU, keys and values get a quarter of the total memory and logits an eighth. The free
    memory is not asked for: waves, and so rounding, would depend on other programs.
    """
    if model.device.type == "cpu":
        return ROWS_PER_WAVE, BYTES_PER_WAVE
    memory = torch.cuda.get_device_properties(model.device).total_memory
    of_logit = model.dtype.itemsize + draws.bytes_of_logit(sampling)
    rows = memory // 8 // (model.config.get_text_config().vocab_size * of_logit)
    return max(1, min(ROWS_PER_WAVE_ON_GPU, rows)), memory // 4


class _Sample(NamedTuple):
    token_ids: list[int]
    logp: float


def _decode_wave(
    model: PreTrainedModel,
    prompts: Sequence[Request],
    sampling: Sampling,
    endings: Endings,
    seed: int,
    report: Progress,
) -> list[list[_Sample]]:
    """Return the samples of each prompt, computed as one wave."""
    device = model.device
    num_samples = num_drawn(sampling)
    num_rows = len(prompts) * num_samples
    prompt_ids = [prompt.prompt_id for prompt in prompts]
    uniforms = _uniforms(prompts, sampling, seed, device)
    stops = torch.tensor(sorted(endings.token_ids), dtype=torch.int64, device=device)
    tokens = torch.zeros((num_rows, sampling.max_new_tokens), dtype=torch.int64, device=device)
    num_tokens = torch.zeros(num_rows, dtype=torch.int64, device=device)
    logps = torch.zeros(num_rows, dtype=torch.float64, device=device)

    # Rows are in order of (prompt, sample).
    live = torch.arange(num_rows, device=device)
    wave: Wave = wave_class(model)(model, [prompt.token_ids for prompt in prompts], sampling)
    logits = wave.first_logits()
    for step in range(sampling.max_new_tokens):
        # In the first step all samples of a prompt draw from one row of logits.
        width = len(live) // len(logits)
        draws.check_finite(logits, live[::width] // num_samples, prompt_ids)
        new = _choose(logits, sampling, uniforms, live, step, width)
        if sampling.logprobs:
            logps[live] += draws.token_logps(logits, new).flatten().double()
        new = new.flatten()
        tokens[live, step] = new
        num_tokens[live] = step + 1
        is_last = step + 1 == sampling.max_new_tokens
        goes_on = torch.zeros_like(new, dtype=torch.bool) if is_last else ~torch.isin(new, stops)
        if endings.texts:
            written = tokens[live, : step + 1].tolist()
            has_stop = [endings.has_stop_text(token_ids) for token_ids in written]
            goes_on &= ~torch.tensor(has_stop, device=device)
        num_live = int(goes_on.sum())
        if num_live < len(live):
            report((len(live) - num_live) * _num_repeats(sampling))
        if num_live == 0:
            break
        live = live[goes_on]
        logits = wave.next_logits(new[goes_on], live, step)

    samples = [
        _Sample(ids[:length], logp)
        for ids, length, logp in zip(
            tokens.tolist(), num_tokens.tolist(), logps.tolist(), strict=True
        )
    ]
    return [samples[i : i + num_samples] for i in range(0, num_rows, num_samples)]


def _choose(
    logits: Tensor, sampling: Sampling, uniforms: Tensor, live: Tensor, step: int, width: int
) -> Tensor:
    """Return token ids [row of logits, width] for the live samples."""
    if sampling.temperature == 0:
        return logits.argmax(-1, keepdim=True).expand(-1, width)
    return draws.draw(draws.filtered(logits, sampling), uniforms[live, step].view(-1, width))


def _uniforms(
    prompts: Sequence[Request], sampling: Sampling, seed: int, device: torch.device
) -> Tensor:
    """Return float64 [row, step]; empty for greedy decoding."""
    if sampling.temperature == 0:
        return torch.empty(0)
    of_prompts = [
        draws.keyed_uniforms(seed, p.prompt_id, sampling.num_samples, sampling.max_new_tokens)
        for p in prompts
    ]
    return torch.from_numpy(np.concatenate(of_prompts)).to(device)


def _num_repeats(sampling: Sampling) -> int:
    return sampling.num_samples // num_drawn(sampling)


@contextmanager
def _attention_of_waves(model: PreTrainedModel) -> Iterator[None]:
    """Set the attention that the waves need; restore the model's own at the end."""
    kind = wave_class(model)
    part = kind.attending(model)
    before = part.config._attn_implementation
    part.set_attn_implementation(kind.attention)
    try:
        yield
    finally:
        part.set_attn_implementation(before)
