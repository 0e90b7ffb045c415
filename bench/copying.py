"""Rows of many units by COPY, for filling a large store in PostgreSQL: the same rows that its `commit` would write.

Two processes share the work. `bench/filling.py` writes the first thousand through the store itself, so that everything
else is there that a first commit makes.
"""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Final

from sagaloom.engine.records import FeedRecord
from sagaloom.ids import key_hash, partition_of
from sagaloom.kv.postgres import driver
from sagaloom.kv.postgres.columns import entry_row, head_row, inbox_row, outbox_row, run_row, timer_row
from sagaloom.ports.store import UnitOfWork
from sagaloom.stores.rows import encode, mark_key, micros

__all__ = ["copied"]

_AT_ONCE: Final = 5_000
_WORKERS: Final = 2
_COLUMNS: Final = {
    "outbox": [
        "part",
        "seq",
        "saga_id",
        "correlation_key",
        "run",
        "target",
        "effect_key",
        "created_at",
        "v",
        "attempt",
    ],
    "feed": ["n", "v"],
}
_NUMBERED: Final = ("inbox", "outbox")

_Rows = dict[str, list[tuple[object, ...]]]


def copied(url: str, count: int, make: Callable[..., Iterable[UnitOfWork]], *arguments: Any) -> None:
    """Copies the units that `make(numbers, *arguments)` returns for `range(count)`, in pieces; then has the tables as
    a server that was left alone for a while would have them."""
    pieces = [range(first, min(first + _AT_ONCE, count)) for first in range(0, count, _AT_ONCE)]
    with ProcessPoolExecutor(_WORKERS, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in [pool.submit(_copy, url, pieces[n::_WORKERS], make, *arguments) for n in range(_WORKERS)]:
            done.result()
    asyncio.run(_settle(url))


def _copy(url: str, pieces: Sequence[range], make: Callable[..., Iterable[UnitOfWork]], *arguments: Any) -> None:
    async def copy() -> None:
        connection: Any = await driver.connect(url)
        for numbers in pieces:
            rows = _rows_of(make(numbers, *arguments))
            for table in _NUMBERED:
                await _number(connection, table, rows)
            for table, found in rows.items():
                await connection.copy_records_to_table(
                    f"saga_runtime_{table}", records=found, columns=_COLUMNS.get(table)
                )
        await connection.close()

    asyncio.run(copy())


async def _number(connection: driver.Connection, table: str, rows: _Rows) -> None:
    """Gives the rows of a queue their numbers."""
    if found := rows.get(table):
        taken = f"SELECT saga_runtime_numbers('saga_runtime_{table}_number', $1)"
        first: int = await connection.fetchval(taken, len(found))
        rows[table] = [(row[0], seq, *row[1:]) for seq, row in enumerate(found, first)]


def _rows_of(units: Iterable[UnitOfWork]) -> _Rows:
    rows: _Rows = {}
    feed: list[FeedRecord] = []
    for unit in units:
        feed += unit.feed
        for table, row in _rows(unit):
            rows.setdefault(table, []).append(row)
    if feed:
        # One for all of them, as a commit has it: the feed is pruned row by row.
        rows["feed"] = [(sum(len(record.moments) for record in feed), encode(feed))]
    return rows


def _rows(unit: UnitOfWork) -> Iterator[tuple[str, tuple[object, ...]]]:
    if unit.head is not None:
        yield "correlation", (*head_row(key_hash(unit.head.saga_id, unit.head.key), encode(unit.head)), 0)
    if unit.instance is not None and unit.entry is not None:
        pk, run = unit.instance.pk, unit.instance.run
        yield "state", run_row(pk, run, encode(unit.instance))
        yield "transition", entry_row(pk, run, unit.entry.entry_no, encode(unit.entry))
    if unit.mark is not None:
        yield "dedupe", (*mark_key(unit.mark_pk, unit.mark.dedupe_key)[1:], encode(unit.mark))
    for envelope in unit.inbox_add:
        yield "inbox", inbox_row(partition_of(key_hash(envelope.saga_id, envelope.key)), encode(envelope))
    for effect in unit.outbox_add:
        yield "outbox", (*outbox_row(unit.part, encode(effect)), 0)
    for timer in unit.timers_add:
        due = micros(timer.due_at)
        yield "timer", timer_row(due, timer.id, encode(timer))


async def _settle(url: str) -> None:
    connection: driver.Connection = await driver.connect(url)
    await connection.execute("SELECT saga_runtime_number_feed(true)", timeout=120)
    await connection.execute("VACUUM (ANALYZE)", timeout=120)
    await connection.execute("CHECKPOINT", timeout=120)
    await connection.close()
