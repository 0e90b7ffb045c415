"""Where tests find a server: one that they are given, one that runs here, or one of their own.

`find("redis")` is, in this order: what SAGALOOM_TEST_REDIS_URL names; what answers on the standard port of this machine
and lets us in; a server of our own, which this process starts once and ends when it ends. Else it raises `Missing` with
the reason in one line, and the fixtures of `tests/conftest.py` skip the test with it.

A server that is found may be somebody's: tests keep to a schema, a virtual host or a key prefix of their own there, and
restart nothing. Whoever wants to restart or kill one starts it himself (`own`).
"""

from __future__ import annotations

import atexit
import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from typing import Final, TypeVar

import pytest

from tests.servers.others import MariaDB, Nats, RabbitMQ, Redis, amqp_takes, nats_answers, redis_answers
from tests.servers.postgres import Postgres
from tests.servers.server import HOST, Missing, Server, binary

__all__ = ["KINDS", "find", "found_or_skipped", "own"]

AnyServer = TypeVar("AnyServer", bound=Server)

KINDS: Final[Mapping[str, Callable[[], Server]]] = {
    "postgres": Postgres,
    "mariadb": MariaDB,
    "redis": Redis,
    "rabbitmq": RabbitMQ,
    "nats": Nats,
}
_ours: dict[str, Server] = {}


def find(name: str) -> str:
    """The URL of a server of this kind; raises `Missing` when there is none and none can be started."""
    given = os.environ.get(f"SAGALOOM_TEST_{name.upper()}_URL", "").strip()
    if given:
        return given
    if (standard := _STANDARD[name]()) is not None:
        return standard
    if name not in _ours:
        server = KINDS[name]()
        # Its keeper ends it in any case; this only has it happen before the temporary directory is missed.
        atexit.register(server.close)
        _ours[name] = server.start()
    return _ours[name].url


def found_or_skipped(name: str) -> str:
    """The URL of a server of this kind, or the end of the test that wants it."""
    try:
        return find(name)
    except Missing as missing:
        pytest.skip(str(missing))


@contextlib.contextmanager
def own(kind: Callable[[], AnyServer]) -> Iterator[AnyServer]:
    """A server of the test's own, which it may stop and kill, or the end of the test when it is not installed.

    with own(Postgres) as database, own(lambda: PgBouncer(database)) as pooler: ...
    """
    try:
        server = kind()
    except Missing as missing:
        pytest.skip(str(missing))
    with server:
        yield server


def _postgres() -> str | None:
    try:
        psql = binary("psql", of="PostgreSQL", among=("usr/lib/postgresql/*/bin",))
    except Missing:
        return None
    for database in ("test", "postgres"):
        url = f"postgresql://postgres@{HOST}:5432/{database}"
        asked = [psql, "-XAtqw", "-c", "SELECT 1", url]
        with contextlib.suppress(subprocess.TimeoutExpired):
            if subprocess.run(asked, capture_output=True, timeout=5, check=False).returncode == 0:
                return url
    return None


def _mariadb() -> str | None:
    try:
        client = binary("mariadb", "mysql", of="MariaDB")
    except Missing:
        return None
    asked = [client, "--no-defaults", "-h", HOST, "-P", "3306", "-u", "root", "--connect-timeout=5", "-e", "USE test"]
    with contextlib.suppress(subprocess.TimeoutExpired):
        if subprocess.run(asked, capture_output=True, timeout=10, check=False).returncode == 0:
            return f"mysql://root@{HOST}:3306/test"
    return None


_STANDARD: Final[Mapping[str, Callable[[], str | None]]] = {
    "postgres": _postgres,
    "mariadb": _mariadb,
    "redis": lambda: f"redis://{HOST}:6379/0" if redis_answers(6379) else None,
    "rabbitmq": lambda: f"amqp://guest:guest@{HOST}:5672/" if amqp_takes(5672) else None,
    "nats": lambda: f"nats://{HOST}:4222" if nats_answers(4222) else None,
}
