"""One POST over HTTP, and in `DeliveryFailed` why its receiver has not taken it over.

408, 409, 425, 429, 5xx (but 501 and 505) and network errors may be tried again, after `Retry-After` if it says so.
Every other status, redirects included, is final: the same request would be refused again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING

from sagaloom.clock import Clock, SystemClock
from sagaloom.errors import DeliveryFailed
from sagaloom.outbound import LOOPBACK_PATTERNS, is_retryable_status, retry_after_seconds, without_credentials

if TYPE_CHECKING:
    import httpx2

__all__ = ["Poster"]


class Poster:
    """Makes requests through one pool of connections. `timeout_seconds` bounds a whole call."""

    def __init__(
        self,
        *,
        timeout_seconds: float = 20.0,
        response_bytes_max: int = 1 << 20,
        connections_max: int = 100,
        clock: Clock | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self._timeout_seconds = timeout_seconds
        self._response_bytes_max = response_bytes_max
        self._connections_max = connections_max
        self._clock = clock or SystemClock()
        self._transport = transport
        self._client: httpx2.AsyncClient | None = None

    def open(self) -> httpx2.AsyncClient:
        """Loads the HTTP client now. Otherwise the first request does, and everybody waits for it meanwhile."""
        import httpx2

        self._client = httpx2.AsyncClient(
            follow_redirects=False,
            timeout=httpx2.Timeout(self._timeout_seconds, connect=min(5.0, self._timeout_seconds)),
            limits=httpx2.Limits(
                max_connections=self._connections_max, max_keepalive_connections=self._connections_max // 2
            ),
            transport=self._transport,
            mounts=dict.fromkeys(LOOPBACK_PATTERNS) if self._transport is None else None,
        )
        return self._client

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def post(
        self, address: str, content: bytes, headers: Mapping[str, str], *, receiver: str, variable: str
    ) -> bytes:
        """The body of a 2xx answer. `receiver` is who errors talk about, and `variable` where its address is set."""
        import httpx2

        client = self._client or self.open()
        who = f"{receiver} at {without_credentials(address)}"
        try:
            async with asyncio.timeout(self._timeout_seconds):
                async with client.stream("POST", address, content=content, headers=dict(headers)) as response:
                    body, is_whole = await self._read(response)
        except TimeoutError as error:
            raise DeliveryFailed(f"{who} did not answer within {self._timeout_seconds:g} s") from error
        except httpx2.TimeoutException as error:
            raise DeliveryFailed(f"{who} did not answer: {type(error).__name__}") from error
        except httpx2.InvalidURL as error:
            raise DeliveryFailed(f"{who}: that is no address: {error}", retryable=False) from error
        except (httpx2.HTTPError, OSError) as error:
            cause = str(error) or type(error).__name__
            raise DeliveryFailed(f"{who} could not be reached: {cause}") from error
        if not 200 <= response.status_code < 300:
            raise self._refusal(who, variable, response, body)
        if not is_whole:
            raise DeliveryFailed(
                f"{who} answered with more than {self._response_bytes_max} bytes: "
                "answers are messages; send large data another way",
                retryable=False,
                data={"status": response.status_code},
            )
        return body

    async def _read(self, response: httpx2.Response) -> tuple[bytes, bool]:
        """The body up to its bound, and whether that was all of it."""
        chunks: list[bytes] = []
        size = 0
        async for chunk in response.aiter_bytes():
            size += len(chunk)
            if size > self._response_bytes_max:
                return b"".join(chunks), False
            chunks.append(chunk)
        return b"".join(chunks), True

    def _refusal(self, who: str, variable: str, response: httpx2.Response, body: bytes) -> DeliveryFailed:
        status = response.status_code
        data: dict[str, object] = {"status": status}
        if 300 <= status < 400:
            return DeliveryFailed(
                f"{who} answered {status}, to {response.headers.get('location', '?')!r:.200}: "
                f"redirects are not followed; give the final address in {variable}",
                retryable=False,
                data=data,
            )
        is_retryable = is_retryable_status(status)
        if is_retryable:
            seconds = retry_after_seconds(response.headers.get("retry-after"), self._clock.now())
            if seconds is not None:
                data["retryAfterSeconds"] = seconds
        said = body[:200].decode("utf-8", "replace").strip()
        return DeliveryFailed(
            f"{who} answered {status}" + (f": {said}" if said else ""), retryable=is_retryable, data=data
        )
