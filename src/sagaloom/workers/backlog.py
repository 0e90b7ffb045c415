"""How much is pending, and when that is too much."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final

from sagaloom.clock import Clock
from sagaloom.errors import BackendUnavailable
from sagaloom.ports.jobs import JobRunStore

__all__ = ["Backlog"]

_BELIEVED: Final = timedelta(seconds=1)


class Backlog:
    """Knows whether `limit` runs are pending. It counts now and then, so that a trigger costs no count; what is
    triggered here meanwhile it adds, so that it is too early rather than too late."""

    def __init__(self, store: JobRunStore, clock: Clock, *, limit: int) -> None:
        self._store = store
        self._clock = clock
        self._limit = limit
        self._counted_at: datetime | None = None
        self._pending = 0

    def grew(self) -> None:
        """A run was triggered."""
        self._pending += 1

    async def refuse_if_full(self) -> None:
        """Raises `BackendUnavailable` when too much is pending."""
        now = self._clock.now()
        is_old = self._counted_at is None or not timedelta(0) <= now - self._counted_at < _BELIEVED
        if is_old or self._pending >= self._limit:
            self._counted_at = now
            self._pending = await self._store.backlog(limit=self._limit)
        if self._pending >= self._limit:
            raise BackendUnavailable(
                f"{self._pending} runs are pending already, and no more are taken in: try again later, or run more "
                "workers",
                code="JOB_BACKLOG_FULL",
                data={"pendingMax": self._limit},
            )
