"""PostgreSQL: where sagas and job runs live when several hosts, or people with SQL, shall reach them.

Importing this package loads no driver; it comes with the first use of a name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sagaloom.kv.postgres.connection import PostgresDatabase
    from sagaloom.kv.postgres.presence import PostgresPresence
    from sagaloom.kv.postgres.rows import PostgresKeyValue
    from sagaloom.kv.postgres.sagas import PostgresSagaRows

__all__ = ["PostgresDatabase", "PostgresKeyValue", "PostgresPresence", "PostgresSagaRows"]

_HOMES = {
    "PostgresDatabase": "connection",
    "PostgresKeyValue": "rows",
    "PostgresPresence": "presence",
    "PostgresSagaRows": "sagas",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
