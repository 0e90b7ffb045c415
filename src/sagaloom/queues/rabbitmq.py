"""A queue in RabbitMQ (3.10 or newer, without plugins): quorum queues, publisher confirms, acknowledgements by hand.

    <queue>              the messages
    <queue>.delay.<ms>   those that become due after that time: each goes to <queue> when it expires
    <queue>.dead         dead letters

How it works:

- The lease is the connection: a consumer that dies, or says nothing for two heartbeats, loses its messages at once.
  Quorum queues count how often that happened (`x-delivery-count`); the attempts before are in a header of ours.
- What is retried, released or buried is published anew, and acknowledged in its old place once that is confirmed. A
  connection that is cut between the two leaves a message twice, under one id. None is lost.
- How messages are sent and delayed is told in `sagaloom.queues.rabbitmq_sending`, how they are written in
  `sagaloom.queues.rabbitmq_messages`, and what happens to a broken connection in `sagaloom.queues.rabbitmq_connection`.

What we dislike about it: the broker can neither deduplicate nor keep an order by key, tells nobody how much others are
working on, and shows dead letters only by handing them out and taking them back. And a message that is retried takes
its place at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, cast
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from sagaloom.errors import BackendUnavailable, ConfigurationError
from sagaloom.ports.queue import (
    Acked,
    Buried,
    Delivery,
    Exchange,
    QueueCapabilities,
    QueueDeadLetter,
    QueueMessage,
    Released,
    Retried,
    Settlement,
    Token,
)
from sagaloom.queues.patience import within
from sagaloom.queues.rabbitmq_connection import ANSWER_SECONDS, GOODBYE_SECONDS, TROUBLE, cut, when_closed
from sagaloom.queues.rabbitmq_messages import attempts_of, letter_of, message_of, properties_of_letter
from sagaloom.queues.rabbitmq_sending import RabbitMQSender, all_of

if TYPE_CHECKING:
    from aiormq.abc import AbstractChannel, DeliveredMessage

__all__ = ["RabbitMQQueueBroker"]

_LETTERS_MAX: Final = 10_000
_LETTERS_SECONDS: Final = 60.0
"""How long all of them may take."""
_QUIET_SECONDS: Final = 2.0
"""When none has come for so long, there are no more."""
_BATCH_MAX: Final = 1_000
_CAPABILITIES: Final = QueueCapabilities(
    durability="the death of every client and of the server, and power loss: quorum queues, and publishers that wait; "
    "before RabbitMQ 4.0 not in the first 3 s of a queue",
    delay="late by at most a sixty-fourth of the delay, by the clock of the server; up to 49 days",
    leases="connection",
    priority=False,
    deduplication=False,
    order_by_key=False,
    atomic_batches=False,
    exact_releases=False,
    exact_depth=False,
)


class _Lease(NamedTuple):
    """A token: which channel a message came by, and under which number."""

    channel: int
    tag: int


class RabbitMQQueueBroker(RabbitMQSender):
    """One queue at a RabbitMQ server. Made by `connect`."""

    def __init__(self, queue: str, url: str, *, namespace: str | None, max_length: int | None) -> None:
        super().__init__(queue, url, namespace=namespace, max_length=max_length)
        self._consumer_tag: str | None = None
        """Under which the broker pushes messages to us, until we have enough of it."""
        self._prefetch = 0

    @classmethod
    async def connect(
        cls, queue: str, url: str, *, namespace: str | None = None, max_length: int | None = None
    ) -> RabbitMQQueueBroker:
        """Connects and declares the queues. A certificate (`amqps://`) is verified."""
        parts = urlsplit(url)
        # A consumer that is cut off without a word is noticed after two heartbeats.
        query = {"heartbeat": "10", **dict(parse_qsl(parts.query))}
        full = urlunsplit(parts._replace(query=urlencode(query), path=parts.path or "/"))
        broker = cls(queue, full, namespace=namespace, max_length=max_length)
        try:
            await broker._answered(broker._opened())
        except BaseException:
            await broker.close()
            raise
        return broker

    @property
    def capabilities(self) -> QueueCapabilities:
        return _CAPABILITIES

    async def delete(self) -> None:
        """Removes the queue, with everything that is in it and its dead letters."""
        await self.end()
        await self._answered(self._deleted())

    async def _deleted(self) -> None:
        channel = await self._opened()
        for name in (self._base, f"{self._base}.dead", *self._delays):
            await channel.queue_delete(name)
        self._delays.clear()

    # -- consuming ------------------------------------------------------------------------------------------------

    async def begin(self, on_arrival: Callable[[], None], *, prefetch: int, lease_seconds: float) -> None:
        await self.end()
        self._on_arrival = on_arrival
        self._prefetch = prefetch
        await self._answered(self._consumed())

    async def _consumed(self) -> AbstractChannel:
        """The channel that messages come by."""
        channel = self._consuming
        if channel is not None and not channel.is_closed:
            return channel
        await self._opened()
        assert self._connection is not None
        # What came by the last one is somebody else's, or comes again.
        self._consuming = None
        self._arrived.clear()
        self._held.clear()
        self._generation += 1
        channel = await self._connection.channel()
        when_closed(channel, self._call)
        # It pushes no more to us when the queue was deleted, or lost its leader; the next one is another connection's.
        wire = self._wire
        channel.on_consumer_cancel_callbacks.add(lambda _: cut(wire))
        # Quorum queues know 16 bits of it.
        await channel.basic_qos(prefetch_count=min(self._prefetch, 65_535))
        self._consuming, self._consumer_tag = channel, None
        await self._take_more(channel)
        return channel

    async def _took(self, delivered: DeliveredMessage) -> None:
        # What an earlier channel still hands on comes again, and its number may be that of another message by now.
        if delivered.channel is self._consuming:
            self._arrived.append(delivered)
            self._call()

    async def end(self) -> None:
        self._on_arrival = None
        channel = self._consuming
        if channel is not None and not channel.is_closed:
            with contextlib.suppress(*TROUBLE, BackendUnavailable):
                await within(GOODBYE_SECONDS, self._left(channel))
        self._consuming = None
        self._arrived.clear()
        self._held.clear()
        self._generation += 1

    async def _left(self, channel: AbstractChannel) -> None:
        await self._take_no_more(channel)
        # What was pushed to us and never handed out shall not count as an attempt.
        idle = [cast("int", delivered.delivery_tag) for delivered in self._arrived]
        await self._published([(message_of(each), attempts_of(each), 0) for each in self._arrived])
        for tag in idle:
            await channel.basic_ack(tag, wait=False)
        await channel.close()

    async def _take_more(self, channel: AbstractChannel) -> None:
        if self._consumer_tag is None:
            self._consumer_tag = (await channel.basic_consume(self._base, self._took)).consumer_tag

    async def _take_no_more(self, channel: AbstractChannel) -> None:
        tag, self._consumer_tag = self._consumer_tag, None
        if tag is not None:
            await channel.basic_cancel(tag)

    async def exchange(self, settlements: Sequence[Settlement], *, limit: int) -> Exchange:
        if self._on_arrival is None:
            raise ConfigurationError(f"{self.name} is not consumed here: begin first")
        stale = await self._answered(self._settled(settlements, limit))
        deliveries: list[Delivery] = []
        while self._arrived and len(deliveries) < limit:
            delivered = self._arrived.popleft()
            tag = cast("int", delivered.delivery_tag)
            self._held[tag] = delivered
            deliveries.append(
                Delivery(message_of(delivered), attempts_of(delivered) + 1, _Lease(self._generation, tag))
            )
        return Exchange(deliveries, stale)

    async def _settled(self, settlements: Sequence[Settlement], limit: int) -> list[Token]:
        """Has more pushed to us, if there is room, and says what became of messages; returns what came too late."""
        channel = await self._consumed()
        if limit > 0:
            await self._take_more(channel)
        stale = [each.token for each in settlements if not self._is_held(each.token)]
        current = [each for each in settlements if self._is_held(each.token)]
        if any(isinstance(each, Released) for each in current):
            # The listener is about to end: what it gives back must not come to it again.
            await self._take_no_more(channel)
        if current:
            await self._moved(current)
            await self._acknowledge(channel, [cast("_Lease", each.token).tag for each in current])
        return stale

    def _is_held(self, token: Token) -> bool:
        channel, tag = cast("_Lease", token)
        return channel == self._generation and tag in self._held

    async def _moved(self, settlements: Sequence[Settlement]) -> None:
        """Publishes in their new places what is not simply done."""
        again: list[tuple[QueueMessage, int, int]] = []
        letters: list[QueueDeadLetter] = []
        for settlement in settlements:
            delivered = self._held[cast("_Lease", settlement.token).tag]
            match settlement:
                case Retried(_, delay_ms):
                    again.append((message_of(delivered), attempts_of(delivered) + 1, delay_ms))
                case Released():
                    again.append((message_of(delivered), attempts_of(delivered), 0))
                case Buried(_, letter):
                    letters.append(letter)
                case Acked():
                    pass
        if again:
            await self._published(again)
        if letters:
            channel = await self._opened()
            await all_of(
                self._publish(channel, f"{self._base}.dead", letter.message.body, properties_of_letter(letter))
                for letter in letters
            )

    async def _acknowledge(self, channel: AbstractChannel, tags: Sequence[int]) -> None:
        done = set(tags)
        # One word for all that lies before the first one that is not done.
        up_to = 0
        for tag in self._held:
            if tag not in done:
                break
            up_to = tag
        if up_to:
            await channel.basic_ack(up_to, multiple=True, wait=False)
        for tag in tags:
            if tag > up_to:
                await channel.basic_ack(tag, wait=False)
            del self._held[tag]

    async def renew(self, tokens: Sequence[Token]) -> Sequence[Token]:
        return [token for token in tokens if not self._is_held(token)]

    # -- dead letters ---------------------------------------------------------------------------------------------

    async def dead_letters(self, *, limit: int, after: str | None = None) -> Sequence[QueueDeadLetter]:
        letters = await self._answered(self._seen(), seconds=_LETTERS_SECONDS)
        ids = [letter.id for letter in letters]
        if after is not None:
            letters = letters[ids.index(after) + 1 :] if after in ids else []
        return letters[:limit]

    async def _seen(self) -> list[QueueDeadLetter]:
        channel, found = await self._dug_up()
        await channel.close()  # which puts all of them back
        await self._counts(len(found))
        letters: dict[str, QueueDeadLetter] = {}
        for letter in sorted(found.values(), key=lambda letter: (letter.failed_at, letter.id)):
            letters.setdefault(letter.id, letter)  # What was sent twice under one id is one letter.
        return list(letters.values())

    async def _dug_up(self) -> tuple[AbstractChannel, dict[int, QueueDeadLetter]]:
        """All dead letters, by tag, and the channel that holds them."""
        channel, count = await within(ANSWER_SECONDS, self._opened_for_letters())
        found: dict[int, QueueDeadLetter] = {}
        are_there = asyncio.Event()

        async def took(delivered: DeliveredMessage) -> None:
            found[cast("int", delivered.delivery_tag)] = letter_of(self._queue, delivered)
            if len(found) >= count:
                are_there.set()

        if count:
            # Pushed to us, since asking for each takes a round trip.
            consuming = await channel.basic_consume(f"{self._base}.dead", took)
            before = -1
            while not are_there.is_set() and len(found) > before:  # Somebody else may be looking at some of them.
                before = len(found)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(are_there.wait(), _QUIET_SECONDS)
            await channel.basic_cancel(cast("str", consuming.consumer_tag))
        return channel, dict(sorted(found.items()))

    async def _opened_for_letters(self) -> tuple[AbstractChannel, int]:
        """A channel for all dead letters, and how many there are."""
        await self._opened()
        assert self._connection is not None
        channel = await self._connection.channel()
        await channel.basic_qos(prefetch_count=_LETTERS_MAX)
        declared = await channel.queue_declare(f"{self._base}.dead", passive=True)
        return channel, min(declared.message_count or 0, _LETTERS_MAX)

    async def _counts(self, count: int) -> bool:
        """Waits until the server says that there are so many dead letters, which it does a moment after it was told;
        False when it does not, since somebody else adds some, or looks at them."""
        until = time.monotonic() + _QUIET_SECONDS
        while time.monotonic() < until:
            channel = await self._opened()
            if (await channel.queue_declare(f"{self._base}.dead", passive=True)).message_count == count:
                return True
            await asyncio.sleep(0.01)
        return False

    async def redrive(self, ids: Sequence[str]) -> int:
        return await self._answered(self._removed(set(ids), redriven=True), seconds=_LETTERS_SECONDS)

    async def discard(self, ids: Sequence[str]) -> int:
        return await self._answered(self._removed(set(ids), redriven=False), seconds=_LETTERS_SECONDS)

    async def _removed(self, ids: set[str], *, redriven: bool) -> int:
        removed: set[str] = set()
        is_done = False
        while not is_done:
            channel, found = await self._dug_up()
            chosen = {tag: letter for tag, letter in found.items() if letter.id in ids}
            if redriven:
                again = list(
                    {letter.id: letter.message for letter in chosen.values() if letter.id not in removed}.values()
                )
                for first in range(0, len(again), _BATCH_MAX):
                    await self._published([(message, 0, 0) for message in again[first : first + _BATCH_MAX]])
            removed.update(letter.id for letter in chosen.values())
            # One word for each run of tags, since the server forgets some of many when the channel is closed right
            # after them. So we look again, too, unless it counts what it should.
            for is_chosen, run in itertools.groupby(found, chosen.__contains__):
                *_, last = run
                if is_chosen:
                    await channel.basic_ack(last, multiple=True, wait=False)
                else:
                    await channel.basic_nack(last, multiple=True, requeue=True, wait=False)
            left = len(found) - len(chosen)
            is_settled = await self._counts(left)
            await channel.close()
            is_done = not chosen or (is_settled and await self._counts(left))
        return len(removed)
