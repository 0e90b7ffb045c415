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

What happens when the file fails us:

    ready ──full disk or I/O error on write──▶ probing ──probe succeeds──▶ ready
      │                                          │
      │                                          └──probe fails──▶ probing   (BackendUnavailable)
      └──damaged page──▶ corrupt                 (StoreCorrupt; only another open leaves this state)

While probing, each commit first rewrites one small cell durably. That is cheap to refuse, and it settles doubt: if
a failed `COMMIT` left frames in the log whose fate nobody knows, the probe's own frames overwrite them.

What we dislike about it: a commit that raised may, if the process is killed before the next one, turn out to be
there after all, when its frames reached the disk although the sync reported an error. SQLite cannot tell either.
Writers must therefore be able to repeat a commit (by message id, by revision), which the engine needs anyway.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, Protocol, Self, cast

import apsw

from sagaloom.errors import BackendUnavailable, ConfigurationError, SagasError, StoreCorrupt
from sagaloom.kv.checkpoints import Checkpoints
from sagaloom.kv.packing import pack, prefix_range, table_of, unpack
from sagaloom.kv.watching import WatchHub
from sagaloom.ports.keyvalue import Check, Committed, Conflicted, Entry, Key, Slot

__all__ = ["FORMAT", "OLDEST_SQLITE", "SqliteKeyValue", "Synchronous", "require_sound_sqlite"]

Synchronous = Literal["OFF", "NORMAL", "FULL", "EXTRA"]

FORMAT: Final = 1
OLDEST_SQLITE: Final = (3, 51, 3)

_APPLICATION_ID: Final = 0x73616761  # "saga": tells a store from any other SQLite file before anything is changed

# A checkpoint moves each changed page once, however often the log has it; at 4000 pages (16 MiB) instead of
# SQLite's 1000 the same rows cost a quarter less. Beyond that the gain is small and the one commit that pays for
# the checkpoint waits longer.
_CHECKPOINT_PAGES: Final = 4000
# After a burst (or a long reader) the log shrinks to this at the next checkpoint instead of keeping its peak.
_LOG_BYTES_KEPT: Final = 64 * 1024 * 1024
# An upper bound, filled as pages are touched. SQLite's 2 MiB do not hold the upper levels of six large trees. But more
# is not better: a split that moves pages about has SQLite search the whole cache at the end of the commit, a tenth of
# it with 64 MiB; and what is not in here is in the cache of the system.
_PAGE_CACHE_KIB: Final = 16 * 1024
# Between two processes that commit in a loop, SQLite's own waits of up to 100 ms lose to the other one again and again:
# the longest wait was 1 to 2 s, and with this it was 0.1 to 0.3 s.
_LOCK_RETRY_SECONDS: Final = 0.0001
# So many rows are inserted by one statement: that takes two thirds of a statement a row, and more rows gain nothing.
# (With deletes it gains nothing at all: SQLite makes a tree of the keys first.)
_ROWS_A_STATEMENT: Final = 16
# Six statements a table, a few for the store; a statement that falls out of the cache is compiled again.
_STATEMENTS_CACHED: Final = 512

_CREATE: Final = f"""
    CREATE TABLE IF NOT EXISTS kv_meta (name TEXT PRIMARY KEY, value ANY NOT NULL) STRICT, WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS kv_counter (name TEXT PRIMARY KEY, n INTEGER NOT NULL) STRICT, WITHOUT ROWID;
    INSERT OR IGNORE INTO kv_counter (name, n) VALUES ('versionstamp', 0);
    INSERT OR IGNORE INTO kv_meta (name, value) VALUES ('format', {FORMAT}), ('probe', 0);
    PRAGMA application_id = {_APPLICATION_ID};
"""
# Two statements each: RETURNING would put its row into a table made for it, which takes three times as long.
_NEXT_VERSIONSTAMP: Final = "UPDATE kv_counter SET n = n + 1 WHERE name = 'versionstamp'"
_VERSIONSTAMP: Final = "SELECT n FROM kv_counter WHERE name = 'versionstamp'"
# Callers' counters carry a prefix, so that none of them can be the versionstamp.
_RESERVE: Final = (
    "INSERT INTO kv_counter (name, n) VALUES ('c:' || ?, ?) ON CONFLICT (name) DO UPDATE SET n = n + excluded.n"
)
_RESERVED: Final = "SELECT n FROM kv_counter WHERE name = 'c:' || ?"
_PROBE: Final = "UPDATE kv_meta SET value = 1 - value WHERE name = 'probe'"
_TABLE_EXISTS: Final = "SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = ?"

_Row = tuple[bytes, bytes, int]


class _Rows(Protocol):
    def __iter__(self) -> Iterator[tuple[Any, ...]]: ...

    def fetchall(self) -> list[tuple[Any, ...]]: ...


class _Cursor(Protocol):
    """What is used of an apsw cursor. Its own types give each cell of a row every type that SQLite has."""

    def execute(self, statements: str, bindings: Sequence[int | str | bytes] = (), /) -> _Rows: ...

    def executemany(self, statements: str, bindings: Iterable[Sequence[int | str | bytes]], /) -> object: ...


class _Connection(Protocol):
    """What is used of an apsw connection."""

    @property
    def in_transaction(self) -> bool: ...

    def cursor(self) -> _Cursor: ...

    def pragma(self, name: str, value: int | str | None = None, /) -> object: ...

    def readonly(self, name: str, /) -> bool: ...

    def set_busy_handler(self, callable: Callable[[int], bool], /) -> None: ...

    def total_changes(self) -> int: ...

    def wal_autocheckpoint(self, n: int, /) -> None: ...

    def set_wal_hook(self, callable: Callable[[Any, str, int], int], /) -> None: ...

    def wal_checkpoint(self, dbname: str | None, mode: int, /) -> tuple[int, int]: ...

    def close(self, *, force: bool) -> None: ...


def _is_taken(cause: apsw.Error) -> bool:
    """Whether an insert met a row with its key."""
    return (
        isinstance(cause, apsw.ConstraintError)
        and getattr(cause, "extendedresult", 0) == apsw.SQLITE_CONSTRAINT_PRIMARYKEY
    )


def _write_in_halves(batches: Sequence[_Batch], on_step: Callable[[str], None]) -> None:
    """Writes the rows of `batches` with a step after half of them, wherever in a table that is."""
    left_of_first_half = (sum(len(rows) for _, _, rows in batches) + 1) // 2
    reported = False
    for write, table, rows in batches:
        if not reported and len(rows) >= left_of_first_half:
            write(table, rows[:left_of_first_half])
            on_step("kv:half_written")
            reported = True
            write(table, rows[left_of_first_half:])
        else:
            write(table, rows)
            left_of_first_half -= len(rows)
    if not reported:
        on_step("kv:half_written")


def _rows_by_table(
    writes: Iterable[tuple[Key, bytes]], versionstamp: int, bases: Mapping[str, int]
) -> dict[str, list[_Row]]:
    """The rows of `writes`, grouped so that each table gets one batch, in the order of `writes` within a table."""
    rows: dict[str, list[_Row]] = {}
    for key, value in writes:
        try:
            table_rows = rows[key[0]]  # type: ignore[index]  # a miss is looked at next
        except LookupError:
            table_rows = rows.setdefault(table_of(key), [])
        table_rows.append((pack(key[1:], bases), value, versionstamp))
    return rows


def _has_slot(key: Key) -> bool:
    return any(isinstance(part, Slot) for part in key)


class _Table:
    """The statements of one table, written once so that the statement cache always meets the same text."""

    __slots__ = (
        "count",
        "create",
        "delete",
        "get",
        "insert",
        "insert_many",
        "name",
        "put",
        "scan_down",
        "scan_up",
        "stamp",
    )

    def __init__(self, name: str) -> None:
        table = f"t_{name}"
        self.name = name
        self.create = (
            f"CREATE TABLE IF NOT EXISTS {table} (k BLOB PRIMARY KEY, v BLOB NOT NULL, s INTEGER NOT NULL)"
            " STRICT, WITHOUT ROWID"
        )
        self.get = f"SELECT v, s FROM {table} WHERE k = ?"
        self.stamp = f"SELECT s FROM {table} WHERE k = ?"
        # One row a statement: each may take the place of another, and then SQLite copies the pages that several touch.
        self.put = f"REPLACE INTO {table} VALUES (?, ?, ?)"
        # OR ROLLBACK, because the commit ends anyway when a row is taken: to be able to take back the statement alone,
        # SQLite would copy those pages too.
        self.insert = f"INSERT OR ROLLBACK INTO {table} VALUES (?, ?, ?)"
        self.insert_many = self.insert + ", (?, ?, ?)" * (_ROWS_A_STATEMENT - 1)
        self.delete = f"DELETE FROM {table} WHERE k = ?"
        self.scan_up = f"SELECT k, v, s FROM {table} WHERE k > ? AND k < ? ORDER BY k LIMIT ?"
        self.scan_down = f"SELECT k, v, s FROM {table} WHERE k > ? AND k < ? ORDER BY k DESC LIMIT ?"
        self.count = f"SELECT count(*) FROM (SELECT 1 FROM {table} WHERE k > ? AND k < ? LIMIT ?)"


_Batch = tuple[Callable[[_Table, Sequence[_Row]], None], _Table, Sequence[_Row]]


class SqliteKeyValue:
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
        connection: _Connection,
        path: str,
        *,
        busy_timeout_seconds: float,
        on_step: Callable[[str], None] | None,
    ) -> None:
        """For `open`, which prepares the connection."""
        self._connection = connection
        self._cursor = connection.cursor()
        self._execute = self._cursor.execute
        self._path = path
        self._busy_timeout_seconds = busy_timeout_seconds
        self._waiting_since = 0.0
        self._on_step = on_step
        self._watches = WatchHub()
        self._checkpoints: Checkpoints | None = None
        self._tables: dict[str, _Table] = {}
        self._store_id = ""
        self._problem: str | None = None
        self._must_probe = False
        self._is_corrupt = False
        self._is_closed = False
        self.statements = 0
        """How many statements have touched tables, each row of a batch counted once: what idling costs."""

    @classmethod
    async def open(
        cls,
        path: str | os.PathLike[str],
        *,
        vfs: str | None = None,
        busy_timeout_seconds: float = 5.0,
        exclusive: bool = False,
        synchronous: Synchronous = "FULL",
        on_step: Callable[[str], None] | None = None,
    ) -> Self:
        """Opens the store at `path`, or creates it in an existing directory.

        `exclusive` keeps every other process out and needs no shared memory, for file systems without it.
        `synchronous="NORMAL"` or `"OFF"` trades the last commits before a power loss for speed. `vfs` names an apsw
        VFS. `on_step` is for crash tests: it is called inside each commit with `kv:checked`, `kv:half_written`,
        `kv:written` and, after it is durable, `kv:committed`.

        Raises `ConfigurationError` when the path, the file system or the SQLite library cannot carry a store,
        `StoreCorrupt` when the file is damaged, `BackendUnavailable` when others keep it locked.
        """
        require_sound_sqlite(apsw.sqlite_lib_version())
        if synchronous not in ("OFF", "NORMAL", "FULL", "EXTRA"):
            raise ConfigurationError(f"synchronous={synchronous!r} is not one of OFF, NORMAL, FULL, EXTRA")
        file = os.fspath(path)
        deadline = time.monotonic() + busy_timeout_seconds
        connection: _Connection | None = None
        try:
            connection = cast("_Connection", apsw.Connection(file, vfs=vfs, statementcachesize=_STATEMENTS_CACHED))
            store = cls(connection, file, busy_timeout_seconds=busy_timeout_seconds, on_step=on_step)
            store._prepare(exclusive=exclusive, synchronous=synchronous, deadline=deadline)
            if not exclusive:  # which keeps a second connection out, too: then SQLite makes checkpoints within commits
                store._checkpoint_beside(vfs=vfs, synchronous=synchronous)
        except BaseException as cause:
            if connection is not None:
                with contextlib.suppress(apsw.Error):
                    connection.close(force=True)
            if isinstance(cause, apsw.Error):
                raise _cannot_open(file, cause, busy_timeout_seconds=busy_timeout_seconds) from cause
            raise
        return store

    @property
    def name(self) -> str:
        return f"kv:{self._path}"

    @property
    def store_id(self) -> str:
        """32 hex digits, made with the file: two files with one id are copies of each other."""
        return self._store_id

    @property
    def healthy(self) -> bool:
        """Whether the last write succeeded, or none has failed yet."""
        return self._problem is None

    @property
    def problem(self) -> str | None:
        """What is wrong now, with the way out, or `None`; for readiness."""
        return self._problem

    async def probe(self) -> None:
        """Finds out whether a store that is not `healthy` can write again, by writing one small cell durably.

        Every commit does so by itself; this is for a readiness check, because nobody sends commits to a process that
        is not ready. Raises `BackendUnavailable` or `StoreCorrupt` when it cannot. Does nothing while healthy.
        """
        self._refuse_if_unusable()
        if self._problem is not None:
            self._probe()

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
        with one exception that the opening words of this module tell: `data["outcome"]` is `"unknown"` instead of
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

                created: list[_Table] = []
                dropped = self._delete(deletes) if deletes else {}
                new_rows = _rows_by_table(inserts, versionstamp, bases)
                rows = _rows_by_table(puts, versionstamp, bases)
                batches = [(self._insert, self._table(name, created), new) for name, new in new_rows.items()]
                batches += [(self._put, self._table(name, created), changed) for name, changed in rows.items()]
                if on_step is None:
                    for write, table, table_rows in batches:
                        write(table, table_rows)
                else:
                    _write_in_halves(batches, on_step)
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
            written: dict[str, list[bytes]] = {}
            for changed in (dropped, rows, new_rows):
                for name, changes in changed.items():
                    written.setdefault(name, []).extend([change[0] for change in changes])
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
        if self._checkpoints is not None:
            self._checkpoints.close()
        # When this fails nothing is lost: the log stays beside the file, and the next open reads it. A full disk must
        # not keep a process from stopping.
        with contextlib.suppress(apsw.Error):
            self._connection.pragma("wal_checkpoint(PASSIVE)")
        with contextlib.suppress(apsw.Error):
            # The last connection to leave tries the checkpoint once more, and reports the failure again; the file is
            # closed nevertheless.
            self._connection.close(force=True)

    # -- opening ----------------------------------------------------------------------------------------------

    def _prepare(self, *, exclusive: bool, synchronous: Synchronous, deadline: float) -> None:
        connection = self._connection
        connection.set_busy_handler(self._wait_for_lock)
        if connection.readonly("main"):
            raise ConfigurationError(
                f"{self._path} is read-only for this process: make the file and its directory writable,"
                " or choose another path"
            )
        if exclusive:
            # Before the first access in WAL mode: then the index of the log lives on the heap, not in shared memory.
            connection.pragma("locking_mode", "EXCLUSIVE")
        while True:
            try:
                self._refuse_foreign_file()
                self._configure(synchronous)
                self._create_or_check()
                return
            except apsw.BusyError:
                # Two processes that create one file meet in ways for which SQLite does not call its own retry.
                self._end_transaction("ROLLBACK")
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.005)

    def _wait_for_lock(self, tries: int) -> bool:
        """Called by SQLite while another process holds the lock; `False` gives up."""
        now = time.monotonic()
        if tries == 0:
            self._waiting_since = now
        if now - self._waiting_since >= self._busy_timeout_seconds:
            return False
        time.sleep(_LOCK_RETRY_SECONDS)
        return True

    def _refuse_foreign_file(self) -> None:
        if not self._execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchall():
            return
        # In this order: tables and id come in one commit, so whoever has seen a table sees the id.
        if self._connection.pragma("application_id") != _APPLICATION_ID:
            raise ConfigurationError(
                f"{self._path} is a SQLite database of another application, not a saga store: choose another path"
            )

    def _configure(self, synchronous: Synchronous) -> None:
        pragma = self._connection.pragma
        mode = pragma("journal_mode", "WAL")
        if mode != "wal":
            raise ConfigurationError(
                f"{self._path} cannot be opened in WAL mode (SQLite answered {mode!r}): a store needs a real file on"
                " a local file system; for tests without a file use MemoryKeyValue"
            )
        _sync_as(self._connection, synchronous)
        pragma("cache_size", -_PAGE_CACHE_KIB)
        pragma("journal_size_limit", _LOG_BYTES_KEPT)
        self._connection.wal_autocheckpoint(_CHECKPOINT_PAGES)

    def _checkpoint_beside(self, *, vfs: str | None, synchronous: Synchronous) -> None:
        def connect() -> _Connection:
            connection = cast("_Connection", apsw.Connection(self._path, vfs=vfs))
            _sync_as(connection, synchronous)
            return connection

        self._checkpoints = checkpoints = Checkpoints(self._connection, connect, pages=_CHECKPOINT_PAGES)

        def after_commit(connection: object, database: str, pages: int) -> int:
            checkpoints.committed(pages)
            return apsw.SQLITE_OK

        self._connection.set_wal_hook(after_commit)  # which takes the place of SQLite's own

    def _create_or_check(self) -> None:
        if self._connection.pragma("application_id") != _APPLICATION_ID:
            self._execute("BEGIN IMMEDIATE")
            for statement in _CREATE.split(";"):
                self._execute(statement)
            # Two processes may both get here; the first one's id stays.
            self._execute("INSERT OR IGNORE INTO kv_meta (name, value) VALUES ('store_id', ?)", (uuid.uuid4().hex,))
            self._execute("COMMIT")
        try:
            meta: dict[str, object] = dict(self._execute("SELECT name, value FROM kv_meta").fetchall())
        except apsw.SQLError as cause:
            raise StoreCorrupt(f"{self._path} has lost its table kv_meta: restore it from a backup") from cause
        if meta.get("format") != FORMAT:
            raise ConfigurationError(
                f"{self._path} has store format {meta.get('format')!r}, this version reads format {FORMAT}:"
                " use the version of sagaloom that wrote it, or another path"
            )
        self._store_id = str(meta["store_id"])
        for (table_name,) in self._execute("SELECT name FROM sqlite_schema WHERE name GLOB 't_[a-z_]*'").fetchall():
            self._tables[table_name[2:]] = _Table(table_name[2:])

    # -- reading ----------------------------------------------------------------------------------------------

    def _table_to_read(self, key: Key) -> _Table | None:
        """The table of `key`, or `None` while no process has written to it."""
        if self._is_closed:
            self._refuse_if_unusable()
        name = key[0] if key else None
        table = self._tables.get(name) if type(name) is str else None
        return table if table is not None else self._look_for_table(table_of(key))

    def _look_for_table(self, name: str) -> _Table | None:
        self.statements += 1
        try:
            exists = self._execute(_TABLE_EXISTS, (f"t_{name}",)).fetchall()
        except apsw.Error as cause:
            self._fail(cause, "read")
        if not exists:
            return None
        self._tables[name] = table = _Table(name)
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

    def _delete(self, deletes: Sequence[Key]) -> dict[str, list[tuple[bytes]]]:
        """Deletes rows, and returns their packed keys by table."""
        dropped: dict[str, list[tuple[bytes]]] = {}
        for key in deletes:
            try:
                keys = dropped[key[0]]  # type: ignore[index]  # a miss is looked at next
            except LookupError:
                keys = dropped.setdefault(table_of(key), [])
            keys.append((pack(key[1:]),))
        for name, keys in dropped.items():
            table = self._tables.get(name) or self._look_for_table(name)
            if table is not None:
                self._write_each(table.delete, keys)
        self.statements += len(deletes)
        return dropped

    def _table(self, name: str, created: list[_Table]) -> _Table:
        """The table `name`; a new one is created inside the running transaction. A rollback takes it along, so the
        store remembers it (through `created`) only after the commit."""
        table = self._tables.get(name)
        if table is not None:
            return table
        table = _Table(name)
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

    def _insert(self, table: _Table, rows: Sequence[_Row]) -> None:
        last_of_many = len(rows) - len(rows) % _ROWS_A_STATEMENT
        for first in range(0, last_of_many, _ROWS_A_STATEMENT):
            many = rows[first : first + _ROWS_A_STATEMENT]
            self._execute(table.insert_many, tuple(chain.from_iterable(many)))
        self._write_each(table.insert, rows[last_of_many:])

    def _put(self, table: _Table, rows: Sequence[_Row]) -> None:
        self._write_each(table.put, rows)

    def _write_each(self, statement: str, rows: Sequence[tuple[bytes] | _Row]) -> None:
        if len(rows) == 1:
            self._execute(statement, rows[0])  # a lone message makes six of these, and a batch of one costs more
        elif rows:
            self._cursor.executemany(statement, rows)

    def _end_transaction(self, how: Literal["COMMIT", "ROLLBACK"]) -> None:
        if self._connection.in_transaction:
            self._execute(how)

    # -- trouble ----------------------------------------------------------------------------------------------

    def _refuse_if_unusable(self) -> None:
        if self._is_closed:
            raise BackendUnavailable(f"{self.name} is closed: open it again", retryable=False, data=self._data())
        if self._is_corrupt:
            raise StoreCorrupt(self._problem or f"{self._path} is damaged", data=self._data())

    def _probe(self) -> None:
        """Writes one small cell durably, or raises what stands in the way."""
        self.statements += 1
        try:
            self._end_transaction("ROLLBACK")
            self._execute("BEGIN IMMEDIATE")
            try:
                self._execute(_PROBE)
                self._execute("COMMIT")
            except BaseException:
                self._end_transaction("ROLLBACK")
                raise
        except apsw.Error as cause:
            self._fail(cause, "commit", outcome="not_written")
        self._must_probe = False
        self._problem = None

    def _fail(self, cause: apsw.Error, doing: Literal["read", "commit"], *, outcome: str | None = None) -> NoReturn:
        """Raises what `cause` means to the caller, and remembers what stands in the way of the next commit."""
        if isinstance(cause, apsw.ConstraintError):
            raise TypeError(f"a value that is not bytes cannot be stored: {cause}") from cause
        error = _translated(
            self._path, cause, busy_timeout_seconds=self._busy_timeout_seconds, data=self._data(outcome)
        )
        if isinstance(error, StoreCorrupt):
            self._is_corrupt = True
            self._problem = error.message
        elif doing == "commit":
            self._problem = error.message
            self._must_probe = not isinstance(cause, apsw.BusyError) or self._connection.in_transaction
        raise error from cause

    def _data(self, outcome: str | None = None) -> dict[str, object]:
        return {"path": self._path} if outcome is None else {"path": self._path, "outcome": outcome}


def require_sound_sqlite(version: str) -> None:
    """Raises `ConfigurationError` for a SQLite library before 3.51.3, which can corrupt a file in WAL mode when one
    connection restarts the log while another checkpoints it.

    >>> require_sound_sqlite("3.51.3")
    """
    numbers = tuple(int(number) for number in version.split(".")[:3])
    if numbers < OLDEST_SQLITE:
        oldest = ".".join(map(str, OLDEST_SQLITE))
        raise ConfigurationError(
            f"the SQLite library of apsw is {version}, and before {oldest} a log shared by several connections can be"
            " corrupted: install a newer apsw wheel (pip install --upgrade apsw)"
        )


def _sync_as(connection: _Connection, synchronous: Synchronous) -> None:
    connection.pragma("synchronous", synchronous)
    if synchronous in ("FULL", "EXTRA"):
        # Where fsync stops at the drive's cache (macOS) ask for the sync that does not; elsewhere no effect.
        connection.pragma("fullfsync", 1)
        connection.pragma("checkpoint_fullfsync", 1)


def _packed_bound(bound: Key, prefix: Key) -> bytes:
    if bound[:1] != prefix[:1]:
        raise ValueError(f"{bound!r} does not bound a scan of table {prefix[0]!r}")
    return pack(bound[1:])


def _cannot_open(file: str, cause: apsw.Error, *, busy_timeout_seconds: float) -> SagasError:
    data = {"path": file}
    match cause:
        case apsw.CantOpenError():
            directory = Path(file).absolute().parent
            remedy = (
                "name a file in it that this process may create and write"
                if directory.is_dir()
                else f"create the directory {directory} first"
            )
            return ConfigurationError(f"cannot open {file} ({cause}): {remedy}", data=data)
        case apsw.ReadOnlyError():
            return ConfigurationError(
                f"{file} is read-only for this process ({cause}): make the file and its directory writable,"
                " or choose another path",
                data=data,
            )
        case apsw.BusyError() | apsw.FullError() | apsw.IOError() | apsw.NotADBError() | apsw.CorruptError():
            return _translated(file, cause, busy_timeout_seconds=busy_timeout_seconds, data=data)
        case _:
            return ConfigurationError(f"cannot open {file}: {cause}", data=data)


def _translated(path: str, cause: apsw.Error, *, busy_timeout_seconds: float, data: Mapping[str, object]) -> SagasError:
    """The error of ours that says what `cause` means for the store at `path`, and what helps."""
    match cause:
        case apsw.BusyError() | apsw.LockedError():
            return BackendUnavailable(
                f"{path} stayed locked by another process for {busy_timeout_seconds:g} s ({cause}): look for a"
                " transaction left open (a shell, a backup, an exclusive open), or raise busy_timeout_seconds",
                data=data,
            )
        case apsw.FullError():
            return BackendUnavailable(
                f"no space left to write {path} ({cause}): free space on its file system; writing resumes by itself",
                data=data,
            )
        case apsw.NotADBError() | apsw.CorruptError():
            return StoreCorrupt(
                f"{path} is damaged or no SQLite file ({cause}): stop writing to it and restore it from a backup",
                data=data,
            )
        case apsw.ReadOnlyError() | apsw.CantOpenError() | apsw.PermissionsError():
            return BackendUnavailable(
                f"{path} can no longer be written ({cause}): restore the file, its directory and their permissions;"
                " writing resumes by itself",
                data=data,
            )
        case apsw.IOError():
            return BackendUnavailable(
                f"reading or writing {path} failed ({cause}): look at the disk and its file system", data=data
            )
        case _:
            return BackendUnavailable(f"{path}: {cause}", retryable=False, data=data)
