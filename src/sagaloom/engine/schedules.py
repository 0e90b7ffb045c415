"""Which ticks of a schedule are due, and how the handled ones are remembered.

A schedule has a cursor: every tick scheduled for `handled_until` or before has been handled, whatever that meant for
it. The rules:

1. A saga's first cursor stands at the moment of its registration: there are no ticks from before. So does the cursor
   of a schedule whose expression or zone has changed, and of one that was taken away and comes back.
2. A tick is due when it is after the cursor and not after now. It is *missed* when that was more than `MISSED_AFTER`
   ago, because nobody was there to fire it. Ticks that are not missed always fire.
3. Of the missed ones `catch_up` lets fire the newest (`latest`), each (`all`), or none of them (`none`).
4. A round handles at most `TICKS_PER_ROUND_MAX` ticks; then the cursor moves, and the next round goes on. So a year of
   missed ticks costs no more memory than a day, and what was done is not done again.
5. The cursor never moves back, and nothing before it is due. A clock that is set back repeats no tick; it has to come
   past the cursor again first. A clock that jumps forward leaves ticks behind that were missed: see 3.

The cursor alone would repeat ticks: a process can die after a tick was accepted and before the cursor has moved. So a
tick is a message whose idempotency key is its moment, `tick:2026-01-31T03:00:00Z`; the same tick of one saga always
goes to the same correlation key, and its mark there makes the second one a duplicate.

What we dislike about it: where a release changes what a tick is sent as (its type, or a correlation rule) and the
process before it died in that very instant, the mark is under another key, and the one tick comes twice. And a clock
that once ran years ahead has taken the cursor along: the schedule is silent until then, or until its expression is
another.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from itertools import islice, takewhile
from typing import Any, Final

import msgspec

from sagaloom.cron import Cron, parse_cron
from sagaloom.definitions import SagaDefinition, SchedulePolicy
from sagaloom.engine.records import ScheduleCursor
from sagaloom.ids import derived_id
from sagaloom.messages import SagaMessage

__all__ = [
    "MISSED_AFTER",
    "TICKS_PER_ROUND_MAX",
    "Round",
    "after_tick",
    "begin",
    "due",
    "is_current",
    "next_tick",
    "retire",
    "tick_message",
]

MISSED_AFTER: Final = timedelta(minutes=1)
TICKS_PER_ROUND_MAX: Final = 256


class Round(msgspec.Struct, frozen=True):
    """What is to be done now: fire `ticks`, oldest first, then remember `cursor`. `next_at` is when there will be
    something to do again; now or before when the round was full, None when there never will be."""

    ticks: tuple[datetime, ...]
    cursor: ScheduleCursor
    next_at: datetime | None


def begin(saga_id: str, schedule: SchedulePolicy, now: datetime) -> ScheduleCursor:
    """The cursor of a schedule that begins now."""
    return ScheduleCursor(saga_id, schedule.cron, schedule.timezone, now)


def retire(cursor: ScheduleCursor, now: datetime) -> ScheduleCursor:
    """The cursor of a saga that is not scheduled any more: if it is again, that begins anew."""
    return ScheduleCursor(cursor.saga_id, "", "", now, cursor.last_tick_at)


def is_current(cursor: ScheduleCursor, schedule: SchedulePolicy | None) -> bool:
    """Whether `cursor` belongs to this schedule, or is retired where there is none."""
    if schedule is None:
        return not cursor.cron
    return (cursor.cron, cursor.timezone) == (schedule.cron, schedule.timezone)


def due(schedule: SchedulePolicy, cursor: ScheduleCursor, now: datetime, *, limit: int = TICKS_PER_ROUND_MAX) -> Round:
    """What is to be done at `now`, at most `limit` (from 2 on) ticks of it."""
    cron = _cron(schedule)
    done = cursor.handled_until
    newest = cron.latest(now)
    if newest is None or newest <= done:
        return Round((), cursor, cron.next_after(max(done, now)))
    on_time_from = now - MISSED_AFTER
    if schedule.catch_up == "all":
        ticks = _until(now, cron.after(done), limit)
    else:
        # A tick exactly at the bound is on time, and `after` begins behind the moment it is given.
        ticks = _until(now, cron.after(max(done, on_time_from - timedelta(microseconds=1))), limit)
        missed = cron.latest(on_time_from - timedelta(microseconds=1)) if schedule.catch_up == "latest" else None
        if missed is not None and missed > done:
            ticks = (missed, *ticks)[:limit]
    if len(ticks) == limit and ticks[-1] < newest:
        return Round(ticks, after_tick(cursor, ticks[-1]), cron.next_after(ticks[-1]))
    last = ticks[-1] if ticks else cursor.last_tick_at
    moved = msgspec.structs.replace(cursor, handled_until=newest, last_tick_at=last)
    return Round(ticks, moved, cron.next_after(now))


def after_tick(cursor: ScheduleCursor, tick: datetime) -> ScheduleCursor:
    """The cursor after `tick` was fired."""
    return msgspec.structs.replace(cursor, handled_until=tick, last_tick_at=tick)


def next_tick(schedule: SchedulePolicy, cursor: ScheduleCursor | None, now: datetime) -> datetime | None:
    """When the next tick comes by itself, after whatever was missed."""
    done = cursor.handled_until if cursor is not None and is_current(cursor, schedule) else now
    return _cron(schedule).next_after(max(done, now))


def tick_message(
    definition: SagaDefinition[Any], scheduled_for: datetime, *, by_hand: str | None = None
) -> SagaMessage[Any]:
    """The message of one tick, the same whenever it is made. `by_hand` is the id of one that somebody asked for."""
    schedule = definition.schedule
    assert schedule is not None
    moment = scheduled_for.astimezone(UTC)
    written = moment.isoformat().replace("+00:00", "Z")
    return SagaMessage(
        schedule.message_type,
        msgspec.Raw(schedule.payload_at(moment, is_manual=by_hand is not None)),
        schedule.correlation_key,
        f"tick:{written}" if by_hand is None else f"tick:{by_hand}",
        schedule.concurrency_key,
        moment,
        derived_id("tick", definition.id, written) if by_hand is None else by_hand,
    )


def _cron(schedule: SchedulePolicy) -> Cron:
    return parse_cron(schedule.cron, schedule.timezone)


def _until(now: datetime, ticks: Iterable[datetime], limit: int) -> tuple[datetime, ...]:
    return tuple(islice(takewhile(lambda tick: tick <= now, ticks), limit))
