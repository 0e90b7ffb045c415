"""The key-value saga store against the naive model: the same random operations on both, the same answers from both.

A run ends when each operation has both succeeded and failed at least once, or fails when that takes too long. Its seed
is in the name of the test; SAGALOOM_SEEDS=200 runs that many instead of the usual few.
"""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from sagaloom.definitions import SAGA_INSTANCE_STATUSES
from sagaloom.engine.lifecycle import is_terminal
from sagaloom.engine.records import Instance, SagaStanding
from sagaloom.errors import BackendUnavailable, Fenced, MessageRejected
from sagaloom.kv import MemoryKeyValue, SqliteKeyValue
from sagaloom.kv.postgres import PostgresSagaRows
from sagaloom.ports.keyvalue import Check, Committed, Conflicted, Entry, Key, KeyValue
from sagaloom.ports.store import InboxRow, InstanceFilter, Lease, OutboxRow, RowRef, SlotClaim, UnitOfWork
from sagaloom.stores import KvSagaStore, SqlSagaStore, beliefs
from sagaloom.testing import MemoryStore
from sagaloom.testing.contracts.sagastore.samples import (
    at,
    child_of,
    dead_letter_of,
    effect_of,
    envelope_of,
    feed_of,
    head_of,
    mark_of,
    next_of,
    pending_of,
    start_of,
    step_of,
    timer_of,
)
from tests.schemas import Schema

SEEDS = int(os.environ.get("SAGALOOM_SEEDS", "6"))
STEPS_MIN = 60
STEPS_MAX = 2_000

SAGAS = ("orders", "refunds", "mail")
KEYS = tuple(f"{region}/{n}" for region in ("eu", "us") for n in range(4))
CONFLICTS = ("revision", "mark", "gone", "refused", "limit")
GONE = RowRef(5, 1_000_000)


class Flaky:
    """A key-value store that fails before or after its next commit when told to."""

    def __init__(self, inner: KeyValue) -> None:
        self._inner = inner
        self.fails: str | None = None
        self.has_written = False

    @property
    def name(self) -> str:
        return self._inner.name

    async def get(self, key: Key) -> Entry | None:
        return await self._inner.get(key)

    async def get_many(self, keys: Sequence[Key]) -> list[Entry | None]:
        return await self._inner.get_many(keys)

    async def scan(self, prefix: Key, **bounds: Any) -> list[Entry]:
        return await self._inner.scan(prefix, **bounds)

    async def count(self, prefix: Key, *, limit: int) -> int:
        return await self._inner.count(prefix, limit=limit)

    async def commit(
        self,
        *,
        checks: Sequence[Check] = (),
        inserts: Sequence[tuple[Key, bytes]] = (),
        puts: Sequence[tuple[Key, bytes]] = (),
        deletes: Sequence[Key] = (),
        reserve: Mapping[str, int] | None = None,
    ) -> Committed | Conflicted:
        if self.fails == "before":
            raise BackendUnavailable("the disk is full")
        outcome = await self._inner.commit(checks=checks, inserts=inserts, puts=puts, deletes=deletes, reserve=reserve)
        self.has_written = isinstance(outcome, Committed)
        if self.fails == "after":
            raise BackendUnavailable("the answer was lost")
        return outcome

    def watch(self, prefix: Key) -> AsyncIterator[int]:
        return self._inner.watch(prefix)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)  # what a store can do beyond the port

    async def close(self) -> None:
        await self._inner.close()


class Run:
    """Two stores side by side, and the dice."""

    def __init__(self, seed: int, kv: KeyValue, make_store: Callable[[Any], KvSagaStore] = KvSagaStore) -> None:
        self.dice = random.Random(seed)
        self.kv = Flaky(kv)
        self.make_store = make_store
        self.model = MemoryStore()
        self.store = make_store(self.kv)
        self.others: list[tuple[KvSagaStore, Lease]] = []
        self.lease = Lease("nobody", 0)
        self.seen: set[tuple[str, bool]] = set()
        self.conflicts: set[str] = set()
        self.names = 0
        self.fresh_pks: list[int] = []
        self.past = MemoryStore()
        """All rows that were ever there to be consumed."""
        self.generators: dict[str, Callable[[MemoryStore], UnitOfWork | None]] = {
            "accept": self.accept,
            "start": self.start,
            "step": self.step,
            "ignore": self.ignore,
            "open another run": self.open_another_run,
            "handle a row": self.handle_row,
            "try a row again": self.try_row_again,
            "settle an effect": self.settle_effect,
            "try an effect again": self.try_effect_again,
            "fire a timer": self.fire_timer,
            "replace timers": self.replace_timers,
            "spawn": self.spawn,
            "end a child": self.end_child,
            "claim a slot": self.claim_slot,
            "give up": self.give_up,
            "redrive": self.redrive,
            "forget a mark": self.forget_mark,
            "mark again": self.mark_again,
        }
        self.operations: dict[str, Callable[[], Awaitable[bool]]] = {
            "commit": self.commit,
            "commit through a fault": self.commit_through_a_fault,
            "commit under a stale lease": self.commit_under_a_stale_lease,
            "hand over": self.hand_over,
            "restart": self.restart,
            "reserve": self.reserve,
            "load": self.load,
            "load a run": self.load_run,
            "list": self.list_instances,
            "count": self.count_instances,
            "read marks": self.read_marks,
            "read rows": self.read_rows,
            "read dead letters": self.read_dead_letters,
            "read the feed": self.read_feed,
            "read timers": self.read_timers,
            "read children": self.read_children,
            "say something of a saga": self.say_something,
            "remove runs": self.remove_runs,
            "remove tombstones": self.remove_tombstones,
            "prune marks": self.prune_marks,
        }
        self.wanted = {(name, outcome) for name in self.generators for outcome in (True, False)}
        self.wanted |= {(name, outcome) for name in self.operations for outcome in (True, False)}
        # Some operations have but one outcome.
        self.wanted -= {
            ("hand over", False),
            ("restart", False),
            ("reserve", False),
            ("say something of a saga", False),
        }
        self.wanted -= {("commit under a stale lease", True), ("commit through a fault", True)}

    async def play(self) -> None:
        await self.hand_over()
        names = list(self.operations)
        weights = [16, 2, 1, 1, 1, 2, *([2] * (len(names) - 6))]
        for step in range(STEPS_MAX):
            name = self.dice.choices(names, weights)[0]
            # The dice alone would be long about the last few.
            if (overdue := self.missing(names)) and self.dice.random() < 0.3:
                name = self.dice.choice(overdue)
            try:
                self.seen.add((name, await self.operations[name]()))
                if step % 20 == 0:
                    await self.compare_everything()
            except BaseException as error:
                error.add_note(f"in step {step}, {name}")
                raise
            if step >= STEPS_MIN and self.wanted <= self.seen and self.conflicts == set(CONFLICTS):
                await self.compare_everything()
                return
        missing = self.wanted - self.seen | {(kind, True) for kind in CONFLICTS if kind not in self.conflicts}
        pytest.fail(f"after {STEPS_MAX} steps these have not been seen: {sorted(missing)}")

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that have not both succeeded and failed yet."""
        return [name for name in names if {(name, True), (name, False)} & self.wanted - self.seen]

    # -- operations: each says whether it succeeded ----------------------------------------------------------------

    async def commit(self) -> bool:
        names, units = await self.batch()

        expected = await self.model.commit(units, lease=self.lease)
        actual = await self.store.commit(units, lease=self.lease)

        kinds = {index: conflict.kind for index, conflict in expected.conflicts.items()}
        assert {index: conflict.kind for index, conflict in actual.conflicts.items()} == kinds
        bases = (expected.inbox_base, expected.outbox_base, expected.feed_base)
        assert (actual.inbox_base, actual.outbox_base, actual.feed_base) == bases
        self.conflicts |= set(kinds.values())
        self.seen |= {(name, index not in kinds) for index, name in enumerate(names)}
        return not kinds

    async def commit_through_a_fault(self) -> bool:
        _, units = await self.batch()
        self.kv.fails, self.kv.has_written = self.dice.choice(("before", "after")), False

        try:
            await self.store.commit(units, lease=self.lease)
        except BackendUnavailable:
            assert self.store.problem is not None
        finally:
            self.kv.fails = None

        # Written or not, whole: what could be read of it afterwards decides what the model does.
        if self.kv.has_written:
            await self.model.commit(units, lease=self.lease)
        await self.compare_everything()
        return False

    async def commit_under_a_stale_lease(self) -> bool:
        _, units = await self.batch()
        store, stale = self.dice.choice(self.others) if self.others else (self.store, Lease("nobody", 0))

        for refusing in (store, self.model):
            with pytest.raises(Fenced):
                await refusing.commit(units, lease=stale)
        return False

    async def hand_over(self) -> bool:
        """Another store object, old or new, takes the lease."""
        others = [store for store, _ in self.others]
        successor = self.dice.choice([*others, self.make_store(self.kv)])
        if self.lease.epoch:
            self.others = [*self.others, (self.store, self.lease)][-4:]
        self.store = successor
        self.lease = await self.store.acquire(f"worker-{self.name()}", now=at(0))
        assert await self.model.acquire(self.lease.holder, now=at(0)) == self.lease
        self.others = [other for other in self.others if other[0] is not successor]
        return True

    async def restart(self) -> bool:
        """All that was remembered is gone; the lease is not."""
        self.store = self.make_store(self.kv)
        return True

    async def load(self) -> bool:
        keys = [(self.dice.choice(SAGAS), self.dice.choice(KEYS)) for _ in range(self.dice.randint(1, 4))]

        expected = await self.model.load(keys)

        assert await self.store.load(keys) == expected
        return all(found.head for found in expected)

    async def load_run(self) -> bool:
        wanted = self.dice.choice(SAGAS), self.dice.choice(KEYS), self.dice.randint(1, 3)

        expected = await self.model.load_run(*wanted)

        assert await self.store.load_run(*wanted) == expected
        return expected is not None

    def a_filter(self) -> InstanceFilter:
        dice = self.dice
        return InstanceFilter(
            saga_ids=tuple(dice.sample((*SAGAS, "nobody"), dice.randint(0, 2))),
            statuses=tuple(dice.sample(SAGA_INSTANCE_STATUSES, dice.randint(0, 3))),
            key_prefix=dice.choice(("", "", "eu/", "us/1", "x")),
            created_after=at(dice.randint(0, 20)) if dice.random() < 0.3 else None,
            created_before=at(dice.randint(0, 20)) if dice.random() < 0.3 else None,
        )

    async def list_instances(self) -> bool:
        wanted, limit, offset = self.a_filter(), self.dice.randint(1, 5), self.dice.choice((0, 0, 2))
        if self.dice.random() < 0.2:
            for store in (self.model, self.store):
                with pytest.raises(MessageRejected):
                    await store.instances(wanted, limit=limit, cursor="nonsense")
            return False

        expected, expected_cursor = await self.model.instances(wanted, limit=limit, offset=offset)
        actual, cursor = await self.store.instances(wanted, limit=limit, offset=offset)
        while expected_cursor is not None:
            assert (actual, cursor is not None) == (expected, True)
            expected, expected_cursor = await self.model.instances(wanted, limit=limit, cursor=expected_cursor)
            actual, cursor = await self.store.instances(wanted, limit=limit, cursor=cursor)
        assert (actual, cursor) == (expected, None)
        return True

    async def count_instances(self) -> bool:
        wanted, limit = self.a_filter(), self.dice.choice((1, 3, 10_000))

        expected = await self.model.count_instances(wanted, limit=limit)

        assert await self.store.count_instances(wanted, limit=limit) == expected
        return expected > 0

    async def read_marks(self) -> bool:
        wanted = [(self.dice.randint(1, 12), f"m-{self.dice.randint(1, 40)}")]
        if self.model.marks_by_key and self.dice.random() < 0.5:
            wanted.append(self.dice.choice(list(self.model.marks_by_key)))

        expected = await self.model.marks(wanted)

        assert await self.store.marks(wanted) == expected
        return any(expected)

    async def read_rows(self) -> bool:
        refs = [*self.some(self.model.inbox), *self.some(self.model.outbox), *([GONE] * self.dice.randint(0, 1))]
        after, limit = self.dice.choice([None, *refs]), self.dice.randint(1, 5)

        assert await self.store.inbox_page(after=after, limit=limit) == await self.model.inbox_page(
            after=after, limit=limit
        )
        assert await self.store.outbox_page(after=after, limit=limit) == await self.model.outbox_page(
            after=after, limit=limit
        )
        assert await self.store.inbox_rows(refs) == await self.model.inbox_rows(refs)
        assert await self.store.outbox_rows(refs) == await self.model.outbox_rows(refs)
        return bool(refs) and GONE not in refs

    async def read_dead_letters(self) -> bool:
        named: dict[str, Any] = {
            "saga_id": self.dice.choice((None, "nobody", *SAGAS)),
            "key": self.dice.choice((None, *KEYS)),
            "after": self.dice.choice((None, f"d-{self.dice.randint(0, 60):04d}")),
            "limit": self.dice.randint(1, 4),
        }

        expected = await self.model.dead_letters(**named)

        assert await self.store.dead_letters(**named) == expected
        wanted = expected[0].id if expected else "d-none"
        assert await self.store.dead_letter(wanted) == await self.model.dead_letter(wanted)
        return bool(expected)

    async def read_feed(self) -> bool:
        newest, limit = len(self.model.events), self.dice.randint(1, 9)
        after = self.dice.choice((self.dice.randint(0, newest), self.dice.randint(0, newest), newest, newest + 3))

        expected = await self.model.feed(after=after, limit=limit)

        assert await self.store.feed(after=after, limit=limit) == expected
        assert await self.store.feed_bounds() == await self.model.feed_bounds()
        return bool(expected)

    async def read_timers(self) -> bool:
        after = self.some(self.model.timers_by_place)
        named: dict[str, Any] = {
            "due_by": self.dice.choice((None, at(-1), at(self.dice.randint(0, 30)))),
            "after": pending_of(self.model.timers_by_place[after[0]]) if after and self.dice.random() < 0.5 else None,
            "limit": self.dice.randint(1, 6),
        }

        expected = await self.model.timers(**named)

        assert await self.store.timers(**named) == expected
        return bool(expected)

    async def read_children(self) -> bool:
        pk, run = self.dice.randint(1, 3), self.dice.randint(1, 2)
        named: dict[str, Any] = {
            "status": self.dice.choice(("live", "completed", "failed", "cancelled")),
            "after": self.dice.choice((None, (self.dice.randint(0, 2), self.dice.randint(0, 300)))),
            "limit": self.dice.randint(1, 6),
        }

        expected = await self.model.children(pk, run, **named)

        assert await self.store.children(pk, run, **named) == expected
        assert await self.store.count_children(pk, run) == await self.model.count_children(pk, run)
        return bool(expected)

    async def say_something(self) -> bool:
        standing = SagaStanding(self.dice.choice(SAGAS), self.dice.random() < 0.5, self.dice.random() < 0.5)
        for store in (self.store, self.model):
            await store.put_standing(standing)
        assert await self.store.standings() == await self.model.standings()
        return True

    async def remove_runs(self) -> bool:
        known = [*self.model.instances_by_run.values()]
        runs = self.dice.sample(known, min(len(known), self.dice.randint(1, 2)))
        over = {run.pk for run in known} - {run.pk for run in known if not is_terminal(run.status)}
        if over and self.dice.random() < 0.6:
            pk = self.dice.choice(sorted(over))
            runs = [run for run in known if run.pk == pk]
        if self.dice.random() < 0.2:
            runs = [replace(run, entries=run.entries + 1) for run in runs]
        until = at(self.dice.randint(0, 20))

        removed = await self.model.remove_runs(runs, tombstone_until=until, lease=self.lease)

        assert await self.store.remove_runs(runs, tombstone_until=until, lease=self.lease) == removed
        return removed > 0

    async def remove_tombstones(self) -> bool:
        named: dict[str, Any] = {"due_by": at(self.dice.choice((0, 20))), "limit": self.dice.randint(1, 3)}

        gone = await self.model.remove_tombstones(**named, lease=self.lease)

        assert await self.store.remove_tombstones(**named, lease=self.lease) == gone
        return bool(gone)

    async def prune_marks(self) -> bool:
        """Walks over all marks. How many a page holds is the store's own."""
        before = at(self.dice.choice((-1, 0, 1)))
        removed: list[int] = []
        for store in (self.model, self.store):
            count, cursor = await store.prune_marks(before=before, limit=7)
            while cursor is not None:
                more, cursor = await store.prune_marks(before=before, after=cursor, limit=7)
                count += more
            removed.append(count)
        assert removed[0] == removed[1]
        return removed[0] > 0

    async def compare_everything(self) -> None:
        """What is in the model is in the store, and nothing else. A fresh object reads, so memory cannot help."""
        model, store = self.model, self.make_store(self.kv)
        everything = InstanceFilter()
        assert await store.instances(everything, limit=10_000) == await model.instances(everything, limit=10_000)
        for status in SAGA_INSTANCE_STATUSES:
            one = InstanceFilter(statuses=(status,))
            assert await store.count_instances(one) == await model.count_instances(one)
        keys = [*model.heads, ("nobody", "eu/1")]
        assert await store.load(keys) == await model.load(keys)
        for saga_id, key in keys:
            runs = await model.runs(saga_id, key)
            assert await store.runs(saga_id, key) == runs
            for run in runs:
                assert await store.history(run, limit=1_000) == await model.history(run, limit=1_000)
        assert await store.inbox_page(after=None, limit=10_000) == await model.inbox_page(after=None, limit=10_000)
        assert await store.outbox_page(after=None, limit=10_000) == await model.outbox_page(after=None, limit=10_000)
        assert await store.timers(limit=10_000) == await model.timers(limit=10_000)
        for pk in range(1, 4):
            assert await store.count_children(pk, 1) == await model.count_children(pk, 1)
        for saga_id in SAGAS:
            assert await store.slots(saga_id) == await model.slots(saga_id)
        assert await store.dead_letters(limit=10_000) == await model.dead_letters(limit=10_000)
        for saga_id in SAGAS:
            assert await store.dead_letters(saga_id=saga_id) == await model.dead_letters(saga_id=saga_id)
        assert await store.feed(after=0, limit=100_000) == await model.feed(after=0, limit=100_000)
        rows = {
            "correlation": len(model.heads),
            "state": len(model.instances_by_run),
            "transition": sum(map(len, model.entries.values())),
            "dedupe": len(model.marks_by_key),
        }
        if not isinstance(store, SqlSagaStore):
            rows["instance_index"] = await model.count_instances(everything)
            rows["dead_letter_index"] = 2 * len(model.dead_letters_by_id)
        assert {table: await self.kv.count((table,), limit=100_000) for table in rows} == rows
        places = list(model.marks_by_key)
        assert await store.marks(places) == await model.marks(places)

    # -- units ----------------------------------------------------------------------------------------------------

    async def batch(self) -> tuple[list[str], list[UnitOfWork]]:
        """Units of which each fits what those before it leave, most of the time."""
        self.remember()
        names: list[str] = []
        units: list[UnitOfWork] = []
        expected = _copy_of(self.model)
        for _ in range(self.dice.choice((1, 1, 2, 4, 8))):
            name = self.dice.choice(self.missing(self.generators) or list(self.generators))
            if self.dice.random() < 0.7:
                name = self.dice.choice(list(self.generators))
            unit = self.generators[name](expected)
            if unit is None:
                continue
            if units and self.dice.random() < 0.1:
                unit = self.dice.choice(units)  # delivered twice
            if self.dice.random() < 0.15:
                unit = self.spoiled(unit)
            await expected.commit([unit], lease=self.lease)
            names.append(name)
            units.append(unit)
        return names, units

    def spoiled(self, unit: UnitOfWork) -> UnitOfWork:
        """`unit` with something wrong, such as a writer that is late, slow, or broken produces."""
        ways: list[dict[str, Any]] = [
            {"inbox_done": GONE},
            {"outbox_done": (GONE,)},
            {"inbox_update": InboxRow(GONE, envelope_of("eu/1", "m-0"))},
            {"outbox_update": OutboxRow(GONE, effect_of(start_of(head_of("eu/1", 1))))},
            {"timer_done": pending_of(timer_of("eu/1", "t-none", 1))},
            {"dead_letter_done": "d-none"},
            {"feed": feed_of(start_of(head_of("eu/1", 1)), "\ud800")},
        ]
        ways += [{"inbox_done": ref} for ref in self.some(self.past.inbox)]
        ways += [{"inbox_update": InboxRow(ref, self.past.inbox[ref])} for ref in self.some(self.past.inbox)]
        ways += [{"outbox_done": (ref,)} for ref in self.some(self.past.outbox)]
        ways += [{"outbox_update": OutboxRow(ref, self.past.outbox[ref])} for ref in self.some(self.past.outbox)]
        for place in self.some(self.past.timers_by_place):
            ways.append({"timer_done": pending_of(self.past.timers_by_place[place])})
        ways += [{"dead_letter_done": letter_id} for letter_id in self.some(self.past.dead_letters_by_id)]
        if self.model.marks_by_key:
            pk, dedupe_key = self.dice.choice(list(self.model.marks_by_key))
            ways.append({"mark_pk": pk, "mark": mark_of(dedupe_key)})
        if unit.instance is not None:
            before = unit.revision_before or 0
            ways += [
                {"revision_before": before + 1, "instance": replace(unit.instance, revision=before + 2)},
                {"revision_before": None if before else 3},
                {"entries_before": unit.entries_before - 1},
                {"instance": replace(unit.instance, revision=before + 5)},
                {"instance": replace(unit.instance, state="\ud800")},
                {"entry": replace(unit.entry, entry_no=99) if unit.entry else None, "instance": None},
            ]
        if unit.head is not None:
            ways.append({"head_before": replace(unit.head, pk=4_242)})
            ways.append({"head_before": None if unit.head_before else unit.head})
        return replace(unit, **self.dice.choice(ways))

    def accept(self, model: MemoryStore) -> UnitOfWork | None:
        saga_id, key = self.dice.choice(SAGAS), self.key()
        before = model.heads.get((saga_id, key))
        message_id = self.message_id()
        head = before or head_of(
            key, self.pk(), saga_id=saga_id, run=0, awaits_start=True, created_at=at(self.dice.randint(0, 20))
        )
        return UnitOfWork(
            part=head.part,
            head=None if before else head,
            head_before=before,
            mark_pk=head.pk,
            mark=mark_of(message_id),
            inbox_add=(envelope_of(key, message_id, saga_id=saga_id),),
        )

    def start(self, model: MemoryStore) -> UnitOfWork | None:
        saga_id, key = self.dice.choice(SAGAS), self.key()
        before = model.heads.get((saga_id, key))
        if before is not None and before.run:
            return None
        head = head_of(key, self.pk(), saga_id=saga_id, created_at=at(self.dice.randint(0, 20)))
        if before is not None:
            head = replace(before, run=1, awaits_start=False)
        return self.whole(None, start_of(head, status=self.status()), head=head, head_before=before)

    def step(self, model: MemoryStore) -> UnitOfWork | None:
        before = self.an_instance(model)
        if before is None:
            return None
        return self.whole(before, next_of(before, status=self.status(), state=self.name().encode()))

    def ignore(self, model: MemoryStore) -> UnitOfWork | None:
        before = self.an_instance(model)
        if before is None:
            return None
        return step_of(before, replace(before, entries=before.entries + 1, bystanders=before.bystanders + 1))

    def open_another_run(self, model: MemoryStore) -> UnitOfWork | None:
        heads = [head for head in model.heads.values() if head.run]
        if not heads:
            return None
        before = self.dice.choice(heads)
        head = replace(before, run=before.run + 1)
        created_at = at(self.dice.randint(0, 20))
        return self.whole(None, start_of(head, created_at=created_at), head=head, head_before=before)

    def handle_row(self, model: MemoryStore) -> UnitOfWork | None:
        before = self.an_instance(model)
        refs = self.some(self.model.inbox)
        if not refs:
            return None
        if before is None or self.dice.random() < 0.3:
            return UnitOfWork(part=refs[0].part, inbox_done=refs[0])
        return self.whole(before, next_of(before, status=self.status()), inbox_done=refs[0])

    def try_row_again(self, model: MemoryStore) -> UnitOfWork | None:
        refs = self.some(self.model.inbox)
        if not refs:
            return None
        envelope = self.model.inbox[refs[0]]
        again = replace(envelope, attempt=envelope.attempt + 1, last_error=self.name(), due_at=at(1))
        return UnitOfWork(part=refs[0].part, inbox_update=InboxRow(refs[0], again))

    def settle_effect(self, model: MemoryStore) -> UnitOfWork | None:
        waiting = list(self.model.outbox)
        if not waiting:
            return None
        done = tuple(self.dice.sample(waiting, min(self.dice.randint(1, 3), len(waiting))))
        answers = (envelope_of(self.dice.choice(KEYS), self.message_id(), origin="reply"),)
        return UnitOfWork(part=done[0].part, outbox_done=done, inbox_add=answers[: self.dice.randint(0, 1)])

    def try_effect_again(self, model: MemoryStore) -> UnitOfWork | None:
        refs = self.some(self.model.outbox)
        if not refs:
            return None
        effect = self.model.outbox[refs[0]]
        again = replace(effect, attempt=effect.attempt + 1, last_error=self.name())
        return UnitOfWork(part=refs[0].part, outbox_update=OutboxRow(refs[0], again))

    def fire_timer(self, model: MemoryStore) -> UnitOfWork | None:
        places = self.some(model.timers_by_place)
        if not places:
            return None
        timer = model.timers_by_place[places[0]]
        return UnitOfWork(part=0, timer_done=pending_of(timer), inbox_add=(timer.envelope,))

    def spawn(self, model: MemoryStore) -> UnitOfWork | None:
        unit = self.step(model)
        children = tuple(
            child_of(self.dice.randint(1, 3), self.dice.randint(1, 2), position, parent_run=self.dice.randint(1, 2))
            for position in range(self.names, self.names + self.dice.randint(1, 3))
        )
        self.names += len(children)
        return None if unit is None else replace(unit, children_add=children)

    def end_child(self, model: MemoryStore) -> UnitOfWork | None:
        unit = self.step(model)
        live = [child for child in model.children_by_place.values() if child.status == "live"]
        if unit is None or not live:
            return None
        status = self.dice.choice(("completed", "failed", "cancelled"))
        return replace(unit, child_done=replace(self.dice.choice(live), status=status, run=1, ended_at=at(3)))

    def claim_slot(self, model: MemoryStore) -> UnitOfWork | None:
        unit = self.step(model) if self.dice.random() < 0.5 else self.accept(model)
        use = self.dice.choice(("take", "take", "pass", "free"))
        claim = SlotClaim(
            use,
            self.dice.choice(SAGAS),
            self.dice.choice(("a", "b")),
            self.dice.randint(1, 3),
            self.dice.choice(KEYS[:3]),
            "m-1",
            at(2),
        )
        return None if unit is None else replace(unit, slot=claim)

    def replace_timers(self, model: MemoryStore) -> UnitOfWork | None:
        old = [pending_of(model.timers_by_place[place]) for place in self.some(model.timers_by_place)]
        new = [timer_of("eu/1", f"t-{self.dice.randint(1, 20)}", self.dice.randint(0, 30)) for _ in range(2)]
        return UnitOfWork(part=0, timers_remove=tuple(old), timers_add=tuple(new[: self.dice.randint(0, 2)]))

    def give_up(self, model: MemoryStore) -> UnitOfWork | None:
        self.names += 1
        letter = dead_letter_of(f"d-{self.names:04d}", self.dice.choice(KEYS), saga_id=self.dice.choice(SAGAS))
        refs = self.some(self.model.inbox) if self.dice.random() < 0.5 else []
        return UnitOfWork(part=0, dead_letters_add=(letter,), inbox_done=refs[0] if refs else None)

    def redrive(self, model: MemoryStore) -> UnitOfWork | None:
        ids = self.some(model.dead_letters_by_id)
        if not ids:
            return None
        envelope = model.dead_letters_by_id[ids[0]].envelope
        assert envelope is not None
        return UnitOfWork(part=0, dead_letter_done=ids[0], inbox_add=(envelope,))

    def forget_mark(self, model: MemoryStore) -> UnitOfWork | None:
        places = self.some(model.marks_by_key)
        return UnitOfWork(part=0, unmark=places[0] if places else (1, "m-none"))

    def mark_again(self, model: MemoryStore) -> UnitOfWork | None:
        places = self.some(model.marks_by_key)
        if not places:
            return None
        pk, dedupe_key = places[0]
        mark = mark_of(dedupe_key, run=self.dice.randint(2, 9))
        return UnitOfWork(part=0, unmark=places[0], mark_pk=pk, mark=mark)

    # -- dice -----------------------------------------------------------------------------------------------------

    def whole(self, before: Instance | None, after: Instance, **more: Any) -> UnitOfWork:
        """A step with everything that a decision may ask for."""
        message_id = self.message_id()
        feed = feed_of(after, *[f"event {n}" for n in range(self.dice.randint(0, 3))])
        effects = tuple(effect_of(after, n) for n in range(self.dice.randint(0, 2)))
        cascaded = tuple(
            envelope_of(self.dice.choice(KEYS), f"{message_id}-{n}") for n in range(self.dice.randint(0, 2))
        )
        timers = (timer_of(after.key, f"t-{self.dice.randint(1, 20)}", self.dice.randint(0, 30)),)
        facts = {"mark": mark_of(message_id, run=after.run), "feed": feed, "outbox_add": effects}
        facts |= {"inbox_add": cascaded, "timers_add": timers[: self.dice.randint(0, 1)]}
        return step_of(before, after, **{**facts, **more})

    def an_instance(self, model: MemoryStore) -> Instance | None:
        return self.dice.choice(list(model.instances_by_run.values())) if model.instances_by_run else None

    def remember(self) -> None:
        for name in ("inbox", "outbox", "timers_by_place", "dead_letters_by_id"):
            getattr(self.past, name).update(getattr(self.model, name))

    def some(self, table: Mapping[Any, object]) -> list[Any]:
        """One key of `table`, if it has any."""
        return [self.dice.choice(list(table))] if table else []

    def status(self) -> Any:
        return self.dice.choice(SAGA_INSTANCE_STATUSES)

    def name(self) -> str:
        self.names += 1
        return str(self.names)

    def key(self) -> str:
        # A few keys meet often; new ones never run out.
        return self.dice.choice(KEYS) if self.dice.random() < 0.8 else f"eu/{self.name()}"

    def message_id(self) -> str:
        return f"m-{self.name()}"

    def pk(self) -> int:
        # Numbers beyond those of `reserve_pks` are as good as fresh ones; the store knows nothing of them.
        self.names += 1
        return self.fresh_pks.pop() if self.fresh_pks and self.dice.random() < 0.7 else 1_000 + self.names

    async def reserve(self) -> bool:
        count = self.dice.randint(1, 5)

        first = await self.store.reserve_pks(count)

        assert first == await self.model.reserve_pks(count)
        self.fresh_pks += range(first, first + count)
        return True


def _copy_of(model: MemoryStore) -> MemoryStore:
    copy = MemoryStore()
    for name, value in vars(model).items():
        setattr(copy, name, value.copy() if isinstance(value, dict | list) else value)
    copy.entries = {run: entries.copy() for run, entries in model.entries.items()}
    return copy


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_the_store_over_memory_does_what_the_model_does(seed: int) -> None:
    await Run(seed, MemoryKeyValue()).play()


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_the_store_over_sqlite_does_what_the_model_does(seed: int, tmp_path: Path) -> None:
    kv = await SqliteKeyValue.open(tmp_path / "saga.db", synchronous="OFF")

    await Run(1_000 + seed, kv).play()

    await kv.close()


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_the_store_over_postgres_does_what_the_model_does(seed: int, schema: Schema) -> None:
    await Run(3_000 + seed, PostgresSagaRows(schema.database()), SqlSagaStore).play()


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_a_store_that_remembers_next_to_nothing_does_what_the_model_does(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_RUNS_KNOWN_MAX", "_HEADS_KNOWN_MAX", "_ROWS_KNOWN_MAX"):
        monkeypatch.setattr(beliefs, name, 2)

    await Run(2_000 + seed, MemoryKeyValue()).play()
