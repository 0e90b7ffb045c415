"""The embedded key-value store: one SQLite file, through apsw.

The rules:

- The first part of a key names a table of its own, `t_<name>`, made by the first commit that writes to it: one
  B-tree `WITHOUT ROWID` with the packed rest of the key (`sagaloom.kv.packing`), the value, and the versionstamp.
  Rows of one kind thus lie together in key order; one flat table for everything costs 1.25 to 1.5 times as much.
- `kv_counter` holds the number of the last commit and the reserved counters, `kv_meta` the format, the id of the
  store and a cell for probes. All of them change inside the commit itself, so several processes can share the file.
- A commit is `BEGIN IMMEDIATE`, checks, versionstamp, reserved counters, deletes, puts, `COMMIT`. With WAL and
  `synchronous=FULL` (the default) it is on stable storage when `commit` returns.
- Every method is `async` because the port is, and runs inline: no thread, no suspension. A commit takes less time
  than handing it to a thread and back, and inline was measured 1.2 to 1.7 times faster under most loads. The price:
  while another process holds the write lock, the event loop waits with us, at most `busy_timeout_seconds`.
- Only what the log holds is moved into the file by a thread, beside the commits (`sagaloom.kv.checkpoints`).

What happens when the file fails us is told in `sagaloom.kv.sqlite_trouble`, how it is opened and set up in
`sagaloom.kv.sqlite_file`, and how its tables are written to in `sagaloom.kv.sqlite_tables`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Final

import apsw

from sagaloom.errors import StoreCorrupt
from sagaloom.kv.packing import pack, prefix_range, table_of, unpack
from sagaloom.kv.sqlite_driver import Connection
from sagaloom.kv.sqlite_file import SqliteFile
from sagaloom.kv.sqlite_tables import (
    CELLS_A_ROW,
    ROWS_A_STATEMENT,
    Cells,
    Table,
    cells_by_table,
    keys_of,
    write_in_halves,
)
from sagaloom.kv.watching import WatchHub
from sagaloom.ports.keyvalue import Check, Committed, Conflicted, Entry, Key, Slot

__all__ = ["SqliteKeyValue"]

# Two statements each: RETURNING would put its row into a table made for it, which takes three times as long.
_NEXT_VERSIONSTAMP: Final = "UPDATE kv_counter SET n = n + 1 WHERE name = 'versionstamp'"
_VERSIONSTAMP: Final = "SELECT n FROM kv_counter WHERE name = 'versionstamp'"
# Callers' counters carry a prefix, so that none of them can be the versionstamp.
_RESERVE: Final = (
    "INSERT INTO kv_counter (name, n) VALUES ('c:' || ?, ?) ON CONFLICT (name) DO UPDATE SET n = n + excluded.n"
)
_RESERVED: Final = "SELECT n FROM kv_counter WHERE name = 'c:' || ?"
_TABLE_EXISTS: Final = "SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = ?"


class SqliteKeyValue(SqliteFile):
    """An ordered, transactional key-value store in one SQLite file; made by `open`.

    Several processes may open the same file. One instance belongs to one thread and must not cross a `fork`.

    >>> import asyncio, tempfile
    >>> async def example(directory: str) -> bytes:
    ...     store = await SqliteKeyValue.open(f"{directory}/saga.db")
    ...     await store.commit(puts=[(("color", "sky"), b"blue")])
    ...     entry = await store.get(("color", "sky"))
    ...     await store.close()
    ...     return entry.value
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     asyncio.run(example(directory))
    b'blue'
    """

    def __init__(
        self,
        connection: Connection,
        path: str,
        *,
        busy_timeout_seconds: float,
        on_step: Callable[[str], None] | None,
    ) -> None:
        """For `open`, which prepares the connection."""
        super().__init__(connection, path, busy_timeout_seconds=busy_timeout_seconds, on_step=on_step)
        self._watches = WatchHub()

    async def get(self, key: Key) -> Entry | None:
        table = self._table_to_read(key)
        if table is None:
            return None
        self.statements += 1
        try:
            for value, versionstamp in self._execute(table.get, (pack(key[1:]),)):
                return Entry(key, value, versionstamp)
        except apsw.Error as cause:
            self._fail(cause, "read")
        return None

    async def get_many(self, keys: Sequence[Key]) -> list[Entry | None]:
        """The entries of `keys`, in their order, all of one moment."""
        if len(keys) == 1:
            return [await self.get(keys[0])]
        wanted = [(key, self._table_to_read(key), pack(key[1:])) for key in keys]
        entries: list[Entry | None] = []
        execute = self._execute
        self.statements += len(wanted)
        try:
            # One read transaction: statements on their own would each take and drop the shared lock, which costs
            # more than the lookup.
            execute("BEGIN")
            try:
                for key, table, packed in wanted:
                    entry = None
                    if table is not None:
                        for value, versionstamp in execute(table.get, (packed,)):
                            entry = Entry(key, value, versionstamp)
                    entries.append(entry)
            finally:
                self._end_transaction("COMMIT")
        except apsw.Error as cause:
            self._fail(cause, "read")
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
        """One page, fetched completely: no read stays open, because a long reader keeps the log from shrinking."""
        table = self._table_to_read(prefix)
        low, high = prefix_range(prefix[1:])
        if after is not None:
            low = max(low, _packed_bound(after, prefix))
        if before is not None:
            high = min(high, _packed_bound(before, prefix))
        if table is None or limit <= 0:
            return []
        self.statements += 1
        try:
            statement = table.scan_down if reverse else table.scan_up
            rows = self._execute(statement, (low, high, limit)).fetchall()
        except apsw.Error as cause:
            self._fail(cause, "read")
        name = table.name
        try:
            return [Entry((name, *unpack(packed)), value, versionstamp) for packed, value, versionstamp in rows]
        except ValueError as cause:
            raise StoreCorrupt(f"{self._path}: table t_{name} has a key that was never packed: {cause}") from cause

    async def count(self, prefix: Key, *, limit: int) -> int:
        table = self._table_to_read(prefix)
        low, high = prefix_range(prefix[1:])
        if table is None or limit <= 0:
            return 0
        self.statements += 1
        try:
            return int(self._execute(table.count, (low, high, limit)).fetchall()[0][0])
        except apsw.Error as cause:
            self._fail(cause, "read")

    async def commit(
        self,
        *,
        checks: Sequence[Check] = (),
        inserts: Sequence[tuple[Key, bytes]] = (),
        puts: Sequence[tuple[Key, bytes]] = (),
        deletes: Sequence[Key] = (),
        reserve: Mapping[str, int] | None = None,
    ) -> Committed | Conflicted:
        """Writes everything or nothing, durably. Of two puts with one key the later stays.

        Raises `BackendUnavailable` when the file is locked for too long, full or failing. Nothing was written then,
        with one exception that `sagaloom.kv.sqlite_trouble` tells: `data["outcome"]` is `"unknown"` instead of
        `"not_written"` when it was the `COMMIT` itself that failed.
        """
        self._refuse_if_unusable()
        if self._must_probe:
            self._probe()
        at_commit = False
        execute = self._execute
        on_step = self._on_step
        try:
            execute("BEGIN IMMEDIATE")
            try:
                failed = self._failed_checks(checks) if checks else ()
                if on_step is not None:
                    on_step("kv:checked")
                if failed:
                    execute("ROLLBACK")
                    return Conflicted(failed + self._there(inserts, deletes))

                execute(_NEXT_VERSIONSTAMP)
                versionstamp: int = execute(_VERSIONSTAMP).fetchall()[0][0]
                bases: dict[str, int] = {}
                if reserve:
                    for counter, numbers in reserve.items():
                        if numbers < 0:
                            raise ValueError(f"cannot reserve {numbers} of counter {counter!r}")
                        execute(_RESERVE, (counter, numbers))
                        bases[counter] = execute(_RESERVED, (counter,)).fetchall()[0][0] - numbers + 1
                self.statements += 2 + 2 * len(bases)

                created: list[Table] = []
                dropped = self._delete(deletes) if deletes else {}
                new = cells_by_table(inserts, versionstamp, bases)
                changed = cells_by_table(puts, versionstamp, bases)
                batches = [(self._insert, self._table(name, created), cells) for name, cells in new.items()]
                batches += [(self._put, self._table(name, created), cells) for name, cells in changed.items()]
                if on_step is None:
                    for write, table, cells in batches:
                        write(table, cells)
                else:
                    write_in_halves(batches, on_step)
                    on_step("kv:written")
                self.statements += len(puts) + len(inserts)
                at_commit = True
                execute("COMMIT")
            except BaseException:
                # Whatever went wrong, the next commit must find no transaction open: SQLite ends it by itself after
                # some errors, and leaves it open after others.
                self._end_transaction("ROLLBACK")
                raise
        except apsw.Error as cause:
            if _is_taken(cause):
                return self._conflict_of(inserts, deletes)
            self._fail(cause, "commit", outcome="unknown" if at_commit else "not_written")
        for table in created:
            self._tables[table.name] = table
        self._problem = None
        if on_step is not None:
            on_step("kv:committed")
        if self._watches:
            written = {name: [*keys] for name, keys in dropped.items()}
            for tables in (new, changed):
                for name, cells in tables.items():
                    written.setdefault(name, []).extend(keys_of(cells))
            self._watches.written(versionstamp, written)
        return Committed(versionstamp, bases)

    def watch(self, prefix: Key) -> AsyncIterator[int]:
        """Yields the versionstamp after commits of this instance that wrote below or at `prefix`; several commits
        between two awaits become one. Commits from the call on count, not only from the first await on."""
        if self._is_closed:
            self._refuse_if_unusable()
        return self._watches.add(prefix)

    def others_version(self) -> int:
        """A number that changes when another connection has committed to the file; asking takes some 2 us."""
        self._refuse_if_unusable()
        try:
            return int(self._execute("PRAGMA data_version").fetchall()[0][0])
        except apsw.Error as cause:
            self._fail(cause, "read")

    async def close(self) -> None:
        """Moves what the log holds into the file and lets go of it; closing twice is no error."""
        if self._is_closed:
            return
        self._is_closed = True
        self._problem = "the store is closed"
        self._watches.end_all()
        self._let_go()

    # -- reading ----------------------------------------------------------------------------------------------

    def _table_to_read(self, key: Key) -> Table | None:
        """The table of `key`, or `None` while no process has written to it."""
        if self._is_closed:
            self._refuse_if_unusable()
        name = key[0] if key else None
        table = self._tables.get(name) if type(name) is str else None
        return table if table is not None else self._look_for_table(table_of(key))

    def _look_for_table(self, name: str) -> Table | None:
        self.statements += 1
        try:
            exists = self._execute(_TABLE_EXISTS, (f"t_{name}",)).fetchall()
        except apsw.Error as cause:
            self._fail(cause, "read")
        if not exists:
            return None
        self._tables[name] = table = Table(name)
        return table

    # -- the parts of a commit --------------------------------------------------------------------------------

    def _failed_checks(self, checks: Sequence[Check]) -> tuple[Key, ...]:
        failed: list[Key] = []
        tables = self._tables
        execute = self._execute
        for key, expected in checks:
            table = tables.get(key[0]) if key else None  # type: ignore[arg-type]  # a miss is looked at next
            if table is None:
                table = self._table_to_read(key)
            found = [] if table is None else execute(table.stamp, (pack(key[1:]),)).fetchall()
            if (found[0][0] if found else None) != expected:
                failed.append(key)
        self.statements += len(checks)
        return tuple(failed)

    def _delete(self, deletes: Sequence[Key]) -> dict[str, list[bytes]]:
        """Deletes rows, and returns their packed keys by table."""
        dropped: dict[str, list[bytes]] = {}
        for key in deletes:
            try:
                keys = dropped[key[0]]  # type: ignore[index]  # a miss is looked at next
            except LookupError:
                keys = dropped.setdefault(table_of(key), [])
            keys.append(pack(key[1:]))
        for name, keys in dropped.items():
            table = self._tables.get(name) or self._look_for_table(name)
            if table is not None:
                self._write_many(table.delete_many, table.delete, keys, 1)
        self.statements += len(deletes)
        return dropped

    def _table(self, name: str, created: list[Table]) -> Table:
        """The table `name`; a new one is created inside the running transaction. A rollback takes it along, so the
        store remembers it (through `created`) only after the commit."""
        table = self._tables.get(name)
        if table is not None:
            return table
        table = Table(name)
        self._execute(table.create)
        created.append(table)
        return table

    def _there(self, inserts: Sequence[tuple[Key, bytes]], deletes: Sequence[Key]) -> tuple[Key, ...]:
        """The keys of `inserts` that have a row, and will still have it after `deletes`. A key with a slot is new."""
        deleted = set(deletes)
        checks = [Check(key, None) for key, _ in inserts if key not in deleted and not _has_slot(key)]
        return self._failed_checks(checks)

    def _conflict_of(self, inserts: Sequence[tuple[Key, bytes]], deletes: Sequence[Key]) -> Conflicted:
        """What an insert met. The failed statement does not say, so it is looked for."""
        failed = self._there(inserts, deletes)
        if not failed:
            keys = [key for key, _ in inserts]
            twice = next((key for key in keys if keys.count(key) > 1), None)
            raise ValueError(f"two inserts have the same key {twice!r}")
        return Conflicted(failed)

    def _insert(self, table: Table, cells: Cells) -> None:
        self._write_many(table.insert_many, table.insert, cells, CELLS_A_ROW)

    def _put(self, table: Table, cells: Cells) -> None:
        self._write_each(table.put, cells, CELLS_A_ROW)

    def _write_many(self, many: str, each: str, cells: Sequence[bytes | int], cells_a_row: int) -> None:
        cells_at_once = ROWS_A_STATEMENT * cells_a_row
        last_of_many = len(cells) - len(cells) % cells_at_once
        for first in range(0, last_of_many, cells_at_once):
            self._execute(many, cells[first : first + cells_at_once])
        self._write_each(each, cells[last_of_many:], cells_a_row)

    def _write_each(self, statement: str, cells: Sequence[bytes | int], cells_a_row: int) -> None:
        if len(cells) == cells_a_row:
            self._execute(statement, cells)  # a lone message makes six of these, and a batch of one costs more
        elif cells:
            self._cursor.executemany(statement, zip(*[iter(cells)] * cells_a_row, strict=True))


def _is_taken(cause: apsw.Error) -> bool:
    """Whether an insert met a row with its key."""
    return (
        isinstance(cause, apsw.ConstraintError)
        and getattr(cause, "extendedresult", 0) == apsw.SQLITE_CONSTRAINT_PRIMARYKEY
    )


def _has_slot(key: Key) -> bool:
    return any(isinstance(part, Slot) for part in key)


def _packed_bound(bound: Key, prefix: Key) -> bytes:
    if bound[:1] != prefix[:1]:
        raise ValueError(f"{bound!r} does not bound a scan of table {prefix[0]!r}")
    return pack(bound[1:])
