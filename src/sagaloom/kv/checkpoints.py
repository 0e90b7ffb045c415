"""Checkpoints beside the commits: a thread moves what the log of a SQLite file holds into the file.

The rules:

- SQLite itself makes a checkpoint within the commit that finds the log long: thousands of pages are copied and synced,
  10 to 20 ms in which the event loop stands still. But a checkpoint takes no lock that a writer needs. So a second
  connection makes it on a thread, while commits go on.
- The log begins anew only when nothing of it is left to be moved, and commits keep adding to it. So the thread goes
  over it twice, the second time over what has come during the first; and the few pages that have come since are moved
  by the next commit, at its end.
- Commits that come faster than the thread can move them wait for it when the log is twice as long as it should be.
- What is durable does not depend on any of this: a commit syncs the log, and SQLite syncs the log before it moves pages
  of it, and the file before the log begins anew, whichever connection does it.

    waiting ──log is long──▶ moving ──thread is through──▶ moved ──next commit moves the rest──▶ waiting

A checkpoint that fails is no error of the commit that asked for it: the log stays and grows, and whoever commits next
tries again; a disk that is full is found out by a commit.

What we dislike about it: on a machine with one core the thread and the loop share that, and nothing is gained but
shorter pauses.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Final, Protocol

import apsw

__all__ = ["Checkpoints", "MovesPages"]

# When another process has added to the log meanwhile, so that it does not begin anew, the next try waits for so many.
_PAGES_BETWEEN_TRIES: Final = 1000
_ROUNDS: Final = 2


class MovesPages(Protocol):
    """What is used of an apsw connection here."""

    def wal_checkpoint(self, dbname: str | None, mode: int, /) -> tuple[int, int]: ...

    def close(self, *, force: bool) -> None: ...


class Checkpoints:
    """Keeps the log of one file short. `committed` belongs to the thread of the connection `own`; `connect` opens
    another one on the same file, and is called on the thread that is made for it when the log is long for the first
    time."""

    def __init__(self, own: MovesPages, connect: Callable[[], MovesPages], *, pages: int) -> None:
        self._own = own
        self._connect = connect
        self._pages = pages
        """How many pages of log are long."""
        self._due = pages
        self._asked: SimpleQueue[bool] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_through = threading.Event()
        self._is_through.set()
        self._has_moved = False

    def committed(self, pages: int) -> None:
        """Is called after each commit, with how many pages the log has then."""
        if not self._is_through.is_set():
            if pages < 2 * self._pages:
                return
            self._is_through.wait()
        if pages < self._pages:
            self._has_moved, self._due = False, self._pages  # It began anew, if it was long before.
            return
        if pages < self._due:
            return
        if self._has_moved:
            self._has_moved = False
            self._due = self._pages if _moves_all(self._own) else pages + _PAGES_BETWEEN_TRIES
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="sagaloom-checkpoints", daemon=True)
            self._thread.start()
        self._is_through.clear()
        self._asked.put(True)

    def close(self) -> None:
        """Returns when the thread has ended; a checkpoint that is under way ends first."""
        if self._thread is not None:
            self._asked.put(False)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        connection: MovesPages | None = None
        while self._asked.get():
            with contextlib.suppress(apsw.Error):
                if connection is None:
                    connection = self._connect()
                for _ in range(_ROUNDS):
                    _moves_all(connection)
            self._has_moved = True
            self._is_through.set()
        if connection is not None:
            with contextlib.suppress(apsw.Error):
                connection.close(force=True)


def _moves_all(connection: MovesPages) -> bool:
    """Moves what can be moved without waiting for anybody; whether the log may begin anew."""
    try:
        pages, moved = connection.wal_checkpoint(None, apsw.SQLITE_CHECKPOINT_PASSIVE)
    except apsw.Error:
        return False
    return pages == moved
