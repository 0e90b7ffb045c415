"""What happens when the file of the embedded store fails: what is said of it, and how writing resumes.

    ready ──full disk or I/O error on write──▶ probing ──probe succeeds──▶ ready
      │                                          │
      │                                          └──probe fails──▶ probing   (BackendUnavailable)
      └──damaged page──▶ corrupt                 (StoreCorrupt; only another open leaves this state)

While probing, each commit first rewrites one small cell durably. That is cheap to refuse, and it settles doubt: if
a failed `COMMIT` left frames in the log whose fate nobody knows, the probe's own frames overwrite them.

What we dislike about it: a commit that raised may, if the process is killed before the next one, turn out to be
there after all, when its frames reached the disk although the sync reported an error. SQLite cannot tell either.
Writers must therefore be able to repeat a commit (by message id, by revision), which the engine needs anyway.

A lock that another process holds is waited for, at most `busy_timeout_seconds`. A commit that waited for it in vain
needs no probe.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal, NoReturn

import apsw

from sagaloom.errors import BackendUnavailable, ConfigurationError, SagasError, StoreCorrupt
from sagaloom.kv.sqlite_driver import Connection

__all__ = ["SqliteTrouble", "cannot_open"]

# Between two processes that commit in a loop, SQLite's own waits of up to 100 ms lose to the other one again and again:
# the longest wait was 1 to 2 s, and with this it was 0.1 to 0.3 s.
_LOCK_RETRY_SECONDS: Final = 0.0001
_PROBE: Final = "UPDATE kv_meta SET value = 1 - value WHERE name = 'probe'"


class SqliteTrouble:
    """A connection to one file, and what stands in the way of using it. Whoever meets an error hands it to `_fail`."""

    def __init__(self, connection: Connection, path: str, *, busy_timeout_seconds: float) -> None:
        self._connection = connection
        self._cursor = connection.cursor()
        self._execute = self._cursor.execute
        self._path = path
        self._busy_timeout_seconds = busy_timeout_seconds
        self._waiting_since = 0.0
        self._problem: str | None = None
        self._must_probe = False
        self._is_corrupt = False
        self._is_closed = False
        self.statements = 0
        """How many statements have touched tables, each row of a batch counted once: what idling costs."""

    @property
    def name(self) -> str:
        return f"kv:{self._path}"

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

    def _end_transaction(self, how: Literal["COMMIT", "ROLLBACK"]) -> None:
        if self._connection.in_transaction:
            self._execute(how)

    def _wait_for_lock(self, tries: int) -> bool:
        """Called by SQLite while another process holds the lock; `False` gives up."""
        now = time.monotonic()
        if tries == 0:
            self._waiting_since = now
        if now - self._waiting_since >= self._busy_timeout_seconds:
            return False
        time.sleep(_LOCK_RETRY_SECONDS)
        return True


def cannot_open(file: str, cause: apsw.Error, *, busy_timeout_seconds: float) -> SagasError:
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
