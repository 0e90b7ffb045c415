"""What waits in a store: messages (I9), effects (I3), timers, schedules, slots, children, dead letters."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from sagaloom.engine.records import HeldSlot, ScheduleCursor
from sagaloom.ports.store import InboxRow, Lease, Loaded, OutboxRow, RowRef, SagaStore, UnitOfWork
from sagaloom.testing.contracts.sagastore.base import SagaStoreCase
from sagaloom.testing.contracts.sagastore.samples import (
    NOW,
    accepted,
    at,
    child_of,
    claims,
    current,
    dead_letter_of,
    effect_of,
    envelope_of,
    feed_of,
    head_of,
    kinds,
    next_of,
    part_of,
    pending_of,
    sent,
    start_of,
    started,
    step_of,
    timer_of,
    write,
)

__all__ = ["Waiting"]


class Waiting(SagaStoreCase):
    """Rows that come and go."""

    # -- the inbox (I9) -----------------------------------------------------------------------------------------------

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

    # -- the outbox (I3) ----------------------------------------------------------------------------------------------

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

    async def test_an_answer_is_applied_by_the_unit_that_settles_its_effect_or_not_at_all(
        self, store: SagaStore, lease: Lease
    ) -> None:
        instance = await started(store, lease, "o-1")
        (ref,) = await sent(store, lease, instance)
        second, third = next_of(instance), next_of(next_of(instance))
        follow_up = effect_of(second)

        await write(store, lease, step_of(instance, second, outbox_done=(ref,), outbox_add=(follow_up,)))
        again = await store.commit([step_of(second, third, outbox_done=(ref,))], lease=lease)
        stale = await store.commit([step_of(instance, second, outbox_done=(ref,))], lease=lease)

        assert kinds(again) == {0: "gone"}
        assert list(kinds(stale).values()) in (["gone"], ["revision"])
        assert await current(store, instance) == second
        assert [row.effect for row in await store.outbox_page(after=None, limit=10)] == [follow_up]

    async def test_of_two_answers_in_one_commit_that_settle_one_effect_the_first_is_applied(
        self, store: SagaStore, lease: Lease
    ) -> None:
        instance = await started(store, lease, "o-1")
        (ref,) = await sent(store, lease, instance)
        second = next_of(instance)
        third = next_of(second)

        result = await store.commit(
            [step_of(instance, second, outbox_done=(ref,)), step_of(second, third, outbox_done=(ref,))], lease=lease
        )

        assert kinds(result) == {1: "gone"}
        assert await current(store, instance) == second

    async def test_an_effect_stays_when_the_decision_about_its_answer_conflicts(
        self, store: SagaStore, lease: Lease
    ) -> None:
        instance = await started(store, lease, "o-1")
        (ref,) = await sent(store, lease, instance)
        moved = next_of(instance)
        await write(store, lease, step_of(instance, moved))

        result = await store.commit([step_of(instance, moved, outbox_done=(ref,))], lease=lease)

        assert kinds(result) == {0: "revision"}
        assert [row.ref for row in await store.outbox_page(after=None, limit=10)] == [ref]

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

    # -- timers -------------------------------------------------------------------------------------------------------

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

    # -- schedules ----------------------------------------------------------------------------------------------------

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

    # -- slots --------------------------------------------------------------------------------------------------------

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

    # -- children -----------------------------------------------------------------------------------------------------

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

    # -- dead letters -------------------------------------------------------------------------------------------------

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
