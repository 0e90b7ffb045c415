"""Sending to RabbitMQ, at once or later, and counting what is there.

- A message is sent when the broker has confirmed it, which for a quorum queue is after it was written to disk.
- A delay is the time that all messages of one queue live, for messages of different delays in one queue would wait for
  each other. So that there are not too many of these, a delay is rounded up by at most a sixty-fourth. A delay queue
  goes when it was not used for an hour longer than its delay.
- A delay queue that takes nothing in is left alone: its messages go to `<queue>.delay.<ms>.1` from then on, and so
  forth. Publishing to it holds up the channel for good, so delays have a channel of their own.

Where that comes from: RabbitMQ before 4.0 keeps the list of its quorum queues unsynced (rabbitmq/ra, pull request 443).
A queue that was made less than about three seconds before its server is killed may come back as one without a leader,
which can be declared and deleted, and does nothing else. What was in it is lost. All that a client could do about it is
to wait for three seconds with the first message for each queue and each delay, which we do not.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, cast

from aiormq.exceptions import ChannelNotFoundEntity, DeliveryError
from pamqp.commands import Basic

from sagaloom.errors import BackendUnavailable, MessageRejected, QueueFull
from sagaloom.ports.queue import QueueDepth, QueueMessage
from sagaloom.queues.rabbitmq_connection import ANSWER_SECONDS, QUORUM, RabbitMQConnection
from sagaloom.queues.rabbitmq_messages import properties_of

if TYPE_CHECKING:
    from aiormq.abc import AbstractChannel

__all__ = ["RabbitMQSender", "all_of"]

_log = logging.getLogger("sagaloom.queue")
_DELAY_MS_MAX: Final = 2**32 - 1
_HOUR_MS: Final = 3_600_000
_TAKEN_SHARE: Final = 0.8
"""Of the time for an answer: how long a delay queue may take to confirm. The rest is for another one in its place."""
_DECLARED_SECONDS: Final = 60.0
"""How long a delay queue is known to be there, without asking; much less than it lives unused."""


class RabbitMQSender(RabbitMQConnection):
    """Publishes into a queue and its delay queues, over one connection; below the broker, which consumes."""

    def __init__(self, queue: str, url: str, *, namespace: str | None, max_length: int | None) -> None:
        super().__init__(queue, url, namespace=namespace)
        self._max_length = max_length
        self._turns: dict[int, int] = {}
        """How many queues for a delay took nothing in."""

    async def send(self, messages: Sequence[tuple[QueueMessage, int]]) -> Sequence[bool]:
        for message, delay_ms in messages:
            if _rounded(delay_ms) > _DELAY_MS_MAX:
                raise MessageRejected(
                    f"message {message.id} for {self.name} is delayed by {delay_ms} ms, and RabbitMQ can keep at most "
                    f"{_DELAY_MS_MAX} (49 days): choose another provider, or send it later"
                )
        await self._answered(self._sent(messages))
        return [True] * len(messages)

    async def _sent(self, messages: Sequence[tuple[QueueMessage, int]]) -> None:
        if self._max_length is not None:
            await self._refuse_overflow(len(messages), self._max_length)
        await self._published([(message, 0, delay_ms) for message, delay_ms in messages])

    async def _refuse_overflow(self, count: int, most: int) -> None:
        # The broker's own limit is a soft one for quorum queues.
        depth = await self._counted()
        if depth.live + count > most:
            raise QueueFull(
                f"{self.name} is full: {count} more do not fit into max_length={most}; try again when some are done, "
                "or let it hold more"
            )

    async def _published(self, outgoing: Sequence[tuple[QueueMessage, int, int]]) -> None:
        """Publishes messages with so many attempts behind them, due after so many milliseconds; returns when all are
        confirmed."""
        channel = await self._opened()
        await all_of(
            self._publish(channel, self._base, message.body, properties_of(message, attempts))
            for message, attempts, delay_ms in outgoing
            if delay_ms <= 0
        )
        if delayed := [
            (message, attempts, _rounded(delay_ms)) for message, attempts, delay_ms in outgoing if delay_ms > 0
        ]:
            await self._delayed(delayed)

    async def _delayed(self, outgoing: Sequence[tuple[QueueMessage, int, int]]) -> None:
        """As `_published`, into delay queues. What one does not take goes into another one, until somebody stops us."""
        channel = await self._opened_for_delays()
        turns = {rounded: self._turns.get(rounded, 0) for _, _, rounded in outgoing}
        queues = {rounded: await self._declared(channel, rounded, turn) for rounded, turn in turns.items()}
        seconds = _TAKEN_SHARE * ANSWER_SECONDS
        outcomes = await asyncio.gather(
            *(
                self._publish(channel, queues[rounded], message.body, properties_of(message, attempts), seconds=seconds)
                for message, attempts, rounded in outgoing
            ),
            return_exceptions=True,
        )
        left: list[tuple[QueueMessage, int, int]] = []
        for each, outcome in zip(outgoing, outcomes, strict=True):
            if isinstance(outcome, TimeoutError):
                left.append(each)
            elif outcome is not None:
                raise outcome
        if left:
            if self._delaying is channel:
                self._delaying = None
            channel = await self._opened_for_delays()
            for rounded in {rounded for _, _, rounded in left}:
                # Only a server that answers gets here: one that does not is no reason to make more queues.
                other = await self._declared(channel, rounded, turns[rounded] + 1)
                self._turns[rounded] = turns[rounded] + 1
                _log.warning(
                    "%s: queue %r took nothing in for %g s, %r is used in its place: if that goes on, delete it; the "
                    "server was probably killed right after it was made",
                    *(self.name, queues[rounded], seconds, other),
                )
            await self._delayed(left)

    async def _opened_for_delays(self) -> AbstractChannel:
        await self._opened()
        async with self._connecting:
            channel = self._delaying
            if channel is None or channel.is_closed:
                if self._connection is None:
                    raise ConnectionError("the connection broke")
                channel = self._delaying = await self._connection.channel(publisher_confirms=True)
            return channel

    async def _publish(
        self,
        channel: AbstractChannel,
        queue: str,
        body: bytes,
        properties: Basic.Properties,
        *,
        seconds: float | None = None,
    ) -> None:
        try:
            # Without waiting until it has left: that would be one after the other. What counts is the confirmation.
            publish = cast("Callable[..., Awaitable[object]]", channel.basic_publish)
            await publish(body, routing_key=queue, properties=properties, mandatory=True, wait=False, timeout=seconds)
        except DeliveryError as error:
            raise BackendUnavailable(
                f"{self.name} did not take message {properties.message_id}: {error!r:.200}"
            ) from error

    async def _declared(self, channel: AbstractChannel, rounded: int, turn: int) -> str:
        """The queue for a delay, and there it is."""
        name = f"{self._base}.delay.{rounded}" + (f".{turn}" if turn else "")
        now = time.monotonic()
        if now - self._delays.get(name, -1e9) > _DECLARED_SECONDS:
            arguments: dict[str, Any] = {
                **QUORUM,
                "x-message-ttl": rounded,
                "x-expires": min(rounded + _HOUR_MS, _DELAY_MS_MAX),
                "x-dead-letter-exchange": "",
                "x-dead-letter-routing-key": self._base,
                "x-dead-letter-strategy": "at-least-once",
                "x-overflow": "reject-publish",
            }
            await channel.queue_declare(name, durable=True, arguments=arguments)
            self._delays[name] = now
        return name

    async def depth(self) -> QueueDepth:
        return await self._answered(self._counted())

    async def _counted(self) -> QueueDepth:
        channel = await self._opened()

        async def count(name: str) -> int:
            declared = await channel.queue_declare(name, passive=True)
            return declared.message_count or 0

        delayed = 0
        for name in list(self._delays):
            with contextlib.suppress(ChannelNotFoundEntity):
                delayed += await count(name)
        leased = len(self._held) + len(self._arrived)
        return QueueDepth(await count(self._base), delayed, leased, await count(f"{self._base}.dead"))


async def all_of(publishing: Any) -> None:
    """Waits for all of them, also when one fails, so that none is left behind."""
    for outcome in await asyncio.gather(*publishing, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome


def _rounded(delay_ms: int) -> int:
    """`delay_ms`, rounded up by at most a sixty-fourth."""
    step = 1 << max(0, delay_ms.bit_length() - 7)
    return -(-delay_ms // step) * step
