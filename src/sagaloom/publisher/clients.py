"""The HTTP clients behind the publishers, and what their failures mean.

They are loaded with the first publish: whoever only imports this package does not pay for them. Connections are kept
and used again. An asynchronous client belongs to one event loop, so each loop that publishes gets its own.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import ssl
import sys
import threading
import time
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any, Final

from sagaloom.errors import SagasError
from sagaloom.outbound import LOOPBACK_PATTERNS
from sagaloom.publisher.conversation import Silence
from sagaloom.publisher.options import Fetcher, FetchRequest, FetchResponse

if TYPE_CHECKING:
    import httpx2

__all__ = ["AsyncCarrier", "SyncCarrier"]

_CONNECT_SECONDS: Final = 5.0
_CONNECTIONS_MAX: Final = 100
_RESPONSE_BYTES_MAX: Final = 16 << 20


class AsyncCarrier:
    """Makes requests without blocking; never longer than they may take."""

    def __init__(self, fetcher: Fetcher | None = None) -> None:
        self._fetcher = fetcher
        self._clients: dict[asyncio.AbstractEventLoop, httpx2.AsyncClient] = {}

    async def carry(self, request: FetchRequest) -> FetchResponse | Silence:
        try:
            async with asyncio.timeout(request.timeout_seconds):
                if self._fetcher is None:
                    return await self._fetch(request)
                answer: object = self._fetcher(request)
                return _checked(await answer if inspect.isawaitable(answer) else answer)
        except Exception as error:  # noqa: BLE001  # a publish answers whatever happens on the way
            return _silence(error, request)

    def open(self) -> httpx2.AsyncClient:
        """The client of the running loop."""
        loop = asyncio.get_running_loop()
        client = self._clients.get(loop)
        if client is None:
            import httpx2

            for ended in [one for one in self._clients if one.is_closed()]:
                del self._clients[ended]
            client = self._clients[loop] = httpx2.AsyncClient(**_client_options())
        return client

    async def close(self) -> None:
        client = self._clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose()

    async def _fetch(self, request: FetchRequest) -> FetchResponse:
        client = self.open()
        chunks: list[bytes] = []
        size = 0
        async with client.stream("POST", request.url, **_request_options(request)) as response:
            async for chunk in response.aiter_bytes():
                size += len(chunk)
                if size > _RESPONSE_BYTES_MAX:
                    break
                chunks.append(chunk)
        return _response(response, chunks, is_whole=size <= _RESPONSE_BYTES_MAX)


class SyncCarrier:
    """Makes requests and blocks meanwhile. May be shared by threads.

    A blocking client has a limit for each step (connecting, sending, each piece of the answer) and none for all of
    them, so the time is looked at between the pieces of the body. Only a server that sends its headers byte by byte
    could hold it up longer.
    """

    def __init__(self, fetcher: Fetcher | None = None) -> None:
        self._fetcher = fetcher
        self._client: httpx2.Client | None = None
        self._lock = threading.Lock()

    def carry(self, request: FetchRequest) -> FetchResponse | Silence:
        try:
            if self._fetcher is None:
                return self._fetch(request)
            answer: object = self._fetcher(request)
            if inspect.iscoroutine(answer):
                answer.close()
            return _checked(answer)
        except Exception as error:  # noqa: BLE001  # a publish answers whatever happens on the way
            return _silence(error, request)

    def open(self) -> httpx2.Client:
        with self._lock:
            if self._client is None:
                import httpx2

                self._client = httpx2.Client(**_client_options())
            return self._client

    def close(self) -> None:
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def _fetch(self, request: FetchRequest) -> FetchResponse:
        client = self.open()
        deadline = time.monotonic() + request.timeout_seconds
        chunks: list[bytes] = []
        size = 0
        with client.stream("POST", request.url, **_request_options(request)) as response:
            for chunk in response.iter_bytes():
                size += len(chunk)
                if size > _RESPONSE_BYTES_MAX:
                    break
                if time.monotonic() > deadline:
                    raise TimeoutError
                chunks.append(chunk)
        return _response(response, chunks, is_whole=size <= _RESPONSE_BYTES_MAX)


def _client_options() -> dict[str, Any]:
    import httpx2

    return {
        "follow_redirects": False,
        "limits": httpx2.Limits(max_connections=_CONNECTIONS_MAX, max_keepalive_connections=_CONNECTIONS_MAX // 2),
        "mounts": dict.fromkeys(LOOPBACK_PATTERNS),
        "verify": _certificates(),
    }


@functools.cache
def _certificates() -> ssl.SSLContext:
    """The authorities that are trusted. Loading them takes tens of milliseconds, so all publishers share them."""
    import httpx2

    return httpx2.create_ssl_context()


def _request_options(request: FetchRequest) -> dict[str, Any]:
    import httpx2

    seconds = request.timeout_seconds
    return {
        "content": request.content,
        "headers": dict(request.headers),
        "timeout": httpx2.Timeout(seconds, connect=min(_CONNECT_SECONDS, seconds)),
    }


def _response(response: httpx2.Response, chunks: list[bytes], *, is_whole: bool) -> FetchResponse:
    return FetchResponse(
        status=response.status_code, content=b"".join(chunks), headers=dict(response.headers), is_whole=is_whole
    )


def _checked(answer: object) -> FetchResponse:
    if isinstance(answer, FetchResponse):
        if not isinstance(answer.status, int) or not isinstance(answer.content, bytes):
            raise TypeError("the fetcher must return a FetchResponse with an int as status and bytes as content")
        return answer
    hint = "; a synchronous publisher needs a plain function" if isinstance(answer, Awaitable) else ""
    raise TypeError(f"the fetcher must return a FetchResponse, got {answer!r:.80}{hint}")


def _silence(error: Exception, request: FetchRequest) -> Silence:
    """What it means that a request ended with `error`."""
    if isinstance(error, SagasError):
        return Silence(error.message, error.retryable, cause=error)
    httpx2 = sys.modules.get("httpx2")
    if httpx2 is not None:
        if isinstance(error, (httpx2.InvalidURL, httpx2.UnsupportedProtocol, httpx2.LocalProtocolError)):
            return Silence(_cause(error), retryable=False, may_have_arrived=False, cause=error)
        if isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout, httpx2.ProxyError)):
            return Silence(f"it cannot be reached ({_cause(error)})", may_have_arrived=False, cause=error)
        if isinstance(error, httpx2.TimeoutException):
            return Silence(f"nothing came within {request.timeout_seconds:.3g} s", cause=error)
        if isinstance(error, httpx2.HTTPError):
            return Silence(f"the connection broke ({_cause(error)})", cause=error)
    if isinstance(error, TimeoutError):
        return Silence(f"nothing came within {request.timeout_seconds:.3g} s", cause=error)
    if isinstance(error, OSError):
        is_closed = isinstance(error, ConnectionRefusedError)
        return Silence(f"it cannot be reached ({_cause(error)})", may_have_arrived=not is_closed, cause=error)
    return Silence(f"the request raised {type(error).__name__}: {error}", retryable=False, cause=error)


def _cause(error: Exception) -> str:
    return str(error) or type(error).__name__
