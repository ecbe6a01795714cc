"""One wave of a decoder-only model: its prompts' keys are computed once, the samples read them.

What all prompts of the wave begin with (a chat template's system message) is computed once, the
rest of each prompt once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from rso.decoding import Sampling, num_drawn
from rso.decoding.shared_prompt import ATTENTION, PROMPT, Groups, Prefill, Step
from rso.errors import UserError

# A sample's query is compared with the columns of its whole group, so groups stay small enough
# for that to be little beside the prompt and the matrix products.
COLUMNS_PER_GROUP = 1024
TOKENS_PER_PREFILL = 4096
# Below this share of live groups the keys of the finished ones are dropped, which is a copy.
LIVE_SHARE = 0.75


class CausalWave:
    """Keys and values of some prompts, sorted by length, and of the samples that go on from them.

    A sample's number is `prompt * num_drawn(sampling) + sample`.
    """

    attention = ATTENTION

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[list[int]], sampling: Sampling
    ) -> None:
        self._model, self._prompts = model, prompts
        self._num_samples, self._num_groups = num_drawn(sampling), _num_groups(sampling)
        self._lengths = torch.tensor([len(ids) for ids in prompts], device=model.device)
        num_columns = _num_columns(int(self._lengths.max()), sampling)
        of_groups = (self._lengths - 1).repeat_interleave(self._num_groups)
        self._groups = Groups(of_groups, num_columns, model.dtype)
        # numbers of the groups that are kept: consecutive samples of one prompt
        self._kept = torch.arange(len(of_groups), device=model.device)

    @staticmethod
    def attending(model: PreTrainedModel) -> PreTrainedModel:
        """The part of the model that attends by `attention`."""
        return model

    @staticmethod
    def context_length(config: PreTrainedConfig) -> int | None:
        """The most tokens of prompt and response: the model's context, or its attention window."""
        config = config.get_text_config()
        limits = (getattr(config, "max_position_embeddings", None), _window(config))
        return min((limit for limit in limits if limit is not None), default=None)

    @staticmethod
    def num_elements(config: PreTrainedConfig, prompt_length: int, sampling: Sampling) -> int:
        """Elements of the keys and values of a prompt of `prompt_length` tokens and its samples."""
        config = config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = 2 * config.num_hidden_layers * heads * size
        return int(_num_groups(sampling) * _num_columns(prompt_length, sampling) * width)

    @staticmethod
    def check(model: PreTrainedModel) -> None:
        """Raise `UserError` for an architecture whose attention is not computed here."""
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
        """Compute the prompts; fp32 logits [prompt, vocabulary] after each.

        The last token of each prompt is a step like those of the samples: it alone needs logits.
        """
        rests = [ids[:-1] for ids in self._prompts]
        num_shared = _num_shared(rests)
        copies = self._num_groups
        if num_shared:
            attend = Prefill(self._groups, 0, 1, self._groups.num_groups, 0, num_shared)
            self._fill([rests[0][:num_shared]], num_shared, attend)
        start = 0
        while start < len(rests):
            end = _end_of_chunk(rests, start, num_shared)
            width = len(rests[end - 1])
            if width > num_shared:
                attend = Prefill(
                    self._groups, start * copies, end - start, copies, num_shared, width
                )
                self._fill([ids[num_shared:] for ids in rests[start:end]], width, attend)
            start = end
        last = torch.tensor([ids[-1] for ids in self._prompts], device=self._model.device)
        step = Step(self._groups, self._kept, torch.full_like(self._kept, PROMPT))
        positions = (self._lengths - 1).repeat_interleave(copies)
        return self._logits(last.repeat_interleave(copies), positions, step)[::copies]

    def next_logits(self, tokens: Tensor, live: Tensor, step: int) -> Tensor:
        """fp32 logits [row, vocabulary] after `tokens` [row], the `step`-th of the samples `live`.

        `live` is ascending, and what is missing in it never comes back.
        """
        prompt, sample = live // self._num_samples, live % self._num_samples
        number = prompt * self._num_groups + sample * self._num_groups // self._num_samples
        live_groups = torch.unique(number)
        if len(live_groups) < LIVE_SHARE * len(self._kept):
            self._groups.keep(torch.searchsorted(self._kept, live_groups))
            self._kept = live_groups
        group_of = torch.searchsorted(self._kept, number)
        positions = self._lengths[prompt] + step
        return self._logits(tokens, positions, Step(self._groups, group_of, sample))

    def _fill(self, rows: list[list[int]], end: int, attend: Prefill) -> None:
        """Run the tokens before position `end` of each row; their keys go to the groups."""
        width = max(map(len, rows))
        token_ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in rows])
        positions = torch.arange(end - width, end).expand(len(rows), -1)
        self._model.base_model(
            input_ids=token_ids.to(self._model.device),
            position_ids=positions.to(self._model.device),
            use_cache=False,
            shared_prompt=attend,
        )

    def _logits(self, tokens: Tensor, positions: Tensor, attend: Step) -> Tensor:
        """fp32 logits [row, vocabulary] after one more token a row, whose keys go to the groups."""
        output = self._model(
            input_ids=tokens[:, None],
            position_ids=positions[:, None],
            use_cache=False,
            shared_prompt=attend,
        )
        logits: Tensor = output.logits[:, -1]
        return logits.float()


def _end_of_chunk(prompts: Sequence[Sequence[int]], start: int, num_shared: int) -> int:
    """Where a chunk of prompts that starts at `start` ends: prompts are sorted by length."""
    end = start + 1
    while end < len(prompts):
        if (end + 1 - start) * (len(prompts[end]) - num_shared) > TOKENS_PER_PREFILL:
            break
        end += 1
    return end


def _num_shared(prompts: Sequence[list[int]]) -> int:
    """How many first tokens all prompts have in common."""
    if len(prompts) == 1:
        return 0
    low, high = min(prompts), max(prompts)
    pairs = zip(low, high, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(low), len(high)))


def _num_groups(sampling: Sampling) -> int:
    """Groups that hold the samples of one prompt."""
    return -(-num_drawn(sampling) // max(1, COLUMNS_PER_GROUP // sampling.max_new_tokens))


def _num_columns(prompt_length: int, sampling: Sampling) -> int:
    slots = -(-num_drawn(sampling) // _num_groups(sampling))
    return prompt_length + slots * (sampling.max_new_tokens - 1)


def _window(config: PreTrainedConfig) -> int | None:
    """The sliding window, inside which windowed and full attention are the same."""
    has_window = getattr(config, "use_sliding_window", True)
    window = getattr(config, "sliding_window", None)
    return int(window) if has_window and window else None
