import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from sagaloom.errors import DefinitionError
from sagaloom.testing.clock import ManualClock
from tests.patience import PATIENCE_SECONDS


def test_the_clock_starts_where_it_is_told_and_stands_still() -> None:
    clock = ManualClock(datetime(2030, 5, 6, 7, tzinfo=UTC))

    assert datetime(2030, 5, 6, 7, tzinfo=UTC) == clock.now() == clock.now()


@pytest.mark.parametrize("by", [timedelta(minutes=5), 300_000, "5m"])
def test_advancing_takes_a_timedelta_milliseconds_or_text(by: timedelta | float | str) -> None:
    clock = ManualClock()

    clock.advance(by)

    assert clock.now() == datetime(2026, 1, 1, 0, 5, tzinfo=UTC)


def test_time_does_not_go_back() -> None:
    clock = ManualClock()

    with pytest.raises(DefinitionError):
        clock.advance(-1)

    assert clock.advance_to(datetime(2025, 1, 1, tzinfo=UTC)) == datetime(2026, 1, 1, tzinfo=UTC)


def test_a_start_without_a_time_zone_is_refused() -> None:
    with pytest.raises(DefinitionError, match="aware"):
        ManualClock(datetime(2026, 1, 1))  # noqa: DTZ001


async def test_a_moment_that_is_over_is_not_slept_for() -> None:
    clock = ManualClock()

    await asyncio.wait_for(clock.sleep_until(clock.now()), PATIENCE_SECONDS)

    assert clock.sleepers == 0


async def test_a_sleeper_wakes_when_its_moment_comes_and_not_before() -> None:
    clock = ManualClock()
    sleeper = asyncio.create_task(clock.sleep_until(clock.now() + timedelta(seconds=10)))
    await asyncio.sleep(0)

    clock.advance("9s")
    await asyncio.sleep(0)
    was_done_early = sleeper.done()
    clock.advance("1s")
    await asyncio.wait_for(sleeper, PATIENCE_SECONDS)

    assert not was_done_early
    assert clock.next_wake_at is None


async def test_sleepers_wake_in_the_order_of_their_moments() -> None:
    clock = ManualClock()
    woken: list[int] = []

    async def sleep(seconds: int) -> None:
        await clock.sleep_until(clock.now() + timedelta(seconds=seconds))
        woken.append(seconds)

    async with asyncio.TaskGroup() as group:
        for seconds in (3, 1, 2):
            group.create_task(sleep(seconds))
        await asyncio.sleep(0)
        clock.advance("1m")

    assert woken == [1, 2, 3]


async def test_a_cancelled_sleeper_is_forgotten() -> None:
    clock = ManualClock()
    sleeper = asyncio.create_task(clock.sleep_until(clock.now() + timedelta(seconds=10)))
    await asyncio.sleep(0)

    sleeper.cancel()
    await asyncio.gather(sleeper, return_exceptions=True)

    assert (clock.sleepers, clock.next_wake_at) == (0, None)


async def test_advancing_through_shows_each_sleeper_the_moment_it_waited_for() -> None:
    clock = ManualClock()
    ticks: list[int] = []

    async def tick() -> None:
        start = clock.now()
        while True:
            await clock.sleep_until(clock.now() + timedelta(seconds=20))
            ticks.append(int((clock.now() - start).total_seconds()))

    ticking = asyncio.create_task(tick())
    now = await clock.advance_through("1m")
    ticking.cancel()

    assert ticks == [20, 40, 60]
    assert now == datetime(2026, 1, 1, 0, 1, tzinfo=UTC)
