"""The little HTTP that the processes of the crash run speak: loopback, keep-alive, JSON, nothing else.

Small on purpose: a worker that is killed a hundred times must start fast, and what is measured is not a web server.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple

__all__ = ["Client", "Request", "serve"]

HOST = "127.0.0.1"
_BODY_BYTES_MAX = 32 << 20


class Request(NamedTuple):
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


Handler = Callable[[Request], Awaitable[tuple[int, bytes] | None]]
"""Answers with a status and JSON; None cuts the connection without an answer."""


async def serve(handler: Handler) -> tuple[asyncio.Server, int]:
    """A server on a free port of the loopback interface, and the port."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, EOFError, asyncio.LimitOverrunError):
            while True:
                request = await _read_request(reader)
                answer = await handler(request)
                if answer is None:
                    writer.transport.abort()
                    return
                status, body = answer
                writer.write(
                    b"HTTP/1.1 %d x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
                    % (status, len(body), body)
                )
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(connected, HOST, 0, backlog=256)
    port: int = server.sockets[0].getsockname()[1]
    return server, port


async def _read_request(reader: asyncio.StreamReader) -> Request:
    method, path, headers = _head(await reader.readuntil(b"\r\n\r\n"))
    size = int(headers.get("content-length", "0"))
    if size > _BODY_BYTES_MAX:
        raise EOFError
    return Request(method, path, headers, await reader.readexactly(size))


def _head(head: bytes) -> tuple[str, str, dict[str, str]]:
    first, *lines = head.decode("latin-1").split("\r\n")
    headers: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    one, two, *_ = first.split(" ")
    return one, two, headers


class Client:
    """One keep-alive connection. Any failure closes it and comes out as `OSError` or `EOFError`."""

    def __init__(self) -> None:
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._port = 0

    async def request(self, port: int, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """Sends one request and returns the status and the body of its answer."""
        try:
            if self._streams is None or self._port != port:
                self.close()
                self._streams = await asyncio.open_connection(HOST, port, limit=_BODY_BYTES_MAX)
                self._port = port
            reader, writer = self._streams
            writer.write(b"%b %b HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (
                method.encode(), path.encode(), len(body), body,
            ))  # fmt: skip
            await writer.drain()
            _, status, headers = _head(await reader.readuntil(b"\r\n\r\n"))
            return int(status), await reader.readexactly(int(headers["content-length"]))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Drops the connection; the next request makes another."""
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None
