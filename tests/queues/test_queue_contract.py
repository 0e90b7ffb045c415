"""Every queue broker of the package, held to the contract that users get too, against the real thing."""

from pathlib import Path

import pytest

from sagaloom.ports.queue import QueueBroker
from sagaloom.queue.providers import BrokerOptions, QueueConnectionOptions, QueueProvider, opener_of
from sagaloom.testing.contracts.queue import OpenBroker, QueueContract


class TestKvQueue(QueueContract):
    @pytest.fixture
    def open_broker(self, tmp_path: Path) -> OpenBroker:
        connection = QueueConnectionOptions(kv=tmp_path / "queues.db")

        async def open_broker(queue: str, max_length: int | None = None) -> QueueBroker:
            return await opener_of(QueueProvider.KV, queue, connection, BrokerOptions(max_length=max_length))()

        return open_broker
