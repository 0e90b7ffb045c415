"""Ticks of scheduled sagas: each applied once, over restarts, kills and clocks that jump."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from sagaloom import SagaDefinition, SagaMessage, define_saga, saga_complete
from sagaloom.engine.records import ScheduleCursor
from sagaloom.errors import BackendUnavailable, ScheduleNotFound
from sagaloom.ports.store import CommitResult, Lease, UnitOfWork
from sagaloom.runtime.options import no_step
from sagaloom.runtime.receipts import PublishReceipt, PublishRejected
from sagaloom.runtime.runtime import SagaRuntime
from sagaloom.runtime.scheduler import ScheduleStatus
from sagaloom.testing.clock import ManualClock
from sagaloom.testing.faults import Cut
from sagaloom.testing.memory_store import MemoryStore
from tests.patience import PATIENCE_SECONDS
from tests.runtime.conftest import STORES, Bench, Life

__all__ = ["STORES"]


HOUR = timedelta(hours=1)
NEW_YEAR = datetime(2026, 1, 1, tzinfo=UTC)
TICKS = "report:report:tick"


def _report(saga: Any, event: Any, context: Any) -> list[Any]:
    return [saga_complete(event.payload)]


def report(cron: str = "0 * * * *", **how: Any) -> SagaDefinition[Any]:
    """A saga whose ticks are runs of their own, each with its payload as the result."""
    return define_saga("report").schedule(cron, **how).state({}).on("report:tick", _report).build()


async def ticks_of(life: Life) -> list[dict[str, Any]]:
    """The payloads of the applied ticks, in the order in which they were applied."""
    runs = await life.runtime.store.runs("report", TICKS)
    return [json.loads(run.result or b"null") for run in reversed(runs)]


async def hours_of(life: Life) -> list[float]:
    """When the applied ticks were scheduled, in hours since the new year."""
    moments = [datetime.fromisoformat(tick["scheduledFor"]) for tick in await ticks_of(life)]
    return [(moment - NEW_YEAR) / HOUR for moment in moments]


async def test_a_tick_fires_when_its_moment_comes_and_not_before(bench: Bench) -> None:
    life = await bench.live(report())

    await bench.advance("59m")
    before = await ticks_of(life)
    await bench.advance("1m")

    assert before == []
    assert await ticks_of(life) == [{"scheduledFor": "2026-01-01T01:00:00Z"}]


async def test_ticks_go_on_one_after_the_other(bench: Bench) -> None:
    life = await bench.live(report())

    for _ in range(5):
        await bench.advance("1h")

    assert await hours_of(life) == [1, 2, 3, 4, 5]


async def test_a_tick_tells_its_moment_and_has_an_idempotency_key_of_it(bench: Bench) -> None:
    seen: list[SagaMessage[Any]] = []

    def look(saga: Any, event: Any, context: Any) -> list[Any]:
        seen.append(event)
        return []

    saga = define_saga("report").schedule("0 3 * * *", timezone="Europe/Berlin").state({}).on("report:tick", look)
    await bench.live(saga.build())

    await bench.advance("2h")

    (tick,) = seen
    assert tick.payload == {"scheduledFor": "2026-01-01T02:00:00Z"}
    assert tick.idempotency_key == "tick:2026-01-01T02:00:00Z"
    assert tick.occurred_at == NEW_YEAR + 2 * HOUR


async def test_nothing_fires_from_before_the_schedule_was_registered(bench: Bench) -> None:
    first = await bench.live()
    await bench.advance("10h")
    await bench.end(first)

    life = await bench.live(report(catch_up="all"))
    await bench.advance("30m")
    before = await hours_of(life)
    await bench.advance("30m")

    assert before == []
    assert await hours_of(life) == [11]


async def test_a_saga_registered_later_ticks_from_then_on(bench: Bench) -> None:
    life = await bench.live()
    await bench.advance("90m")

    life.runtime.register(report())
    await life.runtime.settled()
    await bench.advance("30m")

    assert await hours_of(life) == [2]


@pytest.mark.parametrize(
    ("catch_up", "expected"),
    [("latest", [1, 5, 6]), ("all", [1, 2, 3, 4, 5, 6]), ("none", [1, 6])],
)
async def test_missed_ticks_follow_the_policy(bench: Bench, catch_up: str, expected: list[int]) -> None:
    first = await bench.live(report(catch_up=catch_up))
    await bench.advance("1h")
    await bench.die(first)
    bench.clock.advance("270m")

    life = await bench.live(report(catch_up=catch_up))
    await life.runtime.settled()
    await bench.advance("30m")

    assert await hours_of(life) == expected


@pytest.mark.parametrize("catch_up", ["latest", "all", "none"])
async def test_a_tick_that_is_a_little_late_was_not_missed(bench: Bench, catch_up: str) -> None:
    first = await bench.live(report(catch_up=catch_up))
    await bench.advance("50m")
    await bench.die(first)
    bench.clock.advance(11 * 60_000)

    life = await bench.live(report(catch_up=catch_up))
    await life.runtime.settled()

    assert await hours_of(life) == [1]


@pytest.mark.parametrize("catch_up", ["latest", "all", "none"])
async def test_a_restart_repeats_no_tick(bench: Bench, catch_up: str) -> None:
    first = await bench.live(report(catch_up=catch_up))
    await bench.advance("1h")
    await bench.die(first)

    life = await bench.live(report(catch_up=catch_up))
    await life.runtime.settled()
    await bench.advance("1h")

    assert await hours_of(life) == [1, 2]


async def test_a_changed_expression_begins_anew(bench: Bench) -> None:
    first = await bench.live(report(catch_up="all"))
    await bench.advance("1h")
    await bench.die(first)
    bench.clock.advance("150m")

    life = await bench.live(report("*/30 * * * *", catch_up="all"))
    await life.runtime.settled()
    await bench.advance("30m")

    assert await hours_of(life) == [1, 4]


async def test_a_changed_zone_begins_anew(bench: Bench) -> None:
    first = await bench.live(report(catch_up="all"))
    await bench.end(first)
    bench.clock.advance("90m")

    life = await bench.live(report(catch_up="all", timezone="Europe/Berlin"))
    await life.runtime.settled()
    await bench.advance("30m")

    assert await hours_of(life) == [2]


async def test_a_schedule_that_was_taken_away_and_comes_back_has_missed_nothing(bench: Bench) -> None:
    plain = define_saga("report").state({}).on("report:tick", _report).build()
    for definition in (report(catch_up="all"), plain):
        life = await bench.live(definition)
        await life.runtime.settled()
        await bench.end(life)
        bench.clock.advance("3h")

    life = await bench.live(report(catch_up="all"))
    await life.runtime.settled()
    await bench.advance("1h")

    assert await hours_of(life) == [7]


async def test_the_next_life_with_a_clock_that_was_set_back_repeats_nothing(bench: Bench) -> None:
    first = await bench.live(report(catch_up="all"))
    await bench.advance("1h")
    await bench.advance("1h")
    await bench.die(first)
    bench.clock = ManualClock(NEW_YEAR + HOUR)

    life = await bench.live(report(catch_up="all"))
    await life.runtime.settled()
    repeated = await hours_of(life)
    await bench.advance("1h")
    at_the_cursor = await hours_of(life)
    await bench.advance("1h")

    assert repeated == at_the_cursor == [1, 2]
    assert await hours_of(life) == [1, 2, 3]


async def test_a_clock_that_jumps_forward_fires_what_the_policy_says(bench: Bench) -> None:
    life = await bench.live(report(catch_up="latest"))

    await bench.advance("3030m")

    assert await hours_of(life) == [50]


# -- cut between the two commits --------------------------------------------------------------------------------------


class CutOff(MemoryStore):
    """A store that takes messages and, from when it is told so, no cursors: a process that dies between the two."""

    is_cut = False
    commits = 0

    async def commit(self, units: Sequence[UnitOfWork], *, lease: Lease) -> CommitResult:
        self.commits += 1
        return await super().commit(units, lease=lease)

    async def put_schedule_cursor(self, cursor: ScheduleCursor, *, replaces: ScheduleCursor | None) -> bool:
        if self.is_cut:
            await asyncio.Event().wait()
        return await super().put_schedule_cursor(cursor, replaces=replaces)


async def test_a_kill_between_a_tick_and_its_cursor_repeats_nothing() -> None:
    store, clock = CutOff(), ManualClock()
    first = SagaRuntime(store, definitions=[report(catch_up="all")], clock=clock)
    await first.start()
    store.is_cut = True
    await clock.advance_through("1h")
    runs_before = await _until_runs(store, 1)
    await first.abandon()

    store.is_cut = False
    async with SagaRuntime(store, definitions=[report(catch_up="all")], clock=clock) as second:
        await second.settled()
        await clock.advance_through("1h")
        await second.settled()
        (status,) = await second.schedules()

    assert runs_before == 1
    assert [json.loads(run.result or b"") for run in reversed(await store.runs("report", TICKS))] == [
        {"scheduledFor": "2026-01-01T01:00:00Z"},
        {"scheduledFor": "2026-01-01T02:00:00Z"},
    ]
    assert status.last_tick_at == NEW_YEAR + 2 * HOUR


async def test_a_whole_round_that_was_accepted_before_a_kill_is_not_applied_again() -> None:
    store, clock = CutOff(), ManualClock()
    first = SagaRuntime(store, definitions=[report("* * * * *", catch_up="all")], clock=clock)
    await first.start()
    store.is_cut = True
    clock.advance("300m")
    await _until_runs(store, 256)
    await first.abandon()

    store.is_cut, store.commits = False, 0
    async with SagaRuntime(store, definitions=[report("* * * * *", catch_up="all")], clock=clock) as second:
        await second.settled()

    runs = await store.runs("report", TICKS)
    moments = [json.loads(run.result or b"")["scheduledFor"] for run in reversed(runs)]
    assert len(moments) == len(set(moments)) == 300
    assert store.commits < 10, "the repeated round is found out as a whole, not tick by tick"


async def test_a_tick_whose_payload_a_release_has_changed_meanwhile_is_not_repeated() -> None:
    store, clock = CutOff(), ManualClock()
    first = SagaRuntime(store, definitions=[report(catch_up="all")], clock=clock)
    await first.start()
    store.is_cut = True
    await clock.advance_through("1h")
    await _until_runs(store, 1)
    await first.abandon()

    store.is_cut = False
    changed = report(catch_up="all", message={"type": "report:tick", "payload": {"full": True}})
    async with SagaRuntime(store, definitions=[changed], clock=clock) as second:
        await second.settled()

    assert len(await store.runs("report", TICKS)) == 1


async def _until_runs(store: MemoryStore, count: int) -> int:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while len(runs := await store.runs("report", TICKS)) < count:  # noqa: ASYNC110 - the store has no event for it
            await asyncio.sleep(0)
    return len(runs)


class Knife:
    """Cuts a life off at its `nth` commit, or before it writes its `nth` cursor."""

    def __init__(self, nth: int) -> None:
        self.has_cut = asyncio.Event()
        self._left = nth

    def _is_here(self) -> bool:
        self._left -= 1
        if not self._left:
            self.has_cut.set()
        return self._left == 0

    def at_commit(self, step: str) -> None:
        if step == "committed" and self._is_here():
            raise Cut("committed")

    def at_cursor(self, life: Life) -> None:
        store = life.runtime.store
        write = store.put_schedule_cursor

        async def put_schedule_cursor(cursor: ScheduleCursor, *, replaces: ScheduleCursor | None) -> bool:
            if self._is_here():
                await asyncio.Event().wait()
            return await write(cursor, replaces=replaces)

        store.put_schedule_cursor = put_schedule_cursor  # type: ignore[method-assign]


def hourly_counter() -> SagaDefinition[Any]:
    """A saga that counts its hourly ticks, and how often one did not come an hour after the one before."""

    def count(saga: Any, event: Any, context: Any) -> list[Any]:
        moment = datetime.fromisoformat(event.payload["scheduledFor"])
        follows = (moment - datetime.fromisoformat(saga.state["last"])) == HOUR
        saga.state = {
            "count": saga.state["count"] + 1,
            "gaps": saga.state["gaps"] + (not follows),
            "last": moment.isoformat(),
        }
        return []

    return (
        define_saga("report")
        .schedule("0 * * * *", catch_up="all")
        .singleton()
        .state({"count": 0, "gaps": 0, "last": NEW_YEAR.isoformat()})
        .on("report:tick", count)
        .build()
    )


@pytest.mark.parametrize("store_kind", ["sqlite"])  # thousands of commits, one after the other
async def test_a_year_of_hourly_ticks_with_kills_is_applied_once_each(bench: Bench) -> None:
    saga = hourly_counter()
    overdue: list[timedelta] = []
    for number in range(26):
        knife = Knife(nth=1 + number // 2 % 2)
        life = await bench.live(saga, on_step=knife.at_commit if number % 2 else no_step)
        if number % 2 == 0:
            knife.at_cursor(life)
        bench.clock.advance(timedelta(days=14))
        await asyncio.wait_for(knife.has_cut.wait(), PATIENCE_SECONDS)
        (status,) = await life.runtime.schedules()
        overdue.append(bench.clock.now() - (status.last_tick_at or NEW_YEAR))
        await bench.die(life)
    bench.clock.advance(timedelta(days=1))
    life = await bench.live(saga)
    await life.runtime.settled(30)

    assert min(overdue) > timedelta()
    instance = await life.instance("report", "singleton")
    assert json.loads(instance.state) == {"count": 8760, "gaps": 0, "last": "2027-01-01T00:00:00+00:00"}


@pytest.mark.parametrize("store_kind", ["sqlite"])  # thousands of commits, one after the other
async def test_a_year_of_hourly_ticks_over_two_processes_with_kills_is_applied_once_each(bench: Bench) -> None:
    saga = hourly_counter()
    lives = [await bench.live(saga), await bench.live(saga)]
    applied: list[int] = []

    async def counted(life: Life) -> int:
        instance = await life.runtime.get_instance("report", "singleton")
        return 0 if instance is None else int(json.loads(instance.state)["count"])

    for number in range(24):
        begun = await counted(lives[0])
        bench.clock.advance(timedelta(hours=8760 // 24))
        async with asyncio.timeout(PATIENCE_SECONDS):
            # One of the two dies in the middle of the round: now the one that fires the ticks, now the other.
            while await counted(lives[0]) == begun:  # noqa: ASYNC110 - it is another runtime that gets on
                await asyncio.sleep(0.001)
        await bench.die(lives[number % 2])
        applied.append(await counted(lives[1 - number % 2]))
        lives[number % 2] = await bench.live(saga)
    async with asyncio.timeout(PATIENCE_SECONDS):
        while await counted(lives[0]) < 8760:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await lives[0].runtime.settled(20)

    instance = await lives[1].instance("report", "singleton")
    assert json.loads(instance.state) == {"count": 8760, "gaps": 0, "last": "2027-01-01T00:00:00+00:00"}
    assert sum(found % 365 != 0 for found in applied) > 2  # so many kills came in the middle


# -- what stands against a tick ---------------------------------------------------------------------------------------


async def test_a_tick_that_finds_no_instance_is_a_dead_letter_and_the_next_one_comes(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    broken = [True]

    def rule(message: Any) -> str | None:
        if broken[0]:
            raise RuntimeError("no key today")
        return "day"

    saga = define_saga("report").schedule("0 * * * *").correlate(rule).state({}).on("report:tick", _report)
    life = await bench.live(saga.build())

    with caplog.at_level(logging.WARNING):
        await bench.advance("1h")
    broken[0] = False
    (letter,) = await life.runtime.dead_letters()
    await bench.advance("1h")
    applied = await life.runtime.get_instance("report", "day")
    await life.runtime.redrive(letter.id)
    await life.runtime.settled()

    assert "no key today" in caplog.text
    assert (letter.saga_id, letter.type, letter.attempts) == ("report", "report:tick", 1)
    assert "no key today" in letter.reason
    assert applied is not None
    assert applied.result == b'{"scheduledFor":"2026-01-01T02:00:00Z"}'
    assert await life.runtime.dead_letters() == []


async def test_a_store_that_is_away_for_a_moment_loses_no_tick(caplog: pytest.LogCaptureFixture) -> None:
    class Flaky(MemoryStore):
        failures = 0

        async def put_schedule_cursor(self, cursor: ScheduleCursor, *, replaces: ScheduleCursor | None) -> bool:
            if self.failures:
                self.failures -= 1
                raise BackendUnavailable("away")
            return await super().put_schedule_cursor(cursor, replaces=replaces)

    store, clock = Flaky(), ManualClock()
    async with SagaRuntime(store, definitions=[report()], clock=clock) as runtime:
        await runtime.settled()
        store.failures = 1
        with caplog.at_level(logging.WARNING):
            clock.advance("1h")
            await asyncio.sleep(0)
            await runtime.settled()

        assert len(await store.runs("report", TICKS)) == 1
        assert "ticks have to wait: away" in caplog.text


async def test_a_schedule_in_trouble_holds_up_no_other(bench: Bench) -> None:
    store, clock = MemoryStore(), ManualClock()
    troubled = define_saga("a-troubled").schedule("0 * * * *").state({}).on("a-troubled:tick", _report).build()
    runtime = SagaRuntime(store, definitions=[troubled, report()], clock=clock)
    accept = runtime._scheduler._accept

    async def accept_one(definition: SagaDefinition[Any], tick: SagaMessage[Any]) -> object:
        if definition.id == "a-troubled":
            raise BackendUnavailable("all slots are taken")
        return await accept(definition, tick)

    runtime._scheduler._accept = accept_one
    async with runtime:
        await runtime.settled()
        clock.advance("1h")

        assert await _until_runs(store, 1) == 1


async def test_a_tick_goes_to_the_saga_whose_it_is_alone(bench: Bench) -> None:
    def scheduled(saga_id: str) -> SagaDefinition[Any]:
        return define_saga(saga_id).schedule("0 * * * *", message="CleanUp").state({}).on("CleanUp", _report).build()

    life = await bench.live(scheduled("one"), scheduled("two"))

    await bench.advance("1h")

    for saga_id in ("one", "two"):
        assert len(await life.runtime.store.runs(saga_id, f"{saga_id}:CleanUp")) == 1


# -- more than one process --------------------------------------------------------------------------------------------


async def test_two_processes_on_one_store_fire_each_tick_once(bench: Bench) -> None:
    one = await bench.live(report(), lease_seconds=1.0)
    two = await bench.live(report(), lease_seconds=1.0)

    for _ in range(3):
        bench.clock.advance("1h")
        async with asyncio.timeout(PATIENCE_SECONDS):
            # Either of the two may be the one that fires.
            while (await one.runtime.schedules())[0].last_tick_at != bench.clock.now():  # noqa: ASYNC110
                await asyncio.sleep(0.001)
    await one.runtime.settled()
    await two.runtime.settled()

    assert await hours_of(one) == [1, 2, 3]


# -- what people see and do -------------------------------------------------------------------------------------------


async def test_schedules_show_how_far_they_have_come(bench: Bench) -> None:
    nightly = define_saga("nightly").schedule("30 2 * * *", timezone="Europe/Berlin", catch_up="none", message="Night")
    plain = define_saga("plain").state({}).on("X", _report).build()
    life = await bench.live(report(), nightly.state({}).on("Night", _report).build(), plain)
    before = await life.runtime.schedules()

    await bench.advance("1h")

    night = ScheduleStatus(
        saga_id="nightly",
        cron="30 2 * * *",
        timezone="Europe/Berlin",
        catch_up="none",
        message_type="Night",
        last_tick_at=None,
        next_tick_at=NEW_YEAR + 1.5 * HOUR,
    )
    hourly = ScheduleStatus(
        saga_id="report",
        cron="0 * * * *",
        timezone="UTC",
        catch_up="latest",
        message_type="report:tick",
        last_tick_at=NEW_YEAR + HOUR,
        next_tick_at=NEW_YEAR + 2 * HOUR,
    )
    assert await life.runtime.schedules() == [night, hourly]
    assert [status.last_tick_at for status in before] == [None, None]


async def test_a_tick_by_hand_is_one_more_and_moves_nothing(bench: Bench) -> None:
    life = await bench.live(report())
    await bench.advance("30m")
    before = await life.runtime.schedules()

    receipts = [await life.runtime.trigger_schedule("report") for _ in range(2)]
    after = await life.runtime.schedules()
    await bench.advance("30m")

    assert all(isinstance(receipt, PublishReceipt) and not receipt.duplicate for receipt in receipts)
    assert after == before
    assert await ticks_of(life) == [
        {"scheduledFor": "2026-01-01T00:30:00Z", "manual": True},
        {"scheduledFor": "2026-01-01T00:30:00Z", "manual": True},
        {"scheduledFor": "2026-01-01T01:00:00Z"},
    ]


async def test_a_tick_by_hand_that_is_refused_is_a_value(bench: Bench) -> None:
    def rule(message: Any) -> str:
        raise RuntimeError("no key today")

    saga = define_saga("report").schedule("0 3 * * *").correlate(rule).state({}).on("report:tick", _report).build()
    life = await bench.live(saga)

    refused = await life.runtime.trigger_schedule("report")

    assert isinstance(refused, PublishRejected)
    assert "no key today" in refused.reason


@pytest.mark.parametrize(("saga_id", "why"), [("plain", "has no schedule"), ("gone", "is not registered here")])
async def test_a_tick_by_hand_of_what_is_not_scheduled_is_refused(bench: Bench, saga_id: str, why: str) -> None:
    life = await bench.live(report(), define_saga("plain").state({}).on("X", _report).build())

    with pytest.raises(ScheduleNotFound, match=f"saga '{saga_id}' {why}: scheduled sagas are report") as caught:
        await life.runtime.trigger_schedule(saga_id)

    assert caught.value.code == "SCHEDULE_NOT_FOUND"


async def test_between_two_ticks_only_the_alarm_waits(bench: Bench) -> None:
    life = await bench.live(report("0 0 1 6 *"))
    await life.runtime.settled()
    asleep = bench.clock.sleepers

    await bench.advance("24h")

    assert bench.clock.sleepers == asleep
    assert (await life.runtime.schedules())[0].next_tick_at == datetime(2026, 6, 1, tzinfo=UTC)


async def test_a_runtime_that_stops_in_the_middle_of_a_year_of_ticks_stops_soon(bench: Bench) -> None:
    first = await bench.live(report("* * * * *", catch_up="all"))
    bench.clock.advance("2000m")
    for _ in range(20):
        await asyncio.sleep(0)

    await asyncio.wait_for(bench.end(first), PATIENCE_SECONDS)
    life = await bench.live(report("* * * * *", catch_up="all"))
    await life.runtime.settled()

    assert len(await ticks_of(life)) == 2000
