"""What retention takes away, and what it leaves behind."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from sagaloom.engine.records import Instance
from sagaloom.errors import Fenced
from sagaloom.ports.store import Lease, SagaStore, UnitOfWork
from sagaloom.testing.contracts.sagastore.base import SagaStoreCase
from sagaloom.testing.contracts.sagastore.samples import (
    EVERY,
    at,
    child_of,
    current,
    kinds,
    mark_of,
    next_of,
    part_of,
    start_of,
    started,
    step_of,
    write,
)

__all__ = ["Removing"]


class Removing(SagaStoreCase):
    """Finished runs, tombstones, marks."""

    async def _finished(self, store: SagaStore, lease: Lease, key: str, **more: Any) -> Instance:
        """A run that has ended, with two history rows."""
        running = await started(store, lease, key)
        ended = next_of(running, status="completed", ended_at=at(10), **more)
        await write(store, lease, step_of(running, ended, mark=mark_of(f"end-{key}")))
        return ended

    async def test_a_removed_run_is_gone_with_its_history_and_leaves_a_tombstone(
        self, store: SagaStore, lease: Lease
    ) -> None:
        ended = await self._finished(store, lease, "o-1")
        other = await self._finished(store, lease, "o-2")

        removed = await store.remove_runs([ended], tombstone_until=at(1000), lease=lease)

        assert removed == 1
        (loaded,) = await store.load([("orders", "o-1")])
        assert loaded.instance is None
        assert loaded.head is not None
        assert (loaded.head.run, loaded.head.pk, loaded.head.ended_as) == (1, ended.pk, "completed")
        assert loaded.head.tombstone_until == at(1000)
        assert await store.load_run("orders", "o-1", 1) is None
        assert await store.runs("orders", "o-1") == []
        assert await store.history(ended) == []
        assert (await store.marks([(ended.pk, "end-o-1")]))[0] is not None
        assert await store.instances(EVERY, limit=10) == ([other], None)
        assert await store.count_instances(EVERY) == 1

    async def test_only_a_finished_run_that_is_stored_as_given_is_removed(self, store: SagaStore, lease: Lease) -> None:
        live = await started(store, lease, "o-1")
        ended = await self._finished(store, lease, "o-2")
        noted = replace(ended, entries=ended.entries + 1)
        await write(store, lease, step_of(ended, noted))

        removed = await store.remove_runs([live, ended], tombstone_until=at(1000), lease=lease)

        assert removed == 0
        assert await current(store, live) == live
        assert await current(store, noted) == noted

    async def test_a_run_with_live_children_is_removed_when_they_have_ended(
        self, store: SagaStore, lease: Lease
    ) -> None:
        ended = await self._finished(store, lease, "o-1", children=1)
        child = child_of(ended.pk, 1, 0)
        await write(store, lease, UnitOfWork(part=0, children_add=(child,)))
        early = await store.remove_runs([ended], tombstone_until=at(1000), lease=lease)
        await write(store, lease, UnitOfWork(part=0, child_done=replace(child, status="completed")))

        late = await store.remove_runs([ended], tombstone_until=at(1000), lease=lease)

        assert (early, late) == (0, 1)
        assert set((await store.count_children(ended.pk, 1)).values()) == {0}

    async def test_a_late_step_of_a_removed_run_conflicts(self, store: SagaStore, lease: Lease) -> None:
        ended = await self._finished(store, lease, "o-1")
        await store.remove_runs([ended], tombstone_until=at(1000), lease=lease)
        noted = replace(ended, entries=ended.entries + 1)

        result = await store.commit([step_of(ended, noted)], lease=lease)

        assert kinds(result) == {0: "revision"}
        assert await current(store, ended) is None

    async def test_a_key_whose_run_was_removed_opens_the_next_one(self, store: SagaStore, lease: Lease) -> None:
        ended = await self._finished(store, lease, "o-1")
        await store.remove_runs([ended], tombstone_until=at(20), lease=lease)
        ((tombstone, _),) = await store.load([("orders", "o-1")])
        assert tombstone is not None
        head = replace(tombstone, run=2, tombstone_until=None, ended_as=None)
        second = start_of(head)
        await write(store, lease, step_of(None, second, head=head, head_before=tombstone))

        removed = await store.remove_tombstones(due_by=at(1000), limit=10, lease=lease)

        assert removed == []
        assert await store.load([("orders", "o-1")]) == [(head, second)]

    async def test_an_older_run_goes_without_touching_the_head(self, store: SagaStore, lease: Lease) -> None:
        ended = await self._finished(store, lease, "o-1")
        ((before, _),) = await store.load([("orders", "o-1")])
        assert before is not None
        head = replace(before, run=2)
        second = start_of(head)
        await write(store, lease, step_of(None, second, head=head, head_before=before))

        assert await store.remove_runs([ended], tombstone_until=at(1000), lease=lease) == 1

        assert await store.load([("orders", "o-1")]) == [(head, second)]
        assert await store.runs("orders", "o-1") == [second]

    async def test_a_tombstone_goes_when_its_time_is_over_and_the_key_is_as_if_never_seen(
        self, store: SagaStore, lease: Lease
    ) -> None:
        for key, until in (("o-1", 20), ("o-2", 30)):
            ended = await self._finished(store, lease, key)
            await store.remove_runs([ended], tombstone_until=at(until), lease=lease)

        gone = [await store.remove_tombstones(due_by=at(moment), limit=1, lease=lease) for moment in (19, 20, 30, 99)]

        assert gone == [[], [("orders", "o-1")], [("orders", "o-2")], []]
        assert await store.load([("orders", "o-1"), ("orders", "o-2")]) == [(None, None), (None, None)]
        again = await started(store, lease, "o-1")
        assert await current(store, again) == again

    async def test_a_stale_lease_removes_nothing(self, store: SagaStore, lease: Lease) -> None:
        ended = await self._finished(store, lease, "o-1")
        await store.acquire("worker-2", now=at(1))

        with pytest.raises(Fenced):
            await store.remove_runs([ended], tombstone_until=at(1000), lease=lease)
        with pytest.raises(Fenced):
            await store.remove_tombstones(due_by=at(1000), limit=10, lease=lease)

        assert await current(store, ended) == ended

    async def test_marks_are_forgotten_in_bites_when_they_are_old(self, store: SagaStore, lease: Lease) -> None:
        run = await started(store, lease, "o-1")
        for n in range(5):
            mark = replace(mark_of(f"m-{n}"), at=at(n))
            await write(store, lease, UnitOfWork(part=part_of("o-1"), mark_pk=run.pk, mark=mark))

        forgotten, cursor, looks = 0, None, 0
        while looks == 0 or cursor is not None:
            removed, cursor = await store.prune_marks(before=at(3), after=cursor, limit=2)
            forgotten, looks = forgotten + removed, looks + 1

        assert (forgotten, looks) == (3, 3)
        left = await store.marks([(run.pk, f"m-{n}") for n in range(5)])
        assert [mark is not None for mark in left] == [False, False, False, True, True]
        await write(store, lease, UnitOfWork(part=part_of("o-1"), mark_pk=run.pk, mark=mark_of("m-0")))
