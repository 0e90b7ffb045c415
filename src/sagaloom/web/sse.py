"""Server-sent events: how a stream is written, and how it ends.

A stream is a raw answer of its own, although FastAPI has one for events. That one runs two tasks and a queue for every
stream, makes a pydantic model and a write of every event for every reader, cannot be told how often a quiet stream has
to say something, and waits for a reader who has stopped reading for as long as he likes. Here a chunk of many events
is made once for all who get it, and these rules hold:

- A stream ends when its source does, its client leaves, its server stops, or its client has not taken what was sent
  within `write_seconds_max`. Whatever the reason, nothing of it stays behind.
- ASGI has no word for the last two. uvicorn shows enough of its connections to know that it is stopping, and to cut
  one off; behind another server a stream ends with the next write, or with the server's own deadline.
- HEAD is answered with the headers, and opens no stream.

What we dislike about it: a server that was asked with `Connection: close` does not show that it is stopping. Whoever
runs the server had better end the sources first, as `sagaloom serve` does.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Annotated, Any, Final, Protocol

from pydantic import BeforeValidator, Field
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sagaloom.web.limits import StreamLimit
from sagaloom.web.routes import Text, drop_blanks

__all__ = ["HEAD_MARK", "After", "ChunkSource", "EventStreams", "EventTypes", "event_frame"]

_log = logging.getLogger("sagaloom.streams")

HEAD_MARK: Final = "sagaloom.is_head"
"""The key of a scope that was HEAD, and is GET for those routes that need not know."""

_LOOK_SECONDS: Final = 0.25
_HEADERS: Final = {
    "cache-control": "no-cache, no-store",
    "x-accel-buffering": "no",  # A proxy that gathers events before it passes them on makes them late.
}


def _by_comma(values: list[str]) -> list[str]:
    return [one for value in drop_blanks(values) for one in value.split(",") if one]


After = Annotated[
    Text,
    Field(
        description="Go on behind this id; 0 is the oldest event that is kept. `Last-Event-ID` says the same, and "
        "wins. Without either the stream begins now."
    ),
]
EventTypes = Annotated[
    list[str],
    BeforeValidator(_by_comma),
    Field(description="Types of events, also parted by commas. Heartbeats and resets always come."),
]


def event_frame(event: str, data: bytes, *, id: str | None = None, retry_ms: int | None = None) -> bytes:
    """One event as it goes over the wire. `data` is JSON in one line."""
    retry = b"retry: %d\n" % retry_ms if retry_ms is not None else b""
    place = b"id: %s\n" % id.encode() if id is not None else b""
    return b"%sevent: %s\n%sdata: %s\n\n" % (retry, event.encode(), place, data)


class ChunkSource(Protocol):
    """Where a stream comes from."""

    async def next_chunk(self) -> bytes | None:
        """Whole events, as soon as there are any; None ends the stream."""
        ...

    def close(self) -> None:
        """Nobody listens any more. `next_chunk` returns None, also if it waits right now. Twice is no error."""
        ...


class EventStreams:
    """The open streams of one application."""

    def __init__(self, limit: StreamLimit, *, write_seconds_max: float = 30.0) -> None:
        self._limit = limit
        self._write_seconds_max = write_seconds_max
        self._open: dict[ChunkSource, _Connection] = {}
        self._is_looking = False

    @property
    def open(self) -> int:
        """How many are open now."""
        return len(self._open)

    def respond(self, source: ChunkSource) -> Response:
        """The answer that streams `source`, and closes it in the end."""
        return _StreamResponse(self, source)

    async def answer(self, source: ChunkSource, scope: Scope, receive: Receive, send: Send, headers: Any) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": headers}
        if scope.get(HEAD_MARK):
            source.close()
            await send(start)
            await send({"type": "http.response.body"})
            return
        try:
            with self._limit.opened(scope):
                await self._stream(source, start, receive, send)
        finally:
            source.close()

    async def _stream(self, source: ChunkSource, start: Any, receive: Receive, send: Send) -> None:
        connection = _Connection(receive)
        gone = asyncio.create_task(_close_when_gone(source, receive), name="sagaloom-stream")
        self._open[source] = connection
        if not self._is_looking:
            self._look()
        try:
            await self._write(send, start)
            while (chunk := await source.next_chunk()) is not None:
                await self._write(send, {"type": "http.response.body", "body": chunk, "more_body": True})
            await self._write(send, {"type": "http.response.body"})
        except TimeoutError:
            _log.info("a reader has taken nothing for %g s and is dropped", self._write_seconds_max)
            connection.cut()
            # The server has to have seen the end of it, or it will complain of half an answer.
            await asyncio.wait([gone], timeout=1.0)
        except OSError:
            pass  # How some servers say that the client has gone.
        finally:
            del self._open[source]
            gone.cancel()

    async def _write(self, send: Send, message: Any) -> None:
        async with asyncio.timeout(self._write_seconds_max):
            await send(message)

    def _look(self) -> None:
        """Ends the streams of servers that are stopping, now and then while any is open."""
        for source, connection in list(self._open.items()):
            if connection.is_ending:
                source.close()
        self._is_looking = bool(self._open)
        if self._is_looking:
            asyncio.get_running_loop().call_later(_LOOK_SECONDS, self._look)


class _StreamResponse(Response):
    media_type = "text/event-stream"

    def __init__(self, streams: EventStreams, source: ChunkSource) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._streams = streams
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._streams.answer(self._source, scope, receive, send, self.raw_headers)


class _Connection:
    """What can be seen and done of the connection behind a request: with uvicorn everything, elsewhere nothing."""

    def __init__(self, receive: Receive) -> None:
        cycle = getattr(receive, "__self__", None)
        self._cycle: Any = cycle if hasattr(cycle, "transport") and hasattr(cycle, "keep_alive") else None
        self._was_kept = self._cycle is not None and self._cycle.keep_alive

    @property
    def is_ending(self) -> bool:
        """Whether the server wants to close it after this answer, and did not want to at the beginning: it stops."""
        return self._was_kept and not self._cycle.keep_alive

    def cut(self) -> None:
        """Ends it at once, with everything that was not sent."""
        if self._cycle is not None:
            self._cycle.transport.abort()


async def _close_when_gone(source: ChunkSource, receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    source.close()
