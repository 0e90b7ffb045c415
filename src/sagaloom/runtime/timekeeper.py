"""The timekeeper: delivers timers when they are due, late rather than never, and each once.

Timers sort by (due_at, id). The timekeeper walks them with a cursor: everything at or before it has been offered to
the receiver, whose commit consumes the row together with what the message did. A crash in between leaves the row, and
the next process starts its walk from the beginning. A timer that is set behind the cursor is offered at once. Timers
of partitions that others hold are passed over; when such a partition comes to us, what the cursor has passed is walked
once more for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence

from sagaloom.clock import Clock
from sagaloom.engine.records import PendingTimer, Timer
from sagaloom.errors import SagasError
from sagaloom.ids import key_hash, partition_of
from sagaloom.ports.store import SagaStore
from sagaloom.runtime.alarm import Alarm
from sagaloom.runtime.deliveries import Delivery
from sagaloom.runtime.options import RuntimeOptions

__all__ = ["Timekeeper"]

_log = logging.getLogger("sagaloom.timekeeper")
_PAUSE_SECONDS = 0.5


class Timekeeper:
    """Walks the timers of the store as time goes by."""

    def __init__(
        self,
        store: SagaStore,
        clock: Clock,
        options: RuntimeOptions,
        *,
        holds: Callable[[int], bool],
        offer: Callable[[Delivery], None],
    ) -> None:
        self._store = store
        self._clock = clock
        self._options = options
        self._holds = holds
        self._offer = offer
        self._passed_over: set[int] = set()
        self._cursor: PendingTimer | None = None
        self._alarm = Alarm(clock, self._ring)
        self._is_due = asyncio.Event()
        self._is_due.set()  # Whatever fell due while nobody was running is walked first.
        self._is_walking = False

    @property
    def is_idle(self) -> bool:
        """Whether no due timer is left to offer, as far as the alarm knows."""
        return not self._is_due.is_set() and not self._is_walking

    def added(self, timers: Sequence[Timer]) -> None:
        """Minds timers that were just committed."""
        for timer in timers:
            if self._cursor is not None and (timer.due_at, timer.id) <= (self._cursor.due_at, self._cursor.id):
                self._deliver(timer)
            else:
                self._alarm.set(timer.due_at)

    def gained(self, parts: Collection[int]) -> None:
        """Minds the timers of partitions that have come to us."""
        if self._cursor is not None:
            self._passed_over.update(parts)
        self._is_due.set()

    async def run(self) -> None:
        """Walks whenever a timer is due, until cancelled."""
        while True:
            await self._is_due.wait()
            self._is_walking = True
            self._is_due.clear()
            try:
                await self._walk()
            except SagasError as error:
                _log.warning("timers cannot be read: %s", error.message)
                await asyncio.sleep(_PAUSE_SECONDS)
                self._is_due.set()
            finally:
                self._is_walking = False

    def close(self) -> None:
        self._alarm.clear()

    async def _walk(self) -> None:
        """Offers everything that is due, then asks to be woken for the next one."""
        now = self._clock.now()
        if self._passed_over:
            await self._walk_again()
        while True:
            page = await self._store.timers(after=self._cursor, limit=self._options.batch_max)
            for timer in page:
                if timer.due_at > now:
                    self._alarm.set(timer.due_at)
                    return
                self._options.on_step("timer_due")
                self._cursor = PendingTimer(timer.id, timer.due_at, timer.name)
                self._deliver(timer)
            if len(page) < self._options.batch_max:
                return
            await asyncio.sleep(0)

    async def _walk_again(self) -> None:
        """Offers what the cursor has passed of partitions that were not ours then."""
        parts, self._passed_over = self._passed_over, set()
        until, cursor = self._cursor, None
        try:
            while until is not None:
                page = await self._store.timers(after=cursor, limit=self._options.batch_max)
                for timer in page:
                    cursor = PendingTimer(timer.id, timer.due_at, timer.name)
                    if (timer.due_at, timer.id) > (until.due_at, until.id):
                        return
                    if _part_of(timer) in parts:
                        self._deliver(timer)
                if len(page) < self._options.batch_max:
                    return
                await asyncio.sleep(0)
        except SagasError:
            self._passed_over |= parts
            raise

    def _deliver(self, timer: Timer) -> None:
        envelope = timer.envelope
        if not self._holds(_part_of(timer)):
            return
        pending = PendingTimer(timer.id, timer.due_at, timer.name)
        self._offer(Delivery(envelope, (envelope.saga_id, envelope.key), timer=pending))

    def _ring(self) -> None:
        self._is_due.set()


def _part_of(timer: Timer) -> int:
    return partition_of(key_hash(timer.envelope.saga_id, timer.envelope.key))
