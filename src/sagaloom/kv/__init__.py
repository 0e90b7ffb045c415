"""Embedded key-value stores: what a saga store stands on when there is no database server.

Importing this package does not load SQLite: `SqliteKeyValue` comes with the first use of its name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sagaloom.kv.memory import MemoryKeyValue

if TYPE_CHECKING:
    from sagaloom.kv.sqlite import SqliteKeyValue

__all__ = ["MemoryKeyValue", "SqliteKeyValue"]


def __getattr__(name: str) -> Any:
    if name == "SqliteKeyValue":
        from sagaloom.kv.sqlite import SqliteKeyValue

        return SqliteKeyValue
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
