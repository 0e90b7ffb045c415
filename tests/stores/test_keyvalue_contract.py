"""Every key-value store of the package, held to the contract that users get too."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sagaloom.kv import MemoryKeyValue, SqliteKeyValue
from sagaloom.kv.postgres import PostgresKeyValue
from sagaloom.ports.keyvalue import KeyValue
from sagaloom.testing.contracts.keyvalue import KeyValueContract, OpenKeyValue
from tests.stores.postgres import a_schema, database_in


class TestMemoryKeyValue(KeyValueContract):
    @pytest.fixture
    def open_store(self) -> OpenKeyValue:
        async def open_store() -> KeyValue:
            return MemoryKeyValue()

        return open_store


class TestSqliteKeyValue(KeyValueContract):
    @pytest.fixture
    def open_store(self, tmp_path: Path) -> OpenKeyValue:
        async def open_store() -> KeyValue:
            return await SqliteKeyValue.open(tmp_path / "saga.db")

        return open_store


class TestSqliteKeyValueThatKeepsOthersOut(KeyValueContract):
    @pytest.fixture
    def open_store(self, tmp_path: Path) -> OpenKeyValue:
        async def open_store() -> KeyValue:
            return await SqliteKeyValue.open(tmp_path / "saga.db", exclusive=True, synchronous="OFF")

        return open_store


@pytest.mark.server("postgres")
class TestPostgresKeyValue(KeyValueContract):
    @pytest.fixture
    async def open_store(self) -> AsyncIterator[OpenKeyValue]:
        async with a_schema() as schema:

            async def open_store() -> KeyValue:
                store = PostgresKeyValue(database_in(schema))
                await store.open()
                return store

            yield open_store
