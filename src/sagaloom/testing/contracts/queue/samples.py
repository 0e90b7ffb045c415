"""Messages of an ordinary kind, and a client that takes them, for tests of a broker."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, cast

import msgspec

from sagaloom.ports.queue import Delivery, QueueBroker, QueueDeadLetter, QueueMessage, Settlement
from sagaloom.queues.queue import Queue, QueueSettings

__all__ = [
    "LEASE_SECONDS",
    "PATIENCE_SECONDS",
    "START",
    "Consumer",
    "ids",
    "letter_of",
    "listened",
    "message",
    "queue_over",
    "stop_soon",
    "until",
]

START = datetime(2026, 1, 31, 12, tzinfo=UTC)
# Long enough for any answer, short enough to notice that it will never come.
PATIENCE_SECONDS = 60.0
"""How long a test waits for what must come. What comes as it should comes at once."""
LEASE_SECONDS = 2.0
"""Long enough that a machine with other things to do renews it in time."""


def message(number: int | str, **fields: Any) -> QueueMessage:
    """A message with an id and a body that say which one it is."""
    made = QueueMessage(id=f"m{number}", body=f'{{"n":"{number}"}}'.encode(), enqueued_at=START)
    return msgspec.structs.replace(made, **fields)


def letter_of(delivery: Delivery, queue: str = "q") -> QueueDeadLetter:
    return QueueDeadLetter(
        message=delivery.message,
        queue=queue,
        attempt=delivery.attempt,
        reason="rejected",
        failed_at=START,
        error_code="CODE",
        error_message="text",
        traceback="trace",
    )


def ids(deliveries: Sequence[Delivery]) -> list[str]:
    return [delivery.message.id for delivery in deliveries]


class Consumer:
    """A client that has begun to consume, and takes until there is what a test waits for."""

    def __init__(self, broker: QueueBroker) -> None:
        self.broker = broker
        self.arrived = asyncio.Event()

    async def begin(self, *, prefetch: int = 100, lease_seconds: float = LEASE_SECONDS) -> Consumer:
        await self.broker.begin(self.arrived.set, prefetch=prefetch, lease_seconds=lease_seconds)
        return self

    async def take(self, count: int, *, within: float = PATIENCE_SECONDS) -> list[Delivery]:
        """`count` messages, however often they have to be asked for."""
        taken: list[Delivery] = []
        deadline = time.monotonic() + within
        while len(taken) < count:
            self.arrived.clear()
            exchange = await self.broker.exchange((), limit=count - len(taken))
            taken += exchange.deliveries
            if time.monotonic() > deadline:
                raise AssertionError(f"{count} messages were to come, there are {ids(taken)}")
            if len(taken) < count:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.arrived.wait(), 0.05)
        return taken

    async def finds_nothing(self, *, for_seconds: float = 0.15) -> bool:
        deadline = time.monotonic() + for_seconds
        while time.monotonic() < deadline:
            if (await self.broker.exchange((), limit=10)).deliveries:
                return False
            await asyncio.sleep(0.02)
        return True

    async def settle(self, *settlements: Settlement) -> list[Any]:
        """Settles, and returns what was stale."""
        return list((await self.broker.exchange(settlements, limit=0)).stale)


def queue_over(broker: QueueBroker, *, payload_type: Any = None, retry_attempts: int = 3) -> Queue[Any]:
    """A queue that does not own its broker: closing it would close the test's."""

    async def opened() -> QueueBroker:
        return cast("QueueBroker", _NotClosed(broker))

    settings = QueueSettings(retry_attempts=retry_attempts, retry_delay_ms=20)
    return Queue(broker.queue, opened, payload_type=payload_type, settings=settings)


class _NotClosed:
    def __init__(self, broker: QueueBroker) -> None:
        self._broker = broker

    def __getattr__(self, name: str) -> Any:
        return getattr(self._broker, name)

    async def close(self) -> None:
        await self._broker.end()


async def listened(queue: Queue[Any], handler: Callable[..., Any], **options: Any) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        await queue.listen(handler, visibility_timeout=LEASE_SECONDS, **options)


_stopping: set[asyncio.Task[None]] = set()


def stop_soon(queue: Queue[Any]) -> None:
    task = asyncio.ensure_future(queue.stop())
    _stopping.add(task)
    task.add_done_callback(_stopping.discard)


async def until(queue: Queue[Any] | QueueBroker, *, live: int, dead: int) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while ((depth := await queue.depth()).live, depth.dead) != (live, dead):
        assert time.monotonic() < deadline, f"{depth} is not live={live} dead={dead}"
        await asyncio.sleep(0.02)
