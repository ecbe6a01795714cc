"""One wave of an encoder-decoder model (T5): a prompt is encoded once for all its samples.

The keys and values of a prompt's encoder states are stored once. In cross-attention all samples of
the prompt read them in place. The keys of a sample's own tokens are one row of the cache.
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

SHARED_ENCODER = "rso_shared_encoder"
"""The name of `shared_encoder_attention` in transformers' registry of attention functions."""


class Readers(NamedTuple):
    """The rows of a step grouped by prompt, and the columns of each prompt."""

    slots: Slots
    columns: Columns


def shared_encoder_attention(
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
    """Return the attention of each row to its own keys, or in cross-attention to its prompt's keys.

    The signature is that of transformers' attention functions. Takes queries [row, head, 1, size]
    and returns [row, 1, head, size].
    """
    if module.is_causal:
        seen = scaled_dot_product_attention(
            query, key, value, attn_mask=position_bias.to(query.dtype), scale=scaling
        )
    else:
        seen, _ = across(query, key, value, readers.columns, readers.slots, scaling)
    return seen.transpose(1, 2), None


AttentionInterface.register(SHARED_ENCODER, shared_encoder_attention)


class EncoderDecoderWave:
    """Encoder states of some prompts, and the samples that are decoded from them.

    The number of a sample is `prompt * num_drawn(sampling) + sample`.
    """

    attention = SHARED_ENCODER

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[list[int]], sampling: Sampling
    ) -> None:
        # `Any`: transformers does not annotate this way of calling T5, which is that of `generate`.
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
        """Return the part of the model whose attention is set to `attention`: the decoder."""
        decoder: PreTrainedModel = model.get_decoder()
        return decoder

    @staticmethod
    def check(model: PreTrainedModel) -> None:
        """Do nothing: `rso.models` loads no encoder-decoder model outside the T5 family."""

    @staticmethod
    def context_length(config: PreTrainedConfig) -> int | None:
        """Return None, no limit: positions are relative."""
        return None

    @staticmethod
    def num_elements(config: Any, prompt_length: int, sampling: Sampling) -> int:
        """Return the number of elements of the keys and values of one prompt and its samples."""
        columns = prompt_length + num_drawn(sampling) * sampling.max_new_tokens
        return int(2 * config.num_decoder_layers * config.num_heads * config.d_kv * columns)

    def first_logits(self) -> Tensor:
        """Encode the prompts; return logits [prompt, vocabulary] after the start token."""
        mask = torch.arange(self._ids.shape[1], device=self._ids.device) < self._lengths[:, None]
        encoded = self._model.get_encoder()(input_ids=self._ids, attention_mask=mask)
        self._encoded = BaseModelOutput(last_hidden_state=encoded.last_hidden_state)
        self._columns = Columns(self._lengths, self._model.dtype)
        start = torch.full_like(self._lengths, self._model.config.decoder_start_token_id)
        logits = self._logits(start, torch.arange(len(start), device=start.device))
        self._cache.self_attention_cache.batch_repeat_interleave(self._num_samples)
        return logits

    def next_logits(self, tokens: Tensor, live: Tensor, step: int) -> Tensor:
        """Return logits [row, vocabulary] after `tokens` [row], token `step` of the samples `live`.

        `live` is ascending. A sample that is missing from it never comes back.
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
