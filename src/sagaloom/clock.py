"""Where time comes from.

Everything that needs the time is handed a `Clock`; nothing below the shell asks the operating system. All times are
aware datetimes in UTC. `sagaloom.testing.ManualClock` is the clock of tests.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from functools import partial
from typing import Protocol

__all__ = ["Clock", "SystemClock"]

_LONGEST_NAP_SECONDS = 30.0


class Clock(Protocol):
    """Tells the time and waits for it."""

    def now(self) -> datetime:
        """The present, aware, in UTC."""
        ...

    async def sleep_until(self, moment: datetime) -> None:
        """Returns once `now()` is at or after `moment`."""
        ...


class SystemClock:
    """The wall clock of this machine."""

    # Every message asks: this way it costs no call of a Python function.
    now = staticmethod(partial(datetime.now, UTC))

    async def sleep_until(self, moment: datetime) -> None:
        # Short naps: a wall clock that jumps forward must not leave us asleep for the old distance.
        while (seconds := (moment - self.now()).total_seconds()) > 0:  # noqa: ASYNC110 - there is no event to await
            await asyncio.sleep(min(seconds, _LONGEST_NAP_SECONDS))
