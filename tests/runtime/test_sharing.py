"""Several runtimes on one store: each works on its share, and everybody's messages keep their order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import Any

import pytest

from sagaloom import SagasError, define_saga, saga_complete, schedule, send
from sagaloom.errors import BackendUnavailable, DeliveryFailed
from sagaloom.ids import key_hash, partition_of
from sagaloom.kv.presence import FilePresence
from sagaloom.ports.store import Holding, Lease
from sagaloom.runtime.deliveries import Delivery
from sagaloom.stores.kv import KvSagaStore
from tests.patience import PATIENCE_SECONDS
from tests.runtime.conftest import STORES, Bench, Life

__all__ = ["STORES"]

PARTITIONS = 64


def noting(saga: Any, event: Any, context: Any) -> list[Any]:
    saga.state = {"seen": [*saga.state["seen"], event.payload["n"]]}
    return []


NOTES = define_saga("notes").state({"seen": []}).on("Note", noting).build()
KEYED_NOTES = (
    define_saga("notes")
    .state({"seen": []})
    .on("Note", noting)
    .correlate(lambda message: message.payload["key"])
    .build()
)

CHARGES = (
    define_saga("charges")
    .state({})
    .on("Charge", lambda saga, event, context: [send("service:payments", event.payload)])
    .build()
)

RELAY = (
    define_saga("relay")
    .state({})
    .on(
        "Relay",
        lambda saga, event, context: [
            send("Note", {"n": event.payload["n"], "key": key}) for key in event.payload["to"]
        ],
    )
    .build()
)

REMINDERS = (
    define_saga("reminders")
    .state({})
    .on("Start", lambda saga, event, context: [schedule({"type": "Ring"}, "1h")])
    .on("Ring", lambda saga, event, context: [saga_complete({"rang": True})])
    .build()
)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110 - what is waited for happens in two runtimes, and has no event
            await asyncio.sleep(0.005)


def parts_of(life: Life) -> frozenset[int]:
    return frozenset(part for part in range(PARTITIONS) if life.runtime.holds(part))


def keys_held_by(life: Life, saga_id: str, count: int) -> list[str]:
    keys = (f"h-{n}" for n in range(10_000))
    held = (key for key in keys if life.runtime.holds(partition_of(key_hash(saga_id, key))))
    return [next(held) for _ in range(count)]


async def both(bench: Bench, *definitions: Any, **options: Any) -> tuple[Life, Life]:
    """Two lives that have shared the partitions out."""
    first = await bench.live(*definitions, **options)
    second = await bench.live(*definitions, **options)
    await until(lambda: len(parts_of(first)) == len(parts_of(second)) == PARTITIONS // 2)
    return first, second


async def test_a_newcomer_gets_its_fair_share_and_no_partition_has_two_holders(bench: Bench) -> None:
    first, second = await both(bench, NOTES)

    assert parts_of(first) | parts_of(second) == frozenset(range(PARTITIONS))
    assert not parts_of(first) & parts_of(second)


async def test_whoever_takes_a_message_in_it_is_applied_and_its_outcome_told(bench: Bench) -> None:
    first, second = await both(bench, NOTES)

    for n in range(20):
        for life in (first, second):
            outcome = await life.publish("Note", {"n": n}, key=f"k-{n}", wait=30)
            assert outcome.disposition == "applied"

    assert [(await first.instance("notes", f"k-{n}")).revision for n in range(20)] == [2] * 20


async def test_messages_of_one_instance_keep_the_order_of_acceptance_whoever_took_them_in(bench: Bench) -> None:
    lives = await both(bench, NOTES)

    for n in range(60):
        await asyncio.gather(*(lives[n % 2].publish("Note", {"n": n}, key=f"k-{k}") for k in range(5)))
    await until(lambda: all(life.runtime.health().backlog == 0 for life in lives))
    await lives[0].publish("Note", {"n": 60}, key="k-0", wait=30)

    for k in range(1, 5):
        outcome = await lives[1].publish("Note", {"n": 60}, key=f"k-{k}", wait=30)
        assert outcome.state == {"seen": list(range(61))}


async def test_a_message_accepted_twice_by_different_doors_is_applied_once(bench: Bench) -> None:
    first, second = await both(bench, NOTES)

    outcomes = [
        await life.publish("Note", {"n": 1}, key=f"k-{k}", idempotency_key="once", wait=30)
        for k in range(10)
        for life in (first, second)
    ]

    assert [outcome.disposition for outcome in outcomes] == ["applied", "duplicate"] * 10
    assert [(await first.instance("notes", f"k-{k}")).revision for k in range(10)] == [1] * 10


async def test_sends_to_sagas_reach_partitions_of_the_other(bench: Bench) -> None:
    first, second = await both(bench, RELAY, KEYED_NOTES)
    keys = [f"k-{n}" for n in range(12)]

    await first.publish("Relay", {"n": 7, "to": keys}, key="r", wait=30)
    await until(lambda: all(life.runtime.health().backlog == 0 for life in (first, second)))
    for key in keys:
        outcome = await second.publish("Note", {"n": 8, "key": key}, wait=30)
        assert outcome.state == {"seen": [7, 8]}


async def test_when_one_dies_the_other_takes_everything_over(bench: Bench) -> None:
    first, second = await both(bench, CHARGES)
    bench.receiver.gate = asyncio.Event()  # so that charges are committed, and do not leave
    for n in range(20):
        await first.publish("Charge", {"n": n}, key=f"k-{n}")

    await bench.die(first)
    bench.receiver.gate.set()
    await until(lambda: len(parts_of(second)) == PARTITIONS)
    await second.runtime.settled()

    assert {effect.key for effect in bench.receiver.got} == {f"k-{n}" for n in range(20)}
    assert len({effect.effect_key for effect in bench.receiver.got}) == 20


async def test_when_one_ends_properly_nothing_is_delivered_twice(bench: Bench) -> None:
    first, second = await both(bench, CHARGES)
    for n in range(20):
        await first.publish("Charge", {"n": n}, key=f"k-{n}")

    await bench.end(first)
    await until(lambda: len(parts_of(second)) == PARTITIONS)
    await second.runtime.settled()

    assert sorted(effect.key for effect in bench.receiver.got) == sorted(f"k-{n}" for n in range(20))


async def test_timers_fire_once_whoever_set_them(bench: Bench) -> None:
    first, second = await both(bench, REMINDERS)
    for n in range(20):
        await first.publish("Start", key=f"k-{n}", wait=30)

    await bench.die(first)
    await until(lambda: len(parts_of(second)) == PARTITIONS)
    await bench.advance("1h")

    found = [await second.instance("reminders", f"k-{n}") for n in range(20)]
    assert [(instance.status, instance.revision) for instance in found] == [("completed", 2)] * 20


async def test_one_who_does_not_work_takes_messages_in_for_those_who_do(bench: Bench) -> None:
    worker = await bench.live(NOTES)
    door = await bench.live(NOTES, works=False)

    outcomes = [await door.publish("Note", {"n": n}, key="k", wait=30) for n in range(5)]

    assert [outcome.state["seen"] for outcome in outcomes] == [list(range(n + 1)) for n in range(5)]
    assert len(parts_of(worker)) == PARTITIONS
    assert not parts_of(door)


async def test_messages_for_nobody_wait_for_the_first_worker(bench: Bench) -> None:
    door = await bench.live(NOTES, works=False)
    accepted = await door.publish("Note", {"n": 1}, key="k", wait=0.05)

    await bench.live(NOTES)
    outcome = await door.publish("Note", {"n": 2}, key="k", wait=30)

    assert accepted.disposition == "pending"
    assert outcome.state == {"seen": [1, 2]}


async def test_one_who_was_stopped_past_its_lease_is_refused_and_joins_again(bench: Bench) -> None:
    sleeper, other = await both(bench, NOTES, lease_seconds=0.3)
    await sleeper.publish("Note", {"n": 0}, key="k", wait=30)

    # The loop of the sleeper stands still: its lease runs out, while its lock is still there.
    sleeper.runtime.store._tenure._presence.renew = lambda: True  # type: ignore[attr-defined]
    await until(lambda: len(parts_of(other)) == PARTITIONS)
    del sleeper.runtime.store._tenure._presence.renew  # type: ignore[attr-defined]
    outcomes = [await sleeper.publish("Note", {"n": n}, key=f"k-{n}", wait=30) for n in range(10)]
    await until(lambda: len(parts_of(sleeper)) == PARTITIONS // 2)

    assert [outcome.disposition for outcome in outcomes] == ["applied"] * 10
    assert not parts_of(sleeper) & parts_of(other)


async def test_three_share_alike_and_those_who_are_left_share_again(bench: Bench) -> None:
    lives = [await bench.live(NOTES) for _ in range(3)]
    await until(lambda: sorted(len(parts_of(life)) for life in lives) in ([20, 22, 22], [21, 21, 22]))

    await bench.die(lives[0])

    await until(lambda: [len(parts_of(life)) for life in lives[1:]] == [32, 32])


async def test_one_who_comes_while_another_gets_its_share_gets_one_too(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await bench.live(NOTES, lease_seconds=600.0)
    kind = type(first.runtime.store)
    tend: Callable[..., Any] = kind.tend
    lives = [first]
    third_is_due = True

    async def tend_slowly(store: Any, lease: Lease, *, give_up: Collection[int] = ()) -> Holding:
        nonlocal third_is_due
        if give_up and third_is_due:  # Whoever takes what is given may not be up yet.
            third_is_due = False
            lives.append(await bench.live(NOTES, lease_seconds=600.0))
            first.runtime._receiver.share._must_tend = False  # It came too early to be heard of now.
        holding: Holding = await tend(store, lease, give_up=give_up)
        return holding

    monkeypatch.setattr(kind, "tend", tend_slowly)
    lives.append(await bench.live(NOTES, lease_seconds=600.0))

    await until(lambda: sorted(len(parts_of(life)) for life in lives) in ([20, 22, 22], [21, 21, 22]))


async def test_an_operator_reaches_a_run_that_another_process_holds(bench: Bench) -> None:
    lives = await both(bench, NOTES)
    for n in range(8):
        await lives[0].publish("Note", {"n": 0}, key=f"k-{n}", wait=30)

    outcomes = [await lives[n % 2].runtime.cancel("notes", f"k-{n}", reason="enough") for n in range(8)]

    assert [(outcome.disposition, outcome.status) for outcome in outcomes] == [("applied", "cancelled")] * 8


async def test_a_pause_holds_whoever_takes_messages_in(bench: Bench) -> None:
    first, second = await both(bench, NOTES)
    for key in ("k-0", "k-1", "k-2", "k-3"):
        await first.publish("Note", {"n": 0}, key=key, wait=30)
        await second.runtime.pause("notes", key)
        waits = [(await life.publish("Note", {"n": 1}, key=key, wait=0.05)).disposition for life in (first, second)]

        await first.runtime.resume("notes", key)
        outcome = await second.publish("Note", {"n": 2}, key=key, wait=30)

        assert waits == ["pending", "pending"]
        assert outcome.state == {"seen": [0, 1, 1, 2]}


async def test_dead_letters_are_repaired_whoever_is_asked(bench: Bench) -> None:
    first, second = await both(bench, CHARGES)
    bench.receiver.answer = lambda effect: DeliveryFailed("refused", retryable=False)
    for n in range(8):
        await first.publish("Charge", {"n": n}, key=f"k-{n}", wait=30)
    await until(lambda: sum(life.runtime.health().stalled_lanes for life in (first, second)) == 8)
    bench.receiver.answer = lambda effect: ()
    bench.receiver.got.clear()

    letters = await first.runtime.dead_letters()
    for n, letter in enumerate(letters):
        repair = second.runtime.redrive if n % 2 else second.runtime.discard
        await repair(letter.id)
    await until(lambda: len(bench.receiver.got) == 4)
    await until(lambda: sum(life.runtime.health().outbox for life in (first, second)) == 0)

    assert await first.runtime.dead_letters() == []
    assert {effect.key for effect in bench.receiver.got} == {letter.key for letter in letters[1::2]}
    assert not await first.runtime.store.inbox_page(after=None, limit=10)


async def test_a_discarded_key_is_free_for_everybody(bench: Bench) -> None:
    def failing(saga: Any, event: Any, context: Any) -> list[Any]:
        if event.payload["n"] < 0:
            raise SagasError("below zero", retryable=False)
        return []

    lives = await both(bench, define_saga("numbers").state({}).on("Number", failing).build())
    for n in range(6):
        given_up = await lives[0].publish("Number", {"n": -1}, key=f"k-{n}", idempotency_key="one", wait=30)
        for letter in await lives[1].runtime.dead_letters():
            await lives[1].runtime.discard(letter.id)

        outcomes = [
            await life.publish("Number", {"n": 1}, key=f"k-{n}", idempotency_key="one", wait=30) for life in lives
        ]

        assert given_up.disposition == "dead_lettered"
        assert [outcome.disposition for outcome in outcomes] == ["applied", "duplicate"]


# -- what a strict reader doubts --------------------------------------------------------------------------------------


async def both_but_untold(bench: Bench, monkeypatch: pytest.MonkeyPatch, *definitions: Any) -> tuple[Life, Life]:
    """Two lives that do not tell each other what they bring, as when a nudge comes late."""
    lives = await both(bench, *definitions)
    monkeypatch.setattr(FilePresence, "nudge", lambda presence: None)
    return lives


async def test_what_another_process_took_in_comes_before_what_the_holder_takes_in_next(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = define_saga("opened").state({"seen": []}).on("Open", noting).on("Note", noting, starts=False).build()
    holder, other = await both_but_untold(bench, monkeypatch, opened)
    keys = keys_held_by(holder, "opened", 20)

    for key in keys:
        await other.publish("Open", {"n": 0}, key=key)
        await holder.publish("Note", {"n": 1}, key=key)
    outcomes = await asyncio.gather(*(other.publish("Note", {"n": 2}, key=key, wait=30) for key in keys))

    assert [outcome.state for outcome in outcomes] == [{"seen": [0, 1, 2]}] * 20
    assert await holder.runtime.dead_letters() == []


async def test_messages_behind_a_failing_starter_keep_their_order_whoever_took_them_in(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing_at_first(saga: Any, event: Any, context: Any) -> list[Any]:
        if event.payload["n"] == 0 and context.attempt == 1:
            raise ConnectionError("not yet")
        return noting(saga, event, context)

    late = define_saga("late").state({"seen": []}).on("Note", failing_at_first).build()
    holder, other = await both_but_untold(bench, monkeypatch, late)
    keys = keys_held_by(holder, "late", 20)

    for key in keys:
        for n, life in enumerate((holder, other, holder)):
            await life.publish("Note", {"n": n}, key=key)
    await bench.advance("10s")
    outcomes = await asyncio.gather(*(other.publish("Note", {"n": 3}, key=key, wait=30) for key in keys))

    assert [outcome.state for outcome in outcomes] == [{"seen": [0, 1, 2, 3]}] * 20


async def test_a_send_to_a_saga_comes_behind_what_another_process_took_in_before_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder, other = await both_but_untold(bench, monkeypatch, RELAY, KEYED_NOTES)
    relays = keys_held_by(holder, "relay", 20)
    keys = keys_held_by(holder, "notes", 20)
    for key in keys:
        await holder.publish("Note", {"n": 0, "key": key}, wait=30)

    for relay, key in zip(relays, keys, strict=True):
        await other.publish("Note", {"n": 1, "key": key})
        await holder.publish("Relay", {"n": 2, "to": [key]}, key=relay)
    await until(lambda: all(life.runtime.health().backlog == 0 for life in (holder, other)))
    outcomes = await asyncio.gather(*(other.publish("Note", {"n": 3, "key": key}, wait=30) for key in keys))

    assert [outcome.state for outcome in outcomes] == [{"seen": [0, 1, 2, 3]}] * 20


@pytest.mark.parametrize("reads_some", [False, True])
async def test_effects_of_a_partition_that_could_not_be_read_at_once_are_delivered_later(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, reads_some: bool
) -> None:
    first, second = await both(bench, CHARGES)
    bench.receiver.gate = asyncio.Event()
    for key in keys_held_by(first, "charges", 10):
        await first.publish("Charge", {}, key=key, wait=30)
    dispatcher = second.runtime._dispatcher
    load = dispatcher.load

    async def load_and_fail(parts: Collection[int]) -> None:
        monkeypatch.setattr(dispatcher, "load", load)
        if reads_some:
            await load(parts)
        raise BackendUnavailable("the disk has hiccups")

    monkeypatch.setattr(dispatcher, "load", load_and_fail)
    await bench.die(first)
    bench.receiver.gate.set()
    await until(lambda: len(parts_of(second)) == PARTITIONS)
    await second.runtime.settled()

    assert len({effect.effect_key for effect in bench.receiver.got}) == 10
    assert second.runtime.health().outbox == 0


async def test_whoever_waits_for_another_process_is_answered_though_the_store_failed_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder, other = await both(bench, NOTES)
    (key,) = keys_held_by(holder, "notes", 1)
    history = other.runtime.store.history

    async def fail(*_: object, **__: object) -> object:
        monkeypatch.setattr(other.runtime.store, "history", history)
        raise BackendUnavailable("the disk has hiccups")

    monkeypatch.setattr(other.runtime.store, "history", fail)
    outcome = await other.publish("Note", {"n": 1}, key=key, wait=30)

    assert outcome.disposition == "applied"


async def test_one_who_is_taken_for_dead_while_it_starts_begins_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    tend = KvSagaStore.tend

    async def tend_too_late(store: KvSagaStore, lease: Lease, *, give_up: Collection[int] = ()) -> Holding:
        monkeypatch.setattr(KvSagaStore, "tend", tend)
        await store.release(lease)
        return await store.tend(lease, give_up=give_up)

    monkeypatch.setattr(KvSagaStore, "tend", tend_too_late)
    life = await bench.live(NOTES)

    assert len(parts_of(life)) == PARTITIONS
    assert (await life.publish("Note", {"n": 1}, key="k", wait=30)).disposition == "applied"


async def test_rows_that_could_not_be_queued_at_once_are_queued_later(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing_at_first(saga: Any, event: Any, context: Any) -> list[Any]:
        if context.attempt == 1:
            raise ConnectionError("not yet")
        return []

    first, second = await both(bench, define_saga("late").state({}).on("Note", failing_at_first).build())
    (key,) = keys_held_by(first, "late", 1)
    await first.publish("Note", {}, key=key)
    load = second.runtime.store.load

    async def fail(*_: object, **__: object) -> object:
        monkeypatch.setattr(second.runtime.store, "load", load)
        raise BackendUnavailable("the disk has hiccups")

    monkeypatch.setattr(second.runtime.store, "load", fail)
    await bench.die(first)
    await until(lambda: len(parts_of(second)) == PARTITIONS and second.runtime.health().backlog == 1)
    await bench.advance("1m")

    assert (await second.instance("late", key)).revision == 1


async def test_a_door_reads_the_head_of_a_key_that_another_process_holds_once(bench: Bench) -> None:
    holder, other = await both(bench, NOTES)
    (key,) = keys_held_by(holder, "notes", 1)
    loaded: list[tuple[str, str]] = []
    load = other.runtime.store.load

    async def noted(keys: Any, **options: Any) -> Any:
        loaded.extend(keys)
        return await load(keys, **options)

    other.runtime.store.load = noted  # type: ignore[method-assign]
    for n in range(3):
        await other.publish("Note", {"n": n}, key=key)
    other.runtime.store.load = load  # type: ignore[method-assign]
    last = await holder.publish("Note", {"n": 3}, key=key, wait=30)

    assert loaded == [("notes", key)]
    assert last.state == {"seen": [0, 1, 2, 3]}


async def test_a_repeat_at_a_door_that_remembers_the_key_is_told_what_became_of_the_first(bench: Bench) -> None:
    holder, other = await both(bench, NOTES)
    (key,) = keys_held_by(holder, "notes", 1)
    first = await other.publish("Note", {"n": 1}, key=key, idempotency_key="once", wait=30)

    again = await other.publish("Note", {"n": 1}, key=key, idempotency_key="once")

    assert (first.disposition, again.disposition) == ("applied", "duplicate")
    assert (again.message_id, again.status, again.revision) == (first.message_id, "running", 1)
    assert again.state == {"seen": [1]}


async def test_a_row_of_a_partition_that_another_process_holds_is_not_brought_there_again(bench: Bench) -> None:
    def failing(saga: Any, event: Any, context: Any) -> list[Any]:
        raise ConnectionError("not yet")

    holder, other = await both(bench, define_saga("late").state({}).on("Note", failing).build())
    (key,) = keys_held_by(holder, "late", 1)
    await holder.publish("Note", {}, key=key)
    (row,) = await holder.runtime.store.inbox_page(after=None, limit=10)

    stray = Delivery(row.envelope, (row.envelope.saga_id, row.envelope.key), row.ref)
    other.runtime._receiver.offer(stray)
    await other.runtime.settled()

    assert await holder.runtime.store.inbox_page(after=None, limit=10) == [row]


async def test_a_message_whose_saga_its_holder_does_not_know_waits_for_one_who_does(bench: Bench) -> None:
    newer = await bench.live(NOTES, CHARGES)
    older = await bench.live(CHARGES)  # a release is under way: this one has not been restarted yet
    await until(lambda: len(parts_of(newer)) == len(parts_of(older)) == PARTITIONS // 2)
    for n in range(12):
        await newer.publish("Note", {"n": 1}, key=f"k-{n}")
    await until(lambda: older.runtime.health().backlog > 0)

    await bench.end(older)
    await until(lambda: len(parts_of(newer)) == PARTITIONS)
    await bench.advance("5s")

    assert await newer.runtime.dead_letters() == []
    assert [(await newer.instance("notes", f"k-{n}")).revision for n in range(12)] == [1] * 12


async def test_a_message_whose_saga_nobody_knows_is_given_up_in_the_end(bench: Bench) -> None:
    newer = await bench.live(NOTES, CHARGES)
    others = [await bench.live(CHARGES), await bench.live(CHARGES)]
    for n in range(6):
        await newer.publish("Note", {"n": 1}, key=f"k-{n}")
    applied = [await newer.runtime.get_instance("notes", f"k-{n}") for n in range(6)]
    await bench.end(newer)
    await until(lambda: sum(len(parts_of(life)) for life in others) == PARTITIONS)

    for _ in range(3):
        await bench.advance("30m")
    waiting = [found is None or found.run == 0 for found in applied]

    assert len(await others[0].runtime.dead_letters()) == sum(waiting)
