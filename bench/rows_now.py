"""What the store writes for one order today, and whether the yardstick still says the same."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from bench.bare import rows
from bench.harness import Bench, Finding
from bench.workload import open_runtime, order, order_messages
from sagaloom.codec import encode_any
from sagaloom.engine.correlation import address
from sagaloom.kv.packing import pack
from sagaloom.ports.keyvalue import Check, Committed, Conflicted, Key

__all__ = ["compare", "rows_of_one_order", "show"]

_PERCENT_MAX = 3.0
_ORDER = "o-00000001"
_ONCE = ("saga_seen", "lease")


def rows_of_one_order(place: Path) -> list[list[tuple[str, int, int]]]:
    """(table, bytes of the key, bytes of the value) of every row that each message of an order writes, settled
    effects left out; a deleted row has -1 bytes of value."""
    return asyncio.run(_rows_of_one_order(place / "rows.db"))


async def _rows_of_one_order(path: Path) -> list[list[tuple[str, int, int]]]:
    written: list[list[tuple[str, int, int]]] = []
    async with open_runtime(path) as (runtime, _, kv):
        real = kv.commit

        async def commit(
            *,
            checks: Sequence[Check] = (),
            inserts: Sequence[tuple[Key, bytes]] = (),
            puts: Sequence[tuple[Key, bytes]] = (),
            deletes: Sequence[Key] = (),
            reserve: Mapping[str, int] | None = None,
        ) -> Committed | Conflicted:
            done = await real(checks=checks, inserts=inserts, puts=puts, deletes=deletes, reserve=reserve)
            if isinstance(done, Committed) and puts:
                rows = (*puts, *inserts)
                found = [(str(key[0]), len(pack(key[1:], done.bases)), len(value)) for key, value in rows]
                gone = [(str(key[0]), len(pack(key[1:])), -1) for key in deletes]
                written.append([row for row in found + gone if row[0] not in _ONCE])
            return done

        kv.commit = commit  # type: ignore[method-assign]
        for message in order_messages(_ORDER):
            receipt = await runtime.publish(message)
            receipt.raise_for_rejected()
            await runtime.settled()
        del kv.commit
    return written[-3:]


def _yardstick() -> dict[str, int]:
    """Bytes of the values by table, of one order."""
    return {
        "correlation": rows.HEAD_BYTES,
        "state": sum(rows.STATE_BYTES),
        "instance_index": 0,
        "transition": sum(rows.TRANSITION_BYTES),
        "dedupe": 3 * rows.DEDUPE_BYTES,
        "outbox": sum(rows.EFFECT_BYTES),
        "feed": sum(rows.FEED_BYTES),
    }


def compare(bench: Bench) -> None:
    """Notes how far the rows of today are from those of the baselines."""
    with bench.place() as place:
        written = [row for message in rows_of_one_order(place) for row in message if row[2] >= 0]
    bytes_now: dict[str, int] = {}
    rows_now: dict[str, int] = {}
    for table, _, size in written:
        bytes_now[table] = bytes_now.get(table, 0) + size
        rows_now[table] = rows_now.get(table, 0) + 1
    frozen = _yardstick()
    now, then = sum(bytes_now.values()), sum(frozen.values())
    same_rows = rows_now == rows.ROWS_PER_ORDER
    note = "" if same_rows else f"other rows: {rows_now}, yardstick {rows.ROWS_PER_ORDER}"
    bench.found(
        Finding(
            line="1",
            what="check: rows of an order, difference from the bare loop's",
            ours=f"{len(written)} rows, {now} B",
            baseline=f"{sum(rows.ROWS_PER_ORDER.values())} rows, {then} B",
            value=abs(now - then) / then * 100 if same_rows else 100.0,
            unit=" %",
            must=_PERCENT_MAX,
            aim=0.0,
            at_least=False,
            note=note,
        )
    )


def show(place: Path) -> str:
    """The rows of today, for whoever changes the yardstick."""
    lines: list[str] = []
    for number, message in enumerate(rows_of_one_order(place), 1):
        lines.append(f"message {number}")
        for table, key, value in message:
            lines.append(f"  {table:15} key {key:3} B  " + (f"value {value:4} B" if value >= 0 else "deleted"))
    encode = msgspec.msgpack.Encoder().encode
    for number, sent in enumerate(order_messages(_ORDER), 1):
        envelope, _ = address(
            order,
            sent,
            payload_json=encode_any(sent.payload),
            accepted_at=datetime.now(UTC),
            message_id="0" * 32,
        )
        lines.append(f"an inbox row of message {number} would have {len(encode(envelope))} B")
    return "\n".join(lines)
