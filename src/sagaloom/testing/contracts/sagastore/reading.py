"""What people and readers see: lists, history, the feed (I8), definitions."""

from __future__ import annotations

import msgspec
import pytest
from msgspec.structs import replace

from sagaloom.definitions import SagaInstanceStatus
from sagaloom.engine.records import FeedEvent, Instance, SagaStanding
from sagaloom.errors import MessageRejected
from sagaloom.ports.store import InstanceFilter, Lease, RegisteredDefinition, SagaStore, UnitOfWork
from sagaloom.testing.contracts.sagastore.base import SagaStoreCase
from sagaloom.testing.contracts.sagastore.samples import (
    EVERY,
    NOW,
    accepted,
    at,
    envelope_of,
    feed_of,
    head_of,
    next_of,
    start_of,
    started,
    step_of,
    write,
)

__all__ = ["Reading"]


class Reading(SagaStoreCase):
    """Pages, filters, numbers."""

    # -- listing ------------------------------------------------------------------------------------------------------

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

        assert await store.instances(EVERY, limit=100) == (shop, None)

    async def test_a_listing_is_read_page_by_page(self, store: SagaStore, lease: Lease) -> None:
        shop = await self._a_shop(store, lease)
        page, cursor = await store.instances(EVERY, limit=3)
        pages = [page]

        while cursor is not None:
            page, cursor = await store.instances(EVERY, limit=3, cursor=cursor)
            pages.append(page)

        assert pages == [shop[:3], shop[3:6], shop[6:9], shop[9:]]

    async def test_the_last_full_page_has_no_cursor(self, store: SagaStore, lease: Lease) -> None:
        shop = await self._a_shop(store, lease)

        assert await store.instances(EVERY, limit=10) == (shop, None)

    async def test_what_is_created_while_paging_is_not_seen_and_shifts_nothing(
        self, store: SagaStore, lease: Lease
    ) -> None:
        shop = await self._a_shop(store, lease)
        first, cursor = await store.instances(EVERY, limit=5)
        await started(store, lease, "newest", created_at=at(100))

        second, _ = await store.instances(EVERY, limit=5, cursor=cursor)

        assert first + second == shop

    async def test_an_offset_skips_runs(self, store: SagaStore, lease: Lease) -> None:
        shop = await self._a_shop(store, lease)

        page, cursor = await store.instances(EVERY, limit=4, offset=3)
        rest, _ = await store.instances(EVERY, limit=10, cursor=cursor)

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

        assert await store.instances(EVERY, limit=10) == ([after], None)
        assert await store.instances(InstanceFilter(statuses=("running",)), limit=10) == ([], None)
        assert await store.count_instances(InstanceFilter(statuses=("running",))) == 0
        assert await store.count_instances(InstanceFilter(statuses=("completed",))) == 1

    @pytest.mark.parametrize("is_stored", [True, False], ids=["stored before", "new in the batch"])
    async def test_a_run_that_leaves_a_status_and_returns_in_one_batch_is_listed_once(
        self, store: SagaStore, lease: Lease, *, is_stored: bool
    ) -> None:
        head = head_of("o-1", await store.reserve_pks(1))
        running = start_of(head)
        undoing = next_of(running, status="compensating")
        again = next_of(undoing, status="running")
        starts = step_of(None, running, head=head)
        moves = [step_of(running, undoing), step_of(undoing, again)]

        if is_stored:
            await write(store, lease, starts)
            await write(store, lease, *moves)
        else:
            await write(store, lease, starts, *moves)

        assert await store.instances(EVERY, limit=10) == ([again], None)
        assert await store.count_instances(InstanceFilter(statuses=("running",))) == 1
        assert await store.count_instances(InstanceFilter(statuses=("compensating",))) == 0

    async def test_a_key_whose_first_message_waits_is_listed_as_pending(self, store: SagaStore, lease: Lease) -> None:
        waiting = head_of("o-1", await store.reserve_pks(1), run=0, awaits_start=True, created_at=at(3))
        await write(store, lease, UnitOfWork(part=waiting.part, head=waiting, inbox_add=(envelope_of("o-1", "m-1"),)))

        (pending,), _ = await store.instances(EVERY, limit=10)

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

        assert await store.instances(EVERY, limit=10) == ([instance], None)

    async def test_a_pending_key_whose_message_was_given_up_is_not_listed(self, store: SagaStore, lease: Lease) -> None:
        waiting = head_of("o-1", await store.reserve_pks(1), run=0, awaits_start=True)
        await write(store, lease, UnitOfWork(part=waiting.part, head=waiting))
        given_up = replace(waiting, awaits_start=False)

        await write(store, lease, UnitOfWork(part=waiting.part, head=given_up, head_before=waiting))

        assert await store.instances(EVERY, limit=10) == ([], None)
        assert await store.count_instances(EVERY) == 0

    async def test_a_cursor_that_is_none_is_refused(self, store: SagaStore, lease: Lease) -> None:
        with pytest.raises(MessageRejected, match="cursor"):
            await store.instances(EVERY, limit=10, cursor="nonsense")

    async def test_a_key_without_runs_has_none(self, store: SagaStore) -> None:
        assert await store.runs("orders", "o-1") == []
        assert await store.load_run("orders", "o-1", 1) is None

    # -- history ------------------------------------------------------------------------------------------------------

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

    # -- the feed (I8) ------------------------------------------------------------------------------------------------

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

    # -- definitions --------------------------------------------------------------------------------------------------

    async def test_definitions_are_kept_and_replaced_by_id(self, store: SagaStore) -> None:
        orders = RegisteredDefinition("orders", 1, "f1", {"types": ["OrderPlaced"], "retry": {"max": 5}}, NOW)
        refunds = RegisteredDefinition("refunds", 1, "f2", {}, NOW)
        newer = RegisteredDefinition("orders", 2, "f3", {"types": []}, at(1))
        await store.put_definitions([refunds, orders])

        await store.put_definitions([newer])

        assert await store.definitions() == [newer, refunds]

    async def test_definitions_need_no_lease_and_leave_no_runs(self, store: SagaStore) -> None:
        await store.put_definitions([RegisteredDefinition("orders", 1, "f1", {}, NOW)])

        assert await store.instances(EVERY, limit=10) == ([], None)
        assert await store.count_instances(EVERY) == 0

    # -- what operators say about sagas -------------------------------------------------------------------------------

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
