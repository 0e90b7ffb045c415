"""Deferred and waiting messages in a runtime: over batches, restarts, takeovers and stores."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest

from sagaloom import SagaMessage, define_saga, saga_complete, schedule
from sagaloom.ports.store import SagaStore
from sagaloom.runtime import PublishReceipt, SagaRuntime
from sagaloom.testing import ManualClock, check_invariants
from tests.core.test_expecting import joined_orders, keyed, moving, orders
from tests.patience import PATIENCE_SECONDS
from tests.runtime.conftest import STORES, Bench, Life
from tests.runtime.test_sharing import keys_held_by, parts_of, until

__all__ = ["STORES"]

CHAIN = (
    define_saga("chain")
    .state({"status": "new", "seen": []})
    .on("Begin", moving("a"))
    .during("a", "A", moving("b"))
    .during("b", "B", moving("c"))
    .during("c", "C", moving("d"))
    .on("Note", moving("a"), starts=False)
    .on("End", lambda saga, event, context: [saga_complete()], starts=False)
    .build()
)
BROKEN = {"is": False}


def fragile(saga: Any, event: Any, context: Any) -> Any:
    if BROKEN["is"]:
        raise RuntimeError("not now")
    return moving("done")(saga, event, context)


async def published(runtime: SagaRuntime, message: SagaMessage[Any], wait: float | None = None) -> str:
    receipt = await runtime.publish(message, wait=wait)
    assert isinstance(receipt, PublishReceipt), receipt
    (outcome,) = receipt.outcomes
    return outcome.disposition


async def seen(runtime: SagaRuntime, saga_id: str = "chain", key: str = "k") -> list[str]:
    instance = await runtime.get_instance(saga_id, key)
    assert instance is not None
    state: dict[str, Any] = next(each for each in runtime.definitions if each.id == saga_id).state_codec.decode(
        instance.state
    )
    return list(state["seen"])


# --- Deferred messages -----------------------------------------------------------------------------------------------


async def test_a_deferred_message_is_answered_as_such_and_applied_later(store: SagaStore) -> None:
    async with SagaRuntime(store, definitions=[CHAIN], clock=ManualClock()) as runtime:
        await published(runtime, keyed("Begin"))

        assert await published(runtime, keyed("B")) == "deferred"
        assert await published(runtime, keyed("A")) == "applied"
        await runtime.settled()

        assert await seen(runtime) == ["Begin", "A", "B"]
    assert await check_invariants(store) == []
    assert await store.inbox_page(after=None, limit=10) == []


async def test_who_waits_for_a_deferred_message_hears_of_its_end(store: SagaStore) -> None:
    async with SagaRuntime(store, definitions=[CHAIN], clock=ManualClock()) as runtime:
        await published(runtime, keyed("Begin"))
        waiting = asyncio.create_task(published(runtime, keyed("B"), wait=30))
        await asyncio.sleep(0.05)
        await published(runtime, keyed("A"))

        assert await waiting == "applied"


async def test_a_deferred_message_is_a_duplicate_when_it_comes_again(store: SagaStore) -> None:
    async with SagaRuntime(store, definitions=[CHAIN], clock=ManualClock()) as runtime:
        await published(runtime, keyed("Begin"))
        await published(runtime, keyed("B"))

        assert await published(runtime, keyed("B")) == "duplicate"


@pytest.mark.parametrize("batch_max", [1, 2, 256])
async def test_what_was_deferred_comes_before_anything_newer_however_batches_fall(
    store: SagaStore, batch_max: int
) -> None:
    from sagaloom.runtime import RuntimeOptions

    options = RuntimeOptions(batch_max=batch_max)
    names = ["Begin", "C", "B", "A", "Note", "B", "A", "C", "A"]
    async with SagaRuntime(store, definitions=[CHAIN], clock=ManualClock(), options=options) as runtime:
        messages = [keyed(name, n) for n, name in enumerate(names)]
        await asyncio.gather(*(runtime.publish(message) for message in messages))
        await runtime.settled()

        # Note leads back to `a`, where the second A is taken at once; the B before it had to wait for that.
        assert await seen(runtime) == ["Begin", "A", "B", "C", "Note", "A", "B", "C"]
        (last,) = await store.inbox_page(after=None, limit=10)
        assert last.envelope.id == "A-8"
    assert await check_invariants(store) == []


async def test_deferred_messages_survive_a_kill_and_keep_their_places(bench: Bench) -> None:
    life = await bench.live(CHAIN)
    for name in ("Begin", "C", "B"):
        await published(life.runtime, keyed(name))
    await bench.die(life)

    life = await bench.live(CHAIN)
    await published(life.runtime, keyed("A"))
    await life.runtime.settled()

    assert await seen(life.runtime) == ["Begin", "A", "B", "C"]


async def test_another_process_takes_deferred_messages_over(bench: Bench) -> None:
    one = await bench.live(CHAIN)
    other = await bench.live(CHAIN)
    await until(lambda: bool(parts_of(one)) and bool(parts_of(other)))
    (key,) = keys_held_by(one, "chain", 1)

    def to(name: str) -> SagaMessage[Any]:
        return SagaMessage(name, {}, correlation_key=key, id=f"{name}-{key}")

    for name in ("Begin", "B", "C"):
        await published(one.runtime, to(name))
    await bench.die(one)
    await until(lambda: len(parts_of(other)) == 64)
    await published(other.runtime, to("A"), wait=30)
    await other.runtime.settled()

    assert await seen(other.runtime, key=key) == ["Begin", "A", "B", "C"]


async def test_messages_from_another_process_are_deferred_by_the_holder(bench: Bench) -> None:
    one = await bench.live(CHAIN)
    other = await bench.live(CHAIN)
    await until(lambda: bool(parts_of(one)) and bool(parts_of(other)))
    (key,) = keys_held_by(one, "chain", 1)

    for n, name in enumerate(("Begin", "C", "B", "A")):
        life = (one, other)[n % 2]
        await published(life.runtime, SagaMessage(name, {}, correlation_key=key, id=f"{name}-{key}"), wait=0.2)

    async with asyncio.timeout(PATIENCE_SECONDS):
        while await seen(one.runtime, key=key) != ["Begin", "A", "B", "C"]:  # noqa: ASYNC110 - it happens in another runtime
            await asyncio.sleep(0.01)


async def test_a_deferred_timer_can_still_be_taken_back(store: SagaStore) -> None:
    saga = (
        define_saga("late")
        .state({"status": "new", "seen": []})
        .on("Begin", moving("a", schedule({"type": "Ring"}, "1m", name="ring")))
        .during("b", "Ring", moving("rang"))
        .on("Note", moving("b"), starts=False)
        .build()
    )
    clock = ManualClock()
    async with SagaRuntime(store, definitions=[saga], clock=clock) as runtime:
        await published(runtime, keyed("Begin"))
        clock.advance("2m")
        await asyncio.sleep(0.02)
        await runtime.settled()
        assert await seen(runtime, "late") == ["Begin"]
        assert len(await runtime.timers("late", "k")) == 1

        await published(runtime, keyed("Note"))
        await runtime.settled()

        assert await seen(runtime, "late") == ["Begin", "Note", "Ring"]
        assert await runtime.timers("late", "k") == []
    assert await check_invariants(store) == []


async def test_a_deferred_message_whose_attempt_fails_is_tried_again_like_any_other(store: SagaStore) -> None:
    saga = (
        define_saga("fragile")
        .state({"status": "new", "seen": []})
        .on("Begin", moving("a"))
        .during("b", "Go", fragile)
        .on("Note", moving("b"), starts=False)
        .build()
    )
    clock = ManualClock()
    BROKEN["is"] = True
    async with SagaRuntime(store, definitions=[saga], clock=clock) as runtime:
        await published(runtime, keyed("Begin"))
        await published(runtime, keyed("Go"))
        await published(runtime, keyed("Note"))
        await runtime.settled()
        (row,) = await store.inbox_page(after=None, limit=10)
        assert (row.envelope.attempt, row.envelope.last_error) == (1, "RuntimeError: not now")

        BROKEN["is"] = False
        clock.advance("1m")
        await until(lambda: runtime.health().backlog == 0)
        await runtime.settled()

        assert await seen(runtime, "fragile") == ["Begin", "Note", "Go"]


async def test_what_is_deferred_when_its_run_ends_is_ignored_on_the_record(store: SagaStore) -> None:
    async with SagaRuntime(store, definitions=[CHAIN], clock=ManualClock()) as runtime:
        for name in ("Begin", "C", "End"):
            await published(runtime, keyed(name))
        await runtime.settled()

        last = (await runtime.history("chain", "k"))[-1]
        assert (last.type, last.disposition) == ("C", "ignored")
        assert runtime.health().backlog == 0


async def test_what_is_deferred_waits_through_a_pause(store: SagaStore) -> None:
    async with SagaRuntime(store, definitions=[CHAIN], clock=ManualClock()) as runtime:
        for name in ("Begin", "B"):
            await published(runtime, keyed(name))
        await runtime.pause("chain", "k")
        await published(runtime, keyed("A"))
        await runtime.settled()
        assert await seen(runtime) == ["Begin"]

        await runtime.resume("chain", "k")
        await runtime.settled()

        assert await seen(runtime) == ["Begin", "A", "B"]


# --- Waiting for an instance -----------------------------------------------------------------------------------------


async def test_a_message_waits_for_its_instance_over_a_restart(bench: Bench) -> None:
    saga = orders()
    life = await bench.live(saga)
    assert await published(life.runtime, keyed("Paid")) == "deferred"
    assert await life.runtime.get_instance("order", "k") is None
    await bench.die(life)

    life = await bench.live(saga)
    await published(life.runtime, keyed("Placed"))
    await life.runtime.settled()

    assert await seen(life.runtime, "order") == ["Placed", "Paid"]


async def test_a_message_that_waits_too_long_is_a_dead_letter(bench: Bench) -> None:
    life: Life = await bench.live(orders())
    await published(life.runtime, keyed("Paid"))

    await bench.advance("59m")
    assert await life.runtime.dead_letters() == []
    await bench.advance("2m")

    (letter,) = await life.runtime.dead_letters()
    assert (letter.type, letter.code) == ("Paid", "SAGA_INSTANCE_NOT_FOUND")


@pytest.mark.parametrize("saga", [orders(), joined_orders()], ids=["in a row", "together"])
async def test_every_order_of_messages_ends_in_the_same_state(store: SagaStore, saga: Any) -> None:
    async with SagaRuntime(store, definitions=[saga], clock=ManualClock()) as runtime:
        for number, names in enumerate(itertools.permutations(("Placed", "Paid", "Packed", "Shipped"))):
            messages = [
                SagaMessage(name, {"n": 1}, correlation_key=f"o-{number}", id=f"{name}-{number}")
                for name in (*names, names[number % 4])
            ]
            await asyncio.gather(*(runtime.publish(message) for message in messages))
        await runtime.settled()

        ends = [await runtime.get_instance("order", f"o-{number}") for number in range(24)]
    assert {(each.status, each.revision, each.state) for each in ends if each is not None} == {
        ("completed", 4, ends[0].state if ends[0] is not None else b"")
    }
    assert await check_invariants(store) == []
