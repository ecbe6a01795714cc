"""One wave of a decoder-only model: each prompt is computed once, and its samples read its keys.

The beginning that all prompts of a wave share, such as the system message of a chat template, is
computed once per wave.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from rso.decoding import Sampling, num_drawn
from rso.decoding.shared_prompt import (
    SHARED_PROMPT,
    DecodeStep,
    LastToken,
    Prefill,
    Prompts,
    SampleKeys,
)
from rso.errors import UserError

TOKENS_PER_PREFILL = 4096


class CausalWave:
    """Keys and values of some prompts, sorted by length, and of the samples that continue them.

    The number of a sample is `prompt * num_drawn(sampling) + sample`.
    """

    attention = SHARED_PROMPT

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[list[int]], sampling: Sampling
    ) -> None:
        self._model, self._prompts = model, prompts
        self._num_samples = num_drawn(sampling)
        self._lengths = torch.tensor([len(ids) for ids in prompts], device=model.device)
        self._stored = Prompts(self._lengths, model.dtype)
        numbers = torch.arange(len(prompts) * self._num_samples, device=model.device)
        # The last token of a response is drawn, but never an input.
        self._samples = SampleKeys(numbers, sampling.max_new_tokens - 1)

    @staticmethod
    def attending(model: PreTrainedModel) -> PreTrainedModel:
        """Return the part of the model whose attention is set to `attention`."""
        return model

    @staticmethod
    def context_length(config: PreTrainedConfig) -> int | None:
        """Return the most tokens of prompt and response: the lesser of context and sliding window.

        None if the config states neither.
        """
        config = config.get_text_config()
        limits = (getattr(config, "max_position_embeddings", None), _window(config))
        return min((limit for limit in limits if limit is not None), default=None)

    @staticmethod
    def num_elements(config: PreTrainedConfig, prompt_length: int, sampling: Sampling) -> int:
        """Return the number of elements of the keys and values of one prompt and its samples."""
        config = config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        columns = prompt_length + num_drawn(sampling) * (sampling.max_new_tokens - 1)
        return int(2 * config.num_hidden_layers * heads * size * columns)

    @staticmethod
    def check(model: PreTrainedModel) -> None:
        """Raise `UserError` if this module cannot compute the attention of the model."""
        config = model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        unknown = sorted(kinds - {"full_attention", "sliding_attention"})
        if getattr(config, "attn_logit_softcapping", None):
            unknown.append("attention soft-capping")
        if not model._can_set_attn_implementation():
            unknown.append("an attention of its own")
        if unknown:
            raise UserError(
                "the transformers engine decodes plain causal attention; "
                f"{type(model).__name__} has {', '.join(unknown)}. Use the vllm engine "
                "(decode.engine=vllm)."
            )

    def first_logits(self) -> Tensor:
        """Compute the prompts; return logits [prompt, vocabulary] after each prompt.

        The last token of each prompt is computed apart, because only this token needs logits.
        """
        rests = [ids[:-1] for ids in self._prompts]
        num_shared = _num_shared(rests)
        if num_shared:
            attend = Prefill(self._stored, slice(None), 0, num_shared)
            self._fill([rests[0][:num_shared]], num_shared, attend)
        start = 0
        while start < len(rests):
            end = _end_of_chunk(rests, start, num_shared)
            width = len(rests[end - 1])
            if width > num_shared:
                attend = Prefill(self._stored, slice(start, end), num_shared, width)
                self._fill([ids[num_shared:] for ids in rests[start:end]], width, attend)
            start = end
        last = torch.tensor([ids[-1] for ids in self._prompts], device=self._model.device)
        return self._logits(last, self._lengths - 1, LastToken(self._stored))

    def next_logits(self, tokens: Tensor, live: Tensor, step: int) -> Tensor:
        """Return logits [row, vocabulary] after `tokens` [row], token `step` of the samples `live`.

        `live` is ascending. A sample that is missing from it never comes back.
        """
        prompt_of = live // self._num_samples
        attend = DecodeStep(self._stored, self._samples, live, prompt_of)
        return self._logits(tokens, self._lengths[prompt_of] + step, attend)

    def _fill(self, rows: list[list[int]], end: int, attend: Prefill) -> None:
        """Compute rows that are right-padded to end before position `end`, and store their keys."""
        width = max(map(len, rows))
        token_ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in rows])
        positions = torch.arange(end - width, end).expand(len(rows), -1)
        self._model.base_model(
            input_ids=token_ids.to(self._model.device),
            position_ids=positions.to(self._model.device),
            use_cache=False,
            shared_prompt=attend,
        )

    def _logits(self, tokens: Tensor, positions: Tensor, attend: LastToken | DecodeStep) -> Tensor:
        """Return logits [row, vocabulary] after one more token per row, and store its keys."""
        output = self._model(
            input_ids=tokens[:, None],
            position_ids=positions[:, None],
            use_cache=False,
            shared_prompt=attend,
        )
        logits: Tensor = output.logits[:, -1]
        return logits


def _end_of_chunk(prompts: Sequence[Sequence[int]], start: int, num_shared: int) -> int:
    """Return the end of the chunk that starts at `start`; prompts are sorted by length.

    A chunk has at most `TOKENS_PER_PREFILL` padded tokens after the shared ones, or one prompt.
    """
    end = start + 1
    while end < len(prompts):
        if (end + 1 - start) * (len(prompts[end]) - num_shared) > TOKENS_PER_PREFILL:
            break
        end += 1
    return end


def _num_shared(prompts: Sequence[list[int]]) -> int:
    """Return the number of first tokens that all prompts share; 0 for a single prompt."""
    if len(prompts) == 1:
        return 0
    low, high = min(prompts), max(prompts)
    pairs = zip(low, high, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(low), len(high)))


def _window(config: PreTrainedConfig) -> int | None:
    """Return the sliding window; within it windowed and full attention are equal."""
    has_window = getattr(config, "use_sliding_window", True)
    window = getattr(config, "sliding_window", None)
    return int(window) if has_window and window else None
