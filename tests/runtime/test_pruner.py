"""The pruner: what the feed forgets and when, and that it rests in between."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from sagaloom import define_saga
from sagaloom.engine.records import FeedEvent
from sagaloom.errors import BackendUnavailable, ConfigurationError
from sagaloom.runtime import RuntimeOptions, SagaRuntime
from sagaloom.runtime.feed import FeedReset
from sagaloom.testing import ManualClock, MemoryStore, RecordingStore
from tests.patience import PATIENCE_SECONDS
from tests.runtime.conftest import Bench

pytestmark = pytest.mark.anyio


def _noted() -> Any:
    """Three events for the first message of a key: received, started, changed."""
    return define_saga("note").state({}).on("Noted", lambda saga, event, context: []).build()


async def rounds(count: int = 50) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_events_that_are_too_many_are_forgotten_the_oldest_first(bench: Bench) -> None:
    life = await bench.live(_noted(), feed_retention_events=6)
    for n in range(10):
        await life.publish("Noted", key=f"k-{n}")
    await life.runtime.settled()

    oldest, newest = await life.runtime.store.feed_bounds()

    assert newest == 30
    assert newest - oldest + 1 in (6, 9)
    assert (await life.runtime.store.feed(after=0, limit=1))[0][0] == oldest


async def test_events_that_are_too_old_are_forgotten(bench: Bench) -> None:
    life = await bench.live(_noted(), feed_retention_hours=1)
    for n in range(4):
        await life.publish("Noted", key=f"k-{n}")
        await bench.advance("20m")
    await bench.advance("10m")

    # 90 minutes after the first, 70 after the second, 50 after the third.
    assert await life.runtime.store.feed_bounds() == (7, 12)


async def test_events_within_their_time_are_kept(bench: Bench) -> None:
    life = await bench.live(_noted(), feed_retention_hours=1)
    for n in range(4):
        await life.publish("Noted", key=f"k-{n}")
    await bench.advance("59m")

    assert await life.runtime.store.feed_bounds() == (1, 12)


async def test_what_grew_too_old_between_two_lives_is_forgotten_at_the_start(bench: Bench) -> None:
    life = await bench.live(_noted())
    await life.publish("Noted", key="a")
    await life.publish("Noted", key="b")
    await bench.die(life)
    bench.clock.advance("3d")
    life = await bench.live(_noted())
    await life.runtime.settled()

    assert await life.runtime.store.feed_bounds() == (4, 6)


async def test_the_newest_commit_stays_however_old_it_is_and_goes_when_there_is_a_newer_one(bench: Bench) -> None:
    life = await bench.live(_noted(), feed_retention_hours=1)
    await life.publish("Noted", key="a")
    await bench.advance("30d")
    assert await life.runtime.store.feed_bounds() == (1, 3)

    await life.publish("Noted", key="b")
    await life.runtime.settled()

    assert await life.runtime.store.feed_bounds() == (4, 6)


async def test_a_long_feed_is_forgotten_in_small_commits(bench: Bench) -> None:
    life = await bench.live(_noted(), feed_retention_hours=1)
    for n in range(150):
        await life.publish("Noted", key=f"k-{n}")
    store = RecordingStore(life.runtime.store)
    life.runtime._pruner._store = store
    await bench.advance("2h")

    assert await life.runtime.store.feed_bounds() == (448, 450)
    assert [call.outcome for call in store.called("prune_feed")] == [64, 64, 21]


async def test_a_watch_that_lags_behind_the_pruner_hears_one_reset(bench: Bench) -> None:
    life = await bench.live(_noted(), feed_retention_events=3)
    async with life.runtime.watch() as watch:
        for n in range(6):
            await life.publish("Noted", key=f"k-{n}")
        await life.runtime.settled()
        oldest, newest = await life.runtime.store.feed_bounds()

        async with asyncio.timeout(PATIENCE_SECONDS):
            (_, reset), *rest = [await anext(watch) for _ in range(newest - oldest + 2)]

    assert isinstance(reset, FeedReset)
    assert all(isinstance(event, FeedEvent) for _, event in rest)


async def test_an_idle_runtime_never_looks_at_its_feed() -> None:
    clock, store = ManualClock(), RecordingStore(MemoryStore())
    async with SagaRuntime(store, definitions=[_noted()], clock=clock) as runtime:
        for n in range(5):
            await runtime.publish({"type": "Noted", "payload": {}, "correlationKey": f"k-{n}"})
        await runtime.settled()
        store.calls.clear()

        for _ in range(24):
            clock.advance("1h")
            await rounds()

        assert {call.method for call in store.calls} == {"remove_tombstones", "prune_marks"}


async def test_a_busy_runtime_looks_at_its_feed_seldom() -> None:
    store = RecordingStore(MemoryStore())
    options = RuntimeOptions(feed_retention_events=320)
    async with SagaRuntime(store, definitions=[_noted()], clock=ManualClock(), options=options) as runtime:
        for n in range(400):
            await runtime.publish({"type": "Noted", "payload": {}, "correlationKey": f"k-{n}"})
        await runtime.settled()

    # 1200 events: after the first 340 once in 20 or a little more.
    assert 30 <= len(store.called("feed_bounds")) / 2 <= 45
    assert (await store.feed_bounds())[0] > 1200 - 320 - 30


class Stubborn(MemoryStore):
    """A store that forgets nothing while it is told so."""

    is_down = False

    async def prune_feed(self, *, before: int, limit: int) -> int:
        if self.is_down:
            raise BackendUnavailable("the disk is gone")
        return await super().prune_feed(before=before, limit=limit)


async def test_a_store_that_fails_is_asked_again_a_minute_later() -> None:
    clock, store = ManualClock(), Stubborn()
    options = RuntimeOptions(feed_retention_hours=1)
    async with SagaRuntime(store, definitions=[_noted()], clock=clock, options=options) as runtime:
        await runtime.publish({"type": "Noted", "payload": {}, "correlationKey": "a"})
        await runtime.publish({"type": "Noted", "payload": {}, "correlationKey": "b"})
        await runtime.settled()
        store.is_down = True
        clock.advance("2h")
        await rounds()
        assert await store.feed_bounds() == (1, 6)

        store.is_down = False
        clock.advance("1m")
        await rounds()
        await runtime.settled()

        assert await store.feed_bounds() == (4, 6)


@pytest.mark.parametrize("options", [{"feed_retention_hours": 0}, {"feed_retention_events": 0}])
def test_a_feed_that_keeps_nothing_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="keep nothing"):
        SagaRuntime(MemoryStore(), options=RuntimeOptions(**options))


async def test_a_feed_may_be_kept_for_ever() -> None:
    clock, store = ManualClock(), MemoryStore()
    options = RuntimeOptions(feed_retention_hours=float("inf"))
    async with SagaRuntime(store, definitions=[_noted()], clock=clock, options=options) as runtime:
        await runtime.publish({"type": "Noted", "payload": {}, "correlationKey": "a"})
        await runtime.publish({"type": "Noted", "payload": {}, "correlationKey": "b"})
        clock.advance("3650d")
        await runtime.settled()

        assert await store.feed_bounds() == (1, 6)
