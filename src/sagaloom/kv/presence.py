"""Who writes to a store file right now: a file for each live process, locked in a way that the kernel undoes.

Beside the store lies a directory, `<path>.workers`. Whoever writes has a file in it, named for the holder of its lease:

- the file is locked with `flock` for life. A killed process loses the lock the moment it dies, so others see it at
  once: whoever gets the lock of a file has found a dead one's, and removes it;
- the file says until when its owner is to be believed, and the owner pushes that moment on while it runs. A process
  that was stopped keeps its lock and not its word: past the moment it counts as dead, and has to ask when it wakes.

Beside each file lies a pipe with a name, `<file>.wake`: whoever has written something for somebody else puts a byte
into it, so that nobody has to look at the store again and again. A byte that is lost costs a fifth of a second.

The moments are those of the monotonic clock, which all processes of a host share and nobody sets; after a reboot no
lock is held. None of this keeps data safe: the lease in the store does, and it works whatever these files say.

What we dislike about it: processes on two hosts that share a file over a network do not see each other rightly. A store
file belongs on one host. Where there is no `flock`, a killed process is noticed only when its moment has passed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
import weakref
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from typing import Final
from urllib.parse import quote, unquote

from sagaloom.errors import ConfigurationError

if sys.platform != "win32":
    import fcntl

__all__ = ["FilePresence"]

_BOOT_FILE: Final = Path("/proc/sys/kernel/random/boot_id")
_TRIES: Final = 10
_PIPE: Final = ".wake"
_SAID_BYTES_MAX: Final = 256


class FilePresence:
    """The presence of one writer of the store at `path`; a `Presence` of `sagaloom.stores.tenure`.

    `lease_seconds` is how long a process that does not run, but is not dead either, is still believed to be alive.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     first, second = FilePresence(f"{directory}/saga.db"), FilePresence(f"{directory}/saga.db")
    ...     first.enter("worker-1")
    ...     second.enter("worker-2")
    ...     seen = sorted(second.others())
    ...     first.leave()
    ...     seen, sorted(second.others())
    ...     second.leave()
    (['worker-1'], [])
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        lease_seconds: float = 6.0,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = Path(f"{os.fspath(path)}.workers")
        self._lease_seconds = lease_seconds
        self._monotonic = monotonic
        self._believed_until = 0.0
        self._file: Path | None = None
        self._descriptor: int | None = None
        self._wakes: int | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._resting: asyncio.TimerHandle | None = None
        self._seen: frozenset[str] = frozenset()
        self.buried: set[str] = set()
        """The holders whose files we have found abandoned."""
        _every.add(self)

    def enter(self, holder: str) -> None:
        """Shows `holder` to the others. Entering again takes a new name."""
        self.leave()
        file = self._directory / quote(holder, safe="")
        try:
            self._descriptor = _open_locked(file)
            self._wakes = _open_pipe(_pipe_of(file))
        except OSError as error:
            raise ConfigurationError(
                f"cannot write {file} ({error.strerror}): the store's directory must be writable"
            ) from error
        self._file = file
        self._say(self._monotonic())

    def renew(self) -> bool:
        """Pushes on the moment until which we are believed; False when it had passed, and others may have acted."""
        now = self._monotonic()
        in_time = now < self._believed_until
        # Asked every moment, written now and then: a disk that has nothing else to do shall be able to sleep.
        if self._descriptor is not None and now > self._believed_until - self._lease_seconds * 2 / 3:
            self._say(now)
        return in_time

    def others(self) -> frozenset[str]:
        """The holders that are alive, but for ourselves. Removes what the dead have left. Who cannot be looked at (we
        are out of file descriptors, say) is what it was."""
        try:
            names = os.listdir(self._directory)  # noqa: PTH208 - asked for often; a Path for each name costs more
        except FileNotFoundError:
            names = []
        except OSError:
            return self._seen
        own = self._file.name if self._file is not None else None
        self._seen = frozenset(
            [
                _holder_of(name)
                for name in names
                if name != own and not name.endswith(_PIPE) and self._is_alive(f"{self._directory}/{name}")
            ]
        )
        return self._seen

    def nudge(self) -> None:
        """Wakes the others: there is something for them in the store."""
        own = self._file.name if self._file is not None else _PIPE
        with contextlib.suppress(OSError):
            for name in os.listdir(self._directory):  # noqa: PTH208 - as above
                if name.endswith(_PIPE) and not name.startswith(own):
                    _put_byte(self._directory / name)

    def listen(self, on_nudge: Callable[[], None], *, rest_seconds: float = 0.0) -> bool:
        """Has the running loop call `on_nudge` when somebody nudges, until `leave`; False where there are no pipes.
        After a nudge the next ones are heard together when `rest_seconds` are over: under load there is one for every
        commit of everybody else."""
        if self._wakes is None:
            return False
        descriptor, loop = self._wakes, asyncio.get_running_loop()

        def woken() -> None:
            with contextlib.suppress(OSError):
                os.read(descriptor, 4096)
            if rest_seconds:
                loop.remove_reader(descriptor)
                self._resting = loop.call_later(rest_seconds, loop.add_reader, descriptor, woken)
            on_nudge()

        self._loop = loop
        loop.add_reader(descriptor, woken)
        return True

    def leave(self) -> None:
        """Shows ourselves no more. Leaving twice is no error."""
        descriptor, self._descriptor = self._descriptor, None
        file, self._file = self._file, None
        wakes, self._wakes = self._wakes, None
        self._believed_until = 0.0
        resting, self._resting = self._resting, None
        if resting is not None:
            resting.cancel()
        if wakes is not None:
            if self._loop is not None and not self._loop.is_closed():
                self._loop.remove_reader(wakes)
            os.close(wakes)
        if file is not None:
            _remove(file)
        if descriptor is not None:
            os.close(descriptor)
            with contextlib.suppress(OSError):
                self._directory.rmdir()  # which succeeds only for the last one

    def is_gone(self, holder: str) -> bool:
        """Whether `holder` is certainly dead: nobody has its lock any more. One that was stopped still has it."""
        file = self._directory / quote(holder, safe="")
        return not file.exists() or _is_abandoned(os.fspath(file))

    def _say(self, now: float) -> None:
        assert self._descriptor is not None
        until = now + self._lease_seconds
        # Of one length, so that a reader never meets the tail of an older text.
        text = f"{os.getpid():>10}\n{until:020.6f}\n{_boot_id()}\n"
        with contextlib.suppress(OSError):
            os.pwrite(self._descriptor, text.encode(), 0)
            self._believed_until = until

    def _is_alive(self, file: str) -> bool:
        holder = _holder_of(os.path.basename(file))  # noqa: PTH119 - as above
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        except OSError:
            return holder in self._seen
        try:
            if _has_lost_owner(descriptor, file):
                self.buried.add(holder)
                return False
            lines = os.pread(descriptor, _SAID_BYTES_MAX, 0).decode(errors="replace").split("\n")
            return lines[2] == _boot_id() and float(lines[1]) > self._monotonic()
        except OSError:
            return holder in self._seen
        except (IndexError, ValueError):
            return True  # It has just been made, and its owner is about to write.
        finally:
            os.close(descriptor)

    def _leave_to_parent(self) -> None:
        # A forked child shares the locked file: it would keep the lock after its parent's death.
        descriptor, self._descriptor = self._descriptor, None
        wakes, self._wakes = self._wakes, None
        self._file = None
        for each in (descriptor, wakes):
            if each is not None:
                os.close(each)


def _is_abandoned(file: str) -> bool:
    """Whether nobody has the lock of `file`; then it is removed."""
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        return _has_lost_owner(descriptor, file)
    finally:
        os.close(descriptor)


def _has_lost_owner(descriptor: int, file: str) -> bool:
    """The same of a file that is open. Another process that looks at the same moment is taken for the owner."""
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    # Its owner may have left and entered again meanwhile, with another file of that name.
    with contextlib.suppress(OSError):
        if os.path.samestat(os.fstat(descriptor), os.stat(file)):  # noqa: PTH116 - as above
            _remove(Path(file))
    return True


def _remove(file: Path) -> None:
    for each in (file, _pipe_of(file)):
        with contextlib.suppress(OSError):
            each.unlink()


def _pipe_of(file: Path) -> Path:
    return file.with_name(file.name + _PIPE)


def _open_pipe(path: Path) -> int | None:
    if sys.platform == "win32":
        return None
    try:
        with contextlib.suppress(FileExistsError):
            os.mkfifo(path, 0o644)
        # For writing, too: a pipe that only others write to would end whenever the last of them closes it.
        return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None  # Some file systems have no pipes. Then we look now and then.


def _put_byte(path: Path) -> None:
    with contextlib.suppress(OSError):  # Nobody reads it any more, or it is full, and they wake anyway.
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.write(descriptor, b".")
        finally:
            os.close(descriptor)


def _open_locked(file: Path) -> int:
    """Opens `file` anew and locks it. Somebody who is looking for the dead may take the lock for a moment, and remove
    the file with it, or the last one to leave the directory; then another one is made."""
    for _ in range(_TRIES):
        file.parent.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            if sys.platform == "win32":
                return descriptor
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(descriptor).st_ino == file.stat().st_ino:
                    return descriptor
            os.close(descriptor)
    raise ConfigurationError(f"{file} was taken away {_TRIES} times while it was made: does another tool clean there?")


@lru_cache(maxsize=1024)
def _holder_of(name: str) -> str:
    return unquote(name)


@cache
def _boot_id() -> str:
    try:
        return _BOOT_FILE.read_text().strip()
    except OSError:
        return "-"


_every: weakref.WeakSet[FilePresence] = weakref.WeakSet()


def _after_fork() -> None:
    for presence in list(_every):
        presence._leave_to_parent()  # pyright: ignore[reportPrivateUsage]


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_after_fork)
