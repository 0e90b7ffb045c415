"""What onlookers may ask of a runtime: instances and their history, queries, timers and schedules, and what happens.

Nothing here changes anything, and all but `schedules` may be asked of a runtime that has not been started.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, overload

from sagaloom.definitions import QueryDefinition
from sagaloom.engine.records import Child, ChildStatus, DeadLetter, HistoryEntry, Instance
from sagaloom.errors import InstanceNotFound
from sagaloom.ports.store import InstanceFilter
from sagaloom.runtime.feed import FeedHub, FeedWatch
from sagaloom.runtime.part import Part
from sagaloom.runtime.receipts import QueryResult
from sagaloom.runtime.retention import removed_instance
from sagaloom.runtime.scheduler import Scheduler, ScheduleStatus
from sagaloom.runtime.timers import WaitingTimer, waiting_timers

__all__ = ["Onlookers", "no_instance"]

_P = TypeVar("_P")


class Onlookers(Part):
    """The part of `SagaRuntime` that onlookers use."""

    _feed: FeedHub
    _scheduler: Scheduler

    async def get_instance(self, saga_id: str, key: str, *, run: int | None = None) -> Instance | None:
        """The newest run of a key, or run number `run`. Run 0 with status `pending` stands for a first message that
        is accepted and not applied yet. Its `state` and `result` are JSON as it is stored:
        `definition.state_codec.decode(found.state)` is the state as handlers have it."""
        if run is not None:
            return await self.store.load_run(saga_id, key, run)
        (loaded,) = await self.store.load([(saga_id, key)])
        head = loaded.head
        if loaded.instance is None and head is not None and head.awaits_start:
            definition = self.definitions.get(saga_id)
            return Instance(
                saga_id=saga_id,
                key=key,
                pk=head.pk,
                run=0,
                status="pending",
                revision=0,
                state=definition.state_codec.encode(definition.initial_state) if definition else b"{}",
                def_version=definition.version if definition else 1,
                tier=definition.durability if definition else "t1",
                created_at=head.created_at,
                updated_at=head.created_at,
            )
        return loaded.instance

    async def why_no_instance(self, saga_id: str, key: str, run: int | None = None) -> InstanceNotFound:
        """The error about a run that `get_instance` did not find: it was never there, or has been removed."""
        (loaded,) = await self.store.load([(saga_id, key)])
        return removed_instance(loaded.head, run) or no_instance(saga_id, key, run)

    async def list_instances(
        self, wanted: InstanceFilter, *, limit: int = 50, offset: int = 0, cursor: str | None = None
    ) -> tuple[list[Instance], str | None]:
        """Runs, newest first, and the cursor of the next page."""
        return await self.store.instances(wanted, limit=limit, offset=offset, cursor=cursor)

    async def history(
        self, saga_id: str, key: str, *, run: int | None = None, after_entry: int = 0, limit: int = 50
    ) -> list[HistoryEntry]:
        """What happened to a run, oldest first; raises `InstanceNotFound`."""
        instance = await self.get_instance(saga_id, key, run=run)
        if instance is None:
            raise await self.why_no_instance(saga_id, key, run)
        if instance.run == 0:
            return []
        return await self.store.history(instance, after_entry=after_entry, limit=limit)

    async def children(
        self,
        saga_id: str,
        key: str,
        *,
        run: int | None = None,
        status: ChildStatus = "live",
        after: tuple[int, int] | None = None,
        limit: int = 50,
    ) -> list[Child]:
        """The children that a run has spawned, of one status, in the order of their spawning; `after` is the revision
        and the position of the last one of the page before. Raises `InstanceNotFound`."""
        instance = await self.get_instance(saga_id, key, run=run)
        if instance is None:
            raise await self.why_no_instance(saga_id, key, run)
        return await self.store.children(instance.pk, instance.run, status=status, after=after, limit=limit)

    async def count_children(self, saga_id: str, key: str, *, run: int | None = None) -> Mapping[ChildStatus, int]:
        """How many children of each status a run has. Raises `InstanceNotFound`."""
        instance = await self.get_instance(saga_id, key, run=run)
        if instance is None:
            raise await self.why_no_instance(saga_id, key, run)
        return await self.store.count_children(instance.pk, instance.run)

    async def dead_letters(
        self, *, saga_id: str | None = None, key: str | None = None, after: str | None = None, limit: int = 50
    ) -> list[DeadLetter]:
        """What was given up, newest first."""
        return await self.store.dead_letters(saga_id=saga_id, key=key, after=after, limit=limit)

    @overload
    async def query(self, saga_id: str, key: str, query: QueryDefinition[_P], *, run: int | None = None) -> _P: ...
    @overload
    async def query(self, saga_id: str, key: str, query: str, *, run: int | None = None) -> Any: ...
    async def query(self, saga_id: str, key: str, query: QueryDefinition[Any] | str, *, run: int | None = None) -> Any:
        """Asks an instance: what its query says of the newest committed state, of a run that is paused or over too.
        Any process may answer, started or not.

        Raises `SagaNotFound`, `QueryNotFound`, `InstanceNotFound`, `QueryFailed`, and `MessageRejected`
        (`SAGA_INSTANCE_PENDING`) when the first message of the key has not been applied yet.
        """
        value, _ = await self._signals.query(saga_id, key, query, run=run)
        return value

    async def query_result(self, saga_id: str, key: str, query: str, *, run: int | None = None) -> QueryResult:
        """What `query` says, as JSON, with the run and the revision that it says it of."""
        _, result = await self._signals.query(saga_id, key, query, run=run)
        return result

    async def schedules(self) -> list[ScheduleStatus]:
        """The schedules of the registered sagas and how far they have come, by saga id."""
        return await self._scheduler.statuses()

    async def timers(
        self, saga_id: str | None = None, key: str | None = None, *, after: str | None = None, limit: int = 50
    ) -> list[WaitingTimer]:
        """The timers that wait, by due time: of one saga, of one correlation key, or all. `after` is the `cursor` of
        the last one of the page before."""
        return await waiting_timers(self.store, saga_id=saga_id, key=key, after=after, limit=limit)

    def watch(
        self,
        *,
        after: int | str | None = None,
        saga_id: str | Iterable[str] | None = None,
        key: str | None = None,
        types: Iterable[str] = (),
    ) -> FeedWatch:
        """What happens, as it happens: an iterator over (cursor, event) without a gap and without a repeat (I8).

            async with runtime.watch(saga_id="order", types=["saga:completed"]) as events:
                async for cursor, event in events:
                    ...

        It begins behind `after`, the cursor of an event or 0 for all that is kept; without it, now. A filter leaves
        events out, and `FeedWatch.cursor` passes over them. A cursor that this store cannot go on from is answered by
        one `FeedReset` (type `reset`), and then by everything that is kept. Works before `start` too; ends with `stop`.

        Raises `MessageRejected` for what is no cursor or no type of event.
        """
        return self._feed.watch(after=after, saga_ids=saga_id, key=key, types=types)

    def end_watches(self) -> None:
        """Ends every watch, and starts no other: for a server that is about to stop, and would wait for those who
        watch. `stop` does it too."""
        self._feed.close("stopping")


def no_instance(saga_id: str, key: str, run: int | None) -> InstanceNotFound:
    return InstanceNotFound(f"Saga instance not found: {saga_id}:{key}" + (f" run {run}" if run is not None else ""))
