"""The bare loop on PostgreSQL: the tables of the store, with rows as large as the real ones, written as arrays.

Everything is made before the clock starts. What is timed is what no engine on these tables could leave out: one
transaction a batch that locks the row of its writer, takes numbers, writes the rows of its messages, one statement a
table, deletes the outbox rows that the batch before has settled, and commits. The dedupe is the primary key of its row,
and the revision is in the UPDATE.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from bench.bare import rows
from sagaloom.kv.postgres import driver

__all__ = ["Batch", "pairs", "prepared", "run"]

_NOW = datetime(2026, 1, 1, tzinfo=UTC)
_STATE = '{"status":"awaiting-payment","text":"' + "x" * 300 + '"}'

FENCE = "SELECT s FROM saga_runtime_row WHERE tbl = 'member' FOR SHARE"
NUMBERS = "SELECT max(nextval('saga_runtime_outbox_number')) FROM generate_series(1, $1)"
HEADS = """INSERT INTO saga_runtime_correlation SELECT h, 'bench-order', k, pk, part, 1, false, $5::timestamptz, v, 1
    FROM unnest($1::bytea[], $2::text[], $3::bigint[], $4::int[], $6::bytea[]) AS t(h, k, pk, part, v)"""
NEW = """INSERT INTO saga_runtime_state SELECT pk, 1, 'bench-order', k, 'running', 1, s, NULL, NULL, 'OrderPlaced',
    false, $4::timestamptz, $4, NULL, v
    FROM unnest($1::bigint[], $2::text[], $3::text[], $5::bytea[]) AS t(pk, k, s, v)"""
CHANGED = """UPDATE saga_runtime_state t
    SET revision = $2::int, status = $3, state = c.s, updated_at = $5::timestamptz, v = c.v
    FROM unnest($1::bigint[], $4::text[], $6::bytea[]) AS c(pk, s, v)
    WHERE t.pk = c.pk AND t.run = 1 AND t.revision = $2 - 1"""
ENTRIES = """INSERT INTO saga_runtime_transition SELECT pk, 1, $2::int, $2, 'applied', 'OrderPlaced', i, 'running',
    NULL, $4::timestamptz, v FROM unnest($1::bigint[], $3::text[], $5::bytea[]) AS t(pk, i, v)"""
MARKS = "INSERT INTO saga_runtime_dedupe SELECT * FROM unnest($1::bigint[], $2::bytea[], $3::bytea[])"
EFFECTS = """INSERT INTO saga_runtime_outbox SELECT part, seq, 'bench-order', k, 1, 'bench:payments', e, 0, NULL,
    $5::timestamptz, NULL, NULL, v
    FROM unnest($1::int[], $2::bigint[], $3::text[], $4::text[], $6::bytea[]) AS t(part, seq, k, e, v)"""
SETTLED = """DELETE FROM saga_runtime_outbox t USING unnest($1::int[], $2::bigint[]) AS g(part, seq)
    WHERE t.part = g.part AND t.seq = g.seq"""
FEED = "INSERT INTO saga_runtime_feed (base, n, v) VALUES ($1, $2, $3)"
HEAD = "UPDATE saga_runtime_feed_head SET next = next + $1"
INBOX = """INSERT INTO saga_runtime_inbox SELECT part, seq, 'bench-order', k, 'OrderPlaced', i, 0, NULL,
    $5::timestamptz, NULL, v
    FROM unnest($1::int[], $2::bigint[], $3::text[], $4::text[], $6::bytea[]) AS t(part, seq, k, i, v)"""
TAKEN = """DELETE FROM saga_runtime_inbox t USING unnest($1::int[], $2::bigint[]) AS g(part, seq)
    WHERE t.part = g.part AND t.seq = g.seq"""


class Batch(NamedTuple):
    """One commit: its statements with their arguments."""

    statements: tuple[tuple[str, tuple[Any, ...]], ...]


def prepared(orders: int, batch: int, *, accepted: bool = False) -> list[Batch]:
    """The commits of `orders` orders, `batch` of them side by side. `accepted`: their messages come from the inbox."""
    parts = rows.partitions(orders)
    batches: list[Batch] = []
    effects = events = 0
    settled: tuple[list[int], list[int]] | None = None
    for first in range(0, orders, batch):
        pks = list(range(first + 1, min(first + batch, orders) + 1))
        keys = [f"o-{pk:08d}" for pk in pks]
        places = [parts[pk - 1] for pk in pks]
        count = len(pks)
        for step in range(3):
            ids = [f"{pk:030x}{step:02x}" for pk in pks]
            numbers = list(range(effects + 1, effects + count + 1))
            hashes = [rows.correlation_key(pk)[-33:-1] for pk in pks]
            marks = [rows.dedupe_key(pk, step + 1)[-17:-1] for pk in pks]
            head: tuple[str, tuple[Any, ...]] = (
                HEADS, (hashes, keys, pks, places, _NOW, [bytes(rows.HEAD_BYTES)] * count),
            )  # fmt: skip
            mark: tuple[str, tuple[Any, ...]] = (MARKS, (pks, marks, [bytes(rows.DEDUPE_BYTES)] * count))
            if accepted:
                accept: list[tuple[str, tuple[Any, ...]]] = [(FENCE, ()), (NUMBERS, (count,))]
                accept += [head] if step == 0 else []
                value = bytes(rows.INBOX_BYTES[step])
                accept += [mark, (INBOX, (places, numbers, keys, ids, _NOW, [value] * count))]
                batches.append(Batch(tuple(accept)))
            made: list[tuple[str, tuple[Any, ...]]] = [(FENCE, ()), (NUMBERS, (count,))]
            if accepted:
                made.append((TAKEN, (places, numbers)))
            elif step == 0:
                made.append(head)
            if settled is not None:
                made.append((SETTLED, settled))
            value = bytes(rows.STATE_BYTES[step])
            if step == 0:
                made.append((NEW, (pks, keys, [_STATE] * count, _NOW, [value] * count)))
            else:
                status = "completed" if step == 2 else "running"
                made.append((CHANGED, (pks, step + 1, status, [_STATE] * count, _NOW, [value] * count)))
            value = bytes(rows.TRANSITION_BYTES[step])
            made.append((ENTRIES, (pks, step + 1, ids, _NOW, [value] * count)))
            if not accepted:
                made.append(mark)
            value = bytes(rows.EFFECT_BYTES[step])
            keyed = [f"{pk:038x}{step:02x}" for pk in pks]
            made.append((EFFECTS, (places, numbers, keys, keyed, _NOW, [value] * count)))
            shown = rows.EVENTS[step] * count
            made.append((HEAD, (shown,)))
            made.append((FEED, (events + 1, shown, bytes(rows.FEED_BYTES[step] * count))))
            batches.append(Batch(tuple(made)))
            settled = (places, numbers)
            effects += count
            events += shown
    return batches


def pairs(batches: Sequence[Batch]) -> list[tuple[Batch, Batch]]:
    """Batches that were prepared as accepted, two by two."""
    return list(zip(batches[::2], batches[1::2], strict=True))


async def run(url: str, batches: Sequence[Batch]) -> list[float]:
    """Commits all batches; the seconds that each took."""
    connection: driver.Connection = await driver.connect(url)
    await connection.execute("INSERT INTO saga_runtime_row VALUES ('member', 'bare', '', 1) ON CONFLICT DO NOTHING")
    seconds: list[float] = []
    try:
        for batch in batches:
            began = time.perf_counter()
            async with connection.transaction():
                for statement, arguments in batch.statements:
                    await connection.fetch(statement, *arguments)
            seconds.append(time.perf_counter() - began)
    finally:
        await connection.close()
    return seconds
