"""The process that stands between a test and a server of its own, so that nothing is left behind.

Whatever a server starts (backends, name daemons, helpers that detach themselves) becomes a descendant of its keeper,
and stays one when its parent dies: the keeper is a subreaper. So it can kill all of it in one go, and it does so when
its standard input ends, which it does when the test's process ends, however that was. Then it removes the directory,
and the shared memory that a killed server leaves to nobody.

    ask   {"do": "run", "argv": [...], "env": {...}, "log": "...", "polite": 3}  answer  {"pid": 4711}
          {"do": "call", "argv": [...], "env": {...}, "log": "...", "seconds": 60}       {"status": 0}
          {"do": "signal", "number": 1, "all": false}                                    {}
          {"do": "wait", "seconds": 5.0}                                                 {"status": null}
          {"do": "disk", "path": "...", "megabytes": 64}                                 {}
          {"do": "kill"}                                                                 {}

One line of JSON each. A server runs as `user` when the keeper is root: some refuse to be root, and none needs to be.
Only the standard library, so that it starts in no time: `python -I keeper.py DIRECTORY USER`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
_CLONE_NEWNS: Final = 0x00020000
_CLONE_NEWUSER: Final = 0x10000000
_MS_REC: Final = 0x4000
_MS_PRIVATE: Final = 0x40000
_MNT_DETACH: Final = 2
_IPC_RMID: Final = 0
_POLITE_SECONDS: Final = 3.0
_LOOK_SECONDS: Final = 0.005
_REAP_SECONDS: Final = 0.5

_libc = ctypes.CDLL(None, use_errno=True)


class _Keeper:
    def __init__(self, directory: Path, user: str) -> None:
        self._directory = directory
        self._user = user
        self._main = 0
        self._mains: set[int] = set()
        self._status: int | None = None
        self._polite = int(signal.SIGTERM)
        self._disk: Path | None = None

    def answer(self, ask: dict[str, Any]) -> dict[str, Any]:
        match ask["do"]:
            case "run":
                self._polite = ask["polite"]
                self._status = None
                self._main = self._start(ask)
                self._mains.add(self._main)
                return {"pid": self._main}
            case "call":
                return {"status": self._call(ask)}
            case "signal":
                for pid in _descendants() if ask["all"] else [self._main]:
                    _send(pid, ask["number"])
                return {}
            case "wait":
                return {"status": self._wait(ask["seconds"])}
            case "disk":
                self._disk = Path(ask["path"])
                _mount_disk(self._disk, ask["megabytes"], self._user)
                return {}
            case "kill":
                self.kill()
                return {}
            case unknown:
                raise ValueError(f"a keeper does not know how to {unknown}")

    def reap(self) -> bool:
        """Takes leave of every child that has ended, and says whether any are left."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return True
                if pid == self._main:
                    self._status = os.waitstatus_to_exitcode(status)
        return False

    def kill(self) -> None:
        """Kills everything, and returns when it is gone: a child that is killed may leave children to us, and one that
        looks dead may have threads that still hold its port. Only the kernel knows when the last of them has ended."""
        while self.reap():
            for pid in _descendants():
                _send(pid, signal.SIGKILL)
            time.sleep(_LOOK_SECONDS)

    def end(self) -> None:
        """Asks the server to go at once, kills what stays, and removes the directory."""
        if self._main and self._status is None:
            _send(self._main, signal.SIGCONT)
            _send(self._main, self._polite)
            self._wait(_POLITE_SECONDS)
        self.kill()
        _remove_shared_memory(self._mains)
        if self._disk is not None:
            _libc.umount2(os.fsencode(self._disk), _MNT_DETACH)
        shutil.rmtree(self._directory, ignore_errors=True)

    def _start(self, ask: dict[str, Any]) -> int:
        rights: dict[str, Any] = {}
        if os.getuid() == 0:
            rights = {"user": self._user, "group": _group(self._user), "extra_groups": []}
        polite = ask.get("polite", signal.SIGKILL)
        with Path(ask["log"]).open("ab") as log:
            process = subprocess.Popen(
                ask["argv"],
                env=ask["env"],
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the test, which then ends everything in order.
                preexec_fn=lambda: _libc.prctl(_PR_SET_PDEATHSIG, polite),  # noqa: PLW1509 - we have no threads
                **rights,
            )
        process.returncode = 0  # `reap` waits for it, and nobody else.
        return process.pid

    def _call(self, ask: dict[str, Any]) -> int | None:
        before = self._main, self._status
        self._main, self._status = self._start(ask), None
        status = self._wait(ask["seconds"])
        if status is None:
            _send(self._main, signal.SIGKILL)
            self._wait(_POLITE_SECONDS)
        self._main, self._status = before
        self.reap()
        return status

    def _wait(self, seconds: float) -> int | None:
        deadline = time.monotonic() + seconds
        while True:
            self.reap()
            if self._status is not None or time.monotonic() > deadline:
                return self._status
            time.sleep(_LOOK_SECONDS)


def _descendants() -> list[int]:
    """Every process below us, zombies left out."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent = (entry / "stat").read_text().rpartition(") ")[2].split()[:2]
                if state != "Z":
                    parents.setdefault(int(parent), []).append(int(entry.name))
    found: list[int] = []
    looked_at = [os.getpid()]
    while looked_at:
        children = parents.get(looked_at.pop(), [])
        found += children
        looked_at += children
    return found


def _mount_disk(path: Path, megabytes: int, owner: str) -> None:
    """A file system in memory at `path`, which only we and our descendants see, and which goes with the last of us.
    Without root's rights that takes a user namespace, in which we stay who we are."""
    user, group = os.getuid(), os.getgid()
    _done(_libc.unshare(_CLONE_NEWNS if user == 0 else _CLONE_NEWNS | _CLONE_NEWUSER))
    if user == 0:
        user, group = _user(owner), _group(owner)
    else:
        Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1", encoding="ascii")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1", encoding="ascii")
    _done(_libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))
    path.mkdir()
    _done(
        _libc.mount(
            b"tmpfs", os.fsencode(path), b"tmpfs", 0, f"size={megabytes}m,mode=700,uid={user},gid={group}".encode()
        )
    )


def _done(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _remove_shared_memory(creators: set[int]) -> None:
    """Removes what belongs to no process once its creator was killed, and stays until the machine is started again."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]:
            _, identifier, _, _, creator, _, attached, *_ = map(int, line.split())
            if creator in creators and not attached:
                _libc.shmctl(identifier, _IPC_RMID, None)


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _user(user: str) -> int:
    import pwd

    return pwd.getpwnam(user).pw_uid


def _group(user: str) -> int:
    import pwd

    return pwd.getpwnam(user).pw_gid


def main(directory: Path, user: str) -> None:
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keeper = _Keeper(directory, user)
    asked = b""
    try:
        while True:
            readable, _, _ = select.select([0], [], [], _REAP_SECONDS)
            keeper.reap()
            if not readable:
                continue
            received = os.read(0, 65536)
            if not received:
                return
            *lines, asked = (asked + received).split(b"\n")
            for line in lines:
                try:
                    answer = keeper.answer(json.loads(line))
                except (OSError, ValueError) as error:
                    answer = {"error": str(error)}
                os.write(1, json.dumps(answer).encode() + b"\n")
    finally:
        keeper.end()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
