"""Queues: work handed from whoever has it to whoever has time for it.

    notifications = create_parallel_queue("order-notifications", concurrency=4, provider=QueueProvider.REDIS)

    await notifications.enqueue({"orderId": "o-1", "channel": "email"})
    await notifications.listen(deliver)      # four at a time, each acknowledged when its own handler ends

The provider is named, or found: RabbitMQ before Redis before the embedded one, as the environment says. PostgreSQL is
taken only when it is named.
"""

from __future__ import annotations

from sagaloom.ports.queue import (
    DeadLetterReason,
    DeadLetterStorePort,
    QueueBroker,
    QueueCapabilities,
    QueueDeadLetter,
    QueueDepth,
    QueueMessage,
)
from sagaloom.queue.creating import (
    ParallelQueueOptions,
    QueueOptions,
    create_parallel_queue,
    create_queue,
    create_typed_queue,
)
from sagaloom.queue.providers import QueueConnectionOptions, QueueProvider
from sagaloom.queues.handling import QueueContext, QueueHandler
from sagaloom.queues.queue import Queue, QueueReceipt, QueueSettings

__all__ = [
    "DeadLetterReason",
    "DeadLetterStorePort",
    "ParallelQueueOptions",
    "Queue",
    "QueueBroker",
    "QueueCapabilities",
    "QueueConnectionOptions",
    "QueueContext",
    "QueueDeadLetter",
    "QueueDepth",
    "QueueHandler",
    "QueueMessage",
    "QueueOptions",
    "QueueProvider",
    "QueueReceipt",
    "QueueSettings",
    "create_parallel_queue",
    "create_queue",
    "create_typed_queue",
]
