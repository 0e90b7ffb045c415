"""A schema of PostgreSQL for tests, with the tables of the present version, and empty for each test."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from sagaloom.kv.postgres import PostgresDatabase
from sagaloom.kv.postgres.schema import upgrade
from tests.patience import PATIENCE_SECONDS

_SEQUENCES = ("versionstamp", "inbox_number", "outbox_number")
_KEPT = ("schema", "meta", "arrivals", "feed_head")


class Schema:
    """One schema of a server."""

    def __init__(self, server_url: str, name: str, pool: asyncpg.Pool) -> None:
        self.name = name
        self.server_url = server_url
        self.url = f"{server_url}{'&' if '?' in server_url else '?'}schema={name}"
        """Where a program finds it."""
        self._pool = pool

    def database(self, **options: Any) -> PostgresDatabase:
        """It, through connections that all tests share: each new one has to plan everything anew."""
        return PostgresDatabase(pool=self._pool, schema=self.name, **options)

    async def connect(self) -> asyncpg.Connection:
        """A plain connection, for whoever looks at the tables."""
        return await asyncpg.connect(
            self.server_url, timeout=PATIENCE_SECONDS, server_settings={"search_path": self.name}
        )

    async def empty(self) -> None:
        """Makes it as good as new, with another store id."""
        tables = await self._pool.fetch(
            "SELECT tablename AS name FROM pg_tables WHERE schemaname = $1 AND NOT tablename = ANY ($2)",
            self.name,
            [f"saga_runtime_{name}" for name in _KEPT],
        )
        own = f"{self.name}.saga_runtime"
        emptied = "".join(f"DELETE FROM {self.name}.{row['name']};" for row in tables)
        restarted = "".join(f"ALTER SEQUENCE {own}_{name} RESTART;" for name in _SEQUENCES)
        await self._pool.execute(
            f"{emptied}{restarted} UPDATE {own}_arrivals SET s = 0; UPDATE {own}_feed_head SET next = 1;"
            f"UPDATE {own}_meta SET value = '{secrets.token_hex(16)}' WHERE name = 'store_id'"
        )


@pytest.fixture(scope="session")
async def schema_of_the_session(postgres_url: str) -> AsyncIterator[Schema]:
    name = f"sagaloom_test_{secrets.token_hex(6)}"
    async with asyncpg.create_pool(postgres_url, min_size=1, max_size=8, reset=_nothing) as pool:
        made = Schema(postgres_url, name, pool)
        await upgrade(made.database())
        yield made
        await pool.execute(f"DROP SCHEMA {name} CASCADE")


@pytest.fixture
async def schema(schema_of_the_session: Schema) -> Schema:
    """An empty schema."""
    await schema_of_the_session.empty()
    return schema_of_the_session


async def _nothing(_: object) -> None:
    """Our statements leave nothing in a session."""
