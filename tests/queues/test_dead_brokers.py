"""Brokers that go away and stay away: whoever sends, stops or closes is not kept for long by them. Servers that die
here are the tests' own."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import apsw
import pytest

from sagaloom.clock import SystemClock
from sagaloom.errors import BackendUnavailable
from sagaloom.kv.presence import FilePresence
from sagaloom.kv.sqlite import SqliteKeyValue
from sagaloom.queue import Queue, QueueConnectionOptions, create_queue
from sagaloom.queues.kv import KvQueueBroker
from sagaloom.queues.patience import causes, within
from tests.complaints import complaints
from tests.patience import PATIENCE_SECONDS
from tests.servers.server import Server

pytestmark = pytest.mark.anyio

_SECONDS_MAX = 15.0
_STOP_SECONDS_MAX = 25.0
"""A reconnection that is under way may take as long as an answer, and so may what is said over it, and the goodbye."""
_MOMENTS = (0.0, 0.05, 0.3, 1.0, 2.0, 4.0)
_URLS = {
    "redis": "redis://127.0.0.1:{port}/0",
    "postgres": "postgresql://me@127.0.0.1:{port}/db",
    "rabbitmq": "amqp://guest:guest@127.0.0.1:{port}/",
}
_ANSWER_SECONDS = {
    "redis": "sagaloom.queues.redis._ANSWER_SECONDS",
    "postgres": "sagaloom.queues.postgres._ANSWER_SECONDS",
    "rabbitmq": "sagaloom.queues.rabbitmq_connection.ANSWER_SECONDS",
}
"""How long each waits for its server."""


async def ended(what: Coroutine[Any, Any, object], *, seconds: float = _SECONDS_MAX) -> BaseException | None:
    """What it raised. It must end by itself: a timeout would cancel it, which is not what is asked."""
    task = asyncio.create_task(what)
    await asyncio.wait([task], timeout=seconds)
    assert task.done(), "it still waits for the broker"
    return task.exception()


async def _loses_its_broker(
    queue: Queue[Any], *, lose: Coroutine[Any, Any, object]
) -> tuple[BaseException | None, list[BaseException | None]]:
    """What enqueueing came to, and stopping, listening and closing, when the broker went while a message was worked
    on."""
    taken, is_gone = asyncio.Event(), asyncio.Event()

    async def handler(_: object) -> None:
        taken.set()
        await is_gone.wait()

    await queue.enqueue("mail")
    # What was handed out in an answer that came too late is handed out again when its lease is over.
    listening = asyncio.create_task(queue.listen(handler, visibility_timeout=2.0))
    await asyncio.wait_for(taken.wait(), PATIENCE_SECONDS)
    await lose
    refused = None
    while refused is None:  # A process hears of SIGSTOP a moment after it was sent.
        refused = await ended(queue.enqueue("mail"))
    is_gone.set()
    stopped = await ended(queue.stop())
    await asyncio.wait([listening], timeout=PATIENCE_SECONDS)
    return refused, [stopped, listening.exception(), await ended(queue.close())]


@pytest.mark.parametrize(
    ("server", "how"),
    [
        pytest.param(name, how, marks=pytest.mark.server(name))
        for name, how in (
            ("redis", "frozen"),
            ("redis", "killed"),
            ("postgres", "frozen"),
            ("postgres", "killed"),
            ("rabbitmq", "frozen"),
            ("rabbitmq", "killed"),
        )
    ],
    indirect=["server"],
)
async def test_nobody_waits_for_long_for_a_server_that_is_gone(
    server: Server, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def go_away() -> None:
        if how == "killed":
            await asyncio.to_thread(server.kill)
            return
        # Each call takes as long as that from now on; more seconds of it teach nothing more.
        monkeypatch.setattr(_ANSWER_SECONDS[server.name], 1.0)
        monkeypatch.setattr("sagaloom.queues.listening._AGAIN_SECONDS_MAX", 0.5)
        await asyncio.to_thread(server.freeze)

    given: dict[str, Any] = {server.name: server.url, "namespace": f"t{uuid.uuid4().hex[:12]}"}
    queue = create_queue("mails", provider=server.name, connection=QueueConnectionOptions(**given))

    try:
        refused, rest = await _loses_its_broker(queue, lose=go_away())
    finally:
        await asyncio.to_thread(server.thaw)

    assert isinstance(refused, BackendUnavailable)
    assert refused.retryable
    assert rest == [None, None, None]


@pytest.mark.parametrize(
    "server",
    [pytest.param(name, marks=pytest.mark.server(name)) for name in ("redis", "postgres", "rabbitmq")],
    indirect=True,
)
async def test_a_listener_ends_at_whatever_moment_of_a_restart_it_is_told_to(server: Server) -> None:
    connection = QueueConnectionOptions(**{server.name: server.url}, namespace=f"t{uuid.uuid4().hex[:12]}")  # type: ignore[arg-type]
    queues = [create_queue("mails", provider=server.name, connection=connection) for _ in _MOMENTS]
    has_begun = [asyncio.Event() for _ in queues]

    async def ends(queue: Queue[Any], begun: asyncio.Event, *, after_seconds: float) -> list[BaseException | None]:
        async def handler(_: object) -> None:
            begun.set()
            await asyncio.Event().wait()  # until its message is lost to it, or given back

        listening = asyncio.create_task(queue.listen(handler, visibility_timeout=2.0, grace=0.5))
        await asyncio.gather(*(each.wait() for each in has_begun))
        await asyncio.sleep(after_seconds)
        stopped = await ended(queue.stop(), seconds=_STOP_SECONDS_MAX)
        await asyncio.wait([listening], timeout=PATIENCE_SECONDS)
        return [stopped, listening.exception(), await ended(queue.close())]

    async def restart() -> None:
        await asyncio.gather(*(each.wait() for each in has_begun))
        await asyncio.to_thread(lambda: (server.kill(), server.start()))

    await queues[0].enqueue_many(range(len(queues)))
    _, *ends_of_all = await asyncio.gather(
        restart(),
        *(
            ends(queue, begun, after_seconds=moment)
            for queue, begun, moment in zip(queues, has_begun, _MOMENTS, strict=True)
        ),
    )

    assert ends_of_all == [[None, None, None]] * len(queues)


async def test_nobody_waits_for_long_for_a_file_that_another_process_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sagaloom.queues.listening._AGAIN_SECONDS_MAX", 0.5)
    file = tmp_path / "queues.db"
    kv = await SqliteKeyValue.open(file, busy_timeout_seconds=0.3)

    async def opened() -> KvQueueBroker:
        broker = KvQueueBroker(
            "mails",
            kv,
            presence=lambda seconds: FilePresence(f"{file}.mails", lease_seconds=seconds),
            now=SystemClock().now,
            on_close=kv.close,
        )
        await broker.open()
        return broker

    other = apsw.Connection(str(file))

    async def hold() -> None:
        other.execute("BEGIN IMMEDIATE")

    refused, rest = await _loses_its_broker(Queue("mails", opened), lose=hold())
    other.close()

    assert isinstance(refused, BackendUnavailable)
    assert refused.retryable
    assert rest == [None, None, None]


@pytest.mark.parametrize("server", [pytest.param("postgres", marks=pytest.mark.server("postgres"))], indirect=True)
async def test_what_is_given_up_leaves_no_error_behind_that_nobody_asks_for(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sagaloom.queues.postgres._ANSWER_SECONDS", 1.0)
    options = QueueConnectionOptions(postgres=server.url, namespace=f"t{uuid.uuid4().hex[:12]}")
    queue = create_queue("mails", provider="postgres", connection=options)
    await queue.enqueue("mail")

    with complaints() as heard:
        await asyncio.to_thread(server.freeze)
        try:
            listening = asyncio.create_task(queue.listen(lambda _: None))
            sending = [asyncio.create_task(queue.enqueue("mail")) for _ in range(3)]
            await asyncio.wait(sending, timeout=0.3)
            for each in (listening, *sending):
                each.cancel()
            await asyncio.wait([listening, *sending])
            closed = await ended(queue.close())
        finally:
            await asyncio.to_thread(server.thaw)
        del listening, sending, each

    assert (closed, heard) == (None, [])


@contextlib.asynccontextmanager
async def _silent() -> AsyncIterator[int]:
    """The port of somebody who takes connections, and says nothing."""
    ends = asyncio.Event()

    async def listen(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await ends.wait()
        writer.close()

    async with await asyncio.start_server(listen, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]
        ends.set()


@pytest.mark.parametrize("provider", list(_URLS))
async def test_a_listener_that_has_not_reached_its_broker_stops_at_once_and_so_does_whoever_sends(
    provider: str,
) -> None:
    async with _silent() as port:
        given: dict[str, Any] = {provider: _URLS[provider].format(port=port)}
        queue = create_queue("mails", provider=provider, connection=QueueConnectionOptions(**given))
        listening = asyncio.create_task(queue.listen(lambda _: None))
        sending = asyncio.create_task(ended(queue.enqueue("mail")))
        await asyncio.sleep(0.05)

        stopped = await ended(queue.stop(), seconds=3)
        await asyncio.wait([listening], timeout=PATIENCE_SECONDS)
        closed = await ended(queue.close(), seconds=8)
        refused = await sending

    assert (stopped, listening.exception(), closed) == (None, None, None)
    assert isinstance(refused, BackendUnavailable)
    assert refused.retryable


@pytest.mark.parametrize("times", [1, 1_000])
async def test_a_driver_that_goes_on_after_a_cancellation_is_not_waited_for(times: int) -> None:
    is_over = False

    async def stubborn() -> None:
        for _ in range(times):
            with contextlib.suppress(asyncio.CancelledError):
                while not is_over:  # noqa: ASYNC110 - an event would be one more thing to be cancelled
                    await asyncio.sleep(0.05)

    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.05 s"):
        await within(0.05, stubborn())
    took_seconds = time.monotonic() - began
    is_over = True

    assert took_seconds < 30  # a moment, and not as long as that goes on


async def test_what_a_driver_cancels_by_itself_is_a_broken_connection() -> None:
    async def broken() -> None:
        raise asyncio.CancelledError

    with pytest.raises(ConnectionError, match="the connection broke"):
        await within(1, broken())


def test_errors_that_lead_to_each_other_are_looked_through_once() -> None:
    """Else the process stands still, and hears no signal either: aiormq raises the error of a connection out of the
    cancellation that it has caused."""
    lost, cancelled = ConnectionResetError("lost"), asyncio.CancelledError()
    lost.__cause__, cancelled.__context__ = cancelled, lost

    found = list(itertools.islice(causes(lost), 3))

    assert found == [lost, cancelled]
