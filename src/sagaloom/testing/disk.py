"""Disks that fail on purpose, as apsw VFSes: what an embedded store is opened on to see what it survives.

- `PowerLossVfs`: what was written since a file's last sync is gone when the power is. It keeps those writes in memory
  and hands them to the real file only when SQLite syncs it; dropping them is the power loss.
- `FullDiskVfs`: no space left, while `full` is set.
- `BrokenDiskVfs`: writes, or only syncs, that fail with an I/O error.
- `ReadOnlyVfs`: files that this process may not write, also when it runs as root.

Each registers itself with apsw under its `name` (pass that as `vfs=` to `SqliteKeyValue.open`) until `unregister()`.

The rules of the power loss, where systems differ: a file that was created and never synced is empty afterwards; a
deletion is undone unless its directory was synced later, which SQLite does with the first sync of each journal or log
that it opens; a cut takes effect with the next sync of its file. Memory that processes share for the index of the log
is not part of it: SQLite rebuilds that after a crash anyway.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Callable
from types import TracebackType

import apsw

__all__ = ["BrokenDiskVfs", "FullDiskVfs", "PowerLossVfs", "ReadOnlyVfs"]

_numbers = itertools.count(1)

_JOURNAL_OR_LOG = apsw.SQLITE_OPEN_MAIN_JOURNAL | apsw.SQLITE_OPEN_SUPER_JOURNAL | apsw.SQLITE_OPEN_WAL

_FileName = str | apsw.URIFilename | None


class _NamedVfs(apsw.VFS):
    """A VFS over the system's own, under a name that nobody else has."""

    def __init__(self) -> None:
        self.name = f"{type(self).__name__.lower()}-{os.getpid()}-{next(_numbers)}"
        super().__init__(self.name, "")

    def excepthook(
        self,
        etype: type[BaseException] | None,
        evalue: BaseException | None,
        etraceback: TracebackType | None,
    ) -> bool:
        """Keeps quiet: SQLite has the error already, and passes it to whoever asked."""
        return True


class _QuietFile(apsw.VFSFile):
    def excepthook(
        self,
        etype: type[BaseException] | None,
        evalue: BaseException | None,
        etraceback: TracebackType | None,
    ) -> bool:
        """Keeps quiet, as above: closing a file on a dead disk is no news."""
        return True


# -- power loss ---------------------------------------------------------------------------------------------------


class _Cached:
    """One file as processes see it, and what the disk does not have of it yet."""

    def __init__(self, content: bytes) -> None:
        self.content = bytearray(content)
        self.unsynced: list[tuple[int, bytes | None]] = []
        """(offset, data) is a write; (size, None) cuts or extends the file to that size."""


class PowerLossVfs(_NamedVfs):
    """A disk that forgets, at `lose_power()`, everything written since each file's last sync.

    `kill_at_sync=n` ends the process by SIGKILL instead of the nth sync; for the files that is the same event.
    """

    def __init__(self, *, kill_at_sync: int | None = None) -> None:
        super().__init__()
        self.syncs = 0
        self._kill_at_sync = kill_at_sync
        self._cached: dict[str, _Cached] = {}
        self._deleted: set[str] = set()
        self._open_files: list[_PowerLossFile] = []
        self._has_power = True
        self.lock = threading.RLock()
        """Is held while a file is written or synced: two threads may have it open."""

    def lose_power(self, *, survives: Callable[[], bool] = lambda: False) -> None:
        """Drops what is not synced; this VFS refuses everything from now on. Close what is open on it (which writes
        nothing more), then open the files on another VFS to see what is left.

        `survives` is asked for each unsynced write, oldest first: a real disk may have kept any of them.
        """
        with self.lock:
            files = {file.path: file for file in self._open_files}
            for path, cached in self._cached.items():
                kept = [write for write in cached.unsynced if survives()]
                if path in files:
                    files[path].write_through(kept)
            self._has_power = False

    def refuse_without_power(self) -> None:
        if not self._has_power:
            raise apsw.IOError(f"{self.name} has no power")

    def count_sync(self) -> None:
        self.syncs += 1
        if self.syncs == self._kill_at_sync:
            os.kill(os.getpid(), signal.SIGKILL)

    def xOpen(self, name: _FileName, flags: list[int]) -> apsw.VFSFile:  # noqa: N802
        self.refuse_without_power()
        if name is None:
            return _QuietFile("", name, flags)  # a temporary file has nothing to survive
        path = name if isinstance(name, str) else name.filename()
        if path in self._deleted and not flags[0] & apsw.SQLITE_OPEN_CREATE:
            raise apsw.CantOpenError(f"{path} was deleted")
        file = _PowerLossFile(self, path, name, flags)
        self._open_files.append(file)
        return file

    def xDelete(self, filename: str, syncdir: bool) -> None:  # noqa: FBT001, N802
        self.refuse_without_power()
        self._cached.pop(filename, None)
        if syncdir:
            self._deleted.discard(filename)
            super().xDelete(filename, syncdir)
        else:
            self._deleted.add(filename)

    def xAccess(self, pathname: str, flags: int) -> bool:  # noqa: N802
        return pathname not in self._deleted and super().xAccess(pathname, flags)

    def cached(self, file: _PowerLossFile) -> _Cached:
        """What all open files of this path share."""
        if file.path in self._deleted:
            self._deleted.discard(file.path)
            fresh = _Cached(b"")
            fresh.unsynced.append((0, None))  # the old content stays on the disk until the first sync
            self._cached[file.path] = fresh
        elif file.path not in self._cached:
            self._cached[file.path] = _Cached(file.read_through())
        return self._cached[file.path]

    def sync_directory(self) -> None:
        for path in self._deleted:
            super().xDelete(path, True)
        self._deleted.clear()

    def closed(self, file: _PowerLossFile) -> None:
        self._open_files.remove(file)


class _PowerLossFile(_QuietFile):
    def __init__(self, vfs: PowerLossVfs, path: str, name: str | apsw.URIFilename, flags: list[int]) -> None:
        super().__init__("", name, flags)
        self.path = path
        self._vfs = vfs
        self._cached = vfs.cached(self)
        self._syncs_directory = bool(flags[0] & _JOURNAL_OR_LOG and flags[0] & apsw.SQLITE_OPEN_CREATE)

    def read_through(self) -> bytes:
        """What the disk has."""
        size = super().xFileSize()
        return super().xRead(size, 0) if size else b""

    def write_through(self, writes: list[tuple[int, bytes | None]]) -> None:
        """Brings `writes` to the disk, in their order."""
        for offset, data in writes:
            if data is None:
                super().xTruncate(offset)
            else:
                super().xWrite(data, offset)  # pyright: ignore[reportUnknownMemberType]

    def xRead(self, amount: int, offset: int) -> bytes:  # noqa: N802
        return bytes(self._cached.content[offset : offset + amount])

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        with self._vfs.lock:
            self._vfs.refuse_without_power()
            content = self._cached.content
            if len(content) < offset:
                content.extend(bytes(offset - len(content)))
            content[offset : offset + len(data)] = data
            self._cached.unsynced.append((offset, bytes(data)))

    def xTruncate(self, newsize: int) -> None:  # noqa: N802
        with self._vfs.lock:
            self._vfs.refuse_without_power()
            content = self._cached.content
            del content[newsize:]
            content.extend(bytes(newsize - len(content)))
            self._cached.unsynced.append((newsize, None))

    def xSync(self, flags: int) -> None:  # noqa: N802
        with self._vfs.lock:
            self._vfs.refuse_without_power()
            self._vfs.count_sync()
            self.write_through(self._cached.unsynced)
            self._cached.unsynced.clear()
            if self._syncs_directory:
                self._syncs_directory = False
                self._vfs.sync_directory()

    def xFileSize(self) -> int:  # noqa: N802
        return len(self._cached.content)

    def xClose(self) -> None:  # noqa: N802
        self._vfs.closed(self)
        super().xClose()


# -- disks that refuse --------------------------------------------------------------------------------------------


class FullDiskVfs(_NamedVfs):
    """A disk without space while `full` is set: every write is refused."""

    def __init__(self) -> None:
        super().__init__()
        self.full = False
        self.refused_writes = 0

    def xOpen(self, name: _FileName, flags: list[int]) -> apsw.VFSFile:  # noqa: N802
        return _FullDiskFile(self, name, flags)


class _FullDiskFile(_QuietFile):
    def __init__(self, vfs: FullDiskVfs, name: _FileName, flags: list[int]) -> None:
        super().__init__("", name, flags)
        self._vfs = vfs

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        if self._vfs.full:
            self._vfs.refused_writes += 1
            raise apsw.FullError("no space left on device")
        super().xWrite(data, offset)  # pyright: ignore[reportUnknownMemberType]


class BrokenDiskVfs(_NamedVfs):
    """A disk with I/O errors: in writes while `broken_writes` is set, in syncs while `broken_syncs` is."""

    def __init__(self) -> None:
        super().__init__()
        self.broken_writes = False
        self.broken_syncs = False

    def xOpen(self, name: _FileName, flags: list[int]) -> apsw.VFSFile:  # noqa: N802
        return _BrokenDiskFile(self, name, flags)


class _BrokenDiskFile(_QuietFile):
    def __init__(self, vfs: BrokenDiskVfs, name: _FileName, flags: list[int]) -> None:
        super().__init__("", name, flags)
        self._vfs = vfs

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        if self._vfs.broken_writes:
            raise apsw.IOError("the disk does not write")
        super().xWrite(data, offset)  # pyright: ignore[reportUnknownMemberType]

    def xSync(self, flags: int) -> None:  # noqa: N802
        if self._vfs.broken_syncs:
            raise apsw.IOError("the disk does not sync")
        super().xSync(flags)


class ReadOnlyVfs(_NamedVfs):
    """A disk that opens every file for reading only, whoever asks."""

    def xOpen(self, name: _FileName, flags: list[int]) -> apsw.VFSFile:  # noqa: N802
        wanted = flags[0] & ~(apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE) | apsw.SQLITE_OPEN_READONLY
        granted = [wanted, 0]
        file = _QuietFile("", name, granted)
        flags[1] = granted[1]
        return file
