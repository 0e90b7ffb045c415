"""How much one client may ask for: requests a second, and streams at once.

A client is an address. Behind a proxy everybody has the proxy's, unless the server is told to trust its headers, so
the rate is unlimited by default and the operator's to choose. What is remembered of clients is bounded: those that have
been quiet long enough to start afresh are forgotten.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from typing import Final

from starlette.types import Scope

from sagaloom.errors import ConfigurationError, MessageRejected

__all__ = ["RateLimit", "StreamLimit"]

_CLIENTS_MAX: Final = 10_000
_BURST_SECONDS: Final = 2.0


class RateLimit:
    """A bucket of tokens for each client: every request takes one, and `per_second` of them come back each second, up
    to two seconds' worth.

    `open_paths` are never limited: whoever asks whether the service is well should not be told to come back later.
    """

    def __init__(
        self,
        per_second: float,
        *,
        open_paths: Iterable[str] = (),
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 0 < per_second < math.inf:
            raise ConfigurationError(
                f"rate limit {per_second!r} is none: give the requests a second that one client may send, or leave it "
                "out for no limit"
            )
        self._per_second = per_second
        self._burst = max(1.0, per_second * _BURST_SECONDS)
        self._open_paths = frozenset(open_paths)
        self._now = now
        # For each client: the moment at which its bucket is full again. One number says both level and time.
        self._full_at: dict[str, float] = {}

    def refusal(self, scope: Scope, path: str) -> MessageRejected | None:
        """Why this request has to wait, or None."""
        if path in self._open_paths:
            return None
        client, now = _client_of(scope), self._now()
        full_at = max(self._full_at.get(client, now), now) + 1 / self._per_second
        over = full_at - now - self._burst / self._per_second
        if over > 1e-9:
            seconds = max(1, math.ceil(over))
            return MessageRejected(
                f"more than {self._per_second:g} requests a second came from {client}: try again in {seconds} s",
                code="RATE_LIMITED",
                retryable=True,
                data={"retryAfterSeconds": seconds},
            )
        if len(self._full_at) >= _CLIENTS_MAX and client not in self._full_at:
            self._forget(now)
        self._full_at[client] = full_at
        return None

    def _forget(self, now: float) -> None:
        """Makes room: those whose buckets are full, else the half that would be full first."""
        busy = sorted((full_at, client) for client, full_at in self._full_at.items() if full_at > now)
        self._full_at = {client: full_at for full_at, client in busy[-_CLIENTS_MAX // 2 :]}


class StreamLimit:
    """Counts streams while they are open: at most `streams_max` in all, and `per_client_max` of one client."""

    def __init__(self, streams_max: int = 1_000, *, per_client_max: int = 100) -> None:
        self._streams_max = streams_max
        self._per_client_max = per_client_max
        self._open: Counter[str] = Counter()

    @property
    def open(self) -> int:
        """How many are open now."""
        return self._open.total()

    @contextlib.contextmanager
    def opened(self, scope: Scope) -> Generator[None]:
        """Counts one stream while inside; raises `MessageRejected` (`RATE_LIMITED`) when there are enough."""
        client = _client_of(scope)
        if self.open >= self._streams_max:
            raise _too_many(f"{self._streams_max} streams are open already")
        if self._open[client] >= self._per_client_max:
            raise _too_many(f"{client} has {self._per_client_max} streams open already")
        self._open[client] += 1
        try:
            yield
        finally:
            self._open[client] -= 1
            if not self._open[client]:
                del self._open[client]


def _too_many(what: str) -> MessageRejected:
    return MessageRejected(f"{what}: close some, or try again later", code="RATE_LIMITED", retryable=True)


def _client_of(scope: Scope) -> str:
    client = scope.get("client")
    return str(client[0]) if client else "a local client"
