"""A server of an OpenAI-compatible API: sending requests, and tracking whether it answers."""

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
# An answer may take long, and no byte comes before it. So the kernel checks that the server's
# machine is there: after 30 s without traffic it asks every 10 s, and gives up after three times.
KEEPALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *(
        (socket.IPPROTO_TCP, getattr(socket, name), value)
        for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3))
        if hasattr(socket, name)
    ),
]


class Unavailable(Exception):
    """An endpoint gave no answer, and may give one later.

    `wait` is the pause that it asked for, in seconds. `is_busy` means that it answered HTTP 429.
    """

    def __init__(self, reason: str, wait: float = 0.0, is_busy: bool = False) -> None:
        super().__init__(reason)
        self.wait, self.is_busy = wait, is_busy


@dataclass
class Endpoint:
    """The state of one server: whether it answers, and if not, since when."""

    url: str
    model: str = ""
    """The name under which it serves the model."""
    context_length: int | None = None
    in_flight: int = 0
    failures: int = 0
    """Failures in a row: those after the last answer."""
    away_since: float | None = None
    """Monotonic seconds of the first of these failures."""
    lost_by: "Unavailable | None" = None
    is_met: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once the first check of it succeeded or failed."""
    is_open: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while it gets requests."""
    is_lost: asyncio.Event = field(default_factory=asyncio.Event)

    def open(self) -> None:
        """Let requests go to it."""
        self.is_met.set()
        self.is_lost.clear()
        self.is_open.set()

    def lose(self, error: Unavailable) -> None:
        """Stop its requests; only the first of several simultaneous failures has an effect."""
        if self.is_open.is_set():
            self.lost_by = error
            self.is_open.clear()
            self.is_lost.set()

    def failed(self, error: Unavailable) -> None:
        """Count a failure; the third in a row logs a warning."""
        self.is_met.set()
        self.lost_by = error
        self.failures += 1
        self.away_since = self.away_since or time.monotonic()
        if self.failures == 3:
            logger.warning("%s stays away (%s); others, if any, take its share", self.url, error)

    def answered(self) -> None:
        """Forget the failures: it answered a request."""
        self.failures, self.away_since = 0, None

    @property
    def away_seconds(self) -> float:
        """Seconds after its first failure in a row; 0 while it gets or computes requests."""
        if self.away_since is None or self.in_flight or self.is_open.is_set():
            return 0.0
        return time.monotonic() - self.away_since

    def story(self) -> str:
        """Return a phrase for errors: its URL, since when it is away, and why."""
        begun = datetime.now(UTC) - timedelta(seconds=self.away_seconds)
        return f"{self.url} since {begun:%Y-%m-%d %H:%M:%S} UTC ({self.lost_by})"

    def pause(self, patience: float) -> float:
        """Return the seconds until the next attempt.

        They are random below a bound that doubles with each failure, and at least what the server
        asked for. An attempt that would come after the end of `patience` comes at its end.
        """
        assert self.lost_by is not None
        longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(self.failures - 1, 16))
        # This draw needs no key: the time of an attempt changes no answer.
        pause = max(random.uniform(0.0, longest), self.lost_by.wait)
        left = patience - self.away_seconds
        return min(pause, left) if left > 0 else pause


def connect(timeout: float) -> httpx2.AsyncClient:
    """Return a client for endpoints that waits `timeout` seconds for an answer."""
    key = os.environ.get(API_KEY)
    return httpx2.AsyncClient(
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=httpx2.Timeout(timeout, connect=CONNECT_SECONDS, pool=None),
        # A transport of our own ignores proxy settings: endpoints are reached directly.
        transport=httpx2.AsyncHTTPTransport(
            # vLLM closes idle connections after 5 s. Closing them earlier avoids a race.
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
        Unavailable: the connection broke, the status is 429 or 5xx, or the answer is not JSON; ask
            again later.
        UserError: any other status from 300, with the server's own words.
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
            # vLLM says this when an answer would hold NaN.
            hint = f" {NOT_FINITE}"
        raise UserError(f"{url} refused {what} with HTTP {status}: {said}.{hint}")
    try:
        return response.json()
    except ValueError as error:
        raise Unavailable(f"an answer that is no JSON: {short(response.text)}") from error


def _message(response: httpx2.Response) -> str:
    """Return the server's error message in OpenAI's form, or else the beginning of its answer."""
    try:
        return str(response.json()["error"]["message"]).rstrip(".")
    except (ValueError, KeyError, TypeError):
        return short(response.text)


def _retry_after(response: httpx2.Response) -> float:
    """Return the seconds that the header Retry-After states, as a number or as a date; else 0."""
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
    """Return the first 200 characters of an endpoint's answer, as text or JSON."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
