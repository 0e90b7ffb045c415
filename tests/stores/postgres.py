"""PostgreSQL for tests: a schema for each test, on the server that SAGALOOM_TEST_POSTGRES or DATABASE_URL names, else on
the standard local port."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import pytest

from sagaloom.kv.postgres import PostgresDatabase

URL = os.environ.get("SAGALOOM_TEST_POSTGRES") or "postgresql://postgres@127.0.0.1:5432/test"


@asynccontextmanager
async def a_schema(url: str = URL) -> AsyncIterator[str]:
    """The name of a fresh schema, which is dropped afterwards; skips the test when there is no server."""
    name = f"sagaloom_test_{secrets.token_hex(6)}"
    try:
        connection = await asyncpg.connect(url, timeout=2)
    except (OSError, asyncpg.PostgresError, TimeoutError) as error:
        pytest.skip(f"no PostgreSQL at {url}: {error}")
    try:
        await connection.execute(f"CREATE SCHEMA {name}")
        yield name
        await connection.execute(f"DROP SCHEMA IF EXISTS {name} CASCADE")
    finally:
        await connection.close()


def database_in(schema: str, **options: object) -> PostgresDatabase:
    return PostgresDatabase(url=URL, schema=schema, **options)  # type: ignore[arg-type]
