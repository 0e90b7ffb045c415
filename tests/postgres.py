"""PostgreSQL for tests: a schema of their own, empty for each test, on the server that SAGALOOM_TEST_POSTGRES names,
else on the standard local port. A test that asks for `postgres` is skipped where there is none."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator

import asyncpg
import pytest

from sagaloom.kv.postgres import PostgresDatabase
from sagaloom.kv.postgres.schema import upgrade

URL = os.environ.get("SAGALOOM_TEST_POSTGRES") or "postgresql://postgres@127.0.0.1:5432/test"

_SEQUENCES = ("versionstamp", "inbox_number", "outbox_number")


class Postgres:
    """One schema, at the present version."""

    def __init__(self, schema: str) -> None:
        self.schema = schema
        self.url = f"{URL}{'&' if '?' in URL else '?'}schema={schema}"
        """Where a program finds it."""

    def database(self, **options: object) -> PostgresDatabase:
        return PostgresDatabase(url=self.url, **options)  # type: ignore[arg-type]

    async def connect(self) -> asyncpg.Connection:
        """A plain connection, for whoever looks at the tables."""
        return await asyncpg.connect(URL, timeout=5, server_settings={"search_path": self.schema})

    async def empty(self) -> None:
        """Makes it as good as new, with another store id."""
        connection = await self.connect()
        try:
            tables = await connection.fetch(
                "SELECT tablename AS name FROM pg_tables WHERE schemaname = $1 AND tablename NOT IN "
                "('saga_runtime_schema', 'saga_runtime_meta', 'saga_runtime_arrivals', 'saga_runtime_feed_head')",
                self.schema,
            )
            emptied = "".join(f"DELETE FROM {row['name']};" for row in tables)
            restarted = "".join(f"ALTER SEQUENCE saga_runtime_{name} RESTART;" for name in _SEQUENCES)
            await connection.execute(
                f"{emptied}{restarted} UPDATE saga_runtime_arrivals SET s = 0;"
                "UPDATE saga_runtime_feed_head SET next = 1;"
                f"UPDATE saga_runtime_meta SET value = '{secrets.token_hex(16)}' WHERE name = 'store_id'"
            )
        finally:
            await connection.close()


@pytest.fixture(scope="session")
async def postgres_schema() -> AsyncIterator[Postgres]:
    try:
        connection = await asyncpg.connect(URL, timeout=2)
    except (OSError, asyncpg.PostgresError, TimeoutError) as error:
        pytest.skip(f"no PostgreSQL at {URL}: {error}")
    made = Postgres(f"sagaloom_test_{secrets.token_hex(6)}")
    try:
        database = made.database()
        await upgrade(database)
        await database.close()
        yield made
    finally:
        await connection.execute(f"DROP SCHEMA IF EXISTS {made.schema} CASCADE")
        await connection.close()


@pytest.fixture
async def postgres(postgres_schema: Postgres) -> Postgres:
    """An empty schema."""
    await postgres_schema.empty()
    return postgres_schema
