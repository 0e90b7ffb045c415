"""Every saga store of the package, held to the contract that users get too."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from sagaloom.kv import MemoryKeyValue, SqliteKeyValue
from sagaloom.kv.postgres import PostgresSagaRows
from sagaloom.ports.store import SagaStore
from sagaloom.stores import KvSagaStore, SqlSagaStore
from sagaloom.testing import MemoryStore, RecordingStore
from sagaloom.testing.contracts.sagastore import OpenSagaStore, SagaStoreContract
from tests.schemas import Schema


class TestMemoryStore(SagaStoreContract):
    @pytest.fixture
    def open_store(self) -> OpenSagaStore:
        async def open_store() -> SagaStore:
            return MemoryStore()

        return open_store


class TestRecordingStore(SagaStoreContract):
    @pytest.fixture
    def open_store(self) -> OpenSagaStore:
        async def open_store() -> SagaStore:
            return RecordingStore()

        return open_store


class TestKvSagaStoreOverMemory(SagaStoreContract):
    @pytest.fixture
    def open_store(self) -> OpenSagaStore:
        async def open_store() -> SagaStore:
            return KvSagaStore(MemoryKeyValue())

        return open_store


class TestKvSagaStoreOverSqlite(SagaStoreContract):
    @pytest.fixture
    def open_store(self, tmp_path: Path) -> OpenSagaStore:
        async def open_store() -> SagaStore:
            return KvSagaStore(await SqliteKeyValue.open(tmp_path / "saga.db", synchronous="OFF"))

        return open_store


class TestSqlSagaStoreOverPostgres(SagaStoreContract):
    @pytest.fixture
    def open_store(self, schema: Schema) -> OpenSagaStore:
        async def open_store() -> SagaStore:
            return SqlSagaStore(PostgresSagaRows(schema.database()))

        return open_store


class TestKvSagaStoreThatIsReopenedBeforeEachCall(SagaStoreContract):
    """Nothing may depend on what the store remembers, and everything must be in the file."""

    @pytest.fixture
    def open_store(self, tmp_path: Path) -> OpenSagaStore:
        async def open_file() -> SagaStore:
            return KvSagaStore(await SqliteKeyValue.open(tmp_path / "saga.db", synchronous="OFF"))

        async def open_store() -> SagaStore:
            return Reopened(await open_file(), open_file)

        return open_store


class Reopened:
    """A store that was closed and opened again before each call."""

    def __init__(self, inner: SagaStore, open_again: OpenSagaStore) -> None:
        self._inner = inner
        self._open_again = open_again
        self._is_closed = False

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._inner, name)
        if not callable(attribute) or self._is_closed or name == "why_not":
            return attribute

        async def call(*arguments: Any, **named: Any) -> Any:
            if name == "close":
                self._is_closed = True
            else:
                await self._inner.close()
                self._inner = await self._open_again()
            method: Callable[..., Awaitable[Any]] = getattr(self._inner, name)
            return await method(*arguments, **named)

        return call
