"""What every queue broker must do, as tests: subclass `QueueContract`, say how to open a broker, run pytest.

    class TestMyBroker(QueueContract):
        @pytest.fixture
        def open_broker(self) -> OpenBroker:
            async def open_broker(queue: str, max_length: int | None = None) -> QueueBroker:
                return await MyBroker.connect(queue, ...)

            return open_broker

Brokers that `open_broker` opens in one test share what they stand on, which must be empty when the test begins; two
with one name are two clients of one queue. A test of something that a broker has not among its `capabilities` checks
that it is refused. The tests are coroutines for anyio's pytest plugin.
"""

from __future__ import annotations

from sagaloom.testing.contracts.queue.base import OpenBroker
from sagaloom.testing.contracts.queue.broker import Brokers
from sagaloom.testing.contracts.queue.whole import WholeQueues

__all__ = ["OpenBroker", "QueueContract"]


class QueueContract(Brokers, WholeQueues):
    """The tests; a subclass has a fixture `open_broker`."""
