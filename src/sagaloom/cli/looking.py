"""Opening a store only to look into it: nothing is made, brought up to date, or written, and no server that works on it
is disturbed."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sagaloom.errors import ConfigurationError, SagasError

if TYPE_CHECKING:
    from sagaloom.settings import StorePlace
    from sagaloom.stores import KvSagaStore

__all__ = ["CannotLook", "opened_to_look"]

_LEASE_SECONDS: Final = 6.0


class CannotLook(ConfigurationError):
    """Why a store cannot be looked into, and the command that helps. `is_absent`: there is none yet, which is no
    mistake."""

    def __init__(self, message: str, *, repair: str, is_absent: bool = False) -> None:
        super().__init__(message)
        self.repair = repair
        self.is_absent = is_absent


@asynccontextmanager
async def opened_to_look(place: StorePlace) -> AsyncGenerator[KvSagaStore]:
    """The store at `place`. Raises `CannotLook` when there is none, when this program cannot read it, and when it fails
    while somebody looks."""
    opening = _file(place.kv_path) if place.url is None else _database(place.url)
    async with opening as store:
        yield store


@asynccontextmanager
async def _file(path: Path) -> AsyncGenerator[KvSagaStore]:
    from sagaloom.kv import SqliteKeyValue
    from sagaloom.kv.presence import FilePresence
    from sagaloom.stores import KvSagaStore

    _refuse_absent(path)
    try:
        store = KvSagaStore(await SqliteKeyValue.open(path), presence=FilePresence(path), reads_only=True)
        try:
            await store.open()
            yield store
        finally:
            await store.close()
    except SagasError as error:
        raise _unusable(path, error) from error


def _refuse_absent(path: Path) -> None:
    if not path.exists():
        raise CannotLook(
            f"there is no store at {path} yet; the first start makes it",
            repair="for a store elsewhere: export NETSCRIPT_SAGA_KV_PATH=/path/to/sagas.db",
            is_absent=True,
        )


@asynccontextmanager
async def _database(url: str) -> AsyncGenerator[KvSagaStore]:
    from sagaloom.composition import sql_database
    from sagaloom.kv.postgres import PostgresPresence, PostgresSagaRows
    from sagaloom.kv.postgres.schema import applied, steps
    from sagaloom.stores import SqlSagaStore

    try:
        database = sql_database(url=url)
        try:
            _refuse_other_tables(
                database.name.removeprefix("kv:"),
                found=[step.version for step in await applied(database)],
                known=steps()[-1].version,
            )
            rows = PostgresSagaRows(database)
            await rows.open()
            files = PostgresPresence.on_this_host(rows.store_id, lease_seconds=_LEASE_SECONDS)
            presence = PostgresPresence(database, lease_seconds=_LEASE_SECONDS, files=files)
            store = SqlSagaStore(rows, presence=presence)
            await store.open()
            yield store
        finally:
            await database.close()
    except CannotLook:
        raise
    except SagasError as error:
        raise CannotLook(
            error.message, repair="psql \"$DATABASE_URL\" -c 'SELECT version()': what it says is what the store meets"
        ) from error


def _refuse_other_tables(where: str, *, found: Sequence[int], known: int) -> None:
    if not found:
        raise CannotLook(
            f"{where} answers, and has no tables of ours yet; the first start makes them",
            repair="sagaloom db upgrade, as somebody who may create tables",
            is_absent=True,
        )
    if found[-1] != known:
        raise CannotLook(
            f"the tables in {where} are of version {found[-1]}, this program is of {known}",
            repair="python -m pip install --upgrade sagaloom" if found[-1] > known else "sagaloom db upgrade",
        )


def _unusable(path: Path, error: SagasError) -> CannotLook:
    return CannotLook(
        error.message,
        repair=f"ls -l {path.parent} && df {path.parent}"
        if error.retryable
        else "restore the file from a backup, or choose another: export NETSCRIPT_SAGA_KV_PATH=/path/to/sagas.db",
    )
