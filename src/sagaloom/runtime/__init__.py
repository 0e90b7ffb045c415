"""The shell: what runs sagas. `SagaRuntime` is all of it; `create_durable_saga_runtime` puts one over a store."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

from sagaloom.ports.store import SagaStore as SagaStorePort
from sagaloom.runtime.feed import FeedReset, FeedWatch
from sagaloom.runtime.options import RuntimeOptions
from sagaloom.runtime.receipts import (
    Outcome,
    PublishReceipt,
    PublishRejected,
    QueryResult,
    SignalReceipt,
    UpdateReceipt,
)
from sagaloom.runtime.runtime import SagaRuntime
from sagaloom.runtime.scheduler import ScheduleStatus
from sagaloom.runtime.timers import WaitingTimer

if TYPE_CHECKING:
    from sagaloom.composition import (
        DurableSagaRuntime,
        create_durable_saga_runtime,
        open_saga_runtime_kv,
        open_sql_saga_store,
    )
    from sagaloom.discovery import resolve_saga_store_backend
    from sagaloom.publisher import HttpSagaPublisherOptions, create_saga_publisher, create_sync_saga_publisher
    from sagaloom.stores import KvSagaStore, SqlSagaStore

__all__ = [
    "DurableSagaRuntime",
    "FeedReset",
    "FeedWatch",
    "HttpSagaPublisherOptions",
    "KvSagaStore",
    "Outcome",
    "PublishReceipt",
    "PublishRejected",
    "QueryResult",
    "RuntimeOptions",
    "SagaRuntime",
    "SagaStorePort",
    "ScheduleStatus",
    "SignalReceipt",
    "SqlSagaStore",
    "UpdateReceipt",
    "WaitingTimer",
    "create_durable_saga_runtime",
    "create_saga_publisher",
    "create_sync_saga_publisher",
    "open_saga_runtime_kv",
    "open_sql_saga_store",
    "resolve_saga_store_backend",
]

# Users look for these names here, but they live elsewhere: the shell itself must not load any adapter.
_ELSEWHERE: Final = {
    "DurableSagaRuntime": "sagaloom.composition",
    "HttpSagaPublisherOptions": "sagaloom.publisher",
    "KvSagaStore": "sagaloom.stores",
    "SqlSagaStore": "sagaloom.stores",
    "create_durable_saga_runtime": "sagaloom.composition",
    "create_saga_publisher": "sagaloom.publisher",
    "create_sync_saga_publisher": "sagaloom.publisher",
    "open_saga_runtime_kv": "sagaloom.composition",
    "open_sql_saga_store": "sagaloom.composition",
    "resolve_saga_store_backend": "sagaloom.discovery",
}


if not TYPE_CHECKING:  # a checker that saw this would accept any name

    def __getattr__(name: str) -> object:
        home = _ELSEWHERE.get(name)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(home), name)
