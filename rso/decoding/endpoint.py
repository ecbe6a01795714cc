"""A server of an OpenAI-compatible API: sending to it, and whether it is there."""

import asyncio
import json
import logging
import os
import random
import socket
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from rso.errors import UserError

logger = logging.getLogger(__name__)

API_KEY = "RSO_SERVER_API_KEY"
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
CONNECT_SECONDS = 10.0
NOT_FINITE = (
    "The model gave log-probabilities that are not finite: check its weights, or serve it with "
    "--dtype float32."
)
# An answer may take long without a byte on the way; that its server's machine is gone is noticed
# by the kernel: after 30 s without traffic it asks every 10 s, and gives up after three times.
KEEPALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *(
        (socket.IPPROTO_TCP, getattr(socket, name), value)
        for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3))
        if hasattr(socket, name)
    ),
]


class Unavailable(Exception):
    """An endpoint gave no answer, and may give one later; `wait` is what it asked for, seconds."""

    def __init__(self, reason: str, wait: float = 0.0, is_busy: bool = False) -> None:
        super().__init__(reason)
        self.wait, self.is_busy = wait, is_busy


@dataclass
class Endpoint:
    """One server: whether it is there, and since when it is not."""

    url: str
    model: str = ""
    """The name by which it serves the model."""
    context_length: int | None = None
    in_flight: int = 0
    failures: int = 0
    """In a row, since the last answer."""
    away_since: float | None = None
    """Monotonic seconds of the first of these failures."""
    lost_by: "Unavailable | None" = None
    is_met: asyncio.Event = field(default_factory=asyncio.Event)
    """Whether it was asked at all."""
    is_open: asyncio.Event = field(default_factory=asyncio.Event)
    """Whether requests go to it now."""
    is_lost: asyncio.Event = field(default_factory=asyncio.Event)

    def open(self) -> None:
        """Send requests."""
        self.is_met.set()
        self.is_lost.clear()
        self.is_open.set()

    def lose(self, error: Unavailable) -> None:
        """Send no more requests; of several failures at once the first counts."""
        if self.is_open.is_set():
            self.lost_by = error
            self.is_open.clear()
            self.is_lost.set()

    def failed(self, error: Unavailable) -> None:
        """Count a failure; the third in a row is told, once."""
        self.is_met.set()
        self.lost_by = error
        self.failures += 1
        self.away_since = self.away_since or time.monotonic()
        if self.failures == 3:
            logger.warning("%s stays away (%s); others, if any, take its share", self.url, error)

    def answered(self) -> None:
        """Take note of an answer to a request."""
        self.failures, self.away_since = 0, None

    @property
    def away_seconds(self) -> float:
        """Seconds without an answer; 0 while it may be at work on one."""
        if self.away_since is None or self.in_flight or self.is_open.is_set():
            return 0.0
        return time.monotonic() - self.away_since

    def story(self) -> str:
        """Return since when it is away, and why."""
        begun = datetime.now(UTC) - timedelta(seconds=self.away_seconds)
        return f"{self.url} since {begun:%Y-%m-%d %H:%M:%S} UTC ({self.lost_by})"

    def pause(self, patience: float) -> float:
        """Return the seconds until the next attempt.

        Exponential with full jitter, or what the server asks for. The last attempt before patience
        ends falls on its end.
        """
        assert self.lost_by is not None
        longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(self.failures - 1, 16))
        # When to ask again changes no answer, so this is no keyed draw.
        pause = max(random.uniform(0.0, longest), self.lost_by.wait)
        left = patience - self.away_seconds
        return min(pause, left) if left > 0 else pause


def connect(timeout: float) -> httpx2.AsyncClient:
    """Return a client for endpoints; an answer may take `timeout` seconds."""
    key = os.environ.get(API_KEY)
    return httpx2.AsyncClient(
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=httpx2.Timeout(timeout, connect=CONNECT_SECONDS, pool=None),
        # A transport of our own: endpoints are reached directly, whatever proxies are set.
        transport=httpx2.AsyncHTTPTransport(
            # vLLM closes idle connections after 5 s; ours close before, without a race.
            limits=httpx2.Limits(keepalive_expiry=2.0),
            socket_options=KEEPALIVE,
        ),
        trust_env=False,
    )


async def send(
    client: httpx2.AsyncClient, method: str, url: str, what: str, body: Any = None
) -> Any:
    """Return the JSON that an endpoint answers.

    Raises:
        Unavailable: broken connection, 429, 5xx, or an answer that is no JSON: ask again later.
        UserError: any other refusal, with the server's own words.
    """
    try:
        response = await client.request(method, url, json=body)
    except httpx2.RequestError as error:
        raise Unavailable(f"{type(error).__name__}: {error}".rstrip(": ")) from error
    status = response.status_code
    if status == 429 or status >= 500:
        reason = f"HTTP {status}: {_message(response)}"
        raise Unavailable(reason, _retry_after(response), is_busy=status == 429)
    if status >= 300:
        said = _message(response)
        hint = f" Set ${API_KEY} to its key." if status in (401, 403) else ""
        if status == 400 and "not JSON compliant" in said:
            # vLLM's words where an answer would hold NaN
            hint = f" {NOT_FINITE}"
        raise UserError(f"{url} refused {what} with HTTP {status}: {said}.{hint}")
    try:
        return response.json()
    except ValueError as error:
        raise Unavailable(f"an answer that is no JSON: {short(response.text)}") from error


def _message(response: httpx2.Response) -> str:
    """Return what the server says of its refusal, in OpenAI's form or else the beginning of it."""
    try:
        return str(response.json()["error"]["message"]).rstrip(".")
    except (ValueError, KeyError, TypeError):
        return short(response.text)


def _retry_after(response: httpx2.Response) -> float:
    """Return the seconds that the header Retry-After asks for, given as such or as a date."""
    text = response.headers.get("retry-after", "0")
    try:
        return float(max(0, int(text)))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return 0.0


def short(value: Any) -> str:
    """Return what an endpoint answered, as JSON, or its beginning."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
