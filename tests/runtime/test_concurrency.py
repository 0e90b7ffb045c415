"""Slots: how many messages of a saga are under way at once, on every store and over processes."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from sagaloom import RetryPolicy, SagaMessage, define_saga, saga_complete, send
from sagaloom.engine.records import HeldSlot
from sagaloom.ports.store import SagaStore
from sagaloom.runtime import PublishReceipt, PublishRejected, SagaRuntime, create_durable_saga_runtime
from sagaloom.service.metrics import metrics_text
from sagaloom.testing import ManualClock, MemoryStore, check_invariants
from tests.patience import PATIENCE_SECONDS
from tests.runtime.conftest import STORES, Bench
from tests.runtime.test_sharing import keys_held_by, parts_of, until
from tests.schemas import Schema

__all__ = ["STORES"]

FAILS: set[str] = set()
"""The correlation keys whose handlers raise."""


def work(saga: Any, event: Any, context: Any) -> Any:
    if context.correlation_key in FAILS:
        raise RuntimeError("not now")
    saga.state["done"] += 1
    return []


def jobs(limit: int = 1, on_limit: Any = "reject", key: Any = None, attempts: int = 5) -> Any:
    return (
        define_saga("jobs")
        .state({"done": 0})
        .on("Work", work)
        .on("Stop", lambda saga, event, context: [saga_complete()], starts=False)
        .concurrency(limit, key, on_limit=on_limit)
        .retry(RetryPolicy(maximum_attempts=attempts, jitter=0))
        .build()
    )


RELAY = (
    define_saga("relay")
    .state({})
    .on(
        "Relay",
        lambda saga, event, context: [
            send("saga:jobs", SagaMessage("Work", {}, correlation_key=event.payload["to"], id=f"r-{event.id}"))
        ],
    )
    .build()
)


@pytest.fixture(autouse=True)
def nothing_fails() -> None:
    FAILS.clear()


async def works(runtime: SagaRuntime, key: str, **fields: Any) -> str:
    """Publishes to one instance, and says what came of it."""
    wait = fields.pop("wait", None)
    receipt = await runtime.publish(
        SagaMessage("Work", fields.pop("payload", {}), correlation_key=key, **fields), wait=wait
    )
    if isinstance(receipt, PublishRejected):
        return receipt.code
    assert isinstance(receipt, PublishReceipt)
    return receipt.outcomes[0].disposition


async def done(runtime: SagaRuntime, key: str) -> int:
    instance = await runtime.get_instance("jobs", key)
    return 0 if instance is None else int(instance.state.split(b":")[1].strip(b" }"))


async def holders(store: SagaStore) -> list[str]:
    return [held.correlation_key for held in await store.slots("jobs")]


async def recovered(runtime: SagaRuntime, clock: ManualClock) -> None:
    """Lets everything that fails be tried again, and succeed."""
    FAILS.clear()
    clock.advance("2m")
    await until(lambda: runtime.health().backlog == 0)
    await runtime.settled()


async def test_a_message_that_is_being_retried_holds_its_slot_and_the_next_one_is_refused(store: SagaStore) -> None:
    clock = ManualClock()
    async with SagaRuntime(store, definitions=[jobs()], clock=clock) as runtime:
        FAILS.add("a")
        assert await works(runtime, "a") == "pending"
        assert await holders(store) == ["a"]

        receipt = await runtime.publish(SagaMessage("Work", {}, correlation_key="b", id="m-b"))

        assert isinstance(receipt, PublishRejected)
        assert (receipt.code, receipt.retryable) == ("SAGA_CONCURRENCY_LIMITED", True)
        assert receipt.error.data["concurrencyKey"] == "global"
        assert await runtime.get_instance("jobs", "b") is None
        await recovered(runtime, clock)
        assert await holders(store) == []
        assert await works(runtime, "b", id="m-b") == "applied"
        assert [await done(runtime, key) for key in "ab"] == [1, 1]
    assert await check_invariants(store) == []


async def test_messages_that_are_settled_at_once_hold_nothing(store: SagaStore) -> None:
    async with SagaRuntime(store, definitions=[jobs()], clock=ManualClock()) as runtime:
        ends = await asyncio.gather(*(works(runtime, f"k-{n}") for n in range(20)))

        assert set(ends) == {"applied"}
        assert await holders(store) == []


async def test_no_more_messages_hold_a_slot_than_there_are_in_one_batch(store: SagaStore) -> None:
    clock = ManualClock()
    async with SagaRuntime(store, definitions=[jobs(limit=3)], clock=clock) as runtime:
        FAILS.update(f"k-{n}" for n in range(8))

        ends = await asyncio.gather(*(works(runtime, f"k-{n}") for n in range(8)))

        assert sorted(ends) == ["SAGA_CONCURRENCY_LIMITED"] * 5 + ["pending"] * 3
        assert len(await holders(store)) == 3
        assert runtime.counters.throttled["jobs"] == 5
        assert 'sagaloom_messages_throttled_total{saga="jobs"} 5' in metrics_text(runtime)
        await recovered(runtime, clock)
        assert await holders(store) == []


async def test_each_concurrency_key_has_slots_of_its_own(store: SagaStore) -> None:
    saga = jobs(key=lambda message: message.payload["customer"])
    async with SagaRuntime(store, definitions=[saga], clock=ManualClock()) as runtime:
        FAILS.add("a")
        await works(runtime, "a", payload={"customer": "ann"})

        assert await works(runtime, "b", payload={"customer": "bob"}) == "applied"
        assert await works(runtime, "c", payload={"customer": "ann"}) == "SAGA_CONCURRENCY_LIMITED"
        # A message's own key goes before the saga's.
        assert await works(runtime, "d", payload={"customer": "ann"}, concurrency_key="own") == "applied"
        assert [held.key for held in await store.slots("jobs")] == ["ann"]


@pytest.mark.parametrize("key", [lambda message: message.payload["nobody"], lambda message: 7, lambda message: ""])
async def test_a_concurrency_key_that_is_none_is_refused_at_the_door(store: SagaStore, key: Any) -> None:
    async with SagaRuntime(store, definitions=[jobs(key=key)], clock=ManualClock()) as runtime:
        assert await works(runtime, "a") == "VALIDATION_ERROR"


async def test_with_wait_a_message_is_accepted_and_waits_its_turn(store: SagaStore) -> None:
    clock = ManualClock()
    async with SagaRuntime(store, definitions=[jobs(on_limit="wait")], clock=clock) as runtime:
        FAILS.add("a")
        await works(runtime, "a")

        assert [await works(runtime, key) for key in ("b", "c", "b")] == ["pending"] * 3
        assert await holders(store) == ["a"]
        assert len(await store.inbox_page(after=None, limit=10)) == 4
        await recovered(runtime, clock)

        assert [await done(runtime, key) for key in "abc"] == [1, 2, 1]
        assert await holders(store) == []
    assert await check_invariants(store) == []


async def test_a_message_from_a_saga_waits_for_a_slot(store: SagaStore) -> None:
    clock = ManualClock()
    async with SagaRuntime(store, definitions=[jobs(), RELAY], clock=clock) as runtime:
        FAILS.add("a")
        await works(runtime, "a")
        await runtime.publish(SagaMessage("Relay", {"to": "b"}, id="relay-1"))
        await runtime.settled()
        assert await done(runtime, "b") == 0

        await recovered(runtime, clock)

        assert await done(runtime, "b") == 1
        assert await holders(store) == []


async def test_a_dead_letter_gives_its_slot_back(store: SagaStore) -> None:
    clock = ManualClock()
    async with SagaRuntime(store, definitions=[jobs(attempts=2)], clock=clock) as runtime:
        FAILS.add("a")
        await works(runtime, "a")
        clock.advance("1m")
        await until(lambda: runtime.health().backlog == 0)
        await runtime.settled()

        (letter,) = await runtime.dead_letters()
        assert await holders(store) == []
        assert await works(runtime, "b") == "applied"
        FAILS.clear()
        await runtime.redrive(letter.id)
        await runtime.settled()
        assert await done(runtime, "a") == 1


async def test_a_message_to_a_paused_run_holds_its_slot_from_its_acceptance(store: SagaStore) -> None:
    async with SagaRuntime(store, definitions=[jobs()], clock=ManualClock()) as runtime:
        await works(runtime, "a")
        await runtime.pause("jobs", "a")
        assert await works(runtime, "a") == "pending"
        assert await works(runtime, "b") == "SAGA_CONCURRENCY_LIMITED"

        await runtime.resume("jobs", "a")
        await runtime.settled()

        assert await holders(store) == []
        assert await works(runtime, "b") == "applied"


async def test_a_refused_publish_can_be_repeated_under_its_id(store: SagaStore) -> None:
    clock = ManualClock()
    async with SagaRuntime(store, definitions=[jobs()], clock=clock) as runtime:
        FAILS.add("a")
        await works(runtime, "a")
        assert await works(runtime, "b", id="m-1") == "SAGA_CONCURRENCY_LIMITED"
        await recovered(runtime, clock)

        assert [await works(runtime, "b", id="m-1") for _ in range(2)] == ["applied", "duplicate"]


async def test_a_message_whose_slot_was_taken_by_one_behind_it_goes_first() -> None:
    store, clock = MemoryStore(), ManualClock()
    async with SagaRuntime(store, definitions=[jobs(), RELAY], clock=clock) as runtime:
        store.slots_by_place["jobs", "global", 0] = HeldSlot("jobs", "global", 0, "elsewhere", "m-1", clock.now())
        await runtime.publish(SagaMessage("Relay", {"to": "x"}, id="relay-1"))
        await runtime.settled()
        assert await done(runtime, "x") == 0
        # Another process gives it back, and before we look, somebody from the door takes it behind the one that waits.
        store.slots_by_place.clear()
        assert await works(runtime, "x") == "pending"
        assert await holders(store) == ["x"]

        clock.advance("1s")
        await until(lambda: runtime.health().backlog == 0)
        await runtime.settled()

        assert await done(runtime, "x") == 2
        assert await holders(store) == []


async def test_signals_and_controls_need_no_slot(store: SagaStore) -> None:
    async with SagaRuntime(store, definitions=[jobs()], clock=ManualClock()) as runtime:
        await works(runtime, "b")
        FAILS.add("a")
        await works(runtime, "a")

        outcome = await runtime.cancel("jobs", "b")

        assert outcome.status == "cancelled"


async def test_a_slot_is_held_across_processes_and_outlives_no_takeover(bench: Bench) -> None:
    saga = jobs()
    one = await bench.live(saga)
    other = await bench.live(saga)
    await until(lambda: bool(parts_of(one)) and bool(parts_of(other)))
    (mine,), (theirs,) = keys_held_by(one, "jobs", 1), keys_held_by(other, "jobs", 1)
    FAILS.add(mine)
    assert await works(one.runtime, mine) == "pending"

    assert await works(other.runtime, theirs) == "SAGA_CONCURRENCY_LIMITED"
    await bench.die(one)
    await until(lambda: len(parts_of(other)) == 64)
    assert await holders(other.runtime.store) == [mine]
    await recovered(other.runtime, bench.clock)

    assert await holders(other.runtime.store) == []
    assert await works(other.runtime, theirs) == "applied"


async def test_a_slot_that_another_process_gives_back_is_found_by_looking_again(bench: Bench) -> None:
    saga = jobs(on_limit="wait")
    one = await bench.live(saga)
    other = await bench.live(saga)
    await until(lambda: bool(parts_of(one)) and bool(parts_of(other)))
    (mine,), (theirs,) = keys_held_by(one, "jobs", 1), keys_held_by(other, "jobs", 1)
    FAILS.add(mine)
    await works(one.runtime, mine)
    assert await works(other.runtime, theirs) == "pending"

    FAILS.clear()
    async with asyncio.timeout(PATIENCE_SECONDS):
        while await done(other.runtime, theirs) == 0:
            bench.clock.advance("1s")
            await asyncio.sleep(0.01)

    assert await holders(one.runtime.store) == []


HOLDER = """
import asyncio, sys
sys.path.insert(0, {root!r})
from tests.runtime import test_concurrency as there
from sagaloom.runtime import create_durable_saga_runtime

async def main():
    there.FAILS.add("a")
    made = await create_durable_saga_runtime(url={url!r}, definitions=[there.jobs()]) if {url!r} else (
        await create_durable_saga_runtime("kv", path={path!r}, definitions=[there.jobs()]))
    await made.runtime.start()
    print(await there.works(made.runtime, "a"), flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize(
    "any_store_kind", ["embedded", pytest.param("postgres", marks=pytest.mark.server("postgres"))], indirect=True
)
async def test_no_slot_survives_its_message_when_its_process_is_killed(
    any_store_kind: str, schema_if_asked: Schema | None, tmp_path: Path
) -> None:
    url = schema_if_asked.url if schema_if_asked is not None else None
    script = HOLDER.format(root=str(Path(__file__).parents[2]), url=url, path=str(tmp_path / "killed.db"))
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    assert await asyncio.wait_for(process.stdout.readline(), PATIENCE_SECONDS) == b"pending\n"
    process.send_signal(signal.SIGKILL)
    await process.wait()

    made = await create_durable_saga_runtime(
        "sql" if url else "kv", definitions=[jobs()], **({"url": url} if url else {"path": tmp_path / "killed.db"})
    )
    async with made:
        store = made.store
        assert await holders(store) == ["a"]
        async with asyncio.timeout(PATIENCE_SECONDS):
            while await holders(store):  # noqa: ASYNC110 - the next attempt is a second away, in real time
                await asyncio.sleep(0.05)

        assert await done(made.runtime, "a") == 1
        assert await works(made.runtime, "b") == "applied"
