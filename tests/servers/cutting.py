"""A line to a server that a test can cut at the moment it wants: when a certain text goes by."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal
from urllib.parse import urlsplit, urlunsplit

from tests.servers.server import HOST

__all__ = ["Cutter"]

_BLOCK_BYTES = 1 << 16

Where = Literal["before it arrives", "before the answer"]


class Cutter:
    """Passes on what clients and the server say to each other.

    After `cut(text, where)` the next connection on which a client says `text` ends: before the server has got it, or
    after the server has answered it, without that answer. `cuts` counts how often that was.
    """

    def __init__(self, url: str) -> None:
        self._target = urlsplit(url)
        self._wanted: tuple[bytes, Where] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.url = url
        self.cuts = 0

    @classmethod
    @asynccontextmanager
    async def before(cls, url: str) -> AsyncIterator[Cutter]:
        """A line to the server at `url`; clients take its own `url`."""
        cutter = cls(url)
        listening = await asyncio.start_server(cutter._accept, HOST, 0)
        port = listening.sockets[0].getsockname()[1]
        user = cutter._target.netloc.rpartition("@")[0]
        cutter.url = urlunsplit(cutter._target._replace(netloc=f"{user}@{HOST}:{port}"))
        try:
            yield cutter
        finally:
            listening.close()
            for task in cutter._tasks:
                task.cancel()
            await asyncio.gather(*cutter._tasks, return_exceptions=True)

    def cut(self, text: str, where: Where) -> None:
        self._wanted = (text.encode(), where)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = [writer]
        tasks: list[asyncio.Task[None]] = []
        is_cut = asyncio.Event()
        try:
            server, to_server = await asyncio.open_connection(HOST, self._target.port)
            ends.append(to_server)
            tasks = [
                asyncio.create_task(self._pass_on(reader, to_server, is_cut)),
                asyncio.create_task(self._answer(server, writer, is_cut)),
            ]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for end in ends:
                end.transport.abort()

    async def _pass_on(self, reader: asyncio.StreamReader, server: asyncio.StreamWriter, is_cut: asyncio.Event) -> None:
        """What the client says; ends when it does, or when the line is cut before the server."""
        said = b""
        with contextlib.suppress(OSError):
            while block := await reader.read(_BLOCK_BYTES):
                wanted = self._wanted
                if wanted is not None:
                    said += block  # A text may come in two blocks.
                    if wanted[0] in said:
                        self._wanted = None
                        self.cuts += 1
                        if wanted[1] == "before it arrives":
                            return
                        is_cut.set()
                server.write(block)
                await server.drain()

    async def _answer(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter, is_cut: asyncio.Event) -> None:
        """What the server answers; ends when it does, or at the first answer after the line was cut."""
        with contextlib.suppress(OSError):
            while (block := await reader.read(_BLOCK_BYTES)) and not is_cut.is_set():
                client.write(block)
                await client.drain()
