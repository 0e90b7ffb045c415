"""Saga stores: durable homes for sagas behind `sagaloom.ports.store.SagaStore`.

Importing this package loads no driver; each store comes with the first use of its name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sagaloom.stores.kv import KvSagaStore
    from sagaloom.stores.sql import SqlSagaStore

__all__ = ["KvSagaStore", "SqlSagaStore"]


def __getattr__(name: str) -> Any:
    if name == "KvSagaStore":
        from sagaloom.stores.kv import KvSagaStore

        return KvSagaStore
    if name == "SqlSagaStore":
        from sagaloom.stores.sql import SqlSagaStore

        return SqlSagaStore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
