"""Sampling responses from a policy: the `Decoder` protocol, its records, the choice of an engine.

Importing this module imports neither torch nor vllm. `load_decoder` imports the engine.
"""

import importlib.util
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from rso.errors import UserError

ENGINES = ("vllm", "vllm-server", "transformers")

Progress = Callable[[int], None]
"""A function that takes the number of newly finished responses, such as `bar.advance`.

The number is negative when work that was reported has to be done again.
"""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: the temperature, then `top_k`, then `top_p` among the tokens left."""

    temperature: float = 0.7
    """0 is greedy decoding: all samples of a prompt are the same response."""
    top_k: int = 40
    """The number of most likely tokens to draw from; 0 is no limit."""
    top_p: float = 1.0
    """The probability mass to draw from, most likely tokens first; 1 is no limit."""
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()
    """Texts that end a response, like an end-of-sequence token."""
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
    """The servers of the `vllm-server` engine, and how the engine uses them."""

    endpoints: tuple[str, ...] = ()
    """Base URLs, e.g. http://127.0.0.1:8000/v1."""
    concurrency: int = 16
    """The most requests in flight per endpoint; all samples of a prompt are one request."""
    patience: float = 300.0
    """Decoding fails once all endpoints have been away for this many seconds."""
    timeout: float = 3600.0
    """Seconds that one answer may take."""
    journal: str | None = None
    """Folder of finished answers, which a repeated call reads; use one folder per model."""


class Request(NamedTuple):
    """One prompt to decode, tokenised with its template."""

    prompt_id: str
    token_ids: list[int]


class RefusedRequest(NamedTuple):
    """A request that cannot be decoded, and the reason in one sentence."""

    request: Request
    reason: str


class Decoded(NamedTuple):
    """One response; `cumulative_logp` is in nats under the untempered, unfiltered model."""

    token_ids: list[int]
    """All generated tokens, including an end-of-sequence token or the tokens of a stop text."""
    text: str
    """The text of `token_ids` without special tokens, cut before the stop text."""
    finish_reason: str
    """`stop` (an end-of-sequence token or a stop text) or `length` (max_new_tokens)."""
    cumulative_logp: float | None
    """Sum over all `token_ids`; None unless `Sampling.logprobs`."""


@dataclass(frozen=True)
class Endings:
    """What ends the responses of one call: end-of-sequence tokens and stop texts."""

    tokenizer: Any
    token_ids: Collection[int]
    texts: tuple[str, ...] = ()

    def has_stop_text(self, token_ids: Sequence[int]) -> bool:
        """Return whether the response so far holds a stop text."""
        text = self.text(token_ids)
        return any(stop in text for stop in self.texts)

    def text(self, token_ids: Sequence[int]) -> str:
        """Return the response's text without special tokens, stop text included."""
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def finish(self, token_ids: list[int], cumulative_logp: float | None) -> Decoded:
        """Return the finished response of these tokens, of which there is at least one."""
        text = self.text(token_ids)
        end = min((text.find(stop) for stop in self.texts if stop in text), default=None)
        is_stopped = end is not None or token_ids[-1] in self.token_ids
        reason = "stop" if is_stopped else "length"
        return Decoded(token_ids, text[:end], reason, cumulative_logp)


class Decoder(Protocol):
    """An engine that holds one policy; the docstring of each says which results it repeats."""

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
        """Return `num_samples` responses for each request, in the order of the requests.

        Raises:
            UserError: a request does not fit (see `check_room`), or the engine cannot decode it.
        """
        ...

    def close(self) -> None:
        """Free the model's memory; the decoder cannot be used afterwards."""
        ...


def check_room(
    requests: Sequence[Request], context_length: int, max_new_tokens: int
) -> tuple[list[Request], list[RefusedRequest]]:
    """Return the requests that fit, and the others with their reasons.

    A prompt fits if it has at least one token and leaves room for `max_new_tokens` in
    `context_length`.
    """
    kept: list[Request] = []
    refused: list[RefusedRequest] = []
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
        refused.append(RefusedRequest(request, reason))
    return kept, refused


def require_room(requests: Sequence[Request], context_length: int, max_new_tokens: int) -> None:
    """Raise `UserError` with the first reason if any request does not fit (see `check_room`)."""
    _, refused = check_room(requests, context_length, max_new_tokens)
    if refused:
        raise UserError(f"{len(refused)} of {len(requests)} prompts refused: {refused[0].reason}.")


def num_drawn(sampling: Sampling) -> int:
    """Return the number of samples to compute per prompt: 1 if greedy, as all are the same."""
    return 1 if sampling.temperature == 0 else sampling.num_samples


def not_finite(what: str, prompt_id: str) -> UserError:
    """Return the error for NaN or infinite values from a model in this process."""
    return UserError(
        f"the model gave {what} that are not finite for prompt {prompt_id}; check the model's "
        "weights, or decode with compute.dtype=float32."
    )


def resolve_engine(engine: str) -> str:
    """Return the name of the engine; `auto` is vllm if it is installed, else transformers.

    No engine is imported, so that planning is fast.

    Raises:
        UserError: there is no such engine.
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
    None is the model's whole context. The transformers engine ignores it. The vllm-server engine
    uses `dtype` and `max_model_len` only in the command that its errors suggest. `device` is for
    the transformers engine: vLLM's build determines its device. `servers` is for the vllm-server
    engine.

    Raises:
        UserError: the engine cannot start; the message says the cause and what to do instead.
    """
    if resolve_engine(engine) == "vllm-server":
        from rso.decoding.server_engine import ServerDecoder

        return ServerDecoder(directory, servers or Servers(), dtype, max_model_len)
    if resolve_engine(engine) == "vllm":
        from rso.decoding.vllm_engine import VllmDecoder

        return VllmDecoder(directory, dtype=dtype, max_model_len=max_model_len)
    from rso.decoding.transformers_engine import load_transformers

    loaded: Decoder = load_transformers(directory, dtype=dtype, device=device)
    return loaded
