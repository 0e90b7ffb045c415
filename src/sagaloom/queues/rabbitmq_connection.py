"""The connection of one queue to a RabbitMQ server: made when it is needed, dropped when it may be broken.

- It stands or falls as a whole. Whatever goes wrong with it, or takes longer than it may, ends it, and what it had
  brought here is forgotten: the server gives that to somebody else, or to us again. The next call makes another one.
- The channels that messages come by are numbered by a generation, for a tag of one channel may be that of another
  message on the next one.
- The driver waits for the goodbye of the server when a connection ends. A server that does not answer would keep us, so
  the wire is cut under it.
- What went wrong is said in our words: `ConfigurationError` for what only people can change, else `BackendUnavailable`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol, TypeVar

import aiormq
from aiormq.connection import TCPTransportFactory, TLSTransportFactory, TransportFactory
from aiormq.exceptions import (
    AMQPError,
    AuthenticationError,
    ChannelAccessRefused,
    ChannelPreconditionFailed,
    ConnectionNotAllowed,
    ProbableAuthenticationError,
)

from sagaloom.errors import BackendUnavailable, ConfigurationError
from sagaloom.outbound import without_credentials
from sagaloom.queues.patience import causes, within

if TYPE_CHECKING:
    from aiormq.abc import AbstractChannel, AbstractConnection, DeliveredMessage
    from yarl import URL

__all__ = ["ANSWER_SECONDS", "GOODBYE_SECONDS", "QUORUM", "TROUBLE", "RabbitMQConnection", "cut", "when_closed"]

T = TypeVar("T")
ANSWER_SECONDS: Final = 5.0
GOODBYE_SECONDS: Final = 2.0
"""How long we wait at the end; a broker that has not answered until then takes back what it gave us by itself."""
TROUBLE: Final = (AMQPError, OSError, TimeoutError, RuntimeError, asyncio.InvalidStateError)
# Much more than attempts there can be: newer servers drop a message silently after 20 deliveries otherwise.
QUORUM: Final[Mapping[str, Any]] = {"x-queue-type": "quorum", "x-delivery-limit": 1_000_000}


class RabbitMQConnection:
    """What a broker needs of its connection."""

    def __init__(self, queue: str, url: str, *, namespace: str | None) -> None:
        self._queue = queue
        self._base = queue if namespace is None else f"{namespace}.{queue}"
        self._url = url
        self._address = without_credentials(url)
        self._connecting = asyncio.Lock()
        self._connection: AbstractConnection | None = None
        self._wire: Wire | None = None
        self._channel: AbstractChannel | None = None
        self._delaying: AbstractChannel | None = None
        """For publishing into delay queues."""
        self._delays: dict[str, float] = {}
        """Delay queues, and when they were last declared."""
        self._consuming: AbstractChannel | None = None
        self._generation: int = 0
        self._on_arrival: Callable[[], None] | None = None
        self._arrived: deque[DeliveredMessage] = deque()
        self._held: dict[int, DeliveredMessage] = {}
        """What was handed to the listener, by tag, in the order in which it came."""

    @property
    def name(self) -> str:
        return f"rabbitmq queue {self._queue!r} at {self._address.partition('?')[0]}"

    @property
    def queue(self) -> str:
        return self._queue

    async def _opened(self) -> AbstractChannel:
        """The channel for publishing, over a connection that stands."""
        async with self._connecting:
            channel = self._channel
            if channel is not None and not channel.is_closed:
                return channel
            if self._connection is None or self._connection.is_closed:
                cut(self._wire)
                self._wire = Wire(TLSTransportFactory() if self._url.startswith("amqps:") else TCPTransportFactory())
                self._connection = await aiormq.connect(self._url, transport_factory=self._wire)
                when_closed(self._connection, self._call)
                self._delays.clear()
            channel = await self._connection.channel(publisher_confirms=True)
            for name in (self._base, f"{self._base}.dead"):
                await channel.queue_declare(name, durable=True, arguments=dict(QUORUM))
            self._channel = channel
            return channel

    def _call(self) -> None:
        if self._on_arrival is not None:
            self._on_arrival()

    async def close(self) -> None:
        self._on_arrival = None
        await self._let_go(GOODBYE_SECONDS)

    async def _answered(self, work: Coroutine[Any, Any, T], *, seconds: float | None = None) -> T:
        """What `work` returns. The broker has a few seconds for it; what goes wrong is said in our words."""
        try:
            return await within(seconds or ANSWER_SECONDS, work)
        except TROUBLE as error:
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
                with contextlib.suppress(*TROUBLE):
                    await within(seconds, connection.close())
        finally:
            cut(wire)

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
        text = str(error) or f"no answer within {ANSWER_SECONDS:g} s"
        raise BackendUnavailable(f"{self.name} does not answer: {type(error).__name__}: {text:.300}") from error


class Wire(TransportFactory):
    """Makes a connection, and knows it."""

    def __init__(self, factory: TransportFactory) -> None:
        self._factory = factory
        self.writer: asyncio.StreamWriter | None = None

    async def create(self, url: URL, **options: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, self.writer = await self._factory.create(url, **options)
        return reader, self.writer


def cut(wire: Wire | None) -> None:
    """Ends a connection under the driver, whose tasks end with it and otherwise wait for the server's goodbye."""
    if wire is not None and wire.writer is not None:
        wire.writer.transport.abort()


class _Closing(Protocol):
    @property
    def closing(self) -> asyncio.Future[Any]: ...


def when_closed(thing: _Closing, call: Callable[[], None]) -> None:
    thing.closing.add_done_callback(lambda _: call())
