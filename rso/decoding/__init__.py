"""Sampling responses from a policy: the `Decoder` protocol, its records, the choice of an engine.

Importing this module imports neither torch nor vllm; an engine is imported by `load_decoder`.
"""

import importlib.util
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from rso.errors import UserError

ENGINES = ("vllm", "vllm-server", "transformers")

Progress = Callable[[int], None]
"""Called with the number of responses that have just been finished (`bar.advance` fits)."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: temperature first, then `top_k`, then `top_p` among what is left."""

    temperature: float = 0.7
    """0 is greedy decoding: every sample of a prompt is then the same response."""
    top_k: int = 40
    """The number of most likely tokens to draw from; 0 is no limit."""
    top_p: float = 1.0
    """The probability mass to draw from, most likely tokens first; 1 is no limit."""
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()
    """Texts that end a response, as an end-of-sequence token does."""
    num_samples: int = 1
    logprobs: bool = False
    """Whether `Decoded.cumulative_logp` is computed."""

    def __post_init__(self) -> None:
        bounds = {
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_k": (self.top_k >= 0, "at least 0 (0 is no limit)"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "stop": (all(self.stop), "texts that are not empty"),
            "num_samples": (self.num_samples >= 1, "at least 1"),
        }
        for name, (is_valid, expected) in bounds.items():
            if not is_valid:
                found = getattr(self, name)
                raise UserError(f"sampling.{name} must be {expected}, found {found}; change it.")


@dataclass(frozen=True)
class Servers:
    """Where the `vllm-server` engine finds its model, and how it deals with what answers there."""

    endpoints: tuple[str, ...] = ()
    """Base URLs, e.g. http://127.0.0.1:8000/v1."""
    concurrency: int = 16
    """Requests in flight at an endpoint; the samples of a prompt are one request."""
    patience: float = 300.0
    """Seconds after which an endpoint that stays away is given up."""
    timeout: float = 3600.0
    """Seconds that one answer may take."""
    journal: str | None = None
    """Folder that keeps finished answers for a call that is repeated; it belongs to one model."""


class Request(NamedTuple):
    """One prompt to decode, already tokenised with its template."""

    prompt_id: str
    token_ids: list[int]


class Refusal(NamedTuple):
    """A request that cannot be decoded, and the sentence that says why."""

    request: Request
    reason: str


class Decoded(NamedTuple):
    """One response; `cumulative_logp` is in nats under the untempered, unfiltered model."""

    token_ids: list[int]
    """What was generated, with the end-of-sequence token, or those of the stop text, where one was
    generated."""
    text: str
    """The same without special tokens, and up to the stop text."""
    finish_reason: str
    """`stop` (an end-of-sequence token or a stop text) or `length` (max_new_tokens)."""
    cumulative_logp: float | None
    """Sum over `token_ids`, all of them; None unless `Sampling.logprobs`."""


@dataclass(frozen=True)
class Endings:
    """How the responses of one call end: by an end-of-sequence token, or by a stop text."""

    tokenizer: Any
    token_ids: Collection[int]
    texts: tuple[str, ...] = ()

    def has_stop_text(self, token_ids: Sequence[int]) -> bool:
        """Return whether a stop text stands in the response so far."""
        text = self.text(token_ids)
        return any(stop in text for stop in self.texts)

    def text(self, token_ids: Sequence[int]) -> str:
        """Return the response's text without special tokens, stop text included."""
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def finish(self, token_ids: list[int], cumulative_logp: float | None) -> Decoded:
        """Return the response that these tokens, generated to their end, are."""
        text = self.text(token_ids)
        end = min((text.find(stop) for stop in self.texts if stop in text), default=None)
        is_stopped = end is not None or token_ids[-1] in self.token_ids
        reason = "stop" if is_stopped else "length"
        return Decoded(token_ids, text[:end], reason, cumulative_logp)


class Decoder(Protocol):
    """An engine that holds one policy; every engine says in its docstring what it can repeat."""

    @property
    def context_length(self) -> int:
        """The most tokens that prompt and response may have together."""
        ...

    def decode(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        seed: int,
        progress: Progress | None = None,
    ) -> list[list[Decoded]]:
        """Return `num_samples` responses for each request, in the order of the requests."""
        ...

    def close(self) -> None:
        """Free the model's memory; the decoder cannot be used afterwards."""
        ...


def check_room(
    requests: Sequence[Request], context_length: int, max_new_tokens: int
) -> tuple[list[Request], list[Refusal]]:
    """Return the requests that fit, and the others with the reason.

    A prompt fits if it has a token and leaves room for `max_new_tokens` in `context_length`.
    """
    kept: list[Request] = []
    refused: list[Refusal] = []
    room = context_length - max_new_tokens
    for request in requests:
        length = len(request.token_ids)
        if 0 < length <= room:
            kept.append(request)
            continue
        reason = (
            f"prompt {request.prompt_id} has {length} tokens, expected 1 to {room}: the context "
            f"holds {context_length} and max_new_tokens takes {max_new_tokens}; shorten the prompt "
            "or lower max_new_tokens"
        )
        refused.append(Refusal(request, reason))
    return kept, refused


def require_room(requests: Sequence[Request], context_length: int, max_new_tokens: int) -> None:
    """Raise `UserError` with the first reason if a request does not fit (see `check_room`)."""
    _, refused = check_room(requests, context_length, max_new_tokens)
    if refused:
        raise UserError(f"{len(refused)} of {len(requests)} prompts refused: {refused[0].reason}.")


def num_drawn(sampling: Sampling) -> int:
    """Return how many samples of a prompt are computed: greedy ones are all the same."""
    return 1 if sampling.temperature == 0 else sampling.num_samples


def not_finite(what: str, prompt_id: str) -> UserError:
    """Return the error of an engine in this process whose model gave NaN or infinite values."""
    return UserError(
        f"the model gave {what} that are not finite for prompt {prompt_id}; check the model's "
        "weights, or decode with compute.dtype=float32."
    )


def resolve_engine(engine: str) -> str:
    """Return the engine that `engine` means here; `auto` is vllm if installed, else transformers.

    Nothing is imported, so a plan can be made without loading an engine.
    """
    if engine == "auto":
        return "vllm" if importlib.util.find_spec("vllm") else "transformers"
    if engine not in ENGINES:
        known = ", ".join(("auto", *ENGINES))
        raise UserError(f"decoding engine must be one of {known}, found {engine!r}; change it.")
    return engine


def load_decoder(
    engine: str,
    directory: str,
    *,
    dtype: str = "bfloat16",
    device: str = "auto",
    max_model_len: int | None = None,
    servers: Servers | None = None,
) -> Decoder:
    """Return the decoder of a model directory in Hugging Face format.

    `max_model_len` (longest prompt + max_new_tokens) bounds what vLLM reserves for one sequence;
    None takes the model's whole context. `device` is for the transformers engine; vLLM's build
    decides its own. `servers` is for the vllm-server engine. An engine that cannot start raises
    `UserError` with the cause and what to do instead.
    """
    if resolve_engine(engine) == "vllm-server":
        from rso.decoding.server_engine import ServerDecoder

        return ServerDecoder(directory, servers or Servers(), dtype, max_model_len)
    if resolve_engine(engine) == "vllm":
        from rso.decoding.vllm_engine import VllmDecoder

        return VllmDecoder(directory, dtype=dtype, max_model_len=max_model_len)
    from rso.decoding.transformers_engine import load

    loaded: Decoder = load(directory, dtype=dtype, device=device)
    return loaded
