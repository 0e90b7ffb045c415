"""PostgreSQL, with a synchronous standby if wanted, and PgBouncer before it."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Final

from tests.servers.server import HOST, Server, binary

__all__ = ["PgBouncer", "Postgres"]

_WHERE: Final = ("usr/lib/postgresql/*/bin", "usr/pgsql-*/bin")
_SYNCHRONOUS_SECONDS_MAX: Final = 30.0

_SETTINGS: Final = {
    "unix_socket_directories": "''",
    # Both would stay behind on the machine when all of its processes are killed.
    "dynamic_shared_memory_type": "mmap",
    "max_connections": "100",
    "shared_buffers": "64MB",
    "wal_level": "replica",
    "max_wal_senders": "10",
    "hot_standby": "on",
    "log_min_messages": "warning",
}


class Postgres(Server):
    """PostgreSQL on data of its own; its superuser is `postgres`, without a password. Settings are as they come, so
    `fsync` is on."""

    name: ClassVar = "postgres"
    polite: ClassVar = signal.SIGINT  # "fast": sessions are ended, data is written
    abrupt: ClassVar = signal.SIGQUIT  # "immediate": as a crash, but it takes its shared memory along

    def __init__(self, **settings: str) -> None:
        self._bin = binary("initdb", of="PostgreSQL", among=_WHERE).parent
        super().__init__()
        self._data = self.directory / "data"
        self._settings = {**_SETTINGS, **settings}
        self.initdb_options: Sequence[str] = ()
        self._primary: Postgres | None = None
        self._standby_name = ""

    @property
    def url(self) -> str:
        return f"postgresql://postgres@{HOST}:{self.port}/postgres"

    def sql(self, statement: str) -> str:
        """Runs one statement by `psql`, and returns its rows, fields parted by `|`."""
        found = subprocess.run(
            [self._bin / "psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-c", statement, self.url],
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        if found.returncode:
            raise RuntimeError(f"{statement}: {found.stderr.strip()}")
        return found.stdout.strip()

    def configure(self, **settings: str) -> None:
        """Changes settings that need no restart, now and for later starts."""
        self._settings |= settings
        self._write_settings()
        self._signal(signal.SIGHUP)

    def add_standby(self, name: str = "standby", *, synchronous: bool = True) -> Postgres:
        """A standby of this server, running and caught up. A synchronous one is waited for by every commit here."""
        standby = Postgres(**self._settings)
        standby._primary, standby._standby_name = self, name
        try:
            standby.start()
            if synchronous:
                self.configure(synchronous_standby_names=f"'{name}'")
                self.wait_until_synchronous(name)
        except BaseException:
            standby.close()
            raise
        return standby

    def wait_until_synchronous(self, name: str = "standby") -> None:
        asked = f"SELECT count(*) FROM pg_stat_replication WHERE application_name = '{name}' AND sync_state = 'sync'"
        deadline = time.monotonic() + _SYNCHRONOUS_SECONDS_MAX
        while self.sql(asked) != "1":
            if time.monotonic() > deadline:
                raise RuntimeError(f"{name} is no synchronous standby: {self.sql('TABLE pg_stat_replication')}")
            time.sleep(0.02)

    def promote(self) -> None:
        """Has a standby be a primary from now on; returns when it takes writes. It waits for no standby of its own."""
        self._settings["synchronous_standby_names"] = "''"
        self._write_settings()
        self._signal(signal.SIGHUP)
        self._call(self._bin / "pg_ctl", "-D", self._data, "--wait", "promote")

    def _prepare(self) -> None:
        if self._primary is not None:
            # -R has it follow by what it was told here, under the name by which the primary knows it.
            source = f"host={HOST} port={self._primary.port} user=postgres application_name={self._standby_name}"
            self._call(self._bin / "pg_basebackup", "-D", self._data, "-R", "-X", "stream", "-c", "fast", "-d", source)
        elif not self._data.exists():
            how = ("--no-sync", "--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8", "--username=postgres")
            self._call(self._bin / "initdb", *how, *self.initdb_options, "-D", self._data)
        self._write_settings()

    def _write_settings(self) -> None:
        lines = [f"{name} = {value}\n" for name, value in self._settings.items()]
        self._write("extra.conf", "".join(lines))
        conf = self._data / "postgresql.conf"
        include = f"include '{self.directory / 'extra.conf'}'\n"
        text = conf.read_text(encoding="utf-8")
        kept = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("include '"))
        conf.write_text(kept + include, encoding="utf-8")

    def _command(self) -> Sequence[str | Path]:
        return (self._bin / "postgres", "-D", self._data, "-p", str(self.port), "-h", HOST)

    def _answers(self) -> bool:
        return _is_ready(self._bin / "pg_isready", self.port)


class PgBouncer(Server):
    """PgBouncer in transaction mode before `database`: two statements of one client may run in two sessions."""

    name: ClassVar = "pgbouncer"
    polite: ClassVar = signal.SIGINT  # waits for transactions under way

    def __init__(self, database: Postgres, **settings: str) -> None:
        self._program = binary("pgbouncer", of="PgBouncer")
        self._pg_isready = binary("pg_isready", of="PostgreSQL", among=_WHERE)
        super().__init__()
        self._database = database
        self._settings = settings

    @property
    def url(self) -> str:
        return f"postgresql://postgres@{HOST}:{self.port}/postgres"

    def _prepare(self) -> None:
        settings: Mapping[str, str] = {
            "listen_addr": HOST,
            "listen_port": str(self.port),
            "unix_socket_dir": "",
            "auth_type": "any",
            "pool_mode": "transaction",
            "max_client_conn": "500",
            "default_pool_size": "20",
            "server_login_retry": "1",  # seconds until it tries again to reach a database that was down
            **self._settings,
        }
        lines = [f"{name} = {value}" for name, value in settings.items()]
        target = f"* = host={HOST} port={self._database.port} user=postgres"
        self._write("pgbouncer.ini", "\n".join(["[databases]", target, "[pgbouncer]", *lines, ""]))

    def _command(self) -> Sequence[str | Path]:
        return (self._program, self.directory / "pgbouncer.ini")

    def _answers(self) -> bool:
        return _is_ready(self._pg_isready, self.port)


def _is_ready(pg_isready: Path, port: int) -> bool:
    asked: list[str | Path] = [
        pg_isready,
        "-q",
        "-h",
        HOST,
        "-p",
        str(port),
        "-U",
        "postgres",
        "-d",
        "postgres",
        "-t",
        "2",
    ]
    return subprocess.run(asked, check=False, timeout=10).returncode == 0
