"""The bare loop: our tables, our rows, our keys and our durability, written by hand, and nothing else.

Everything is made before the clock starts: keys, values, batches. What is timed is what no engine on this store could
leave out: one transaction a batch that checks the lease, takes numbers, writes the rows of its messages, deletes the
outbox rows that the batch before has settled, and commits with synchronous=FULL.

The dedupe is the primary key of its row, the check of the revision is in the UPDATE, and the number of changed rows
says whether both held. Rows go in key order, table by table, and new ones sixteen to a statement, as in the store.

    python -m bench.bare.loop FILE [ORDERS [BATCH]]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import apsw

from bench.bare import rows

__all__ = [
    "DELETE_INBOX",
    "DELETE_INDEX",
    "DELETE_OUTBOX",
    "INSERT_CORRELATION",
    "INSERT_DEDUPE",
    "INSERT_FEED",
    "INSERT_INBOX",
    "INSERT_INDEX",
    "INSERT_OUTBOX",
    "INSERT_STATE",
    "INSERT_TRANSITION",
    "UPDATE_STATE",
    "Batch",
    "Connection",
    "Row",
    "commit",
    "connect",
    "prepared",
    "run",
    "run_timed",
]

Row = tuple[Any, ...]

INSERT_CORRELATION = "INSERT OR ROLLBACK INTO t_correlation (k, v, s) VALUES (?, ?, ?)"
INSERT_STATE = "INSERT OR ROLLBACK INTO t_state (k, v, s) VALUES (?, ?, ?)"
UPDATE_STATE = "UPDATE t_state SET v = ?, s = ? WHERE k = ? AND s = ?"
INSERT_INDEX = "INSERT OR ROLLBACK INTO t_instance_index (k, v, s) VALUES (?, ?, ?)"
DELETE_INDEX = "DELETE FROM t_instance_index WHERE k = ?"
INSERT_TRANSITION = "INSERT OR ROLLBACK INTO t_transition (k, v, s) VALUES (?, ?, ?)"
INSERT_DEDUPE = "INSERT OR ROLLBACK INTO t_dedupe (k, v, s) VALUES (?, ?, ?)"
INSERT_INBOX = "INSERT OR ROLLBACK INTO t_inbox (k, v, s) VALUES (?, ?, ?)"
DELETE_INBOX = "DELETE FROM t_inbox WHERE k = ?"
INSERT_OUTBOX = "INSERT OR ROLLBACK INTO t_outbox (k, v, s) VALUES (?, ?, ?)"
DELETE_OUTBOX = "DELETE FROM t_outbox WHERE k = ?"
INSERT_FEED = "INSERT OR ROLLBACK INTO t_feed (k, v, s) VALUES (?, ?, ?)"

_ROWS_A_STATEMENT = 16
_OF_MANY = {
    statement: statement + ", (?, ?, ?)" * (_ROWS_A_STATEMENT - 1)
    for statement in (
        INSERT_CORRELATION,
        INSERT_STATE,
        INSERT_INDEX,
        INSERT_TRANSITION,
        INSERT_DEDUPE,
        INSERT_INBOX,
        INSERT_OUTBOX,
        INSERT_FEED,
    )
}

_CHECK_LEASE = "SELECT s FROM t_lease WHERE k = ?"
_NEXT_VERSIONSTAMP = "UPDATE kv_counter SET n = n + 1 WHERE name = 'versionstamp'"
_RESERVE = "UPDATE kv_counter SET n = n + ? WHERE name = ?"


class Cursor(Protocol):
    """What is used of an apsw cursor; its own types know more kinds of cells than we have."""

    def execute(self, statement: str, bindings: Row = (), /) -> Cursor: ...

    def executemany(self, statement: str, bindings: Sequence[Row], /) -> object: ...

    def fetchall(self) -> list[Row]: ...


class Connection(Protocol):
    """What is used of an apsw connection."""

    def cursor(self) -> Cursor: ...

    def total_changes(self) -> int: ...

    def close(self) -> None: ...


class Batch(NamedTuple):
    """One commit: how many numbers it takes of which counters, its rows by statement, and how many rows change."""

    reserved: tuple[tuple[int, str], ...]
    statements: tuple[tuple[str, list[Row]], ...]
    changes: int

    @staticmethod
    def of(reserved: tuple[tuple[int, str], ...], statements: Sequence[tuple[str, list[Row]]]) -> Batch:
        written = sum(len(bindings) for _, bindings in statements)
        return Batch(reserved, tuple(_many_rows_a_statement(statements)), 1 + len(reserved) + written)


def _many_rows_a_statement(statements: Sequence[tuple[str, list[Row]]]) -> Iterator[tuple[str, list[Row]]]:
    for statement, bindings in statements:
        full = len(bindings) - len(bindings) % _ROWS_A_STATEMENT if statement in _OF_MANY else 0
        if full:
            groups = [bindings[first : first + _ROWS_A_STATEMENT] for first in range(0, full, _ROWS_A_STATEMENT)]
            yield _OF_MANY[statement], [tuple(chain.from_iterable(group)) for group in groups]
        if bindings[full:]:
            yield statement, bindings[full:]


def connect(path: Path) -> Connection:
    """A new file with the tables of the store, set up as the store sets itself up."""
    opened = apsw.Connection(str(path), statementcachesize=512)
    opened.set_busy_timeout(5000)
    opened.wal_autocheckpoint(4000)
    connection = cast("Connection", opened)
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL").fetchall()
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute(f"PRAGMA cache_size = -{16 * 1024}")
    cursor.execute(f"PRAGMA journal_size_limit = {64 * 1024 * 1024}").fetchall()
    cursor.execute("BEGIN")
    cursor.execute("CREATE TABLE kv_counter (name TEXT PRIMARY KEY, n INTEGER NOT NULL) STRICT, WITHOUT ROWID")
    for counter in ("versionstamp", "c:inbox", "c:outbox", "c:feed"):
        cursor.execute("INSERT INTO kv_counter (name, n) VALUES (?, 0)", (counter,))
    for table in rows.TABLES:
        cursor.execute(
            f"CREATE TABLE t_{table} (k BLOB PRIMARY KEY, v BLOB NOT NULL, s INTEGER NOT NULL) STRICT, WITHOUT ROWID"
        )
    lease = [(bytes((0x11, part)), b"abc", 1) for part in range(rows.PARTITIONS)]
    cursor.executemany("INSERT INTO t_lease (k, v, s) VALUES (?, ?, ?)", lease)
    cursor.execute("COMMIT")
    return connection


def prepared(orders: int, batch: int) -> list[Batch]:
    """The commits of `orders` orders: `batch` orders side by side, all their first messages in one commit, all their
    second, all their third; each commit settles the effects of the one before."""
    parts = rows.partitions(orders)
    batches: list[Batch] = []
    stamp_of_state: dict[int, int] = {}
    settled: list[Row] = []
    effects = events = 0
    stamp = 1
    for first in range(0, orders, batch):
        side_by_side = range(first + 1, min(first + batch, orders) + 1)
        for step in range(3):
            stamp += 1
            feed_value = bytes(rows.FEED_BYTES[step] * len(side_by_side))
            numbered = [(pk, rows.outbox_key(parts[pk - 1], effects + at)) for at, pk in enumerate(side_by_side)]
            statements: list[tuple[str, list[Row]]] = []
            if settled:
                statements.append((DELETE_OUTBOX, settled))
            if step == 0:
                heads: list[Row] = [(rows.correlation_key(pk), bytes(rows.HEAD_BYTES), stamp) for pk in side_by_side]
                statements.append((INSERT_CORRELATION, sorted(heads)))
                values = bytes(rows.STATE_BYTES[0])
                statements.append((INSERT_STATE, [(rows.state_key(pk), values, stamp) for pk in side_by_side]))
                statements.append((INSERT_INDEX, [(rows.index_key(pk, b"running"), b"", stamp) for pk in side_by_side]))
            else:
                values = bytes(rows.STATE_BYTES[step])
                statements.append(
                    (
                        UPDATE_STATE,
                        [(values, stamp, rows.state_key(pk), stamp_of_state[pk]) for pk in side_by_side],
                    )
                )
            if step == 2:
                statements.append((DELETE_INDEX, [(rows.index_key(pk, b"running"),) for pk in side_by_side]))
                statements.append(
                    (INSERT_INDEX, [(rows.index_key(pk, b"completed"), b"", stamp) for pk in side_by_side])
                )
            value = bytes(rows.TRANSITION_BYTES[step])
            statements.append(
                (INSERT_TRANSITION, [(rows.transition_key(pk, step + 1), value, stamp) for pk in side_by_side])
            )
            value = bytes(rows.DEDUPE_BYTES)
            statements.append((INSERT_DEDUPE, [(rows.dedupe_key(pk, step + 1), value, stamp) for pk in side_by_side]))
            value = bytes(rows.EFFECT_BYTES[step])
            statements.append((INSERT_OUTBOX, sorted((key, value, stamp) for _, key in numbered)))
            statements.append((INSERT_FEED, [(rows.feed_key(events), feed_value, stamp)]))
            reserved = ((len(side_by_side), "c:outbox"), (rows.EVENTS[step] * len(side_by_side), "c:feed"))
            batches.append(Batch.of(reserved, statements))
            stamp_of_state.update(dict.fromkeys(side_by_side, stamp))
            settled = sorted((key,) for _, key in numbered)
            effects += len(side_by_side)
            events += rows.EVENTS[step] * len(side_by_side)
    if settled:
        batches.append(Batch.of((), [(DELETE_OUTBOX, settled)]))
    return batches


def run(connection: Connection, batches: Sequence[Batch]) -> float:
    """Commits all batches; the seconds it took."""
    cursor = connection.cursor()
    began = time.perf_counter()
    for batch in batches:
        commit(connection, cursor, batch)
    return time.perf_counter() - began


def run_timed(connection: Connection, batches: Sequence[Batch]) -> list[float]:
    """Commits all batches; the seconds that each took."""
    cursor = connection.cursor()
    seconds: list[float] = []
    for batch in batches:
        began = time.perf_counter()
        commit(connection, cursor, batch)
        seconds.append(time.perf_counter() - began)
    return seconds


def commit(connection: Connection, cursor: Cursor, batch: Batch) -> None:
    """One transaction, durable when this returns."""
    execute, executemany = cursor.execute, cursor.executemany
    execute("BEGIN IMMEDIATE")
    changes = connection.total_changes()
    if execute(_CHECK_LEASE, (b"\x11\x00",)).fetchall() != [(1,)]:
        raise RuntimeError("the lease is lost")
    execute(_NEXT_VERSIONSTAMP)
    for reserved in batch.reserved:
        execute(_RESERVE, reserved)
    for statement, bindings in batch.statements:
        if len(bindings) == 1:
            execute(statement, bindings[0])
        else:
            executemany(statement, bindings)
    if connection.total_changes() - changes != batch.changes:
        raise RuntimeError("a row was not where it was expected")
    execute("COMMIT")


def _main() -> None:
    path = Path(sys.argv[1])
    orders = int(sys.argv[2]) if len(sys.argv) > 2 else 4_000
    batch = int(sys.argv[3]) if len(sys.argv) > 3 else 64
    batches = prepared(orders, batch)
    seconds = run(connect(path), batches)
    print(f"{3 * orders / seconds:.0f} messages/s in batches of {batch}")


if __name__ == "__main__":
    _main()
