"""The live feed: what happened, told to everybody who watches, without a gap and without a repeat (I8).

Theory of operation
-------------------
The store numbers the events of its commits without gaps and keeps them for a while. A watch is a position in that
numbering; nothing is queued for anybody, so a watch that is not read costs nothing and cannot grow.

1. A *cursor* is the number of an event, moved into a range that belongs to the store: one integer that still counts
   by one. Whoever comes with the cursor of another store, of an event that is not there yet, or of one that is kept no
   longer, hears exactly one `reset` and goes on with the oldest event that is kept. A number below 10,000,000,000
   belongs to no store: it counts from the first event of this one, and is for people (0 is the beginning).
2. Watches that are behind read pages from the store, each at its own pace, one page at a time for all of them.
3. Watches that have reached the head wait, and one *reader* reads for all of them. It keeps the newest events at hand,
   so that a watch which is a little late finds them there. It works only while somebody waits.
4. The reader looks when this process has committed, and ten times a second asks the store whether another one has.
   After it has woken many it rests a little: they share the event loop with those who publish.
5. When a watch finds that what it wanted next was pruned meanwhile, it resets itself as in 1.

    behind ──page──▶ behind ──nothing left──▶ waiting ──woken──▶ behind (by a few events, which are at hand)

What we dislike about it: the range of a store is one of 900,000, so that a cursor fits a JavaScript number. One store
in so many could be taken for another, if it replaces it under the same address.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from functools import lru_cache
from types import TracebackType
from typing import Final, Literal, NamedTuple, Self

import msgspec

from sagaloom.clock import Clock
from sagaloom.engine.records import FeedEvent
from sagaloom.errors import BackendUnavailable, MessageRejected, SagasError
from sagaloom.ports.keyvalue import SeesOthers
from sagaloom.ports.store import SagaStore

__all__ = [
    "FEED_EVENT_TYPES",
    "FeedHub",
    "FeedPage",
    "FeedReset",
    "FeedWatch",
    "WatchedEvent",
    "cursor_of",
    "number_of",
]

_log = logging.getLogger("sagaloom.feed")

FEED_EVENT_TYPES: Final = (
    "saga:started",
    "saga:message_received",
    "saga:state_changed",
    "saga:completed",
    "saga:failed",
    "saga:compensating",
    "saga:cancelled",
    "saga:dead_lettered",
    "saga:effect_dispatched",
)
"""What happens to sagas, by the name that the feed gives it."""

_RANGE: Final = 10_000_000_000
_RANGES: Final = 900_000  # The last one ends at 9.0e15, and 2**53 is 9.007e15.
_PAGE_EVENTS: Final = 256
_RECENT_EVENTS: Final = 2_048
_POLL_SECONDS: Final = 0.1
_POLL_BLINDLY_SECONDS: Final = 0.25
_REST_SECONDS_PER_WATCH: Final = 0.0001


class FeedReset(msgspec.Struct, frozen=True):
    """Says that a cursor leads nowhere, and that the feed goes on with event `oldest`, the oldest that is kept.
    `expired`: what came next is kept no longer; `future`: this store has not come that far."""

    at: datetime
    reason: Literal["expired", "future", "other_store"]
    oldest: str
    type: Literal["reset"] = "reset"


WatchedEvent = FeedEvent | FeedReset


class FeedPage(NamedTuple):
    """What a watch came past: `events` with their numbers, of those from `first` to `last` that it asks for. A page
    with a `reset` has no events."""

    first: int
    last: int
    events: Sequence[tuple[int, FeedEvent]]
    reset: FeedReset | None = None


def cursor_of(store_id: str, number: int) -> str:
    """The cursor of event `number` of a store."""
    return str(_range_of(store_id) + number)


def number_of(store_id: str, cursor: int | str) -> int | None:
    """The number of the event that a cursor of this store stands for; None for that of another. Raises
    `MessageRejected` for what is no cursor."""
    value = _read_cursor(cursor)
    if value is None or value < _RANGE:
        return value
    number = value - _range_of(store_id)
    return number if 0 <= number < _RANGE else None


@lru_cache(maxsize=64)
def _range_of(store_id: str) -> int:
    digest = hashlib.blake2b(store_id.encode(), digest_size=8).digest()
    return (1 + int.from_bytes(digest, "big") % _RANGES) * _RANGE


def _read_cursor(after: int | str | None) -> int | None:
    if after is None:
        return None
    is_number = isinstance(after, int) and not isinstance(after, bool)
    if is_number or (isinstance(after, str) and after.isascii() and after.isdigit() and len(after) <= 20):
        value = int(after)
        if value >= 0:
            return value
    raise MessageRejected(
        f"after={after!r:.80} is no cursor of the feed: give the id of an event, 0 for everything that is kept, or "
        "nothing to begin now",
        data={"formErrors": [], "fieldErrors": {"after": [f"{after!r:.80} is no cursor of the feed"]}},
    )


def _check_types(types: Iterable[str]) -> frozenset[str]:
    wanted = frozenset((types,) if isinstance(types, str) else types)
    for name in sorted(wanted, key=repr):
        if name not in FEED_EVENT_TYPES:
            raise MessageRejected(f"{name!r:.80} is no event of the feed: there are {', '.join(FEED_EVENT_TYPES)}")
    return wanted


class FeedWatch:
    """An iterator over (cursor, event) that waits for the next event; made by `SagaRuntime.watch`.

    It belongs to one task at a time, and begins when it is first awaited or entered (`async with`). It ends when it is
    closed, from whatever task, or its runtime stops. It raises `BackendUnavailable` when the store does not answer;
    another watch from its `cursor` goes on where it was.
    """

    def __init__(self, hub: FeedHub, after: int | None, wants: Callable[[FeedEvent], bool] | None) -> None:
        self._hub = hub
        self._after = after
        self._wants = wants
        self._position: int | None = None
        self._reset: FeedReset | None = None
        self._ahead: deque[tuple[int, FeedEvent]] = deque()
        self._is_closed = False

    @property
    def cursor(self) -> str | None:
        """Where another watch would go on: behind the last event that was given out, or passed over by the filter.
        None before the beginning, and while a reset has not been told."""
        if self._position is None or self._reset is not None:
            return None
        return self._hub.cursor_of(self._ahead[0][0] - 1 if self._ahead else self._position)

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def wants(self, event: FeedEvent) -> bool:
        """Whether the filter lets this event through."""
        return self._wants is None or self._wants(event)

    async def begin(self) -> None:
        """Finds out where to begin. The first read does so by itself."""
        if self._position is None:
            self._position, self._reset = await self._hub.place(self._after)

    async def next_page(self) -> FeedPage | None:
        """The next events, as soon as there are any; None when the watch has ended. When it is cancelled, nothing is
        lost."""
        await self.begin()
        assert self._position is not None
        if self._reset is not None:
            reset, self._reset = self._reset, None
            return FeedPage(self._position + 1, self._position, (), reset)
        found = await self._hub.read(self._position, self)
        if not found:
            return None
        first, last = found[0][0], found[-1][0]
        if first != self._position + 1:
            self._position = first - 1
            return FeedPage(first, first - 1, (), self._hub.reset("expired", first))
        self._position = last
        wants = self._wants
        return FeedPage(first, last, found if wants is None else [each for each in found if wants(each[1])])

    def close(self) -> None:
        """Ends the iteration, also one that waits right now. Closing twice is no error."""
        self._is_closed = True
        self._hub.leave(self)

    async def aclose(self) -> None:
        self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[str, WatchedEvent]:
        while not self._ahead:
            page = await self.next_page()
            if page is None:
                raise StopAsyncIteration
            if page.reset is not None:
                return self._hub.cursor_of(page.last), page.reset
            self._ahead.extend(page.events)
        number, event = self._ahead.popleft()
        return self._hub.cursor_of(number), event

    async def __aenter__(self) -> Self:
        await self.begin()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class FeedHub:
    """All watches of one runtime, and their one reader."""

    def __init__(self, store: SagaStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._others = store if isinstance(store, SeesOthers) else None
        self._waiting: dict[FeedWatch, asyncio.Future[None]] = {}
        self._recent: list[tuple[int, FeedEvent]] = []  # without a gap, and ending with event `_head`
        self._head: int | None = None
        self._commits = 0
        self._turns = asyncio.Lock()
        self._reader: asyncio.Task[None] | None = None
        self._signal: asyncio.Future[None] | None = None
        self._closed_because: str | None = None

    # ---------------------------------------------------------------- what others ask

    def committed(self) -> None:
        """This process has committed."""
        self._commits += 1
        self._rouse()

    def watch(
        self,
        *,
        after: int | str | None = None,
        saga_ids: Iterable[str] | None = None,
        key: str | None = None,
        types: Iterable[str] = (),
    ) -> FeedWatch:
        """A watch from `after` on. None for `saga_ids` and `key`, and no `types`, mean all."""
        if self._closed_because is not None:
            raise BackendUnavailable(f"the runtime is {self._closed_because}", code="SAGA_NOT_STARTED")
        return FeedWatch(self, _read_cursor(after), _filter_of(saga_ids, key, _check_types(types)))

    def cursor_of(self, number: int) -> str:
        return cursor_of(self._store.store_id, number)

    @property
    def is_reading(self) -> bool:
        """Whether anybody waits for the head, so that somebody looks for it."""
        return self._reader is not None and not self._reader.done()

    def close(self, why: str) -> None:
        """Ends every watch and starts no other."""
        self._closed_because = why
        self._wake()
        if self._reader is not None:
            self._reader.cancel()
            self._reader = None
        self._recent.clear()

    # ---------------------------------------------------------------- what watches ask

    async def place(self, after: int | None) -> tuple[int, FeedReset | None]:
        """The number behind which a watch with cursor `after` begins, and what it has to be told first."""
        oldest, newest = await self._store.feed_bounds()
        if after is None:
            return newest, None
        base = _range_of(self._store.store_id)
        number = after if after < _RANGE else after - base
        if oldest - 1 <= number <= newest:
            return number, None
        if 0 <= number < oldest:
            return oldest - 1, self.reset("expired", oldest)
        is_ours = after < _RANGE or after // _RANGE == base // _RANGE
        return oldest - 1, self.reset("future" if is_ours else "other_store", oldest)

    def reset(self, reason: Literal["expired", "future", "other_store"], oldest: int) -> FeedReset:
        return FeedReset(self._clock.now(), reason, self.cursor_of(oldest))

    async def read(self, after: int, watch: FeedWatch) -> Sequence[tuple[int, FeedEvent]]:
        """Events behind number `after`, once there are any; nothing when the watch or the hub has closed. They are
        without a gap, but the first may come later than `after + 1` when what was between is kept no longer."""
        while self._closed_because is None and not watch.is_closed:
            recent = self._recent_after(after)
            if recent:
                return recent
            if after == self._head:
                await self._news(watch)
                continue
            async with self._turns:
                if after == self._head or self._recent_after(after):
                    continue  # Somebody has found that out while we waited for our turn.
                page = await self._page(after)
                if page:
                    # A store in this process answers without a pause, and whoever is far behind would let nobody else
                    # run. So one page is read in each round of the loop, however many are behind.
                    await asyncio.sleep(0)
                    return page
                self._move_head(after)
            if after != self._head:
                await self._news(watch)
        return ()

    def leave(self, watch: FeedWatch) -> None:
        """Lets go of a watch that has closed."""
        waiter = self._waiting.pop(watch, None)
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _recent_after(self, after: int) -> Sequence[tuple[int, FeedEvent]]:
        recent = self._recent
        if not recent or after < recent[0][0] - 1:
            return ()
        begin = after + 1 - recent[0][0]
        return recent[begin : begin + _PAGE_EVENTS]

    def _move_head(self, to: int) -> None:
        """Somebody has found that the feed ends with event `to`."""
        if self._head is None or to > self._head:
            self._head = to
            self._recent.clear()
            self._wake()  # Whoever waited at the old head has something to read.

    async def _news(self, watch: FeedWatch) -> None:
        """Waits until the head has moved."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[watch] = waiter
        if self._reader is None or self._reader.done():
            self._reader = asyncio.create_task(self._read_for_all(), name="sagaloom-feed")
        try:
            await waiter
        finally:
            if self._waiting.get(watch) is waiter:
                del self._waiting[watch]
            if not self._waiting:
                self._rouse()  # Nobody is left to look for.

    # ---------------------------------------------------------------- the reader

    async def _read_for_all(self) -> None:
        """Reads behind the head and wakes those who wait there, as long as somebody does."""
        try:
            while self._waiting and self._head is not None:
                commits, version, head = self._commits, self._others_version(), self._head
                page = await self._page(head)
                if head != self._head:
                    continue
                if page:
                    await self._hand_out(page, head)
                elif commits == self._commits:
                    await self._change(version)
        except Exception as error:  # noqa: BLE001 - whatever it is, those who wait have to hear of it
            if not isinstance(error, SagasError):
                _log.exception("the feed cannot be read")
            self._wake(error)

    async def _hand_out(self, page: Sequence[tuple[int, FeedEvent]], head: int) -> None:
        if page[0][0] == head + 1:
            self._recent.extend(page)
            self._head = page[-1][0]
            if len(self._recent) > 2 * _RECENT_EVENTS:
                del self._recent[:-_RECENT_EVENTS]
        else:
            # What came next was pruned. Each watch finds that out by itself.
            self._recent.clear()
            self._head = None
        woken = self._wake()
        await asyncio.sleep(woken * _REST_SECONDS_PER_WATCH if woken > 8 else 0)

    async def _page(self, after: int) -> Sequence[tuple[int, FeedEvent]]:
        found = await self._store.feed(after=after, limit=_PAGE_EVENTS)
        if found and found[-1][0] - found[0][0] != len(found) - 1:
            # Pruned while it was read: what is in front of the gap is old news, and what is behind it comes next.
            gap = next(n for n in range(1, len(found)) if found[n][0] != found[n - 1][0] + 1)
            return found[:gap]
        return found

    async def _change(self, version: int | None) -> None:
        """Waits until somebody may have committed, here or elsewhere, or nobody waits any more."""
        loop = asyncio.get_running_loop()
        signal: asyncio.Future[None] = loop.create_future()
        timer: asyncio.TimerHandle | None = None

        def look() -> None:
            nonlocal timer
            if version is None or self._others_version() != version:
                self._rouse()
            else:
                timer = loop.call_later(_POLL_SECONDS, look)

        timer = loop.call_later(_POLL_BLINDLY_SECONDS if version is None else _POLL_SECONDS, look)
        self._signal = signal
        try:
            await signal
        finally:
            self._signal = None
            timer.cancel()

    def _others_version(self) -> int | None:
        try:
            return None if self._others is None else self._others.others_version()
        except SagasError:
            return None  # Reading will say what is wrong.

    def _rouse(self) -> None:
        if self._signal is not None and not self._signal.done():
            self._signal.set_result(None)

    def _wake(self, error: Exception | None = None) -> int:
        """Wakes everybody who waits, and returns how many they are."""
        waiting, self._waiting = self._waiting, {}
        for waiter in waiting.values():
            if waiter.done():
                continue
            if error is None:
                waiter.set_result(None)
            else:
                waiter.set_exception(error)
                waiter.exception()  # Its task may be gone; that is no reason for a warning at exit.
        return len(waiting)


def _filter_of(
    saga_ids: Iterable[str] | None, key: str | None, types: frozenset[str]
) -> Callable[[FeedEvent], bool] | None:
    """Whether an event is wanted; None when all are."""
    sagas = None if saga_ids is None else frozenset((saga_ids,) if isinstance(saga_ids, str) else saga_ids)
    if sagas is None and key is None and not types:
        return None

    def wants(event: FeedEvent) -> bool:
        return (
            (not types or event.type in types)
            and (sagas is None or event.saga_id in sagas)
            and (key is None or event.key == key)
        )

    return wants
