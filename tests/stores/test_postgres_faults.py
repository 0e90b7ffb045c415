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
from tests.complaints import complaints
from tests.servers.finding import own
from tests.servers.postgres import Postgres

pytestmark = pytest.mark.server("postgres")

_PATIENCE_SECONDS = 40.0


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


async def test_what_is_given_up_leaves_no_error_behind_and_its_connection_comes_back(server: Postgres) -> None:
    database = PostgresDatabase(url=server.url, deadline_seconds=0.5, connections_max=1)
    await database.fetch("SELECT 1")

    with complaints() as heard:
        await asyncio.to_thread(server.freeze)
        try:
            asking = asyncio.create_task(database.write("SELECT 2"))
            for _ in range(3):
                await asyncio.wait([asking], timeout=0.1)
                asking.cancel()
            await asyncio.wait([asking])
            with pytest.raises(BackendUnavailable):
                await database.write("SELECT 3")
        finally:
            await asyncio.to_thread(server.thaw)
        del asking
    database.deadline_seconds = _PATIENCE_SECONDS
    answers = await database.fetch("SELECT 7")
    await database.close()

    assert ([row[0] for row in answers], heard) == ([7], [])


async def test_the_server_is_told_of_a_statement_that_was_given_up(server: Postgres) -> None:
    database = PostgresDatabase(url=server.url, deadline_seconds=1)

    with pytest.raises(BackendUnavailable, match="no answer within 1 s"):
        await database.write("SELECT pg_sleep(50) /* too long */")
    database.deadline_seconds = _PATIENCE_SECONDS
    active = "SELECT 1 FROM pg_stat_activity WHERE state = 'active' AND pid != pg_backend_pid() AND query LIKE "
    async with asyncio.timeout(_PATIENCE_SECONDS):
        while await database.fetch(f"{active} '%too long%'"):  # noqa: ASYNC110 - nobody tells but when asked
            await asyncio.sleep(0.02)
    await database.close()
