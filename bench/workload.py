"""What is measured: sagas of an ordinary size, and the publishers that keep them busy.

An order takes three messages. Each changes a state of about 340 bytes and sends one effect, each to another target; the
third completes the run. An account takes messages for ever, which is what a hot set needs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from bench.databases import database_of, server_url
from sagaloom import CascadedMessage, Saga, SagaContext, SagaMessage, define_saga, saga_complete, send
from sagaloom.kv.postgres import PostgresDatabase, PostgresPresence, PostgresSagaRows
from sagaloom.kv.presence import FilePresence
from sagaloom.kv.sqlite import SqliteKeyValue
from sagaloom.ports.store import CommitResult, Lease, UnitOfWork
from sagaloom.runtime import PublishReceipt, RuntimeOptions, SagaRuntime
from sagaloom.stores import KvSagaStore, SqlSagaStore
from sagaloom.targets import CallableTarget, EffectRequest, callable_target

__all__ = [
    "MESSAGES_PER_ORDER",
    "Counted",
    "CountingStore",
    "account",
    "account_messages",
    "account_state",
    "open_runtime",
    "open_store",
    "order",
    "order_messages",
    "order_payloads",
    "publish_all",
    "receiver",
]

Counted = SqliteKeyValue | PostgresSagaRows
"""What counts its statements."""

MESSAGES_PER_ORDER = 3
State = dict[str, Any]
Message = SagaMessage[Any]
Context = SagaContext[State]

_LINES = [
    {"sku": "paper-a4-80g", "quantity": 5, "cents": 499},
    {"sku": "pencil-hb", "quantity": 12, "cents": 89},
]
_ADDRESS = {"name": "Ada Example", "street": "12 Example Street", "city": "Springfield", "zip": "12345"}


def order_payloads(order_id: str) -> list[tuple[str, dict[str, Any]]]:
    """The three messages of one order, as (type, payload)."""
    return [
        ("OrderPlaced", {"orderId": order_id, "cents": 3563, "currency": "EUR", "customerId": "c-1000001"}),
        ("OrderPaid", {"orderId": order_id, "cents": 3563, "paymentId": "p-1000001"}),
        ("OrderShipped", {"orderId": order_id, "parcelId": "parcel-1000001", "carrier": "post"}),
    ]


def order_messages(order_id: str) -> list[Message]:
    return [SagaMessage(name, payload) for name, payload in order_payloads(order_id)]


def _on_placed(saga: Saga[State], message: Message, context: Context) -> Sequence[CascadedMessage]:
    order_id = message.payload["orderId"]
    saga.state = {
        "status": "awaiting-payment",
        "orderId": order_id,
        "customerId": message.payload["customerId"],
        "cents": message.payload["cents"],
        "currency": message.payload["currency"],
        "lines": _LINES,
        "address": _ADDRESS,
    }
    return [send("bench:payments", {"orderId": order_id, "charge": message.payload["cents"]})]


def _on_paid(saga: Saga[State], message: Message, context: Context) -> Sequence[CascadedMessage]:
    saga.state = {**saga.state, "status": "awaiting-parcel", "paymentId": message.payload["paymentId"]}
    return [send("bench:warehouse", {"orderId": message.payload["orderId"], "paid": True})]


def _on_shipped(saga: Saga[State], message: Message, context: Context) -> Sequence[CascadedMessage]:
    saga.state = {**saga.state, "status": "shipped", "parcelId": message.payload["parcelId"]}
    order_id = message.payload["orderId"]
    return [send("bench:mail", {"orderId": order_id, "shipped": True}), saga_complete({"orderId": order_id})]


def _order_of(message: Message) -> str:
    order_id: str = message.payload["orderId"]
    return order_id


_nothing_yet: State = {}

order = (
    define_saga("bench-order")
    .durability("t1")
    .state(_nothing_yet)
    .correlate(_order_of)
    .on("OrderPlaced", _on_placed)
    .on("OrderPaid", _on_paid, starts=False)
    .on("OrderShipped", _on_shipped, starts=False)
    .build()
)


def account_state(account_id: str) -> State:
    """The state of an account before its first movement."""
    return {"accountId": account_id, "balance": 0, "movements": 0, "lines": _LINES, "address": _ADDRESS}


def account_messages(account_ids: Sequence[str]) -> list[list[Message]]:
    """One movement for each account, each alone: nobody waits for the one before."""
    return [[SagaMessage("Moved", {"accountId": each, "cents": 1})] for each in account_ids]


def _on_moved(saga: Saga[State], message: Message, context: Context) -> Sequence[CascadedMessage]:
    state = saga.state
    saga.state = {**state, "balance": state["balance"] + 1, "movements": state["movements"] + 1}
    return [send("bench:ledger", {"accountId": message.payload["accountId"], "cents": 1})]


def _account_of(message: Message) -> str:
    account_id: str = message.payload["accountId"]
    return account_id


account = (
    define_saga("bench-account")
    .durability("t1")
    .state(_nothing_yet)
    .correlate(_account_of)
    .on("Moved", _on_moved, starts=False)
    .build()
)


async def _take(request: EffectRequest) -> None:
    """Receives an effect and has nothing to do."""


def receiver() -> CallableTarget:
    """Where the effects go."""
    return callable_target("bench", _take)


class CountingStore(KvSagaStore):
    """The store, counting its commits: how many, and how many of them carried messages."""

    commits = 0
    commits_with_messages = 0

    async def commit(self, units: Sequence[UnitOfWork], *, lease: Lease) -> CommitResult:
        self.commits += 1
        # Messages come before the settled effects of the same commit.
        self.commits_with_messages += bool(units) and units[0].mark is not None
        return await super().commit(units, lease=lease)


class CountingSqlStore(SqlSagaStore, CountingStore):
    """The same on PostgreSQL."""


async def open_store(path: Path, *, durable: bool = True) -> tuple[Counted, CountingStore]:
    """The store in the file `path`, or in the database that stands for it. `durable=False` is for filling it
    beforehand."""
    if server_url() is not None:
        rows = PostgresSagaRows(PostgresDatabase(url=await database_of(path)))
        await rows.open()
        presence = PostgresPresence(rows.database, files=FilePresence(path))
        return rows, CountingSqlStore(rows, presence=presence)
    kv = await SqliteKeyValue.open(path, synchronous="FULL" if durable else "OFF")
    return kv, CountingStore(kv, presence=FilePresence(path))


@asynccontextmanager
async def open_runtime(
    path: Path, *, options: RuntimeOptions | None = None
) -> AsyncGenerator[tuple[SagaRuntime, CountingStore, Counted]]:
    """A running runtime on the store `path`, as a user would have it."""
    kv, store = await open_store(path)
    try:
        runtime = SagaRuntime(store, definitions=[order, account], targets=[receiver()], options=options)
        async with runtime:
            yield runtime, store, kv
    finally:
        await store.close()


async def publish_all(
    runtime: SagaRuntime, groups: Sequence[Sequence[Message]], *, in_flight: int, is_shared: bool = False
) -> None:
    """Publishes every message, `in_flight` publishers side by side. A publisher takes a group, publishes its messages
    one after the other, each after the receipt of the one before, and takes the next group. `is_shared`: another
    process may be the one that applies a message, and then the publisher waits for that."""
    left = iter(groups)
    await asyncio.gather(*(_publisher(runtime, left, 5.0 if is_shared else None) for _ in range(in_flight)))


async def _publisher(runtime: SagaRuntime, left: Iterator[Sequence[Message]], wait: float | None) -> None:
    for group in left:
        for message in group:
            receipt = await runtime.publish(message, wait=wait)
            if not isinstance(receipt, PublishReceipt):
                receipt.raise_for_rejected()
            if receipt.outcomes[0].disposition != "applied":
                raise RuntimeError(f"not applied: {receipt}")
