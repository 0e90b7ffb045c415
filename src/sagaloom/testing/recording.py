"""A saga store that remembers what was asked of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, TypeVar

from sagaloom.definitions import SagaDurabilityTier
from sagaloom.engine.records import (
    Child,
    ChildStatus,
    DeadLetter,
    Envelope,
    FeedEvent,
    HeldSlot,
    HistoryEntry,
    Instance,
    Mark,
    OutboxEffect,
    PendingTimer,
    SagaStanding,
    ScheduleCursor,
    Timer,
)
from sagaloom.ports.keyvalue import SeesOthers
from sagaloom.ports.store import (
    CommitResult,
    Holding,
    InboxRow,
    InstanceFilter,
    Lease,
    Loaded,
    OutboxRow,
    RegisteredDefinition,
    RowRef,
    SagaStore,
    Swept,
    UnitOfWork,
)
from sagaloom.testing.memory_store import MemoryStore

__all__ = ["RecordedCall", "RecordedCommit", "RecordingStore"]

_R = TypeVar("_R")


class RecordedCall(NamedTuple):
    """One call: the method's name, its arguments by name, and what came of it (a result or an exception)."""

    method: str
    arguments: dict[str, Any]
    outcome: object


class RecordedCommit(NamedTuple):
    """One commit: its units, and the result or the exception."""

    units: tuple[UnitOfWork, ...]
    lease: Lease
    outcome: CommitResult | BaseException


class RecordingStore:
    """Passes every call on to `inner` (a `MemoryStore` unless given), and keeps what was called in `calls`, in the
    order in which the calls ended; commits also in `commits`.

    >>> import asyncio
    >>> async def example() -> list[str]:
    ...     store = RecordingStore()
    ...     await store.load([("orders", "o-1")])
    ...     return [call.method for call in store.calls]
    >>> asyncio.run(example())
    ['load']
    """

    def __init__(self, inner: SagaStore | None = None) -> None:
        self.inner: SagaStore = MemoryStore() if inner is None else inner
        self.calls: list[RecordedCall] = []
        self.commits: list[RecordedCommit] = []

    @property
    def id(self) -> str:
        return self.inner.id

    @property
    def store_id(self) -> str:
        return self.inner.store_id

    @property
    def tiers(self) -> frozenset[SagaDurabilityTier]:
        return self.inner.tiers

    def why_not(self, tier: SagaDurabilityTier) -> str | None:
        return self.inner.why_not(tier)

    @property
    def problem(self) -> str | None:
        return self.inner.problem

    @property
    def written_units(self) -> list[UnitOfWork]:
        """The units of all commits that were written, in order."""
        return [
            unit
            for commit in self.commits
            if isinstance(commit.outcome, CommitResult)
            for index, unit in enumerate(commit.units)
            if index not in commit.outcome.conflicts
        ]

    def called(self, method: str) -> list[RecordedCall]:
        """The calls of one method."""
        return [call for call in self.calls if call.method == method]

    async def _recorded(self, method: str, work: Awaitable[_R], **arguments: Any) -> _R:
        try:
            result = await work
        except BaseException as error:
            self.calls.append(RecordedCall(method, arguments, error))
            raise
        self.calls.append(RecordedCall(method, arguments, result))
        return result

    async def acquire(self, holder: str, *, now: datetime) -> Lease:
        return await self._recorded("acquire", self.inner.acquire(holder, now=now), holder=holder, now=now)

    async def join(self, holder: str, *, works: bool = True) -> Lease:
        return await self._recorded("join", self.inner.join(holder, works=works), holder=holder, works=works)

    async def tend(self, lease: Lease, *, give_up: Collection[int] = ()) -> Holding:
        given = tuple(give_up)
        return await self._recorded("tend", self.inner.tend(lease, give_up=given), lease=lease, give_up=given)

    @property
    def is_shareable(self) -> bool:
        return self.inner.is_shareable

    @property
    def is_remote(self) -> bool:
        return self.inner.is_remote

    def stands(self) -> bool:
        """Asked every moment, so it is not recorded."""
        return self.inner.stands()

    def listen(self, on_news: Callable[[], None]) -> bool:
        return self.inner.listen(on_news)

    def has_news(self) -> bool:
        """Asked every moment, so it is not recorded."""
        return self.inner.has_news()

    async def arrivals(self, lease: Lease, *, limit: int = 1_000) -> list[InboxRow]:
        return await self._recorded("arrivals", self.inner.arrivals(lease, limit=limit), lease=lease, limit=limit)

    async def release(self, lease: Lease) -> None:
        await self._recorded("release", self.inner.release(lease), lease=lease)

    async def reserve_pks(self, count: int) -> int:
        return await self._recorded("reserve_pks", self.inner.reserve_pks(count), count=count)

    async def commit(self, units: Sequence[UnitOfWork], *, lease: Lease) -> CommitResult:
        kept = tuple(units)
        try:
            result = await self._recorded("commit", self.inner.commit(units, lease=lease), units=kept, lease=lease)
        except BaseException as error:
            self.commits.append(RecordedCommit(kept, lease, error))
            raise
        self.commits.append(RecordedCommit(kept, lease, result))
        return result

    async def probe(self) -> None:
        await self._recorded("probe", self.inner.probe())

    async def close(self) -> None:
        await self._recorded("close", self.inner.close())

    async def load(self, keys: Sequence[tuple[str, str]], *, parts: Collection[int] | None = None) -> list[Loaded]:
        return await self._recorded("load", self.inner.load(keys, parts=parts), keys=tuple(keys))

    async def load_run(self, saga_id: str, key: str, run: int) -> Instance | None:
        work = self.inner.load_run(saga_id, key, run)
        return await self._recorded("load_run", work, saga_id=saga_id, key=key, run=run)

    async def slots(self, saga_id: str, *, key: str | None = None, limit: int = 1_000) -> list[HeldSlot]:
        work = self.inner.slots(saga_id, key=key, limit=limit)
        return await self._recorded("slots", work, saga_id=saga_id, key=key, limit=limit)

    async def marks(self, wanted: Sequence[tuple[int, str]]) -> list[Mark | None]:
        return await self._recorded("marks", self.inner.marks(wanted), wanted=tuple(wanted))

    async def inbox_page(self, *, after: RowRef | None, limit: int) -> list[InboxRow]:
        work = self.inner.inbox_page(after=after, limit=limit)
        return await self._recorded("inbox_page", work, after=after, limit=limit)

    async def inbox_rows(self, refs: Sequence[RowRef]) -> list[Envelope | None]:
        return await self._recorded("inbox_rows", self.inner.inbox_rows(refs), refs=tuple(refs))

    async def outbox_page(
        self, *, after: RowRef | None, limit: int, parts: Collection[int] | None = None
    ) -> list[OutboxRow]:
        work = self.inner.outbox_page(after=after, limit=limit, parts=parts)
        return await self._recorded("outbox_page", work, after=after, limit=limit, parts=parts)

    async def outbox_rows(self, refs: Sequence[RowRef]) -> list[OutboxEffect | None]:
        return await self._recorded("outbox_rows", self.inner.outbox_rows(refs), refs=tuple(refs))

    async def timers(
        self, *, due_by: datetime | None = None, after: PendingTimer | None = None, limit: int = 100
    ) -> list[Timer]:
        work = self.inner.timers(due_by=due_by, after=after, limit=limit)
        return await self._recorded("timers", work, due_by=due_by, after=after, limit=limit)

    async def timer(self, timer_id: str) -> Timer | None:
        return await self._recorded("timer", self.inner.timer(timer_id), timer_id=timer_id)

    async def schedule_cursors(self) -> list[ScheduleCursor]:
        return await self._recorded("schedule_cursors", self.inner.schedule_cursors())

    async def put_schedule_cursor(self, cursor: ScheduleCursor, *, replaces: ScheduleCursor | None) -> bool:
        work = self.inner.put_schedule_cursor(cursor, replaces=replaces)
        return await self._recorded("put_schedule_cursor", work, cursor=cursor, replaces=replaces)

    async def instances(
        self, wanted: InstanceFilter, *, limit: int, offset: int = 0, cursor: str | None = None
    ) -> tuple[list[Instance], str | None]:
        work = self.inner.instances(wanted, limit=limit, offset=offset, cursor=cursor)
        return await self._recorded("instances", work, wanted=wanted, limit=limit, offset=offset, cursor=cursor)

    async def count_instances(self, wanted: InstanceFilter, *, limit: int = 10_000) -> int:
        work = self.inner.count_instances(wanted, limit=limit)
        return await self._recorded("count_instances", work, wanted=wanted, limit=limit)

    async def runs(self, saga_id: str, key: str) -> list[Instance]:
        return await self._recorded("runs", self.inner.runs(saga_id, key), saga_id=saga_id, key=key)

    async def history(self, instance: Instance, *, after_entry: int = 0, limit: int = 50) -> list[HistoryEntry]:
        work = self.inner.history(instance, after_entry=after_entry, limit=limit)
        return await self._recorded("history", work, instance=instance, after_entry=after_entry, limit=limit)

    async def dead_letters(
        self, *, saga_id: str | None = None, key: str | None = None, after: str | None = None, limit: int = 50
    ) -> list[DeadLetter]:
        work = self.inner.dead_letters(saga_id=saga_id, key=key, after=after, limit=limit)
        return await self._recorded("dead_letters", work, saga_id=saga_id, key=key, after=after, limit=limit)

    async def dead_letter(self, dead_letter_id: str) -> DeadLetter | None:
        work = self.inner.dead_letter(dead_letter_id)
        return await self._recorded("dead_letter", work, dead_letter_id=dead_letter_id)

    async def feed(self, *, after: int, limit: int) -> list[tuple[int, FeedEvent]]:
        return await self._recorded("feed", self.inner.feed(after=after, limit=limit), after=after, limit=limit)

    async def feed_bounds(self) -> tuple[int, int]:
        return await self._recorded("feed_bounds", self.inner.feed_bounds())

    async def prune_feed(self, *, before: int, limit: int) -> int:
        work = self.inner.prune_feed(before=before, limit=limit)
        return await self._recorded("prune_feed", work, before=before, limit=limit)

    async def remove_runs(self, runs: Sequence[Instance], *, tombstone_until: datetime, lease: Lease) -> int:
        work = self.inner.remove_runs(runs, tombstone_until=tombstone_until, lease=lease)
        return await self._recorded("remove_runs", work, runs=runs, tombstone_until=tombstone_until, lease=lease)

    async def remove_tombstones(self, *, due_by: datetime, limit: int, lease: Lease) -> list[tuple[str, str]]:
        work = self.inner.remove_tombstones(due_by=due_by, limit=limit, lease=lease)
        return await self._recorded("remove_tombstones", work, due_by=due_by, limit=limit, lease=lease)

    async def prune_marks(self, *, before: datetime, after: str | None = None, limit: int = 1_000) -> Swept:
        work = self.inner.prune_marks(before=before, after=after, limit=limit)
        return await self._recorded("prune_marks", work, before=before, after=after, limit=limit)

    def others_version(self) -> int | None:
        return self.inner.others_version() if isinstance(self.inner, SeesOthers) else None

    async def children(
        self, pk: int, run: int, *, status: ChildStatus = "live", after: tuple[int, int] | None = None, limit: int = 50
    ) -> list[Child]:
        work = self.inner.children(pk, run, status=status, after=after, limit=limit)
        return await self._recorded("children", work, pk=pk, run=run, status=status, after=after, limit=limit)

    async def count_children(self, pk: int, run: int) -> Mapping[ChildStatus, int]:
        return await self._recorded("count_children", self.inner.count_children(pk, run), pk=pk, run=run)

    async def put_standing(self, standing: SagaStanding) -> None:
        await self._recorded("put_standing", self.inner.put_standing(standing), standing=standing)

    async def standings(self) -> list[SagaStanding]:
        return await self._recorded("standings", self.inner.standings())

    async def put_definitions(self, definitions: Sequence[RegisteredDefinition]) -> None:
        work = self.inner.put_definitions(definitions)
        await self._recorded("put_definitions", work, definitions=tuple(definitions))

    async def definitions(self) -> list[RegisteredDefinition]:
        return await self._recorded("definitions", self.inner.definitions())
