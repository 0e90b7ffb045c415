"""Retention: removes what has been kept for as long as its saga says, and counts what lives for longer than that.

Every hour, by the runtime's clock, finished runs go that ended more than `completed_days` ago, of sagas that say so.
The walk is over the listing, from `completed_days` ago backwards: what it meets and leaves is what began before that
and ended after it. Once a day go the marks of messages that were accepted before the idempotency window, and the
tombstones whose time is over; marks have no order of time, so all of them are walked over, by the holder of partition 0
alone. The first time is a minute after the start, for a process that lives shorter has better things to do.

Everything goes in small commits with pauses between them, each whole (`sagaloom.stores.removing`): whoever is stopped
in between goes on at the next sweep, and nothing has to be remembered for that. Runs and tombstones are removed between
two turns of the receiver, which then forgets what it knew of their keys.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from typing import Final

from sagaloom.clock import Clock
from sagaloom.definitions import SagaDefinition, SagaInstanceStatus
from sagaloom.engine.records import Head, Instance
from sagaloom.errors import ConfigurationError, InstanceNotFound, SagasError
from sagaloom.ports.store import InstanceFilter, SagaStore
from sagaloom.runtime.alarm import Alarm
from sagaloom.runtime.options import RuntimeOptions
from sagaloom.runtime.receiver import Receiver

__all__ = ["TOMBSTONE_DAYS_MIN", "Retention", "removed_instance"]

_log = logging.getLogger("sagaloom.retention")

_FINISHED: Final[tuple[SagaInstanceStatus, ...]] = ("completed", "failed", "cancelled")
_LIVE: Final[tuple[SagaInstanceStatus, ...]] = ("pending", "running", "compensating")
TOMBSTONE_DAYS_MIN: Final = 90.0

_FIRST_AFTER: Final = timedelta(minutes=1)
_SWEEPS_APART: Final = timedelta(hours=1)
_DAY: Final = timedelta(days=1)
_PAGE: Final = 256
_RUNS_AT_ONCE: Final = 64
_ROWS_AT_ONCE: Final = 1_000
_MARKS_AT_ONCE: Final = 1_000
_COUNTED_MAX: Final = 10_000
_PAUSE_SECONDS: Final = 0.01


class Retention:
    """Removes what is over, of the partitions that this process holds."""

    def __init__(
        self,
        store: SagaStore,
        clock: Clock,
        options: RuntimeOptions,
        receiver: Receiver,
        *,
        definitions: Callable[[], Iterable[SagaDefinition[object]]],
    ) -> None:
        if not options.idempotency_days > 0:
            raise ConfigurationError(
                f"idempotency_days={options.idempotency_days:g} would take every repeat for a new message: give more "
                "than 0"
            )
        self._store = store
        self._clock = clock
        self._receiver = receiver
        self._definitions = definitions
        self._on_step = options.on_step
        self._window_days = options.idempotency_days
        self._alarm = Alarm(clock, self._ring)
        self._is_due = asyncio.Event()
        self._is_sweeping = False
        self._daily_at: datetime | None = None
        self.overdue: dict[str, int] = {}
        """How many live runs of a saga were older than its `active_days` at the last sweep; 10,000 are the most."""

    @property
    def is_idle(self) -> bool:
        return not self._is_due.is_set() and not self._is_sweeping

    async def run(self) -> None:
        """Sweeps now and then, until cancelled."""
        self._alarm.set(self._clock.now() + _FIRST_AFTER)
        while True:
            await self._is_due.wait()
            self._is_sweeping = True
            self._is_due.clear()
            try:
                await self._sweep()
            except SagasError as error:
                _log.warning("what is over cannot be removed now: %s", error.message)
            finally:
                self._is_sweeping = False
                self._alarm.set(self._clock.now() + _SWEEPS_APART)

    def close(self) -> None:
        self._alarm.clear()

    async def _sweep(self) -> None:
        now = self._clock.now()
        for definition in self._definitions():
            retention = definition.about.retention
            if retention.completed_days is not None and (before := _days_before(now, retention.completed_days)):
                await self._remove_runs(definition.id, before)
            if retention.active_days is not None and (before := _days_before(now, retention.active_days)):
                old = InstanceFilter(saga_ids=(definition.id,), statuses=_LIVE, created_before=before)
                self.overdue[definition.id] = await self._store.count_instances(old, limit=_COUNTED_MAX)
        if self._daily_at is None or now >= self._daily_at:
            await self._remove_tombstones()
            await self._forget_marks()
            self._daily_at = now + _DAY

    async def _remove_runs(self, saga_id: str, before: datetime) -> None:
        wanted = InstanceFilter(saga_ids=(saga_id,), statuses=_FINISHED, created_before=before)
        cursor: str | None = None
        while True:
            page, cursor = await self._store.instances(wanted, limit=_PAGE, cursor=cursor)
            over = [run for run in page if run.ended_at is not None and run.ended_at < before]
            for bite in _bites(over):
                await self._remove(bite)
            if cursor is None:
                return
            await asyncio.sleep(_PAUSE_SECONDS)

    async def _remove(self, runs: Sequence[Instance]) -> None:
        until = _days_after(self._clock.now(), max(TOMBSTONE_DAYS_MIN, self._window_days))
        async with self._receiver.turning:
            lease = self._receiver.share.lease
            if lease is None:
                return
            try:
                await self._store.remove_runs(runs, tombstone_until=until, lease=lease)
            finally:
                self._receiver.forget((run.saga_id, run.key) for run in runs)
        self._on_step("pruned")
        await asyncio.sleep(_PAUSE_SECONDS)

    async def _remove_tombstones(self) -> None:
        gone: list[tuple[str, str]] = []
        while True:
            async with self._receiver.turning:
                lease = self._receiver.share.lease
                if lease is None:
                    return
                gone = await self._store.remove_tombstones(due_by=self._clock.now(), limit=_RUNS_AT_ONCE, lease=lease)
                self._receiver.forget(gone)
            if len(gone) < _RUNS_AT_ONCE:
                return
            await asyncio.sleep(_PAUSE_SECONDS)

    async def _forget_marks(self) -> None:
        before = _days_before(self._clock.now(), self._window_days)
        if before is None:
            return
        self._receiver.forget_marks(before)
        if 0 not in self._receiver.share.parts:
            return
        cursor: str | None = None
        while True:
            _, cursor = await self._store.prune_marks(before=before, after=cursor, limit=_MARKS_AT_ONCE)
            if cursor is None:
                return
            await asyncio.sleep(_PAUSE_SECONDS)

    def _ring(self) -> None:
        self._is_due.set()


def removed_instance(head: Head | None, run: int | None) -> InstanceNotFound | None:
    """The error about a run that was there, and was removed when it had been kept for long enough; None about others.
    `head` is that of its key."""
    if head is None or not 0 < (run or head.run) <= head.run:
        return None
    number = run or head.run
    status = head.ended_as if number == head.run else None
    ended = "has ended" if status is None else f"has ended ({status})"
    return InstanceNotFound(
        f"run {number} of {head.saga_id}:{head.key} {ended}, and was removed when its saga's retention was over",
        data={"run": number, "status": status, "removed": True},
    )


def _bites(runs: Sequence[Instance]) -> Iterator[list[Instance]]:
    """`runs` in commits that are not too large, and no smaller than one run."""
    bite: list[Instance] = []
    rows = 0
    for run in runs:
        if bite and (len(bite) == _RUNS_AT_ONCE or rows + run.entries > _ROWS_AT_ONCE):
            yield bite
            bite, rows = [], 0
        bite.append(run)
        rows += run.entries
    if bite:
        yield bite


def _days_before(moment: datetime, days: float) -> datetime | None:
    """None when that is before all time."""
    try:
        return moment - timedelta(days=days)
    except OverflowError:
        return None


def _days_after(moment: datetime, days: float) -> datetime:
    try:
        return moment + timedelta(days=days)
    except OverflowError:
        return datetime.max.replace(tzinfo=moment.tzinfo) - _DAY
