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

from sagaloom.testing.contracts.sagastore.base import OpenSagaStore
from sagaloom.testing.contracts.sagastore.leases import Leases
from sagaloom.testing.contracts.sagastore.reading import Reading
from sagaloom.testing.contracts.sagastore.removing import Removing
from sagaloom.testing.contracts.sagastore.units import Units
from sagaloom.testing.contracts.sagastore.waiting import Waiting

__all__ = ["OpenSagaStore", "SagaStoreContract"]


class SagaStoreContract(Leases, Units, Waiting, Reading, Removing):
    """The tests; a subclass has a fixture `open_store`."""
