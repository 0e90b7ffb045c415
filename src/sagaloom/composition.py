"""Putting a runtime together: which store, which targets, and who closes what.

The one rule of ownership: what was opened here is closed here; what was handed in is left as it was.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Generator, Iterable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, Protocol, Self, TypeVar, cast

from sagaloom.clock import Clock
from sagaloom.definitions import SagaDefinition
from sagaloom.discovery import SagaStoreBackend
from sagaloom.errors import ConfigurationError
from sagaloom.ports.keyvalue import KeyValue
from sagaloom.ports.store import SagaStore
from sagaloom.ports.targets import EffectTarget
from sagaloom.runtime.options import RuntimeOptions
from sagaloom.runtime.runtime import SagaRuntime

if TYPE_CHECKING:
    from sagaloom.kv.postgres import PostgresDatabase

__all__ = [
    "DurableSagaRuntime",
    "Opening",
    "create_durable_saga_runtime",
    "open_saga_runtime_kv",
    "open_sql_saga_store",
    "sql_database",
]

_log = logging.getLogger("sagaloom")
_DEFAULT_PATH: Final = Path(".sagaloom") / "sagas.db"
_PATH_VARIABLE: Final = "NETSCRIPT_SAGA_KV_PATH"


class _Opened(Protocol):
    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


T = TypeVar("T", bound=_Opened)


class Opening(Generic[T]):
    """Something that still has to be opened: `await` it for the thing itself, which is then yours to close, or write
    `async with` to have it started and closed for you."""

    def __init__(self, opener: Callable[[], Awaitable[T]]) -> None:
        self._opener = opener
        self._opened: T | None = None

    def __await__(self) -> Generator[Any, None, T]:
        return self._opener().__await__()

    async def __aenter__(self) -> T:
        self._opened = await self._opener()
        return await self._opened.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._opened is not None:
            await self._opened.__aexit__(kind, error, trace)


class DurableSagaRuntime:
    """A runtime with its store, and what has to be closed with it.

    `dispose` stops the runtime and closes what was opened for it. `async with` starts the runtime first.
    """

    def __init__(self, runtime: SagaRuntime, owned: AsyncExitStack) -> None:
        self.runtime = runtime
        self.store: SagaStore = runtime.store
        self._owned = owned
        self._is_started = False

    async def start(self) -> None:
        """Starts the runtime. Starting twice is no error."""
        if not self._is_started:
            self._is_started = True
            await self.runtime.start()

    async def dispose(self) -> None:
        """Stops the runtime and closes what was opened for it, never what was injected. Twice is no error."""
        owned, self._owned = self._owned, AsyncExitStack()
        async with owned:
            await self.runtime.stop()

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.dispose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.dispose()


def create_durable_saga_runtime(
    backend: Literal["kv", "sql", "prisma"] | None = None,
    *,
    kv: KeyValue | None = None,
    path: str | os.PathLike[str] | None = None,
    engine: object | None = None,
    url: str | None = None,
    schema: str | None = None,
    store: SagaStore | None = None,
    definitions: Iterable[SagaDefinition[Any]] = (),
    targets: Iterable[EffectTarget] = (),
    services: Mapping[str, str] | None = None,
    clock: Clock | None = None,
    options: RuntimeOptions | None = None,
) -> Opening[DurableSagaRuntime]:
    """A runtime over a durable store. `await` gives it not yet started; `async with` starts and disposes it.

    An injected `store` wins. `engine`, `url` or `backend="sql"` selects the relational store (see
    `open_sql_saga_store`, also for `schema`); otherwise it is the
    key-value store over `kv`, which is opened for you when it is not given, at `path` or where
    `open_saga_runtime_kv` finds it.

    `targets` deliver effects; one for HTTP services comes by itself, with `services` as its address book (service
    name to URL) before the environment's `services__<name>__http__0`, one for jobs, which asks the environment for the
    workers API, and one for queues, at the broker that `create_queue` finds.

        async with create_durable_saga_runtime("kv", definitions=[order_saga]) as durable:
            await durable.runtime.publish({"type": "OrderPlaced", "payload": {"orderId": "o-1"}})
    """

    async def opener() -> DurableSagaRuntime:
        async with AsyncExitStack() as owned:
            chosen = store
            if chosen is None:
                seconds = (options or RuntimeOptions()).lease_seconds
                chosen = await _open_store(
                    _selected(backend, engine, url), kv, path, engine, url, owned, schema=schema, lease_seconds=seconds
                )
            given = list(targets)
            if not any(target.kind == "service" for target in given):
                from sagaloom.targets import ServiceTarget

                own = ServiceTarget(services)
                owned.push_async_callback(own.close)
                given.append(own)
            elif services:
                raise ConfigurationError(
                    "services= was given beside a target of kind 'service', which would never read it: "
                    "hand the addresses to that target"
                )
            if not any(target.kind == "job" for target in given):
                from sagaloom.targets import JobTarget

                jobs = JobTarget()
                owned.push_async_callback(jobs.close)
                given.append(jobs)
            if not any(target.kind == "queue" for target in given):
                from sagaloom.queue import create_queue
                from sagaloom.targets import QueueTarget

                queues = QueueTarget(create_queue)
                owned.push_async_callback(queues.close)
                given.append(queues)
            runtime = SagaRuntime(chosen, definitions=definitions, targets=given, clock=clock, options=options)
            return DurableSagaRuntime(runtime, owned.pop_all())

    return Opening(opener)


async def open_saga_runtime_kv(path: str | os.PathLike[str] | None = None) -> KeyValue:
    """The embedded key-value store at `path`, else at `NETSCRIPT_SAGA_KV_PATH`, else at `.sagaloom/sagas.db`. Its
    directory is created; where it is, is logged."""
    from sagaloom.kv import SqliteKeyValue

    file = Path(path if path is not None else os.environ.get(_PATH_VARIABLE, "").strip() or _DEFAULT_PATH)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"the directory {file.parent} of the saga store cannot be created: {error.strerror}; "
            f"set {_PATH_VARIABLE} to a file that this user may write"
        ) from error
    opened = await SqliteKeyValue.open(file)
    _log.info("saga store: kv in %s", file)
    return opened


async def open_sql_saga_store(
    *, engine: object | None = None, url: str | None = None, schema: str | None = None, lease_seconds: float = 6.0
) -> SagaStore:
    """The saga store in PostgreSQL: at `url`, or through `engine`, an asyncpg pool, which is used and not closed, or a
    SQLAlchemy engine on asyncpg, whose address is taken. It lies in `schema`, else in the one that the URL names
    (`?schema=sagas`), else in `public`. Its tables are brought up to the present version; where it is, is logged."""
    database = sql_database(engine=engine, url=url, schema=schema)
    from sagaloom.kv.postgres import PostgresPresence, PostgresSagaRows
    from sagaloom.stores import SqlSagaStore

    rows = PostgresSagaRows(database)
    try:
        await rows.open()
        files = PostgresPresence.on_this_host(rows.store_id, lease_seconds=lease_seconds)
        store = SqlSagaStore(rows, presence=PostgresPresence(database, lease_seconds=lease_seconds, files=files))
        await store.open()
    except BaseException:
        await rows.close()
        raise
    _log.info("saga store: sql in %s", database.name.removeprefix("kv:"))
    return store


def sql_database(
    *, engine: object | None = None, url: str | None = None, schema: str | None = None
) -> PostgresDatabase:
    """The database that `engine` or `url` stand for; nothing is connected yet."""
    if engine is None and url is None:
        raise ConfigurationError("Sql saga store backend requires an engine or a url.")
    if engine is not None and url is not None:
        raise ConfigurationError("engine= and url= name two databases: leave one of them out")
    from sagaloom.kv.postgres import PostgresDatabase

    if engine is None:
        return PostgresDatabase(url=url, schema=schema)
    address = getattr(engine, "url", None)
    if address is not None and hasattr(address, "render_as_string"):
        return PostgresDatabase(url=address.render_as_string(hide_password=False), schema=schema)
    if not (hasattr(engine, "acquire") and hasattr(engine, "terminate")):
        raise ConfigurationError(
            f"engine= is {type(engine).__name__}: give an asyncpg pool, or a SQLAlchemy engine made with "
            "create_async_engine('postgresql+asyncpg://...')"
        )
    return PostgresDatabase(pool=cast("Any", engine), schema=schema)


def _selected(backend: str | None, engine: object | None, url: str | None) -> SagaStoreBackend:
    if backend not in (None, "kv", "sql", "prisma"):
        raise ConfigurationError(f'Invalid saga store backend "{backend}" from backend=; expected kv or sql.')
    has_database = engine is not None or url is not None
    if backend == "kv" and has_database:
        raise ConfigurationError(
            'backend="kv" contradicts engine= and url=, which belong to "sql": leave one of them out'
        )
    return "sql" if has_database or backend in ("sql", "prisma") else "kv"


async def _open_store(
    backend: SagaStoreBackend,
    kv: KeyValue | None,
    path: str | os.PathLike[str] | None,
    engine: object | None,
    url: str | None,
    owned: AsyncExitStack,
    *,
    schema: str | None,
    lease_seconds: float,
) -> SagaStore:
    if backend == "sql":
        opened = await open_sql_saga_store(engine=engine, url=url, schema=schema, lease_seconds=lease_seconds)
        owned.push_async_callback(opened.close)
        return opened
    from sagaloom.kv import SqliteKeyValue
    from sagaloom.kv.presence import FilePresence
    from sagaloom.stores import KvSagaStore

    chosen = await open_saga_runtime_kv(path) if kv is None else kv
    presence = None
    if isinstance(chosen, SqliteKeyValue):
        presence = FilePresence(chosen.name.removeprefix("kv:"), lease_seconds=lease_seconds)
    store = KvSagaStore(chosen, presence=presence)
    if kv is None:
        owned.push_async_callback(store.close)  # and with it the file
    await store.open()
    return store
