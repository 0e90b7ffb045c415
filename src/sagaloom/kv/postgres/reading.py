"""Where the rows of the saga store lie on PostgreSQL, and what is read of them.

The kinds of rows below have tables of their own, with columns that people can read; the parts of a key are columns,
too. All others (members, leases, the registry, schedules) lie in `saga_runtime_row`, and are read by
`sagaloom.kv.postgres.rows`.

    correlation  saga_runtime_correlation   hash
    state        saga_runtime_state         pk, run
    transition   saga_runtime_transition    pk, run, entry number
    dedupe       saga_runtime_dedupe        pk, hash
    inbox        saga_runtime_inbox         partition, number
    outbox       saga_runtime_outbox        partition, number
    timer        saga_runtime_timer         due, id
    dead_letter  saga_runtime_dead_letter   id
    child        saga_runtime_child         parent's pk, run, status, place
    slot         saga_runtime_slot          saga id, concurrency key, number
    arrivals     saga_runtime_arrivals      partition
    feed         saga_runtime_feed          written only; read by number

The reads of the port (`get_many`, `scan`, `count`) ask a table by its key. The others are questions of the saga store,
one statement each: for the instances of a batch, for what has arrived, for what people list. Whoever reads the feed
first numbers what is visible and has no number yet.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Final

from sagaloom.kv.packing import table_of
from sagaloom.kv.postgres.connection import PostgresDatabase
from sagaloom.kv.postgres.driver import Row
from sagaloom.kv.postgres.rows import PostgresKeyValue
from sagaloom.ports.keyvalue import Entry, Key

__all__ = ["KEY_COLUMNS", "PostgresSagaReads", "typed"]

KEY_COLUMNS: Final[dict[str, tuple[tuple[str, str], ...]]] = {
    "correlation": (("key_hash", "bytea"),),
    "state": (("pk", "bigint"), ("run", "int")),
    "transition": (("pk", "bigint"), ("run", "int"), ("entry_no", "int")),
    "dedupe": (("pk", "bigint"), ("hash", "bytea")),
    "inbox": (("part", "int"), ("seq", "bigint")),
    "outbox": (("part", "int"), ("seq", "bigint")),
    "timer": (("due", "bigint"), ("id", "text")),
    "dead_letter": (("id", "text"),),
    "child": (("pk", "bigint"), ("parent_run", "int"), ("status", "int"), ("revision", "int"), ("position", "int")),
    "slot": (("saga_id", "text"), ("concurrency_key", "text"), ("number", "int")),
    "arrivals": (("part", "int"),),
}
_VALUE: Final = {"arrivals": "''::bytea"}
_STAMP: Final = {"correlation": "s", "dead_letter": "s", "arrivals": "s"}
_NOBODY: Final = 0
"""The versionstamp of a partition that nobody has ever brought anything to: to whoever reads, it has no row."""
_IS_THERE: Final = {"arrivals": f"s <> {_NOBODY}"}

_LISTED: Final = """
    SELECT v, waits, status FROM (
        SELECT t.v, false AS waits, t.status, t.created_at, t.pk, t.run
        FROM unnest($1::text[]) AS saga(id) CROSS JOIN unnest($2::text[]) AS wanted(status)
        CROSS JOIN LATERAL (
            SELECT * FROM @schema@.saga_runtime_state t
            WHERE t.saga_id = saga.id AND t.status = wanted.status AND starts_with(t.correlation_key, $3)
              AND t.created_at >= $4 AND t.created_at < $5 AND (t.created_at, t.pk, t.run) < ($6, $7, $8)
            ORDER BY t.created_at DESC, t.pk DESC, t.run DESC LIMIT $9
        ) t
        UNION ALL
        SELECT h.v, true, 'pending', h.created_at, h.pk, 0
        FROM unnest($1::text[]) AS saga(id) CROSS JOIN LATERAL (
            SELECT * FROM @schema@.saga_runtime_correlation h
            WHERE h.saga_id = saga.id AND h.awaits_start AND h.run = 0 AND 'pending' = ANY ($2)
              AND starts_with(h.correlation_key, $3)
              AND h.created_at >= $4 AND h.created_at < $5 AND (h.created_at, h.pk, 0) < ($6, $7, $8)
            ORDER BY h.created_at DESC, h.pk DESC LIMIT $9
        ) h
    ) AS found
    ORDER BY created_at DESC, pk DESC, run DESC LIMIT $9
"""
_COUNTED: Final = """
    SELECT count(*) FROM (
        SELECT FROM @schema@.saga_runtime_state t
        WHERE t.saga_id = ANY ($1) AND t.status = ANY ($2) AND starts_with(t.correlation_key, $3)
          AND t.created_at >= $4 AND t.created_at < $5
        UNION ALL
        SELECT FROM @schema@.saga_runtime_correlation h
        WHERE h.saga_id = ANY ($1) AND h.awaits_start AND h.run = 0 AND 'pending' = ANY ($2)
          AND starts_with(h.correlation_key, $3) AND h.created_at >= $4 AND h.created_at < $5
        LIMIT $6
    ) AS found
"""
_LOADED: Final = """
    SELECT c.no, h.v AS head, h.s, t.v AS run FROM unnest((SELECT $1::bytea[])) WITH ORDINALITY AS c(hash, no)
    CROSS JOIN LATERAL (
        SELECT pk, run, part, v, s FROM @schema@.saga_runtime_correlation h WHERE h.key_hash = c.hash LIMIT 1
    ) h
    LEFT JOIN LATERAL (
        SELECT v FROM @schema@.saga_runtime_state t
        WHERE t.pk = h.pk AND t.run = h.run AND h.part = ANY ($2::int[]) LIMIT 1
    ) t ON true
"""
"""The array is behind a SELECT of its own, so that its length is no reason to plan the statement anew each time:
planning costs more than reading."""
_EFFECTS: Final = """
    SELECT part, seq, v FROM @schema@.saga_runtime_outbox
    WHERE (part + 0) = ANY ($1) AND (part, seq) > ($2, $3) ORDER BY part, seq LIMIT $4
"""
"""The partitions are no condition on the index: with one, each page would begin at the first of them, and so pass over
all the pages before it."""
_ARRIVED: Final = """
    SELECT i.part, i.seq, i.v FROM unnest($1::int[], $2::bigint[]) AS c(part, seen)
    CROSS JOIN LATERAL (
        SELECT part, seq, v FROM @schema@.saga_runtime_inbox i WHERE i.part = c.part AND i.seq > c.seen
        ORDER BY i.seq LIMIT $3
    ) i
"""
_TIMER_OF_ID: Final = "SELECT v FROM @schema@.saga_runtime_timer WHERE id = $1 ORDER BY due LIMIT 1"
_LETTERS: Final = """
    SELECT v FROM @schema@.saga_runtime_dead_letter
    WHERE ($1::text IS NULL OR id < $1) AND {} ORDER BY id DESC LIMIT $2
"""
_NUMBER_FEED: Final = "SELECT @schema@.saga_runtime_number_feed(true)"
_FEED_PAGE: Final = """
    SELECT base, v FROM @schema@.saga_runtime_feed
    WHERE base >= coalesce(
        (SELECT max(base) FROM @schema@.saga_runtime_feed WHERE base <= $1 + 1),
        (SELECT min(base) FROM @schema@.saga_runtime_feed)
    ) AND base + n > $1 + 1
    ORDER BY base LIMIT $2
"""
_FEED_BOUNDS: Final = """
    SELECT (SELECT min(base) FROM @schema@.saga_runtime_feed) AS oldest,
           (SELECT max(base) FROM @schema@.saga_runtime_feed) AS newest,
           (SELECT next FROM @schema@.saga_runtime_feed_head) AS next
"""
_LEFT: Final = """
    SELECT id, v FROM @schema@.saga_runtime_left WHERE part = ANY ($1) ORDER BY id LIMIT $2
"""


class PostgresSagaReads(PostgresKeyValue):
    """The reads of `PostgresSagaRows`."""

    def __init__(self, database: PostgresDatabase) -> None:
        super().__init__(database)
        self._sql = database.sql

    async def get_many(self, keys: Sequence[Key]) -> list[Entry | None]:
        self._refuse_if_closed()
        by_table: dict[str, list[int]] = {}
        for number, key in enumerate(keys):
            table = table_of(key)
            by_table.setdefault(table if table in KEY_COLUMNS else "", []).append(number)
        entries: list[Entry | None] = [None] * len(keys)
        for table, numbers in by_table.items():
            if not table:
                found = await super().get_many([keys[number] for number in numbers])
                for number, entry in zip(numbers, found, strict=True):
                    entries[number] = entry
                continue
            columns = KEY_COLUMNS[table]
            wanted = [typed(keys[number], len(columns)) for number in numbers]
            arguments = list(zip(*wanted, strict=True))
            for row in await self.database.fetch(self._get_statement(table), *arguments):
                position: int = row["no"] - 1
                number = numbers[position]
                entries[number] = Entry(keys[number], row["v"], row["s"])
        return entries

    def _get_statement(self, table: str) -> str:
        columns = KEY_COLUMNS[table]
        arrays = ", ".join(f"${n}::{kind}[]" for n, (_, kind) in enumerate(columns, 1))
        names = ", ".join(name for name, _ in columns)
        same = " AND ".join(f"t.{name} = c.{name}" for name, _ in columns)
        return self._sql(f"""
            SELECT c.no, t.v, t.s FROM unnest({arrays}) WITH ORDINALITY AS c({names}, no)
            CROSS JOIN LATERAL (
                SELECT {_VALUE.get(table, "v")} AS v, {_STAMP.get(table, "0")} AS s
                FROM @schema@.saga_runtime_{table} t WHERE {same} AND {_IS_THERE.get(table, "true")} LIMIT 1
            ) t
        """)

    async def scan(
        self,
        prefix: Key,
        *,
        after: Key | None = None,
        before: Key | None = None,
        limit: int = 1000,
        reverse: bool = False,
    ) -> list[Entry]:
        table = table_of(prefix)
        if table not in KEY_COLUMNS:
            return await super().scan(prefix, after=after, before=before, limit=limit, reverse=reverse)
        self._refuse_if_closed()
        if limit <= 0:
            return []
        where, arguments = _bounds(table, prefix, after, before)
        names = ", ".join(name for name, _ in KEY_COLUMNS[table])
        order = ", ".join(f"{name} {'DESC' if reverse else 'ASC'}" for name, _ in KEY_COLUMNS[table])
        statement = self._sql(f"""
            SELECT {names}, {_VALUE.get(table, "v")} AS v, {_STAMP.get(table, "0")} AS s
            FROM @schema@.saga_runtime_{table} WHERE {where} ORDER BY {order} LIMIT ${len(arguments) + 1}
        """)
        rows = await self.database.fetch(statement, *arguments, limit)
        width = len(KEY_COLUMNS[table])
        return [Entry((table, *row[:width]), row["v"], row["s"]) for row in rows]

    async def count(self, prefix: Key, *, limit: int) -> int:
        table = table_of(prefix)
        if table not in KEY_COLUMNS:
            return await super().count(prefix, limit=limit)
        where, arguments = _bounds(table, prefix, None, None)
        statement = self._sql(f"""
            SELECT count(*) FROM (
                SELECT FROM @schema@.saga_runtime_{table} WHERE {where} LIMIT ${len(arguments) + 1}
            ) AS found
        """)
        return int((await self.database.fetch(statement, *arguments, max(limit, 0)))[0]["count"])

    async def listed(
        self,
        saga_ids: Sequence[str],
        statuses: Sequence[str],
        *,
        key_prefix: str,
        created: tuple[datetime, datetime],
        before: tuple[datetime, int, int],
        limit: int,
    ) -> list[tuple[bytes, bool]]:
        """Runs, newest first, and heads whose first message waits (with True)."""
        rows = await self._fetch(_LISTED, saga_ids, statuses, key_prefix, *created, *before, limit)
        return [(row["v"], row["waits"]) for row in rows]

    async def counted(
        self,
        saga_ids: Sequence[str],
        statuses: Sequence[str],
        *,
        key_prefix: str,
        created: tuple[datetime, datetime],
        limit: int,
    ) -> int:
        """How many `listed` would list, counting no further than `limit`."""
        rows = await self._fetch(_COUNTED, saga_ids, statuses, key_prefix, *created, limit)
        return int(rows[0]["count"])

    async def loaded(
        self, hashes: Sequence[bytes], *, parts: Collection[int]
    ) -> list[tuple[bytes, int, bytes | None] | None]:
        """Head, its versionstamp and, in these partitions, the newest run for each hash of a correlation key."""
        found: list[tuple[bytes, int, bytes | None] | None] = [None] * len(hashes)
        for row in await self._fetch(_LOADED, hashes, list(parts)):
            found[row["no"] - 1] = (row["head"], row["s"], row["run"])
        return found

    async def effects(self, parts: Collection[int], *, after: tuple[int, int], limit: int) -> list[Entry]:
        """Outbox rows of these partitions, in their order."""
        rows = await self._fetch(_EFFECTS, sorted(parts), *after, limit)
        return [Entry(("outbox", row["part"], row["seq"]), row["v"], 0) for row in rows]

    async def inbox_above(self, seen: Mapping[int, int], *, limit: int) -> list[Entry]:
        """Inbox rows above a number of each partition, at most `limit` of each."""
        rows = await self._fetch(_ARRIVED, list(seen), list(seen.values()), limit)
        return [Entry(("inbox", row["part"], row["seq"]), row["v"], 0) for row in rows]

    async def timer_of_id(self, timer_id: str) -> bytes | None:
        rows = await self._fetch(_TIMER_OF_ID, timer_id)
        return rows[0]["v"] if rows else None

    async def letters(
        self, *, saga_id: str | None, hashed: bytes | None, before: str | None, limit: int
    ) -> list[bytes]:
        """Dead letters, newest first: of one correlation key, of one saga, or all."""
        which, whose = ("true", ()) if saga_id is None else ("saga_id = $3", (saga_id,))
        if hashed is not None:
            which, whose = "key_hash = $3", (hashed,)  # type: ignore[assignment]
        return [row["v"] for row in await self._fetch(_LETTERS.format(which), before, limit, *whose)]

    async def feed_page(self, *, after: int, limit: int) -> list[tuple[int, bytes]]:
        """The commits of the feed that have events above `after`, with the number of their first event."""
        await self._write(_NUMBER_FEED)
        return [(row["base"], row["v"]) for row in await self._fetch(_FEED_PAGE, after, limit)]

    async def feed_bounds(self) -> tuple[int, int]:
        """The first number that is kept, and the newest; (1, 0) when there is none."""
        await self._write(_NUMBER_FEED)
        row = (await self._fetch(_FEED_BOUNDS))[0]
        return (1, 0) if row["oldest"] is None else (row["oldest"], row["next"] - 1)

    async def left(self, parts: Collection[int], *, limit: int) -> list[tuple[int, bytes]]:
        return [(row["id"], row["v"]) for row in await self._fetch(_LEFT, sorted(parts), limit)]

    async def _fetch(self, statement: str, *arguments: object) -> list[Row]:
        self._refuse_if_closed()
        return await self.database.fetch(self._sql(statement), *arguments)

    async def _write(self, statement: str, *arguments: object) -> list[Row]:
        self._refuse_if_closed()
        return await self.database.write(self._sql(statement), *arguments)


def typed(key: Key, width: int) -> tuple[object, ...]:
    parts = key[1:]
    if key[0] == "correlation":
        parts = parts[1:]  # the hash is of the saga, too
    if len(parts) != width:
        raise ValueError(f"{key!r} is no key of its table")
    return parts


def _bounds(table: str, prefix: Key, after: Key | None, before: Key | None) -> tuple[str, list[object]]:
    """The condition of a scan, and its arguments."""
    columns = KEY_COLUMNS[table]
    arguments: list[object] = []

    def compared(operator: str, parts: Sequence[object]) -> str:
        names = ", ".join(name for name, _ in columns[: len(parts)])
        marks: list[str] = []
        for (_, kind), part in zip(columns, parts, strict=False):
            arguments.append(part)
            marks.append(f"${len(arguments)}::{kind}")
        return f"({names}) {operator} ({', '.join(marks)})" if len(parts) > 1 else f"{names} {operator} {marks[0]}"

    conditions = [_IS_THERE.get(table, "true")]
    if len(prefix) > 1:
        conditions.append(compared("=", prefix[1:]))
    for bound, whole, cut in ((after, ">", ">="), (before, "<", "<")):
        if bound is not None:
            if bound[0] != table:
                raise ValueError(f"{bound!r} does not bound a scan of table {table!r}")
            if len(bound) > 1:
                # A key sorts before those that continue it.
                conditions.append(compared(whole if len(bound) - 1 == len(columns) else cut, bound[1:]))
    return " AND ".join(conditions), arguments
