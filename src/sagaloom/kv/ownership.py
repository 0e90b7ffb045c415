"""One live process per store file: a lock that the kernel frees when its holder dies.

The lock is `flock` on `<path>.owner`, beside the store; the file's content only tells people who holds it. It makes
the usual accident (the same store served twice) a clear refusal, and a killed process no obstacle: its lock is gone
the moment it is. It is not what keeps data safe; the lease in the store is, and it works without this lock too: on
platforms without `flock` the later process wins, and the earlier one's writes are refused.

What we dislike about it: on network file systems a lock may outlive its host.
"""

from __future__ import annotations

import contextlib
import os
import sys
import weakref
from pathlib import Path
from typing import Final

from sagaloom.errors import BackendUnavailable, ConfigurationError

if sys.platform != "win32":
    import fcntl

__all__ = ["OwnerLock", "StoreInUse"]

_TEXT_BYTES_MAX: Final = 4096


class StoreInUse(BackendUnavailable):
    """Another live process has the store. `data` has its `pid` and `holder` as far as they can be read."""

    default_code = "STORE_IN_USE"


class OwnerLock:
    """The lock of the store at `path`; an `Ownership` of `sagaloom.stores.kv`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     lock = OwnerLock(f"{directory}/saga.db")
    ...     lock.take("worker-1")
    ...     lock.free()
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(path)
        self._file = Path(f"{self._path}.owner")
        self._descriptor: int | None = None
        _every.add(self)

    @property
    def is_taken(self) -> bool:
        return self._descriptor is not None

    def take(self, holder: str) -> None:
        """Takes the lock for `holder`, or raises `StoreInUse` at once. Taking it twice is no error."""
        if sys.platform == "win32" or self._descriptor is not None:
            return
        try:
            descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigurationError(
                f"cannot write {self._file} ({error.strerror}): the store's directory must be writable"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n{holder}\n".encode()[:_TEXT_BYTES_MAX], 0)
        except BlockingIOError as error:
            found = os.pread(descriptor, _TEXT_BYTES_MAX, 0)
            os.close(descriptor)
            raise self._in_use(found.decode(errors="replace")) from error
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def free(self) -> None:
        """Lets the next process in. Freeing twice is no error. The file stays: removing it could tear apart two
        processes that are just opening it."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0)
            os.close(descriptor)

    def _in_use(self, text: str) -> StoreInUse:
        pid, _, holder = text.strip().partition("\n")
        if pid == str(os.getpid()):
            who, remedy = "this very process", "close the other store first, or share it"
        elif pid:
            who = f"process {pid} ({holder})"
            remedy = f"stop it (kill {pid}), publish through its HTTP API, or choose another path"
        else:
            who, remedy = "another process", "find it with fuser or lsof, or try again"
        return StoreInUse(
            f"{self._path} is in use by {who}: {remedy}",
            data={"path": self._path, "pid": int(pid) if pid.isdigit() else None, "holder": holder or None},
        )

    def _leave_to_parent(self) -> None:
        # A forked child shares the locked file: it would keep the lock after its parent's death.
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


_every: weakref.WeakSet[OwnerLock] = weakref.WeakSet()


def _after_fork() -> None:
    for lock in list(_every):
        lock._leave_to_parent()  # pyright: ignore[reportPrivateUsage]


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_after_fork)
