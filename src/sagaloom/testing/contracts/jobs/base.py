"""What every part of the contract stands on: two doors to the same runs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from sagaloom.ports.jobs import JobRunStore
from sagaloom.testing.contracts.jobs.samples import Runs

__all__ = ["JobRunStoreCase", "OpenJobRunStore"]

OpenJobRunStore = Callable[[], Awaitable[JobRunStore]]


class JobRunStoreCase:
    """A subclass has tests, and its own subclass a fixture `open_store`."""

    pytestmark = pytest.mark.anyio

    @pytest.fixture
    async def store(self, open_store: OpenJobRunStore) -> AsyncIterator[JobRunStore]:
        store = await open_store()
        yield store
        await store.close()

    @pytest.fixture
    async def other(self, open_store: OpenJobRunStore, store: JobRunStore) -> AsyncIterator[JobRunStore]:
        """A second door to the same runs."""
        other = await open_store()
        yield other
        await other.close()

    @pytest.fixture
    def new(self) -> Runs:
        return Runs()
