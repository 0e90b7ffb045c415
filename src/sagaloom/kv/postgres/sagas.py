"""The rows of the saga store on PostgreSQL: each kind in a table of its own, with columns that people can read.

It is a key-value store to whoever writes: keys and values are those of `sagaloom.stores.rows`. Some kinds have tables
of their own, which `sagaloom.kv.postgres.reading` lists and reads. All others (members, leases, the registry,
schedules) lie in `saga_runtime_row`, and a commit is of one sort or the other.

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
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

from sagaloom.definitions import SagaDurabilityTier
from sagaloom.errors import BackendUnavailable, MessageRejected
from sagaloom.kv.packing import pack, table_of
from sagaloom.kv.postgres.batch import COMMIT, SagaBatch, batch_of
from sagaloom.kv.postgres.columns import left_row
from sagaloom.kv.postgres.connection import PostgresDatabase, RowsChanged, channel_of
from sagaloom.kv.postgres.driver import Connection, Row
from sagaloom.kv.postgres.reading import KEY_COLUMNS, PostgresSagaReads, typed
from sagaloom.ports.keyvalue import Check, Committed, Conflicted, Entry, Key, Slot

__all__ = ["PostgresSagaRows"]

_SAGA_TABLES: Final = frozenset({*KEY_COLUMNS, "feed", "older", "saga_seen"})

_RENEW_MEMBER: Final = """
    UPDATE @schema@.saga_runtime_row SET s = nextval('@schema@.saga_runtime_versionstamp')
    WHERE tbl = 'member' AND k = $1 AND s = $2 RETURNING s
"""
_END_MEMBER: Final = "DELETE FROM @schema@.saga_runtime_row WHERE tbl = 'member' AND k = $1"
_LAST_COMMIT: Final = """
    SELECT commit_no, stamp, inbox_base, outbox_base, feed_base FROM @schema@.saga_runtime_worker WHERE holder = $1
"""
_CONFIRM: Final = """
    SELECT @schema@.saga_runtime_durability(true), pg_logical_emit_message(true, 'sagaloom', '')
"""
_SAFETY: Final = """
    SELECT current_setting('fsync') AS fsync, current_setting('synchronous_standby_names') AS standbys
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
_TAKE_LEFT: Final = "DELETE FROM @schema@.saga_runtime_left WHERE id = ANY ($1)"


class PostgresSagaRows(PostgresSagaReads):
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

    # -- removing -------------------------------------------------------------------------------------------------

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
        columns = KEY_COLUMNS.get(table)
        if columns is None:
            gone = "DELETE FROM @schema@.saga_runtime_row WHERE tbl = $1 AND k = ANY ($2::bytea[])"
            await connection.fetch(self._sql(gone), table, [pack(key[1:]) for key in keys])
            return
        arrays = ", ".join(f"${n}::{kind}[]" for n, (_, kind) in enumerate(columns, 1))
        names = ", ".join(name for name, _ in columns)
        same = " AND ".join(f"t.{name} = gone.{name}" for name, _ in columns)
        statement = f"DELETE FROM @schema@.saga_runtime_{table} t USING unnest({arrays}) AS gone({names}) WHERE {same}"
        places = zip(*(typed(key, len(columns)) for key in keys), strict=True)
        await connection.fetch(self._sql(statement), *places)

    # -- messages that others leave -------------------------------------------------------------------------------

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

    async def take_left(self, numbers: Sequence[int]) -> None:
        await self._write(_TAKE_LEFT, numbers)


def _committed(row: Row) -> Committed:
    return Committed(row["stamp"], {"inbox": row["inbox_base"], "outbox": row["outbox_base"], "feed": row["feed_base"]})


def _member_first(check: Check) -> tuple[bool, Any]:
    """The order in which a commit locks: its writer, then the heads by their hashes."""
    return check.key[0] != "member", check.key[-1]
