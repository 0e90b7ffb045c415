"""Retention: finished runs go when their time is over, and nothing that counts goes with them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest

from sagaloom import SagaMessage, define_saga, define_signal, saga_complete, saga_fail, spawn
from sagaloom.config import configured, define_saga_config
from sagaloom.definitions import SagaDefinition
from sagaloom.errors import ConfigurationError, InstanceNotFound
from sagaloom.ports.store import InstanceFilter, SagaStore
from sagaloom.runtime import Outcome, PublishReceipt, RuntimeOptions, SagaRuntime
from sagaloom.testing import ManualClock, MemoryStore, RecordingStore
from sagaloom.testing.faults import Faults
from tests.runtime.conftest import Bench

pytestmark = pytest.mark.anyio
EVERYTHING = InstanceFilter()
NUDGE = define_signal("nudge")


def kept(definition: SagaDefinition[Any], **days: float) -> SagaDefinition[Any]:
    """`definition` with a retention, as a project's configuration lays it over."""
    return configured(definition, define_saga_config(definition.id, "sagas/any.py").retention(**days).build())


def notes(*, reuse: Any = "reject", **days: float) -> SagaDefinition[Any]:
    """Opens with `Noted`, takes `Added`, ends with `Closed` or `Broke`."""
    built = (
        define_saga("note")
        .state({"n": 0})
        .reuse(reuse)
        .on("Noted", lambda saga, event, context: [])
        .on("Added", lambda saga, event, context: [], starts=False)
        .on("Closed", lambda saga, event, context: [saga_complete()], starts=False)
        .on("Broke", lambda saga, event, context: [saga_fail("broken")], starts=False)
        .on_signal(NUDGE, lambda saga, event, context: [])
        .build()
    )
    return kept(built, **days) if days else built


async def rounds() -> None:
    """Lets everybody who has become due begin."""
    for _ in range(20):
        await asyncio.sleep(0)


class Desk:
    """One runtime, and its clock."""

    def __init__(self, runtime: SagaRuntime, clock: ManualClock) -> None:
        self.runtime = runtime
        self.clock = clock

    async def publish(self, type: str, key: str = "a", **fields: Any) -> Outcome:
        receipt = await self.runtime.publish(SagaMessage(type, {}, correlation_key=key, **fields))
        assert isinstance(receipt, PublishReceipt), receipt
        (outcome,) = receipt.outcomes
        return outcome

    async def finish(self, *keys: str) -> None:
        for key in keys:
            await self.publish("Noted", key)
            await self.publish("Closed", key)

    async def pass_days(self, days: float) -> None:
        await rounds()
        self.clock.advance(timedelta(days=days))
        await rounds()
        await self.runtime.settled()


@asynccontextmanager
async def opened(store: SagaStore, *definitions: SagaDefinition[Any], **options: Any) -> AsyncIterator[Desk]:
    clock = ManualClock()
    async with SagaRuntime(store, definitions=definitions, clock=clock, options=RuntimeOptions(**options)) as runtime:
        yield Desk(runtime, clock)


async def test_a_finished_run_goes_after_its_days_and_says_so(store: SagaStore) -> None:
    async with opened(store, notes(completed_days=3)) as desk:
        await desk.finish("a")
        await desk.pass_days(2.9)
        assert await desk.runtime.get_instance("note", "a") is not None

        await desk.pass_days(0.2)

        assert await desk.runtime.get_instance("note", "a") is None
        assert await store.instances(EVERYTHING, limit=10) == ([], None)
        with pytest.raises(InstanceNotFound, match=r"run 1 of note:a has ended \(completed\), and was removed"):
            await desk.runtime.history("note", "a")
        with pytest.raises(InstanceNotFound, match="was removed"):
            await desk.runtime.signal("note", "a", NUDGE)
        with pytest.raises(InstanceNotFound, match="was removed"):
            await desk.runtime.cancel("note", "a")


async def test_live_runs_and_those_that_ended_late_stay(store: SagaStore) -> None:
    async with opened(store, notes(completed_days=3)) as desk:
        await desk.finish("old")
        await desk.publish("Noted", "live")
        await desk.publish("Noted", "late")
        await desk.pass_days(2)
        await desk.publish("Closed", "late")

        await desk.pass_days(2)

        runs, _ = await store.instances(EVERYTHING, limit=10)
        assert {run.key for run in runs} == {"live", "late"}


async def test_a_saga_without_retention_keeps_its_runs(store: SagaStore) -> None:
    async with opened(store, notes()) as desk:
        await desk.finish("a")

        await desk.pass_days(3_000)

        assert (await desk.runtime.get_instance("note", "a")) is not None


@pytest.mark.parametrize("type", ["Noted", "Added"])
async def test_a_key_that_takes_no_second_run_still_takes_none(store: SagaStore, type: str) -> None:
    async with opened(store, notes(completed_days=3)) as desk:
        await desk.finish("a")
        await desk.pass_days(4)

        outcome = await desk.publish(type)

        assert outcome.disposition == "ignored"
        assert "run 1 is completed and takes no more messages" in (outcome.reason or "")
        assert await desk.runtime.get_instance("note", "a") is None
        assert await store.dead_letters() == []


async def test_a_failed_run_is_remembered_as_failed(store: SagaStore) -> None:
    async with opened(store, notes(completed_days=3)) as desk:
        await desk.publish("Noted")
        await desk.publish("Broke")
        await desk.pass_days(4)

        assert "run 1 is failed" in ((await desk.publish("Noted")).reason or "")


async def test_the_numbers_of_runs_go_on_where_another_run_is_allowed(store: SagaStore) -> None:
    async with opened(store, notes(reuse="new_run", completed_days=3)) as desk:
        await desk.finish("a")
        await desk.finish("a")
        await desk.pass_days(4)

        added = await desk.publish("Added")
        outcome = await desk.publish("Noted")

        assert (added.disposition, added.run) == ("ignored", 0)
        assert (outcome.disposition, outcome.run) == ("applied", 3)
        await desk.publish("Closed")
        await desk.pass_days(100)
        assert (await desk.publish("Noted")).run == 4


async def test_a_repeat_within_the_window_is_a_duplicate_though_its_run_is_gone(store: SagaStore) -> None:
    async with opened(store, notes(reuse="new_run", completed_days=1)) as desk:
        await desk.publish("Noted", idempotency_key="once")
        await desk.publish("Closed")
        await desk.pass_days(6)

        assert (await desk.publish("Noted", idempotency_key="once")).disposition == "duplicate"
        await desk.pass_days(2)
        assert (await desk.publish("Noted", idempotency_key="once")).disposition == "applied"


async def test_marks_of_live_runs_are_forgotten_as_well(store: SagaStore) -> None:
    async with opened(store, notes(), idempotency_days=2) as desk:
        await desk.publish("Noted", idempotency_key="first")
        await desk.pass_days(1.5)
        await desk.publish("Added", idempotency_key="second")
        await desk.pass_days(1)

        again = [await desk.publish("Added", idempotency_key=key) for key in ("first", "second")]

        assert [each.disposition for each in again] == ["applied", "duplicate"]


async def test_a_tombstone_goes_after_ninety_days_and_the_key_begins_anew(store: SagaStore) -> None:
    async with opened(store, notes(completed_days=3)) as desk:
        await desk.finish("a")
        await desk.pass_days(4)
        await desk.pass_days(89)
        assert (await desk.publish("Noted")).disposition == "ignored"

        await desk.pass_days(2)

        outcome = await desk.publish("Noted")
        assert (outcome.disposition, outcome.run) == ("applied", 1)


async def test_a_child_under_a_key_whose_run_is_gone_is_refused_to_its_parent(store: SagaStore) -> None:
    parent = (
        define_saga("parent")
        .state({"heard": ""})
        .on("Begun", lambda saga, event, context: [spawn("note", SagaMessage("Noted", {}, correlation_key="a"))])
        .on("note:failed", lambda saga, event, context: [saga_complete(event.payload["reason"])], starts=False)
        .build()
    )
    async with opened(store, notes(completed_days=3), parent) as desk:
        await desk.finish("a")
        await desk.pass_days(4)

        await desk.publish("Begun", "p")
        await desk.runtime.settled()

        ended = await desk.runtime.get_instance("parent", "p")
        assert ended is not None
        assert ended.status == "completed"
        assert b"was there before" in (ended.result or b"")


async def test_live_runs_beyond_their_days_are_counted(store: SagaStore) -> None:
    async with opened(store, notes(active_days=3)) as desk:
        await desk.finish("done")
        await desk.publish("Noted", "old")
        await desk.pass_days(2)
        await desk.publish("Noted", "young")
        await desk.pass_days(2)

        assert desk.runtime.overdue == {"note": 1}
        assert (await desk.runtime.get_instance("note", "old")) is not None


async def test_a_process_that_ends_between_two_bites_leaves_whole_runs_and_the_next_one_goes_on(bench: Bench) -> None:
    definition = notes(completed_days=3)
    life = await bench.live(definition)
    keys = [f"k-{n:03}" for n in range(150)]
    for key in keys:
        await life.publish("Noted", key=key)
        await life.publish("Closed", key=key)
    await bench.end(life)
    faults = Faults()
    faults.raise_at("pruned", 1)
    bench.clock.advance("4d")
    life = await bench.live(definition, on_step=faults)
    await rounds()
    bench.clock.advance("2m")
    await faults.wait_until_struck()
    left, _ = await life.runtime.store.instances(EVERYTHING, limit=1_000)
    assert len(left) == 150 - 64
    for run in left:
        assert len(await life.runtime.store.history(run)) == 2
    await bench.die(life)

    life = await bench.live(definition)
    await rounds()
    await bench.advance("2m")

    assert await life.runtime.store.instances(EVERYTHING, limit=10) == ([], None)
    assert {(await life.publish("Noted", key=key)).disposition for key in keys} == {"ignored"}


async def test_an_idle_store_is_swept_with_a_few_reads() -> None:
    store = RecordingStore(MemoryStore())
    async with opened(store, notes(completed_days=3, active_days=3)) as desk:
        await desk.finish("a")
        await desk.pass_days(0.01)
        store.calls.clear()

        for _ in range(24):
            await desk.pass_days(1 / 24)

        called = [call.method for call in store.calls]
        assert {name: called.count(name) for name in set(called)} == {
            "instances": 24,
            "count_instances": 24,
            "remove_tombstones": 1,
            "prune_marks": 1,
        }


@pytest.mark.parametrize("days", [0, -1])
def test_a_window_of_no_time_is_refused(days: float) -> None:
    with pytest.raises(ConfigurationError, match="idempotency_days"):
        SagaRuntime(MemoryStore(), options=RuntimeOptions(idempotency_days=days))
