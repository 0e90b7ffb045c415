"""Which broker a queue is at, and how it is reached: as it was said, or as the environment says.

    rabbitmq   ConnectionStrings__rabbitmq, services__rabbitmq__amqp__0, services__rabbitmq__tcp__0, RABBITMQ_URL,
               AMQP_URL
    redis      ConnectionStrings__redis, ConnectionStrings__garnet, services__redis__tcp__0, services__garnet__tcp__0,
               REDIS_URL
    kv         NETSCRIPT_QUEUE_KV_PATH, services__kv__sqlite__0, ConnectionStrings__kv, DENO_KV_URL; else the file
               .sagaloom/queues.db
    postgres   only when it is named: ConnectionStrings__postgres, POSTGRES_URL, DATABASE_URL

Connection strings may be URLs or what .NET Aspire writes (`localhost:6379,password=...`, `Host=...;Username=...`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Final
from urllib.parse import quote, urlsplit

from sagaloom.clock import SystemClock
from sagaloom.errors import ConfigurationError
from sagaloom.outbound import without_credentials
from sagaloom.ports.queue import QueueBroker

__all__ = ["BrokerOptions", "QueueConnectionOptions", "QueueProvider", "choose_provider", "opener_of", "provider_of"]

_log = logging.getLogger("sagaloom.queue")
_NAMESPACE: Final = "sagaloom"
_DEFAULT_PATH: Final = Path(".sagaloom") / "queues.db"


class QueueProvider(StrEnum):
    """Where a queue lives. `deno-kv` is another word for `kv`, the embedded one."""

    KV = "kv"
    DENO_KV = "kv"
    REDIS = "redis"
    RABBITMQ = "rabbitmq"
    POSTGRES = "postgres"


@dataclass(frozen=True, kw_only=True)
class QueueConnectionOptions:
    """Where the brokers are: a path for `kv`, URLs for the others. What is None is read from the environment.

    `namespace` keeps queues of one name apart: a prefix of the keys in Redis and of the names in RabbitMQ, a schema in
    PostgreSQL.
    """

    kv: str | os.PathLike[str] | None = None
    redis: str | None = None
    rabbitmq: str | None = None
    postgres: str | None = None
    namespace: str | None = None


@dataclass(frozen=True, kw_only=True)
class BrokerOptions:
    """What every broker has to know of a queue."""

    deduplication_seconds: float = 300.0
    max_length: int | None = None
    now: Callable[[], datetime] = SystemClock().now


_VARIABLES: Final[Mapping[QueueProvider, tuple[str, ...]]] = {
    QueueProvider.RABBITMQ: (
        *("ConnectionStrings__rabbitmq", "services__rabbitmq__amqp__0", "services__rabbitmq__tcp__0"),
        *("RABBITMQ_URL", "AMQP_URL"),
    ),
    QueueProvider.REDIS: (
        *("ConnectionStrings__redis", "ConnectionStrings__garnet", "services__redis__tcp__0"),
        *("services__garnet__tcp__0", "REDIS_URL"),
    ),
    QueueProvider.KV: (
        *("NETSCRIPT_QUEUE_KV_PATH", "services__kv__sqlite__0", "ConnectionStrings__kv", "DENO_KV_URL"),
    ),
    QueueProvider.POSTGRES: ("ConnectionStrings__postgres", "POSTGRES_URL", "DATABASE_URL"),
}
_EXAMPLES: Final[Mapping[QueueProvider, str]] = {
    QueueProvider.RABBITMQ: "amqp://guest:guest@HOST:5672/",
    QueueProvider.REDIS: "redis://HOST:6379/0",
    QueueProvider.POSTGRES: "postgresql://USER@HOST:5432/DATABASE",
}
_SCHEMES: Final[Mapping[QueueProvider, tuple[str, ...]]] = {
    QueueProvider.RABBITMQ: ("amqp", "amqps"),
    QueueProvider.REDIS: ("redis", "rediss", "unix"),
    QueueProvider.POSTGRES: ("postgresql", "postgres"),
}
_EXTRAS: Final[Mapping[QueueProvider, str]] = {
    QueueProvider.RABBITMQ: "aiormq",
    QueueProvider.REDIS: "redis",
    QueueProvider.POSTGRES: "asyncpg",
}


def provider_of(given: object) -> QueueProvider:
    """The provider that is meant; raises `ConfigurationError` for another word."""
    word = given.strip().lower() if isinstance(given, str) else ""
    try:
        return QueueProvider("kv" if word == "deno-kv" else word)
    except ValueError:
        known = ", ".join(provider.value for provider in QueueProvider)
        raise ConfigurationError(f"Unknown queue provider: {given!r:.80}; there are {known}") from None


def choose_provider(connection: QueueConnectionOptions, env: Mapping[str, str] | None = None) -> QueueProvider:
    """The first of RabbitMQ and Redis that the connection options or the environment name; else the embedded one.

    >>> choose_provider(QueueConnectionOptions(), {"REDIS_URL": "redis://cache:6379"}).value
    'redis'
    """
    for provider in (QueueProvider.RABBITMQ, QueueProvider.REDIS):
        if _found(provider, connection, env) is not None:
            return provider
    return QueueProvider.KV


def address_of(
    provider: QueueProvider, connection: QueueConnectionOptions, env: Mapping[str, str] | None = None
) -> str:
    """The URL (for `kv` the path) of a provider; raises `ConfigurationError` naming what was read.

    >>> address_of(QueueProvider.REDIS, QueueConnectionOptions(), {"ConnectionStrings__redis": "cache:6379,password=p"})
    'redis://:p@cache:6379'
    """
    found = _found(provider, connection, env)
    if provider is QueueProvider.KV:
        return str(_DEFAULT_PATH) if found is None else _checked_path(*found)
    if found is None:
        raise ConfigurationError(
            f"{provider.value} connection not found: neither QueueConnectionOptions({provider.value}=...) nor "
            f"{', '.join(_VARIABLES[provider])} is set; write for example {_EXAMPLES[provider]}"
        )
    return _checked_url(provider, *found)


def _found(
    provider: QueueProvider, connection: QueueConnectionOptions, env: Mapping[str, str] | None
) -> tuple[str, str] | None:
    """What names the provider, and where it was read."""
    given: str | os.PathLike[str] | None = getattr(connection, provider.value)
    if given is not None:
        return os.fspath(given), f"QueueConnectionOptions({provider.value}=)"
    variables = os.environ if env is None else env
    for variable in _VARIABLES[provider]:
        value = variables.get(variable, "").strip()
        if value:
            return value, variable
    return None


def _checked_path(value: str, source: str) -> str:
    path = value
    for part in value.split(";"):
        name, is_pair, rest = part.partition("=")
        if is_pair and name.strip().lower() in ("data source", "datasource", "filename"):
            path = rest.strip()
    path = path.removeprefix("file://")
    if "://" in path or not path or "\0" in path:
        raise ConfigurationError(
            f"{source} names {without_credentials(value)!r:.120}, and the embedded queue needs a path of a file: write "
            f"for example {_DEFAULT_PATH}"
        )
    return path


def _checked_url(provider: QueueProvider, value: str, source: str) -> str:
    url = value
    scheme = _SCHEMES[provider][0]
    if "://" not in value:
        url = _from_aspire(provider, value)
    elif value.startswith("tcp://"):
        url = f"{scheme}://{value.removeprefix('tcp://')}"
    try:
        parts = urlsplit(url)
        is_url = parts.scheme in _SCHEMES[provider] and (parts.port is None or parts.port > 0)
    except ValueError:
        is_url = False
    if not is_url:
        raise ConfigurationError(
            f"{source} is no address of {provider.value}: {without_credentials(value)!r:.120}; write for example "
            f"{_EXAMPLES[provider]}"
        )
    return url


def _from_aspire(provider: QueueProvider, value: str) -> str:
    """A URL from what .NET writes: `host:port,password=...` for Redis, `Host=...;Port=...` for PostgreSQL."""
    separator = ";" if provider is QueueProvider.POSTGRES else ","
    parts = [part.strip() for part in value.split(separator) if part.strip()]
    pairs = {name.strip().lower(): rest.strip() for name, mark, rest in (part.partition("=") for part in parts) if mark}
    if provider is QueueProvider.REDIS and parts and "=" not in parts[0]:
        user, secret = quote(pairs.get("user", ""), safe=""), quote(pairs.get("password", ""), safe="")
        login = f"{user}:{secret}@" if user or secret else ""
        scheme = "rediss" if pairs.get("ssl", "").lower() == "true" else "redis"
        database = f"/{pairs['defaultdatabase']}" if "defaultdatabase" in pairs else ""
        return f"{scheme}://{login}{parts[0]}{database}"
    if provider is QueueProvider.POSTGRES and "host" in pairs:
        user = quote(pairs.get("username", pairs.get("user id", "")), safe="")
        secret = quote(pairs.get("password", ""), safe="")
        login = f"{user}:{secret}@" if secret else f"{user}@" if user else ""
        return f"postgresql://{login}{pairs['host']}:{pairs.get('port', '5432')}/{pairs.get('database', '')}"
    if provider is QueueProvider.RABBITMQ and len(parts) == 1:
        return f"amqp://{value}"
    return value


def opener_of(
    provider: QueueProvider, queue: str, connection: QueueConnectionOptions, options: BrokerOptions
) -> Callable[[], Awaitable[QueueBroker]]:
    """What opens the broker. The address is checked now, and the driver is imported when it opens."""
    address = address_of(provider, connection)

    async def open_broker() -> QueueBroker:
        _log.info("queue %s is at %s, %s", queue, provider.value, without_credentials(address))
        try:
            return await _OPENERS[provider](queue, address, connection, options)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] != _EXTRAS.get(provider):
                raise
            raise ConfigurationError(
                f"queue {queue!r} is at {provider.value}, whose driver is not installed: pip install "
                f"'sagaloom[{provider.value}]'"
            ) from error

    return open_broker


async def _open_kv(queue: str, address: str, connection: QueueConnectionOptions, options: BrokerOptions) -> QueueBroker:
    from sagaloom.kv.presence import FilePresence
    from sagaloom.kv.sqlite import SqliteKeyValue
    from sagaloom.queues.kv import KvQueueBroker

    path = Path(address)
    if path == _DEFAULT_PATH:
        path.parent.mkdir(parents=True, exist_ok=True)
    kv = await SqliteKeyValue.open(path)
    broker = KvQueueBroker(
        queue,
        kv,
        presence=lambda seconds: FilePresence(f"{path}.{queue}", lease_seconds=seconds),
        now=options.now,
        deduplication_seconds=options.deduplication_seconds,
        max_length=options.max_length,
        on_close=kv.close,
    )
    try:
        await broker.open()
    except BaseException:
        await kv.close()
        raise
    return broker


async def _open_redis(
    queue: str, address: str, connection: QueueConnectionOptions, options: BrokerOptions
) -> QueueBroker:
    from sagaloom.queues.redis import RedisQueueBroker

    return await RedisQueueBroker.connect(
        queue,
        address,
        namespace=connection.namespace or _NAMESPACE,
        deduplication_seconds=options.deduplication_seconds,
        max_length=options.max_length,
    )


async def _open_postgres(
    queue: str, address: str, connection: QueueConnectionOptions, options: BrokerOptions
) -> QueueBroker:
    from sagaloom.queues.postgres import PostgresQueueBroker

    return await PostgresQueueBroker.connect(
        queue,
        address,
        schema=connection.namespace or _NAMESPACE,
        deduplication_seconds=options.deduplication_seconds,
        max_length=options.max_length,
    )


async def _open_rabbitmq(
    queue: str, address: str, connection: QueueConnectionOptions, options: BrokerOptions
) -> QueueBroker:
    from sagaloom.queues.rabbitmq import RabbitMQQueueBroker

    return await RabbitMQQueueBroker.connect(
        queue, address, namespace=connection.namespace, max_length=options.max_length
    )


_OPENERS: Final[
    Mapping[QueueProvider, Callable[[str, str, QueueConnectionOptions, BrokerOptions], Awaitable[QueueBroker]]]
] = {
    QueueProvider.KV: _open_kv,
    QueueProvider.REDIS: _open_redis,
    QueueProvider.POSTGRES: _open_postgres,
    QueueProvider.RABBITMQ: _open_rabbitmq,
}
