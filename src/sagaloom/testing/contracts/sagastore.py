"""What every saga store must do, as tests: subclass `SagaStoreContract`, say how to open a store, run pytest.

    class TestMyStore(SagaStoreContract):
        @pytest.fixture
        def open_store(self) -> OpenSagaStore:
            async def open_store() -> SagaStore:
                return await MyStore.connect("...")

            return open_store

The store that `open_store` opens must be empty. The tests are coroutines for anyio's pytest plugin; there is nothing to
skip, because the port has no optional parts. Put `pytest.register_assert_rewrite("sagaloom.testing.contracts")` into
your `conftest.py` for readable failures.

Where the port leaves room, the contract decides:

- units of a commit meet the store as if they were written one after the other; after a unit with a conflict, later
  units of the same instance in that commit conflict too, because they were decided on top of it;
- what can never be written is `refused`, whatever else is in its way;
- of several conflicts the first of `revision`, `mark`, `gone`, `limit` is told: a message that comes twice is a
  duplicate, even when the row it came from is gone;
- a unit forgets (`unmark`) before it marks, and consumes before it adds;
- `created_after` is inclusive, `created_before` is not, so that windows tile;
- a base in a `CommitResult` is 0 when nothing of its kind was numbered.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from sagaloom.definitions import SAGA_DURABILITY_TIERS, SagaInstanceStatus
from sagaloom.engine.concurrency import SlotUse
from sagaloom.engine.records import (
    Child,
    DeadLetter,
    Envelope,
    FeedEvent,
    FeedKind,
    FeedMoment,
    FeedRecord,
    Head,
    HeldSlot,
    HistoryEntry,
    Instance,
    Mark,
    OutboxEffect,
    PendingTimer,
    SagaStanding,
    ScheduleCursor,
    StepRecord,
    Timer,
)
from sagaloom.errors import BackendUnavailable, Fenced, MessageRejected
from sagaloom.ids import effect_key, key_hash, partition_of
from sagaloom.ports.store import (
    CommitResult,
    InboxRow,
    InstanceFilter,
    Lease,
    Loaded,
    OutboxRow,
    RegisteredDefinition,
    RowRef,
    SagaStore,
    SlotClaim,
    UnitOfWork,
)

__all__ = [
    "NOW",
    "OpenSagaStore",
    "SagaStoreContract",
    "dead_letter_of",
    "effect_of",
    "envelope_of",
    "feed_of",
    "head_of",
    "mark_of",
    "next_of",
    "part_of",
    "pending_of",
    "start_of",
    "step_of",
    "timer_of",
]

OpenSagaStore = Callable[[], Awaitable[SagaStore]]

NOW = datetime(2024, 5, 1, 9, 30, 0, 123456, tzinfo=UTC)
_ALL = InstanceFilter()


def at(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def part_of(key: str, saga_id: str = "orders") -> int:
    return partition_of(key_hash(saga_id, key))


def head_of(key: str, pk: int, *, saga_id: str = "orders", **more: Any) -> Head:
    """A head, as a first message that was applied leaves it."""
    return replace(Head(saga_id, key, pk, part_of(key, saga_id), 1, NOW), **more)


def envelope_of(key: str, message_id: str, **more: Any) -> Envelope:
    envelope = Envelope("orders", key, "OrderPlaced", message_id, b'{"n":1}', NOW, dedupe_key=message_id)
    return replace(envelope, **more)


def mark_of(message_id: str, **more: Any) -> Mark:
    return Mark(dedupe_key=message_id, message_id=message_id, digest=b"d" * 16, at=NOW, **more)


def feed_of(instance: Instance, *details: str) -> tuple[FeedRecord, ...]:
    """A record of the feed with one event for each of `details`."""
    moments = tuple(FeedMoment(FeedKind.STATE_CHANGED, instance.status, detail) for detail in details)
    saga_id, key, run, revision = instance.saga_id, instance.key, instance.run, instance.revision
    return (FeedRecord(NOW, saga_id, key, run, revision, "OrderPlaced", "m-1", moments),)


def effect_of(instance: Instance, position: int = 0, **more: Any) -> OutboxEffect:
    """An effect of the newest revision of `instance`."""
    effect = OutboxEffect(
        effect_key=effect_key(instance.saga_id, instance.key, instance.run, instance.revision, position),
        lane=f"{instance.key}/charge",
        target_kind="job",
        target_id="charge",
        payload=b'{"amount":42}',
        saga_id=instance.saga_id,
        key=instance.key,
        run=instance.run,
        revision=instance.revision,
        position=position,
        message_id="m-1",
        created_at=NOW,
    )
    return replace(effect, **more)


def timer_of(key: str, timer_id: str, seconds: float, **more: Any) -> Timer:
    return Timer(id=timer_id, due_at=at(seconds), envelope=envelope_of(key, f"m-{timer_id}", origin="timer"), **more)


def dead_letter_of(letter_id: str, key: str = "o-1", **more: Any) -> DeadLetter:
    letter = DeadLetter(
        letter_id, NOW, "orders", key, "OrderPlaced", "SAGA_HANDLER_FAILED", "boom", 5, envelope=envelope_of(key, "m-1")
    )
    return replace(letter, **more)


def start_of(head: Head, **more: Any) -> Instance:
    """The first revision of the newest run of `head`."""
    instance = Instance(
        saga_id=head.saga_id,
        key=head.key,
        pk=head.pk,
        run=head.run,
        status="running",
        revision=1,
        state=b'{"paid":false}',
        def_version=1,
        tier="t1",
        created_at=head.created_at,
        updated_at=head.created_at,
        entries=1,
    )
    return replace(instance, **more)


def step_of(before: Instance | None, after: Instance, **more: Any) -> UnitOfWork:
    """A unit that leads from `before` to `after`, with its history entry."""
    entry = HistoryEntry(
        entry_no=after.entries,
        revision=after.revision,
        disposition="applied",
        type="OrderPlaced",
        message_id=f"m-{after.pk}-{after.run}-{after.entries}",
        at=after.updated_at,
        status_before="pending" if before is None else before.status,
        status_after=after.status,
        steps=(StepRecord("handle", "OrderPlaced", after.status),),
    )
    unit = UnitOfWork(
        part=part_of(after.key, after.saga_id),
        instance=after,
        status_before=None if before is None else before.status,
        revision_before=None if before is None else before.revision,
        entries_before=0 if before is None else before.entries,
        entry=entry,
        mark_pk=after.pk,
    )
    return replace(unit, **more)


def next_of(instance: Instance, **more: Any) -> Instance:
    """`instance` one revision and one entry later."""
    return replace(instance, revision=instance.revision + 1, entries=instance.entries + 1, **more)


def child_of(pk: int, revision: int, position: int, **more: Any) -> Child:
    """A live child of run 1 of number `pk`."""
    facts = {"parent_run": 1, "key": f"child-{revision}-{position}"} | more
    effect_key = f"effect-{pk}-{facts['parent_run']}-{revision}-{position}"
    child = Child(pk, 1, revision, position, "shipments", "", effect_key, NOW)
    return replace(child, **facts)


def pending_of(timer: Timer) -> PendingTimer:
    return PendingTimer(timer.id, timer.due_at, timer.name)


def kinds(result: CommitResult) -> dict[int, str]:
    return {index: conflict.kind for index, conflict in result.conflicts.items()}


def claims(use: SlotUse, owner: str, *, limit: int = 3, key: str = "k", saga_id: str = "orders") -> UnitOfWork:
    """What message `m-1` of this correlation key does to slots."""
    return UnitOfWork(part=part_of(owner, saga_id), slot=SlotClaim(use, saga_id, key, limit, owner, "m-1", NOW))


async def write(store: SagaStore, lease: Lease, *units: UnitOfWork) -> CommitResult:
    """Commits `units`, none of which may conflict."""
    result = await store.commit(units, lease=lease)
    assert result.conflicts == {}
    return result


async def started(store: SagaStore, lease: Lease, key: str, **more: Any) -> Instance:
    """A run that is in `store`, freshly started."""
    head_facts = {name: more.pop(name) for name in ("saga_id", "created_at") if name in more}
    head = head_of(key, await store.reserve_pks(1), **head_facts)
    instance = start_of(head, **more)
    await write(store, lease, step_of(None, instance, head=head))
    return instance


async def accepted(store: SagaStore, lease: Lease, *envelopes: Envelope) -> list[RowRef]:
    """Inbox rows that are in `store`."""
    result = await write(store, lease, UnitOfWork(part=0, inbox_add=envelopes))
    return [RowRef(part_of(each.key, each.saga_id), result.inbox_base + n) for n, each in enumerate(envelopes)]


async def sent(store: SagaStore, lease: Lease, instance: Instance, count: int = 1) -> list[RowRef]:
    """Outbox rows that are in `store`."""
    part = part_of(instance.key, instance.saga_id)
    effects = tuple(effect_of(instance, position) for position in range(count))
    result = await write(store, lease, UnitOfWork(part=part, outbox_add=effects))
    return [RowRef(part, result.outbox_base + n) for n in range(count)]


async def current(store: SagaStore, instance: Instance) -> Instance | None:
    return await store.load_run(instance.saga_id, instance.key, instance.run)


class SagaStoreContract:
    """The tests; a subclass has a fixture `open_store`."""

    pytestmark = pytest.mark.anyio

    @pytest.fixture
    async def store(self, open_store: OpenSagaStore) -> AsyncIterator[SagaStore]:
        store = await open_store()
        yield store
        await store.close()

    @pytest.fixture
    async def lease(self, store: SagaStore) -> Lease:
        return await store.acquire("worker-1", now=NOW)

    # -- the store itself -----------------------------------------------------------------------------------------

    async def test_it_is_a_saga_store(self, store: SagaStore, lease: Lease) -> None:
        assert isinstance(store, SagaStore)
        assert store.id.endswith("-saga-store")
        assert len(store.store_id) >= 16
        assert "t1" in store.tiers

    async def test_a_tier_that_it_cannot_promise_has_a_reason(self, store: SagaStore, lease: Lease) -> None:
        reasons = {tier: store.why_not(tier) for tier in SAGA_DURABILITY_TIERS}

        assert {tier for tier, reason in reasons.items() if reason is None} == store.tiers
        assert all(reason is None or ": " in reason for reason in reasons.values())

    async def test_a_store_that_works_has_no_problem(self, store: SagaStore, lease: Lease) -> None:
        await store.probe()

        assert store.problem is None

    async def test_a_probe_leaves_nothing_to_see(self, store: SagaStore, lease: Lease) -> None:
        await store.probe()

        assert await store.feed_bounds() == (1, 0)
        assert await store.instances(_ALL, limit=10) == ([], None)

    async def test_a_closed_store_says_so(self, store: SagaStore, lease: Lease) -> None:
        await store.close()

        with pytest.raises(BackendUnavailable):
            await store.commit([UnitOfWork(part=0, inbox_add=(envelope_of("o-1", "m-1"),))], lease=lease)

    async def test_closing_twice_is_no_error(self, store: SagaStore) -> None:
        await store.close()
        await store.close()

    async def test_surrogate_numbers_are_never_given_twice(self, store: SagaStore) -> None:
        first = await store.reserve_pks(3)
        second = await store.reserve_pks(1)

        assert first >= 1
        assert second >= first + 3

    # -- the lease (I7) -------------------------------------------------------------------------------------------

    async def test_every_lease_has_a_higher_epoch_than_those_before(self, store: SagaStore) -> None:
        first = await store.acquire("worker-1", now=NOW)
        await store.release(first)
        second = await store.acquire("worker-2", now=at(1))
        third = await store.acquire("worker-2", now=at(2))

        assert first.epoch < second.epoch < third.epoch
        assert (first.holder, second.holder) == ("worker-1", "worker-2")

    async def test_a_commit_under_a_stale_lease_writes_nothing(self, store: SagaStore) -> None:
        stale = await store.acquire("worker-1", now=NOW)
        await store.acquire("worker-2", now=at(1))

        with pytest.raises(Fenced, match="worker-1"):
            await store.commit([UnitOfWork(part=0, inbox_add=(envelope_of("o-1", "m-1"),))], lease=stale)

        assert await store.inbox_page(after=None, limit=10) == []

    async def test_a_stale_lease_is_refused_even_where_there_is_nothing_to_write(self, store: SagaStore) -> None:
        stale = await store.acquire("worker-1", now=NOW)
        await store.acquire("worker-2", now=at(1))

        with pytest.raises(Fenced):
            await store.commit([], lease=stale)
        with pytest.raises(Fenced):
            await store.commit([UnitOfWork(part=0, inbox_done=RowRef(0, 99))], lease=stale)

    async def test_a_released_lease_writes_no_more(self, store: SagaStore, lease: Lease) -> None:
        await store.release(lease)

        with pytest.raises(Fenced):
            await store.commit([UnitOfWork(part=0, inbox_add=(envelope_of("o-1", "m-1"),))], lease=lease)

    async def test_releasing_a_stale_lease_leaves_the_holder_alone(self, store: SagaStore, lease: Lease) -> None:
        newer = await store.acquire("worker-2", now=at(1))
        await store.release(lease)

        await write(store, newer, UnitOfWork(part=0, inbox_add=(envelope_of("o-1", "m-1"),)))

    async def test_a_lease_that_nobody_was_given_is_refused(self, store: SagaStore, lease: Lease) -> None:
        for forged in (Lease(lease.holder, lease.epoch + 1), Lease("somebody", lease.epoch)):
            with pytest.raises(Fenced):
                await store.commit([UnitOfWork(part=0, inbox_add=(envelope_of("o-1", "m-1"),))], lease=forged)

        await write(store, lease, UnitOfWork(part=0, inbox_add=(envelope_of("o-1", "m-1"),)))

    async def test_the_next_holder_sees_what_the_one_before_wrote(self, store: SagaStore, lease: Lease) -> None:
        instance = await started(store, lease, "o-1")
        newer = await store.acquire("worker-2", now=at(1))

        await write(store, newer, step_of(instance, next_of(instance)))

        assert await current(store, instance) == next_of(instance)

    # -- the house law: all of a unit, or nothing -----------------------------------------------------------------

    async def test_all_that_a_unit_writes_is_there_when_the_commit_returns(
        self, store: SagaStore, lease: Lease
    ) -> None:
        head = head_of("o-1", await store.reserve_pks(1))
        instance = start_of(head)
        unit = step_of(
            None,
            instance,
            head=head,
            mark=mark_of("m-1", run=1),
            inbox_add=(envelope_of("o-2", "m-2"),),
            outbox_add=(effect_of(instance),),
            timers_add=(timer_of("o-1", "t-1", 60, name="remind"),),
            dead_letters_add=(dead_letter_of("d-1"),),
            feed=feed_of(instance, "a"),
        )

        result = await write(store, lease, unit)

        assert await store.load([("orders", "o-1")]) == [(head, instance)]
        assert await store.history(instance) == [unit.entry]
        assert await store.marks([(head.pk, "m-1")]) == [unit.mark]
        assert await store.inbox_page(after=None, limit=10) == [
            InboxRow(RowRef(part_of("o-2"), result.inbox_base), unit.inbox_add[0])
        ]
        assert await store.outbox_page(after=None, limit=10) == [
            OutboxRow(RowRef(unit.part, result.outbox_base), unit.outbox_add[0])
        ]
        assert await store.timers() == list(unit.timers_add)
        assert await store.dead_letters() == list(unit.dead_letters_add)
        assert await store.feed(after=0, limit=10) == [(result.feed_base, unit.events[0])]

    async def test_a_unit_that_conflicts_leaves_nothing_behind(self, store: SagaStore, lease: Lease) -> None:
        instance = await started(store, lease, "o-1")
        await write(store, lease, UnitOfWork(part=part_of("o-1"), mark_pk=instance.pk, mark=mark_of("m-1")))
        after = next_of(instance, status="completed")
        unit = step_of(
            instance,
            after,
            head=head_of("o-9", 999),
            mark=mark_of("m-1"),
            inbox_add=(envelope_of("o-2", "m-2"),),
            outbox_add=(effect_of(after),),
            timers_add=(timer_of("o-1", "t-1", 60),),
            dead_letters_add=(dead_letter_of("d-1"),),
            feed=feed_of(after, "a"),
        )

        result = await store.commit([unit], lease=lease)

        assert kinds(result) == {0: "mark"}
        assert (result.inbox_base, result.outbox_base, result.feed_base) == (0, 0, 0)
        assert await current(store, instance) == instance
        assert await store.history(instance, after_entry=1) == []
        assert await store.load([("orders", "o-9")]) == [(None, None)]
        assert await store.inbox_page(after=None, limit=10) == []
        assert await store.outbox_page(after=None, limit=10) == []
        assert await store.timers() == []
        assert await store.dead_letters() == []
        assert await store.feed(after=0, limit=10) == []
        assert await store.instances(InstanceFilter(statuses=("completed",)), limit=10) == ([], None)

    async def test_a_conflict_does_not_take_its_neighbours_down(self, store: SagaStore, lease: Lease) -> None:
        one, two, three = [await started(store, lease, key) for key in ("o-1", "o-2", "o-3")]
        stale = step_of(next_of(two), next_of(next_of(two)))

        result = await store.commit([step_of(one, next_of(one)), stale, step_of(three, next_of(three))], lease=lease)

        assert kinds(result) == {1: "revision"}
        assert await current(store, one) == next_of(one)
        assert await current(store, two) == two
        assert await current(store, three) == next_of(three)

    async def test_every_unit_of_a_batch_can_conflict(self, store: SagaStore, lease: Lease) -> None:
        units = [UnitOfWork(part=0, inbox_done=RowRef(0, 70 + n)) for n in range(3)]

        assert kinds(await store.commit(units, lease=lease)) == {0: "gone", 1: "gone", 2: "gone"}

    async def test_an_empty_commit_does_nothing(self, store: SagaStore, lease: Lease) -> None:
        assert await store.commit([], lease=lease) == CommitResult({}, 0, 0, 0)

    # -- revisions (I2) -------------------------------------------------------------------------------------------

    async def test_a_run_moves_one_revision_at_a_time(self, store: SagaStore, lease: Lease) -> None:
        instance = await started(store, lease, "o-1")

        for _ in range(3):
            await write(store, lease, step_of(instance, next_of(instance, state=b'{"paid":true}')))
            instance = next_of(instance, state=b'{"paid":true}')

        assert await current(store, instance) == instance
        assert [entry.entry_no for entry in await store.history(instance)] == [1, 2, 3, 4]

    async def test_of_two_writers_of_one_revision_one_wins(self, store: SagaStore, lease: Lease) -> None:
        instance = await started(store, lease, "o-1")
        winner, loser = next_of(instance, state=b'"winner"'), next_of(instance, state=b'"loser"')

        results = [await store.commit([step_of(instance, after)], lease=lease) for after in (winner, loser)]

        assert [kinds(result) for result in results] == [{}, {0: "revision"}]
        assert await current(store, instance) == winner

    async def test_a_writer_that_missed_a_history_row_conflicts(self, store: SagaStore, lease: Lease) -> None:
        instance = await started(store, lease, "o-1")
        ignored = replace(instance, entries=2, bystanders=1)
        await write(store, lease, step_of(instance, ignored))

        result = await store.commit([step_of(instance, next_of(instance))], lease=lease)

        assert kinds(result) == {0: "revision"}

    async def test_history_grows_without_a_revision(self, store: SagaStore, lease: Lease) -> None:
        instance = await started(store, lease, "o-1", status="completed")
        ignored = replace(instance, entries=2, bystanders=1)

        await write(store, lease, step_of(instance, ignored))

        assert await current(store, instance) == ignored
        assert len(await store.history(instance)) == 2

    async def test_a_run_that_exists_cannot_be_opened_again(self, store: SagaStore, lease: Lease) -> None:
        instance = await started(store, lease, "o-1")

        result = await store.commit([step_of(None, start_of(head_of("o-1", instance.pk)))], lease=lease)

        assert kinds(result) == {0: "revision"}

    async def test_a_run_that_does_not_exist_cannot_move(self, store: SagaStore, lease: Lease) -> None:
        instance = start_of(head_of("o-1", await store.reserve_pks(1)))

        assert kinds(await store.commit([step_of(instance, next_of(instance))], lease=lease)) == {0: "revision"}

    async def test_units_of_one_run_follow_each_other_in_a_batch(self, store: SagaStore, lease: Lease) -> None:
        head = head_of("o-1", await store.reserve_pks(1))
        first = start_of(head)
        second = next_of(first, state=b"2")
        third = next_of(second, state=b"3", status="completed")

        await write(store, lease, step_of(None, first, head=head), step_of(first, second), step_of(second, third))

        assert await current(store, first) == third
        assert [entry.revision for entry in await store.history(first)] == [1, 2, 3]
        assert (await store.instances(_ALL, limit=10))[0] == [third]

    async def test_what_follows_a_conflict_in_a_batch_conflicts_when_it_is_of_the_same_instance(
        self, store: SagaStore, lease: Lease
    ) -> None:
        instance = await started(store, lease, "o-1")
        other = await started(store, lease, "o-2")
        await write(store, lease, UnitOfWork(part=part_of("o-1"), mark_pk=instance.pk, mark=mark_of("m-1")))
        batch = [
            step_of(instance, next_of(instance), mark=mark_of("m-0")),
            step_of(next_of(instance), next_of(next_of(instance)), mark=mark_of("m-1")),
            step_of(next_of(next_of(instance)), next_of(next_of(next_of(instance))), mark=mark_of("m-2")),
            UnitOfWork(part=part_of("o-1"), mark_pk=instance.pk, mark=mark_of("m-3")),
            step_of(other, next_of(other), mark=mark_of("m-1")),
        ]

        result = await store.commit(batch, lease=lease)

        assert kinds(result) == {1: "mark", 2: "revision", 3: "revision"}
        assert await current(store, instance) == next_of(instance)
        assert await store.marks([(instance.pk, f"m-{n}") for n in range(4)]) == [
            mark_of("m-0"),
            mark_of("m-1"),
            None,
            None,
        ]

    async def test_the_runs_of_a_key_are_kept_apart(self, store: SagaStore, lease: Lease) -> None:
        first = await started(store, lease, "o-1", status="completed")
        head, again = head_of("o-1", first.pk), head_of("o-1", first.pk, run=2)
        second = start_of(again)

        await write(store, lease, step_of(None, second, head=again, head_before=head))

        assert await store.load([("orders", "o-1")]) == [(again, second)]
        assert await store.load_run("orders", "o-1", 1) == first
        assert await store.runs("orders", "o-1") == [second, first]
        assert len(await store.history(first)) == len(await store.history(second)) == 1

    # -- what no store can write ----------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("revision", "entries"),
        [(3, 2), (0, 2), (2, 0)],
        ids=["skips a revision", "goes back", "loses history"],
    )
    async def test_an_illegal_step_is_refused(
        self, store: SagaStore, lease: Lease, revision: int, entries: int
    ) -> None:
        instance = await started(store, lease, "o-1")
        after = replace(instance, revision=revision, entries=entries)

        result = await store.commit([step_of(instance, after, entry=None)], lease=lease)

        assert kinds(result) == {0: "refused"}
        assert await current(store, instance) == instance

    async def test_a_counter_may_grow_without_a_history_row(self, store: SagaStore, lease: Lease) -> None:
        instance = await started(store, lease, "o-1")
        after = replace(instance, bystanders=101)

        result = await store.commit([step_of(instance, after, entry=None)], lease=lease)

        assert kinds(result) == {}
        assert await current(store, instance) == after

    async def test_a_history_row_is_never_written_over(self, store: SagaStore, lease: Lease) -> None:
        instance = await started(store, lease, "o-1")
        unit = step_of(instance, next_of(instance))
        assert unit.entry is not None
        first_again = replace(unit, entry=replace(unit.entry, entry_no=1))

        assert kinds(await store.commit([first_again], lease=lease)) == {0: "refused"}

    async def test_a_history_row_without_its_run_is_refused(self, store: SagaStore, lease: Lease) -> None:
        instance = await started(store, lease, "o-1")
        unit = step_of(instance, next_of(instance), instance=None)

        assert kinds(await store.commit([unit], lease=lease)) == {0: "refused"}

    async def test_what_cannot_be_encoded_is_the_fault_of_its_own_unit(self, store: SagaStore, lease: Lease) -> None:
        one, two = await started(store, lease, "o-1"), await started(store, lease, "o-2")
        no_text = "\ud800"
        batch = [
            step_of(one, next_of(one, reason=no_text)),
            step_of(two, next_of(two)),
            UnitOfWork(part=0, inbox_add=(envelope_of("o-3", no_text),)),
            UnitOfWork(part=0, mark_pk=77, mark=mark_of(no_text)),
        ]

        result = await store.commit(batch, lease=lease)

        assert kinds(result) == {0: "refused", 2: "refused", 3: "refused"}
        assert await current(store, two) == next_of(two)

    async def test_what_can_never_be_written_is_refused_whatever_else_is_in_its_way(
        self, store: SagaStore, lease: Lease
    ) -> None:
        instance = await started(store, lease, "o-1")
        unit = step_of(next_of(instance), next_of(next_of(instance), reason="\ud800"), inbox_done=RowRef(0, 99))

        assert kinds(await store.commit([unit], lease=lease)) == {0: "refused"}

    # -- heads ----------------------------------------------------------------------------------------------------

    async def test_a_key_that_was_never_seen_has_neither_head_nor_run(self, store: SagaStore) -> None:
        assert await store.load([("orders", "o-1"), ("orders", "")]) == [(None, None), (None, None)]

    async def test_loading_keeps_the_order_of_the_keys(self, store: SagaStore, lease: Lease) -> None:
        one, two = await started(store, lease, "o-1"), await started(store, lease, "o-2")

        loaded = await store.load([("orders", "o-2"), ("orders", "o-9"), ("orders", "o-1"), ("orders", "o-2")])

        assert [found.instance for found in loaded] == [two, None, one, two]

    async def test_a_head_is_written_over_the_one_that_was_read_only(self, store: SagaStore, lease: Lease) -> None:
        waiting = head_of("o-1", await store.reserve_pks(1), run=0, awaits_start=True)
        await write(store, lease, UnitOfWork(part=waiting.part, head=waiting))
        opened = replace(waiting, run=1, awaits_start=False)

        unread = await store.commit([UnitOfWork(part=waiting.part, head=opened)], lease=lease)
        read = await store.commit([UnitOfWork(part=waiting.part, head=opened, head_before=waiting)], lease=lease)
        twice = await store.commit([UnitOfWork(part=waiting.part, head=opened, head_before=waiting)], lease=lease)

        assert [kinds(result) for result in (unread, read, twice)] == [{0: "revision"}, {}, {0: "revision"}]
        assert (await store.load([("orders", "o-1")]))[0].head == opened

    async def test_a_head_that_is_gone_cannot_be_replaced(self, store: SagaStore, lease: Lease) -> None:
        head = head_of("o-1", await store.reserve_pks(1))

        result = await store.commit([UnitOfWork(part=head.part, head=head, head_before=head)], lease=lease)

        assert kinds(result) == {0: "revision"}

    async def test_heads_of_a_batch_follow_each_other(self, store: SagaStore, lease: Lease) -> None:
        waiting = head_of("o-1", await store.reserve_pks(1), run=0, awaits_start=True)
        opened = replace(waiting, run=1, awaits_start=False)
        other = head_of("o-1", await store.reserve_pks(1))

        result = await store.commit(
            [
                UnitOfWork(part=waiting.part, head=waiting),
                UnitOfWork(part=waiting.part, head=other),
                UnitOfWork(part=waiting.part, head=opened, head_before=waiting),
            ],
            lease=lease,
        )

        assert kinds(result) == {1: "revision"}
        assert (await store.load([("orders", "o-1")]))[0].head == opened
        assert await store.instances(_ALL, limit=10) == ([], None)

    async def test_the_same_key_of_two_sagas_is_two_instances(self, store: SagaStore, lease: Lease) -> None:
        order = await started(store, lease, "k")
        refund = await started(store, lease, "k", saga_id="refunds")

        loaded = await store.load([("orders", "k"), ("refunds", "k")])

        assert [found.instance for found in loaded] == [order, refund]
        assert order.pk != refund.pk

    async def test_keys_are_compared_byte_by_byte(self, store: SagaStore, lease: Lease) -> None:
        keys = ["a", "A", "a ", "\u00e4", "a\u0308", "a/b", "a:b", "\U0001f9f5", "x" * 1024]

        for key in keys:
            await started(store, lease, key)

        loaded = await store.load([("orders", key) for key in keys])
        assert [found.instance and found.instance.key for found in loaded] == keys

    # -- marks (I4) -----------------------------------------------------------------------------------------------

    async def test_a_message_leaves_its_mark_once(self, store: SagaStore, lease: Lease) -> None:
        unit = UnitOfWork(part=0, mark_pk=7, mark=mark_of("m-1"), inbox_add=(envelope_of("o-1", "m-1"),))

        await write(store, lease, unit)
        again = await store.commit([unit], lease=lease)

        assert kinds(again) == {0: "mark"}
        assert len(await store.inbox_page(after=None, limit=10)) == 1

    async def test_of_two_units_with_one_mark_in_a_batch_the_first_is_written(
        self, store: SagaStore, lease: Lease
    ) -> None:
        first = UnitOfWork(part=0, mark_pk=7, mark=mark_of("m-1", run=1))
        second = UnitOfWork(part=0, mark_pk=7, mark=mark_of("m-1", run=2))

        assert kinds(await store.commit([first, second], lease=lease)) == {1: "mark"}
        assert await store.marks([(7, "m-1")]) == [first.mark]

    async def test_a_message_that_was_seen_is_a_duplicate_even_when_its_row_is_gone(
        self, store: SagaStore, lease: Lease
    ) -> None:
        await write(store, lease, UnitOfWork(part=0, mark_pk=7, mark=mark_of("m-1")))
        again = UnitOfWork(part=0, mark_pk=7, mark=mark_of("m-1"), timer_done=pending_of(timer_of("o-1", "t-1", 1)))

        assert kinds(await store.commit([again], lease=lease)) == {0: "mark"}

    async def test_marks_of_other_instances_do_not_count(self, store: SagaStore, lease: Lease) -> None:
        await write(store, lease, UnitOfWork(part=0, mark_pk=7, mark=mark_of("m-1")))
        await write(store, lease, UnitOfWork(part=0, mark_pk=8, mark=mark_of("m-1")))

        assert await store.marks([(7, "m-1"), (9, "m-1"), (8, "m-1")]) == [mark_of("m-1"), None, mark_of("m-1")]

    async def test_a_forgotten_mark_may_be_left_again(self, store: SagaStore, lease: Lease) -> None:
        await write(store, lease, UnitOfWork(part=0, mark_pk=7, mark=mark_of("m-1")))

        await write(store, lease, UnitOfWork(part=0, unmark=(7, "m-1")))

        assert await store.marks([(7, "m-1")]) == [None]
        await write(store, lease, UnitOfWork(part=0, mark_pk=7, mark=mark_of("m-1")))

    async def test_a_unit_forgets_before_it_marks(self, store: SagaStore, lease: Lease) -> None:
        await write(store, lease, UnitOfWork(part=0, mark_pk=7, mark=mark_of("m-1", run=1)))

        await write(store, lease, UnitOfWork(part=0, unmark=(7, "m-1"), mark_pk=7, mark=mark_of("m-1", run=2)))

        assert await store.marks([(7, "m-1")]) == [mark_of("m-1", run=2)]

    async def test_a_mark_forgotten_in_a_batch_may_be_left_again_in_it(self, store: SagaStore, lease: Lease) -> None:
        await write(store, lease, UnitOfWork(part=0, mark_pk=7, mark=mark_of("m-1", run=1)))

        await write(
            store,
            lease,
            UnitOfWork(part=0, unmark=(7, "m-1")),
            UnitOfWork(part=0, mark_pk=7, mark=mark_of("m-1", run=2)),
        )

        assert await store.marks([(7, "m-1")]) == [mark_of("m-1", run=2)]

    async def test_a_mark_forgotten_later_in_a_batch_was_still_seen_before(
        self, store: SagaStore, lease: Lease
    ) -> None:
        await write(store, lease, UnitOfWork(part=0, mark_pk=7, mark=mark_of("m-1", run=1)))
        forgets = UnitOfWork(part=0, unmark=(7, "m-1"))
        duplicate = UnitOfWork(part=0, mark_pk=7, mark=mark_of("m-1", run=2), inbox_add=(envelope_of("o-1", "m-1"),))

        result = await store.commit([duplicate, forgets], lease=lease)

        assert kinds(result) == {0: "mark"}
        assert await store.marks([(7, "m-1")]) == [None]
        assert await store.inbox_page(after=None, limit=10) == []

    async def test_forgetting_an_absent_mark_is_no_error(self, store: SagaStore, lease: Lease) -> None:
        await write(store, lease, UnitOfWork(part=0, unmark=(7, "m-1")))

    # -- the inbox (I9) -------------------------------------------------------------------------------------------

    async def test_inbox_numbers_grow_in_the_order_of_acceptance(self, store: SagaStore, lease: Lease) -> None:
        first = await accepted(store, lease, *(envelope_of("o-1", f"a-{n}") for n in range(3)))
        second = await accepted(store, lease, *(envelope_of("o-1", f"b-{n}") for n in range(3)))

        rows = await store.inbox_page(after=None, limit=10)

        assert [row.ref for row in rows] == first + second
        assert [row.envelope.id for row in rows] == ["a-0", "a-1", "a-2", "b-0", "b-1", "b-2"]

    async def test_the_numbers_of_a_batch_are_consecutive_over_its_written_units(
        self, store: SagaStore, lease: Lease
    ) -> None:
        instance = await started(store, lease, "o-1")
        batch = [
            UnitOfWork(part=1, inbox_add=(envelope_of("o-1", "m-1"), envelope_of("o-2", "m-2"))),
            UnitOfWork(part=1, inbox_add=(envelope_of("o-3", "m-3"),), inbox_done=RowRef(0, 99)),
            UnitOfWork(part=1, outbox_add=(effect_of(instance, 0),), feed=feed_of(instance, "a")),
            UnitOfWork(
                part=2,
                inbox_add=(envelope_of("o-4", "m-4"),),
                outbox_add=(effect_of(instance, 1), effect_of(instance, 2)),
                feed=feed_of(instance, "b", "c"),
            ),
        ]

        result = await store.commit(batch, lease=lease)

        assert kinds(result) == {1: "gone"}
        assert {row.envelope.id: row.ref.seq for row in await store.inbox_page(after=None, limit=10)} == {
            "m-1": result.inbox_base,
            "m-2": result.inbox_base + 1,
            "m-4": result.inbox_base + 2,
        }
        assert [(row.ref, row.effect.position) for row in await store.outbox_page(after=None, limit=10)] == [
            (RowRef(1, result.outbox_base), 0),
            (RowRef(2, result.outbox_base + 1), 1),
            (RowRef(2, result.outbox_base + 2), 2),
        ]
        assert [(number, event.detail) for number, event in await store.feed(after=0, limit=10)] == [
            (result.feed_base, "a"),
            (result.feed_base + 1, "b"),
            (result.feed_base + 2, "c"),
        ]

    async def test_an_inbox_row_lies_in_the_partition_of_its_own_key(self, store: SagaStore, lease: Lease) -> None:
        keys = [f"o-{n}" for n in range(20)]

        await accepted(store, lease, *(envelope_of(key, f"m-{key}") for key in keys))

        rows = await store.inbox_page(after=None, limit=50)
        assert [row.ref for row in rows] == sorted(row.ref for row in rows)
        assert {row.envelope.key: row.ref.part for row in rows} == {key: part_of(key) for key in keys}

    async def test_the_inbox_is_read_page_by_page(self, store: SagaStore, lease: Lease) -> None:
        refs = await accepted(store, lease, *(envelope_of(f"o-{n}", f"m-{n}") for n in range(7)))
        seen: list[RowRef] = []

        while page := await store.inbox_page(after=seen[-1] if seen else None, limit=3):
            seen += [row.ref for row in page]

        assert seen == sorted(refs)

    async def test_inbox_rows_are_found_by_their_numbers(self, store: SagaStore, lease: Lease) -> None:
        one, two = await accepted(store, lease, envelope_of("o-1", "m-1"), envelope_of("o-2", "m-2"))

        found = await store.inbox_rows([two, RowRef(63, 99), one])

        assert [envelope and envelope.id for envelope in found] == ["m-2", None, "m-1"]

    async def test_a_handled_inbox_row_is_gone(self, store: SagaStore, lease: Lease) -> None:
        one, two = await accepted(store, lease, envelope_of("o-1", "m-1"), envelope_of("o-1", "m-2"))

        await write(store, lease, UnitOfWork(part=one.part, inbox_done=one))

        assert [row.ref for row in await store.inbox_page(after=None, limit=10)] == [two]
        assert await store.inbox_rows([one]) == [None]

    async def test_an_inbox_row_is_handled_once(self, store: SagaStore, lease: Lease) -> None:
        (ref,) = await accepted(store, lease, envelope_of("o-1", "m-1"))
        done = UnitOfWork(part=ref.part, inbox_done=ref)

        in_a_batch = await store.commit([done, done], lease=lease)
        later = await store.commit([done], lease=lease)

        assert kinds(in_a_batch) == {1: "gone"}
        assert kinds(later) == {0: "gone"}

    async def test_a_row_seen_in_a_page_after_it_was_handled_is_still_gone(
        self, store: SagaStore, lease: Lease
    ) -> None:
        (ref,) = await accepted(store, lease, envelope_of("o-1", "m-1"))
        await store.inbox_page(after=None, limit=10)
        await write(store, lease, UnitOfWork(part=ref.part, inbox_done=ref))
        await store.inbox_page(after=None, limit=10)

        assert kinds(await store.commit([UnitOfWork(part=ref.part, inbox_done=ref)], lease=lease)) == {0: "gone"}

    async def test_a_failed_attempt_keeps_the_row_under_its_number(self, store: SagaStore, lease: Lease) -> None:
        (ref,) = await accepted(store, lease, envelope_of("o-1", "m-1"))
        tried = envelope_of("o-1", "m-1", attempt=1, due_at=at(1), last_error="boom")

        await write(store, lease, UnitOfWork(part=ref.part, inbox_update=InboxRow(ref, tried)))

        assert await store.inbox_page(after=None, limit=10) == [InboxRow(ref, tried)]

    async def test_an_inbox_row_that_is_gone_cannot_be_updated(self, store: SagaStore, lease: Lease) -> None:
        row = InboxRow(RowRef(3, 99), envelope_of("o-1", "m-1"))

        assert kinds(await store.commit([UnitOfWork(part=3, inbox_update=row)], lease=lease)) == {0: "gone"}
        assert await store.inbox_page(after=None, limit=10) == []

    # -- the outbox (I3) ------------------------------------------------------------------------------------------

    async def test_the_outbox_is_read_page_by_page_in_the_order_of_its_numbers(
        self, store: SagaStore, lease: Lease
    ) -> None:
        instance = await started(store, lease, "o-1")
        refs = await sent(store, lease, instance, 5)

        first = await store.outbox_page(after=None, limit=3)
        rest = await store.outbox_page(after=first[-1].ref, limit=3)

        assert [row.ref for row in first + rest] == refs
        assert [row.effect.position for row in first + rest] == [0, 1, 2, 3, 4]

    async def test_outbox_rows_are_found_by_their_numbers(self, store: SagaStore, lease: Lease) -> None:
        instance = await started(store, lease, "o-1")
        (ref,) = await sent(store, lease, instance)

        assert await store.outbox_rows([RowRef(ref.part, ref.seq + 1), ref]) == [None, effect_of(instance)]

    async def test_an_effect_is_settled_once(self, store: SagaStore, lease: Lease) -> None:
        (ref,) = await sent(store, lease, await started(store, lease, "o-1"))
        done = UnitOfWork(part=ref.part, outbox_done=(ref,))

        result = await store.commit([done, done], lease=lease)

        assert kinds(result) == {1: "gone"}
        assert kinds(await store.commit([done], lease=lease)) == {0: "gone"}
        assert await store.outbox_page(after=None, limit=10) == []

    async def test_effects_of_several_partitions_are_settled_by_one_unit(self, store: SagaStore, lease: Lease) -> None:
        refs = [ref for key in ("o-1", "o-2") for ref in await sent(store, lease, await started(store, lease, key), 2)]

        await write(store, lease, UnitOfWork(part=refs[0].part, outbox_done=(refs[0], *refs[2:])))

        assert len({ref.part for ref in refs}) == 2
        assert [row.ref for row in await store.outbox_page(after=None, limit=10)] == [refs[1]]

    async def test_effects_are_settled_together_or_not_at_all(self, store: SagaStore, lease: Lease) -> None:
        one, two = await sent(store, lease, await started(store, lease, "o-1"), 2)
        await write(store, lease, UnitOfWork(part=two.part, outbox_done=(two,)))

        result = await store.commit([UnitOfWork(part=one.part, outbox_done=(one, two))], lease=lease)

        assert kinds(result) == {0: "gone"}
        assert [row.ref for row in await store.outbox_page(after=None, limit=10)] == [one]

    async def test_an_effect_is_not_settled_under_another_partition(self, store: SagaStore, lease: Lease) -> None:
        (ref,) = await sent(store, lease, await started(store, lease, "o-1"))
        elsewhere = RowRef((ref.part + 1) % 64, ref.seq)

        result = await store.commit([UnitOfWork(part=elsewhere.part, outbox_done=(elsewhere,))], lease=lease)

        assert kinds(result) == {0: "gone"}
        assert len(await store.outbox_page(after=None, limit=10)) == 1

    async def test_an_effect_that_failed_stays_under_its_number(self, store: SagaStore, lease: Lease) -> None:
        instance = await started(store, lease, "o-1")
        (ref,) = await sent(store, lease, instance)
        tried = effect_of(instance, attempt=1, due_at=at(1), last_error="503")

        await write(store, lease, UnitOfWork(part=ref.part, outbox_update=OutboxRow(ref, tried)))

        assert await store.outbox_page(after=None, limit=10) == [OutboxRow(ref, tried)]
        assert kinds(
            await store.commit(
                [UnitOfWork(part=ref.part, outbox_update=OutboxRow(RowRef(ref.part, ref.seq + 9), tried))], lease=lease
            )
        ) == {0: "gone"}

    # -- timers ---------------------------------------------------------------------------------------------------

    async def test_timers_come_in_the_order_in_which_they_are_due(self, store: SagaStore, lease: Lease) -> None:
        timers = [timer_of("o-1", "b", 60), timer_of("o-1", "a", 60), timer_of("o-1", "z", 5), timer_of("o-1", "y", -5)]

        await write(store, lease, UnitOfWork(part=0, timers_add=tuple(timers)))

        assert [timer.id for timer in await store.timers()] == ["y", "z", "a", "b"]
        assert [timer.id for timer in await store.timers(due_by=at(5))] == ["y", "z"]
        assert [timer.id for timer in await store.timers(due_by=at(4.999999))] == ["y"]
        assert [timer.id for timer in await store.timers(limit=1)] == ["y"]
        assert [timer.id for timer in await store.timers(after=pending_of(timers[1]))] == ["b"]
        assert [timer.id for timer in await store.timers(after=pending_of(timers[3]), due_by=at(5))] == ["z"]

    async def test_a_timer_fires_once(self, store: SagaStore, lease: Lease) -> None:
        timer = timer_of("o-1", "t-1", 60)
        await write(store, lease, UnitOfWork(part=0, timers_add=(timer,)))
        fired = UnitOfWork(part=0, timer_done=pending_of(timer), inbox_add=(timer.envelope,))

        in_a_batch = await store.commit([fired, fired], lease=lease)
        later = await store.commit([fired], lease=lease)

        assert kinds(in_a_batch) == {1: "gone"}
        assert kinds(later) == {0: "gone"}
        assert await store.timers() == []
        assert len(await store.inbox_page(after=None, limit=10)) == 1

    async def test_a_timer_that_was_removed_does_not_fire(self, store: SagaStore, lease: Lease) -> None:
        timer = timer_of("o-1", "t-1", 60)
        await write(store, lease, UnitOfWork(part=0, timers_add=(timer,)))

        removed_and_fired = await store.commit(
            [
                UnitOfWork(part=0, timers_remove=(pending_of(timer),)),
                UnitOfWork(part=0, timer_done=pending_of(timer)),
            ],
            lease=lease,
        )

        assert kinds(removed_and_fired) == {1: "gone"}
        assert await store.timers() == []

    async def test_removing_a_timer_that_is_gone_is_no_error(self, store: SagaStore, lease: Lease) -> None:
        await write(store, lease, UnitOfWork(part=0, timers_remove=(pending_of(timer_of("o-1", "t-1", 60)),)))

    async def test_a_timer_of_a_batch_can_fire_in_it_once(self, store: SagaStore, lease: Lease) -> None:
        timer = timer_of("o-1", "t-1", 60)
        fired = UnitOfWork(part=0, timer_done=pending_of(timer))

        result = await store.commit([UnitOfWork(part=0, timers_add=(timer,)), fired, fired], lease=lease)

        assert kinds(result) == {2: "gone"}
        assert await store.timers() == []

    async def test_a_unit_may_replace_a_timer_by_itself(self, store: SagaStore, lease: Lease) -> None:
        timer = timer_of("o-1", "t-1", 60)
        renamed = timer_of("o-1", "t-1", 60, name="remind")
        await write(store, lease, UnitOfWork(part=0, timers_add=(timer,)))

        await write(store, lease, UnitOfWork(part=0, timers_remove=(pending_of(timer),), timers_add=(renamed,)))

        assert await store.timers() == [renamed]
        await write(store, lease, UnitOfWork(part=0, timer_done=pending_of(renamed)))

    async def test_a_timer_is_found_by_its_id_wherever_it_stands(self, store: SagaStore, lease: Lease) -> None:
        timers = [timer_of("o-1", f"t-{number}", number % 7) for number in range(600)]
        await write(store, lease, UnitOfWork(part=0, timers_add=tuple(timers)))
        moved = replace(timers[123], due_at=at(9))
        await write(store, lease, UnitOfWork(part=0, timers_remove=(pending_of(timers[123]),), timers_add=(moved,)))

        assert [await store.timer(each) for each in ("t-0", "t-599", "t-123", "t-")] == [
            timers[0],
            timers[599],
            moved,
            None,
        ]

    # -- schedules ------------------------------------------------------------------------------------------------

    async def test_how_far_a_schedule_has_come_is_kept_for_each_saga(self, store: SagaStore) -> None:
        orders = ScheduleCursor("orders", "0 3 * * *", "Europe/Berlin", NOW)
        refunds = ScheduleCursor("refunds", "* * * * *", "UTC", at(1), at(-1))

        assert await store.schedule_cursors() == []
        assert await store.put_schedule_cursor(refunds, replaces=None)
        assert await store.put_schedule_cursor(orders, replaces=None)
        assert await store.schedule_cursors() == [orders, refunds]

    async def test_of_two_who_move_a_schedule_on_from_one_place_one_does(self, store: SagaStore) -> None:
        first = ScheduleCursor("orders", "0 3 * * *", "UTC", NOW)
        second, other = replace(first, handled_until=at(1)), replace(first, handled_until=at(2))
        await store.put_schedule_cursor(first, replaces=None)

        moves = [
            await store.put_schedule_cursor(other, replaces=None),
            await store.put_schedule_cursor(second, replaces=first),
            await store.put_schedule_cursor(other, replaces=first),
        ]

        assert moves == [False, True, False]
        assert await store.schedule_cursors() == [second]
        assert not await store.put_schedule_cursor(replace(other, saga_id="refunds"), replaces=other)

    # -- slots ----------------------------------------------------------------------------------------------------

    async def test_no_more_slots_are_held_than_there_are(self, store: SagaStore, lease: Lease) -> None:
        result = await store.commit([claims("take", f"o-{n}", limit=2) for n in range(4)], lease=lease)

        assert {number: conflict.kind for number, conflict in result.conflicts.items()} == {2: "limit", 3: "limit"}
        assert await store.slots("orders") == [
            HeldSlot("orders", "k", number, f"o-{number}", "m-1", NOW) for number in range(2)
        ]

    async def test_a_slot_that_is_given_back_can_be_taken_again(self, store: SagaStore, lease: Lease) -> None:
        await write(store, lease, claims("take", "o-1"), claims("take", "o-2"))

        await write(store, lease, claims("free", "o-1"), claims("take", "o-3"))

        assert [held.correlation_key for held in await store.slots("orders")] == ["o-3", "o-2"]

    async def test_giving_back_what_is_not_held_changes_nothing(self, store: SagaStore, lease: Lease) -> None:
        await write(store, lease, claims("take", "o-1"))

        await write(store, lease, claims("free", "o-2"), claims("free", "o-1", key="other"))

        assert [held.correlation_key for held in await store.slots("orders")] == ["o-1"]

    async def test_who_passes_needs_a_free_slot_and_takes_none(self, store: SagaStore, lease: Lease) -> None:
        await write(store, lease, claims("pass", "o-1", limit=1), claims("take", "o-2", limit=1))

        result = await store.commit([claims("pass", "o-3", limit=1)], lease=lease)

        assert result.conflicts[0].kind == "limit"
        assert [held.correlation_key for held in await store.slots("orders")] == ["o-2"]

    async def test_each_saga_and_each_concurrency_key_has_slots_of_its_own(
        self, store: SagaStore, lease: Lease
    ) -> None:
        units = (
            claims("take", "o-1", limit=1),
            claims("take", "o-1", limit=1, key="other"),
            claims("take", "o-1", limit=1, saga_id="refunds"),
        )
        await write(store, lease, *units)

        assert [held.key for held in await store.slots("orders")] == ["k", "other"]
        assert [held.key for held in await store.slots("orders", key="other")] == ["other"]
        assert len(await store.slots("refunds")) == 1

    async def test_a_unit_that_finds_no_slot_writes_nothing(self, store: SagaStore, lease: Lease) -> None:
        await write(store, lease, claims("take", "o-1", limit=1))
        head = head_of("o-2", await store.reserve_pks(1))
        unit = step_of(None, start_of(head), head=head)

        result = await store.commit([replace(unit, slot=claims("pass", "o-2", limit=1).slot)], lease=lease)

        assert result.conflicts[0].kind == "limit"
        assert await store.load([("orders", "o-2")]) == [Loaded(None, None)]

    # -- dead letters ---------------------------------------------------------------------------------------------

    async def test_the_children_of_a_run_are_listed_in_the_order_of_their_spawning(
        self, store: SagaStore, lease: Lease
    ) -> None:
        children = tuple(child_of(7, revision, position) for revision in (2, 10) for position in (0, 3, 20))
        others = (child_of(7, 1, 0, parent_run=2), child_of(8, 1, 0))
        await write(store, lease, UnitOfWork(part=0, children_add=(*reversed(children), *others)))

        first = await store.children(7, 1, limit=4)
        rest = await store.children(7, 1, after=(first[-1].revision, first[-1].position), limit=4)

        assert (*first, *rest) == children
        assert await store.count_children(7, 1) == {"live": 6, "completed": 0, "failed": 0, "cancelled": 0}

    async def test_a_child_that_has_ended_is_found_by_how_it_ended_alone(self, store: SagaStore, lease: Lease) -> None:
        first, second = child_of(7, 1, 0), child_of(7, 1, 1)
        await write(store, lease, UnitOfWork(part=0, children_add=(first, second)))
        ended = replace(first, status="failed", run=1, ended_at=at(5))

        await write(store, lease, UnitOfWork(part=0, child_done=ended))

        assert await store.children(7, 1) == [second]
        assert await store.children(7, 1, status="failed") == [ended]
        assert await store.count_children(7, 1) == {"live": 1, "completed": 0, "failed": 1, "cancelled": 0}

    async def test_a_child_may_come_to_be_and_end_in_one_batch(self, store: SagaStore, lease: Lease) -> None:
        child = child_of(7, 1, 0)
        ended = replace(child, status="completed", run=1, ended_at=at(5))

        await write(store, lease, UnitOfWork(part=0, children_add=(child,)), UnitOfWork(part=0, child_done=ended))

        assert await store.children(7, 1) == []
        assert await store.children(7, 1, status="completed") == [ended]

    async def test_a_child_that_is_added_again_is_written_over(self, store: SagaStore, lease: Lease) -> None:
        await write(store, lease, UnitOfWork(part=0, children_add=(child_of(7, 1, 0, key=""),)))
        named = child_of(7, 1, 0, key="o-1")

        await write(store, lease, UnitOfWork(part=0, children_add=(named,)))

        assert await store.children(7, 1) == [named]

    async def test_the_children_of_a_unit_that_conflicts_are_not_there(self, store: SagaStore, lease: Lease) -> None:
        unit = UnitOfWork(part=0, inbox_done=RowRef(0, 99), children_add=(child_of(7, 1, 0),))

        result = await store.commit([unit], lease=lease)

        assert kinds(result) == {0: "gone"}
        assert await store.children(7, 1) == []

    # -- what operators say about sagas ---------------------------------------------------------------------------

    async def test_what_is_said_about_a_saga_replaces_what_was_said_before(self, store: SagaStore) -> None:
        await store.put_standing(SagaStanding("refunds", is_enabled=False, reason="audit", changed_at=at(1)))
        await store.put_standing(SagaStanding("orders", is_paused=True))
        await store.put_standing(SagaStanding("refunds"))

        assert await store.standings() == [SagaStanding("orders", is_paused=True), SagaStanding("refunds")]

    async def test_runs_of_an_older_version_are_found_and_counted(self, store: SagaStore, lease: Lease) -> None:
        for number, version in enumerate((1, 2, 3)):
            await started(store, lease, f"o-{number}", def_version=version, created_at=at(number))
        wanted = InstanceFilter(saga_ids=("orders",), version_below=3)

        first, cursor = await store.instances(wanted, limit=1)
        rest, end = await store.instances(wanted, limit=5, cursor=cursor)

        assert [each.key for each in (*first, *rest)] == ["o-1", "o-0"]
        assert end is None
        assert await store.count_instances(wanted) == 2

    async def test_dead_letters_come_newest_first(self, store: SagaStore, lease: Lease) -> None:
        letters = [dead_letter_of(f"d-{n}") for n in range(5)]
        await write(store, lease, UnitOfWork(part=0, dead_letters_add=tuple(letters)))

        first = await store.dead_letters(limit=2)
        second = await store.dead_letters(after=first[-1].id, limit=2)
        third = await store.dead_letters(after=second[-1].id, limit=2)

        assert first + second + third == letters[::-1]

    async def test_dead_letters_are_found_by_saga_and_by_key(self, store: SagaStore, lease: Lease) -> None:
        letters = (
            dead_letter_of("d-1", "k-1"),
            dead_letter_of("d-2", "k-2"),
            dead_letter_of("d-3", "k-1"),
            dead_letter_of("d-4", "k-1", saga_id="refunds"),
        )
        await write(store, lease, UnitOfWork(part=0, dead_letters_add=letters))

        async def ids(**wanted: Any) -> list[str]:
            return [letter.id for letter in await store.dead_letters(**wanted)]

        assert await ids(saga_id="orders") == ["d-3", "d-2", "d-1"]
        assert await ids(saga_id="orders", key="k-1") == ["d-3", "d-1"]
        assert await ids(key="k-1") == ["d-4", "d-3", "d-1"]
        assert await ids(key="k-1", limit=1) == ["d-4"]
        assert await ids(key="k-1", limit=2, after="d-4") == ["d-3", "d-1"]
        assert await ids(saga_id="orders", limit=1, after="d-3") == ["d-2"]
        assert await ids(saga_id="orders", key="k-1", after="d-3") == ["d-1"]
        assert await ids(saga_id="nobody") == []

    async def test_a_dead_letter_is_found_by_its_id(self, store: SagaStore, lease: Lease) -> None:
        await write(store, lease, UnitOfWork(part=0, dead_letters_add=(dead_letter_of("d-1"),)))

        assert await store.dead_letter("d-1") == dead_letter_of("d-1")
        assert await store.dead_letter("d-2") is None

    async def test_a_dead_letter_is_settled_once(self, store: SagaStore, lease: Lease) -> None:
        await write(store, lease, UnitOfWork(part=0, dead_letters_add=(dead_letter_of("d-1"), dead_letter_of("d-2"))))
        redriven = UnitOfWork(part=0, dead_letter_done="d-1", inbox_add=(envelope_of("o-1", "m-1"),))

        in_a_batch = await store.commit([redriven, redriven], lease=lease)
        later = await store.commit([redriven], lease=lease)

        assert kinds(in_a_batch) == {1: "gone"}
        assert kinds(later) == {0: "gone"}
        assert [letter.id for letter in await store.dead_letters()] == ["d-2"]
        assert [letter.id for letter in await store.dead_letters(saga_id="orders", key="o-1")] == ["d-2"]
        assert len(await store.inbox_page(after=None, limit=10)) == 1

    async def test_a_dead_letter_of_a_batch_can_be_settled_in_it_once(self, store: SagaStore, lease: Lease) -> None:
        settled = UnitOfWork(part=0, dead_letter_done="d-1")

        result = await store.commit(
            [UnitOfWork(part=0, dead_letters_add=(dead_letter_of("d-1"),)), settled, settled], lease=lease
        )

        assert kinds(result) == {2: "gone"}
        assert await store.dead_letters() == []
        assert await store.dead_letters(saga_id="orders") == []

    # -- listing --------------------------------------------------------------------------------------------------

    async def _a_shop(self, store: SagaStore, lease: Lease) -> list[Instance]:
        """Ten runs of two sagas, newest first."""
        statuses: list[SagaInstanceStatus] = ["running", "completed", "failed", "running", "cancelled"]
        found: list[Instance] = []
        for n in range(10):
            saga_id = "orders" if n % 3 else "refunds"
            key = f"{'eu' if n % 2 else 'us'}/{n}"
            found.append(
                await started(store, lease, key, saga_id=saga_id, created_at=at(n // 2), status=statuses[n % 5])
            )
        return sorted(found, key=lambda run: (run.created_at, run.pk), reverse=True)

    async def test_runs_are_listed_newest_first(self, store: SagaStore, lease: Lease) -> None:
        shop = await self._a_shop(store, lease)

        assert await store.instances(_ALL, limit=100) == (shop, None)

    async def test_a_listing_is_read_page_by_page(self, store: SagaStore, lease: Lease) -> None:
        shop = await self._a_shop(store, lease)
        page, cursor = await store.instances(_ALL, limit=3)
        pages = [page]

        while cursor is not None:
            page, cursor = await store.instances(_ALL, limit=3, cursor=cursor)
            pages.append(page)

        assert pages == [shop[:3], shop[3:6], shop[6:9], shop[9:]]

    async def test_the_last_full_page_has_no_cursor(self, store: SagaStore, lease: Lease) -> None:
        shop = await self._a_shop(store, lease)

        assert await store.instances(_ALL, limit=10) == (shop, None)

    async def test_what_is_created_while_paging_is_not_seen_and_shifts_nothing(
        self, store: SagaStore, lease: Lease
    ) -> None:
        shop = await self._a_shop(store, lease)
        first, cursor = await store.instances(_ALL, limit=5)
        await started(store, lease, "newest", created_at=at(100))

        second, _ = await store.instances(_ALL, limit=5, cursor=cursor)

        assert first + second == shop

    async def test_an_offset_skips_runs(self, store: SagaStore, lease: Lease) -> None:
        shop = await self._a_shop(store, lease)

        page, cursor = await store.instances(_ALL, limit=4, offset=3)
        rest, _ = await store.instances(_ALL, limit=10, cursor=cursor)

        assert page == shop[3:7]
        assert rest == shop[7:]

    @pytest.mark.parametrize(
        "wanted",
        [
            InstanceFilter(saga_ids=("refunds",)),
            InstanceFilter(saga_ids=("refunds", "orders", "refunds")),
            InstanceFilter(saga_ids=("nobody",)),
            InstanceFilter(statuses=("running",)),
            InstanceFilter(statuses=("failed", "cancelled", "failed")),
            InstanceFilter(key_prefix="eu/"),
            InstanceFilter(key_prefix="eu/", saga_ids=("orders",), statuses=("running", "completed")),
            InstanceFilter(created_after=at(2)),
            InstanceFilter(created_before=at(2)),
            InstanceFilter(created_after=at(1), created_before=at(3), statuses=("running",)),
            InstanceFilter(created_after=at(9)),
        ],
        ids=lambda wanted: " ".join(
            f"{name}={value}" for name, value in msgspec.to_builtins(wanted).items() if value not in ((), "", None)
        ),
    )
    async def test_a_filter_finds_counts_and_pages_what_it_names(
        self, store: SagaStore, lease: Lease, wanted: InstanceFilter
    ) -> None:
        shop = await self._a_shop(store, lease)
        expected = [
            run
            for run in shop
            if (not wanted.saga_ids or run.saga_id in wanted.saga_ids)
            and (not wanted.statuses or run.status in wanted.statuses)
            and run.key.startswith(wanted.key_prefix)
            and (wanted.created_after is None or run.created_at >= wanted.created_after)
            and (wanted.created_before is None or run.created_at < wanted.created_before)
        ]

        first, cursor = await store.instances(wanted, limit=1)
        rest: list[Instance] = []
        if cursor is not None:
            rest, _ = await store.instances(wanted, limit=100, cursor=cursor)

        assert await store.instances(wanted, limit=100) == (expected, None)
        assert first + rest == expected
        assert await store.count_instances(wanted) == len(expected)
        assert await store.count_instances(wanted, limit=1) == min(1, len(expected))

    async def test_a_run_is_listed_under_its_present_status_only(self, store: SagaStore, lease: Lease) -> None:
        instance = await started(store, lease, "o-1")
        after = next_of(instance, status="completed")
        await write(store, lease, step_of(instance, after))

        assert await store.instances(_ALL, limit=10) == ([after], None)
        assert await store.instances(InstanceFilter(statuses=("running",)), limit=10) == ([], None)
        assert await store.count_instances(InstanceFilter(statuses=("running",))) == 0
        assert await store.count_instances(InstanceFilter(statuses=("completed",))) == 1

    async def test_a_key_whose_first_message_waits_is_listed_as_pending(self, store: SagaStore, lease: Lease) -> None:
        waiting = head_of("o-1", await store.reserve_pks(1), run=0, awaits_start=True, created_at=at(3))
        await write(store, lease, UnitOfWork(part=waiting.part, head=waiting, inbox_add=(envelope_of("o-1", "m-1"),)))

        (pending,), _ = await store.instances(_ALL, limit=10)

        assert (pending.saga_id, pending.key, pending.pk, pending.run) == ("orders", "o-1", waiting.pk, 0)
        assert (pending.status, pending.revision, pending.created_at) == ("pending", 0, at(3))
        assert await store.count_instances(InstanceFilter(statuses=("pending",))) == 1
        assert await store.instances(InstanceFilter(statuses=("running",)), limit=10) == ([], None)
        assert await store.runs("orders", "o-1") == []

    async def test_a_pending_key_is_listed_as_a_run_once_it_has_one(self, store: SagaStore, lease: Lease) -> None:
        waiting = head_of("o-1", await store.reserve_pks(1), run=0, awaits_start=True)
        await write(store, lease, UnitOfWork(part=waiting.part, head=waiting))
        opened = replace(waiting, run=1, awaits_start=False)
        instance = start_of(opened)

        await write(store, lease, step_of(None, instance, head=opened, head_before=waiting))

        assert await store.instances(_ALL, limit=10) == ([instance], None)

    async def test_a_pending_key_whose_message_was_given_up_is_not_listed(self, store: SagaStore, lease: Lease) -> None:
        waiting = head_of("o-1", await store.reserve_pks(1), run=0, awaits_start=True)
        await write(store, lease, UnitOfWork(part=waiting.part, head=waiting))
        given_up = replace(waiting, awaits_start=False)

        await write(store, lease, UnitOfWork(part=waiting.part, head=given_up, head_before=waiting))

        assert await store.instances(_ALL, limit=10) == ([], None)
        assert await store.count_instances(_ALL) == 0

    async def test_a_cursor_that_is_none_is_refused(self, store: SagaStore, lease: Lease) -> None:
        with pytest.raises(MessageRejected, match="cursor"):
            await store.instances(_ALL, limit=10, cursor="nonsense")

    async def test_a_key_without_runs_has_none(self, store: SagaStore) -> None:
        assert await store.runs("orders", "o-1") == []
        assert await store.load_run("orders", "o-1", 1) is None

    # -- history --------------------------------------------------------------------------------------------------

    async def test_history_is_read_page_by_page_in_the_order_of_writing(self, store: SagaStore, lease: Lease) -> None:
        instance = await started(store, lease, "o-1")
        for _ in range(4):
            await write(store, lease, step_of(instance, next_of(instance)))
            instance = next_of(instance)

        first = await store.history(instance, limit=2)
        rest = await store.history(instance, after_entry=first[-1].entry_no, limit=10)

        assert [entry.entry_no for entry in first + rest] == [1, 2, 3, 4, 5]

    async def test_history_keeps_every_field(self, store: SagaStore, lease: Lease) -> None:
        instance = await started(store, lease, "o-1", tier="t2")
        unit = step_of(instance, next_of(instance))
        assert unit.entry is not None
        entry = replace(
            unit.entry, reason="late", before=b"{}", after=b"[1]", attempt=3, causation_id="m-0", def_version=4
        )

        await write(store, lease, replace(unit, entry=entry))

        assert await store.history(instance, after_entry=1) == [entry]

    # -- the feed (I8) --------------------------------------------------------------------------------------------

    async def test_the_feed_of_an_empty_store_is_empty(self, store: SagaStore) -> None:
        assert await store.feed_bounds() == (1, 0)
        assert await store.feed(after=0, limit=10) == []

    async def test_the_feed_has_no_gap_and_no_repeat_wherever_one_resumes(self, store: SagaStore, lease: Lease) -> None:
        instance = await started(store, lease, "o-1")
        for commit in range(5):
            units = [
                UnitOfWork(part=0, feed=feed_of(instance, *[f"{commit}.{n}.{i}" for i in range(n)])) for n in range(3)
            ]
            await write(store, lease, *units)

        everything = await store.feed(after=0, limit=100)

        assert [number for number, _ in everything] == list(range(1, 16))
        assert [event.detail for _, event in everything][:3] == ["0.1.0", "0.2.0", "0.2.1"]
        assert await store.feed_bounds() == (1, 15)
        for after in range(16):
            for limit in (1, 2, 5, 100):
                assert await store.feed(after=after, limit=limit) == everything[after : after + limit]

    async def test_a_commit_without_events_leaves_no_gap_in_the_feed(self, store: SagaStore, lease: Lease) -> None:
        instance = await started(store, lease, "o-1")
        await write(store, lease, UnitOfWork(part=0, feed=feed_of(instance, "a")))
        await accepted(store, lease, envelope_of("o-1", "m-1"))
        await write(store, lease, UnitOfWork(part=0, feed=feed_of(instance, "b")))

        assert [(number, event.detail) for number, event in await store.feed(after=0, limit=10)] == [(1, "a"), (2, "b")]

    async def test_a_reader_ahead_of_the_feed_gets_nothing(self, store: SagaStore, lease: Lease) -> None:
        instance = await started(store, lease, "o-1")
        await write(store, lease, UnitOfWork(part=0, feed=feed_of(instance, "a")))

        assert await store.feed(after=1, limit=10) == []
        assert await store.feed(after=99, limit=10) == []

    async def _three_commits(self, store: SagaStore, lease: Lease) -> list[tuple[int, FeedEvent]]:
        """A feed of three commits: events 1 and 2, 3 to 5, and 6."""
        instance = await started(store, lease, "o-1")
        for commit, size in enumerate((2, 3, 1)):
            shown = feed_of(instance, *(f"{commit}.{n}" for n in range(size)))
            await write(store, lease, UnitOfWork(part=0, feed=shown))
        return await store.feed(after=0, limit=100)

    @pytest.mark.parametrize(
        ("before", "oldest"),
        [(0, 1), (1, 1), (2, 1), (3, 3), (4, 3), (5, 3), (6, 6), (7, 6), (99, 6)],
    )
    async def test_pruning_forgets_commits_that_lie_wholly_before_a_number_but_never_the_newest(
        self, store: SagaStore, lease: Lease, before: int, oldest: int
    ) -> None:
        everything = await self._three_commits(store, lease)

        pruned = await store.prune_feed(before=before, limit=10)

        assert pruned == {1: 0, 3: 1, 6: 2}[oldest]
        assert await store.feed_bounds() == (oldest, 6)
        for after in range(8):
            for limit in (1, 2, 100):
                kept = everything[max(after, oldest - 1) :]
                assert await store.feed(after=after, limit=limit) == kept[:limit]

    async def test_pruning_goes_step_by_step_and_says_when_nothing_is_left_to_forget(
        self, store: SagaStore, lease: Lease
    ) -> None:
        await self._three_commits(store, lease)

        steps = [await store.prune_feed(before=99, limit=1) for _ in range(3)]

        assert steps == [1, 1, 0]
        assert await store.feed_bounds() == (6, 6)

    async def test_a_pruned_feed_goes_on_with_the_next_number(self, store: SagaStore, lease: Lease) -> None:
        everything = await self._three_commits(store, lease)
        await store.prune_feed(before=99, limit=10)
        instance = await started(store, lease, "o-2")

        result = await write(store, lease, UnitOfWork(part=0, feed=feed_of(instance, "next")))

        assert result.feed_base == 7
        assert [number for number, _ in await store.feed(after=0, limit=10)] == [6, 7]
        assert (await store.feed(after=5, limit=1)) == everything[5:]

    async def test_pruning_an_empty_feed_is_nothing_and_needs_no_lease(self, store: SagaStore) -> None:
        assert await store.prune_feed(before=99, limit=10) == 0
        assert await store.feed_bounds() == (1, 0)

    # -- removing -------------------------------------------------------------------------------------------------

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
        assert await store.instances(_ALL, limit=10) == ([other], None)
        assert await store.count_instances(_ALL) == 1

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

    # -- definitions ----------------------------------------------------------------------------------------------

    async def test_definitions_are_kept_and_replaced_by_id(self, store: SagaStore) -> None:
        orders = RegisteredDefinition("orders", 1, "f1", {"types": ["OrderPlaced"], "retry": {"max": 5}}, NOW)
        refunds = RegisteredDefinition("refunds", 1, "f2", {}, NOW)
        newer = RegisteredDefinition("orders", 2, "f3", {"types": []}, at(1))
        await store.put_definitions([refunds, orders])

        await store.put_definitions([newer])

        assert await store.definitions() == [newer, refunds]

    async def test_definitions_need_no_lease_and_leave_no_runs(self, store: SagaStore) -> None:
        await store.put_definitions([RegisteredDefinition("orders", 1, "f1", {}, NOW)])

        assert await store.instances(_ALL, limit=10) == ([], None)
        assert await store.count_instances(_ALL) == 0
