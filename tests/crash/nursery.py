"""Where workers come from: one process that has imported everything and forks a worker whenever it is asked to.

A worker is killed a hundred times. Half a second of imports each time would be most of the run, and says nothing about
recovery; a fork is a process of its own all the same, with its own memory, files and locks, and `kill -9` is what it
is. The nursery opens no store and starts no event loop before it forks.

It speaks lines: asked `birth TAG FAULT`, it answers `born TAG PID`; when a worker is gone, `died TAG STATUS` (as
`subprocess` counts: a signal is negative). A worker writes `ready TAG ...` to the same pipe, and `note TAG ...` when it
has something to tell. When the driver goes, its end of the pipe does; the nursery ends then, and the workers with it:
it kills them, as one that is stopped does nothing by itself, and each watches a pipe that the nursery holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final, NoReturn

from sagaloom.testing.faults import ENV_FAULT

__all__ = ["NO_FAULT", "Nursery", "Worker", "serve_births"]

NO_FAULT: Final = "-"
_START_SECONDS_MAX: Final = 60.0

WorkerMain = Callable[[str, int], int]
"""Runs a worker: its tag, and the pipe that ends when the nursery does. Returns the exit status."""


# ---------------------------------------------------------------------- in the nursery


def serve_births(main: WorkerMain) -> None:
    """Forks workers that run `main`, as asked on standard input, until that ends."""
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    living: dict[int, tuple[str, int]] = {}
    asked = b""
    while True:
        readable, _, _ = select.select([0, woken], [], [])
        if woken in readable:
            os.read(woken, 4096)
            _report_the_dead(living)
        if 0 not in readable:
            continue
        received = os.read(0, 4096)
        if not received:
            for pid in living:
                os.kill(pid, signal.SIGKILL)
            return
        *lines, asked = (asked + received).split(b"\n")
        for line in lines:
            _, tag, fault = line.decode().split(" ")
            life, holds = os.pipe()
            pid = os.fork()
            if pid == 0:
                for descriptor in (woken, wakes, holds, *(held for _, held in living.values())):
                    os.close(descriptor)
                _become_worker(main, tag, fault, life)
            os.close(life)
            living[pid] = (tag, holds)
            _say(f"born {tag} {pid}")


def _become_worker(main: WorkerMain, tag: str, fault: str, life: int) -> NoReturn:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.pop(ENV_FAULT, None)
    if fault != NO_FAULT:
        os.environ[ENV_FAULT] = fault
    status = 1
    try:
        status = main(tag, life)
    except BaseException:  # noqa: BLE001 - nothing of a worker may go on as a second nursery
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(status)


def _report_the_dead(living: dict[int, tuple[str, int]]) -> None:
    while living:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        tag, holds = living.pop(pid)
        os.close(holds)
        _say(f"died {tag} {os.waitstatus_to_exitcode(status)}")


def _say(line: str) -> None:
    # One write below the size that pipes keep whole: lines of several processes do not mix.
    os.write(1, f"{line}\n".encode())


# ---------------------------------------------------------------------- in the driver


class Worker:
    """One worker, as the driver knows it."""

    def __init__(self, tag: str) -> None:
        loop = asyncio.get_running_loop()
        self.tag = tag
        self.born: asyncio.Future[int] = loop.create_future()
        self.ready: asyncio.Future[list[str]] = loop.create_future()
        """What it said when it was ready."""
        self.died: asyncio.Future[int] = loop.create_future()
        self.notes: list[list[str]] = []
        """What it has told since, each as words."""
        self.on_note: Callable[[list[str]], None] = lambda note: None
        self._told = asyncio.Event()

    def tell(self, note: list[str]) -> None:
        self.notes.append(note)
        self.on_note(note)
        self._told.set()

    async def hears(self, *kinds: str, after: int) -> list[str]:
        """The first note of one of these kinds behind the first `after` notes. One task at a time may ask."""
        while True:
            for note in self.notes[after:]:
                if note[0] in kinds:
                    return note
            self._told.clear()
            await self._told.wait()

    async def signal(self, number: signal.Signals) -> None:
        """Sends it a signal, if it lives."""
        pid = await self.born
        if not self.died.done():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    async def kill(self) -> int:
        """`kill -9`, and waits until it is gone. Returns how it ended: it may have been faster."""
        await self.signal(signal.SIGKILL)
        return await self.died


class Nursery:
    """Starts the nursery process of `module` and gives workers."""

    def __init__(self, *command: str, log: Path) -> None:
        self._command = command
        self._log = log
        self._process: asyncio.subprocess.Process | None = None
        self._listening: asyncio.Task[None] | None = None
        self._workers: dict[str, Worker] = {}

    async def start(self) -> None:
        """Returns at once; the first worker is born when the imports are done."""
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", *self._command,
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=log,
                start_new_session=True,  # Ctrl-C is for the driver, which then ends everybody in order.
            )  # fmt: skip
        self._listening = asyncio.create_task(self._listen(self._process))

    async def birth(self, fault: str | None) -> Worker:
        """A new worker, which kills itself at `fault` if there is one."""
        assert self._process is not None
        assert self._process.stdin is not None
        worker = Worker(str(len(self._workers)))
        self._workers[worker.tag] = worker
        self._process.stdin.write(f"birth {worker.tag} {fault or NO_FAULT}\n".encode())
        async with asyncio.timeout(_START_SECONDS_MAX):
            await asyncio.shield(worker.born)
        return worker

    async def end(self) -> None:
        """Ends every worker and the nursery, whatever state they are in."""
        for worker in self._workers.values():
            if worker.born.done() and not worker.died.done():
                await worker.signal(signal.SIGKILL)
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.gather(self._listening, return_exceptions=True)

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while line := await process.stdout.readline():
            what, tag, *rest = line.decode().split()
            worker = self._workers[tag]
            match what:
                case "born":
                    worker.born.set_result(int(rest[0]))
                case "ready":
                    worker.ready.set_result(rest)
                case "note":
                    worker.tell(rest)
                case _:
                    worker.died.set_result(int(rest[0]))
                    if not worker.ready.done():
                        worker.ready.set_result([])
