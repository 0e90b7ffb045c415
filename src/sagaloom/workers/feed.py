"""What happens to runs, as it happens, for any number of readers.

A reader has a place, the number of the event that it has seen last, and nothing is kept for it. While anybody waits for
more, one task looks for it a few times a second, however many they are.
"""

from __future__ import annotations

import asyncio
from typing import Final, NamedTuple

from sagaloom.errors import BackendUnavailable, MessageRejected
from sagaloom.ports.jobs import JobEvent, JobRunStore

__all__ = ["JobFeed", "JobPage", "JobWatch"]

_LOOK_SECONDS: Final = 0.2
_PAGE: Final = 256


class JobPage(NamedTuple):
    """Events behind a place, and the place behind them. `is_reset`: the reader's place led nowhere (too old, or of
    another store), and these are from the oldest one on."""

    events: tuple[JobEvent, ...]
    last: int
    is_reset: bool = False


class JobFeed:
    """The events of a store."""

    def __init__(self, store: JobRunStore) -> None:
        self._store = store
        self._newest = 0
        self._waiting = 0
        self._looking: asyncio.Task[None] | None = None
        self._grew = asyncio.Event()
        self.is_closed = False

    async def watch(self, after: str | int | None = None) -> JobWatch:
        """A reader behind number `after`; 0 is all that is kept, and without it begins now. Raises `MessageRejected`
        for what is no number."""
        if self.is_closed:
            raise BackendUnavailable("the job runtime is stopping: come back with the number of the last event")
        oldest, newest = await self._store.event_span()
        if after is None:
            return JobWatch(self, newest)
        text = str(after).strip()
        if not (text.isascii() and text.isdigit() and len(text) < 19):
            raise MessageRejected(f"{after!r:.80} is no number of an event: take the id of the last one that was seen")
        place = int(text)
        is_lost = place > newest or (place < oldest - 1 and place > 0)
        return JobWatch(self, oldest - 1 if is_lost else max(place, oldest - 1), is_lost=is_lost)

    async def page(self, after: int) -> JobPage:
        """What is behind number `after`, as soon as there is anything; empty when the feed is closed."""
        while not self.is_closed:
            events = await self._store.events(after=after, limit=_PAGE)
            if events:
                return JobPage(tuple(events), events[-1].number, is_reset=False)
            await self._more(after)
        return JobPage((), after)

    async def _more(self, after: int) -> None:
        # The smallest place of those who wait: whoever has seen more is woken in vain, and nobody is left to wait.
        self._newest = min(self._newest, after) if self._waiting else after
        self._waiting += 1
        if self._looking is None:
            self._looking = asyncio.create_task(self._look(), name="sagaloom-job-feed")
        try:
            await self._grew.wait()
        finally:
            self._waiting -= 1

    async def _look(self) -> None:
        """Wakes those who wait, when there is something for them."""
        try:
            while self._waiting and not self.is_closed:
                _, newest = await self._store.event_span()
                if newest > self._newest:
                    self._newest = newest
                    break
                await asyncio.sleep(_LOOK_SECONDS)
        finally:
            # Also when the store does not answer: each reader finds out by itself.
            self._looking = None
            self._grew.set()
            self._grew = asyncio.Event()

    def close(self) -> None:
        """Ends every watch."""
        self.is_closed = True
        self._grew.set()


class JobWatch:
    """One reader."""

    def __init__(self, feed: JobFeed, place: int, *, is_lost: bool = False) -> None:
        self._feed = feed
        self._is_lost = is_lost
        self._waiting: asyncio.Task[JobPage] | None = None
        self._is_closed = False
        self.place = place
        """The number of the last event that was seen."""

    async def next_page(self) -> JobPage | None:
        """What comes next; None when the watch or the feed is closed."""
        if self._is_lost:
            self._is_lost = False
            return JobPage((), self.place, is_reset=True)
        if self._is_closed or self._feed.is_closed:
            return None
        self._waiting = asyncio.create_task(self._feed.page(self.place))
        try:
            page = await self._waiting
        except asyncio.CancelledError:
            if self._is_closed and (task := asyncio.current_task()) is not None and not task.cancelling():
                return None
            self._waiting.cancel()
            raise
        self.place = page.last
        return page if page.events else None

    def close(self) -> None:
        """Reads no more. `next_page` returns None, also if it waits right now."""
        self._is_closed = True
        if self._waiting is not None:
            self._waiting.cancel()
