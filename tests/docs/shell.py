"""One shell for the console blocks of a page: commands go in, what they print comes out, all within a time."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tests.patience import PATIENCE_SECONDS
from tests.servers.server import free_port

PORTS: Final = ("8091", "8092", "8093", "9000")
"""The ports that pages speak of."""

_DONE: Final = re.compile(r"@@done (\d+)@@$")
_KILLED: Final = re.compile(r"\S*bash: line \d+: +\d+ Killed ")


class Shell:
    """A bash in a directory of its own. Whatever is started in it ends with it."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self._directory = directory
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        self._process = subprocess.Popen(
            ["bash", "--norc", "--noprofile"],
            cwd=directory,
            env={"PATH": path, "HOME": str(directory), "LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1", **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def run(self, command: str, *, until: Callable[[list[str]], bool]) -> tuple[int, list[str], bool]:
        """Types `command`; returns its exit code and what came until it had ended and `until` was true of that. The
        last of the three says whether it became true in time: a process in the background may print later."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\nprintf '\\n@@done %s@@\\n' $?\n")
        self._process.stdin.flush()
        end = time.monotonic() + PATIENCE_SECONDS
        printed: list[str] = []
        code: int | None = None
        while code is None or not until(printed):
            try:
                line = self._lines.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                return code if code is not None else -1, printed, False
            done = _DONE.search(line)
            if done is not None:
                code = int(done[1])
            elif not _KILLED.match(line):
                printed.append(line)
        return code, printed, True

    def logged(self) -> list[str]:
        """The last lines of every log that pages have had written."""
        return [line for log in sorted(self._directory.glob("*.log")) for line in log.read_text().splitlines()[-20:]]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Its own session is its own process group, and so is everything that it started.
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(timeout=5)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.rstrip("\n"))


def free_ports() -> dict[str, str]:
    """A free port for each of those that pages speak of, which no client is given while a server is started again."""
    found: set[int] = set()
    while len(found) < len(PORTS):
        found.add(free_port())
    return dict(zip(PORTS, map(str, found), strict=True))
