"""`sagaloom dev` starts what it serves again whenever a file of the project changes.

    watcher ──starts──▶ sagaloom dev --no-reload      looks at the files a few times a second
       ▲                        │
       └── a file has changed: SIGTERM, wait, start again

The rules:

- A server that ends before any file has changed ends the watcher, with its status: it has said why. One that ends after
  a change (a mistake that was just typed) leaves the watcher waiting for the next change.
- Nothing is lost by starting again: it is what a deployment does. What is under way is given its time to end.
- SIGTERM and Ctrl-C are passed on, as often as they come. When the watcher is killed, the server notices the end of the
  pipe that it reads, and stops.

What we dislike about it: it looks at times and sizes, since the standard library has no word for being told. So it
looks at code and settings of the project alone, and at no more than a few thousand files.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from types import FrameType
from typing import Final, TypeAlias

from sagaloom.cli.supervisor import SUPERVISED

__all__ = ["changed_files", "files_to_watch", "serve_reloading", "snapshot"]

_LOOK_SECONDS: Final = 0.25
_KILL_SECONDS: Final = 5.0
_FILES_MAX: Final = 5_000
_LEFT_OUT: Final = frozenset(("__pycache__", "node_modules", "site-packages", "build", "dist"))

Snapshot: TypeAlias = dict[Path, tuple[int, int]]
"""Of each file when it was written, in nanoseconds, and how long it is."""


def files_to_watch(folder: Path) -> Iterator[Path]:
    """The files of a project that may change what it serves, up to a few thousand; hidden folders and virtual
    environments are left out."""
    count = 0
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(
            one
            for one in folders
            if one[0] != "." and one not in _LEFT_OUT and not (Path(where) / one / "pyvenv.cfg").exists()
        )
        for name in sorted(names):
            if name.endswith(".py") or name == "pyproject.toml" or fnmatch(name, "appsettings*.json"):
                yield Path(where) / name
                count += 1
                if count == _FILES_MAX:
                    return


def snapshot(folder: Path) -> Snapshot:
    """What the files look like now."""
    found: Snapshot = {}
    for file in files_to_watch(folder):
        try:
            status = file.stat()
        except OSError:  # gone since it was listed
            continue
        found[file] = (status.st_mtime_ns, status.st_size)
    return found


def changed_files(before: Snapshot, after: Snapshot) -> list[Path]:
    """The files that were written, made or removed in between."""
    return sorted(file for file in before.keys() | after.keys() if before.get(file) != after.get(file))


def serve_reloading(arguments: Sequence[str], *, folder: Path) -> int:
    """Serves `sagaloom dev` with `arguments`, again after each change below `folder`. Returns the exit status."""
    return _Watcher(arguments, folder).run()


class _Watcher:
    def __init__(self, arguments: Sequence[str], folder: Path) -> None:
        self._command = [sys.executable, "-m", "sagaloom", "dev", *arguments, "--no-reload"]
        self._folder = folder
        self._server: subprocess.Popen[bytes] | None = None
        self._is_stopping = False
        self._has_changed = False

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        seen = snapshot(self._folder)
        self._start()
        while True:
            time.sleep(_LOOK_SECONDS)
            status = self._status()
            if status is not None and (self._is_stopping or not self._has_changed):
                return max(status, 0)
            if self._is_stopping:
                continue
            now = snapshot(self._folder)
            if changed := changed_files(seen, now):
                seen, self._has_changed = now, True
                more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
                _say(f"{changed[0].relative_to(self._folder)}{more} changed: starting again")
                self._end()
                if self._is_stopping:
                    return 0
                self._start()
            elif status is not None and self._server is not None:
                _say(f"the server ended with status {status}: it is started again after the next change")
                self._server = None

    def _start(self) -> None:
        self._server = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            env={**os.environ, SUPERVISED: "1"},
            # Ctrl-C is ours to pass on: once.
            process_group=None if sys.platform == "win32" else 0,
        )

    def _status(self) -> int | None:
        return None if self._server is None else self._server.poll()

    def _end(self) -> None:
        server, self._server = self._server, None
        if server is None:
            return
        server.terminate()
        try:
            server.wait(_KILL_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        if server.stdin is not None:
            server.stdin.close()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._is_stopping = True
        if self._server is None:
            sys.exit(0)
        self._server.send_signal(number)


def _say(what: str) -> None:
    print(f"dev: {what}", file=sys.stderr, flush=True)
