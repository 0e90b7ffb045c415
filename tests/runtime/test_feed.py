"""The live feed: no gap, no repeat, resets where it cannot go on, one reader for all, and no work for nobody (I8)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from sagaloom import SagasError, define_saga, saga_compensate, saga_complete, saga_fail, send
from sagaloom.engine.records import FeedEvent, FeedKind, FeedMoment, FeedRecord
from sagaloom.errors import BackendUnavailable, MessageRejected
from sagaloom.kv.sqlite import SqliteKeyValue
from sagaloom.ports.store import Lease, UnitOfWork
from sagaloom.runtime.feed import FeedHub, FeedReset, FeedWatch, WatchedEvent, cursor_of
from sagaloom.runtime.runtime import SagaRuntime
from sagaloom.stores.kv import KvSagaStore
from sagaloom.testing import ManualClock, MemoryStore, RecordingStore
from sagaloom.testing.contracts.sagastore.samples import NOW, write
from tests.patience import PATIENCE_SECONDS
from tests.runtime.conftest import Bench

pytestmark = pytest.mark.anyio

STORE_ID = "0123456789abcdef0123456789abcdef"


def event(n: int, saga_id: str = "orders", key: str = "o-1", kind: str = "saga:state_changed") -> FeedEvent:
    return FeedEvent(kind, NOW, saga_id, key, 1, n, "running", "Added", f"m-{n}")


def shown_as(*events: FeedEvent) -> tuple[FeedRecord, ...]:
    """What a unit has to carry for the feed to show `events`."""
    return tuple(
        FeedRecord(
            event.at,
            event.saga_id,
            event.key,
            event.run,
            event.revision,
            event.message_type,
            event.message_id,
            (FeedMoment(FeedKind[event.type.removeprefix("saga:").upper()], event.status),),
        )
        for event in events
    )


class Feed:
    """A hub over a store whose commits are events and nothing else."""

    def __init__(self, store: Any, lease: Lease) -> None:
        self.store = store
        self.lease = lease
        self.hub = FeedHub(store, ManualClock())
        self.written = 0

    async def add(self, count: int = 1, **more: Any) -> None:
        """Commits `count` events, and says so as the receiver does."""
        events = tuple(event(self.written + n + 1, **more) for n in range(count))
        self.written += count
        await write(self.store, self.lease, UnitOfWork(part=0, feed=shown_as(*events)))
        self.hub.committed()

    def cursor(self, number: int) -> str:
        return self.hub.cursor_of(number)


@pytest.fixture
async def feed() -> AsyncIterator[Feed]:
    store = RecordingStore(MemoryStore())
    made = Feed(store, await store.acquire("worker-1", now=NOW))
    yield made
    made.hub.close("stopped")


async def take(watch: FeedWatch, count: int) -> list[tuple[str, WatchedEvent]]:
    """The next `count` events, within seconds."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        return [await anext(watch) for _ in range(count)]


async def numbers(watch: FeedWatch, count: int) -> list[int]:
    """The numbers of the next `count` events."""
    return [int(cursor) % 10_000_000_000 for cursor, _ in await take(watch, count)]


async def waits(watch: FeedWatch) -> bool:
    """Whether the next read does not end by itself, as far as a few rounds of the loop can tell."""
    reading = asyncio.ensure_future(anext(watch))
    for _ in range(20):
        await asyncio.sleep(0)
    is_waiting = not reading.done()
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    return is_waiting


async def rounds(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


# --- Positions -------------------------------------------------------------------------------------------------------


async def test_a_watch_without_a_cursor_begins_now(feed: Feed) -> None:
    await feed.add(3)
    async with feed.hub.watch() as watch:
        await feed.add(2)

        assert await numbers(watch, 2) == [4, 5]
        assert await waits(watch)


async def test_a_watch_from_zero_sees_all_that_is_kept(feed: Feed) -> None:
    await feed.add(600)

    found = await take(feed.hub.watch(after=0), 600)

    assert [cursor for cursor, _ in found] == [feed.cursor(n) for n in range(1, 601)]
    assert [seen.message_id for _, seen in found if isinstance(seen, FeedEvent)] == [f"m-{n}" for n in range(1, 601)]


@pytest.mark.parametrize("form", [int, str])
async def test_a_watch_goes_on_behind_the_cursor_it_is_given(feed: Feed, form: type) -> None:
    await feed.add(5)

    assert await numbers(feed.hub.watch(after=form(feed.cursor(3))), 2) == [4, 5]


async def test_a_small_number_counts_from_the_first_event_of_the_store(feed: Feed) -> None:
    await feed.add(5)

    assert await numbers(feed.hub.watch(after=3), 2) == [4, 5]
    assert await numbers(feed.hub.watch(after="3"), 2) == [4, 5]


async def test_the_cursor_of_the_newest_event_waits_for_the_next(feed: Feed) -> None:
    await feed.add(5)
    watch = feed.hub.watch(after=feed.cursor(5))

    assert await waits(watch)
    await feed.add()
    assert await numbers(watch, 1) == [6]


async def test_the_first_cursor_of_an_empty_feed_is_where_it_begins(feed: Feed) -> None:
    async with feed.hub.watch() as watch:
        assert watch.cursor == feed.cursor(0)
        await feed.add()

        assert await numbers(watch, 1) == [1]


def test_cursors_count_by_one_and_tell_stores_apart() -> None:
    here, there = cursor_of(STORE_ID, 1), cursor_of(STORE_ID[::-1], 1)

    assert int(cursor_of(STORE_ID, 2)) - int(here) == 1
    assert int(here) // 10_000_000_000 != int(there) // 10_000_000_000
    assert int(cursor_of(STORE_ID, 9_999_999_999)) < 2**53


@pytest.mark.parametrize("after", ["", "abc", "-1", -1, 1.5, "1.5", True, "٣", "1" * 21, " 1", b"1"])
async def test_what_is_no_cursor_is_refused_by_name(feed: Feed, after: Any) -> None:
    with pytest.raises(MessageRejected, match="is no cursor of the feed"):
        feed.hub.watch(after=after)


async def test_the_cursor_of_a_watch_moves_over_what_its_filter_leaves_out(feed: Feed) -> None:
    await feed.add(2)
    watch = feed.hub.watch(after=0, key="o-9")
    assert watch.cursor is None

    await watch.next_page()

    assert watch.cursor == feed.cursor(2)


async def test_the_cursor_of_a_watch_does_not_run_ahead_of_what_was_given_out(feed: Feed) -> None:
    await feed.add(5)
    watch = feed.hub.watch(after=0)

    await take(watch, 2)

    assert watch.cursor == feed.cursor(2)
    assert await numbers(feed.hub.watch(after=watch.cursor), 3) == [3, 4, 5]


# --- Resets ----------------------------------------------------------------------------------------------------------


async def resets(watch: FeedWatch) -> list[str]:
    """How the watch begins: the reason of its reset, and the numbers of the two events behind it."""
    (cursor, reset), *rest = await take(watch, 3)
    assert isinstance(reset, FeedReset)
    assert reset.type == "reset"
    assert int(cursor) + 1 == int(reset.oldest) == int(rest[0][0])
    return [reset.reason, *(str(int(number) % 10_000_000_000) for number, _ in rest)]


async def test_a_cursor_from_the_future_is_reset_once(feed: Feed) -> None:
    await feed.add(2)

    assert await resets(feed.hub.watch(after=feed.cursor(3))) == ["future", "1", "2"]
    assert await resets(feed.hub.watch(after=3)) == ["future", "1", "2"]


async def test_a_cursor_of_another_store_is_reset_once_even_if_its_number_is_known_here(feed: Feed) -> None:
    await feed.add(5)

    assert await resets(feed.hub.watch(after=cursor_of(STORE_ID, 3))) == ["other_store", "1", "2"]


async def test_a_cursor_that_is_older_than_what_is_kept_is_reset_once(feed: Feed) -> None:
    for _ in range(9):
        await feed.add()
    await feed.store.prune_feed(before=5, limit=100)

    assert await resets(feed.hub.watch(after=feed.cursor(3))) == ["expired", "5", "6"]
    assert await resets(feed.hub.watch(after=0)) == ["expired", "5", "6"]
    assert await numbers(feed.hub.watch(after=feed.cursor(4)), 2) == [5, 6]


async def test_a_watch_that_was_too_slow_for_the_pruner_is_reset_and_goes_on(feed: Feed) -> None:
    for _ in range(3):
        await feed.add()
    watch = feed.hub.watch(after=0)
    assert await numbers(watch, 3) == [1, 2, 3]
    for _ in range(6):
        await feed.add()
    await feed.store.prune_feed(before=7, limit=100)

    assert await resets(watch) == ["expired", "7", "8"]
    assert await numbers(watch, 1) == [9]


async def test_watches_that_wait_at_a_head_that_is_pruned_away_are_reset(feed: Feed) -> None:
    await feed.add()
    watch = feed.hub.watch(after=0)
    await take(watch, 1)
    reading = asyncio.ensure_future(resets(watch))
    await rounds()
    # Written, and pruned again, before the reader hears of it.
    for _ in range(5):
        await write(feed.store, feed.lease, UnitOfWork(part=0, feed=shown_as(event(1))))
    await feed.store.prune_feed(before=4, limit=100)

    feed.hub.committed()

    assert await asyncio.wait_for(reading, PATIENCE_SECONDS) == ["expired", "4", "5"]


async def test_a_reset_reaches_a_watch_whatever_it_filters(feed: Feed) -> None:
    await feed.add(2)
    watch = feed.hub.watch(after=9, saga_ids=["nobody"], types=["saga:failed"])

    ((_, reset),) = await take(watch, 1)

    assert isinstance(reset, FeedReset)
    assert await waits(watch)


async def test_a_watch_has_no_cursor_until_its_reset_is_told(feed: Feed) -> None:
    await feed.add(2)
    watch = feed.hub.watch(after=9)
    await watch.begin()
    assert watch.cursor is None

    await take(watch, 1)

    assert watch.cursor == feed.cursor(0)


# --- Filters ---------------------------------------------------------------------------------------------------------


async def test_filters_leave_events_out_and_keep_their_numbers(feed: Feed) -> None:
    for saga_id, key, kind in (
        ("orders", "o-1", "saga:started"),
        ("orders", "o-2", "saga:started"),
        ("refunds", "o-1", "saga:started"),
        ("orders", "o-1", "saga:completed"),
        ("parcels", "o-1", "saga:completed"),
    ):
        await feed.add(saga_id=saga_id, key=key, kind=kind)
    watch = feed.hub.watch

    assert await numbers(watch(after=0, saga_ids="orders"), 3) == [1, 2, 4]
    assert await numbers(watch(after=0, saga_ids=["refunds", "parcels"]), 2) == [3, 5]
    assert await numbers(watch(after=0, key="o-1"), 4) == [1, 3, 4, 5]
    assert await numbers(watch(after=0, types=["saga:completed"]), 2) == [4, 5]
    assert await numbers(watch(after=0, saga_ids="orders", key="o-1", types="saga:completed"), 1) == [4]
    assert await waits(watch(after=0, saga_ids=()))


async def test_a_type_that_the_feed_does_not_know_is_refused_by_name(feed: Feed) -> None:
    with pytest.raises(MessageRejected, match=r"'saga:finished' is no event of the feed: there are saga:started"):
        feed.hub.watch(types=["saga:started", "saga:finished"])


# --- Many watches, one reader ----------------------------------------------------------------------------------------


async def test_watches_at_the_head_share_one_read_of_the_store(feed: Feed) -> None:
    watches = [feed.hub.watch(after=0) for _ in range(50)]
    reading = [asyncio.ensure_future(numbers(watch, 3)) for watch in watches]
    await rounds()
    reads = len(feed.store.called("feed"))

    await feed.add(3)
    found = await asyncio.gather(*reading)

    assert found == [[1, 2, 3]] * 50
    assert len(feed.store.called("feed")) - reads == 1


async def test_a_watch_that_is_a_little_late_finds_the_events_at_hand(feed: Feed) -> None:
    late, prompt = feed.hub.watch(after=0), feed.hub.watch(after=0)
    await asyncio.gather(late.begin(), prompt.begin())
    reading = asyncio.ensure_future(numbers(prompt, 5))
    await rounds()
    await feed.add(5)
    await reading
    reads = len(feed.store.called("feed"))

    assert await numbers(late, 5) == [1, 2, 3, 4, 5]
    assert len(feed.store.called("feed")) == reads


async def test_watches_of_every_pace_see_the_same_while_others_commit(feed: Feed) -> None:
    total = 6_000

    async def watch_at(pace: int) -> list[int]:
        watch = feed.hub.watch(after=0)
        found: list[int] = []
        while len(found) < total:
            found += await numbers(watch, 1)
            if pace and len(found) % pace == 0:
                await asyncio.sleep(0.001)
        return found

    async def commit() -> None:
        while feed.written < total:
            await feed.add(min(40, total - feed.written))
            await asyncio.sleep(0)

    *found, _ = await asyncio.gather(*(watch_at(pace) for pace in (0, 0, 50, 400)), commit())

    assert found == [list(range(1, total + 1))] * 4


async def test_watches_that_are_far_behind_let_others_run(feed: Feed) -> None:
    await feed.add(256 * 40)
    watches = [feed.hub.watch(after=0) for _ in range(3)]
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    turning = asyncio.ensure_future(turn())
    found = await asyncio.gather(*(numbers(watch, 256 * 40) for watch in watches))
    turning.cancel()

    assert found == [list(range(1, 256 * 40 + 1))] * 3
    assert turns >= 3 * 40


async def test_what_is_kept_at_hand_has_a_bound(feed: Feed) -> None:
    reading = asyncio.ensure_future(numbers(feed.hub.watch(after=0), 20_000))
    for _ in range(200):
        await feed.add(100)
        await rounds(4)
    await reading

    assert len(feed.hub._recent) <= 2 * 2_048 + 256


async def test_a_watch_that_is_not_read_holds_nothing(feed: Feed) -> None:
    async with feed.hub.watch(after=0) as idle, feed.hub.watch(after=0) as busy:
        for _ in range(20):
            await feed.add(200)
            await take(busy, 200)

        assert len(idle._ahead) == 0
        await take(idle, 1)
        assert len(idle._ahead) < 256


# --- Nobody watches --------------------------------------------------------------------------------------------------


async def test_nothing_is_read_while_nobody_waits(feed: Feed) -> None:
    await feed.add(5)
    async with feed.hub.watch(after=0) as watch:
        await take(watch, 5)
        calls = len(feed.store.called("feed"))
        await feed.add(5)
        await rounds()

        assert len(feed.store.called("feed")) == calls
    assert not feed.hub.is_reading


async def test_the_reader_ends_when_the_last_watch_leaves(feed: Feed) -> None:
    watch = feed.hub.watch(after=0)
    reading = asyncio.ensure_future(anext(watch))
    await rounds()
    assert feed.hub.is_reading

    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    await rounds()

    assert not feed.hub.is_reading


async def test_a_cancelled_read_loses_nothing(feed: Feed) -> None:
    watch = feed.hub.watch(after=0)
    found: list[int] = []
    for _ in range(100):
        reading = asyncio.ensure_future(anext(watch))
        await rounds(2)
        await feed.add()
        await rounds(1)
        reading.cancel()
        (result,) = await asyncio.gather(reading, return_exceptions=True)
        if not isinstance(result, BaseException):
            found.append(int(result[0]) % 10_000_000_000)

    found += await numbers(watch, 100 - len(found))

    assert found == list(range(1, 101))


# --- The end ---------------------------------------------------------------------------------------------------------


async def test_a_closed_watch_ends_even_while_it_waits(feed: Feed) -> None:
    watch = feed.hub.watch()
    reading = asyncio.ensure_future(anext(watch, None))
    await rounds()

    watch.close()

    assert await asyncio.wait_for(reading, PATIENCE_SECONDS) is None
    watch.close()
    assert await anext(watch, None) is None


async def test_a_hub_that_closes_ends_every_watch_and_starts_no_other(feed: Feed) -> None:
    reading = [asyncio.ensure_future(anext(feed.hub.watch(), None)) for _ in range(3)]
    await rounds()

    feed.hub.close("stopping")

    assert await asyncio.wait_for(asyncio.gather(*reading), PATIENCE_SECONDS) == [None, None, None]
    with pytest.raises(BackendUnavailable, match="the runtime is stopping"):
        feed.hub.watch()


class Broken(MemoryStore):
    """A store that cannot read its feed once it is told so."""

    error: Exception | None = None

    async def feed(self, *, after: int, limit: int) -> list[tuple[int, FeedEvent]]:
        if self.error is not None:
            raise self.error
        return await super().feed(after=after, limit=limit)


@pytest.mark.parametrize("error", [BackendUnavailable("the disk is gone"), ZeroDivisionError("a bug")])
async def test_a_store_that_fails_is_told_to_everybody_who_waits_and_they_can_go_on(error: Exception) -> None:
    store = Broken()
    feed = Feed(store, await store.acquire("worker-1", now=NOW))
    watches = [feed.hub.watch(after=0) for _ in range(3)]
    reading = [asyncio.ensure_future(anext(watch)) for watch in watches]
    await rounds()
    store.error = error
    await feed.add()

    found = await asyncio.wait_for(asyncio.gather(*reading, return_exceptions=True), PATIENCE_SECONDS)
    store.error = None

    assert found == [error] * 3
    assert [await numbers(watch, 1) for watch in watches] == [[1]] * 3
    feed.hub.close("stopped")


# --- Other processes -------------------------------------------------------------------------------------------------


async def test_commits_of_another_process_on_the_same_file_are_noticed(tmp_path: Path) -> None:
    here = KvSagaStore(await SqliteKeyValue.open(tmp_path / "saga.db"))
    there = KvSagaStore(await SqliteKeyValue.open(tmp_path / "saga.db"))
    other = Feed(there, await there.acquire("worker-2", now=NOW))
    hub = FeedHub(here, ManualClock())
    watch = hub.watch(after=0)
    reading = asyncio.ensure_future(numbers(watch, 3))
    await rounds()

    await other.add(2)
    await other.add()

    assert await asyncio.wait_for(reading, PATIENCE_SECONDS) == [1, 2, 3]
    hub.close("stopped")
    await here.close()
    await there.close()


async def test_looking_out_for_others_reads_nothing_until_they_commit(tmp_path: Path) -> None:
    kv = await SqliteKeyValue.open(tmp_path / "saga.db")
    store = KvSagaStore(kv)
    hub = FeedHub(store, ManualClock())
    looked = asyncio.Event()
    version, looks = kv.others_version, 0

    def others_version() -> int:
        nonlocal looks
        looks += 1
        if looks == 4:
            looked.set()
        return version()

    kv.others_version = others_version  # type: ignore[method-assign]
    reading = asyncio.ensure_future(anext(hub.watch(after=0), None))
    await rounds()
    statements = kv.statements

    await asyncio.wait_for(looked.wait(), PATIENCE_SECONDS)

    assert kv.statements == statements
    hub.close("stopped")
    assert await reading is None
    await store.close()


class Blind:
    """A store that cannot tell whether others have committed."""

    def __init__(self, inner: MemoryStore) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        if name == "others_version":
            raise AttributeError(name)
        return getattr(self._inner, name)


async def test_a_store_that_cannot_tell_is_read_now_and_then() -> None:
    inner = MemoryStore()
    lease = await inner.acquire("worker-2", now=NOW)
    store: Any = Blind(inner)
    hub = FeedHub(store, ManualClock())
    reading = asyncio.ensure_future(numbers(hub.watch(after=0), 1))
    await rounds()

    await write(inner, lease, UnitOfWork(part=0, feed=shown_as(event(1))))

    assert await asyncio.wait_for(reading, PATIENCE_SECONDS) == [1]
    hub.close("stopped")


# --- The runtime -----------------------------------------------------------------------------------------------------


def _order() -> Any:
    def placed(saga: Any, event: Any, context: Any) -> list[Any]:
        return [send("service:payments", {"amount": 1})]

    def broken(saga: Any, event: Any, context: Any) -> list[Any]:
        raise SagasError("the parcel is lost", retryable=False)

    return (
        define_saga("order")
        .state({})
        .on("Placed", placed)
        .on("Paid", lambda saga, event, context: [saga_complete()], starts=False)
        .on("Shipped", broken, starts=False)
        .on("Lost", lambda saga, event, context: [send("saga:nobody", {"n": 1})], starts=False)
        .on("Refused", lambda saga, event, context: [saga_compensate({"type": "Placed", "payload": {}}, "no stock")])
        .compensate("Placed", lambda saga, event, context: [saga_fail("refunded")])
        .build()
    )


async def told(runtime: SagaRuntime, *, after: int | str = 0, **filters: Any) -> list[FeedEvent]:
    """Everything that the feed tells from `after` on."""
    _, newest = await runtime.store.feed_bounds()
    end = cursor_of(runtime.store.store_id, newest)
    found: list[FeedEvent] = []
    async with asyncio.timeout(PATIENCE_SECONDS), runtime.watch(after=after, **filters) as watch:
        while watch.cursor != end:
            page = await watch.next_page()
            assert page is not None
            found += [event for _, event in page.events]
    return found


async def test_the_feed_of_a_runtime_tells_the_whole_story(bench: Bench) -> None:
    life = await bench.live(_order())
    await life.publish("Placed", key="a")
    await life.runtime.settled()
    await life.publish("Paid", key="a")
    await life.publish("Placed", key="b")
    await life.runtime.settled()
    await life.publish("Refused", key="b")

    story = [(event.key, event.type.removeprefix("saga:"), event.status) for event in await told(life.runtime)]

    assert story == [
        ("a", "message_received", "pending"),
        ("a", "started", "running"),
        ("a", "state_changed", "running"),
        ("a", "effect_dispatched", None),
        ("a", "message_received", "running"),
        ("a", "state_changed", "completed"),
        ("a", "completed", "completed"),
        ("b", "message_received", "pending"),
        ("b", "started", "running"),
        ("b", "state_changed", "running"),
        ("b", "effect_dispatched", None),
        ("b", "message_received", "running"),
        ("b", "state_changed", "compensating"),
        ("b", "compensating", "compensating"),
        ("b", "state_changed", "failed"),
        ("b", "failed", "failed"),
    ]


async def test_an_effect_that_has_left_is_told_with_its_key_and_target(bench: Bench) -> None:
    life = await bench.live(_order())
    await life.publish("Placed", key="a", id="m-1")
    await life.runtime.settled()

    (dispatched,) = await told(life.runtime, types=["saga:effect_dispatched"])

    (effect,) = bench.receiver.got
    assert (dispatched.effect_key, dispatched.message_type) == (effect.effect_key, "service:payments")
    assert (dispatched.saga_id, dispatched.key, dispatched.run, dispatched.revision) == ("order", "a", 1, 1)
    assert dispatched.message_id == "m-1"


async def test_an_effect_is_told_once_although_it_was_tried_twice(bench: Bench) -> None:
    answers = iter([SagasError("busy", retryable=True), ()])
    bench.receiver.answer = lambda effect: next(answers)
    life = await bench.live(_order())
    await life.publish("Placed", key="a")
    await life.runtime.settled()
    await bench.advance("1m")

    assert len(bench.receiver.got) == 2
    assert len(await told(life.runtime, types=["saga:effect_dispatched"])) == 1


async def test_an_effect_that_is_given_up_is_told_with_the_reason(bench: Bench) -> None:
    bench.receiver.answer = lambda effect: SagasError("no such account", retryable=False)
    life = await bench.live(_order())
    await life.publish("Placed", key="a")
    await life.runtime.settled()

    (given_up,) = await told(life.runtime, types=["saga:dead_lettered"])

    (effect,) = bench.receiver.got
    assert (given_up.effect_key, given_up.message_type) == (effect.effect_key, "service:payments")
    assert given_up.detail == "no such account"
    assert await told(life.runtime, types=["saga:effect_dispatched"]) == []


async def test_a_message_that_is_given_up_is_told_with_the_reason(bench: Bench) -> None:
    life = await bench.live(_order())
    await life.publish("Placed", key="a")
    await life.publish("Shipped", key="a", id="m-2")

    (given_up,) = await told(life.runtime, types=["saga:dead_lettered"])

    assert (given_up.message_type, given_up.message_id, given_up.effect_key) == ("Shipped", "m-2", None)
    assert given_up.detail is not None
    assert "the parcel is lost" in given_up.detail


async def test_a_message_between_sagas_that_nobody_takes_is_told_of_its_sender(bench: Bench) -> None:
    life = await bench.live(_order())
    await life.publish("Placed", key="a")
    await life.publish("Lost", key="a")

    (given_up,) = await told(life.runtime, types=["saga:dead_lettered"])

    assert (given_up.saga_id, given_up.key, given_up.run, given_up.revision) == ("order", "a", 1, 2)
    assert given_up.detail is not None
    assert "'nobody'" in given_up.detail


async def test_a_message_whose_definition_has_gone_is_told(bench: Bench) -> None:
    def failing(saga: Any, event: Any, context: Any) -> list[Any]:
        raise OSError("not now")

    life = await bench.live(define_saga("gone").state({}).on("Begun", failing).build())
    await life.publish("Begun", key="a", id="m-1")
    await bench.die(life)
    life = await bench.live(_order())
    await bench.advance("1m")

    (given_up,) = await told(life.runtime, types=["saga:dead_lettered"])

    assert (given_up.saga_id, given_up.message_id) == ("gone", "m-1")


async def test_a_long_reason_is_cut_short_in_the_feed_and_kept_in_the_history(bench: Bench) -> None:
    saga = define_saga("long").state({}).on("Begun", lambda saga, event, context: [saga_fail("x" * 50_000)]).build()
    life = await bench.live(saga)
    await life.publish("Begun", key="a")

    (failed,) = await told(life.runtime, types=["saga:failed"])

    assert failed.detail == "x" * 2_000
    assert (await life.instance("long", "a")).reason == "x" * 50_000


async def test_a_watch_hears_of_a_commit_at_once(bench: Bench) -> None:
    life = await bench.live(_order())
    async with life.runtime.watch() as watch:
        reading = asyncio.ensure_future(take(watch, 3))
        await rounds()
        await life.publish("Placed", key="a")
        await rounds()

        # Long before anybody would have looked: nothing but the commit can have told.
        assert reading.done()


async def test_a_watch_goes_on_in_the_next_life_where_it_was(bench: Bench) -> None:
    life = await bench.live(_order())
    await life.publish("Placed", key="a")
    await life.runtime.settled()
    async with life.runtime.watch(after=0) as watch:
        before = await take(watch, 2)
        cursor = watch.cursor
    await bench.die(life)
    life = await bench.live(_order())
    await life.publish("Paid", key="a")

    after = await take(life.runtime.watch(after=cursor), 5)

    told_at = [int(cursor) for cursor, _ in before + after]
    assert told_at == list(range(told_at[0], told_at[0] + 7))
    assert after[-1][1].type == "saga:completed"


async def test_two_lives_on_one_file_tell_the_same_feed(bench: Bench) -> None:
    one, other = await bench.live(_order()), await bench.live(_order())
    reading = [asyncio.ensure_future(take(life.runtime.watch(after=0), 80)) for life in (one, other)]
    await rounds()
    for n in range(10):
        for life in (one, other):
            receipt = await life.runtime.publish({"type": "Placed", "payload": {}, "correlationKey": f"{n}-{id(life)}"})
            assert receipt.published

    told = await asyncio.gather(*reading)

    first = int(told[0][0][0])
    assert [int(cursor) for cursor, _ in told[0]] == list(range(first, first + 80))
    assert told[0] == told[1]


async def test_a_runtime_that_stops_ends_its_watches(bench: Bench) -> None:
    life = await bench.live(_order())
    reading = asyncio.ensure_future(anext(life.runtime.watch(), None))
    await rounds()

    await bench.end(life)

    assert await asyncio.wait_for(reading, PATIENCE_SECONDS) is None
    with pytest.raises(BackendUnavailable) as refused:
        life.runtime.watch()
    assert refused.value.code == "SAGA_NOT_STARTED"


async def test_watches_can_be_ended_before_the_runtime(bench: Bench) -> None:
    life = await bench.live(_order())
    reading = asyncio.ensure_future(anext(life.runtime.watch(), None))
    await rounds()

    life.runtime.end_watches()

    assert await asyncio.wait_for(reading, PATIENCE_SECONDS) is None
    assert (await life.publish("Placed", key="a")).disposition == "applied"
