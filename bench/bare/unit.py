"""The bare unit: everything that one message has to cause, by hand, one transaction a batch.

For each message: decode its payload, load its instance, run the handler, encode the new state and the effect, make the
rows, find out that it was not seen before; then write all rows of the batch, delete the outbox rows that the batch
before has settled, commit with synchronous=FULL, and acknowledge. One thread, one loop, no engine: nothing is
registered, checked, retried, timed, cached, leased to somebody else, awaited or dispatched.

The rows are those of `rows.py`, table by table, of the same sizes; `loop.py` writes the same ones prepared beforehand,
which is what the database alone costs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

from bench.bare import rows
from bench.bare.loop import (
    DELETE_INDEX,
    DELETE_OUTBOX,
    INSERT_CORRELATION,
    INSERT_DEDUPE,
    INSERT_FEED,
    INSERT_INDEX,
    INSERT_OUTBOX,
    INSERT_STATE,
    INSERT_TRANSITION,
    UPDATE_STATE,
    Connection,
    Cursor,
    Row,
)

__all__ = ["Message", "arriving", "run"]

_LOAD_HEAD = "SELECT v FROM t_correlation WHERE k = ?"
_LOAD_STATE = "SELECT v, s FROM t_state WHERE k = ?"
_CHECK_LEASE = "SELECT s FROM t_lease WHERE k = ?"
_NEXT_VERSIONSTAMP = "UPDATE kv_counter SET n = n + 1 WHERE name = 'versionstamp' RETURNING n"
_RESERVE = "UPDATE kv_counter SET n = n + ? WHERE name = ? RETURNING n"

_STATUS = ("running", "running", "completed")
_TYPES = ("OrderPlaced", "OrderPaid", "OrderShipped")
_TARGETS = ("payments", "warehouse", "mail")
_SAGA = "bench-order"
_LINES = [
    {"sku": "paper-a4-80g", "quantity": 5, "cents": 499},
    {"sku": "pencil-hb", "quantity": 12, "cents": 89},
]
_ADDRESS = {"name": "Ada Example", "street": "12 Example Street", "city": "Springfield", "zip": "12345"}

_to_json = msgspec.json.Encoder().encode
_from_json = msgspec.json.Decoder().decode
_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder().decode


class Message(NamedTuple):
    """A message as it comes in: bytes, and what names it."""

    pk: int
    step: int
    id: str
    payload: bytes


def arriving(orders: int, batch: int) -> Iterator[list[Message]]:
    """The messages of `orders` orders, `batch` orders side by side: their first ones, their second, their third."""
    for first in range(0, orders, batch):
        side_by_side = range(first + 1, min(first + batch, orders) + 1)
        for step in range(3):
            yield [Message(pk, step, f"{step:012x}{pk:020x}", _to_json(_payload(pk, step))) for pk in side_by_side]


def run(connection: Connection, batches: list[list[Message]]) -> float:
    """Handles all messages; the seconds it took. Raises when one was seen before or an instance is not as expected."""
    cursor = connection.cursor()
    parts = rows.partitions(max(message.pk for batch in batches for message in batch))
    acknowledged: list[str] = []
    settled: list[Row] = []
    began = time.perf_counter()
    for batch in batches:
        settled = _handle(cursor, batch, parts, settled)
        acknowledged.extend([message.id for message in batch])
    if settled:
        cursor.execute("BEGIN IMMEDIATE")
        cursor.executemany(DELETE_OUTBOX, settled)
        cursor.execute("COMMIT")
    seconds = time.perf_counter() - began
    if len(acknowledged) != sum(map(len, batches)):
        raise RuntimeError("not every message was acknowledged")
    return seconds


def _handle(cursor: Cursor, batch: list[Message], parts: list[int], settled: list[Row]) -> list[Row]:
    """One transaction. Returns the outbox rows that the next one settles."""
    execute = cursor.execute
    execute("BEGIN IMMEDIATE")
    if execute(_CHECK_LEASE, (b"\x11\x00",)).fetchall() != [(1,)]:
        raise RuntimeError("the lease is lost")
    stamp: int = execute(_NEXT_VERSIONSTAMP).fetchall()[0][0]
    number: int = execute(_RESERVE, (len(batch), "c:outbox")).fetchall()[0][0] - len(batch)
    heads: list[Row] = []
    new_states: list[Row] = []
    states: list[Row] = []
    left: list[Row] = []
    entered: list[Row] = []
    entries: list[Row] = []
    marks: list[Row] = []
    effects: list[Row] = []
    happened: list[Any] = []
    events = 0
    now = time.time()
    for message in batch:
        pk, step = message.pk, message.step
        payload = _from_json(message.payload)
        key = payload["orderId"]
        state_key = rows.state_key(pk)
        status = _STATUS[step]
        if step == 0:
            head_key = rows.correlation_key(pk)
            if execute(_LOAD_HEAD, (head_key,)).fetchall():
                raise RuntimeError(f"{key} is there already")
            heads.append((head_key, _pack((_SAGA, key, pk, pk % 64, 1, now, False, None)), stamp))
            stamp_before, revision = 0, 1
            state: dict[str, Any] = {}
            entered.append((rows.index_key(pk, b"running"), b"", stamp))
        else:
            ((stored, stamp_before),) = execute(_LOAD_STATE, (state_key,)).fetchall()
            instance = _unpack(stored)
            revision, state = instance[5] + 1, _from_json(instance[6])
            if step == 2:
                left.append((rows.index_key(pk, b"running"),))
                entered.append((rows.index_key(pk, b"completed"), b"", stamp))
        state, effect = _handler(state, payload, step)
        result = _to_json({"orderId": key}) if step == 2 else None
        ended = now if step == 2 else None
        instance = [_SAGA, key, pk, 1, status, revision, _to_json(state), 1, "t1", now, now, revision, 0, revision]
        instance += [_TYPES[step], result, None, ended, ended, False, None, None, None, (), (), "json"]
        written = _pack(instance)
        if step == 0:
            new_states.append((state_key, written, stamp))
        else:
            states.append((written, stamp, state_key, stamp_before))
        effect_key = f"{pk:020x}{revision:020x}"
        summary = ("send", f"bench:{_TARGETS[step]}", effect_key, None)
        record = ("handle", _TYPES[step], status, (summary,) if step < 2 else (summary, ("complete", None, None, None)))
        entry: list[Any] = [revision, revision, "applied", _TYPES[step], message.id, now, "running", status, (record,)]
        entry += [1, message.payload, None, "door", None, None, None, None, None, 1]
        entries.append((rows.transition_key(pk, revision), _pack(entry), stamp))
        marks.append((rows.dedupe_key(pk, revision), _pack((message.id, message.id, bytes(16), now, 1)), stamp))
        lane = f"{_SAGA}\0{key}\0001\0bench:{_TARGETS[step]}"
        sent: list[Any] = [effect_key, lane, "bench", _TARGETS[step], _to_json(effect), _SAGA, key, 1, revision, 0]
        sent += [message.id, now, 1, None, None, None, None, False, None, None, 0, None, None, None]
        effects.append((rows.outbox_key(parts[pk - 1], number), _pack(sent), stamp))
        number += 1
        happened.append((now, _SAGA, key, 1, revision, _TYPES[step], message.id, _MOMENTS[step]))
        events += len(_MOMENTS[step])
    first: int = execute(_RESERVE, (events, "c:feed")).fetchall()[0][0] - events
    if settled:
        cursor.executemany(DELETE_OUTBOX, settled)
    for statement, made in (
        (INSERT_CORRELATION, sorted(heads)),
        (INSERT_STATE, new_states),
        (UPDATE_STATE, states),
        (DELETE_INDEX, left),
        (INSERT_INDEX, entered),
        (INSERT_TRANSITION, entries),
        (INSERT_DEDUPE, marks),
        (INSERT_OUTBOX, sorted(effects)),
        (INSERT_FEED, [(rows.feed_key(first), _pack(happened), stamp)]),
    ):
        if len(made) == 1:
            execute(statement, made[0])
        elif made:
            cursor.executemany(statement, made)
    execute("COMMIT")
    return [(row[0],) for row in effects]


# What the feed shows of each message: received, started, changed, completed.
_MOMENTS = (
    ((0, "pending", None), (1, "running", None), (2, "running", None)),
    ((0, "running", None), (2, "running", None)),
    ((0, "running", None), (2, "completed", None), (4, "completed", None)),
)


def _payload(pk: int, step: int) -> dict[str, Any]:
    order_id = f"o-{pk:08d}"
    if step == 0:
        return {"orderId": order_id, "cents": 3563, "currency": "EUR", "customerId": "c-1000001"}
    if step == 1:
        return {"orderId": order_id, "cents": 3563, "paymentId": "p-1000001"}
    return {"orderId": order_id, "parcelId": "parcel-1000001", "carrier": "post"}


def _handler(state: dict[str, Any], payload: dict[str, Any], step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the handlers of `bench/workload.py` do."""
    order_id = payload["orderId"]
    if step == 0:
        placed = {
            "status": "awaiting-payment",
            "orderId": order_id,
            "customerId": payload["customerId"],
            "cents": payload["cents"],
            "currency": payload["currency"],
            "lines": _LINES,
            "address": _ADDRESS,
        }
        return placed, {"orderId": order_id, "charge": payload["cents"]}
    if step == 1:
        paid = {**state, "status": "awaiting-parcel", "paymentId": payload["paymentId"]}
        return paid, {"orderId": order_id, "paid": True}
    return {**state, "status": "shipped", "parcelId": payload["parcelId"]}, {"orderId": order_id, "shipped": True}
