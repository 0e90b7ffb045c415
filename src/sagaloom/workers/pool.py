"""Processes that run jobs: for what needs a processor of its own, hangs, or ends its process.

    (none) ──first run──▶ busy ──done──▶ idle ──next run──▶ busy
                            ├──it ended by itself──▶ (none)     the attempt has failed, and nothing else
                            └──it had to be ended──▶ (none)     killed: time was up, or nobody wants the answer

Each process works on one run at a time. They are made when they are needed, up to `size`, and kept; a further run waits
for the first that is free, and its time does not begin before. `pool_wire` has what is said.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections import deque
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, Final

from sagaloom.errors import ConfigurationError
from sagaloom.ports.jobs import Settlement
from sagaloom.workers.context import Reports
from sagaloom.workers.handlers import JobDefinition
from sagaloom.workers.outcomes import ProcessDied
from sagaloom.workers.pool_wire import HEAD, Done, FromProcess, Hello, Said, Stop, Task, ToProcess, pack, read_from

__all__ = ["PoolProcess", "ProcessPool", "home_of"]

_MODULE: Final = "sagaloom.workers.pool_process"


def home_of(job: JobDefinition[Any]) -> tuple[str, str | None]:
    """The module in which another process finds a job; and its file, where it is not found by its name."""
    name: str = getattr(job.handler, "__module__", None) or ""
    module = sys.modules.get(name)
    spec = getattr(module, "__spec__", None)
    file: str | None = getattr(module, "__file__", None)
    if name == "__main__" and spec is not None:
        return str(spec.name), None
    top = PathFinder.find_spec(name.partition(".")[0]) if name != "__main__" else None
    if file is None or (top is not None and ("." in name or top.origin == getattr(spec, "origin", None))):
        return name, None
    return name, str(Path(file).resolve())


class PoolProcess:
    """One process, and our end of the line to it."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer

    @classmethod
    async def start(cls) -> PoolProcess:
        if sys.platform == "win32":
            raise ConfigurationError("jobs cannot run in processes on Windows: leave run_in='process' out there")
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", _MODULE, str(theirs.fileno())),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for us: we decide what becomes of its run
            )
        try:
            reader, writer = await asyncio.open_connection(sock=ours)
            started = cls(process, reader, writer)
            started.say(Hello(list(sys.path)))
            await started.hear()  # it has started: the time of its first run begins with that
        except BaseException:
            ours.close()
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise
        return started

    @property
    def is_alive(self) -> bool:
        return self._process.returncode is None

    def say(self, frame: ToProcess) -> None:
        self._writer.write(pack(frame))

    async def hear(self) -> FromProcess:
        """The next thing that it says. Raises `ProcessDied` when it has ended."""
        try:
            (size,) = HEAD.unpack(await self._reader.readexactly(HEAD.size))
            return read_from(await self._reader.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError):
            raise ProcessDied(f"its process {await self._ending()} in the middle of it") from None

    async def _ending(self) -> str:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                status = await self._process.wait()
                if status >= 0:
                    return f"ended with status {status}"
                with contextlib.suppress(ValueError):
                    return f"was ended by {signal.Signals(-status).name}"
                return f"was ended by signal {-status}"
        return "has closed its line"

    async def work(self, task: Task, reports: Reports) -> Settlement:
        """Does `task`, and returns how the run is to be settled. Raises `ProcessDied`."""
        ask_to_end = reports.on_cancel

        def stop() -> None:
            self.say(Stop())
            if ask_to_end is not None:
                ask_to_end()

        reports.on_cancel = stop
        self.say(task)
        while True:
            heard = await self.hear()
            if isinstance(heard, Done):
                return heard.settlement
            _pass_on(heard, reports)

    def kill(self) -> None:
        """Ends it at once, whatever it is doing."""
        self._writer.close()
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def ended(self) -> None:
        await self._process.wait()


class ProcessPool:
    """At most `size` processes."""

    def __init__(self, size: int) -> None:
        self._free = asyncio.Semaphore(size)
        self._idle: deque[PoolProcess] = deque()
        self._all: set[PoolProcess] = set()

    async def take(self) -> PoolProcess:
        """A process that is free; give it back with `give`."""
        await self._free.acquire()
        try:
            while self._idle:
                process = self._idle.pop()
                if process.is_alive:
                    return process
            process = await PoolProcess.start()
        except BaseException:
            self._free.release()
            raise
        self._all = {process, *(other for other in self._all if other.is_alive)}
        return process

    def give(self, process: PoolProcess, *, is_clean: bool) -> None:
        """Takes a process back: for the next run, unless it may still be at work on the last one."""
        if is_clean:
            self._idle.append(process)
        else:
            process.kill()
        self._free.release()

    async def close(self) -> None:
        """Ends all processes."""
        processes, self._all = self._all, set()
        self._idle.clear()
        for process in processes:
            process.kill()
        for process in processes:
            await process.ended()


def _pass_on(said: Said, reports: Reports) -> None:
    if said.is_progress:
        reports.progress(said.fraction, said.message)
    elif said.level is not None:
        reports.log(said.level, said.message or "")
    else:
        reports.beat()
