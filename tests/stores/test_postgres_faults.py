"""What the saga store says, and keeps, when the database dies, hangs, loses its standby or runs out of space.

Every server here is the test's own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest

from sagaloom.errors import BackendUnavailable
from sagaloom.kv.postgres import PostgresDatabase
from tests.servers.finding import own
from tests.servers.postgres import Postgres

pytestmark = pytest.mark.server("postgres")


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with own(Postgres) as started:
        yield started


@pytest.mark.parametrize("pooled", ["", "?pgbouncer=true"])
async def test_a_database_that_dies_under_load_is_unavailable_and_nothing_else(server: Postgres, pooled: str) -> None:
    database = PostgresDatabase(url=server.url + pooled, deadline_seconds=2)
    answers = 0
    ends = time.monotonic() + 3.0
    errors: list[Exception] = []

    async def ask() -> None:
        nonlocal answers
        while time.monotonic() < ends:
            try:
                await database.write("SELECT $1::int + 1", 1)
                answers += 1
            except Exception as error:  # noqa: BLE001 - which kinds come is what is asked
                errors.append(error)
                await asyncio.sleep(0.01)

    async def harm() -> None:
        for _ in range(2):
            await asyncio.sleep(0.3)
            await asyncio.to_thread(server.restart)
            await asyncio.sleep(0.3)
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.start)

    await asyncio.gather(harm(), *(ask() for _ in range(8)))

    assert {type(error) for error in errors} == {BackendUnavailable}
    assert answers > 0
    assert [row[0] for row in await database.fetch("SELECT 7")] == [7]
    await database.close()
