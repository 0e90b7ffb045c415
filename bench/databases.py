"""Where stores lie when PostgreSQL is measured: each in a database of its own, on a server of the run's own, named for
the path that a file would have had. Children find the server in BENCH_POSTGRES."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from sagaloom.kv.postgres import driver
from tests.servers.postgres import Postgres

__all__ = ["a_server", "copy_store", "database_of", "server_cpu_seconds", "server_url"]

_VARIABLE = "BENCH_POSTGRES"
_DATA_VARIABLE = "BENCH_POSTGRES_DATA"


def server_url() -> str | None:
    """The server, when PostgreSQL is measured."""
    return os.environ.get(_VARIABLE)


@contextmanager
def a_server() -> Generator[None]:
    """Starts the server."""
    with Postgres(shared_buffers="256MB", max_wal_size="2GB") as server:
        os.environ[_VARIABLE], os.environ[_DATA_VARIABLE] = server.url, str(server.directory / "data")
        try:
            yield
        finally:
            del os.environ[_VARIABLE], os.environ[_DATA_VARIABLE]


async def database_of(path: Path) -> str:
    """The address of the database that stands for `path`, made if need be."""
    server = server_url()
    assert server is not None
    name = _name(path)
    connection: driver.Connection = await driver.connect(server)
    with contextlib.suppress(driver.PostgresError):  # it is there already
        await connection.execute(f"CREATE DATABASE {name}")
    await connection.close()
    return f"{server.rpartition('/')[0]}/{name}"


def copy_store(source: Path, target: Path) -> None:
    """A second store with the same content."""
    server = server_url()
    if server is None:
        shutil.copy(source, target)
        return

    async def copy() -> None:
        connection: driver.Connection = await driver.connect(server)
        await connection.execute(f"CREATE DATABASE {_name(target)} TEMPLATE {_name(source)}")
        await connection.close()

    asyncio.run(copy())


def server_cpu_seconds() -> float:
    """CPU seconds that all processes of the server have taken so far."""
    postmaster = int((Path(os.environ[_DATA_VARIABLE]) / "postmaster.pid").read_text().split()[0])
    tick = os.sysconf("SC_CLK_TCK")
    seconds = 0.0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(entry.name) == postmaster:
                    seconds += sum(map(int, fields[11:15])) / tick  # with those of its children that have ended
                elif int(fields[1]) == postmaster:
                    seconds += sum(map(int, fields[11:13])) / tick
    return seconds


def _name(path: Path) -> str:
    return "b_" + hashlib.blake2b(str(path).encode(), digest_size=10).hexdigest()
