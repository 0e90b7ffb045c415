"""Statements to PostgreSQL, each with a deadline, and its errors in our words.

The rules:

- Every statement is one round trip in autocommit: a client that is stopped or cut off holds no lock, and nothing rests
  on the state of a session. So it is safe behind a proxy that pools transactions; whether one is there is found out
  (the process that answers is not the one that was connected to), and then no statement is kept prepared.
- A statement that is not answered in time is cancelled, and is `BackendUnavailable`. So is everything else that may go
  by itself: no connection, a restart, a full disk, a standby.
- What has certainly changed nothing is tried again within the deadline: reads, and statements that lost a deadlock.
  What may have changed something is the business of whoever sent it: `data["outcome"]` is `"unknown"` then.
- So is a commit that was to wait for a standby and did not: the server says so by a warning, and by nothing else.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from sagaloom.errors import BackendUnavailable, ConfigurationError, SagasError
from sagaloom.kv.postgres import driver
from sagaloom.kv.postgres.driver import Connection, Pool, Row
from sagaloom.pooling import acquired

_R = TypeVar("_R")

__all__ = ["OLDEST_SERVER", "PostgresDatabase", "RowsChanged", "channel_of", "quoted"]

OLDEST_SERVER: Final = 13

_SCHEMES: Final = ("postgresql", "postgres", "postgresql+asyncpg", "postgres+asyncpg")
_SCHEMA_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_$-]{0,62}")
_TRIES: Final = 3
_PAUSE_SECONDS: Final = 0.01
_DRIVER_ERRORS: Final = (driver.PostgresError, driver.InterfaceError, driver.InternalClientError)
_GIVEN_UP: Final = (OSError, driver.InternalClientError)
"""How a statement ends whose answer is not known; a `TimeoutError` is an `OSError`."""
_CLOSE_SECONDS: Final = 1.0
_OF_THE_CONNECTION: Final = ("08", "57P01", "57P02", "57P03")
_LOST_A_RACE: Final = ("40001", "40P01", "55P03")
_OF_THE_PROXY: Final = ("26000", "42P05")
"""Prepared statements that another session has, or that are gone with it."""


class RowsChanged(BackendUnavailable):
    """A statement met rows that are not what it expects, and has written nothing."""


class _OwnPool:
    """Connections of our own, at most `most`. Our statements leave nothing behind in a session, so there is nothing to
    look after between two of them, which is what the driver's own pool spends its time on."""

    def __init__(self, connect: Callable[[], Awaitable[Connection]], most: int) -> None:
        self._connect = connect
        self._free = asyncio.Semaphore(most)
        self._idle: list[Connection] = []
        self._lent: set[Connection] = set()
        self._leaving: set[asyncio.Task[None]] = set()
        self._is_closed = False

    @asynccontextmanager
    async def acquired(self, *, timeout: float) -> AsyncGenerator[Connection]:
        """A connection that nobody else uses, waited for at most `timeout` seconds. One whose statement was given up
        is not used again: what the server still says would be taken for the answer to the next one."""
        if self._free.locked():
            async with asyncio.timeout(timeout):
                await self._free.acquire()
        else:
            await self._free.acquire()  # which does not wait
        try:
            connection = self._newest_idle() or await self._connect()
            self._lent.add(connection)
            is_given_up = True
            try:
                yield connection
                is_given_up = False
            except Exception as error:
                is_given_up = isinstance(error, _GIVEN_UP)
                raise
            finally:
                self._lent.discard(connection)
                if is_given_up or self._is_closed:
                    self._drop(connection)
                elif not connection.is_closed():
                    self._idle.append(connection)
        finally:
            self._free.release()

    def _newest_idle(self) -> Connection | None:
        # The last one used: the server has planned our statements there.
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_closed():
                return connection
        return None

    def _drop(self, connection: Connection) -> None:
        leaving = asyncio.create_task(_closing(connection))  # It goes on when we are cancelled.
        self._leaving.add(leaving)
        leaving.add_done_callback(self._leaving.discard)

    async def close(self) -> None:
        """Closes what is idle; what is lent goes when it comes back."""
        self._is_closed = True
        idle, self._idle = self._idle, []
        await asyncio.gather(*map(_closing, idle), *self._leaving)

    def terminate(self) -> None:
        """Cuts everything."""
        self._is_closed = True
        idle, self._idle = self._idle, []
        for connection in (*idle, *self._lent):
            connection.terminate()


async def _closing(connection: Connection) -> None:
    """Has the server cancel what it may still be doing for `connection`, and says goodbye, for a second at most."""
    try:
        async with asyncio.timeout(_CLOSE_SECONDS):
            await connection.close()
    except (*_DRIVER_ERRORS, OSError):  # a TimeoutError is one
        connection.terminate()


class PostgresDatabase:
    """A pool of connections to one schema of one database; made by `open`, or around a pool that somebody else owns."""

    def __init__(
        self,
        *,
        url: str | None = None,
        pool: Pool | None = None,
        schema: str | None = None,
        deadline_seconds: float = 5.0,
        connections_max: int = 10,
        application_name: str = "sagaloom",
    ) -> None:
        """`url` may carry `?schema=` and `?pgbouncer=true`. A `pool` is used and not closed."""
        self._settings: dict[str, Any] = {}
        self._is_pooled = False
        self.deadline_seconds = deadline_seconds
        if pool is None:
            if url is None:
                raise ConfigurationError("Sql saga store backend requires an engine or a url.")
            url, in_url, self._is_pooled = _read_url(url)
            schema = schema or in_url
            self.where = _without_secrets(url)
        else:
            self.where = "the given pool"
        self.schema = _checked_schema(schema)
        self._url = url
        self._connections_max = connections_max
        self._application_name = application_name
        self._given = pool
        self._pool: Pool | _OwnPool | None = pool
        self._opening = asyncio.Lock()
        self._is_closed = False
        self.statements = 0
        """How many statements have been sent: what idling costs."""

    @property
    def name(self) -> str:
        return f"kv:{self.where}" + (f" schema {self.schema}" if self.schema != "public" else "")

    @property
    def url(self) -> str | None:
        return self._url

    @property
    def is_pooled(self) -> bool:
        """Whether a proxy stands in between that pools transactions."""
        return self._is_pooled

    def sql(self, text: str) -> str:
        """`text` with the name of our schema in it."""
        return text.replace("@schema@", quoted(self.schema))

    async def fetch(self, statement: str, *arguments: object) -> list[Row]:
        """The rows of a statement that may be sent twice, because it changes nothing."""
        return await self._sent(statement, arguments, may_repeat=True)

    async def write(self, statement: str, *arguments: object, waits: bool = False) -> list[Row]:
        """The rows of a statement that changes something. `waits`: its commit waits for a standby."""
        return await self._sent(statement, arguments, may_repeat=False, waits=waits)

    async def run(self, work: Callable[[Connection], Awaitable[_R]]) -> _R:
        """What `work` returns, which gets a connection to itself; it sets its own deadlines."""
        try:
            async with await self._acquired() as connection:
                return await work(connection)
        except Exception as error:
            raise self.translated(error) from error

    async def connect(self) -> Connection:
        """A connection outside the pool, for whoever listens."""
        try:
            return await self._connect()
        except Exception as error:
            raise self.translated(error) from error

    async def close(self) -> None:
        self._is_closed = True
        pool, self._pool = self._pool, None
        if pool is not None and self._given is None:
            try:
                async with asyncio.timeout(1.0):
                    await pool.close()
            except Exception:  # noqa: BLE001 - whatever it is, we are leaving
                pool.terminate()

    # -- inside ---------------------------------------------------------------------------------------------------

    async def _sent(
        self, statement: str, arguments: Sequence[object], *, may_repeat: bool, waits: bool = False
    ) -> list[Row]:
        for attempt in range(1, _TRIES + 1):
            self.statements += 1
            try:
                async with await self._acquired() as connection:
                    if waits:
                        return await self._replicated(connection, statement, arguments)
                    return await connection.fetch(statement, *arguments, timeout=self.deadline_seconds)
            except Exception as error:
                state = _state_of(error)
                if state in _OF_THE_PROXY and self._given is None:
                    await self._begin_again(is_pooled=True)
                lost = state in _LOST_A_RACE or state in _OF_THE_PROXY
                if attempt == _TRIES or not (lost or (may_repeat and _is_of_connection(error))):
                    raise self.translated(error) from error
            # Whoever was in our way gets what he waits for, or the same race is lost again.
            await asyncio.sleep(_PAUSE_SECONDS)
        raise AssertionError("unreachable")

    async def _replicated(self, connection: Connection, statement: str, arguments: Sequence[object]) -> list[Row]:
        warnings: list[str] = []

        def heard(_: Any, message: Any) -> None:
            if message.severity_en == "WARNING":
                warnings.append(str(message))

        connection.add_log_listener(heard)
        try:
            rows = await connection.fetch(statement, *arguments, timeout=self.deadline_seconds)
        finally:
            connection.remove_log_listener(heard)
        if warnings:
            raise BackendUnavailable(f"{self.where}: {warnings[0]}", data={"outcome": "unknown", "sqlstate": ""})
        return rows

    async def _acquired(self) -> AbstractAsyncContextManager[Connection]:
        if self._is_closed:
            raise BackendUnavailable(f"{self.name} is closed: open another store", retryable=False)
        pool = self._pool
        if pool is None:
            async with self._opening:
                pool = self._pool
                if pool is None:
                    pool = self._pool = await self._opened()
        if isinstance(pool, _OwnPool):
            return pool.acquired(timeout=self.deadline_seconds)
        return acquired(pool, timeout=self.deadline_seconds)

    async def _opened(self) -> _OwnPool:
        first = await self._connect()
        try:
            version = first.get_server_version().major
            if version < OLDEST_SERVER:
                raise ConfigurationError(
                    f"{self.where} is PostgreSQL {version}: at least {OLDEST_SERVER} is needed, upgrade the server"
                )
            if not self._is_pooled:
                answering = await first.fetchval("SELECT pg_backend_pid()", timeout=self.deadline_seconds)
                self._is_pooled = answering != first.get_server_pid()
        finally:
            await first.close(timeout=self.deadline_seconds)
        return _OwnPool(self._connect, self._connections_max)

    async def _connect(self) -> Connection:
        if self._url is None:
            raise ConfigurationError("a connection of our own needs a url")
        connection: Connection = await driver.connect(
            self._url,
            timeout=self.deadline_seconds,
            command_timeout=self.deadline_seconds,
            statement_cache_size=0 if self._is_pooled else 100,
            server_settings={"application_name": self._application_name},
        )
        return connection

    async def _begin_again(self, *, is_pooled: bool) -> None:
        async with self._opening:
            pool, self._pool = self._pool, None
            self._is_pooled = is_pooled
            if pool is not None:
                pool.terminate()

    # -- errors ---------------------------------------------------------------------------------------------------

    def translated(self, error: BaseException) -> BaseException:
        """The error of ours that says what `error` means, and what helps; itself when it is none of the database's."""
        if isinstance(error, SagasError) or not isinstance(
            error, (*_DRIVER_ERRORS, OSError, TimeoutError, ssl.SSLError)
        ):
            return error
        state = _state_of(error)
        said = str(error) or type(error).__name__
        where = self.where
        if state in ("28P01", "28000"):
            return ConfigurationError(f"{where} refuses the user or the password ({said}): correct DATABASE_URL")
        if state == "3D000":
            return ConfigurationError(f"{said} at {where}: create it (createdb), or correct DATABASE_URL")
        if state == "42501":
            return ConfigurationError(
                f"{where}: {said}: grant the user CREATE and USAGE on schema {self.schema}, or have somebody who may "
                "run sagaloom db upgrade"
            )
        if state in ("3F000", "42P01", "42883"):
            return ConfigurationError(
                f"{where}: {said}: the tables of schema {self.schema} are gone or of another version, run "
                "sagaloom db upgrade"
            )
        if isinstance(error, driver.InterfaceError) and not _is_of_connection(error):
            return ConfigurationError(f"{where}: {said}")
        if state.startswith(("22", "54")):
            return ValueError(said)
        if state in ("23505", "P0002"):
            return RowsChanged(f"{where}: {said}")
        is_unknown = not state or state.startswith(_OF_THE_CONNECTION)  # else the server has said that it did nothing
        outcome = {"outcome": "unknown" if is_unknown else "not_written", "sqlstate": state}
        hints = {
            "53100": "free space on the server's disk; writing resumes by itself",
            "55000": "name the standby in synchronous_standby_names again, or lower the tier to t2",
            "53300": "raise max_connections, or put a pooler in front",
            "57014": "the server cancelled it: look for what keeps it from answering, or raise statement_timeout",
            "55P03": "another transaction holds its rows: look for one left open",
            "25006": "the server takes no writes: connect to the primary",
        }
        # Said to one who starts as well, and ends with it: what resumes is whoever runs already.
        hint = hints.get(state, "is it running, and reachable from here? who runs already goes on when it answers")
        if isinstance(error, TimeoutError):
            said = f"no answer within {self.deadline_seconds:g} s"
        return BackendUnavailable(f"{where}: {said} ({hint})", data=outcome)


def channel_of(schema: str) -> str:
    """Where the processes on a schema wake each other."""
    return f"sagaloom_{hashlib.blake2b(schema.encode(), digest_size=8).hexdigest()}"


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _state_of(error: BaseException) -> str:
    return str(getattr(error, "sqlstate", None) or "")


def _is_of_connection(error: BaseException) -> bool:
    """Whether `error` says that there is no connection (any more), rather than what the server thinks."""
    if isinstance(error, TimeoutError):
        return False
    if isinstance(error, driver.InternalClientError):
        return True
    if isinstance(error, (OSError, driver.InterfaceError)):
        return "closed" in str(error) or "connect" in str(error) or isinstance(error, OSError)
    return _state_of(error).startswith(_OF_THE_CONNECTION)


def _checked_schema(schema: str | None) -> str:
    name = schema or "public"
    if not _SCHEMA_NAME.fullmatch(name):
        raise ConfigurationError(
            f"schema {name!r:.80} is no plain name: use letters, digits and _ (at most 63 characters)"
        )
    return name


def _read_url(url: str) -> tuple[str, str | None, bool]:
    """The address as the driver takes it, the schema, and whether a pooler is said to be there."""
    parts = urlsplit(url)
    if parts.scheme not in _SCHEMES:
        shown = parts.scheme or _without_secrets(url)
        raise ConfigurationError(
            f"{shown!r:.80} is no PostgreSQL address: the sql saga store takes "
            "postgresql://user:password@host:5432/database"
        )
    try:
        _ = parts.port
    except ValueError as error:
        raise ConfigurationError(f"{_without_secrets(url)} has no valid port: {error}") from None
    schema: str | None = None
    is_pooled = False
    rest: list[tuple[str, str]] = []
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name == "schema":
            schema = value
        elif name == "pgbouncer":
            is_pooled = value.lower() in ("true", "1", "yes")
        else:
            rest.append((name, value))
    return urlunsplit(("postgresql", parts.netloc, parts.path, urlencode(rest), "")), schema, is_pooled


def _without_secrets(url: str) -> str:
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"postgresql://{host}{parts.path}"
