"""One wave of an encoder-decoder model (T5): a prompt is encoded once for all its samples.

What the decoder's cross-attention reads of a prompt, keys and values of its encoder states, is
stored once and read in place by the prompt's samples. A sample's own keys are a row of the cache.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AttentionInterface,
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput

from rso.decoding import Sampling, num_drawn
from rso.decoding.shared_prompt import Columns, Slots, across

ATTENTION = "rso_shared_encoder"
"""The name of `attention` in transformers' registry of attention functions."""


class Readers(NamedTuple):
    """The rows of a step by the prompt they read, and the columns of each prompt."""

    slots: Slots
    columns: Columns


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    readers: Readers,
    position_bias: Tensor,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend from [row, head, 1, size] to the row's own keys, or across to those of its prompt.

    The signature is that of transformers' attention functions; returns [row, 1, head, size].
    """
    if module.is_causal:
        seen = scaled_dot_product_attention(
            query, key, value, attn_mask=position_bias.to(query.dtype), scale=scaling
        )
    else:
        seen, _ = across(query, key, value, readers.columns, readers.slots, scaling)
    return seen.transpose(1, 2), None


AttentionInterface.register(ATTENTION, attention)


class EncoderDecoderWave:
    """Encoder states of some prompts and the samples that are decoded against them.

    A sample's number is `prompt * num_drawn(sampling) + sample`.
    """

    attention = ATTENTION

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[list[int]], sampling: Sampling
    ) -> None:
        # Typed loosely: `generate`'s own way of calling T5 is not annotated.
        self._model: Any = model
        self._num_samples = num_drawn(sampling)
        width = max(map(len, prompts))
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in prompts])
        lengths = torch.tensor([len(ids) for ids in prompts])
        self._ids, self._lengths = ids.to(model.device), lengths.to(model.device)
        self._cache = EncoderDecoderCache(
            DynamicCache(config=model.config), DynamicCache(config=model.config)
        )
        self._rows = torch.arange(len(prompts) * self._num_samples, device=model.device)

    @staticmethod
    def attending(model: PreTrainedModel) -> PreTrainedModel:
        """The part of the model that attends by `attention`."""
        decoder: PreTrainedModel = model.get_decoder()
        return decoder

    @staticmethod
    def check(model: PreTrainedModel) -> None:
        """Nothing to check: `rso.models` loads no other encoder-decoder architecture than T5's."""

    @staticmethod
    def context_length(config: PreTrainedConfig) -> int | None:
        """None: positions are relative, so any length can be computed."""
        return None

    @staticmethod
    def num_elements(config: Any, prompt_length: int, sampling: Sampling) -> int:
        """Elements of the keys and values of a prompt of `prompt_length` tokens and its samples."""
        columns = prompt_length + num_drawn(sampling) * sampling.max_new_tokens
        return int(2 * config.num_decoder_layers * config.num_heads * config.d_kv * columns)

    def first_logits(self) -> Tensor:
        """Encode the prompts; logits [prompt, vocabulary] after the decoder's start token."""
        mask = torch.arange(self._ids.shape[1], device=self._ids.device) < self._lengths[:, None]
        encoded = self._model.get_encoder()(input_ids=self._ids, attention_mask=mask)
        self._encoded = BaseModelOutput(last_hidden_state=encoded.last_hidden_state)
        self._columns = Columns(self._lengths, self._model.dtype)
        start = torch.full_like(self._lengths, self._model.config.decoder_start_token_id)
        logits = self._logits(start, torch.arange(len(start), device=start.device))
        self._cache.self_attention_cache.batch_repeat_interleave(self._num_samples)
        return logits

    def next_logits(self, tokens: Tensor, live: Tensor, step: int) -> Tensor:
        """Logits [row, vocabulary] after `tokens` [row], the `step`-th of the samples `live`.

        `live` is ascending, and what is missing in it never comes back.
        """
        if len(live) < len(self._rows):
            place = torch.searchsorted(self._rows, live)
            self._cache.self_attention_cache.batch_select_indices(place)
            self._rows = live
        return self._logits(tokens, live // self._num_samples)

    def _logits(self, tokens: Tensor, prompt_of: Tensor) -> Tensor:
        output = self._model(
            decoder_input_ids=tokens[:, None],
            encoder_outputs=self._encoded,
            past_key_values=self._cache,
            use_cache=True,
            readers=Readers(Slots(prompt_of, len(self._lengths)), self._columns),
        )
        logits: Tensor = output.logits[:, -1]
        return logits
