"""Jobs that run by the clock: each tick of a job's schedule triggers one run, late rather than never.

`engine/schedules.py` says which ticks are due, as it does for sagas. A tick is a trigger whose idempotency key is its
moment, and the cursor is moved when the runs are durable, by whoever has read it last; so any number of processes may
do this, die in the middle of it, and each tick is still one run:

    killed before the run is durable     the tick is after the cursor: another fires it
    killed before the cursor has moved   another fires it too, and its key makes it a duplicate
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from sagaloom.clock import Clock
from sagaloom.engine.records import ScheduleCursor
from sagaloom.engine.schedules import begin, due, is_current, next_tick
from sagaloom.ports.jobs import JobRunStore
from sagaloom.workers.handlers import JobDefinition, JobSet
from sagaloom.workers.roles import Role

__all__ = ["Ticker", "tick_key"]

_NAP: Final = timedelta(seconds=30)
_BREATH: Final = timedelta(milliseconds=100)


def tick_key(tick: datetime) -> str:
    """The idempotency key of a tick.

    >>> tick_key(datetime(2026, 1, 31, 3, tzinfo=UTC))
    'tick:2026-01-31T03:00:00Z'
    """
    return f"tick:{tick.astimezone(UTC).isoformat().replace('+00:00', 'Z')}"


class Ticker(Role):
    """Fires the schedules of `jobs`. `fire` triggers the run of a tick, and returns when it is durable."""

    name = "ticker"

    def __init__(
        self,
        store: JobRunStore,
        jobs: JobSet,
        clock: Clock,
        *,
        fire: Callable[[JobDefinition[Any], datetime], Awaitable[None]],
    ) -> None:
        super().__init__()
        self._store = store
        self._scheduled = [job for job in jobs if job.schedule is not None]
        self._clock = clock
        self._fire = fire
        self._next_at: datetime | None = None

    async def start(self) -> None:
        """Begins, if any job has a schedule: ticks count from the first time that one is seen."""
        if self._scheduled:
            await super().start()

    @property
    def is_needed(self) -> bool:
        return bool(self._scheduled)

    async def next_ticks(self) -> dict[str, datetime | None]:
        """When each scheduled job ticks next."""
        cursors = {cursor.saga_id: cursor for cursor in await self._store.schedules()} if self._scheduled else {}
        now = self._clock.now()
        return {
            job.id: next_tick(job.schedule, cursors.get(job.id), now)
            for job in self._scheduled
            if job.schedule is not None
        }

    async def _turn(self) -> None:
        self._next_at = None
        cursors = {cursor.saga_id: cursor for cursor in await self._store.schedules()}
        for job in self._scheduled:
            if self._is_draining:
                return
            next_at = await self._tick(job, cursors.get(job.id), self._clock.now())
            if next_at is not None and (self._next_at is None or next_at < self._next_at):
                self._next_at = next_at

    async def _tick(self, job: JobDefinition[Any], cursor: ScheduleCursor | None, now: datetime) -> datetime | None:
        """Fires what is due of one schedule, and returns when there is something to do again."""
        schedule = job.schedule
        assert schedule is not None
        if cursor is None or not is_current(cursor, schedule):
            begun = begin(job.id, schedule, now)
            if not await self._store.put_schedule(begun, replaces=cursor):
                return now  # somebody else has begun it
            cursor = begun
        planned = due(schedule, cursor, now)
        for tick in planned.ticks:
            await self._fire(job, tick)
        if planned.cursor != cursor and not await self._store.put_schedule(planned.cursor, replaces=cursor):
            return now
        return planned.next_at

    async def _pause(self) -> None:
        now = self._clock.now()
        # A clock that jumps, or a schedule that another process has moved on, is noticed after a while.
        moment = now + _NAP if self._next_at is None else min(self._next_at, now + _NAP)
        # Whoever lost a race looks again, and not in the same moment for ever.
        await self._clock.sleep_until(max(moment, now + _BREATH))
