"""`send("queue:...")`: a message in a queue, once, whatever happens in between."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sagaloom import DeliveryFailed, define_saga, send
from sagaloom.composition import create_durable_saga_runtime
from sagaloom.engine.records import OutboxEffect
from sagaloom.errors import BackendUnavailable
from sagaloom.ports.targets import EffectTarget
from sagaloom.queue import QueueConnectionOptions, create_queue
from sagaloom.targets import QueueTarget
from tests.patience import PATIENCE_SECONDS

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def an_effect(**changes: Any) -> OutboxEffect:
    effect = OutboxEffect(
        effect_key="e" * 32,
        lane="orders:o-1/1/queue:mails",
        target_kind="queue",
        target_id="mails",
        payload=b'{"to":"ada"}',
        saga_id="orders",
        key="o-1",
        run=1,
        revision=1,
        position=0,
        message_id="m-1",
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        traceparent=TRACE,
    )
    return msgspec.structs.replace(effect, **changes)


def queues_at(path: Path) -> Any:
    def create(name: str) -> Any:
        return create_queue(name, provider="kv", connection=QueueConnectionOptions(kv=path))

    return create


async def test_an_effect_that_is_sent_twice_is_one_message_with_its_key(tmp_path: Path) -> None:
    create, heard = queues_at(tmp_path / "queues.db"), asyncio.Queue[tuple[Any, str, dict[str, str]]]()
    target = QueueTarget(create)
    assert isinstance(target, EffectTarget)
    await target.deliver(an_effect())
    await target.deliver(an_effect())
    await target.deliver(an_effect(effect_key="f" * 32))
    await target.close()

    async def handler(payload: Any, context: Any) -> None:
        heard.put_nowait((payload, context.message_id, dict(context.headers)))

    queue = create("mails")
    listening = asyncio.create_task(queue.listen(handler))
    async with asyncio.timeout(PATIENCE_SECONDS):
        first, second = await heard.get(), await heard.get()
    depth = await queue.depth()
    await queue.close()
    await asyncio.gather(listening, return_exceptions=True)

    assert [one[:2] for one in (first, second)] == [({"to": "ada"}, "e" * 32), ({"to": "ada"}, "f" * 32)]
    assert first[2]["effect-key"] == "e" * 32
    assert (first[2]["saga-id"], first[2]["correlation-key"], first[2]["traceparent"]) == ("orders", "o-1", TRACE)
    assert heard.empty()
    assert depth.waiting == 0


@pytest.mark.parametrize("is_retryable", [True, False])
async def test_a_queue_that_does_not_take_it_fails_the_delivery(is_retryable: bool) -> None:
    def create(name: str) -> Any:
        raise BackendUnavailable("no broker", retryable=is_retryable)

    with pytest.raises(DeliveryFailed, match="queue 'mails' did not take it: no broker") as caught:
        await QueueTarget(create).deliver(an_effect())

    assert caught.value.retryable == is_retryable


async def test_a_saga_sends_to_a_queue_without_further_ado(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saga = (
        define_saga("signup")
        .state({})
        .on("SignedUp", lambda saga, event, context: [send("queue:mails", event.payload)])
    ).build()
    async with create_durable_saga_runtime("kv", path=tmp_path / "sagas.db", definitions=[saga]) as durable:
        receipt = await durable.runtime.publish({"type": "SignedUp", "payload": {"to": "ada"}}, correlation_key="s-1")
        receipt.raise_for_rejected()
        await durable.runtime.settled()
    queue = create_queue("mails", provider="kv")
    depth = await queue.depth()
    await queue.close()

    assert depth.waiting == 1
