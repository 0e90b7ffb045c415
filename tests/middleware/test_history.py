"""The history of events: written once whatever happens to its writer, and read where the feed has forgotten."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from examples.web.shop import OrderPaid, OrderPlaced, orders
from sagaloom.errors import ConfigurationError
from sagaloom.kv import MemoryKeyValue
from sagaloom.kv.sqlite import SqliteKeyValue
from sagaloom.middleware import SagaHistoryWriter, create_sse_events_middleware
from sagaloom.runtime import RuntimeOptions, SagaRuntime
from sagaloom.runtime.feed import cursor_of
from sagaloom.testing import ManualClock, MemoryStore
from sagaloom.testing.faults import Cut, Faults
from tests.doors.http_door import serve
from tests.doors.sse import subscribed
from tests.patience import PATIENCE_SECONDS


@pytest.fixture
async def runtime() -> AsyncIterator[SagaRuntime]:
    """It keeps a hundred events for an hour."""
    options = RuntimeOptions(feed_retention_hours=1, feed_retention_events=100)
    async with SagaRuntime(MemoryStore(), definitions=[orders], clock=ManualClock(), options=options) as started:
        yield started


async def place(runtime: SagaRuntime, *keys: str) -> None:
    for key in keys:
        (await runtime.publish(OrderPlaced(key, 1), wait=5)).raise_for_rejected()


async def feed(runtime: SagaRuntime) -> list[tuple[str, Any]]:
    oldest, newest = await runtime.store.feed_bounds()
    found = await runtime.store.feed(after=oldest - 1, limit=1_000)
    assert found[-1][0] == newest
    return [(cursor_of(runtime.store.store_id, number), event) for number, event in found]


async def until(reached: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not await reached():  # noqa: ASYNC110 - of what another task has written there is no event
            await asyncio.sleep(0.01)


async def written(history: SagaHistoryWriter, runtime: SagaRuntime) -> list[tuple[str, Any]]:
    """All that the history has, once it has come as far as the feed."""
    last, _ = (await feed(runtime))[-1]
    found: list[tuple[str, Any]] = []

    async def is_there() -> bool:
        nonlocal found
        found = [tuple(each) for each in await history.read(runtime, limit=10_000)]  # type: ignore[misc]
        return bool(found) and found[-1][0] == last

    await until(is_there)
    return found


async def test_a_history_has_what_the_feed_has_under_the_same_cursors(runtime: SagaRuntime) -> None:
    history = SagaHistoryWriter(MemoryKeyValue())
    await place(runtime, "o-1")
    history.follow(runtime)
    history.follow(runtime)
    await place(runtime, "o-2")

    assert await written(history, runtime) == await feed(runtime)

    await history.close()


async def test_a_history_is_read_of_one_run_and_page_by_page(runtime: SagaRuntime) -> None:
    history = SagaHistoryWriter(MemoryKeyValue())
    history.follow(runtime)
    await place(runtime, "o-1", "o-2")
    await runtime.publish(OrderPaid("o-1"), wait=5)
    await written(history, runtime)

    whole = await history.read(runtime, "orders", "o-1")
    rest = await history.read(runtime, "orders", "o-1", after=whole[0].cursor)

    assert {each.event.key for each in whole} == {"o-1"}
    assert whole[-1].event.type == "saga:completed"
    assert rest == whole[1:]
    with pytest.raises(ConfigurationError, match="give saga_id and key, or neither"):
        await history.read(runtime, "orders")
    await history.close()


@pytest.mark.parametrize("step", ["kv:checked", "kv:half_written", "kv:written", "kv:committed"])
async def test_a_writer_that_is_stopped_anywhere_in_a_commit_leaves_no_gap_and_no_repeat(
    runtime: SagaRuntime, tmp_path: Path, step: str
) -> None:
    for nth in (1, 2):
        faults = Faults()
        faults.raise_at(step, nth)
        kv = await SqliteKeyValue.open(tmp_path / f"{nth}.db", on_step=faults, synchronous="OFF")
        history = SagaHistoryWriter(kv)
        history.follow(runtime)
        await place(runtime, f"{nth}-a")
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not faults.seen[step]:  # noqa: ASYNC110 - else both might be one commit
                await asyncio.sleep(0.005)
        await place(runtime, f"{nth}-b")
        await faults.wait_until_struck()
        with pytest.raises(Cut):
            await next(iter(history._following.values()))
        await kv.close()

        history = await SagaHistoryWriter.open(tmp_path / f"{nth}.db")
        history.follow(runtime)
        found = await written(history, runtime)
        await history.close()

        assert found == await feed(runtime)


async def test_of_two_writers_each_event_is_written_by_one(runtime: SagaRuntime) -> None:
    kv = MemoryKeyValue()
    one, other = SagaHistoryWriter(kv), SagaHistoryWriter(kv)
    one.follow(runtime)
    other.follow(runtime)

    await place(runtime, *(f"o-{n}" for n in range(20)))

    assert await written(one, runtime) == await feed(runtime)
    await one.close()
    await other.close()


async def test_a_writer_who_was_away_for_too_long_says_so(
    runtime: SagaRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    kv = MemoryKeyValue()
    history = SagaHistoryWriter(kv)
    history.follow(runtime)
    await place(runtime, "o-1")
    await written(history, runtime)
    await history.close()
    await place(runtime, "missed")
    await _outlive(runtime)

    with caplog.at_level(logging.WARNING, "sagaloom.history"):
        later = SagaHistoryWriter(kv)
        later.follow(runtime)
        found = await written(later, runtime)
        await later.close()

    assert "the history has a gap in front of event" in caplog.text
    assert found[-1] == (await feed(runtime))[-1]


async def test_what_is_older_than_it_has_to_be_is_forgotten(runtime: SagaRuntime) -> None:
    history = SagaHistoryWriter(MemoryKeyValue(), keeps_days=2)
    history.follow(runtime)
    await place(runtime, "o-1")
    await written(history, runtime)
    assert isinstance(runtime.clock, ManualClock)
    runtime.clock.advance("3d")
    await place(runtime, "o-2", "o-3")

    found = await written(history, runtime)

    assert {event.key for _, event in found} == {"o-2", "o-3"}
    assert await history.read(runtime, "orders", "o-1") == []
    await history.close()
    with pytest.raises(ConfigurationError, match="keeps nothing"):
        SagaHistoryWriter(MemoryKeyValue(), keeps_days=0)


async def test_a_reader_whom_the_feed_has_forgotten_goes_on_from_the_history(runtime: SagaRuntime) -> None:
    history = SagaHistoryWriter(MemoryKeyValue())
    history.follow(runtime)
    await place(runtime, "o-1")
    first, _ = (await feed(runtime))[0]
    before = await written(history, runtime)
    await _outlive(runtime)
    after = await written(history, runtime)

    async with (
        serve(create_sse_events_middleware(runtime, history=history)(_nothing)) as port,
        subscribed(port, first, path="/events") as stream,
    ):
        told = await stream.take(len(after) - 1)

    assert (await runtime.store.feed_bounds())[0] > len(before)
    assert [str(each.id) for each in told] == [cursor for cursor, _ in after[1:]]
    await history.close()


async def test_a_reader_who_filters_hears_of_nothing_else_from_the_history(runtime: SagaRuntime) -> None:
    history = SagaHistoryWriter(MemoryKeyValue())
    history.follow(runtime)
    await place(runtime, "o-1")
    await written(history, runtime)
    await _outlive(runtime)
    await written(history, runtime)

    async with (
        serve(create_sse_events_middleware(runtime, history=history)(_nothing)) as port,
        subscribed(port, path="/events", after=0, type="saga:started", correlationId="o-1") as stream,
    ):
        (told,) = await stream.take(1)

    assert told.data["instanceId"] == "orders:o-1"
    await history.close()


async def _outlive(runtime: SagaRuntime) -> None:
    """Lets the feed forget all that it has, and begin anew."""
    assert isinstance(runtime.clock, ManualClock)
    _, newest = await runtime.store.feed_bounds()
    runtime.clock.advance("3h")
    await place(runtime, "later-1", "later-2")

    async def has_forgotten() -> bool:
        return (await runtime.store.feed_bounds())[0] > newest

    await until(has_forgotten)


async def _nothing(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        while (message := await receive())["type"] != "lifespan.shutdown":
            await send({"type": f"{message['type']}.complete"})
        await send({"type": "lifespan.shutdown.complete"})
