"""What is used of asyncpg, which has no types of its own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from importlib import import_module
from typing import Any, Protocol

from sagaloom.errors import ConfigurationError

try:
    _asyncpg: Any = import_module("asyncpg")
except ImportError as error:
    raise ConfigurationError(
        "the sql saga store needs asyncpg, which is not installed: pip install 'sagaloom[postgres]'"
    ) from error

__all__ = [
    "Connection",
    "InterfaceError",
    "InternalClientError",
    "Pool",
    "PostgresError",
    "Row",
    "Transaction",
    "connect",
]


class Row(Protocol):
    """One row of an answer, by name or by position."""

    def __getitem__(self, key: Any, /) -> Any: ...


class Transaction(Protocol):
    async def start(self) -> None: ...

    async def commit(self) -> None: ...

    async def rollback(self) -> None: ...

    async def __aenter__(self) -> None: ...

    async def __aexit__(self, *_: object) -> None: ...


class Connection(Protocol):
    async def fetch(self, query: str, *args: object, timeout: float | None = None) -> list[Row]: ...

    async def fetchval(self, query: str, *args: object, timeout: float | None = None) -> Any: ...

    async def execute(self, query: str, *args: object, timeout: float | None = None) -> str: ...

    def transaction(self) -> Transaction: ...

    def get_server_pid(self) -> int: ...

    def get_server_version(self) -> Any: ...

    def add_termination_listener(self, callback: Callable[[Any], None]) -> None: ...

    def add_log_listener(self, callback: Callable[[Any, Any], None]) -> None: ...

    def remove_log_listener(self, callback: Callable[[Any, Any], None]) -> None: ...

    async def add_listener(self, channel: str, callback: Callable[..., None]) -> None: ...

    async def close(self, *, timeout: float | None = None) -> None: ...

    def is_closed(self) -> bool: ...

    def terminate(self) -> None: ...


class Pool(Protocol):
    def acquire(self, *, timeout: float | None = None) -> Awaitable[Connection]: ...

    def release(self, connection: Any, *, timeout: float | None = None) -> Coroutine[Any, Any, None]: ...

    async def close(self) -> None: ...

    def terminate(self) -> None: ...


connect: Callable[..., Any] = _asyncpg.connect
PostgresError: type[Exception] = _asyncpg.PostgresError
InterfaceError: type[Exception] = _asyncpg.InterfaceError
InternalClientError: type[Exception] = _asyncpg.InternalClientError
"""What comes of a connection that was cut between the two messages of one statement."""
