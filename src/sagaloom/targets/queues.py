"""Queues as a target: `send("queue:order-notifications", {...})` puts a message into a queue.

Rules:

1. `create` makes the queue of a name, once, when the first effect for it leaves; `sagaloom.queue.create_queue` is one,
   and chooses the broker as it does everywhere.
2. The message's id is the effect's own idempotency key, else its effect key: a consumer that remembers ids does
   nothing twice, however often the effect is sent. Where the broker can, it keeps a repeat out by itself.
3. The headers say who sent it: `effect-key`, `saga-id`, `correlation-key`, and the trace goes along.
4. When the broker has it, the effect has left. What consumers make of it comes back as what they publish.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from sagaloom.engine.records import OutboxEffect
from sagaloom.errors import DeliveryFailed, SagasError
from sagaloom.messages import SagaMessage
from sagaloom.ports.queue import QueueCapabilities

__all__ = ["QueueTarget", "SendingQueue"]


class SendingQueue(Protocol):
    """What is needed of a queue; those of `sagaloom.queue` are such."""

    async def open(self) -> QueueCapabilities: ...

    async def enqueue(
        self,
        payload: Any,
        *,
        deduplication_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        message_id: str | None = None,
    ) -> object: ...

    async def close(self) -> None: ...


class QueueTarget:
    """Delivers effects of kind `queue`: each is one message. `create` makes the queue of a name."""

    kind = "queue"

    def __init__(self, create: Callable[[str], SendingQueue]) -> None:
        self._create = create
        self._queues: dict[str, SendingQueue] = {}

    async def deliver(self, effect: OutboxEffect) -> Sequence[SagaMessage[Any]]:
        key = effect.idempotency_key or effect.effect_key
        headers = {"effect-key": effect.effect_key, "saga-id": effect.saga_id, "correlation-key": effect.key}
        if effect.traceparent is not None:
            headers["traceparent"] = effect.traceparent
            if effect.tracestate is not None:
                headers["tracestate"] = effect.tracestate
        try:
            queue = self._queue(effect.target_id)
            able = await queue.open()
            await queue.enqueue(
                msgspec.json.decode(effect.payload),
                message_id=key,
                deduplication_id=key if able.deduplication else None,
                headers=headers,
            )
        except DeliveryFailed:
            raise
        except SagasError as error:
            raise DeliveryFailed(
                f"queue {effect.target_id!r} did not take it: {error.message}", retryable=error.retryable
            ) from error
        return ()

    def _queue(self, name: str) -> SendingQueue:
        queue = self._queues.get(name)
        if queue is None:
            queue = self._queues[name] = self._create(name)
        return queue

    async def close(self) -> None:
        """Lets go of the brokers. A later effect opens them again."""
        queues, self._queues = self._queues, {}
        for queue in queues.values():
            await queue.close()
