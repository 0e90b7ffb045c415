"""What every part of the contract stands on: clients of one queue."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable
from typing import Protocol

import pytest

from sagaloom.ports.queue import QueueBroker
from sagaloom.testing.contracts.queue.samples import Consumer

__all__ = ["OpenBroker", "QueueCase"]


class OpenBroker(Protocol):
    """Opens a client of a queue."""

    def __call__(self, queue: str, max_length: int | None = None) -> Awaitable[QueueBroker]: ...


class QueueCase:
    """A subclass has tests, and its own subclass a fixture `open_broker`."""

    pytestmark = pytest.mark.anyio

    @pytest.fixture
    async def open_client(self, open_broker: OpenBroker) -> AsyncIterator[OpenBroker]:
        """Opens clients that are closed in the end."""
        opened: list[QueueBroker] = []

        async def open_client(queue: str, max_length: int | None = None) -> QueueBroker:
            opened.append(await open_broker(queue, max_length))
            return opened[-1]

        yield open_client
        for broker in opened:
            await broker.close()

    @pytest.fixture
    async def broker(self, open_client: OpenBroker) -> QueueBroker:
        return await open_client("q")

    @pytest.fixture
    async def consumer(self, open_client: OpenBroker) -> Consumer:
        return await Consumer(await open_client("q")).begin()

    @pytest.fixture
    async def other(self, open_client: OpenBroker) -> Consumer:
        """A second consumer of the same queue, as another process would be; it has to `begin`."""
        return Consumer(await open_client("q"))
