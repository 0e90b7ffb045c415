"""What stands in the way of a store on PostgreSQL, and is told with the way out."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import pytest

from sagaloom.errors import BackendUnavailable, ConfigurationError
from sagaloom.kv.postgres import PostgresDatabase, PostgresSagaRows
from tests.schemas import Schema
from tests.servers.finding import own
from tests.servers.postgres import Postgres


@pytest.mark.server("postgres")
async def test_a_wrong_user_or_password_is_told_from_a_server_that_does_not_answer() -> None:
    with own(Postgres) as server:
        server.sql("CREATE ROLE locked LOGIN PASSWORD 'right'")
        hba = server.directory / "data" / "pg_hba.conf"
        hba.write_text(f"host all locked 127.0.0.1/32 scram-sha-256\n{hba.read_text()}")
        server.configure()

        for user in ("locked:wrong", "nobody_of_that_name"):
            database = PostgresDatabase(url=server.url.replace("postgres@", f"{user}@", 1))
            with pytest.raises(
                ConfigurationError, match=r"refuses the user or the password .*: correct DATABASE_URL"
            ) as told:
                await database.fetch("SELECT 1")
            await database.close()
            assert "wrong" not in str(told.value)  # A password is in no message.
        database = PostgresDatabase(url=server.url.replace("postgres@", "locked:right@", 1))
        assert [row[0] for row in await database.fetch("SELECT 7")] == [7]
        await database.close()


async def test_a_server_that_takes_no_writes_is_told_to_be_no_primary(schema: Schema) -> None:
    rows = PostgresSagaRows(PostgresDatabase(url=f"{schema.url}&default_transaction_read_only=on"))

    with pytest.raises(BackendUnavailable, match="connect to the primary"):
        await rows.commit(puts=[(("member", "reader"), b"")])
    await rows.close()


async def test_a_server_whose_transactions_are_not_read_committed_is_refused(schema: Schema) -> None:
    rows = PostgresSagaRows(PostgresDatabase(url=f"{schema.url}&default_transaction_isolation=serializable"))

    with pytest.raises(
        ConfigurationError, match=r"'serializable'.*SET default_transaction_isolation = 'read committed'"
    ):
        await rows.open()
    await rows.close()


async def test_a_server_that_is_too_old_is_named_with_its_version() -> None:
    """Of a real one only the first words are needed."""

    def said(kind: bytes, content: bytes) -> bytes:
        return kind + (len(content) + 4).to_bytes(4, "big") + content

    over = asyncio.Event()

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big") - 4)
        settings = (b"server_version\x0012.22\x00", b"client_encoding\x00UTF8\x00")
        writer.write(said(b"R", bytes(4)) + b"".join(said(b"S", each) for each in settings))
        writer.write(said(b"K", bytes(8)) + said(b"Z", b"I"))
        await reader.read(1)
        writer.transport.abort()
        over.set()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        database = PostgresDatabase(url=f"postgresql://postgres@127.0.0.1:{port}/old?pgbouncer=true&sslmode=disable")

        with pytest.raises(ConfigurationError, match="is PostgreSQL 12: at least 13 is needed, upgrade the server"):
            await database.fetch("SELECT 1")
        await over.wait()


def test_without_its_driver_the_store_names_what_to_install() -> None:
    without = "import sys; sys.modules['asyncpg'] = None; sys.argv = ['sagaloom', 'db', 'status']; import sagaloom.cli"
    command = [sys.executable, "-c", f"{without}; sagaloom.cli.main()"]
    environment = {**os.environ, "DATABASE_URL": "postgresql://127.0.0.1/sagas"}

    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    assert found.returncode != 0
    assert "needs asyncpg, which is not installed: pip install 'sagaloom[postgres]'" in found.stderr
    assert "Traceback" not in found.stderr
