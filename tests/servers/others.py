"""The servers that need little: MariaDB, Redis or Valkey, RabbitMQ, NATS."""

from __future__ import annotations

import signal
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Final

from tests.servers.server import HOST, Server, binary, free_port, talk

__all__ = ["MariaDB", "Nats", "RabbitMQ", "Redis", "amqp_takes", "mariadb_greets", "nats_answers", "redis_answers"]


class MariaDB(Server):
    """MariaDB, or MySQL's relatives under that name; its user is `root`, without a password, its database `test`."""

    name: ClassVar = "mariadb"

    def __init__(self) -> None:
        self._program = binary("mariadbd", of="MariaDB")
        self._install = binary("mariadb-install-db", of="MariaDB")
        super().__init__()
        self._data = self.directory / "data"

    @property
    def url(self) -> str:
        return f"mysql://root@{HOST}:{self.port}/test"

    def _prepare(self) -> None:
        if not self._data.exists():
            how = ("--auth-root-authentication-method=normal", "--skip-name-resolve")
            self._call(self._install, "--no-defaults", *how, f"--datadir={self._data}")

    def _command(self) -> Sequence[str | Path]:
        files = [f"--{name}={self.directory / ('mariadb.' + name)}" for name in ("socket", "pid-file")]
        here = (f"--datadir={self._data}", f"--port={self.port}", f"--bind-address={HOST}", "--skip-name-resolve")
        return (self._program, "--no-defaults", *here, *files)

    def _answers(self) -> bool:
        return mariadb_greets(self.port)


def mariadb_greets(port: int) -> bool:
    """Whether a server speaks first, as those of protocol 10 do."""
    return talk(port, size=5)[4:5] == b"\x0a"


class Redis(Server):
    """Redis or Valkey, which writes each command to disk before it answers; `settings` are those of its command line
    (`appendonly="no"`)."""

    name: ClassVar = "redis"

    def __init__(self, **settings: str) -> None:
        self._program = binary("redis-server", "valkey-server", of="Redis or Valkey")
        super().__init__()
        self._settings = {"appendonly": "yes", "appendfsync": "always", "save": "", **settings}

    @property
    def url(self) -> str:
        return f"redis://{HOST}:{self.port}/0"

    def _command(self) -> Sequence[str | Path]:
        settings = [word for name, value in self._settings.items() for word in (f"--{name.replace('_', '-')}", value)]
        return (self._program, "--port", str(self.port), "--bind", HOST, "--dir", self.directory, *settings)

    def _answers(self) -> bool:
        return redis_answers(self.port)


def redis_answers(port: int) -> bool:
    """Whether it takes commands: it has loaded its data, and wants no password."""
    return talk(port, says=b"PING\r\n", until=b"\r\n").startswith(b"+PONG")


class RabbitMQ(Server):
    """RabbitMQ as a node of its own, with a name daemon of its own; its user is `guest`."""

    name: ClassVar = "rabbitmq"

    def __init__(self) -> None:
        # What is on PATH may be a wrapper that insists on a user; the program itself does not.
        where = ("usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin", "opt/rabbitmq/sbin")
        self._program = binary("rabbitmq-server", of="RabbitMQ", among=where)
        super().__init__()

    def _choose_ports(self) -> None:
        super()._choose_ports()
        self._names_port, self._between_nodes_port = free_port(), free_port()

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@{HOST}:{self.port}/"

    def _environment(self) -> Mapping[str, str]:
        here = self.directory
        return {
            "RABBITMQ_NODENAME": f"sagaloom{self.port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": HOST,
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._between_nodes_port),
            "RABBITMQ_MNESIA_BASE": str(here / "mnesia"),
            "RABBITMQ_LOG_BASE": str(here / "log"),
            "RABBITMQ_CONF_ENV_FILE": str(here / "env.conf"),
            "RABBITMQ_CONFIG_FILE": str(here / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(here / "plugins"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(here / "generated"),
            "ERL_EPMD_PORT": str(self._names_port),
            "ERL_EPMD_ADDRESS": HOST,
            "ERL_FLAGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        }

    def _prepare(self) -> None:
        self._write("env.conf", "")
        self._write("plugins", "[].\n")
        # A test machine is full often enough; a broker that then takes nothing in would be a riddle.
        self._write("rabbitmq.conf", "disk_free_limit.absolute = 50MB\nvm_memory_high_watermark.absolute = 1GB\n")

    def _command(self) -> Sequence[str | Path]:
        return (self._program,)

    def _answers(self) -> bool:
        return amqp_takes(self.port)


_START_OK: Final = (
    struct.pack(">HHI", 10, 11, 0)  # Connection.StartOk, and nothing to tell of the client
    + b"\x05PLAIN"
    + struct.pack(">I", 12)
    + b"\0guest\0guest"
    + b"\x05en_US"
)


def amqp_takes(port: int) -> bool:
    """Whether an AMQP 0-9-1 broker takes `guest` in: it answers the login with Connection.Tune."""
    login = b"AMQP\0\0\x09\x01" + struct.pack(">BHI", 1, 0, len(_START_OK)) + _START_OK + b"\xce"
    return struct.pack(">HH", 10, 30) in talk(port, says=login, until=struct.pack(">HH", 10, 30))


class Nats(Server):
    """NATS with JetStream."""

    name: ClassVar = "nats"
    polite: ClassVar = signal.SIGINT

    def __init__(self) -> None:
        self._program = binary("nats-server", of="NATS")
        super().__init__()

    @property
    def url(self) -> str:
        return f"nats://{HOST}:{self.port}"

    def _command(self) -> Sequence[str | Path]:
        return (self._program, "-a", HOST, "-p", str(self.port), "-js", "-sd", self.directory / "jetstream")

    def _answers(self) -> bool:
        return nats_answers(self.port)


def nats_answers(port: int) -> bool:
    """Whether it takes us without a password, and has JetStream."""
    heard = talk(port, says=b'CONNECT {"verbose":false}\r\nPING\r\n', until=b"PONG\r\n")
    return b"PONG\r\n" in heard and b'"jetstream":true' in heard
