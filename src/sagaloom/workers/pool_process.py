"""One process of the pool: `python -m sagaloom.workers.pool_process FD`.

It imports the module of a job when the first run of it comes, calls the handler on its main thread, and says how the
run is to be settled. A second thread reads: what it hears of a cancellation it passes on, and when the socket ends it
ends the process, whatever the handler is doing.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import queue
import socket
import sys
import threading
import time
from datetime import datetime, timedelta
from typing import Any, Final, cast

from sagaloom.errors import DefinitionError, SagasError
from sagaloom.modules import module_at
from sagaloom.ports.jobs import Settlement
from sagaloom.workers.context import JobContext
from sagaloom.workers.handlers import JobDefinition, is_job
from sagaloom.workers.outcomes import Raised, Returned, settlement_of, unusable
from sagaloom.workers.pool_wire import HEAD, Done, FromProcess, Hello, Said, Task, ToProcess, pack, read_to

_LOST: Final = 70
"""The status with which it ends when its runtime is gone."""


class _Line:
    """Our end of the socket."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._writing = threading.Lock()

    def say(self, frame: FromProcess) -> None:
        with self._writing:
            try:
                self._end.sendall(pack(frame))
            except OSError:
                os._exit(_LOST)

    def hear(self) -> ToProcess:
        (size,) = HEAD.unpack(self._exactly(HEAD.size))
        return read_to(self._exactly(size))

    def _exactly(self, size: int) -> bytes:
        content = bytearray()
        while len(content) < size:
            try:
                more = self._end.recv(size - len(content))
            except OSError:
                more = b""
            if not more:
                os._exit(_LOST)
            content += more
        return bytes(content)


class _Speaker:
    """Passes on what the handler says."""

    def __init__(self, line: _Line) -> None:
        self._line = line
        self.is_cancelled = False

    def progress(self, fraction: float | None, message: str | None) -> None:
        self._line.say(Said(fraction, message, is_progress=True))

    def log(self, level: str, text: str) -> None:
        self._line.say(Said(message=text, level=level))

    def beat(self) -> None:
        self._line.say(Said())


class _Work:
    """The attempt that is under way, if one is."""

    def __init__(self) -> None:
        self.speaker: _Speaker | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self.task: asyncio.Task[Any] | None = None

    def stop(self) -> None:
        if self.speaker is not None:
            self.speaker.is_cancelled = True
        loop, task = self.loop, self.task
        if loop is not None and task is not None:
            loop.call_soon_threadsafe(task.cancel)


def main() -> None:
    line = _Line(socket.socket(fileno=int(sys.argv[1])))
    hello = line.hear()
    assert isinstance(hello, Hello)
    sys.path[:] = hello.path
    line.say(Said())
    tasks: queue.SimpleQueue[Task] = queue.SimpleQueue()
    work = _Work()

    def listen() -> None:
        while True:
            heard = line.hear()
            if isinstance(heard, Task):
                tasks.put(heard)
            else:
                work.stop()

    threading.Thread(target=listen, name="sagaloom-pool-line", daemon=True).start()
    while True:
        task = tasks.get()
        line.say(Done.of(_settlement(task, line, work)))


def _settlement(task: Task, line: _Line, work: _Work) -> Settlement:
    began = time.monotonic()

    def now() -> datetime:
        return task.now + timedelta(seconds=time.monotonic() - began)

    speaker = _Speaker(line)
    outcome: Returned | Raised
    try:
        job = _job_of(task)
        context = job.context_of(task.run, now=task.now, speaker=speaker)
    except SagasError as error:
        return unusable(task.run, error, now=now())
    work.speaker = speaker
    try:
        outcome = _called(job, context, work)
    except BaseException as error:  # noqa: BLE001 - it is the outcome, whatever it is
        outcome = Raised(error)
    finally:
        work.speaker = work.loop = work.task = None
    return settlement_of(
        job,
        task.run,
        outcome,
        now=now(),
        result_bytes_max=task.result_bytes_max,
        is_cancelled=speaker.is_cancelled,
    )


def _job_of(task: Task) -> JobDefinition[Any]:
    module = module_at(task.module, task.file)
    for value in vars(module).values():
        if is_job(value) and value.id == task.run.job_id:
            return value
    raise DefinitionError(
        f"job {task.run.job_id!r} is no global of {task.file or task.module}, where the processes of the pool look for "
        "it: define it at the top of that module, with the same id"
    )


def _called(job: JobDefinition[Any], context: JobContext[Any], work: _Work) -> Returned:
    answer: object = None
    if not job.is_async:
        answer = job.handler(context)
        if not inspect.isawaitable(answer):
            return Returned(answer)

    async def awaited() -> object:
        work.loop, work.task = asyncio.get_running_loop(), asyncio.current_task()
        return await cast("Any", job.handler(context) if job.is_async else answer)

    return Returned(asyncio.run(awaited()))


if __name__ == "__main__":
    main()
