"""Making a queue: which provider, with which settings. Nothing connects before the first use."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Final, Literal, TypedDict, TypeVar, Unpack, overload

from sagaloom.clock import SystemClock
from sagaloom.durations import parse_duration
from sagaloom.errors import ConfigurationError, DefinitionError
from sagaloom.ports.queue import DeadLetterStorePort
from sagaloom.queue.providers import (
    BrokerOptions,
    QueueConnectionOptions,
    QueueProvider,
    choose_provider,
    opener_of,
    provider_of,
)
from sagaloom.queues.queue import Queue, QueueSettings, check_queue_name

__all__ = ["ParallelQueueOptions", "QueueOptions", "create_parallel_queue", "create_queue", "create_typed_queue"]

T = TypeVar("T")

_KNOWN: Final = frozenset(
    (
        *("provider", "auto_discover", "retry_attempts", "retry_delay", "connection", "dead_letter_store"),
        *("disable_auto_tracing", "max_length", "max_message_bytes", "deduplication_window"),
    )
)


class QueueOptions(TypedDict, total=False):
    """What `create_queue` and its sisters take, all of it optional.

    `provider`: `kv` (or `deno-kv`), `redis`, `rabbitmq`, `postgres`; left out, the environment is asked
    (`auto_discover=False`: then it is `kv`). `retry_attempts` (3) and `retry_delay` (1000; milliseconds, a timedelta or
    text such as `"5s"`): how often, and after which time, a message comes again whose handler has failed. `connection`:
    where the broker is. `dead_letter_store`: a home for dead letters in place of the broker's own.
    `disable_auto_tracing` (False): messages carry no trace but what is in their headers, and no spans are made.
    `max_length`: how many live messages the queue may hold; beyond that `enqueue` raises `QueueFull`.
    `max_message_bytes` (1 MiB of JSON). `deduplication_window` (300 seconds).
    """

    provider: QueueProvider | str | None
    auto_discover: bool
    retry_attempts: int
    retry_delay: timedelta | float | str
    connection: QueueConnectionOptions | None
    dead_letter_store: DeadLetterStorePort | None
    disable_auto_tracing: bool
    max_length: int | None
    max_message_bytes: int
    deduplication_window: float


class ParallelQueueOptions(QueueOptions, total=False):
    """The same, and how many messages a listener works on at once."""

    concurrency: int


@overload
def create_queue(name: str, payload_type: type[T], **options: Unpack[QueueOptions]) -> Queue[T]: ...
@overload
def create_queue(name: str, payload_type: None = None, **options: Unpack[QueueOptions]) -> Queue[Any]: ...
def create_queue(name: str, payload_type: Any = None, **options: Unpack[QueueOptions]) -> Queue[Any]:
    """A queue whose listener works on one message after the other. Payloads are JSON, or what `payload_type` says.

    Raises `ConfigurationError` for a name, provider or option that cannot be.

    >>> create_queue("mails", provider="kv")
    <Queue 'mails'>
    """
    return _created(name, payload_type, options, concurrency=1)


def create_typed_queue(
    name: str,
    payload_type: type[T],
    *,
    on_invalid: Literal["dead_letter", "discard"] = "dead_letter",
    **options: Unpack[QueueOptions],
) -> Queue[T]:
    """The same for payloads of one type: a dataclass, TypedDict, msgspec Struct, attrs class or pydantic model.
    A message that is none of it is refused when it is sent; one that came otherwise is a dead letter, or discarded.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Mail:
    ...     address: str
    >>> create_typed_queue("mails", Mail, provider="kv")
    <Queue 'mails'>
    """
    return _created(name, payload_type, options, concurrency=1, on_invalid=on_invalid)


@overload
def create_parallel_queue(
    name: str, payload_type: type[T], *, concurrency: int = 1, **options: Unpack[QueueOptions]
) -> Queue[T]: ...
@overload
def create_parallel_queue(
    name: str, payload_type: None = None, *, concurrency: int = 1, **options: Unpack[QueueOptions]
) -> Queue[Any]: ...
def create_parallel_queue(
    name: str, payload_type: Any = None, *, concurrency: int = 1, **options: Unpack[QueueOptions]
) -> Queue[Any]:
    """A queue whose listener works on `concurrency` messages at once; with 1 it is what `create_queue` makes. Each
    message is acknowledged when its own handler ends.

    >>> create_parallel_queue("mails", concurrency=0)
    Traceback (most recent call last):
    ...
    sagaloom.errors.ConfigurationError: concurrency must be a whole number of at least 1, got 0
    """
    return _created(name, payload_type, options, concurrency=concurrency)


def _created(
    name: str,
    payload_type: Any,
    options: QueueOptions,
    *,
    concurrency: int,
    on_invalid: Literal["dead_letter", "discard"] = "dead_letter",
) -> Queue[Any]:
    check_queue_name(name)
    unknown = sorted(options.keys() - _KNOWN)
    if unknown:
        raise ConfigurationError(f"queue {name!r} has no option {unknown[0]!r}; there are {', '.join(sorted(_KNOWN))}")
    connection = options.get("connection") or QueueConnectionOptions()
    if not isinstance(connection, QueueConnectionOptions):
        raise ConfigurationError(
            f"connection of queue {name!r} is {connection!r:.80}: write QueueConnectionOptions(redis='redis://...')"
        )
    settings = QueueSettings(
        concurrency=concurrency,
        retry_attempts=options.get("retry_attempts", 3),
        retry_delay_ms=_milliseconds(name, options),
        max_message_bytes=options.get("max_message_bytes", QueueSettings.max_message_bytes),
        on_invalid=on_invalid,
        traced=not options.get("disable_auto_tracing", False),
    )
    given = options.get("provider")
    provider = provider_of(given) if given is not None else None
    if provider is None:
        provider = choose_provider(connection) if options.get("auto_discover", True) else QueueProvider.KV
    clock = SystemClock()
    broker_options = BrokerOptions(
        deduplication_seconds=_seconds(name, options), max_length=_max_length(name, options), now=clock.now
    )
    return Queue(
        name,
        opener_of(provider, name, connection, broker_options),
        payload_type=payload_type,
        settings=settings,
        dead_letter_store=options.get("dead_letter_store"),
        clock=clock,
    )


def _milliseconds(name: str, options: Mapping[str, Any]) -> int:
    try:
        return round(parse_duration(options.get("retry_delay", 1_000)) / timedelta(milliseconds=1))
    except DefinitionError as error:
        raise ConfigurationError(f"retry_delay of queue {name!r}: {error.message}") from error


def _seconds(name: str, options: Mapping[str, Any]) -> float:
    window = options.get("deduplication_window", 300.0)
    if isinstance(window, bool) or not isinstance(window, (int, float)) or not 1 <= window <= 90 * 86_400:
        raise ConfigurationError(
            f"deduplication_window={window!r:.40} of queue {name!r} is not within 1 second and 90 days"
        )
    return float(window)


def _max_length(name: str, options: Mapping[str, Any]) -> int | None:
    most = options.get("max_length")
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
        raise ConfigurationError(f"max_length={most!r:.40} of queue {name!r} is no whole number above 0")
    return most
