"""The scheduler: fires the ticks of scheduled sagas, each once, late rather than never.

`engine/schedules.py` says which ticks are due. This role asks it when an alarm rings, hands the ticks to the door, and
writes the cursor when all of them are durable. In this order on purpose:

    killed before a tick is accepted     it is after the cursor: the next start fires it
    killed between the tick and cursor   the next start fires it again, and its mark makes it a duplicate
    killed after the cursor              it is behind the cursor: nobody fires it again

So it does not matter how many processes run this role; each tick is applied once, and the cursor is only written by
whoever has read it last (`put_schedule_cursor` compares). That one process should normally do it saves work, no more:
`owns` says whether this one is it, by the partition of (saga id, saga id).

A tick that the door refuses for good (a correlation rule that raises, a payload that is too large) becomes a dead
letter and is passed over: it would be refused for ever, and all later ones would wait behind it. What the environment
refuses is tried again.

Nothing polls: between two ticks the role sleeps, and with no schedule it sleeps for ever.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any

import msgspec

from sagaloom.clock import Clock
from sagaloom.definitions import CatchUp, SagaDefinition
from sagaloom.engine.correlation import DefinitionSet, dead_letter_id, default_key
from sagaloom.engine.records import DeadLetter, Envelope, ScheduleCursor
from sagaloom.engine.schedules import after_tick, begin, due, is_current, next_tick, retire, tick_message
from sagaloom.errors import IdempotencyKeyReused, MessageRejected, SagasError
from sagaloom.ids import key_hash, partition_of
from sagaloom.messages import SagaMessage
from sagaloom.ports.store import SagaStore
from sagaloom.runtime.alarm import Alarm

__all__ = ["ScheduleStatus", "Scheduler"]

_log = logging.getLogger("sagaloom.scheduler")
_PAUSE_SECONDS = 0.5
_PAUSE_SECONDS_MAX = 5.0


class ScheduleStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A schedule and how far it has come. `last_tick_at` is the moment that the newest fired tick was scheduled for,
    `next_tick_at` that of the next one."""

    saga_id: str
    cron: str
    timezone: str
    catch_up: CatchUp
    message_type: str
    last_tick_at: datetime | None
    next_tick_at: datetime | None


class Scheduler:
    """Fires what is due, and moves the cursors on.

    `accept` resolves when a tick is durable, or was before, and raises what stood against it; `give_up` writes the dead
    letter of one that can never be accepted.
    """

    def __init__(
        self,
        store: SagaStore,
        clock: Clock,
        *,
        definitions: Callable[[], DefinitionSet],
        accept: Callable[[SagaDefinition[Any], SagaMessage[Any]], Awaitable[object]],
        give_up: Callable[[DeadLetter], Awaitable[None]],
        owns: Callable[[int], bool] = lambda part: True,
    ) -> None:
        self._store = store
        self._clock = clock
        self._definitions = definitions
        self._accept = accept
        self._give_up = give_up
        self._owns = owns
        self._cursors: dict[str, ScheduleCursor] | None = None
        self._alarm = Alarm(clock, self.wake)
        self._is_due = asyncio.Event()
        self._is_firing = False
        self._is_closed = False
        self._failures = 0

    @property
    def is_idle(self) -> bool:
        """Whether no due tick is left to fire, as far as the alarm knows."""
        return not self._is_firing and (self._is_closed or not self._is_due.is_set())

    def wake(self) -> None:
        """Looks at every schedule again: time has come, definitions were added, or partitions were gained."""
        self._is_due.set()

    async def load(self) -> None:
        """Begins the schedules that are new, so that their ticks count from here. Missed ones fire in `run`."""
        now = self._clock.now()
        known = await self._known_cursors()
        for definition in self._definitions():
            # Whoever knows it first: the owner may be a process that runs an older release.
            if definition.schedule is not None and definition.id not in known:
                await self._move(begin(definition.id, definition.schedule, now), None)
        self._is_due.set()

    async def run(self) -> None:
        """Fires whenever a tick is due, until cancelled or closed."""
        while True:
            await self._is_due.wait()
            if self._is_closed:
                return
            self._is_firing = True
            self._is_due.clear()
            try:
                trouble = await self._fire()
            finally:
                self._is_firing = False
            if trouble is None:
                self._failures = 0
                continue
            if not self._failures and not self._is_closed:
                _log.warning("ticks have to wait: %s", trouble.message)
            self._failures += 1
            self._cursors = None  # Somebody else may move them meanwhile.
            self._is_due.set()
            await asyncio.sleep(min(_PAUSE_SECONDS * self._failures, _PAUSE_SECONDS_MAX))

    def close(self) -> None:
        """Begins no other round. Ticks that were not fired are after their cursor, and fire at the next start."""
        self._is_closed = True
        self._alarm.clear()
        self._is_due.set()

    async def statuses(self) -> list[ScheduleStatus]:
        """The schedules of the loaded definitions, by saga id."""
        cursors = {cursor.saga_id: cursor for cursor in await self._store.schedule_cursors()}
        now = self._clock.now()
        found: list[ScheduleStatus] = []
        for definition in sorted(self._definitions(), key=lambda each: each.id):
            schedule, cursor = definition.schedule, cursors.get(definition.id)
            if schedule is None:
                continue
            status = ScheduleStatus(
                saga_id=definition.id,
                cron=schedule.cron,
                timezone=schedule.timezone,
                catch_up=schedule.catch_up,
                message_type=schedule.message_type,
                last_tick_at=None if cursor is None else cursor.last_tick_at,
                next_tick_at=next_tick(schedule, cursor, now),
            )
            found.append(status)
        return found

    # ---------------------------------------------------------------- inside

    async def _fire(self) -> SagasError | None:
        """One round: fires what is due of every schedule, up to its limit, and sets the alarm for what comes next.
        Returns what kept one of them from it; the others have had their turn."""
        trouble: SagasError | None = None
        now = self._clock.now()
        for definition in self._definitions():
            if self._is_closed:
                break
            if not self._is_owned(definition) or definition.about.stands_still:
                continue  # Once it goes on, its `catch_up` says what becomes of the ticks between.
            try:
                next_at = await self._fire_one(definition, now)
            except SagasError as error:
                trouble = error
                continue
            if next_at is not None and next_at <= now:
                self.wake()
            elif next_at is not None:
                self._alarm.set(next_at)
        await asyncio.sleep(0)
        return trouble

    async def _fire_one(self, definition: SagaDefinition[Any], now: datetime) -> datetime | None:
        """Fires what is due of one schedule, and returns when there is something to do again."""
        cursor, schedule = await self._cursor_of(definition, now), definition.schedule
        if cursor is None or schedule is None:
            return None
        planned = due(schedule, cursor, now)
        accepted, trouble = await self._accept_all(definition, planned.ticks)
        if trouble is None:
            reached = planned.cursor
        elif accepted:
            reached = after_tick(cursor, accepted[-1])
        else:
            reached = cursor
        if reached != cursor:
            await self._move(reached, cursor)
        if trouble is not None:
            raise trouble
        return planned.next_at

    async def _accept_all(
        self, definition: SagaDefinition[Any], ticks: tuple[datetime, ...]
    ) -> tuple[list[datetime], SagasError | None]:
        """Gets the ticks accepted, all in one batch. Returns those up to the first that has to be tried again, and
        why it has."""
        messages = [tick_message(definition, tick) for tick in ticks]
        accepting = [self._accept(definition, message) for message in messages]
        answers = await asyncio.gather(*accepting, return_exceptions=True)
        accepted: list[datetime] = []
        for tick, message, answer in zip(ticks, messages, answers, strict=True):
            if isinstance(answer, IdempotencyKeyReused):
                # It was accepted by a process that died before it moved the cursor, with an older payload.
                _log.info("tick %s of saga %s came before: %s", tick, definition.id, answer.message)
            elif isinstance(answer, MessageRejected) and not answer.retryable:
                _log.warning("tick %s of saga %s is refused: %s", tick, definition.id, answer.message)
                try:
                    await self._give_up(_dead_letter(definition, message, answer, self._clock.now()))
                except SagasError as error:
                    return accepted, error
            elif isinstance(answer, SagasError):
                return accepted, answer
            elif isinstance(answer, BaseException):
                raise answer
            accepted.append(tick)
        return accepted, None

    async def _cursor_of(self, definition: SagaDefinition[Any], now: datetime) -> ScheduleCursor | None:
        """The cursor of a definition's schedule, which begins now if it is new; None when it is not scheduled."""
        cursors = await self._known_cursors()
        schedule, cursor = definition.schedule, cursors.get(definition.id)
        if schedule is not None and (cursor is None or not is_current(cursor, schedule)):
            cursor = await self._move(begin(definition.id, schedule, now), cursor)
        elif schedule is None and cursor is not None and not is_current(cursor, schedule):
            cursor = await self._move(retire(cursor, now), cursor)
        return cursor if schedule is not None and cursor is not None and is_current(cursor, schedule) else None

    async def _move(self, cursor: ScheduleCursor, before: ScheduleCursor | None) -> ScheduleCursor | None:
        """Writes a cursor, and returns the one that stands. When somebody else has moved it, that is theirs, and the
        next round goes on from there."""
        if await self._store.put_schedule_cursor(cursor, replaces=before):
            (await self._known_cursors())[cursor.saga_id] = cursor
            return cursor
        self._cursors = None
        self.wake()
        return (await self._known_cursors()).get(cursor.saga_id)

    async def _known_cursors(self) -> dict[str, ScheduleCursor]:
        if self._cursors is None:
            self._cursors = {cursor.saga_id: cursor for cursor in await self._store.schedule_cursors()}
        return self._cursors

    def _is_owned(self, definition: SagaDefinition[Any]) -> bool:
        return self._owns(partition_of(key_hash(definition.id, definition.id)))


def _dead_letter(
    definition: SagaDefinition[Any], tick: SagaMessage[Any], error: MessageRejected, now: datetime
) -> DeadLetter:
    """A tick that never found its instance. It is addressed again when somebody redrives it, and has the same id
    however often it is given up."""
    message_id, at = tick.id, tick.occurred_at
    assert message_id is not None
    assert at is not None
    envelope = Envelope(
        definition.id,
        "",
        tick.type,
        message_id,
        bytes(tick.payload),
        now,
        dedupe_key=tick.idempotency_key or message_id,
        correlation_key=tick.correlation_key,
        idempotency_key=tick.idempotency_key,
        concurrency_key=tick.concurrency_key,
        occurred_at=at,
    )
    return DeadLetter(
        id=dead_letter_id(at, definition.id, message_id),
        at=now,
        saga_id=definition.id,
        key=default_key(definition.id, tick.type),
        type=tick.type,
        code=error.code,
        reason=error.message,
        attempts=1,
        envelope=envelope,
    )
