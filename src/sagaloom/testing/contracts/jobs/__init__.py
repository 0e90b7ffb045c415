"""What every store of job runs must do, as tests: subclass `JobRunStoreContract`, say how to open a store, run pytest.

    class TestMyStore(JobRunStoreContract):
        @pytest.fixture
        def open_store(self) -> OpenJobRunStore:
            async def open_store() -> JobRunStore:
                return await MyJobStore.connect("...")

            return open_store

In one test, all stores that `open_store` opens are doors to the same runs, as those of several processes would be; at
the start there are none. The tests are coroutines for anyio's pytest plugin; there is nothing to skip. Put
`pytest.register_assert_rewrite("sagaloom.testing.contracts")` into your `conftest.py` for readable failures.
"""

from __future__ import annotations

from sagaloom.testing.contracts.jobs.base import OpenJobRunStore
from sagaloom.testing.contracts.jobs.steering import Steering
from sagaloom.testing.contracts.jobs.telling import Telling
from sagaloom.testing.contracts.jobs.working import Working

__all__ = ["JobRunStoreContract", "OpenJobRunStore"]


class JobRunStoreContract(Working, Telling, Steering):
    """The tests; a subclass has a fixture `open_store`."""
