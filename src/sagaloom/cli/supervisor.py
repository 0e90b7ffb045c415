"""Several processes under one command: each serves one port, and is started again when it dies.

    supervisor ──spawn──▶ sagas :8092
         │                   ▲ │ publish, trigger
         └──────spawn──▶ jobs  :8091

The rules:

- A child says on stdout, as a line of JSON, that it answers. One that exits before it ever did so ends everything: it
  has said why on stderr, and would say it again for ever. One that has answered, or was killed, is started again
  whenever it ends, almost at once after a long life, and a little later each time after a short one.
- SIGTERM and Ctrl-C are passed on, and the children end in good order; what does not within seconds is killed, and so
  is everything at a second signal. Children are in process groups of their own, so that Ctrl-C reaches them once.
- Each child reads a pipe that the supervisor never writes to. When the supervisor dies, however it does, the kernel
  closes the pipe, and the child stops as if told to.

What we dislike about it: it is for one terminal. Where systemd, Kubernetes or the like keep processes running, they do
it better, with `sagaloom serve` and `sagaloom jobs serve`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import msgspec

__all__ = ["SUPERVISED", "Child", "ChildFailed", "on_supervisors_end", "supervise"]

_log = logging.getLogger("sagaloom.supervisor")

SUPERVISED: Final = "SAGALOOMSUPERVISED"
"""Set for a child that reads a pipe, and is to stop at its end."""
_BACKOFF_SECONDS: Final = 0.2
_BACKOFF_SECONDS_MAX: Final = 5.0
_LONG_LIFE_SECONDS: Final = 10.0
_STOP_SECONDS: Final = 2.9
_LINE_BYTES_MAX: Final = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Child:
    """A process to keep: what logs call it, its command line, and what its environment has beside ours."""

    name: str
    command: Sequence[str]
    env: Mapping[str, str]


class ChildFailed(Exception):
    """A child exited before it ever answered. `status` is what it exited with."""

    def __init__(self, name: str, status: int) -> None:
        super().__init__(f"{name} ended with status {status} before it answered")
        self.status = status


Said: TypeAlias = Mapping[str, Mapping[str, Any]]
"""What each child said when it answered, by name."""


def supervise(children: Sequence[Child], *, announce: Callable[[Said], None]) -> int:
    """Keeps `children` running until SIGTERM or SIGINT, and returns the exit status for that. `announce` is called once
    all of them answer. Raises `ChildFailed`."""
    return asyncio.run(_supervise(children, announce))


def on_supervisors_end(stop: Callable[[], object]) -> None:
    """In a child: calls `stop`, from a thread, when the supervisor is gone. Does nothing in any other process."""
    if os.environ.pop(SUPERVISED, "") != "1":
        return

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        with contextlib.suppress(RuntimeError):  # the loop is closed: we are on our way out
            stop()

    threading.Thread(target=watch, name="sagaloom-supervisor-watch", daemon=True).start()


class _Keeper:
    """Keeps one child running."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self.answered: asyncio.Future[Mapping[str, Any]] = asyncio.get_running_loop().create_future()
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()

    async def keep(self) -> None:
        """Returns when it was told to stop and the child is gone."""
        backoff_seconds = _BACKOFF_SECONDS
        while not self._stopping.is_set():
            began = time.monotonic()
            status = await self._live()
            if self._stopping.is_set():
                return
            if not self.answered.done() and status >= 0:
                raise ChildFailed(self.child.name, status)
            if time.monotonic() - began >= _LONG_LIFE_SECONDS:
                backoff_seconds = _BACKOFF_SECONDS
            _log.warning("%s %s: starting it again in %g s", self.child.name, _ended(status), backoff_seconds)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), backoff_seconds)
            backoff_seconds = min(backoff_seconds * 2, _BACKOFF_SECONDS_MAX)

    def stop(self) -> None:
        """Has the child end, and starts it no more. Once is enough: a second signal would end it at once."""
        if not self._stopping.is_set():
            self._stopping.set()
            self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends the child now."""
        self._stopping.set()
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def _live(self) -> int:
        """One life of the child. Returns how it ended, as `subprocess` counts."""
        process = self._process = await asyncio.create_subprocess_exec(
            *self.child.command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, **self.child.env, SUPERVISED: "1"},
            limit=_LINE_BYTES_MAX,
            process_group=None if sys.platform == "win32" else 0,
        )
        if self._stopping.is_set():
            self._signal(signal.SIGTERM)  # it was being born when we were told to stop
        _log.info("%s is process %d", self.child.name, process.pid)
        assert process.stdout is not None
        try:
            while line := await process.stdout.readline():
                self._hear(line)
            return await process.wait()
        except asyncio.CancelledError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise

    def _hear(self, line: bytes) -> None:
        if not self.answered.done():
            with contextlib.suppress(msgspec.DecodeError):
                self.answered.set_result(msgspec.json.decode(line, type=dict[str, Any]))
                return
        sys.stdout.write(line.decode(errors="replace"))
        sys.stdout.flush()


async def _supervise(children: Sequence[Child], announce: Callable[[Said], None]) -> int:
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    keepers = [_Keeper(child) for child in children]
    status = 0

    def on_signal(number: signal.Signals) -> None:
        nonlocal status
        if stopping.is_set():
            status = 128 + number
            for keeper in keepers:
                keeper.kill()
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    on_supervisors_end(lambda: loop.call_soon_threadsafe(on_signal, signal.SIGTERM))  # we may be a child ourselves
    try:
        kept = [asyncio.create_task(keeper.keep()) for keeper in keepers]
        telling = asyncio.create_task(_tell(keepers, announce))
        told = asyncio.create_task(stopping.wait())
        try:
            await asyncio.wait([told, *kept], return_when=asyncio.FIRST_COMPLETED)
            for keeper in keepers:
                keeper.stop()
            await asyncio.wait(kept, timeout=_STOP_SECONDS)
        finally:
            telling.cancel()
            told.cancel()
            for task in kept:
                task.cancel()
            ends = await asyncio.gather(*kept, return_exceptions=True)
        for end in ends:
            if isinstance(end, BaseException) and not isinstance(end, asyncio.CancelledError):
                raise end
        return status
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


async def _tell(keepers: Sequence[_Keeper], announce: Callable[[Said], None]) -> None:
    answers = await asyncio.gather(*(asyncio.shield(keeper.answered) for keeper in keepers))
    announce({keeper.child.name: answer for keeper, answer in zip(keepers, answers, strict=True)})


def _ended(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"
