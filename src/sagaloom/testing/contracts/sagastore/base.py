"""What every part of the contract stands on: an open store, and a lease on it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from sagaloom.ports.store import Lease, SagaStore
from sagaloom.testing.contracts.sagastore.samples import NOW

__all__ = ["OpenSagaStore", "SagaStoreCase"]

OpenSagaStore = Callable[[], Awaitable[SagaStore]]


class SagaStoreCase:
    """A subclass has tests, and its own subclass a fixture `open_store`."""

    pytestmark = pytest.mark.anyio

    @pytest.fixture
    async def store(self, open_store: OpenSagaStore) -> AsyncIterator[SagaStore]:
        store = await open_store()
        yield store
        await store.close()

    @pytest.fixture
    async def lease(self, store: SagaStore) -> Lease:
        return await store.acquire("worker-1", now=NOW)
