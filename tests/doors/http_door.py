"""A runtime over a store in memory with the HTTP API in front of it, and two ways in: straight, or through a server."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Sequence
from typing import Any, TypedDict

import httpx2
import uvicorn
from starlette.types import ASGIApp

from sagaloom import SagaMessage, SagasError, define_saga, saga_compensate, saga_complete, saga_fail, send
from sagaloom.definitions import SagaDefinition
from sagaloom.engine.records import Instance
from sagaloom.errors import BackendUnavailable
from sagaloom.ports.store import CommitResult, InstanceFilter, Lease, UnitOfWork
from sagaloom.ports.targets import EffectTarget
from sagaloom.runtime import RuntimeOptions, SagaRuntime
from sagaloom.service import create_app
from sagaloom.testing import ManualClock, MemoryStore

PREFIX = "/api/v1/sagas"
PUBLISH = f"{PREFIX}/publish"


class OrderPlaced(TypedDict):
    amount: int


class Switch:
    """What the handler of `OrderShipped` does: raise for good, or not."""

    is_broken = True


def order_saga(switch: Switch | None = None) -> SagaDefinition[Any]:
    """OrderPlaced starts an order, OrderPaid completes it, OrderRefused undoes it, OrderShipped fails if broken."""

    def placed(saga: Any, event: Any, context: Any) -> Sequence[Any]:
        saga.state = {**saga.state, "amount": event.payload["amount"], "status": "the order's own"}
        return [send({"kind": "service", "id": "payments"}, {"amount": event.payload["amount"]})]

    def shipped(saga: Any, event: Any, context: Any) -> Sequence[Any]:
        if switch is not None and switch.is_broken:
            raise SagasError("the parcel is lost", retryable=False)
        saga.state = {**saga.state, "isShipped": True}
        return []

    def refused(saga: Any, event: Any, context: Any) -> Sequence[Any]:
        return [saga_compensate({"type": "OrderRefused", "payload": {}}, "no stock")]

    return (
        define_saga("order")
        .state({})
        .on(OrderPlaced, placed)
        .on("OrderPaid", lambda saga, event, context: [saga_complete({"paid": True})], starts=False)
        .on("OrderShipped", shipped, starts=False)
        .on("OrderRefused", refused, starts=False)
        .compensate("OrderRefused", lambda saga, event, context: [saga_fail("refunded")])
        .build()
    )


def note_saga() -> SagaDefinition[Any]:
    """Takes any payload, and keeps it with both states of every transition."""

    def noted(saga: Any, event: Any, context: Any) -> Sequence[Any]:
        saga.state = {"last": event.payload}
        return []

    return define_saga("note").durability("t2").state({}).on("Noted", noted).build()


class Payments:
    """Takes every effect of kind `service`."""

    kind = "service"

    async def deliver(self, effect: Any) -> Sequence[SagaMessage[Any]]:
        return ()

    async def close(self) -> None:
        return None


class FlakyStore(MemoryStore):
    """A store that can be taken away."""

    is_down = False

    async def commit(self, units: Sequence[UnitOfWork], *, lease: Lease) -> CommitResult:
        self._refuse_if_down()
        return await super().commit(units, lease=lease)

    async def probe(self) -> None:
        self._refuse_if_down()

    async def instances(
        self, wanted: InstanceFilter, *, limit: int, offset: int = 0, cursor: str | None = None
    ) -> tuple[list[Instance], str | None]:
        self._refuse_if_down()
        return await super().instances(wanted, limit=limit, offset=offset, cursor=cursor)

    def _refuse_if_down(self) -> None:
        if self.is_down:
            raise BackendUnavailable("the disk is gone")


class Door:
    """What a test holds: the runtime, its store and clock, and a client of its API."""

    def __init__(self, runtime: SagaRuntime, store: FlakyStore, clock: ManualClock, client: httpx2.AsyncClient) -> None:
        self.runtime = runtime
        self.store = store
        self.clock = clock
        self.client = client

    async def publish(
        self, type: str = "OrderPlaced", payload: Any = None, *, wait: str | None = None, **fields: Any
    ) -> httpx2.Response:
        body = {"type": type, "payload": {"amount": 1} if payload is None else payload, **fields}
        return await self.client.post(PUBLISH, json=body, params={"wait": wait} if wait is not None else None)

    async def get(self, path: str, **params: Any) -> httpx2.Response:
        """Gets a path below the prefix."""
        return await self.client.get(PREFIX + path, params=params or None)

    async def post(self, path: str, body: object = None, **params: Any) -> httpx2.Response:
        """Posts to a path below the prefix; without a body nothing is sent."""
        return await self.client.post(PREFIX + path, json=body, params=params or None)


@contextlib.asynccontextmanager
async def open_door(
    *definitions: SagaDefinition[Any],
    is_started: bool = True,
    targets: Sequence[EffectTarget] | None = None,
    options: RuntimeOptions | None = None,
    **app_options: Any,
) -> AsyncIterator[Door]:
    """A started runtime with these sagas (the order and the note saga if none is given) and a client of its API."""
    store, clock = FlakyStore(), ManualClock()
    runtime = SagaRuntime(
        store,
        definitions=definitions or (order_saga(), note_saga()),
        targets=[Payments()] if targets is None else targets,
        clock=clock,
        options=options,
    )
    transport = httpx2.ASGITransport(create_app(runtime, **app_options))
    async with contextlib.AsyncExitStack() as stack:
        if is_started:
            await stack.enter_async_context(runtime)
        client = await stack.enter_async_context(httpx2.AsyncClient(transport=transport, base_url="http://sagas"))
        yield Door(runtime, store, clock, client)


class _Server(uvicorn.Server):
    """Says when it answers, and leaves the signals to pytest."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_answering = asyncio.Event()

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_answering.set()


@contextlib.asynccontextmanager
async def serve(app: ASGIApp) -> AsyncIterator[int]:
    """Serves `app` over HTTP on a free port of 127.0.0.1, which is returned."""
    # asyncio sends small answers at once only on sockets that say they are TCP; others cost 40 ms a request.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    server = _Server(uvicorn.Config(app, log_config=None, access_log=False))
    serving = asyncio.create_task(server.serve([listener]))
    try:
        await server.is_answering.wait()
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await serving


async def speak(port: int, *parts: bytes, is_ending: bool = True) -> tuple[int, bytes]:
    """Sends bytes as they are, and returns the status and the body of the first answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in parts:
            writer.write(part)
            with contextlib.suppress(ConnectionError):
                await writer.drain()
        if is_ending and writer.can_write_eof():
            writer.write_eof()
        head = await reader.readuntil(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1])
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        return status, await reader.readexactly(int(length.split(b":")[1]))
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
