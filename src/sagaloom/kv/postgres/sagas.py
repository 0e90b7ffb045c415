"""The rows of the saga store on PostgreSQL: each kind in a table of its own, with columns that people can read.

It is a key-value store to whoever writes: keys and values are those of `sagaloom.stores.kv`. The kinds below have
tables; all others (members, leases, the registry, schedules) lie in `saga_runtime_row`, and a commit is of one sort or
the other.

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

What a commit of theirs promises beyond the port:

1. It is one statement, which first locks the row of its writer in `member`. Whoever takes that row away, or renews it,
   waits for it; whoever comes later finds it changed, and writes nothing (I7).
2. Who adds inbox rows to a partition, its holder or somebody else, locks it (all of them in their order), and draws
   their numbers behind that lock: within a partition a smaller number never becomes visible after a larger one, so who
   has read up to a number has read everything below it (I9). What is decided meanwhile takes no such lock: it only
   looks whether the inbox has something older of the same key.
3. The commits of the feed are numbered by whoever has the head of the feed at that moment. Who does not get it leaves
   its commit unnumbered, to the next commit or the next reader: no commit waits for another one, and there is no gap,
   for numbers are given only to what is visible (I8).
4. When the connection is cut before the answer has come, the row of the writer is renewed, which waits for the
   statement if it still runs, and refuses it if it is still to come. Then the note that every commit leaves in
   `saga_runtime_worker` tells whether it was written, and with which numbers.
5. A commit that is to be on a synchronous standby counts as written when it is there. If the wait for it ends early, it
   is written here all the same, and everybody sees it. So until a later commit has waited successfully, which the
   standby gets after this one, nothing more is written, and nobody is told that this one was (t3).
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, cast

from sagaloom.definitions import SagaDurabilityTier
from sagaloom.errors import BackendUnavailable, MessageRejected
from sagaloom.kv.packing import pack, table_of
from sagaloom.kv.postgres.batch import COMMIT, SagaBatch, batch_of
from sagaloom.kv.postgres.columns import (
    left_row,
)
from sagaloom.kv.postgres.connection import PostgresDatabase, RowsChanged, channel_of
from sagaloom.kv.postgres.driver import Connection, Row
from sagaloom.kv.postgres.rows import PostgresKeyValue
from sagaloom.ports.keyvalue import Check, Committed, Conflicted, Entry, Key, Slot

__all__ = ["PostgresSagaRows"]

_ROUNDS_MAX: Final = 8

_COLUMNS: Final[dict[str, tuple[tuple[str, str], ...]]] = {
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
_SAGA_TABLES: Final = frozenset({*_COLUMNS, "feed", "older", "saga_seen"})

_RENEW_MEMBER: Final = """
    UPDATE @schema@.saga_runtime_row SET s = nextval('@schema@.saga_runtime_versionstamp')
    WHERE tbl = 'member' AND k = $1 AND s = $2 RETURNING s
"""
_END_MEMBER: Final = "DELETE FROM @schema@.saga_runtime_row WHERE tbl = 'member' AND k = $1"
_LAST_COMMIT: Final = """
    SELECT commit_no, stamp, inbox_base, outbox_base, feed_base FROM @schema@.saga_runtime_worker WHERE holder = $1
"""
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
_CONFIRM: Final = """
    SELECT @schema@.saga_runtime_durability(true), pg_logical_emit_message(true, 'sagaloom', '')
"""
_SAFETY: Final = """
    SELECT current_setting('fsync') AS fsync, current_setting('synchronous_standby_names') AS standbys
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
_FEED_PRUNE: Final = """
    DELETE FROM @schema@.saga_runtime_feed WHERE base IN (
        SELECT base FROM @schema@.saga_runtime_feed
        WHERE base + n <= $1 AND base < (SELECT max(base) FROM @schema@.saga_runtime_feed) ORDER BY base LIMIT $2
    ) RETURNING base
"""

_FORGET_MARKS: Final = """
    DELETE FROM @schema@.saga_runtime_dedupe d USING unnest($1::bigint[], $2::bytea[], $3::bytea[]) AS gone(pk, hash, v)
    WHERE d.pk = gone.pk AND d.hash = gone.hash AND d.v = gone.v
"""
_BURY: Final = """
    UPDATE @schema@.saga_runtime_correlation h SET v = buried.v, s = $3
    FROM unnest($1::bytea[], $2::bytea[]) AS buried(hash, v) WHERE h.key_hash = buried.hash
"""

_LEAVE: Final = """
    WITH left_here AS (
        INSERT INTO @schema@.saga_runtime_left
            (part, saga_id, correlation_key, message_type, message_id, accepted_at, v)
        SELECT * FROM unnest($2::int[], $3::text[], $4::text[], $5::text[], $6::text[], $7::timestamptz[], $8::bytea[])
    )
    SELECT pg_notify($1, '')
"""
_LEFT: Final = """
    SELECT id, v FROM @schema@.saga_runtime_left WHERE part = ANY ($1) ORDER BY id LIMIT $2
"""
_TAKE_LEFT: Final = "DELETE FROM @schema@.saga_runtime_left WHERE id = ANY ($1)"

FIRST_MOMENT: Final = datetime.fromisoformat("0001-01-02T00:00:00+00:00")
LAST_MOMENT: Final = datetime.fromisoformat("9999-12-30T00:00:00+00:00")


class PostgresSagaRows(PostgresKeyValue):
    """What `sagaloom.stores.sql.SqlSagaStore` stands on."""

    def __init__(self, database: PostgresDatabase) -> None:
        super().__init__(database)
        # Not from 1: another object may have written under the same name before.
        self._commit_no = secrets.randbits(62)
        self.is_replicated = False
        """Whether the next commit of saga rows is to be on a synchronous standby."""
        self._safety = ("on", "")
        self.has_ended = False
        """Whether the lease of the writer was ended here, because it does not know what it has written."""
        self._is_sending = False
        self._doubt: SagaBatch | None = None
        """The last commit, while its outcome is not known."""
        self._sql = database.sql
        self._commit_sagas = database.sql(COMMIT)

    # -- how safe it is -------------------------------------------------------------------------------------------

    async def open(self) -> None:
        await super().open()
        row = (await self.database.fetch(_SAFETY))[0]
        self._safety = row["fsync"], row["standbys"]

    def why_not(self, tier: SagaDurabilityTier) -> str | None:
        """Why this database cannot promise `tier`, as it was set when we opened it."""
        fsync, standbys = self._safety
        if fsync != "on":
            return (
                f"{self.database.where} is set to fsync={fsync}, so a power loss takes what was acknowledged: "
                "set fsync = on in postgresql.conf"
            )
        if tier == "t3" and not standbys:
            return (
                f"{self.database.where} has no synchronous standby: set one up and name it in "
                "synchronous_standby_names, or lower the tier to t2"
            )
        return None

    async def confirm(self) -> None:
        """Returns when everything that was committed before is on the synchronous standby."""
        await self.database.write(self._sql(_CONFIRM), waits=True)

    # -- reading --------------------------------------------------------------------------------------------------

    async def get_many(self, keys: Sequence[Key]) -> list[Entry | None]:
        self._refuse_if_closed()
        by_table: dict[str, list[int]] = {}
        for number, key in enumerate(keys):
            table = table_of(key)
            by_table.setdefault(table if table in _COLUMNS else "", []).append(number)
        entries: list[Entry | None] = [None] * len(keys)
        for table, numbers in by_table.items():
            if not table:
                found = await super().get_many([keys[number] for number in numbers])
                for number, entry in zip(numbers, found, strict=True):
                    entries[number] = entry
                continue
            columns = _COLUMNS[table]
            wanted = [_typed(keys[number], len(columns)) for number in numbers]
            arguments = list(zip(*wanted, strict=True))
            for row in await self.database.fetch(self._get_statement(table), *arguments):
                position: int = row["no"] - 1
                number = numbers[position]
                entries[number] = Entry(keys[number], row["v"], row["s"])
        return entries

    def _get_statement(self, table: str) -> str:
        columns = _COLUMNS[table]
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
        if table not in _COLUMNS:
            return await super().scan(prefix, after=after, before=before, limit=limit, reverse=reverse)
        self._refuse_if_closed()
        if limit <= 0:
            return []
        where, arguments = _bounds(table, prefix, after, before)
        names = ", ".join(name for name, _ in _COLUMNS[table])
        order = ", ".join(f"{name} {'DESC' if reverse else 'ASC'}" for name, _ in _COLUMNS[table])
        statement = self._sql(f"""
            SELECT {names}, {_VALUE.get(table, "v")} AS v, {_STAMP.get(table, "0")} AS s
            FROM @schema@.saga_runtime_{table} WHERE {where} ORDER BY {order} LIMIT ${len(arguments) + 1}
        """)
        rows = await self.database.fetch(statement, *arguments, limit)
        width = len(_COLUMNS[table])
        return [Entry((table, *row[:width]), row["v"], row["s"]) for row in rows]

    async def count(self, prefix: Key, *, limit: int) -> int:
        table = table_of(prefix)
        if table not in _COLUMNS:
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

    async def prune_feed(self, *, before: int, limit: int) -> int:
        return len(await self._write(_FEED_PRUNE, before, limit))

    async def forget_marks(self, rows: Sequence[Entry]) -> None:
        """Deletes marks, unless another one has come in their place since they were read."""
        places = [row.key[1:] for row in rows]
        await self._write(_FORGET_MARKS, [pk for pk, _ in places], [h for _, h in places], [row.value for row in rows])

    async def commit_removal(
        self, checks: Sequence[Check], puts: Sequence[tuple[Key, bytes]], deletes: Sequence[Key]
    ) -> Committed | Conflicted:
        """Removes runs, or tombstones, as `sagaloom.stores.removing` asks for it: one transaction, behind the locks of
        its writer's row and of the heads it checks, which whoever else would change what it removes takes, too."""
        self._refuse_if_closed()
        if self._doubt is not None:
            await self._end_doubt(self._doubt)
        return await self.database.run(lambda connection: self._removed(connection, checks, puts, deletes))

    async def _removed(
        self,
        connection: Connection,
        checks: Sequence[Check],
        puts: Sequence[tuple[Key, bytes]],
        deletes: Sequence[Key],
    ) -> Committed | Conflicted:
        async with connection.transaction():
            failed: list[Key] = []
            for check in sorted(checks, key=_member_first):
                if check.key[0] == "member":
                    locked = "SELECT s FROM @schema@.saga_runtime_row WHERE tbl = 'member' AND k = $1 FOR UPDATE"
                    where: object = pack(check.key[1:])
                else:
                    locked = "SELECT s FROM @schema@.saga_runtime_correlation WHERE key_hash = $1 FOR UPDATE"
                    where = check.key[-1]
                rows = await connection.fetch(self._sql(locked), where)
                if (rows[0]["s"] if rows else None) != check.versionstamp:
                    failed.append(check.key)
            if failed:
                return Conflicted(tuple(failed))
            stamp = (await connection.fetch(self._sql("SELECT nextval('@schema@.saga_runtime_versionstamp') AS s")))[0][
                "s"
            ]
            heads = [(key[-1], value) for key, value in puts if key[0] == "correlation"]
            if heads:
                hashes, values = zip(*heads, strict=True)
                await connection.fetch(self._sql(_BURY), hashes, values, stamp)
            others = [(key, value) for key, value in puts if key[0] != "correlation"]
            for key, value in others:
                await connection.fetch(
                    self._sql("""
                        INSERT INTO @schema@.saga_runtime_row VALUES ($1, $2, $3, $4)
                        ON CONFLICT (tbl, k) DO UPDATE SET v = excluded.v, s = excluded.s
                    """),
                    *(key[0], pack(key[1:]), value, stamp),
                )
            by_table: dict[str, list[Key]] = {}
            for key in deletes:
                by_table.setdefault(table_of(key), []).append(key)
            for table, keys in by_table.items():
                await self._delete(connection, table, keys)
        return Committed(stamp, {})

    async def _delete(self, connection: Connection, table: str, keys: Sequence[Key]) -> None:
        columns = _COLUMNS.get(table)
        if columns is None:
            gone = "DELETE FROM @schema@.saga_runtime_row WHERE tbl = $1 AND k = ANY ($2::bytea[])"
            await connection.fetch(self._sql(gone), table, [pack(key[1:]) for key in keys])
            return
        arrays = ", ".join(f"${n}::{kind}[]" for n, (_, kind) in enumerate(columns, 1))
        names = ", ".join(name for name, _ in columns)
        same = " AND ".join(f"t.{name} = gone.{name}" for name, _ in columns)
        statement = f"DELETE FROM @schema@.saga_runtime_{table} t USING unnest({arrays}) AS gone({names}) WHERE {same}"
        places = zip(*(_typed(key, len(columns)) for key in keys), strict=True)
        await connection.fetch(self._sql(statement), *places)

    async def leave(self, connection: object, messages: Sequence[tuple[int, bytes]]) -> None:
        """Leaves messages in the transaction of somebody else's `connection`, and wakes us when it commits."""
        theirs = cast("Any", connection)
        if not (hasattr(theirs, "is_in_transaction") and hasattr(theirs, "fetch")):
            raise MessageRejected(
                f"within= is {type(connection).__name__}: give the asyncpg connection of your transaction"
            )
        if not theirs.is_in_transaction():
            raise MessageRejected("within= has no transaction open: begin one, or publish without it")
        left = [left_row(part, value) for part, value in messages]
        statement, columns = self._sql(_LEAVE), [list(column) for column in zip(*left, strict=True)]
        try:
            await theirs.fetch(statement, channel_of(self.database.schema), *columns)
        except Exception as error:
            raise self.database.translated(error) from error

    async def left(self, parts: Collection[int], *, limit: int) -> list[tuple[int, bytes]]:
        return [(row["id"], row["v"]) for row in await self._fetch(_LEFT, sorted(parts), limit)]

    async def take_left(self, numbers: Sequence[int]) -> None:
        await self._write(_TAKE_LEFT, numbers)

    async def _fetch(self, statement: str, *arguments: object) -> list[Row]:
        self._refuse_if_closed()
        return await self.database.fetch(self._sql(statement), *arguments)

    async def _write(self, statement: str, *arguments: object) -> list[Row]:
        self._refuse_if_closed()
        return await self.database.write(self._sql(statement), *arguments)

    # -- writing --------------------------------------------------------------------------------------------------

    async def commit(
        self,
        *,
        checks: Sequence[Check] = (),
        inserts: Sequence[tuple[Key, bytes]] = (),
        puts: Sequence[tuple[Key, bytes]] = (),
        deletes: Sequence[Key] = (),
        reserve: Mapping[str, int] | None = None,
    ) -> Committed | Conflicted:
        if self._doubt is not None and not self._is_sending:
            await self._end_doubt(self._doubt)
        keys = [*(key for key, _ in (*inserts[:1], *puts[:1])), *deletes[:1], *(check.key for check in checks[-1:])]
        if not keys or keys[0][0] not in _SAGA_TABLES:
            return await super().commit(checks=checks, inserts=inserts, puts=puts, deletes=deletes, reserve=reserve)
        self._refuse_if_closed()
        batch = batch_of(checks, inserts, puts, deletes, reserve or {})
        self._is_sending = True
        try:
            done = await self._commit_batch(batch)
            if isinstance(done, Conflicted):
                return done
            if done is None:
                return await self._what_failed(checks, inserts, puts, deletes)
        except BackendUnavailable as error:
            self._problem = error.message
            raise
        finally:
            self._is_sending = False
        self._problem = None
        return done

    async def _end_doubt(self, batch: SagaBatch) -> None:
        """Finds out what became of a commit whose sender has given up on it. It may still be on its way, and must not
        come after the next one; if it was written, its sender knows nothing of the rows that it added, so its lease
        ends here, and it begins anew with what is stored."""
        if await self._settled(batch):
            await self.database.write(self._sql(_END_MEMBER), batch.member)
            self.has_ended = True

    async def _commit_batch(self, batch: SagaBatch) -> Committed | Conflicted | None:
        """Writes `batch`; None when a row is not what it should be, and one has to look which."""
        member: Key = ("member", batch.holder)
        batch.is_replicated = self.is_replicated
        self._commit_no += 1
        arguments = batch.arguments(self._commit_no)
        self._doubt = batch
        try:
            row = (await self.database.write(self._commit_sagas, *arguments, waits=batch.is_replicated))[0]
        except RowsChanged:
            self._doubt = None
            return None
        except BackendUnavailable as error:
            if error.data.get("outcome") != "unknown":
                self._doubt = None
                raise
            done = await self._settled(batch)
            if done is None and isinstance(error.__cause__, TimeoutError):
                # Another try would take as long, and somebody waits.
                raise BackendUnavailable(error.message, data={**error.data, "outcome": "not_written"}) from error
            return done or Conflicted((member,))
        except ValueError:
            self._doubt = None
            raise
        self._doubt = None
        outcome = row["outcome"]
        if outcome == "committed":
            return _committed(row)
        if outcome == "member":
            return Conflicted((member,))
        if outcome == "older":
            found: list[int] = row["older"]
            return Conflicted(tuple([batch.older_keys[number - 1] for number in found]))
        return None

    async def _settled(self, batch: SagaBatch) -> Committed | None:
        """What became of the commit that was sent last: it is there, or never will be (None)."""
        await self.database.write(self._sql(_RENEW_MEMBER), batch.member, batch.stamp)
        rows = await self.database.fetch(self._sql(_LAST_COMMIT), batch.holder)
        is_written = bool(rows) and rows[0]["commit_no"] == self._commit_no
        if is_written and batch.is_replicated:
            await self.confirm()
        self._doubt = None
        return _committed(rows[0]) if is_written else None

    async def _what_failed(
        self,
        checks: Sequence[Check],
        inserts: Sequence[tuple[Key, bytes]],
        puts: Sequence[tuple[Key, bytes]],
        deletes: Sequence[Key],
    ) -> Conflicted:
        """Which rows stood against a commit. None may, when they changed again meanwhile: then it is tried again."""
        new = [key for key, _ in inserts if not any(isinstance(part, Slot) for part in key) and key not in deletes]
        made = {*new, *(key for key, _ in inserts)}
        there = [key for key, _ in puts if key[0] in ("correlation", "state", "inbox", "outbox") and key not in made]
        there += [key for key in deletes if key[0] in ("inbox", "outbox")]
        checks = [check for check in checks if check.key[0] != "older"]  # Those have held.
        keys = [*(check.key for check in checks), *new, *there]
        found = await self.get_many(keys)
        failed: list[Key] = []
        for number, (key, entry) in enumerate(zip(keys, found, strict=True)):
            if number < len(checks):
                is_wrong = (None if entry is None else entry.versionstamp) != checks[number].versionstamp
            else:
                is_wrong = (entry is not None) is (number < len(checks) + len(new))
            if is_wrong:
                failed.append(key)
        return Conflicted(tuple(failed))


def _committed(row: Row) -> Committed:
    return Committed(row["stamp"], {"inbox": row["inbox_base"], "outbox": row["outbox_base"], "feed": row["feed_base"]})


def _member_first(check: Check) -> tuple[bool, Any]:
    """The order in which a commit locks: its writer, then the heads by their hashes."""
    return check.key[0] != "member", check.key[-1]


def _typed(key: Key, width: int) -> tuple[object, ...]:
    parts = key[1:]
    if key[0] == "correlation":
        parts = parts[1:]  # the hash is of the saga, too
    if len(parts) != width:
        raise ValueError(f"{key!r} is no key of its table")
    return parts


def _bounds(table: str, prefix: Key, after: Key | None, before: Key | None) -> tuple[str, list[object]]:
    """The condition of a scan, and its arguments."""
    columns = _COLUMNS[table]
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
