"""`send("queue:...")` at real brokers: one message for an effect, whatever happens in between. Servers that are stopped
here are the tests' own."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sagaloom import DeliveryFailed, RetryPolicy, SagaMessage, define_saga, send
from sagaloom.composition import create_durable_saga_runtime
from sagaloom.engine.records import DeadLetter, OutboxEffect
from sagaloom.queue import Queue, QueueConnectionOptions, QueueContext, create_queue
from sagaloom.runtime import SagaRuntime
from sagaloom.targets import QueueTarget
from tests.patience import PATIENCE_SECONDS
from tests.servers.server import Server

pytestmark = pytest.mark.anyio

_TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

Make = Callable[[str], Queue[Any]]


def queues_at(server: Server) -> Make:
    given: dict[str, Any] = {server.name: server.url, "namespace": f"t{uuid.uuid4().hex[:12]}"}
    return lambda name: create_queue(name, provider=server.name, connection=QueueConnectionOptions(**given))


def an_effect(**changes: Any) -> OutboxEffect:
    effect = OutboxEffect(
        effect_key="e" * 40,
        lane="orders:o-1/1/queue:mails",
        target_kind="queue",
        target_id="mails",
        payload=b'{"to":"ada"}',
        saga_id="orders",
        key="\N{GREEK SMALL LETTER OMEGA}-1",
        run=1,
        revision=1,
        position=0,
        message_id="m-1",
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        traceparent=_TRACE,
    )
    return msgspec.structs.replace(effect, **changes)


class _Heard:
    def __init__(self) -> None:
        self.messages: list[tuple[Any, str, dict[str, str]]] = []
        self._more = asyncio.Event()

    async def handle(self, payload: Any, context: QueueContext) -> None:
        self.messages.append((payload, context.message_id, dict(context.headers)))
        self._more.set()

    async def have(self, count: int) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while len(self.messages) < count:
                await self._more.wait()
                self._more.clear()


@contextlib.asynccontextmanager
async def listening(queue: Queue[Any]) -> AsyncIterator[_Heard]:
    heard = _Heard()
    async with queue:
        task = asyncio.create_task(queue.listen(heard.handle))
        yield heard
    await task


class _Target(QueueTarget):
    """Tells when a queue did not take something."""

    def __init__(self, create: Make) -> None:
        super().__init__(create)
        self.failed = asyncio.Event()

    async def deliver(self, effect: OutboxEffect) -> Sequence[SagaMessage[Any]]:
        try:
            return await super().deliver(effect)
        except DeliveryFailed:
            self.failed.set()
            raise


@contextlib.asynccontextmanager
async def running(path: Path, target: QueueTarget, *, attempts: int) -> AsyncIterator[SagaRuntime]:
    """A runtime with a saga that sends each payload to the queue `mails`."""
    retry = RetryPolicy(maximum_attempts=attempts, initial_interval_ms=50, maximum_interval_ms=200)
    saga = (
        define_saga("signup")
        .state({})
        .on("SignedUp", lambda saga, event, context: [send("queue:mails", event.payload, retry=retry)])
        .build()
    )
    try:
        async with create_durable_saga_runtime("kv", path=path, definitions=[saga], targets=[target]) as durable:
            yield durable.runtime
    finally:
        await target.close()


async def publish(runtime: SagaRuntime) -> None:
    message = {"type": "SignedUp", "payload": {"to": "ada"}}
    (await runtime.publish(message, correlation_key="s-1")).raise_for_rejected()


async def test_a_repeated_effect_is_one_message_or_one_with_the_same_id(server: Server) -> None:
    create = queues_at(server)
    target = QueueTarget(create)
    own_key = "\N{GREEK SMALL LETTER PI}" * 512

    for effect in (an_effect(), an_effect(), an_effect(effect_key="f" * 40, idempotency_key=own_key)):
        await target.deliver(effect)
    await target.close()
    queue = create("mails")
    count = 2 if (await queue.open()).deduplication else 3
    async with listening(queue) as heard:
        await heard.have(count)
        waiting = (await queue.depth()).waiting

    assert {message_id for _, message_id, _ in heard.messages} == {"e" * 40, own_key}
    assert len(heard.messages) == count
    assert waiting == 0
    payload, _, headers = heard.messages[0]
    assert payload == {"to": "ada"}
    assert headers["traceparent"] == _TRACE
    assert {name: headers[name] for name in ("effect-key", "saga-id", "correlation-key")} == {
        "effect-key": "e" * 40,
        "saga-id": "orders",
        "correlation-key": "\N{GREEK SMALL LETTER OMEGA}-1",
    }


async def test_an_effect_waits_for_a_broker_that_is_down(server: Server, tmp_path: Path) -> None:
    create = queues_at(server)
    target = _Target(create)
    await asyncio.to_thread(server.stop)

    async with running(tmp_path / "sagas.db", target, attempts=1_000) as runtime:
        await publish(runtime)
        await asyncio.wait_for(target.failed.wait(), PATIENCE_SECONDS)
        await asyncio.to_thread(server.start)
        async with listening(create("mails")) as heard:
            await heard.have(1)

    assert [payload for payload, _, _ in heard.messages] == [{"to": "ada"}]


async def test_an_effect_that_no_broker_took_is_a_dead_letter_and_leaves_when_it_is_redriven(
    server: Server, tmp_path: Path
) -> None:
    create = queues_at(server)
    await asyncio.to_thread(server.stop)

    async with running(tmp_path / "sagas.db", QueueTarget(create), attempts=2) as runtime:
        await publish(runtime)
        letter = await the_dead_letter(runtime)
        await asyncio.to_thread(server.start)
        await runtime.redrive(letter.id)
        async with listening(create("mails")) as heard:
            await heard.have(1)
        left = await runtime.dead_letters()

    assert letter.effect is not None
    assert letter.attempts == 2
    assert "queue 'mails' did not take it" in letter.reason
    assert server.name in letter.reason
    assert [message_id for _, message_id, _ in heard.messages] == [letter.effect.effect_key]
    assert left == []


async def the_dead_letter(runtime: SagaRuntime) -> DeadLetter:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not (letters := await runtime.dead_letters()):  # noqa: ASYNC110 - nobody is told
            await asyncio.sleep(0.02)
    return letters[0]
