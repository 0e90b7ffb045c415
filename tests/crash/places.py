"""Where the store of a run is: what a worker opens there, what can be seen from beside the workers, and what may happen
to the place itself.

A worker gets the address of the store on its command line, and nothing else differs between one place and another.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import ClassVar, Final

import apsw

from sagaloom.kv.postgres import PostgresDatabase, PostgresPresence, PostgresSagaRows
from sagaloom.kv.presence import FilePresence
from sagaloom.kv.sqlite import SqliteKeyValue
from sagaloom.ports.keyvalue import KeyValue
from sagaloom.ports.store import SagaStore
from sagaloom.stores.kv import KvSagaStore
from sagaloom.stores.sql import SqlSagaStore
from sagaloom.testing.faults import STEPS, WALK_STEPS
from tests.servers.postgres import PgBouncer, Postgres

__all__ = ["KILLED", "LEASE_SECONDS", "RESTARTED", "DatabasePlace", "FilePlace", "Place", "open_store"]

LEASE_SECONDS: Final = 1.0
"""How long a worker that was stopped is still believed to be alive."""
RESTARTED: Final = "database restarted"
KILLED: Final = "database killed"
_LOCK_SECONDS_MAX: Final = 30.0


class Place(ABC):
    """One store, looked at with a connection of its own."""

    steps: ClassVar[tuple[str, ...]]
    """At which steps a worker can be killed there."""
    after_kill_seconds_max: ClassVar[float]
    """Within how many seconds others must have taken over from a worker that was killed (median)."""
    disasters: ClassVar[tuple[str, ...]] = ()
    """What can happen to the place itself."""

    def __init__(self) -> None:
        self._opened: tuple[KeyValue, SagaStore] | None = None
        self._is_away = asyncio.Lock()

    @property
    @abstractmethod
    def address(self) -> str:
        """What `open_store` opens."""

    @abstractmethod
    async def _open(self) -> tuple[KeyValue, SagaStore]:
        """Opens the store for whoever looks from beside."""

    @contextlib.asynccontextmanager
    async def look(self) -> AsyncIterator[tuple[KeyValue, SagaStore]]:
        """The rows, and the store in front of them, while nobody has us look away."""
        async with self._is_away:
            if self._opened is None:
                self._opened = await self._open()
            yield self._opened

    @contextlib.asynccontextmanager
    async def away(self) -> AsyncIterator[None]:
        """Closes what we look with, and looks at nothing meanwhile."""
        async with self._is_away:
            await self._close()
            yield

    @contextlib.asynccontextmanager
    async def nobody_writes(self) -> AsyncIterator[None]:
        """Nobody is inside a write, and nobody can begin one, where a process that is stopped inside one would be in
        everybody's way."""
        yield

    async def strike(self, disaster: str) -> None:
        """Has one of `disasters` happen; returns when the place is usable again."""
        raise ValueError(f"{disaster!r} cannot happen here: only {self.disasters} can")

    async def close(self) -> None:
        async with self._is_away:
            await self._close()

    async def _close(self) -> None:
        opened, self._opened = self._opened, None
        if opened is not None:
            await opened[1].close()


class FilePlace(Place):
    """An embedded store, in one file. Nothing happens to it; see `power.py` for what can."""

    steps = STEPS
    after_kill_seconds_max = LEASE_SECONDS / 2
    """Clearly less than the lease: the dead are told by their lock, and not by their silence."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    @property
    def address(self) -> str:
        return str(self._path)

    async def _open(self) -> tuple[KeyValue, SagaStore]:
        kv = await SqliteKeyValue.open(self._path)
        return kv, KvSagaStore(kv, presence=FilePresence(self._path))

    @contextlib.asynccontextmanager
    async def nobody_writes(self) -> AsyncIterator[None]:
        """Holds the write lock: a process that is stopped meanwhile is provably outside a write. (One that is stopped
        inside a write keeps every other from writing; that is the price of one file, and no test of takeover.)"""
        connection = apsw.Connection(str(self._path))
        try:
            connection.set_busy_timeout(0)
            deadline = time.monotonic() + _LOCK_SECONDS_MAX
            while True:
                try:
                    connection.execute("BEGIN IMMEDIATE")
                    break
                except apsw.BusyError:
                    if time.monotonic() > deadline:
                        raise
                await asyncio.sleep(0.0005)
            yield
        finally:
            # Closing rolls back; there is nothing to keep.
            connection.close(force=True)


class _SilentPresence(FilePresence):
    """Wakes nobody: the others find out late what it has brought them, as when a nudge is lost."""

    def nudge(self) -> None:
        return None


class DatabasePlace(Place):
    """A store in a PostgreSQL of our own. The workers reach it through a pooler, we who look do not."""

    steps = WALK_STEPS
    after_kill_seconds_max = 3 * LEASE_SECONDS
    """All are on one host, where the dead are told by their locks; but only by whoever can ask the database."""
    disasters = (RESTARTED, KILLED)

    def __init__(self, database: Postgres, pooler: PgBouncer) -> None:
        super().__init__()
        self._database = database
        self._pooler = pooler

    @property
    def address(self) -> str:
        return self._pooler.url

    async def strike(self, disaster: str) -> None:
        if disaster == KILLED:
            await asyncio.to_thread(self._database.kill)
            await asyncio.to_thread(self._database.start)
        else:
            await asyncio.to_thread(self._database.restart)

    async def _open(self) -> tuple[KeyValue, SagaStore]:
        rows = PostgresSagaRows(PostgresDatabase(url=self._database.url))
        await rows.open()
        return rows, SqlSagaStore(rows)


class _SilentDatabasePresence(PostgresPresence):
    def nudge(self) -> None:
        return None


async def _open_database(url: str, *, is_silent: bool) -> SagaStore:
    database = PostgresDatabase(url=url)
    rows = PostgresSagaRows(database)
    await rows.open()
    files = PostgresPresence.on_this_host(rows.store_id, lease_seconds=LEASE_SECONDS)
    presence = _SilentDatabasePresence if is_silent else PostgresPresence
    return SqlSagaStore(rows, presence=presence(database, lease_seconds=LEASE_SECONDS, files=files))


async def open_store(address: str, *, is_silent: bool, on_step: Callable[[str], None]) -> SagaStore:
    """The store at `address`, as a worker opens it. One that is silent wakes nobody when it brings something."""
    if address.startswith("postgresql://"):
        return await _open_database(address, is_silent=is_silent)
    kv = await SqliteKeyValue.open(address, on_step=on_step)
    presence = (_SilentPresence if is_silent else FilePresence)(address, lease_seconds=LEASE_SECONDS)
    return KvSagaStore(kv, presence=presence)
