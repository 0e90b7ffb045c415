"""The key-value port on PostgreSQL: one table for everything, with packed keys.

A commit is one call of the function `saga_runtime_commit_rows`, which checks, reserves and writes in one statement.
Rows that it checks it locks, so of two commits with one check the second waits and finds that it does not hold. Only a
commit with slots in its keys takes a transaction of several statements, for the numbers have to be known before the
keys.

What it may not assume: nobody else writes between a conflict that the function could not name (an insert that met a row
which came at that very moment) and the next look; then the commit is tried again.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Final

from sagaloom.errors import BackendUnavailable
from sagaloom.kv.packing import pack, prefix_range, table_of, unpack
from sagaloom.kv.postgres.connection import PostgresDatabase, RowsChanged
from sagaloom.kv.postgres.driver import Connection, Row
from sagaloom.kv.postgres.schema import store_id_of, upgrade
from sagaloom.kv.watching import WatchHub
from sagaloom.ports.keyvalue import Check, Committed, Conflicted, Entry, Key, Slot

__all__ = ["PostgresKeyValue"]

_ROUNDS_MAX: Final = 16

_GET: Final = """
    SELECT c.no, r.v, r.s FROM unnest($1::text[], $2::bytea[]) WITH ORDINALITY AS c(tbl, k, no)
    CROSS JOIN LATERAL (SELECT v, s FROM @schema@.saga_runtime_row r WHERE r.tbl = c.tbl AND r.k = c.k LIMIT 1) r
"""
_SCAN: Final = """
    SELECT k, v, s FROM @schema@.saga_runtime_row WHERE tbl = $1 AND k > $2 AND k < $3 ORDER BY k {} LIMIT $4
"""
_COUNT: Final = """
    SELECT count(*) FROM (SELECT FROM @schema@.saga_runtime_row WHERE tbl = $1 AND k > $2 AND k < $3 LIMIT $4) AS found
"""
_COMMIT: Final = """
    SELECT c.* FROM (SELECT @schema@.saga_runtime_durability(false)) AS d CROSS JOIN LATERAL
        @schema@.saga_runtime_commit_rows($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13) AS c
"""
_RESERVE: Final = """
    INSERT INTO @schema@.saga_runtime_counter AS c SELECT * FROM unnest($1::text[], $2::int[]) AS w(name, n)
    ON CONFLICT (name) DO UPDATE SET n = c.n + excluded.n RETURNING name, n
"""


class PostgresKeyValue:
    """An ordered, transactional key-value store in one schema of a PostgreSQL database, which it closes with itself."""

    def __init__(self, database: PostgresDatabase) -> None:
        self.database = database
        self._watches = WatchHub()
        self._store_id = ""
        self._problem: str | None = None
        self._is_closed = False
        sql = database.sql
        self._get, self._count, self._commit, self._reserve = sql(_GET), sql(_COUNT), sql(_COMMIT), sql(_RESERVE)
        self._scan_up, self._scan_down = sql(_SCAN.format("")), sql(_SCAN.format("DESC"))

    @property
    def name(self) -> str:
        return self.database.name

    @property
    def store_id(self) -> str:
        """32 hex digits, made with the schema; known after `open`."""
        return self._store_id

    @property
    def problem(self) -> str | None:
        """What was wrong with the last commit, or None; for readiness."""
        return self._problem

    @property
    def statements(self) -> int:
        """How many statements have been sent."""
        return self.database.statements

    async def open(self) -> None:
        """Brings the schema up to the present version, and reads what store it is."""
        if not self._store_id:
            await upgrade(self.database)
            self._store_id = await store_id_of(self.database)

    async def get(self, key: Key) -> Entry | None:
        return (await self.get_many([key]))[0]

    async def get_many(self, keys: Sequence[Key]) -> list[Entry | None]:
        self._refuse_if_closed()
        entries: list[Entry | None] = [None] * len(keys)
        if keys:
            tables, packed = [table_of(key) for key in keys], [pack(key[1:]) for key in keys]
            for row in await self.database.fetch(self._get, tables, packed):
                number = row["no"] - 1
                entries[number] = Entry(keys[number], row["v"], row["s"])
        return entries

    async def scan(
        self,
        prefix: Key,
        *,
        after: Key | None = None,
        before: Key | None = None,
        limit: int = 1000,
        reverse: bool = False,
    ) -> list[Entry]:
        self._refuse_if_closed()
        table = table_of(prefix)
        low, high = prefix_range(prefix[1:])
        if after is not None:
            low = max(low, _packed_bound(after, prefix))
        if before is not None:
            high = min(high, _packed_bound(before, prefix))
        if limit <= 0:
            return []
        statement = self._scan_down if reverse else self._scan_up
        rows = await self.database.fetch(statement, table, low, high, limit)
        return [Entry((table, *unpack(row["k"])), row["v"], row["s"]) for row in rows]

    async def count(self, prefix: Key, *, limit: int) -> int:
        self._refuse_if_closed()
        low, high = prefix_range(prefix[1:])
        rows = await self.database.fetch(self._count, table_of(prefix), low, high, max(limit, 0))
        return int(rows[0]["count"])

    async def commit(
        self,
        *,
        checks: Sequence[Check] = (),
        inserts: Sequence[tuple[Key, bytes]] = (),
        puts: Sequence[tuple[Key, bytes]] = (),
        deletes: Sequence[Key] = (),
        reserve: Mapping[str, int] | None = None,
    ) -> Committed | Conflicted:
        self._refuse_if_closed()
        reserve = reserve or {}
        for counter, numbers in reserve.items():
            if numbers < 0:
                raise ValueError(f"cannot reserve {numbers} of counter {counter!r}")
        for key, value in (*inserts, *puts):
            if not isinstance(value, bytes):
                raise TypeError(f"the value of {key!r} is not bytes")
        has_slots = any(isinstance(part, Slot) for key, _ in (*inserts, *puts) for part in key)
        try:
            for _ in range(_ROUNDS_MAX):
                try:
                    if has_slots:
                        done = await self._commit_with_slots(checks, inserts, puts, deletes, reserve)
                    else:
                        arguments = _arguments(checks, inserts, puts, deletes, reserve, {})
                        rows = await self.database.write(self._commit, *arguments)
                        done = _result(rows[0], checks, inserts, reserve)
                except RowsChanged:
                    continue
                break
            else:
                raise BackendUnavailable(f"{self.name}: others keep changing the rows of this commit")
        except BackendUnavailable as error:
            self._problem = error.message
            raise
        self._problem = None
        if isinstance(done, Committed) and self._watches:
            self._wake(done, [*deletes, *(key for key, _ in (*inserts, *puts))])
        return done

    async def _commit_with_slots(
        self,
        checks: Sequence[Check],
        inserts: Sequence[tuple[Key, bytes]],
        puts: Sequence[tuple[Key, bytes]],
        deletes: Sequence[Key],
        reserve: Mapping[str, int],
    ) -> Committed | Conflicted:
        async def work(connection: Connection) -> Committed | Conflicted:
            transaction = connection.transaction()
            await transaction.start()
            try:
                counted = await connection.fetch(self._reserve, list(reserve), list(reserve.values()))
                bases = {row["name"]: row["n"] - reserve[row["name"]] + 1 for row in counted}
                arguments = _arguments(checks, inserts, puts, deletes, {}, bases)
                done = _result((await connection.fetch(self._commit, *arguments))[0], checks, inserts, {})
            except BaseException:
                await transaction.rollback()
                raise
            if isinstance(done, Conflicted):
                await transaction.rollback()
                return done
            await transaction.commit()
            return Committed(done.versionstamp, bases)

        return await self.database.run(work)

    def watch(self, prefix: Key) -> AsyncIterator[int]:
        self._refuse_if_closed()
        return self._watches.add(prefix)

    async def close(self) -> None:
        self._is_closed = True
        self._watches.end_all()
        await self.database.close()

    def _wake(self, done: Committed, keys: Iterable[Key]) -> None:
        packed: dict[str, list[bytes]] = {}
        for key in keys:
            packed.setdefault(table_of(key), []).append(pack(key[1:], done.bases))
        self._watches.written(done.versionstamp, packed)

    def _refuse_if_closed(self) -> None:
        if self._is_closed:
            raise BackendUnavailable(f"{self.name} is closed: open another store", retryable=False)


def _arguments(
    checks: Sequence[Check],
    inserts: Sequence[tuple[Key, bytes]],
    puts: Sequence[tuple[Key, bytes]],
    deletes: Sequence[Key],
    reserve: Mapping[str, int],
    bases: Mapping[str, int],
) -> list[object]:
    known = {**bases, **dict.fromkeys(reserve, 0)}
    inserted = {(table_of(key), pack(key[1:], known)): value for key, value in inserts}
    if len(inserted) != len(inserts):
        raise ValueError("two inserts have the same key")
    put = {(table_of(key), pack(key[1:], known)): value for key, value in puts}  # of two the later stays
    return [
        [table_of(check.key) for check in checks],
        [pack(check.key[1:]) for check in checks],
        [check.versionstamp for check in checks],
        [table_of(key) for key in deletes],
        [pack(key[1:]) for key in deletes],
        [table for table, _ in inserted],
        [packed for _, packed in inserted],
        list(inserted.values()),
        [table for table, _ in put],
        [packed for _, packed in put],
        list(put.values()),
        list(reserve),
        list(reserve.values()),
    ]


def _result(
    row: Row, checks: Sequence[Check], inserts: Sequence[tuple[Key, bytes]], reserve: Mapping[str, int]
) -> Committed | Conflicted:
    if row["stamp"] is None:
        unmet: list[int] = row["failed_checks"] or []
        met: list[int] = row["failed_inserts"] or []
        return Conflicted((*(checks[n - 1].key for n in unmet), *(inserts[n - 1][0] for n in met)))
    return Committed(row["stamp"], dict(zip(reserve, row["bases"], strict=True)))


def _packed_bound(bound: Key, prefix: Key) -> bytes:
    if bound[:1] != prefix[:1]:
        raise ValueError(f"{bound!r} does not bound a scan of table {prefix[0]!r}")
    return pack(bound[1:])
