"""Every key-value store of the package, held to the contract that users get too."""

from pathlib import Path

import pytest

from sagaloom.kv import MemoryKeyValue, SqliteKeyValue
from sagaloom.kv.postgres import PostgresKeyValue
from sagaloom.ports.keyvalue import KeyValue
from sagaloom.testing.contracts.keyvalue import KeyValueContract, OpenKeyValue
from tests.schemas import Schema


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


class TestPostgresKeyValue(KeyValueContract):
    @pytest.fixture
    def open_store(self, schema: Schema) -> OpenKeyValue:
        async def open_store() -> KeyValue:
            return PostgresKeyValue(schema.database())

        return open_store
