"""Jobs that run by the clock."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from typing import Any, TypedDict

import pytest

from sagaloom import DefinitionError
from sagaloom.testing import ManualClock
from sagaloom.workers import (
    JobContext,
    JobDefinition,
    JobResult,
    JobSchedule,
    create_success_result,
    define_job_handler,
)
from tests.workers import jobs_room
from tests.workers.jobs_room import Room, SharedMemory

Ctx = JobContext[dict[str, Any]]


def open_room(*jobs: JobDefinition[Any], **options: Any) -> AbstractAsyncContextManager[Room]:
    """A room in which nothing but schedules looks at the clock often: hours pass here."""
    return jobs_room.open_room(*jobs, poll_seconds=3600, lease_seconds=7200, **options)


MIDNIGHT = datetime(2026, 1, 1, tzinfo=UTC)


def hourly(**options: Any) -> JobDefinition[Any]:
    async def report(ctx: Ctx) -> JobResult[Any]:
        return create_success_result({"for": ctx.scheduled_for and ctx.scheduled_for.hour, "payload": ctx.payload})

    return define_job_handler(report, **{"schedule": "0 * * * *"} | options)


async def test_each_tick_is_one_run() -> None:
    async with open_room(hourly()) as room:
        await room.clock.advance_through("59m")
        early = room.store.settled.qsize()
        await room.clock.advance_through("1m")
        first = await room.settled()
        await room.clock.advance_through("1h")
        second = await room.settled()

        assert early == 0
        assert first.result == b'{"for":1,"payload":{"scheduledFor":"2026-01-01T01:00:00Z"}}'
        assert (first.scheduled_for, second.scheduled_for) == (MIDNIGHT.replace(hour=1), MIDNIGHT.replace(hour=2))
        assert room.store.settled.empty()


async def test_two_workers_fire_a_tick_once() -> None:
    kv, clock = SharedMemory(), ManualClock()
    async with open_room(hourly(), kv=kv, clock=clock) as room, open_room(hourly(), kv=kv, clock=clock):
        for _ in range(3):
            await clock.advance_through("1h")  # and everybody has had a turn

        runs, _ = await room.runtime.list_runs()
        assert sorted(run.scheduled_for.hour for run in runs if run.scheduled_for is not None) == [1, 2, 3]


@pytest.mark.parametrize(("catch_up", "hours"), [("latest", [5]), ("all", [1, 2, 3, 4, 5]), ("none", [])])
async def test_ticks_that_were_missed_follow_the_schedules_word(catch_up: Any, hours: list[int]) -> None:
    kv, clock = SharedMemory(), ManualClock()
    job = hourly(schedule=JobSchedule("0 * * * *", catch_up=catch_up))
    async with open_room(job, kv=kv, clock=clock):
        await clock.advance_through("1m")
    clock.advance("305m")
    async with open_room(job, kv=kv, clock=clock) as room:
        await clock.advance_through("1s")

        runs, _ = await room.runtime.list_runs()
        assert sorted(run.scheduled_for.hour for run in runs if run.scheduled_for is not None) == hours


async def test_a_tick_whose_process_died_before_the_cursor_moved_is_one_run() -> None:
    kv, clock = SharedMemory(), ManualClock()
    async with open_room(hourly(), kv=kv, clock=clock) as room:
        put = room.store.put_schedule

        async def dying(*args: Any, **options: Any) -> bool:
            return False

        await clock.advance_through("1m")
        room.store.put_schedule = dying  # type: ignore[method-assign]
        await clock.advance_through("1h")
        room.store.put_schedule = put  # type: ignore[method-assign]
    async with open_room(hourly(), kv=kv, clock=clock) as room:
        await clock.advance_through("1m")

        assert len((await room.runtime.list_runs())[0]) == 1


async def test_a_clock_that_is_set_back_repeats_no_tick() -> None:
    kv, clock = SharedMemory(), ManualClock()
    async with open_room(hourly(), kv=kv, clock=clock):
        await clock.advance_through("3h")
    async with open_room(hourly(), kv=kv, clock=ManualClock()) as behind:
        await behind.clock.advance_through("3h")
        before, _ = await behind.runtime.list_runs()
        await behind.clock.advance_through("1h")
        after, _ = await behind.runtime.list_runs()

        assert (len(before), len(after)) == (3, 4)


async def test_a_typed_job_has_a_payload_for_its_ticks() -> None:
    class Report(TypedDict):
        kind: str

    async def report(ctx: JobContext[Report]) -> JobResult[str]:
        return create_success_result(ctx.payload["kind"])

    job = define_job_handler(report, payload=Report, schedule=JobSchedule("0 * * * *", payload={"kind": "short"}))
    async with open_room(job) as room:
        ticks = await room.runtime.next_ticks()
        await room.clock.advance_through("1h")
        run = await room.settled()

        assert ticks == {"report": MIDNIGHT.replace(hour=1)}
        assert (run.result, run.payload) == (b'"short"', b'{"kind":"short"}')


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        ("every day", "3 fields|2 fields"),
        (JobSchedule("0 * * * *", timezone="Mars/Olympus"), "unknown here"),
        (JobSchedule("0 * * * *", catch_up="some"), "catch_up must be one of"),  # type: ignore[arg-type]
        (JobSchedule("0 * * * *", payload=[1]), "must be an object"),
        (JobSchedule("0 * * * *", payload={1, 2}), "a payload that it does not take"),
        (5, "must be a cron expression"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(schedule: Any, text: str) -> None:
    with pytest.raises(DefinitionError, match=text):
        hourly(schedule=schedule)


def test_a_schedule_whose_payload_the_job_does_not_take_is_refused() -> None:
    class Report(TypedDict):
        kind: str

    async def report(ctx: JobContext[Report]) -> JobResult[str]:
        return create_success_result(ctx.payload["kind"])

    with pytest.raises(DefinitionError, match="JobSchedule\\(cron, payload"):
        define_job_handler(report, payload=Report, schedule="0 * * * *")
