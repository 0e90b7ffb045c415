"""A queue in Redis (7.0 or newer, or Valkey).

Everything that changes something is one script (`redis_scripts`), and time is the server's. A consumer that finds
nothing waits for a token in the list `wake`; whoever puts something there that could be taken leaves one, and so does a
consumer that has left something over. A token that is lost costs a few seconds: then consumers look by themselves.

How much of what was sent survives the server's own death is the server's affair: with `appendonly yes` and `appendfsync
always` all of it, with `everysec` all but a second. It is asked, and told in the capabilities and in the log.

What we dislike about it: one script works on one queue in one node; a queue cannot be spread over a cluster, though
queues can. And all messages live in memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import ssl
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple, NoReturn, cast

import msgspec
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    RedisError,
    ResponseError,
)

from sagaloom.errors import BackendUnavailable, ConfigurationError, QueueFull, SagasError
from sagaloom.outbound import without_credentials
from sagaloom.ports.queue import (
    PRIORITY_MAX,
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
)
from sagaloom.queues import redis_scripts
from sagaloom.queues.patience import causes, end, within
from sagaloom.queues.rows import (
    decode_letter,
    decode_message,
    encode,
    letter_of,
    message_of,
    read,
    row_of,
    row_of_letter,
)

__all__ = ["RedisQueueBroker"]

_log = logging.getLogger("sagaloom.queue")
_ANSWER_SECONDS: Final = 5.0
_GOODBYE_SECONDS: Final = 2.0
_WAIT_SECONDS: Final = 4
_BATCH_MAX: Final = 1_000
_OLDEST: Final = 7


class _Lease(NamedTuple):
    n: int
    epoch: int


class RedisQueueBroker:
    """One queue at a Redis server. Made by `connect`."""

    def __init__(
        self,
        queue: str,
        client: Redis,
        *,
        address: str,
        namespace: str,
        deduplication_seconds: float,
        max_length: int | None,
    ) -> None:
        self._queue = queue
        self._client = client
        self._address = address
        # In braces: all keys of a queue are in one slot of a cluster.
        self._prefix = f"{namespace}:queue:{{{queue}}}:"
        self._deduplication_ms = round(deduplication_seconds * 1000)
        self._max_length = max_length
        self._lease_ms = 0
        self._hungry = asyncio.Event()
        self._waiter: asyncio.Task[None] | None = None
        self._capabilities = QueueCapabilities(
            durability="", delay="", leases="renewed", priority=False, deduplication=False, order_by_key=False,
            atomic_batches=False,
        )  # fmt: skip

    @classmethod
    async def connect(
        cls,
        queue: str,
        url: str,
        *,
        namespace: str = "sagaloom",
        deduplication_seconds: float = 300.0,
        max_length: int | None = None,
    ) -> RedisQueueBroker:
        """Connects, and finds out what the server is. A certificate (`rediss://`) is verified."""
        try:
            from_url = cast("Callable[..., Redis]", Redis.from_url)  # pyright: ignore[reportUnknownMemberType]
            client = from_url(
                url,
                socket_timeout=_ANSWER_SECONDS + _WAIT_SECONDS,
                socket_connect_timeout=_ANSWER_SECONDS,
                # Never by itself: a script that was sent twice may have worked twice.
                retry=Retry(NoBackoff(), 0),
                protocol=2,
            )
        except ValueError as error:
            raise ConfigurationError(f"the Redis URL {without_credentials(url)!r:.120} is none: {error}") from error
        broker = cls(
            queue,
            client,
            address=without_credentials(url),
            namespace=namespace,
            deduplication_seconds=deduplication_seconds,
            max_length=max_length,
        )
        try:
            await broker._introduce()
        except BaseException:
            await client.aclose()
            raise
        return broker

    async def _introduce(self) -> None:
        info = cast("dict[str, Any]", await self._asked("INFO", "server"))
        version = str(info.get("redis_version", "0"))
        if int(version.partition(".")[0]) < _OLDEST:
            raise ConfigurationError(f"{self.name}: the server is Redis {version}, queues need {_OLDEST}.0 or newer")
        kept = "as much as its configuration says, which it does not tell us"
        with contextlib.suppress(SagasError):  # CONFIG is often forbidden.
            flat = cast("list[bytes]", await self._asked("CONFIG", "GET", "append*"))
            found = dict(zip(flat[::2], flat[1::2], strict=True))
            only, sync = (found.get(name, b"?").decode() for name in (b"appendonly", b"appendfsync"))
            kept = f"as much as appendonly={only} appendfsync={sync} keeps"
            if (only, sync) != ("yes", "always"):
                _log.warning("%s: when the server dies it keeps %s of what was sent", self.name, kept)
        self._capabilities = QueueCapabilities(
            durability=f"the death of every client; of the death of the server {kept}",
            delay="to the millisecond, by the clock of the server",
            leases="renewed",
            priority=True,
            deduplication=True,
            order_by_key=True,
            atomic_batches=True,
        )

    @property
    def name(self) -> str:
        return f"redis queue {self._queue!r} at {self._address}"

    @property
    def queue(self) -> str:
        return self._queue

    @property
    def capabilities(self) -> QueueCapabilities:
        return self._capabilities

    # -- sending --------------------------------------------------------------------------------------------------

    async def send(self, messages: Sequence[tuple[QueueMessage, int]]) -> Sequence[bool]:
        arguments: list[bytes | str | int] = [self._max_length or 0, self._deduplication_ms]
        for message, delay_ms in messages:
            hashed = "" if message.deduplication_id is None else _hash(message.deduplication_id)
            rank = PRIORITY_MAX - message.priority
            arguments += (encode(row_of(message)), rank, delay_ms, message.key or "", hashed)
        stored = cast("list[int]", await self._run(_SEND, arguments))
        return [each == 1 for each in stored]

    # -- consuming ------------------------------------------------------------------------------------------------

    async def begin(self, on_arrival: Callable[[], None], *, prefetch: int, lease_seconds: float) -> None:
        await self.end()
        await self._asked("PING")
        self._lease_ms = round(lease_seconds * 1000)
        self._hungry.clear()
        self._waiter = asyncio.create_task(self._wait(on_arrival), name=f"sagaloom-queue-wake-{self._queue}")

    async def end(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            await end(waiter)

    async def _wait(self, on_arrival: Callable[[], None]) -> None:
        while asyncio.current_task() is self._waiter:
            # Only while there is nothing to do: a token that we took while we were busy would be missed elsewhere.
            await self._hungry.wait()
            try:
                blpop = cast("Callable[..., Awaitable[object]]", self._client.blpop)  # pyright: ignore[reportUnknownMemberType]
                token = await blpop([f"{self._prefix}wake"], timeout=_WAIT_SECONDS)
            except (RedisError, OSError):
                await asyncio.sleep(0.5)  # Whoever exchanges says what is wrong.
                continue
            if token is not None:
                self._hungry.clear()
                on_arrival()

    async def exchange(self, settlements: Sequence[Settlement], *, limit: int) -> Exchange:
        if self._waiter is None:
            raise ConfigurationError(f"{self.name} is not consumed here: begin first")
        if len(settlements) > _BATCH_MAX:  # More values than a script can take at once.
            first = await self.exchange(settlements[:_BATCH_MAX], limit=0)
            rest = await self.exchange(settlements[_BATCH_MAX:], limit=limit)
            return rest._replace(stale=[*first.stale, *rest.stale])
        arguments: list[bytes | str | int] = [min(limit, _BATCH_MAX), self._lease_ms]
        for settlement in settlements:
            arguments += _told(settlement)
        answer = await self._run(_EXCHANGE, arguments)
        stale, taken, next_ms = cast("tuple[list[Any], list[Any], int]", answer)
        deliveries = [
            Delivery(
                message_of(read(self.name, taken[at], taken[at + 3], decode_message)),
                taken[at + 2],
                _Lease(int(taken[at]), taken[at + 1]),
            )
            for at in range(0, len(taken), 4)
        ]
        if len(deliveries) < limit:
            self._hungry.set()
        else:
            self._hungry.clear()
        return Exchange(deliveries, _leases(stale), None if next_ms < 0 else next_ms / 1000)

    async def renew(self, tokens: Sequence[Token]) -> Sequence[Token]:
        arguments: list[bytes | str | int] = [self._lease_ms]
        for token in tokens:
            arguments += cast("_Lease", token)
        return _leases(cast("list[Any]", await self._run(_RENEW, arguments)))

    # -- looking --------------------------------------------------------------------------------------------------

    async def depth(self) -> QueueDepth:
        # In one step: a message that moves on meanwhile would be counted in two places, or in none.
        live, later, leased, dead = cast("list[int]", await self._run(_DEPTH, ()))
        return QueueDepth(live - later - leased, later, leased, dead)

    async def dead_letters(self, *, limit: int, after: str | None = None) -> Sequence[QueueDeadLetter]:
        first = 0
        if after is not None:
            rank = cast("int | None", await self._asked("ZRANK", f"{self._prefix}deadorder", after))
            if rank is None:
                return []
            first = rank + 1
        ids = cast("list[bytes]", await self._asked("ZRANGE", f"{self._prefix}deadorder", first, first + limit - 1))
        return await self._letters(ids)

    async def _letters(self, ids: Sequence[bytes | str]) -> list[QueueDeadLetter]:
        if not ids:
            return []
        rows = cast("list[bytes | None]", await self._asked("HMGET", f"{self._prefix}dead", *ids))
        return [
            letter_of(self._queue, read(self.name, each, row, decode_letter))
            for each, row in zip(ids, rows, strict=True)
            if row is not None
        ]

    async def redrive(self, ids: Sequence[str]) -> int:
        count = 0
        for some in _batches(list(dict.fromkeys(ids))):
            arguments: list[bytes | str | int] = []
            for letter in await self._letters(some):
                message = msgspec.structs.replace(letter.message, deduplication_id=None)
                arguments += (letter.id, encode(row_of(message)), PRIORITY_MAX - message.priority, message.key or "")
            if arguments:
                count += cast("int", await self._run(_REDRIVE, arguments))
        return count

    async def discard(self, ids: Sequence[str]) -> int:
        return sum([cast("int", await self._run(_DISCARD, some)) for some in _batches(ids)])

    async def close(self) -> None:
        await self.end()
        with contextlib.suppress(RedisError, OSError):
            await within(_GOODBYE_SECONDS, self._client.aclose())

    # -- the wire -------------------------------------------------------------------------------------------------

    async def _run(self, script: _Script, arguments: Sequence[bytes | str | int]) -> object:
        try:
            return await self._asked("EVALSHA", script.digest, 1, self._prefix, *arguments)
        except _NotLoaded:
            return await self._asked("EVAL", script.text, 1, self._prefix, *arguments)

    async def _asked(self, *command: bytes | str | int) -> object:
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                return await self._client.execute_command(*command)  # type: ignore[no-untyped-call]
        except NoScriptError:
            raise _NotLoaded from None
        except (RedisError, OSError, TimeoutError) as error:
            self._fail(error)

    def _fail(self, error: Exception) -> NoReturn:
        for cause in causes(error):
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise ConfigurationError(
                    f"{self.name}: its certificate cannot be verified ({cause.verify_message}): have its authority "
                    "trusted (?ssl_ca_certs=FILE), or use the name that the certificate is for"
                ) from error
        if isinstance(error, (AuthenticationError, AuthorizationError, NoPermissionError)):
            raise ConfigurationError(
                f"{self.name} does not let us in ({error}): set user and password in the URL, and the rights of "
                "that user"
            ) from error
        text = str(error)
        if isinstance(error, ResponseError) and redis_scripts.FULL in text:
            raise QueueFull(
                f"{self.name} is full: no more than max_length={self._max_length} messages; try again when some are "
                "done, or let it hold more"
            ) from error
        if isinstance(error, OutOfMemoryError):
            raise QueueFull(f"{self.name}: the server's memory is full ({text:.120}): try again later") from error
        if isinstance(error, TimeoutError) and not text:
            text = f"no answer within {_ANSWER_SECONDS:g} s"
        raise BackendUnavailable(f"{self.name} does not answer: {text:.300}") from error


class _NotLoaded(Exception):
    """The server does not know a script: it was started anew."""


class _Script:
    def __init__(self, text: str) -> None:
        self.text = text
        self.digest = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


_SEND: Final = _Script(redis_scripts.SEND)
_EXCHANGE: Final = _Script(redis_scripts.EXCHANGE)
_RENEW: Final = _Script(redis_scripts.RENEW)
_REDRIVE: Final = _Script(redis_scripts.REDRIVE)
_DISCARD: Final = _Script(redis_scripts.DISCARD)
_DEPTH: Final = _Script(redis_scripts.DEPTH)


def _batches(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    """`ids` in parts that a script can take."""
    return (ids[first : first + _BATCH_MAX] for first in range(0, len(ids), _BATCH_MAX))


def _told(settlement: Settlement) -> tuple[bytes | str | int, ...]:
    n, epoch = cast("_Lease", settlement.token)
    match settlement:
        case Acked():
            return "a", n, epoch, "", "", ""
        case Retried(_, delay_ms):
            return "r", n, epoch, delay_ms, "", ""
        case Released():
            return "l", n, epoch, "", "", ""
        case Buried(_, letter):
            failed_ms = round(letter.failed_at.timestamp() * 1000)
            return "b", n, epoch, letter.id, encode(row_of_letter(letter)), failed_ms


def _leases(flat: Sequence[Any]) -> list[_Lease]:
    return [_Lease(int(flat[at]), int(flat[at + 1])) for at in range(0, len(flat), 2)]


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
