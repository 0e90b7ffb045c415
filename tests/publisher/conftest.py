"""A service that answers what a test says, over a real socket, and publishers of both kinds in front of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, NamedTuple

import pytest

from sagaloom import RetryPolicy
from sagaloom.integration.publisher import SagaPublisherResult
from sagaloom.publisher import create_saga_publisher, create_sync_saga_publisher

AT_ONCE = RetryPolicy(maximum_attempts=4, initial_interval_ms=1, maximum_interval_ms=2)

Answer = bytes | None
"""What is sent back, byte for byte, before the connection is closed; None keeps it open and silent."""


class Request(NamedTuple):
    line: str
    headers: Mapping[str, str]
    body: Any
    connection: object


def http(status: int, content: bytes | object = b"", **headers: str) -> bytes:
    """An HTTP answer; content that is no bytes goes as JSON."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    lines = [f"HTTP/1.1 {status} Whatever", f"content-length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def taken(**fields: object) -> bytes:
    """The answer of the service that came before ours: 200, without a message id."""
    return http(200, {"published": True, "messageType": "OrderPlaced", **fields})


class Service:
    """Gives `answers` one after the other, the last for ever."""

    def __init__(self) -> None:
        self.answers: list[Answer] = [taken()]
        self.requests: list[Request] = []
        self.url = ""
        self.at_once = 0
        self.most_at_once = 0
        self.all_there: asyncio.Event | None = None
        self.expected = 0

    def hold_until(self, count: int) -> None:
        """Answers nobody before `count` requests are there together."""
        self.expected, self.all_there = count, asyncio.Event()

    @property
    def bodies(self) -> list[Any]:
        return [request.body for request in self.requests]

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                headers = {
                    name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:-2])
                }
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                self.requests.append(Request(head[0], headers, json.loads(body), writer))
                answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                await self._meet()
                if answer is None:
                    await reader.read()  # until the other side gives up
                    return
                writer.write(answer)
                await writer.drain()
                if not answer.startswith(b"HTTP"):
                    return

    async def _meet(self) -> None:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        if self.all_there is not None:
            if self.at_once == self.expected:
                self.all_there.set()
            await self.all_there.wait()
        self.at_once -= 1


@contextlib.asynccontextmanager
async def listening(
    talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[str]:
    """Serves `talk` on a free port of loopback, whose address is returned."""
    tasks: set[asyncio.Task[None]] = set()

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await talk(reader, writer)
        except asyncio.CancelledError:
            pass  # by us, below; asyncio would log it
        finally:
            tasks.discard(task)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    server = await asyncio.start_server(one, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    made = Service()
    async with listening(made.talk) as made.url:
        yield made


class Publisher:
    """One of the two publishers; the blocking one is asked from a thread."""

    def __init__(self, kind: str, url: str, **options: Any) -> None:
        given = {"base_url": url, "retries": AT_ONCE, "read_env": lambda _: None, **options}
        self._async = create_saga_publisher(**given) if kind == "async" else None
        self._sync = create_sync_saga_publisher(**given) if kind == "sync" else None

    async def publish(self, *args: Any, **named: Any) -> SagaPublisherResult:
        if self._sync is not None:
            return await asyncio.to_thread(self._sync.publish, *args, **named)
        assert self._async is not None
        return await self._async.publish(*args, **named)

    async def publish_many(self, *args: Any, **named: Any) -> list[SagaPublisherResult]:
        if self._sync is not None:
            return await asyncio.to_thread(self._sync.publish_many, *args, **named)
        assert self._async is not None
        return await self._async.publish_many(*args, **named)

    async def close(self) -> None:
        if self._sync is not None:
            self._sync.close()
        if self._async is not None:
            await self._async.close()


@pytest.fixture(params=["async", "sync"])
async def new_publisher(request: pytest.FixtureRequest) -> AsyncIterator[Callable[..., Publisher]]:
    """Makes publishers of one kind; each test runs with both kinds."""
    async with contextlib.AsyncExitStack() as stack:

        def made(url: str, **options: Any) -> Publisher:
            publisher = Publisher(request.param, url, **options)
            stack.push_async_callback(publisher.close)
            return publisher

        yield made


@pytest.fixture
def publisher(new_publisher: Callable[..., Publisher], service: Service) -> Publisher:
    return new_publisher(service.url)
