"""A history of what happened, kept for longer than the feed keeps its events.

The feed of a store is numbered without a gap, and forgets after a day. A writer follows it from where it was and copies
each page, with the place that it has reached, in one commit. So:

- each event stands in the history once, under the number that the feed gave it, however often the writer was killed;
- of two writers on one history one wins each commit; the other goes on behind it;
- one who was away for longer than the feed keeps its events has missed some. That is logged, and a reader who comes
  past the gap hears a `reset`, as from the feed itself.

    ("saga_event", store, number)                      the event
    ("saga_event_of", store, saga, key, run, number)   the same, by instance
    ("saga_event_head", store)                         the number that has been reached

What we dislike about it: events by instance are written twice. They are small, and nobody waits for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Final, NamedTuple, Self

import msgspec

from sagaloom.engine.records import FeedEvent
from sagaloom.errors import BackendUnavailable, ConfigurationError, SagasError
from sagaloom.ports.keyvalue import Check, Conflicted, KeyValue
from sagaloom.runtime import SagaRuntime
from sagaloom.runtime.feed import FeedPage, cursor_of, number_of

__all__ = ["SagaHistoryEvent", "SagaHistoryWriter"]

_log = logging.getLogger("sagaloom.history")
_PAGE: Final = 256
_PAUSE_SECONDS: Final = 1.0
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(FeedEvent).decode


class SagaHistoryEvent(NamedTuple):
    """An event with the cursor that the feed gave it."""

    cursor: str
    event: FeedEvent


class SagaHistoryWriter:
    """Copies the feed of a runtime into a key-value store, and reads it there. The store is yours to close, unless
    `open` has opened it."""

    def __init__(self, kv: KeyValue, *, keeps_days: float | None = None) -> None:
        """Events older than `keeps_days` are forgotten; without it none is."""
        if keeps_days is not None and not keeps_days > 0:
            raise ConfigurationError(f"keeps_days={keeps_days!r} keeps nothing: give a number of days, or None")
        self._kv = kv
        self._keeps_days = keeps_days
        self._owns = False
        self._following: dict[SagaRuntime, asyncio.Task[None]] = {}

    @classmethod
    async def open(cls, path: str | os.PathLike[str], *, keeps_days: float | None = None) -> Self:
        """A writer with a file of its own at `path`, which `close` closes."""
        from sagaloom.kv import SqliteKeyValue

        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        writer = cls(await SqliteKeyValue.open(file), keeps_days=keeps_days)
        writer._owns = True
        return writer

    def follow(self, runtime: SagaRuntime) -> None:
        """Begins to copy the feed of `runtime`, from where the history ends, until the runtime stops or `close`. Once
        for each runtime, however often it is called."""
        task = self._following.get(runtime)
        if task is None or task.done():
            self._following[runtime] = asyncio.create_task(self._follow(runtime), name="sagaloom-history")

    async def close(self) -> None:
        """Stops copying. Twice is no error."""
        following, self._following = list(self._following.values()), {}
        for task in following:
            task.cancel()
        await asyncio.gather(*following, return_exceptions=True)
        if self._owns:
            await self._kv.close()

    async def read(
        self,
        runtime: SagaRuntime,
        saga_id: str | None = None,
        key: str | None = None,
        *,
        run: int = 1,
        after: str | int = 0,
        limit: int = 100,
    ) -> list[SagaHistoryEvent]:
        """Events of the store of `runtime`, oldest first, behind the cursor `after`: of all sagas, or of one run."""
        if (saga_id is None) != (key is None):
            raise ConfigurationError("a history is read whole, or of one instance: give saga_id and key, or neither")
        store_id = runtime.store.store_id
        number = number_of(store_id, after) or 0
        if saga_id is None or key is None:
            found = await self._kv.scan(("saga_event", store_id), after=("saga_event", store_id, number), limit=limit)
        else:
            prefix = ("saga_event_of", store_id, saga_id, key, run)
            found = await self._kv.scan(prefix, after=(*prefix, number), limit=limit)
        return [SagaHistoryEvent(cursor_of(store_id, _number(row.key)), _decode(row.value)) for row in found]

    # ---------------------------------------------------------------- for those who stream

    async def begins_behind(self, runtime: SagaRuntime, after: str) -> int | None:
        number = number_of(runtime.store.store_id, after)
        if number is None:
            return None
        oldest, _ = await runtime.store.feed_bounds()
        if number >= oldest - 1:
            return None
        return number if await self.page(runtime.store.store_id, number) else None

    async def page(self, store_id: str, after: int) -> Sequence[tuple[int, FeedEvent]]:
        rows = await self._kv.scan(("saga_event", store_id), after=("saga_event", store_id, after), limit=_PAGE)
        if not rows or (after and _number(rows[0].key) != after + 1):
            return ()  # What came next is not here: the feed will say so.
        found = [(_number(row.key), _decode(row.value)) for row in rows]
        whole = next((n for n in range(1, len(found)) if found[n][0] != found[n - 1][0] + 1), len(found))
        return found[:whole]

    # ---------------------------------------------------------------- inside

    async def _follow(self, runtime: SagaRuntime) -> None:
        store_id = runtime.store.store_id
        while True:
            try:
                head = await self._kv.get(("saga_event_head", store_id))
                reached = 0 if head is None else int(head.value)
                async with contextlib.aclosing(runtime.watch(after=cursor_of(store_id, reached))) as watch:
                    stamp = None if head is None else head.versionstamp
                    while (page := await watch.next_page()) is not None:
                        stamp = await self._write(store_id, page, stamp, now=runtime.clock.now())
                return
            except _Overtaken:
                continue
            except BackendUnavailable as error:
                if error.code == "SAGA_NOT_STARTED":
                    return  # The runtime has stopped, and with it the feed.
                _log.warning("the history waits: %s", error.message)
            except SagasError as error:
                _log.warning("the history waits: %s", error.message)
            await asyncio.sleep(_PAUSE_SECONDS)

    async def _write(self, store_id: str, page: FeedPage, stamp: int | None, *, now: datetime) -> int:
        """Writes a page and how far it leads; returns the versionstamp of that."""
        if page.reset is not None and stamp is not None:
            _log.warning("the history has a gap in front of event %s: %s", page.reset.oldest, page.reset.reason)
        puts: list[tuple[tuple[str | int, ...], bytes]] = []
        for number, event in page.events:
            value = _encode(event)
            puts.append((("saga_event", store_id, number), value))
            puts.append((("saga_event_of", store_id, event.saga_id, event.key, event.run, number), value))
        head = ("saga_event_head", store_id)
        deletes = await self._forgotten(store_id, now)
        done = await self._kv.commit(
            checks=[Check(head, stamp)], puts=[*puts, (head, b"%d" % page.last)], deletes=deletes
        )
        if isinstance(done, Conflicted):
            raise _Overtaken
        return done.versionstamp

    async def _forgotten(self, store_id: str, now: datetime) -> list[tuple[str | int, ...]]:
        """The keys of the oldest events that are too old: at most as many as a page brings, so that it keeps pace."""
        if self._keeps_days is None:
            return []
        keys: list[tuple[str | int, ...]] = []
        for row in await self._kv.scan(("saga_event", store_id), limit=_PAGE):
            event = _decode(row.value)
            if (now - event.at).total_seconds() <= self._keeps_days * 86_400:
                break
            number = _number(row.key)
            keys.append(("saga_event", store_id, number))
            keys.append(("saga_event_of", store_id, event.saga_id, event.key, event.run, number))
        return keys


class _Overtaken(Exception):
    """Another writer has written what we wanted to."""


def _number(key: Sequence[object]) -> int:
    number = key[-1]
    assert isinstance(number, int)
    return number
