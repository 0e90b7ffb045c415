"""Our share of the store: which partitions are ours, and what passes between us and the other processes.

The receiver looks after it between its turns, so no partition changes hands within one:

    attend ──► tend ──► (join) take what is free, give up what is ready to go ──► hold: load what came, drop what went
       │                                                                            │
       └─────► look ──► queue what others have brought for us ◄─────────────────────┘
                   └──► answer those who wait for messages that we brought to others (*abroad*)

- What comes is loaded whole before anything of it is decided; of what goes, everything that was remembered is dropped,
  for the store has it.
- A partition that is to go is let run dry first: nothing new begins in it (`giving`), and it goes when no effect of it
  is under way, or after a second.
- A lease that is over (another process took us for dead) is all partitions gone at once, and a new start.

What we dislike about it: whoever waits for a message abroad asks the store again and again until it is gone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection
from typing import Final

from sagaloom.errors import SagasError, StoreCorrupt
from sagaloom.ports.store import InboxRow, Lease, RowRef, SagaStore
from sagaloom.runtime.deliveries import Delivery, answer, refuse
from sagaloom.runtime.outcomes import outcome_elsewhere
from sagaloom.runtime.receipts import Outcome

__all__ = ["Share"]

_log = logging.getLogger("sagaloom.receiver")
_GIVE_UP_SECONDS: Final = 1.0
_ROWS_AT_ONCE: Final = 1_000


class Share:
    """What one process holds of a store."""

    def __init__(
        self,
        store: SagaStore,
        *,
        holder: str,
        works: bool,
        queue: Callable[[list[InboxRow]], Awaitable[None]],
        drop: Callable[[frozenset[int]], list[Delivery]],
        on_holding: Callable[[frozenset[int], frozenset[int]], Awaitable[None]],
        is_quiet: Callable[[Collection[int]], bool],
    ) -> None:
        """`queue` takes rows that wait in our partitions; `drop` forgets what is remembered, and returns the deliveries
        that waited in partitions that are gone; `on_holding` is told what came and what went."""
        self._store = store
        self._holder = holder
        self._works = works
        self._queue = queue
        self._drop = drop
        self._on_holding = on_holding
        self._is_quiet = is_quiet
        self.lease: Lease | None = None
        """Under what lease we write; None while we have none."""
        self.parts: frozenset[int] = frozenset()
        """The partitions that are ours; the messages of all others we only accept."""
        self.is_shared = False
        """Whether somebody else writes to the store."""
        self.is_leaving = False
        """Whether we are about to go: then nothing more is taken. What a neighbour leaves behind meanwhile is for those
        who stay, and would only change hands twice."""
        self.giving: frozenset[int] = frozenset()
        """Partitions that others shall have when what is under way in them has ended: nothing new begins there."""
        self._give_up_at: float | None = None
        self._must_tend = True
        self._must_look = False
        self._found: list[InboxRow] = []
        """What the store has handed out to us, and is not queued yet."""
        self._abroad: dict[RowRef, Delivery] = {}
        """Accepted messages of partitions that others hold, for whose end somebody waits here."""
        self.on_waiting: Callable[[], None] = _nothing
        """Is called whenever somebody begins to."""

    @property
    def needs_attention(self) -> bool:
        return self._must_look or self._must_tend

    @property
    def looks_abroad(self) -> bool:
        """Whether somebody here waits for what another process does."""
        return bool(self._abroad)

    def attend(self, *, standing: bool) -> None:
        """Notes that others have brought something, or, with `standing`, that they have come or gone."""
        self._must_look = True
        self._must_tend = self._must_tend or standing

    async def look_after(self) -> None:
        """Does what `attend` has noted; also the first thing to do. Raises `Fenced` when our lease is over."""
        if self._must_tend:
            await self._tend()
        elif self._must_look:
            await self._look()

    async def lose_everything(self) -> None:
        """Our lease is over: begins anew, with nothing."""
        self.lease = None
        self.giving, self._give_up_at = frozenset(), None
        self._found = []
        await self._hold(frozenset())
        self.attend(standing=True)

    async def leave(self) -> None:
        """Gives everything up, so that others need not find out."""
        lease, self.lease = self.lease, None
        if lease is not None:
            await self._store.release(lease)

    def wait_abroad(self, delivery: Delivery) -> None:
        """Minds a message in the inbox of another process, if anybody waits for its end."""
        if delivery.row is not None and delivery.settled is not None:
            self._abroad[delivery.row] = delivery
            self.on_waiting()

    def come_home(self, ref: RowRef) -> asyncio.Future[Outcome] | None:
        """Who waits for a message that we brought to a partition that has come to us since."""
        delivery = self._abroad.pop(ref, None) if self._abroad else None
        return None if delivery is None else delivery.settled

    def close(self, error: SagasError) -> None:
        """Answers everybody who still waits."""
        for delivery in self._abroad.values():
            refuse(delivery, error)
        self._abroad.clear()

    async def _tend(self) -> None:
        """Enters if we have to, and takes and gives partitions."""
        self._must_tend = False
        try:
            if self.lease is None:
                self.lease = await self._store.join(self._holder, works=self._works)
            if self._works and not (self.is_leaving and self.parts):
                excess = await self._take_share(self.lease)
                if excess and not self.giving:
                    self.giving = frozenset(sorted(self.parts)[-excess:])
                    self._give_up_at = asyncio.get_running_loop().time() + _GIVE_UP_SECONDS
                    if self._is_quiet(self.giving) and await self._take_share(self.lease) and not self.giving:
                        self._must_tend = True  # Another one has come while we gave: it gets its share next.
            elif not self._works:
                self.is_shared = True  # Those who apply what we take in need their turn at the store.
            await self._look()
        except BaseException:
            self._must_tend = True
            raise

    async def _take_share(self, lease: Lease) -> int:
        """Takes what is free and gives up what is ready to go; returns how many partitions we hold too many."""
        given = self.giving if self._may_give_up() else frozenset[int]()
        holding = await self._store.tend(lease, give_up=given)
        self.is_shared = holding.is_shared
        await self._hold(holding.parts)
        if given or not holding.excess:
            self.giving, self._give_up_at = frozenset(), None
        return holding.excess

    def _may_give_up(self) -> bool:
        """Whether nothing is under way in the partitions that are to go, or has been for long enough."""
        if self._give_up_at is None:
            return False
        return self._is_quiet(self.giving) or asyncio.get_running_loop().time() >= self._give_up_at

    async def _hold(self, parts: frozenset[int]) -> None:
        """Makes `parts` what is ours."""
        gained, lost = parts - self.parts, self.parts - parts
        self.parts = parts
        if not gained and not lost:
            return
        self._found = [row for row in self._found if row.ref.part not in lost]
        for delivery in self._drop(lost):
            self.wait_abroad(delivery)
        _log.info("%s holds %d partitions (%d new, %d gone)", self._holder, len(parts), len(gained), len(lost))
        try:
            await self._on_holding(gained, lost)
        except BaseException:
            self.parts -= gained  # They are as good as not ours until all that waits there is known.
            raise

    async def _look(self) -> None:
        """Reads what others have brought for us, and how messages ended that we brought to others."""
        self._must_look = False
        assert self.lease is not None
        try:
            is_all = False
            while not is_all:
                self._found = self._found or await self._store.arrivals(self.lease, limit=_ROWS_AT_ONCE)
                is_all = len(self._found) < _ROWS_AT_ONCE
                await self._queue(self._found)
                self._found = []
                await asyncio.sleep(0)
            if self._abroad:
                await self._look_abroad()
        except BaseException:
            self._must_look = True
            raise

    async def _look_abroad(self) -> None:
        # Those who have stopped waiting have cancelled what they waited for.
        self._abroad = {
            ref: each for ref, each in self._abroad.items() if each.settled is not None and not each.settled.done()
        }
        refs = list(self._abroad)
        for ref, envelope in zip(refs, await self._store.inbox_rows(refs), strict=True):
            if envelope is None:
                try:
                    outcome = await outcome_elsewhere(self._store, self._abroad[ref].envelope)
                except StoreCorrupt as error:
                    refuse(self._abroad.pop(ref), error)
                else:
                    answer(self._abroad.pop(ref), outcome)


def _nothing() -> None:
    """Nobody wants to know."""
