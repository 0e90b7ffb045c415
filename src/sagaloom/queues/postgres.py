"""A queue in PostgreSQL (12 or newer): tables of its own, in a schema of its own (`postgres_schema`).

Sending and exchanging are one call of a function each, which is one statement and one commit: a client that is stopped
in the middle holds no lock. Rows are taken with `SKIP LOCKED`, so consumers do not wait for each other. Time is the
server's.

Consumers are woken by `NOTIFY`. Where that does not come through (a proxy that pools transactions), they look every few
seconds, and nothing else is lost: there is no session state.

What we dislike about it: a message is three versions of a row in its life, and the vacuum has to keep up.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import re
import ssl
from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import timedelta
from typing import Any, Final, NamedTuple, NoReturn, Protocol, TypeVar, cast
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import asyncpg  # type: ignore[import-untyped]
import msgspec

from sagaloom.errors import BackendUnavailable, ConfigurationError, QueueFull
from sagaloom.outbound import without_credentials
from sagaloom.pooling import acquired
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
from sagaloom.queues.patience import end, within
from sagaloom.queues.postgres_schema import MIGRATIONS

__all__ = ["PostgresQueueBroker"]

T = TypeVar("T")
_log = logging.getLogger("sagaloom.queue")
_ANSWER_SECONDS: Final = 5.0
_MIGRATION_SECONDS: Final = 60.0
"""Whoever comes first makes the tables, and the others wait for him."""
_GOODBYE_SECONDS: Final = 2.0
_CONNECTIONS: Final = 4
_SCHEMA: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,47}")
_to_json: Final = msgspec.json.encode
_headers_of: Final = msgspec.json.Decoder(dict[str, str]).decode

_SEND: Final = "SELECT {}.queue_send($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)"
_EXCHANGE: Final = "SELECT * FROM {}.queue_exchange($1, $2, $3, $4, $5, $6, $7, $8, $9)"
_RENEW: Final = """
    UPDATE {0}.queue_message m SET at = now() + $3 FROM unnest($1::bigint[], $2::int[]) s(n, epoch)
    WHERE m.n = s.n AND m.epoch = s.epoch AND m.state = 2 AND m.at > now() RETURNING m.n
"""
_DEPTH: Final = """
    SELECT count(*) FILTER (WHERE state IN (0, 3)), count(*) FILTER (WHERE state = 1),
        count(*) FILTER (WHERE state = 2), (SELECT count(*) FROM {0}.queue_dead_letter WHERE queue_no = $1)
    FROM {0}.queue_message WHERE queue_no = $1
"""
_LETTERS: Final = """
    SELECT * FROM {0}.queue_dead_letter d WHERE d.queue_no = $1
        AND ($2::text IS NULL OR (d.failed_at, d.id) > (
            SELECT o.failed_at, o.id FROM {0}.queue_dead_letter o WHERE o.queue_no = $1 AND o.id = $2))
    ORDER BY d.failed_at, d.id LIMIT $3
"""
_DISCARD: Final = "DELETE FROM {}.queue_dead_letter WHERE queue_no = $1 AND id = ANY ($2::text[])"

# A connection that breaks in the middle of something is, to the driver, an error of its own state now and then.
_TROUBLE: Final = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
)
_REFUSALS: Final = (
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidPasswordError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.InsufficientPrivilegeError,
)


class _Lease(NamedTuple):
    n: int
    epoch: int


class _Connection(Protocol):
    """What is used of a connection of asyncpg, which has no types of its own."""

    async def execute(self, query: str, *arguments: object) -> str: ...

    async def fetch(self, query: str, *arguments: object) -> list[Any]: ...

    async def fetchrow(self, query: str, *arguments: object) -> Sequence[Any] | None: ...

    async def fetchval(self, query: str, *arguments: object) -> Any: ...

    def transaction(self) -> AbstractAsyncContextManager[object]: ...

    async def add_listener(self, channel: str, callback: Callable[..., None]) -> None: ...

    def add_termination_listener(self, callback: Callable[[object], None]) -> None: ...

    def terminate(self) -> None: ...


class _Pool(Protocol):
    def __await__(self) -> Generator[Any, None, object]: ...

    def acquire(self, *, timeout: float) -> Awaitable[_Connection]: ...

    def release(self, connection: Any, *, timeout: float | None = None) -> Coroutine[Any, Any, None]: ...

    def close(self) -> Coroutine[Any, Any, None]: ...

    def terminate(self) -> None: ...


class PostgresQueueBroker:
    """One queue in a PostgreSQL database. Made by `connect`."""

    def __init__(
        self,
        queue: str,
        pool: _Pool,
        *,
        address: str,
        schema: str,
        deduplication_seconds: float,
        max_length: int | None,
    ) -> None:
        self._queue = queue
        self._pool = pool
        self._address = address
        self._schema = f'"{schema}"'
        self._channel = "sagaloom_" + hashlib.blake2b(f"{schema}\0{queue}".encode(), digest_size=16).hexdigest()
        self._window = timedelta(seconds=deduplication_seconds)
        self._max_length = max_length
        self._number = 0
        self._lease = timedelta(0)
        self._listener: asyncio.Task[None] | None = None
        self._durability = ""

    @classmethod
    async def connect(
        cls,
        queue: str,
        url: str,
        *,
        schema: str = "sagaloom",
        deduplication_seconds: float = 300.0,
        max_length: int | None = None,
    ) -> PostgresQueueBroker:
        """Connects, and brings the tables up to date. Certificates are verified with `?sslmode=verify-full`.
        `?statement_cache_size=0` is for proxies that pool transactions and know no prepared statements."""
        if not _SCHEMA.fullmatch(schema):
            raise ConfigurationError(
                f"namespace={schema!r:.80} is no name for a schema of PostgreSQL: 1 to 48 letters, digits, hyphens and "
                "underscores, the first of them no digit"
            )
        address = without_credentials(url)
        parts = urlsplit(url)
        query = dict(parse_qsl(parts.query))
        cached = query.pop("statement_cache_size", "100")
        dsn = urlunsplit(parts._replace(query=urlencode(query)))
        create_pool = cast("Callable[..., _Pool]", asyncpg.create_pool)  # pyright: ignore[reportUnknownMemberType]
        pool = create_pool(
            dsn,
            min_size=0,
            max_size=_CONNECTIONS,
            command_timeout=_ANSWER_SECONDS,
            timeout=_ANSWER_SECONDS,
            statement_cache_size=int(cached) if cached.isdigit() else 100,
            server_settings={"application_name": "sagaloom-queue"},
            reset=_nothing_to_reset,
        )
        broker = cls(
            queue,
            pool,
            address=address,
            schema=schema,
            deduplication_seconds=deduplication_seconds,
            max_length=max_length,
        )
        try:
            await pool  # Connects to nothing yet.
            await broker._migrate()
            await broker._introduce()
        except BaseException:
            pool.terminate()
            raise
        return broker

    async def _migrate(self) -> None:
        async def run(connection: _Connection) -> None:
            there = await connection.fetchval(f"SELECT to_regclass('{self._schema}.queue_migration')")
            if there is not None and await self._version(connection) == len(MIGRATIONS):
                return
            async with connection.transaction():
                # One at a time, whoever comes first.
                await connection.execute("SELECT pg_advisory_xact_lock(7310591)")
                await connection.execute(f"CREATE SCHEMA IF NOT EXISTS {self._schema}")
                await connection.execute(f"SET LOCAL search_path = {self._schema}, pg_temp")
                await connection.execute(
                    "CREATE TABLE IF NOT EXISTS queue_migration "
                    "(version int PRIMARY KEY, made_at timestamptz NOT NULL DEFAULT now())"
                )
                version = await self._version(connection)
                if version > len(MIGRATIONS):
                    raise ConfigurationError(
                        f"{self.name}: its tables are of version {version}, this sagaloom knows {len(MIGRATIONS)}: "
                        "upgrade sagaloom, or choose another namespace"
                    )
                for number, step in enumerate(MIGRATIONS[version:], version + 1):
                    await connection.execute(step.format(schema=self._schema))
                    await connection.execute("INSERT INTO queue_migration (version) VALUES ($1)", number)

        await self._with_connection(run, seconds=_MIGRATION_SECONDS)

    async def _version(self, connection: _Connection) -> int:
        found = await connection.fetchval(f"SELECT max(version) FROM {self._schema}.queue_migration")
        return int(found or 0)

    async def _introduce(self) -> None:
        async def run(connection: _Connection) -> tuple[int, str, str]:
            names = f"{self._schema}.queue_name"
            number = await connection.fetchval(f"SELECT queue_no FROM {names} WHERE name = $1", self._queue)
            if number is None:
                await connection.execute(
                    f"INSERT INTO {names} (name) VALUES ($1) ON CONFLICT (name) DO NOTHING", self._queue
                )
                number = await connection.fetchval(f"SELECT queue_no FROM {names} WHERE name = $1", self._queue)
            row = await connection.fetchrow("SELECT current_setting('synchronous_commit'), current_setting('fsync')")
            assert row is not None
            return int(number), str(row[0]), str(row[1])

        self._number, synchronous, fsync = await self._with_connection(run)
        self._durability = "the death of every client and of the server, and power loss: a commit is synced"
        if synchronous == "off" or fsync == "off":
            self._durability = f"the death of every client; synchronous_commit={synchronous}, fsync={fsync}"
            _log.warning("%s: what was just sent may be lost with the server: %s", self.name, self._durability)

    @property
    def name(self) -> str:
        return f"postgres queue {self._queue!r} at {self._address}"

    @property
    def queue(self) -> str:
        return self._queue

    @property
    def capabilities(self) -> QueueCapabilities:
        return QueueCapabilities(
            durability=self._durability,
            delay="to the millisecond, by the clock of the server",
            leases="renewed",
            priority=True,
            deduplication=True,
            order_by_key=True,
            atomic_batches=True,
        )

    # -- sending --------------------------------------------------------------------------------------------------

    async def send(self, messages: Sequence[tuple[QueueMessage, int]]) -> Sequence[bool]:
        only = [message for message, _ in messages]
        return cast(
            "list[bool]",
            await self._value(
                _SEND,
                *(self._number, self._channel, self._max_length, self._window),
                [message.id for message in only],
                [message.body for message in only],
                [_to_json(message.headers).decode() for message in only],
                [PRIORITY_MAX - message.priority for message in only],
                [message.key for message in only],
                [message.deduplication_id for message in only],
                [delay_ms for _, delay_ms in messages],
                [message.enqueued_at for message in only],
            ),
        )

    # -- consuming ------------------------------------------------------------------------------------------------

    async def begin(self, on_arrival: Callable[[], None], *, prefetch: int, lease_seconds: float) -> None:
        await self.end()
        await self._value("SELECT 1")
        self._lease = timedelta(seconds=lease_seconds)
        self._listener = asyncio.create_task(self._listen(on_arrival), name=f"sagaloom-queue-wake-{self._queue}")

    async def end(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            await end(listener)

    async def _listen(self, on_arrival: Callable[[], None]) -> None:
        """Holds a connection that is called by NOTIFY, and makes another one when it breaks."""
        while asyncio.current_task() is self._listener:
            with contextlib.suppress(*_TROUBLE):
                async with acquired(self._pool, timeout=_ANSWER_SECONDS) as connection:
                    await self._listen_on(connection, on_arrival)
            await asyncio.sleep(0.5)

    async def _listen_on(self, connection: _Connection, on_arrival: Callable[[], None]) -> None:
        broken = asyncio.Event()
        connection.add_termination_listener(lambda _: broken.set())
        try:
            await connection.add_listener(self._channel, lambda *_: on_arrival())
            on_arrival()  # for what came before we listened
            await broken.wait()
        finally:
            # With what it listens to; and without a goodbye, for which a server that is gone would be waited for.
            connection.terminate()

    async def exchange(self, settlements: Sequence[Settlement], *, limit: int) -> Exchange:
        if self._listener is None:
            raise ConfigurationError(f"{self.name} is not consumed here: begin first")
        leases = [cast("_Lease", settlement.token) for settlement in settlements]
        rows = await self._rows(
            _EXCHANGE,
            *(self._number, self._channel, limit, self._lease),
            [_KINDS[type(settlement)] for settlement in settlements],
            [lease.n for lease in leases],
            [lease.epoch for lease in leases],
            [settlement.delay_ms if isinstance(settlement, Retried) else 0 for settlement in settlements],
            [_letter_json(settlement) for settlement in settlements],
        )
        deliveries: list[Delivery] = []
        stale: list[Token] = []
        next_in_seconds: float | None = None
        for row in rows:
            match row[0]:
                case 1:
                    lease = _Lease(row[1], row[2])
                    deliveries.append(Delivery(_message_of(row[4:11]), row[3], lease))
                case 0:
                    stale.append(_Lease(row[1], row[2]))
                case _:
                    next_in_seconds = row[11] / 1000
        return Exchange(deliveries, stale, next_in_seconds)

    async def renew(self, tokens: Sequence[Token]) -> Sequence[Token]:
        leases = [cast("_Lease", token) for token in tokens]
        rows = await self._rows(_RENEW, [lease.n for lease in leases], [lease.epoch for lease in leases], self._lease)
        kept = {row[0] for row in rows}
        return [lease for lease in leases if lease.n not in kept]

    # -- looking --------------------------------------------------------------------------------------------------

    async def depth(self) -> QueueDepth:
        [row] = await self._rows(_DEPTH, self._number)
        return QueueDepth(*row)

    async def dead_letters(self, *, limit: int, after: str | None = None) -> Sequence[QueueDeadLetter]:
        rows = await self._rows(_LETTERS, self._number, after, limit)
        return [
            QueueDeadLetter(
                message=_message_of(
                    [row[name] for name in ("id", "body", "headers", "rank", "key", "deduplication_id", "enqueued_at")]
                ),
                queue=self._queue,
                attempt=row["attempt"],
                reason=row["reason"],
                failed_at=row["failed_at"],
                error_code=row["error_code"],
                error_message=row["error_message"],
                traceback=row["traceback"],
            )
            for row in rows
        ]

    async def redrive(self, ids: Sequence[str]) -> int:
        count = await self._value("SELECT {}.queue_redrive($1, $2, $3)", self._number, self._channel, list(ids))
        return cast("int", count)

    async def discard(self, ids: Sequence[str]) -> int:
        async def run(connection: _Connection) -> str:
            return await connection.execute(_DISCARD.format(self._schema), self._number, list(ids))

        return int((await self._with_connection(run)).rpartition(" ")[2])

    async def close(self) -> None:
        await self.end()
        with contextlib.suppress(*_TROUBLE):
            await within(_GOODBYE_SECONDS, self._pool.close())
        self._pool.terminate()

    # -- the wire -------------------------------------------------------------------------------------------------

    async def _rows(self, statement: str, *arguments: object) -> list[Any]:
        async def run(connection: _Connection) -> list[Any]:
            return await connection.fetch(statement.format(self._schema), *arguments)

        return await self._with_connection(run)

    async def _value(self, statement: str, *arguments: object) -> object:
        async def run(connection: _Connection) -> object:
            return await connection.fetchval(statement.format(self._schema), *arguments)

        return await self._with_connection(run)

    async def _with_connection(self, run: Callable[[_Connection], Awaitable[T]], *, seconds: float | None = None) -> T:
        async def ran() -> T:
            async with acquired(self._pool, timeout=_ANSWER_SECONDS) as connection:
                return await run(connection)

        try:
            # The driver has a bound of its own, and asks the server then to cancel the statement, as long once more.
            return await within(seconds or _ANSWER_SECONDS, ran())
        except _TROUBLE as error:
            self._fail(error)

    def _fail(self, error: Exception) -> NoReturn:
        if isinstance(error, ssl.SSLCertVerificationError):
            raise ConfigurationError(
                f"{self.name}: its certificate cannot be verified ({error.verify_message}): have its authority trusted "
                "(?sslrootcert=FILE), or use the name that the certificate is for"
            ) from error
        if isinstance(error, _REFUSALS):
            raise ConfigurationError(
                f"{self.name} does not let us in ({error}): set user, password and database in the URL, and grant that "
                "user what it needs"
            ) from error
        if isinstance(error, asyncpg.RaiseError) and "QUEUEFULL" in str(error):
            raise QueueFull(
                f"{self.name} is full: no more than max_length={self._max_length} messages; try again when some are "
                "done, or let it hold more"
            ) from error
        text = str(error) or f"no answer within {_ANSWER_SECONDS:g} s"
        raise BackendUnavailable(f"{self.name} does not answer: {type(error).__name__}: {text:.300}") from error


async def _nothing_to_reset(_: object) -> None:
    """Connections have no state of a session but what the one that listens drops itself; asking the server to reset it
    would be a round trip for each statement."""


_KINDS: Final = {Acked: "a", Retried: "r", Released: "l", Buried: "b"}


def _letter_json(settlement: Settlement) -> str | None:
    if not isinstance(settlement, Buried):
        return None
    letter = settlement.letter
    fields = {
        "failed_at": letter.failed_at,
        "attempt": letter.attempt,
        "reason": letter.reason,
        "error_code": _storable(letter.error_code),
        "error_message": _storable(letter.error_message),
        "traceback": _storable(letter.traceback),
    }
    return _to_json(fields).decode()


def _storable(text: str | None) -> str | None:
    """`text` as PostgreSQL can keep it, which knows no NUL."""
    return text.replace("\0", "\\0") if text else text


def _message_of(fields: Sequence[Any]) -> QueueMessage:
    message_id, body, headers, rank, key, deduplication_id, enqueued_at = fields
    return QueueMessage(
        id=message_id,
        body=bytes(body),
        enqueued_at=enqueued_at,
        headers=_headers_of(headers),
        priority=PRIORITY_MAX - rank,
        key=key,
        deduplication_id=deduplication_id,
    )
