"""What the middleware gives to a request, and when it opens and closes the sagas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, MutableMapping
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from examples.web.shop import Order, OrderPaid, OrderPlaced, orders
from sagaloom import SagaMessage
from sagaloom.errors import ConfigurationError
from sagaloom.middleware import RequestSagas, create_saga_middleware, create_sse_events_middleware, sagas_of
from sagaloom.presets import start_sagas
from sagaloom.runtime import PublishReceipt, SagaRuntime
from sagaloom.testing import ManualClock, MemoryStore
from tests.patience import PATIENCE_SECONDS

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


class App:
    """An application that keeps the scopes it was called with."""

    def __init__(self, *, speaks_lifespan: bool = True, fails_startup: bool = False) -> None:
        self.scopes: list[Scope] = []
        self.told: list[str] = []
        self._speaks_lifespan = speaks_lifespan
        self._fails_startup = fails_startup

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        if scope["type"] != "lifespan":
            return
        if not self._speaks_lifespan:
            raise ValueError("only HTTP")
        self.told.append((await receive())["type"])
        if self._fails_startup:
            await send({"type": "lifespan.startup.failed", "message": "no database"})
            return
        await send({"type": "lifespan.startup.complete"})
        self.told.append((await receive())["type"])
        await send({"type": "lifespan.shutdown.complete"})


class Server:
    """The half of a server that speaks the lifespan."""

    def __init__(self, app: Any) -> None:
        self.state: dict[str, Any] = {}
        self.heard: list[str] = []
        self._inbox: asyncio.Queue[MutableMapping[str, Any]] = asyncio.Queue()
        self._news = asyncio.Event()
        self._task = asyncio.create_task(app({"type": "lifespan", "state": self.state}, self._inbox.get, self._send))

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        self.heard.append(message["type"])
        self._news.set()

    async def say(self, kind: str) -> str:
        """Tells the application, and returns its answer."""
        self._news.clear()
        self._inbox.put_nowait({"type": kind})
        async with asyncio.timeout(PATIENCE_SECONDS):
            await self._news.wait()
        return self.heard[-1]

    async def end(self) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await self._task


async def request(app: Any, *headers: tuple[bytes, bytes]) -> None:
    async def never() -> Any:
        raise AssertionError("nothing is read")

    async def ignored(message: Any) -> None:
        return None

    await app({"type": "http", "path": "/", "method": "GET", "headers": list(headers)}, never, ignored)


@pytest.fixture
async def runtime() -> AsyncIterator[SagaRuntime]:
    async with SagaRuntime(MemoryStore(), definitions=[orders], clock=ManualClock()) as started:
        yield started


async def found_in(app: App, runtime: Any, *headers: tuple[bytes, bytes]) -> RequestSagas:
    await request(create_saga_middleware(runtime)(app), *headers)
    return sagas_of(app.scopes[-1])


# --- Requests --------------------------------------------------------------------------------------------------------


async def test_a_published_message_goes_on_in_the_trace_of_its_request(runtime: SagaRuntime) -> None:
    sagas = await found_in(App(), runtime, (b"traceparent", TRACE.encode()), (b"tracestate", b"a=b"))

    await sagas.publish(OrderPlaced("o-1", 5), wait=5)
    await sagas.publish(SagaMessage("OrderPlaced", {"order_id": "o-2", "cents": 5}, traceparent=TRACE[:-2] + "00"))

    (ours, own) = [await sagas.get_instance("orders", key) for key in ("o-1", "o-2")]
    assert ours is not None
    assert own is not None
    assert (ours.traceparent or "")[:35] == TRACE[:35]
    assert own.traceparent == TRACE[:-2] + "00"


async def test_a_header_that_is_no_trace_breaks_nothing(runtime: SagaRuntime) -> None:
    sagas = await found_in(App(), runtime, (b"traceparent", b"\xff nonsense"))

    assert isinstance(await sagas.publish(OrderPlaced("o-1", 5)), PublishReceipt)


async def test_a_request_reads_the_state_as_its_saga_declares_it(runtime: SagaRuntime) -> None:
    sagas = await found_in(App(), runtime)
    await sagas.publish(OrderPlaced("o-1", 5), wait=5)
    await sagas.publish(OrderPaid("o-1"), wait=5)

    assert await sagas.get_saga_state("orders", "o-1") == Order("paid", 5)
    assert await sagas.get_saga_state("orders", "o-2") is None


async def test_what_the_application_had_in_its_state_stays(runtime: SagaRuntime) -> None:
    app = App()

    await create_saga_middleware(runtime)(app)(
        {"type": "http", "path": "/", "headers": [], "state": {"user": "ada"}},
        *[lambda *_: None] * 2,  # type: ignore[list-item, arg-type]
    )

    assert app.scopes[0]["state"]["user"] == "ada"


def test_a_request_without_the_middleware_is_told_what_is_missing() -> None:
    with pytest.raises(ConfigurationError, match="wrap the application in create_saga_middleware"):
        sagas_of({"type": "http"})
    with pytest.raises(ConfigurationError, match="wrap the application in create_saga_middleware"):
        sagas_of(object())


@pytest.mark.parametrize("wrong", [None, "shop", [orders]])
def test_what_are_no_sagas_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"takes start_sagas\(\[\.\.\.\]\) or a running SagaRuntime"):
        create_saga_middleware(wrong)


def test_a_path_of_events_begins_with_a_slash() -> None:
    with pytest.raises(ConfigurationError, match="begin it with '/'"):
        create_sse_events_middleware(path="events")


# --- Lifespan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("speaks_lifespan", [True, False])
async def test_sagas_are_open_from_startup_to_shutdown(tmp_path: Path, speaks_lifespan: bool) -> None:
    app = App(speaks_lifespan=speaks_lifespan)
    server = Server(create_saga_middleware(start_sagas([orders], path=tmp_path / "shop.db"))(app))

    started = await server.say("lifespan.startup")
    runtime = server.state["sagas"].bus
    was_ready = runtime.health().ready
    stopped = await server.say("lifespan.shutdown")
    await server.end()

    assert (started, stopped) == ("lifespan.startup.complete", "lifespan.shutdown.complete")
    assert (was_ready, runtime.health().ready) == (True, False)
    assert app.told == (["lifespan.startup", "lifespan.shutdown"] if speaks_lifespan else [])


async def test_an_application_that_does_not_start_leaves_no_sagas_open(tmp_path: Path) -> None:
    server = Server(create_saga_middleware(start_sagas([orders], path=tmp_path / "shop.db"))(App(fails_startup=True)))

    answer = await server.say("lifespan.startup")
    await server.end()

    assert answer == "lifespan.startup.failed"
    assert not server.state["sagas"].bus.health().ready


async def test_sagas_that_cannot_be_opened_fail_the_startup(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    server = Server(create_saga_middleware(start_sagas([orders], path=tmp_path / "file" / "shop.db"))(App()))

    answer = await server.say("lifespan.startup")
    await server.end()

    assert answer == "lifespan.startup.failed"


async def test_a_running_runtime_is_left_running(runtime: SagaRuntime) -> None:
    server = Server(create_saga_middleware(runtime)(App()))
    await server.say("lifespan.startup")
    await server.say("lifespan.shutdown")
    await server.end()

    assert runtime.health().ready


async def test_behind_a_server_without_a_lifespan_the_first_request_opens_the_sagas(tmp_path: Path) -> None:
    opening = start_sagas([orders], path=tmp_path / "shop.db")
    app, wrap = App(), create_saga_middleware(opening)
    first, second = wrap(app), wrap(app)

    await asyncio.gather(request(first), request(second))

    (runtime, same) = [sagas_of(scope).bus for scope in app.scopes]
    assert runtime is same
    assert runtime.health().ready
    await runtime.stop()
    await runtime.store.close()
