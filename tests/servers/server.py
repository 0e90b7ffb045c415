"""Servers of a test's own: started from the installed binaries, on free ports, in a directory that goes away.

A server is used like this, and every one of them in the same way:

    with Postgres() as server:      # or: server = Postgres().start() ... server.close()
        server.url                  # how clients reach it; stays the same until it is closed
        server.restart()            # stopped in order, and started again on the same data
        server.kill(); server.start()       # kill -9 for all of its processes
        server.freeze(); server.thaw()      # alive, and does not answer

    server = Postgres().add_disk(64)        # before it is started: a small disk of its own, at server.disk
    server.fill_disk(); server.free_disk()

`start` returns when the server itself has answered, and raises with the end of its log when it does not in time. All
of it blocks; a coroutine calls it by `asyncio.to_thread`. Constructing one raises `Missing`, which says in one line
what is not installed. Nothing needs root's rights; a root gives his up (`keeper.py`, which also says who cleans up).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Final, Self

__all__ = ["HOST", "Missing", "Server", "binary", "free_port", "talk"]

HOST: Final = "127.0.0.1"
_UNPRIVILEGED: Final = "nobody"
_ATTEMPTS: Final = 5
_START_SECONDS_MAX: Final = 60.0
_STOP_SECONDS_MAX: Final = 20.0
_ASK_SECONDS_MAX: Final = 2.0
_CALL_SECONDS_MAX: Final = 120.0
_LOG_SHOWN_BYTES: Final = 2_000
_PORTS: Final = (20_000, 32_000)
"""Below the range that the kernel takes for clients: one of those, trying to reach a server that is down, could get
its own port, talk to itself, and keep the server from coming back."""


class Missing(Exception):
    """There is no such server on this machine; says why in one line."""


def binary(*names: str, of: str, among: Sequence[str] = ()) -> Path:
    """The first program of one of these names: in a folder that matches `among`, newest version first, else on PATH."""
    folders = [folder for pattern in among for folder in sorted(Path("/").glob(pattern), key=_version, reverse=True)]
    folders += [Path(entry) for entry in os.environ.get("PATH", os.defpath).split(os.pathsep) if entry]
    folders += [Path("/usr/local/sbin"), Path("/usr/sbin")]
    for folder in folders:
        for name in names:
            if os.access(folder / name, os.X_OK):
                return folder / name
    raise Missing(f"{of} is not installed: no program named {' or '.join(names)} was found")


def _version(folder: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", str(folder))]


def talk(port: int, *, says: bytes = b"", until: bytes = b"", size: int = 1) -> bytes:
    """What the server at `port` answers to `says`, at least `size` bytes, and up to `until` if that comes. Empty when
    nobody is there, or it takes too long."""
    heard = b""
    with contextlib.suppress(OSError), socket.create_connection((HOST, port), _ASK_SECONDS_MAX) as connection:
        connection.settimeout(_ASK_SECONDS_MAX)
        connection.sendall(says)
        while (len(heard) < size or until not in heard) and (received := connection.recv(4096)):
            heard += received
    return heard


class Server(ABC):
    """One server, with everything it needs. What it is, a subclass says."""

    name: ClassVar[str]
    polite: ClassVar[signal.Signals] = signal.SIGTERM
    """Has it stop in order."""
    abrupt: ClassVar[signal.Signals] = signal.SIGTERM
    """Has it stop at once, and yet leave nothing behind on the machine."""

    def __init__(self) -> None:
        if sys.platform != "linux":
            raise Missing(f"a {self.name} server of our own needs Linux, this is {sys.platform}")
        self.directory = Path(tempfile.mkdtemp(prefix=f"sagaloom-{self.name}-"))
        if os.getuid() == 0:
            shutil.chown(self.directory, _UNPRIVILEGED)
        self.log = self.directory / "server.log"
        self.port = 0
        self._choose_ports()
        self.is_running = False
        self._is_prepared = False
        self.disk = self.directory / "disk"
        """A small file system, after `add_disk`. Only the server sees it."""
        self._asking = threading.Lock()
        self._keeper = subprocess.Popen(
            [sys.executable, "-I", str(Path(__file__).with_name("keeper.py")), str(self.directory), _UNPRIVILEGED],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )

    # ------------------------------------------------------------------ what a subclass says

    @property
    @abstractmethod
    def url(self) -> str:
        """How clients reach it."""

    def _choose_ports(self) -> None:
        """Takes ports that are free now; asked again when somebody else was faster."""
        self.port = free_port()

    def _prepare(self) -> None:  # noqa: B027 - most need nothing
        """Makes its data directory. May be asked again, on another port, when somebody took the port."""

    @abstractmethod
    def _command(self) -> Sequence[str | Path]:
        """What runs in the foreground until it is stopped."""

    def _environment(self) -> Mapping[str, str]:
        return {}

    @abstractmethod
    def _answers(self) -> bool:
        """Whether it does what it is there for. Asks the server itself."""

    # ------------------------------------------------------------------ what a test does

    def start(self) -> Self:
        """Starts it, the first time and after `stop` or `kill`; returns when it answers."""
        for attempt in range(_ATTEMPTS):
            if not self._is_prepared:
                self._prepare()
            self._ask(
                do="run",
                argv=[str(word) for word in self._command()],
                env=self._all_environment(),
                log=str(self.log),
                polite=int(self.abrupt),
            )
            if self._comes_up():
                self._is_prepared = self.is_running = True
                return self
            if self._is_prepared or attempt == _ATTEMPTS - 1 or "in use" not in self.tail().lower():
                break
            self._choose_ports()
        raise RuntimeError(f"{self.name} did not come up on port {self.port}; the end of its log:\n{self.tail()}")

    def stop(self) -> None:
        """Stops it in order, and kills it when that takes too long."""
        self._ask(do="signal", number=int(signal.SIGCONT), all=True)
        self._ask(do="signal", number=int(self.polite), all=False)
        self._ask(do="wait", seconds=_STOP_SECONDS_MAX)
        self._ask(do="kill")
        self.is_running = False

    def kill(self) -> None:
        """`kill -9` for everything it consists of; returns when it is gone."""
        self._ask(do="kill")
        self.is_running = False

    def restart(self) -> None:
        self.stop()
        self.start()

    def freeze(self) -> None:
        """SIGSTOP for everything it consists of: its connections stay, and nobody answers."""
        self._ask(do="signal", number=int(signal.SIGSTOP), all=True)

    def thaw(self) -> None:
        self._ask(do="signal", number=int(signal.SIGCONT), all=True)

    def add_disk(self, megabytes: int) -> Self:
        """Gives it a small file system of its own; raises `Missing` where the machine lets us mount none."""
        try:
            self._ask(do="disk", path=str(self.disk), megabytes=megabytes)
        except RuntimeError as error:
            self.close()
            raise Missing(f"a small disk cannot be mounted here: {error}") from None
        return self

    def fill_disk(self) -> None:
        """Leaves no space on it."""
        self._call("sh", "-c", f"cat /dev/zero > {self.disk}/filling 2> /dev/null; true")

    def free_disk(self) -> None:
        self._call("rm", self.disk / "filling")

    def close(self) -> None:
        """Ends it and removes all that it has written. Doing it twice is harmless."""
        if self._keeper.stdin is not None and not self._keeper.stdin.closed:
            self._keeper.stdin.close()
            assert self._keeper.stdout is not None
            self._keeper.stdout.close()
        self._keeper.wait(_STOP_SECONDS_MAX)
        self.is_running = False

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def tail(self) -> str:
        """The end of its log."""
        with contextlib.suppress(OSError):
            return self.log.read_bytes()[-_LOG_SHOWN_BYTES:].decode(errors="replace")
        return ""

    # ------------------------------------------------------------------ what subclasses use

    def _call(self, *argv: str | Path) -> None:
        """Runs a program beside it, as the user that it runs as; raises when that fails."""
        answer = self._ask(
            do="call",
            argv=[str(word) for word in argv],
            env=self._all_environment(),
            log=str(self.log),
            seconds=_CALL_SECONDS_MAX,
        )
        if answer["status"] != 0:
            raise RuntimeError(f"{argv[0]} ended with {answer['status']}; the end of its log:\n{self.tail()}")

    def _signal(self, number: signal.Signals) -> None:
        self._ask(do="signal", number=int(number), all=False)

    def _write(self, name: str, text: str) -> Path:
        """A file in its directory, that it may read."""
        path = self.directory / name
        path.write_text(text, encoding="utf-8")
        if os.getuid() == 0:
            shutil.chown(path, _UNPRIVILEGED)
        return path

    # ------------------------------------------------------------------ how

    def _comes_up(self) -> bool:
        deadline = time.monotonic() + _START_SECONDS_MAX
        while time.monotonic() < deadline:
            if self._answers():
                # Somebody else may answer there, and ours has gone because of that.
                return self._ask(do="wait", seconds=0.0)["status"] is None
            if self._ask(do="wait", seconds=0.02)["status"] is not None:
                return False
        return False

    def _all_environment(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL", "TZ") if name in os.environ}
        return {**kept, "HOME": str(self.directory), "TMPDIR": str(self.directory), **self._environment()}

    def _ask(self, **ask: Any) -> dict[str, Any]:
        assert self._keeper.stdin is not None
        assert self._keeper.stdout is not None
        with self._asking:
            self._keeper.stdin.write(json.dumps(ask).encode() + b"\n")
            self._keeper.stdin.flush()
            line = self._keeper.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "its keeper is gone"}
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}")
        return answer


def free_port() -> int:
    """A port that nobody listens on right now."""
    while True:
        port = random.SystemRandom().randrange(*_PORTS)
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind((HOST, port))
            return port
