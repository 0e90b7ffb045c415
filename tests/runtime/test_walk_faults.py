"""A process can stop at every step of the walk. Whatever is found afterwards leads to the same end.

The faults are raised, not killed: the runtime is abandoned on the spot, and a new one opens the same file. The story is
an order that is placed (its first attempt fails), charged, reminded by a timer, paid, and refunded.
"""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from sagaloom import (
    CascadedMessage,
    RetryPolicy,
    Saga,
    SagaContext,
    SagaMessage,
    define_saga,
    saga_compensate,
    saga_fail,
    schedule,
    send,
)
from sagaloom.engine.records import Instance
from sagaloom.kv.presence import FilePresence
from sagaloom.kv.sqlite import SqliteKeyValue
from sagaloom.runtime.options import RuntimeOptions
from sagaloom.runtime.receipts import PublishReceipt
from sagaloom.runtime.runtime import SagaRuntime
from sagaloom.stores.kv import KvSagaStore
from sagaloom.targets.callables import EffectRequest, callable_target
from sagaloom.testing import ManualClock, check_invariants
from sagaloom.testing.faults import STEPS, Faults
from sagaloom.testing.invariants import every_inbox_row, every_instance, every_outbox_row

Event = SagaMessage[dict[str, Any]]
Effects = list[CascadedMessage]
Context = SagaContext[dict[str, Any]]
Order = Saga[dict[str, Any]]


def _placed(saga: Order, event: Event, context: Context) -> Effects:
    if context.attempt == 1:
        raise ConnectionError("the first attempt fails, so that the message waits in the inbox")
    saga.state["status"] = "placed"
    return [send("service:payments", {"step": "charge"}), schedule(SagaMessage("Reminder", {}), "1h", name="reminder")]


def _reminder(saga: Order, event: Event, context: Context) -> Effects:
    return [send("service:mail", {"step": "reminder"})]


def _paid(saga: Order, event: Event, context: Context) -> Effects:
    saga.state["status"] = "paid"
    return []


def _charged(saga: Order, event: Event, context: Context) -> Effects:
    saga.state["charged"] = True
    return []


def _failed(saga: Order, event: Event, context: Context) -> Effects:
    return [saga_compensate(event, "no stock")]


def _refund(saga: Order, event: Event, context: Context) -> Effects:
    saga.state["status"] = "refunded"
    return [send("service:payments", {"step": "refund"}), saga_fail("no stock")]


ORDER = (
    define_saga("order")
    .state({"status": "new"})
    .on("OrderPlaced", _placed)
    .on("Charged", _charged, starts=False)
    .on("Reminder", _reminder, starts=False)
    .on("PaymentCaptured", _paid, starts=False)
    .on("FulfillmentFailed", _failed, starts=False)
    .compensate("FulfillmentFailed", _refund)
    .correlate(lambda message: message.correlation_key or "o-1")
    .retry(RetryPolicy(maximum_attempts=3, initial_interval_ms=1_000, jitter=0.0))
    .build()
)


@dataclass
class World:
    """What outlives a process: the file, the clock on the wall, and the services that got effects."""

    path: Path
    clock: ManualClock = field(default_factory=ManualClock)
    arrived: dict[str, list[str]] = field(default_factory=dict)
    """Step -> the effect keys under which it came, in order."""

    async def receive(self, request: EffectRequest) -> list[SagaMessage[Any]]:
        step = request.payload["step"]
        self.arrived.setdefault(step, []).append(request.effect_key)
        return [SagaMessage("Charged", {})] if step == "charge" else []

    @asynccontextmanager
    async def process(self, faults: Faults | None = None) -> AsyncIterator[SagaRuntime]:
        """A runtime on the file, which ends as a killed process does: at once, telling nobody."""
        hook = faults if faults is not None else Faults()
        # Nobody cuts the power here, so nothing has to be on the disk: tests/crash does that part.
        kv = await SqliteKeyValue.open(self.path, on_step=hook, synchronous="OFF")
        store = KvSagaStore(kv, presence=FilePresence(self.path))
        runtime = SagaRuntime(
            store,
            definitions=[ORDER],
            targets=[callable_target("service", self.receive)],
            clock=self.clock,
            options=RuntimeOptions(on_step=hook, dispatch_concurrency=4),
        )
        try:
            yield runtime
        finally:
            hook.disarm()
            await runtime.abandon()
            await store.close()

    async def run_until_struck(self, faults: Faults) -> bool:
        """Tells the story in a process that stops at the fault; whether it got there."""
        async with self.process(faults) as runtime:
            telling = asyncio.create_task(self.tell(runtime))
            strike = asyncio.create_task(faults.wait_until_struck(20))
            await asyncio.wait([telling, strike], return_when=asyncio.FIRST_COMPLETED)
            for task in (telling, strike):
                task.cancel()
            await asyncio.gather(telling, strike, return_exceptions=True)
        return bool(faults.struck)

    async def tell(self, runtime: SagaRuntime) -> None:
        """The whole story, as a client tells it that sends everything again until it is acknowledged."""
        await runtime.start()
        await self.publish(runtime, "OrderPlaced")
        await self.let_pass(runtime, "1s")
        await self.let_pass(runtime, "1h")
        await self.publish(runtime, "PaymentCaptured")
        await self.publish(runtime, "FulfillmentFailed")
        await runtime.settled(20)

    async def publish(self, runtime: SagaRuntime, message_type: str) -> PublishReceipt:
        answer = await runtime.publish(SagaMessage(message_type, {}, id=f"m-{message_type}"))
        receipt = answer.raise_for_rejected()
        await runtime.settled(20)
        return receipt

    async def let_pass(self, runtime: SagaRuntime, time: str) -> None:
        self.clock.advance(time)
        await _everybody_waits()  # until the alarms have rung
        await runtime.settled(20)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "saga.db")


@pytest.mark.parametrize("step", STEPS)
async def test_wherever_the_process_stops_one_charge_and_one_refund_leave(step: str, tmp_path: Path) -> None:
    for nth in itertools.count(1):
        world, faults = World(tmp_path / f"{nth}.db"), Faults()
        faults.raise_at(step, nth)

        was_struck = await world.run_until_struck(faults)
        async with world.process() as runtime:
            await world.tell(runtime)
            breaches = await check_invariants(runtime.store)
            order = await runtime.get_instance("order", "o-1")

        told = f"stopped at {step}:{nth}"
        assert breaches == [], told
        assert order is not None
        assert (order.status, order.reason, order.state) == (
            "failed",
            "no stock",
            b'{"status":"refunded","charged":true}',
        ), told
        assert {each: len(set(keys)) for each, keys in world.arrived.items()} == {
            "charge": 1,
            "reminder": 1,
            "refund": 1,
        }, told
        if not was_struck:
            assert nth > 1, f"the story never comes to {step}"
            return


async def test_a_message_is_handled_once_when_the_process_stops_before_its_receipt(world: World) -> None:
    faults = Faults()
    faults.raise_at("accepted", 1)

    await world.run_until_struck(faults)
    async with world.process() as runtime:
        waiting = [row.envelope.id async for row in every_inbox_row(runtime.store)]
        await runtime.start()
        again = await world.publish(runtime, "OrderPlaced")
        await world.let_pass(runtime, "1s")
        order = await runtime.get_instance("order", "o-1")

    assert waiting == ["m-OrderPlaced"]
    assert again.duplicate
    assert order is not None
    assert order.message_count == 2  # and the answer of the payment service


@pytest.mark.parametrize("step", ["claimed", "decided", "kv:checked", "kv:half_written", "kv:written"])
async def test_nothing_is_written_when_the_process_stops_before_the_end_of_the_commit(step: str, world: World) -> None:
    faults = Faults()
    async with world.process(faults) as runtime:
        await runtime.start()
        await runtime.publish(SagaMessage("OrderPlaced", {}, id="m-0", correlation_key="o-0"))
        faults.raise_at(step, faults.seen[step] + 1)
        publishing = asyncio.create_task(world.publish(runtime, "OrderPlaced"))
        await faults.wait_until_struck()
        publishing.cancel()
        await asyncio.gather(publishing, return_exceptions=True)

    async with world.process() as runtime:
        (found,) = await runtime.store.load([("order", "o-1")])
        waiting = [row.envelope.id async for row in every_inbox_row(runtime.store)]
        await runtime.start()
        receipt = await world.publish(runtime, "OrderPlaced")

    assert found.head is None
    assert waiting == ["m-0"]
    assert not receipt.duplicate


@pytest.mark.parametrize("step", ["kv:committed", "committed"])
async def test_an_effect_leaves_later_when_the_process_stops_after_its_commit(step: str, world: World) -> None:
    faults = Faults()
    async with world.process(faults) as runtime:
        await runtime.start()
        await world.publish(runtime, "OrderPlaced")
        faults.raise_at(step, faults.seen[step] + 1)
        world.clock.advance("1s")
        await faults.wait_until_struck()

    async with world.process() as runtime:
        committed = [row.effect.effect_key async for row in every_outbox_row(runtime.store)]
        left_before = dict(world.arrived)
        await runtime.start()
        await runtime.settled(20)

    assert left_before == {}
    assert {"charge": committed} == world.arrived


async def test_an_effect_leaves_again_under_its_key_when_the_process_stops_before_settling_it(world: World) -> None:
    faults = Faults()
    faults.raise_at("dispatched", 1)

    await world.run_until_struck(faults)
    async with world.process() as runtime:
        await runtime.start()
        await runtime.settled(20)
        order = await runtime.get_instance("order", "o-1")

    first, second = world.arrived["charge"]
    assert first == second
    assert order is not None
    assert order.state == b'{"status":"placed","charged":true}'


async def test_a_refund_leaves_though_its_instance_is_over(world: World) -> None:
    faults = Faults()
    faults.raise_at("compensated", 1)

    await world.run_until_struck(faults)
    async with world.process() as runtime:
        (order,) = await _instances(runtime)
        left_before = "refund" in world.arrived
        await runtime.start()
        await runtime.settled(20)

    assert (order.status, left_before) == ("failed", False)
    assert len(world.arrived["refund"]) == 1


async def test_a_timer_that_was_due_when_the_process_stopped_fires_late_and_once(world: World) -> None:
    faults = Faults()
    faults.raise_at("timer_due", 1)

    await world.run_until_struck(faults)
    left_before = "reminder" in world.arrived
    world.clock.advance(timedelta(days=3))
    async with world.process() as runtime:
        await runtime.start()
        await world.let_pass(runtime, "1d")

    assert not left_before
    assert len(world.arrived["reminder"]) == 1


async def test_a_process_that_was_overtaken_while_it_slept_joins_again_before_it_writes(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    async with world.process() as sleeper:
        await sleeper.start()
        await world.publish(sleeper, "OrderPlaced")
        store = KvSagaStore(await SqliteKeyValue.open(world.path))
        await store.acquire("another process", now=world.clock.now())

        woken = await sleeper.publish(SagaMessage("OrderPlaced", {}, id="m-late", correlation_key="o-2"))
        entries = await sleeper.history("order", "o-2")
        await store.close()

    assert "nothing was written" in caplog.text
    assert woken.published
    assert [entry.message_id for entry in entries] == ["m-late"] * len(entries)


async def test_a_message_accepted_beside_its_failed_starter_has_its_turn_before_younger_ones(world: World) -> None:
    """Both are in one batch: the starter, whose second attempt succeeds, and the message that lined up behind it."""
    async with world.process() as runtime:
        await runtime.start()
        await world.publish(runtime, "OrderPlaced")
        await _everybody_waits()

        world.clock.advance("1s")
        behind = asyncio.create_task(runtime.publish(SagaMessage("PaymentCaptured", {}, id="m-paid")))
        await _everybody_waits()
        await runtime.settled(20)
        waiting = [row.envelope.id async for row in every_inbox_row(runtime.store)]
        order = await runtime.get_instance("order", "o-1")
        with contextlib.suppress(asyncio.CancelledError):
            behind.cancel()
            await behind

    assert waiting == []
    assert order is not None
    assert order.state == b'{"status":"paid","charged":true}'


async def _everybody_waits() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def _instances(runtime: SagaRuntime) -> list[Instance]:
    return [instance async for instance in every_instance(runtime.store)]
