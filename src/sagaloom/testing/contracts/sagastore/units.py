"""A unit of work: all of it or nothing, on top of what was read (I1, I2), once (I4)."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from sagaloom.ports.store import CommitResult, InboxRow, InstanceFilter, Lease, OutboxRow, RowRef, SagaStore, UnitOfWork
from sagaloom.testing.contracts.sagastore.base import SagaStoreCase
from sagaloom.testing.contracts.sagastore.samples import (
    EVERY,
    current,
    dead_letter_of,
    effect_of,
    envelope_of,
    feed_of,
    head_of,
    kinds,
    mark_of,
    next_of,
    part_of,
    pending_of,
    start_of,
    started,
    step_of,
    timer_of,
    write,
)

__all__ = ["Units"]


class Units(SagaStoreCase):
    """What a commit writes, and what it refuses."""

    # -- the house law: all of a unit, or nothing ---------------------------------------------------------------------

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

    # -- revisions (I2) -----------------------------------------------------------------------------------------------

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
        assert (await store.instances(EVERY, limit=10))[0] == [third]

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

    # -- what no store can write --------------------------------------------------------------------------------------

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

    # -- heads --------------------------------------------------------------------------------------------------------

    async def test_a_key_that_was_never_seen_has_neither_head_nor_run(self, store: SagaStore) -> None:
        assert await store.load([("orders", "o-1"), ("orders", "")]) == [(None, None), (None, None)]

    async def test_loading_keeps_the_order_of_the_keys(self, store: SagaStore, lease: Lease) -> None:
        one, two = await started(store, lease, "o-1"), await started(store, lease, "o-2")

        loaded = await store.load([("orders", "o-2"), ("orders", "o-9"), ("orders", "o-1"), ("orders", "o-2")])

        assert [found.instance for found in loaded] == [two, None, one, two]

    async def test_of_keys_outside_of_the_wanted_partitions_only_heads_are_loaded(
        self, store: SagaStore, lease: Lease
    ) -> None:
        one, two = await started(store, lease, "o-1"), await started(store, lease, "o-2")
        keys = [("orders", key) for key in ("o-1", "o-9", "o-2")]

        loaded = await store.load(keys, parts=frozenset({part_of("o-2")}))

        assert part_of("o-1") != part_of("o-2")
        assert [found.head.pk if found.head else None for found in loaded] == [one.pk, None, two.pk]
        assert [found.instance for found in loaded] == [None, None, two]

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
        assert await store.instances(EVERY, limit=10) == ([], None)

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

    # -- marks (I4) ---------------------------------------------------------------------------------------------------

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
