"""A queue in RabbitMQ (3.10 or newer, without plugins): quorum queues, publisher confirms, acknowledgements by hand.

    <queue>              the messages
    <queue>.delay.<ms>   those that become due after that time: each goes to <queue> when it expires
    <queue>.dead         dead letters

How it works:

- A message is sent when the broker has confirmed it, which for a quorum queue is after it was written to disk.
- The lease is the connection: a consumer that dies, or says nothing for two heartbeats, loses its messages at once.
  Quorum queues count how often that happened (`x-delivery-count`); the attempts before are in a header of ours.
- What is retried, released or buried is published anew, and acknowledged in its old place once that is confirmed. A
  connection that is cut between the two leaves a message twice, under one id. None is lost.
- A delay is the time that all messages of one queue live, for messages of different delays in one queue would wait for
  each other. So that there are not too many of these, a delay is rounded up by at most a sixty-fourth. A delay queue
  goes when it was not used for an hour longer than its delay.
- A delay queue that takes nothing in is left alone: its messages go to `<queue>.delay.<ms>.1` from then on, and so
  forth. Publishing to it holds up the channel for good, so delays have a channel of their own.

Where that comes from: RabbitMQ before 4.0 keeps the list of its quorum queues unsynced (rabbitmq/ra, pull request 443).
A queue that was made less than about three seconds before its server is killed may come back as one without a leader,
which can be declared and deleted, and does nothing else. What was in it is lost. All that a client could do about it is
to wait for three seconds with the first message for each queue and each delay, which we do not.

What we dislike about it: the broker can neither deduplicate nor keep an order by key, tells nobody how much others are
working on, and shows dead letters only by handing them out and taking them back. And a message that is retried takes
its place at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import ssl
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn, Protocol, TypeVar, cast
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import aiormq
import msgspec
from aiormq.connection import TCPTransportFactory, TLSTransportFactory, TransportFactory
from aiormq.exceptions import (
    AMQPError,
    AuthenticationError,
    ChannelAccessRefused,
    ChannelNotFoundEntity,
    ChannelPreconditionFailed,
    ConnectionNotAllowed,
    DeliveryError,
    ProbableAuthenticationError,
)
from pamqp.commands import Basic

from sagaloom.errors import BackendUnavailable, ConfigurationError, MessageRejected, QueueFull
from sagaloom.ids import derived_id
from sagaloom.outbound import without_credentials
from sagaloom.ports.queue import (
    Acked,
    Buried,
    Delivery,
    Exchange,
    QueueCapabilities,
    QueueDeadLetter,
    QueueDepth,
    QueueMessage,
    Released,
    Retried,
    Settlement,
    Token,
    is_reserved_header,
)
from sagaloom.queues.patience import causes, within
from sagaloom.queues.rows import micros, moment

if TYPE_CHECKING:
    from aiormq.abc import AbstractChannel, AbstractConnection, DeliveredMessage
    from yarl import URL

__all__ = ["RabbitMQQueueBroker"]

T = TypeVar("T")
_log = logging.getLogger("sagaloom.queue")
_ANSWER_SECONDS: Final = 5.0
_GOODBYE_SECONDS: Final = 2.0
"""How long we wait at the end; a broker that has not answered until then takes back what it gave us by itself."""
_DELAY_MS_MAX: Final = 2**32 - 1
_HOUR_MS: Final = 3_600_000
_TAKEN_SHARE: Final = 0.8
"""Of the time for an answer: how long a delay queue may take to confirm. The rest is for another one in its place."""
_DECLARED_SECONDS: Final = 60.0
"""How long a delay queue is known to be there, without asking; much less than it lives unused."""
_LETTERS_MAX: Final = 10_000
_LETTERS_SECONDS: Final = 60.0
"""How long all of them may take."""
_QUIET_SECONDS: Final = 2.0
"""When none has come for so long, there are no more."""
_BATCH_MAX: Final = 1_000
_ATTEMPTS: Final = "sagaloom-attempts"
_ENQUEUED: Final = "sagaloom-enqueued"
_LETTER: Final = "sagaloom-letter"
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
_TROUBLE: Final = (AMQPError, OSError, TimeoutError, RuntimeError, asyncio.InvalidStateError)
# Much more than attempts there can be: newer servers drop a message silently after 20 deliveries otherwise.
_QUORUM: Final[Mapping[str, Any]] = {"x-queue-type": "quorum", "x-delivery-limit": 1_000_000}
_LONG_ID: Final = "sagaloom-id"
"""The id of a message that is longer than AMQP has room for."""
_ID_BYTES_MAX: Final = 255


class _Letter(msgspec.Struct, frozen=True):
    """What is written beside a dead letter."""

    attempt: int
    reason: str
    failed: int
    error_code: str | None = None
    error_message: str | None = None
    traceback: str | None = None


_letter: Final = msgspec.json.Decoder(_Letter).decode


class _Lease(NamedTuple):
    """A token: which channel a message came by, and under which number."""

    channel: int
    tag: int


class RabbitMQQueueBroker:
    """One queue at a RabbitMQ server. Made by `connect`."""

    def __init__(self, queue: str, url: str, *, namespace: str | None, max_length: int | None) -> None:
        self._queue = queue
        self._base = queue if namespace is None else f"{namespace}.{queue}"
        self._url = url
        self._address = without_credentials(url)
        self._max_length = max_length
        self._connecting = asyncio.Lock()
        self._connection: AbstractConnection | None = None
        self._wire: _Wire | None = None
        self._channel: AbstractChannel | None = None
        self._delaying: AbstractChannel | None = None
        """For publishing into delay queues."""
        self._delays: dict[str, float] = {}
        """Delay queues, and when they were last declared."""
        self._turns: dict[int, int] = {}
        """How many queues for a delay took nothing in."""
        self._consuming: AbstractChannel | None = None
        self._consumer_tag: str | None = None
        """Under which the broker pushes messages to us, until we have enough of it."""
        self._generation = 0
        self._prefetch = 0
        self._on_arrival: Callable[[], None] | None = None
        self._arrived: deque[DeliveredMessage] = deque()
        self._held: dict[int, DeliveredMessage] = {}
        """What was handed to the listener, by tag, in the order in which it came."""

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
    def name(self) -> str:
        return f"rabbitmq queue {self._queue!r} at {self._address.partition('?')[0]}"

    @property
    def queue(self) -> str:
        return self._queue

    @property
    def capabilities(self) -> QueueCapabilities:
        return _CAPABILITIES

    # -- connecting -----------------------------------------------------------------------------------------------

    async def _opened(self) -> AbstractChannel:
        """The channel for publishing, over a connection that stands."""
        async with self._connecting:
            channel = self._channel
            if channel is not None and not channel.is_closed:
                return channel
            if self._connection is None or self._connection.is_closed:
                _cut(self._wire)
                self._wire = _Wire(TLSTransportFactory() if self._url.startswith("amqps:") else TCPTransportFactory())
                self._connection = await aiormq.connect(self._url, transport_factory=self._wire)
                _when_closed(self._connection, self._call)
                self._delays.clear()
            channel = await self._connection.channel(publisher_confirms=True)
            for name in (self._base, f"{self._base}.dead"):
                await channel.queue_declare(name, durable=True, arguments=dict(_QUORUM))
            self._channel = channel
            return channel

    def _call(self) -> None:
        if self._on_arrival is not None:
            self._on_arrival()

    async def close(self) -> None:
        self._on_arrival = None
        await self._let_go(_GOODBYE_SECONDS)

    async def delete(self) -> None:
        """Removes the queue, with everything that is in it and its dead letters."""
        await self.end()
        await self._answered(self._deleted())

    async def _deleted(self) -> None:
        channel = await self._opened()
        for name in (self._base, f"{self._base}.dead", *self._delays):
            await channel.queue_delete(name)
        self._delays.clear()

    # -- sending --------------------------------------------------------------------------------------------------

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
        await _all(
            self._publish(channel, self._base, message.body, _properties(message, attempts))
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
        seconds = _TAKEN_SHARE * _ANSWER_SECONDS
        outcomes = await asyncio.gather(
            *(
                self._publish(channel, queues[rounded], message.body, _properties(message, attempts), seconds=seconds)
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
                **_QUORUM,
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
        _when_closed(channel, self._call)
        # It pushes no more to us when the queue was deleted, or lost its leader; the next one is another connection's.
        wire = self._wire
        channel.on_consumer_cancel_callbacks.add(lambda _: _cut(wire))
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
            with contextlib.suppress(*_TROUBLE, BackendUnavailable):
                await within(_GOODBYE_SECONDS, self._left(channel))
        self._consuming = None
        self._arrived.clear()
        self._held.clear()
        self._generation += 1

    async def _left(self, channel: AbstractChannel) -> None:
        await self._take_no_more(channel)
        # What was pushed to us and never handed out shall not count as an attempt.
        idle = [cast("int", delivered.delivery_tag) for delivered in self._arrived]
        await self._published([(_message_of(each), _attempts(each), 0) for each in self._arrived])
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
            deliveries.append(Delivery(_message_of(delivered), _attempts(delivered) + 1, _Lease(self._generation, tag)))
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
                    again.append((_message_of(delivered), _attempts(delivered) + 1, delay_ms))
                case Released():
                    again.append((_message_of(delivered), _attempts(delivered), 0))
                case Buried(_, letter):
                    letters.append(letter)
                case Acked():
                    pass
        if again:
            await self._published(again)
        if letters:
            channel = await self._opened()
            await _all(
                self._publish(channel, f"{self._base}.dead", letter.message.body, _letter_properties(letter))
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

    # -- looking --------------------------------------------------------------------------------------------------

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
        channel, count = await within(_ANSWER_SECONDS, self._opened_for_letters())
        found: dict[int, QueueDeadLetter] = {}
        are_there = asyncio.Event()

        async def took(delivered: DeliveredMessage) -> None:
            found[cast("int", delivered.delivery_tag)] = _letter_of(self._queue, delivered)
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

    # -- trouble --------------------------------------------------------------------------------------------------

    async def _answered(self, work: Coroutine[Any, Any, T], *, seconds: float | None = None) -> T:
        """What `work` returns. The broker has a few seconds for it; what goes wrong is said in our words."""
        try:
            return await within(seconds or _ANSWER_SECONDS, work)
        except _TROUBLE as error:
            await self._drop()
            self._fail(error)
        except asyncio.CancelledError:
            # Whatever was cut off in the middle may still be under way on this connection.
            await self._drop()
            raise

    async def _drop(self) -> None:
        """Lets go of a connection that is broken, or may be."""
        self._arrived.clear()
        self._held.clear()
        self._generation += 1
        await self._let_go(0.5)

    async def _let_go(self, seconds: float) -> None:
        """Ends the connection, with a goodbye if that takes no longer than so."""
        # Both at once: whoever connects anew meanwhile keeps what is his.
        connection, wire = self._connection, self._wire
        self._connection = self._wire = None
        self._channel = self._delaying = self._consuming = None
        try:
            if connection is not None:
                with contextlib.suppress(*_TROUBLE):
                    await within(seconds, connection.close())
        finally:
            _cut(wire)

    def _fail(self, error: BaseException) -> NoReturn:
        for cause in causes(error):
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise ConfigurationError(
                    f"{self.name}: its certificate cannot be verified ({cause.verify_message}): have its authority "
                    "trusted (?cafile=FILE), or use the name that the certificate is for"
                ) from error
        if isinstance(
            error, (AuthenticationError, ProbableAuthenticationError, ConnectionNotAllowed, ChannelAccessRefused)
        ):
            raise ConfigurationError(
                f"{self.name} does not let us in ({error}): set user, password and virtual host in the URL, and the "
                "rights of that user"
            ) from error
        if isinstance(error, ChannelPreconditionFailed):
            raise ConfigurationError(
                f"{self.name}: a queue of that name is there, and is none of ours ({error}): choose another name or "
                "virtual host, or delete it"
            ) from error
        text = str(error) or f"no answer within {_ANSWER_SECONDS:g} s"
        raise BackendUnavailable(f"{self.name} does not answer: {type(error).__name__}: {text:.300}") from error


class _Wire(TransportFactory):
    """Makes a connection, and knows it."""

    def __init__(self, factory: TransportFactory) -> None:
        self._factory = factory
        self.writer: asyncio.StreamWriter | None = None

    async def create(self, url: URL, **options: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, self.writer = await self._factory.create(url, **options)
        return reader, self.writer


def _cut(wire: _Wire | None) -> None:
    """Ends a connection under the driver, whose tasks end with it and otherwise wait for the server's goodbye."""
    if wire is not None and wire.writer is not None:
        wire.writer.transport.abort()


class _Closing(Protocol):
    @property
    def closing(self) -> asyncio.Future[Any]: ...


def _when_closed(thing: _Closing, call: Callable[[], None]) -> None:
    thing.closing.add_done_callback(lambda _: call())


async def _all(publishing: Any) -> None:
    """Waits for all of them, also when one fails, so that none is left behind."""
    for outcome in await asyncio.gather(*publishing, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome


def _rounded(delay_ms: int) -> int:
    """`delay_ms`, rounded up by at most a sixty-fourth."""
    step = 1 << max(0, delay_ms.bit_length() - 7)
    return -(-delay_ms // step) * step


def _properties(message: QueueMessage, attempts: int) -> Basic.Properties:
    headers: dict[str, Any] = {
        **message.headers,
        _ENQUEUED: micros(message.enqueued_at),
        _ATTEMPTS: attempts,
    }
    message_id = message.id
    if len(message_id.encode()) > _ID_BYTES_MAX:
        headers[_LONG_ID] = message_id
        message_id = derived_id("long-", message_id)
    return Basic.Properties(content_type="application/json", delivery_mode=2, message_id=message_id, headers=headers)


def _letter_properties(letter: QueueDeadLetter) -> Basic.Properties:
    properties = _properties(letter.message, letter.attempt)
    assert properties.headers is not None
    beside = _Letter(
        letter.attempt,
        letter.reason,
        micros(letter.failed_at),
        letter.error_code,
        letter.error_message,
        letter.traceback,
    )
    properties.headers[_LETTER] = msgspec.json.encode(beside).decode()
    return properties


def _headers(delivered: DeliveredMessage) -> dict[str, Any]:
    return cast("dict[str, Any]", delivered.header.properties.headers or {})


def _attempts(delivered: DeliveredMessage) -> int:
    """How often it was handed out before this time."""
    headers = _headers(delivered)
    before, lost = headers.get(_ATTEMPTS, 0), headers.get("x-delivery-count", 0)
    return (before if isinstance(before, int) else 0) + (lost if isinstance(lost, int) else 0)


def _message_of(delivered: DeliveredMessage) -> QueueMessage:
    """The message; one that somebody else has published gets an id that depends on what it is."""
    properties, headers = delivered.header.properties, _headers(delivered)
    enqueued = headers.get(_ENQUEUED)
    if not isinstance(enqueued, int):
        enqueued = micros(properties.timestamp) if properties.timestamp is not None else 0
    return QueueMessage(
        id=str(headers.get(_LONG_ID) or properties.message_id or derived_id("amqp-", delivered.body.hex(), enqueued)),
        body=delivered.body,
        enqueued_at=moment(enqueued),
        headers={
            name: value if isinstance(value, str) else str(value)
            for name, value in headers.items()
            if not is_reserved_header(name)
        },
    )


def _letter_of(queue: str, delivered: DeliveredMessage) -> QueueDeadLetter:
    message = _message_of(delivered)
    try:
        beside = _letter(str(_headers(delivered).get(_LETTER, "")))
    except msgspec.MsgspecError:
        # Somebody else has put it there.
        beside = _Letter(_attempts(delivered), "rejected", micros(message.enqueued_at))
    return QueueDeadLetter(
        message=message,
        queue=queue,
        attempt=beside.attempt,
        reason=cast("Any", beside.reason),
        failed_at=moment(beside.failed),
        error_code=beside.error_code,
        error_message=beside.error_message,
        traceback=beside.traceback,
    )
