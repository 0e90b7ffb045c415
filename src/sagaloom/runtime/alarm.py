"""One sleeping task that rings at the earliest moment anyone asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime

from sagaloom.clock import Clock

__all__ = ["Alarm"]


class Alarm:
    """Calls `ring` once at or after the earliest moment that was `set` since it last rang."""

    def __init__(self, clock: Clock, ring: Callable[[], None]) -> None:
        self._clock = clock
        self._ring = ring
        self._moment: datetime | None = None
        self._task: asyncio.Task[None] | None = None

    def set(self, moment: datetime) -> None:
        """Asks for a ring at `moment`, or earlier if somebody asked for that."""
        if self._moment is not None and self._moment <= moment:
            return
        self.clear()
        self._moment = moment
        self._task = asyncio.create_task(self._sleep(moment), name="sagaloom-alarm")

    def clear(self) -> None:
        """Forgets the moment; nothing rings until the next `set`."""
        self._moment = None
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _sleep(self, moment: datetime) -> None:
        await self._clock.sleep_until(moment)
        self._moment = None
        self._task = None
        self._ring()
