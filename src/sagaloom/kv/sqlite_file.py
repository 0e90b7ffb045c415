"""The file of the embedded store: how it is opened, told from other files, set up and created.

- WAL and `synchronous=FULL` (the default), so that what was committed is on stable storage.
- `kv_counter` holds the number of the last commit and the reserved counters, `kv_meta` the format, the id of the
  store and a cell for probes.
- Nothing is changed in a file before it is known to be a store of ours, or empty. Several processes may create one file
  at the same time: the first one's id stays.
- Only what the log holds is moved into the file by a thread, beside the commits (`sagaloom.kv.checkpoints`).
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable
from typing import Final, Self, cast

import apsw

from sagaloom.errors import ConfigurationError, StoreCorrupt
from sagaloom.kv.checkpoints import Checkpoints
from sagaloom.kv.sqlite_driver import Connection, Synchronous, require_sound_sqlite, sync_as
from sagaloom.kv.sqlite_tables import Table
from sagaloom.kv.sqlite_trouble import SqliteTrouble, cannot_open

__all__ = ["FORMAT", "SqliteFile"]

FORMAT: Final = 1

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
# Six statements a table, a few for the store; a statement that falls out of the cache is compiled again.
_STATEMENTS_CACHED: Final = 512

_CREATE: Final = f"""
    CREATE TABLE IF NOT EXISTS kv_meta (name TEXT PRIMARY KEY, value ANY NOT NULL) STRICT, WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS kv_counter (name TEXT PRIMARY KEY, n INTEGER NOT NULL) STRICT, WITHOUT ROWID;
    INSERT OR IGNORE INTO kv_counter (name, n) VALUES ('versionstamp', 0);
    INSERT OR IGNORE INTO kv_meta (name, value) VALUES ('format', {FORMAT}), ('probe', 0);
    PRAGMA application_id = {_APPLICATION_ID};
"""


class SqliteFile(SqliteTrouble):
    """An open file and its tables; made by `open`."""

    def __init__(
        self,
        connection: Connection,
        path: str,
        *,
        busy_timeout_seconds: float,
        on_step: Callable[[str], None] | None,
    ) -> None:
        """For `open`, which prepares the connection."""
        super().__init__(connection, path, busy_timeout_seconds=busy_timeout_seconds)
        self._on_step = on_step
        self._checkpoints: Checkpoints | None = None
        self._tables: dict[str, Table] = {}
        self._store_id = ""

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
        connection: Connection | None = None
        try:
            connection = cast("Connection", apsw.Connection(file, vfs=vfs, statementcachesize=_STATEMENTS_CACHED))
            store = cls(connection, file, busy_timeout_seconds=busy_timeout_seconds, on_step=on_step)
            store._prepare(exclusive=exclusive, synchronous=synchronous, deadline=deadline)
            if not exclusive:  # which keeps a second connection out, too: then SQLite makes checkpoints within commits
                store._checkpoint_beside(vfs=vfs, synchronous=synchronous)
        except BaseException as cause:
            if connection is not None:
                with contextlib.suppress(apsw.Error):
                    connection.close(force=True)
            if isinstance(cause, apsw.Error):
                raise cannot_open(file, cause, busy_timeout_seconds=busy_timeout_seconds) from cause
            raise
        return store

    @property
    def store_id(self) -> str:
        """32 hex digits, made with the file: two files with one id are copies of each other."""
        return self._store_id

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
        sync_as(self._connection, synchronous)
        pragma("cache_size", -_PAGE_CACHE_KIB)
        pragma("journal_size_limit", _LOG_BYTES_KEPT)
        self._connection.wal_autocheckpoint(_CHECKPOINT_PAGES)

    def _checkpoint_beside(self, *, vfs: str | None, synchronous: Synchronous) -> None:
        def connect() -> Connection:
            connection = cast("Connection", apsw.Connection(self._path, vfs=vfs))
            sync_as(connection, synchronous)
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
            self._tables[table_name[2:]] = Table(table_name[2:])

    def _let_go(self) -> None:
        """Moves what the log holds into the file, and closes it."""
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
