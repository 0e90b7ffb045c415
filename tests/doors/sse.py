"""A reader of server-sent events on a bare socket, which a test can cut off, stop reading from, or have five hundred
of."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any, NamedTuple
from urllib.parse import urlencode

from tests.doors.http_door import PREFIX
from tests.patience import PATIENCE_SECONDS

WITHIN_SECONDS = PATIENCE_SECONDS


class Told(NamedTuple):
    """One event as it came. `id` is a number, or None without one."""

    id: int | None
    event: str
    data: Any


class Subscriber:
    """One stream."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.status = 0
        self.headers: dict[str, str] = {}
        self.retry: int | None = None
        self.comments: list[str] = []
        self._lines: list[str] = []
        self._rest = b""

    async def begin(self) -> None:
        """Reads status and headers."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.rstrip().split("\r\n")
        self.status = int(first.split(" ")[1])
        self.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}

    async def body(self) -> Any:
        """The whole body, as JSON, of an answer that is no stream."""
        return json.loads(await self.reader.readexactly(int(self.headers["content-length"])))

    async def next(self) -> Told | None:
        """The next event; None at the end of the stream. Raises `asyncio.IncompleteReadError` where it was cut."""
        event, place, data = "message", None, None
        async with asyncio.timeout(WITHIN_SECONDS):
            while (line := await self._line()) is not None:
                if line == "":
                    if data is not None:
                        return Told(place, event, json.loads(data))
                    continue
                field, _, value = line.partition(": ")
                if field == "":
                    self.comments.append(value)
                elif field == "event":
                    event = value
                elif field == "id":
                    place = int(value)
                elif field == "data":
                    data = value
                elif field == "retry":
                    self.retry = int(value)
        return None

    async def take(self, count: int) -> list[Told]:
        """The next `count` events that are no heartbeats."""
        found: list[Told] = []
        while len(found) < count:
            told = await self.next()
            assert told is not None, f"the stream ended after {found}"
            if told.event != "heartbeat":
                found.append(told)
        return found

    async def _line(self) -> str | None:
        while b"\n" not in self._rest:
            size = int(await self.reader.readuntil(b"\r\n"), 16)
            chunk = await self.reader.readexactly(size + 2)
            if not size:
                return None
            self._rest += chunk[:-2]
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()

    def cut(self) -> None:
        """Tears the connection down, with whatever is on its way."""
        self.writer.transport.abort()


@contextlib.asynccontextmanager
async def subscribed(
    port: int,
    last_event_id: object = None,
    *,
    token: str | None = None,
    method: str = "GET",
    path: str = f"{PREFIX}/subscribe",
    **params: Any,
) -> AsyncIterator[Subscriber]:
    """A stream of the feed; `params` are those of the query, lists repeat them."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    headers = {"Host": "localhost", "Accept": "text/event-stream"}
    if last_event_id is not None:
        headers["Last-Event-ID"] = str(last_event_id)
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    query = f"?{urlencode(params, doseq=True)}" if params else ""
    lines = [f"{method} {path}{query} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
    subscriber = Subscriber(reader, writer)
    try:
        async with asyncio.timeout(WITHIN_SECONDS):
            await subscriber.begin()
        yield subscriber
    finally:
        subscriber.cut()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
