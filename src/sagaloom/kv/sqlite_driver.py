"""What is used of apsw, and which SQLite it must have.

apsw has types of its own, but gives each cell of a row every type that SQLite has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, Literal, Protocol

from sagaloom.errors import ConfigurationError

__all__ = ["OLDEST_SQLITE", "Connection", "Cursor", "Rows", "Synchronous", "require_sound_sqlite", "sync_as"]

Synchronous = Literal["OFF", "NORMAL", "FULL", "EXTRA"]

OLDEST_SQLITE: Final = (3, 51, 3)


class Rows(Protocol):
    def __iter__(self) -> Iterator[tuple[Any, ...]]: ...

    def fetchall(self) -> list[tuple[Any, ...]]: ...


class Cursor(Protocol):
    """What is used of an apsw cursor."""

    def execute(self, statements: str, bindings: Sequence[int | str | bytes] = (), /) -> Rows: ...

    def executemany(self, statements: str, bindings: Iterable[Sequence[int | str | bytes]], /) -> object: ...


class Connection(Protocol):
    """What is used of an apsw connection."""

    @property
    def in_transaction(self) -> bool: ...

    def cursor(self) -> Cursor: ...

    def pragma(self, name: str, value: int | str | None = None, /) -> object: ...

    def readonly(self, name: str, /) -> bool: ...

    def set_busy_handler(self, callable: Callable[[int], bool], /) -> None: ...

    def total_changes(self) -> int: ...

    def wal_autocheckpoint(self, n: int, /) -> None: ...

    def set_wal_hook(self, callable: Callable[[Any, str, int], int], /) -> None: ...

    def wal_checkpoint(self, dbname: str | None, mode: int, /) -> tuple[int, int]: ...

    def close(self, *, force: bool) -> None: ...


def require_sound_sqlite(version: str) -> None:
    """Raises `ConfigurationError` for a SQLite library before 3.51.3, which can corrupt a file in WAL mode when one
    connection restarts the log while another checkpoints it.

    >>> require_sound_sqlite("3.51.3")
    """
    numbers = tuple(int(number) for number in version.split(".")[:3])
    if numbers < OLDEST_SQLITE:
        oldest = ".".join(map(str, OLDEST_SQLITE))
        raise ConfigurationError(
            f"the SQLite library of apsw is {version}, and before {oldest} a log shared by several connections can be"
            " corrupted: install a newer apsw wheel (pip install --upgrade apsw)"
        )


def sync_as(connection: Connection, synchronous: Synchronous) -> None:
    connection.pragma("synchronous", synchronous)
    if synchronous in ("FULL", "EXTRA"):
        # Where fsync stops at the drive's cache (macOS) ask for the sync that does not; elsewhere no effect.
        connection.pragma("fullfsync", 1)
        connection.pragma("checkpoint_fullfsync", 1)
