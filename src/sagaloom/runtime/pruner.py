"""The pruner: forgets what the feed keeps for longer than it has to.

The feed keeps `feed_retention_events` events, and none for longer than `feed_retention_hours`. Both are exceeded a
little, so that the pruner has to work seldom: it wakes when the oldest event is some time over its age, or when a
commit has brought the feed some events over its size. Nothing else wakes it, so that an idle process costs nothing.

It deletes in small commits with pauses between them, for the receiver commits on the same store.
"""

from __future__ import annotations

import asyncio
import logging
from datetime import datetime, timedelta

from sagaloom.clock import Clock
from sagaloom.errors import ConfigurationError, SagasError
from sagaloom.ports.store import SagaStore
from sagaloom.runtime.alarm import Alarm
from sagaloom.runtime.options import RuntimeOptions

__all__ = ["Pruner"]

_log = logging.getLogger("sagaloom.pruner")
_ROWS_AT_ONCE = 64
_PAUSE_SECONDS = 0.01
_TROUBLE_SECONDS = 60.0
_GRACE_MAX = timedelta(hours=1)


class Pruner:
    """Keeps the feed of a store within its bounds."""

    def __init__(self, store: SagaStore, clock: Clock, options: RuntimeOptions) -> None:
        if not options.feed_retention_hours > 0 or options.feed_retention_events < 1:
            raise ConfigurationError(
                f"feed_retention_hours={options.feed_retention_hours:g} and "
                f"feed_retention_events={options.feed_retention_events} keep nothing: give more than 0 of both"
            )
        self._store = store
        self._clock = clock
        self._events_max = options.feed_retention_events
        try:
            self._age_max = timedelta(hours=options.feed_retention_hours)
        except OverflowError:
            self._age_max = timedelta.max
        self._alarm = Alarm(clock, self._ring)
        self._is_due = asyncio.Event()
        self._is_due.set()  # What is too old by now was not when somebody last looked.
        self._is_pruning = False
        self._full_at = 1

    @property
    def is_idle(self) -> bool:
        return not self._is_due.is_set() and not self._is_pruning

    def committed(self, number: int) -> None:
        """A commit of this process has written event `number`."""
        if number >= self._full_at:
            self._is_due.set()

    async def run(self) -> None:
        """Prunes whenever there is something to forget, until cancelled."""
        while True:
            await self._is_due.wait()
            self._is_pruning = True
            self._is_due.clear()
            try:
                await self._prune()
            except SagasError as error:
                _log.warning("the feed cannot be pruned: %s", error.message)
                self._alarm.set(self._clock.now() + timedelta(seconds=_TROUBLE_SECONDS))
            finally:
                self._is_pruning = False

    def close(self) -> None:
        self._alarm.clear()

    async def _prune(self) -> None:
        oldest, newest = await self._store.feed_bounds()
        if newest < oldest:
            self._full_at = 1  # Nothing yet. The first event is looked at when it comes.
            return
        before = await self._first_to_keep(oldest, newest)
        if before > oldest:
            while await self._store.prune_feed(before=before, limit=_ROWS_AT_ONCE) == _ROWS_AT_ONCE:  # noqa: ASYNC110
                await asyncio.sleep(_PAUSE_SECONDS)  # others commit on the same store
            oldest, _ = await self._store.feed_bounds()
        self._full_at = max(oldest + self._events_max, newest + 1) + self._events_max // 16
        try:
            due_at = await self._time_of(oldest) + self._age_max + min(self._age_max / 24, _GRACE_MAX)
        except OverflowError:
            return  # It may stay for ever.
        if due_at > self._clock.now():
            self._alarm.set(due_at)
        else:
            self._full_at = newest + 1  # The newest commit is too old, and stays until there is a newer one.

    async def _first_to_keep(self, oldest: int, newest: int) -> int:
        """The number of the oldest event that is neither too many nor too old; never beyond the newest."""
        first = max(oldest, newest + 1 - self._events_max)
        if self._is_kept(await self._time_of(first)):
            return first
        # Events are numbered in the order of their commits, so their times only grow.
        too_old, kept = first, newest
        while kept - too_old > 1:
            middle = (too_old + kept) // 2
            if self._is_kept(await self._time_of(middle)):
                kept = middle
            else:
                too_old = middle
        return kept

    async def _time_of(self, number: int) -> datetime:
        found = await self._store.feed(after=number - 1, limit=1)
        # Another process may have pruned it meanwhile; then there is nothing for us to do.
        return found[0][1].at if found else self._clock.now()

    def _is_kept(self, at: datetime) -> bool:
        return self._clock.now() - at < self._age_max

    def _ring(self) -> None:
        self._is_due.set()
