"""A clock that stands still until a test moves it.

Nothing here waits for real time: a test says what time it is, and whoever slept until then wakes, in the order of the
moments they waited for.
"""

from __future__ import annotations

import asyncio
import heapq
from datetime import UTC, datetime, timedelta

from sagaloom.durations import parse_duration
from sagaloom.errors import DefinitionError

__all__ = ["ManualClock"]

_START = datetime(2026, 1, 1, tzinfo=UTC)
_ROUNDS = 20
_WAKE_UPS_MAX = 1_000_000

_Sleeper = tuple[datetime, int, "asyncio.Future[None]"]


class ManualClock:
    """A `Clock` for tests; belongs to one event loop.

    >>> clock = ManualClock()
    >>> clock.now().isoformat()
    '2026-01-01T00:00:00+00:00'
    >>> clock.advance("5m").isoformat()
    '2026-01-01T00:05:00+00:00'
    """

    def __init__(self, start: datetime = _START) -> None:
        if start.tzinfo is None:
            raise DefinitionError(f"a clock cannot start at {start.isoformat()}: give an aware datetime")
        self._now = start.astimezone(UTC)
        self._sleepers: list[_Sleeper] = []
        self._slept = 0

    def now(self) -> datetime:
        return self._now

    async def sleep_until(self, moment: datetime) -> None:
        if moment <= self._now:
            return
        awake: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._slept += 1
        heapq.heappush(self._sleepers, (moment, self._slept, awake))
        await awake

    @property
    def sleepers(self) -> int:
        """How many are asleep."""
        return sum(not awake.done() for _, _, awake in self._sleepers)

    @property
    def next_wake_at(self) -> datetime | None:
        """The earliest moment that anybody waits for; None when nobody sleeps."""
        self._forget_the_gone()
        return self._sleepers[0][0] if self._sleepers else None

    def advance(self, by: timedelta | float | str) -> datetime:
        """Moves the time forward by a timedelta, milliseconds or `"5m"`, in one jump, and returns it. Everybody who
        is due wakes when the event loop runs next; all of them read the new time."""
        return self.advance_to(self._now + parse_duration(by))

    def advance_to(self, moment: datetime) -> datetime:
        """`advance`, to a moment. One in the past changes nothing: time does not go back."""
        self._now = max(self._now, moment.astimezone(UTC))
        while self._sleepers and self._sleepers[0][0] <= self._now:
            _, _, awake = heapq.heappop(self._sleepers)
            if not awake.done():
                awake.set_result(None)
        return self._now

    async def advance_through(self, by: timedelta | float | str) -> datetime:
        """Moves the time forward from sleeper to sleeper: each reads the very moment it waited for, and what it
        starts to wait for below the new time is waited for as well. Between two steps the event loop gets a few
        rounds; work that waits for another thread or process does not end in them."""
        end = self._now + parse_duration(by)
        await _rounds()
        for _ in range(_WAKE_UPS_MAX):
            moment = self.next_wake_at
            if moment is None or moment > end:
                return self.advance_to(end)
            self.advance_to(moment)
            await _rounds()
        raise RuntimeError(
            f"{_WAKE_UPS_MAX} wake-ups on the way to {end.isoformat()}, now at {self._now.isoformat()}: somebody "
            "sleeps for next to no time in a loop; use advance(), or a shorter distance"
        )

    def _forget_the_gone(self) -> None:
        while self._sleepers and self._sleepers[0][2].done():
            heapq.heappop(self._sleepers)


async def _rounds() -> None:
    for _ in range(_ROUNDS):
        await asyncio.sleep(0)
