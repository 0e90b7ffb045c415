"""What a store says of itself, and who may write to it (I7)."""

from __future__ import annotations

import pytest

from sagaloom.definitions import SAGA_DURABILITY_TIERS
from sagaloom.errors import BackendUnavailable, Fenced
from sagaloom.ports.store import Lease, RowRef, SagaStore, UnitOfWork
from sagaloom.testing.contracts.sagastore.base import SagaStoreCase
from sagaloom.testing.contracts.sagastore.samples import (
    EVERY,
    NOW,
    at,
    current,
    envelope_of,
    next_of,
    started,
    step_of,
    write,
)

__all__ = ["Leases"]


class Leases(SagaStoreCase):
    """The store, its tiers, its leases."""

    # -- the store itself ---------------------------------------------------------------------------------------------

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
        assert await store.instances(EVERY, limit=10) == ([], None)

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

    # -- the lease (I7) -----------------------------------------------------------------------------------------------

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
