"""Where handlers run, and how they are ended.

    loop      async handlers, on ours      ended by cancelling them, at their deadline or when somebody asks
    thread    sync handlers, each its own  a thread cannot be stopped: the run goes on without it, and its place is
                                           taken until it ends
    process   what says so, in the pool    killed at its deadline, or a while after it was asked to end

An attempt has until its deadline, and between two signs of life until its `heartbeat_timeout`. One that was asked to
end has `cancel_grace_seconds` more, during which what it returns still counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import threading
import time
from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Any, TypeAlias, cast

from sagaloom.clock import Clock
from sagaloom.errors import SagasError
from sagaloom.ports.jobs import JobRun, Settlement
from sagaloom.workers.context import JobContext, Reports
from sagaloom.workers.handlers import JobDefinition, JobResult
from sagaloom.workers.options import JobOptions
from sagaloom.workers.outcomes import (
    AttemptSilent,
    AttemptTimedOut,
    ProcessDied,
    Raised,
    Returned,
    settlement_of,
    unusable,
)
from sagaloom.workers.pool import ProcessPool, home_of
from sagaloom.workers.pool_wire import Task

__all__ = ["Execution"]

Came: TypeAlias = Returned | Raised | Settlement
"""What an attempt has come to: what its handler did, or what another process has made of that."""


class Execution:
    """Calls handlers. `on_free` is called when something that was left behind has ended."""

    def __init__(self, clock: Clock, options: JobOptions, *, on_free: Callable[[], None]) -> None:
        self._clock = clock
        self._options = options
        self._on_free = on_free
        self._pool = ProcessPool(options.processes)
        self.left_behind = 0
        """How many handlers are still at work on something that is given up."""

    async def close(self) -> None:
        """Ends the processes of the pool."""
        await self._pool.close()

    async def settlement(self, job: JobDefinition[Any], run: JobRun, reports: Reports) -> Settlement:
        """How `run` is to be settled, after an attempt. Raises `CancelledError` only when the caller is cancelled."""
        if job.run_in == "process":
            came = await self._in_process(job, run, reports)
        else:
            now = self._clock.now()
            try:
                context = job.context_of(run, now=now, speaker=reports)
            except SagasError as error:
                # It fitted when it was taken in, so the job is another one now.
                return unusable(run, error, now=now)
            came = await self._in_time(job, reports, self._called(job, context))
        if not isinstance(came, (Returned, Raised)):
            return came
        return settlement_of(
            job,
            run,
            came,
            now=self._clock.now(),
            result_bytes_max=self._options.result_bytes_max,
            is_cancelled=reports.is_cancelled,
        )

    async def _called(self, job: JobDefinition[Any], context: JobContext[Any]) -> Came:
        try:
            answer = job.handler(context) if job.is_async else await self._in_thread(job, context)
            return Returned(await cast("Any", answer) if inspect.isawaitable(answer) else answer)
        except BaseException as error:  # noqa: BLE001 - it is the outcome, whatever it is
            # Caught in the task itself: it would hand SystemExit and KeyboardInterrupt to the loop, and that to all of
            # us. Ctrl-C comes as a signal to whoever runs the loop, and not by this way.
            return Raised(error)

    # -- time -----------------------------------------------------------------------------------------------------

    async def _in_time(self, job: JobDefinition[Any], reports: Reports, work: Coroutine[Any, Any, Came]) -> Came:
        """What `work` comes to, in a task of its own; in the end why it was given up."""
        task = asyncio.create_task(work)
        reports.on_cancel = lambda: self._ask_to_end(job, task)
        began = reports.last_beat = time.monotonic()
        trouble: BaseException | None = None
        try:
            while not task.done() and trouble is None:
                await asyncio.wait([task], timeout=self._patience(job, reports, began))
                trouble = self._trouble(job, reports, began)
        finally:
            reports.on_cancel = None
            if not task.done():
                await self._end(task)
        came = task.result() if task.done() and not task.cancelled() else Raised(asyncio.CancelledError())
        if trouble is None or not (isinstance(came, Raised) and isinstance(came.error, asyncio.CancelledError)):
            return came  # it was done while we decided, or ended by itself
        trouble.__cause__ = came.error  # which shows where it was
        return Raised(trouble)

    def _ask_to_end(self, job: JobDefinition[Any], task: asyncio.Task[Came]) -> None:
        """The run was asked to end: an async handler is cancelled at once, whoever else was told has a while."""
        if job.run_in == "loop":
            task.cancel()
        asyncio.get_running_loop().call_later(self._options.cancel_grace_seconds, task.cancel)

    async def _end(self, task: asyncio.Task[Came]) -> None:
        """Cancels `task`, and gives it a moment to clean up. What does not end then is left behind."""
        task.cancel()
        await asyncio.wait([task], timeout=self._options.cancel_grace_seconds)
        if not task.done():
            self.left_behind += 1
            task.add_done_callback(lambda _: self._came_back())

    def _came_back(self) -> None:
        self.left_behind -= 1
        self._on_free()

    def _patience(self, job: JobDefinition[Any], reports: Reports, began: float) -> float:
        """Seconds until the next moment at which the attempt may have to be given up."""
        moments = [began + job.timeout.total_seconds()]
        if job.heartbeat_timeout is not None:
            moments.append(reports.last_beat + job.heartbeat_timeout.total_seconds())
        return max(min(moments) - time.monotonic(), 0.0)

    def _trouble(self, job: JobDefinition[Any], reports: Reports, began: float) -> BaseException | None:
        now = time.monotonic()
        if now >= began + job.timeout.total_seconds():
            return AttemptTimedOut(
                f"job {job.id!r} did not end within {_text(job.timeout)}: give it more time (timeout=)"
            )
        silence = job.heartbeat_timeout
        if silence is not None and now >= reports.last_beat + silence.total_seconds():
            return AttemptSilent(
                f"job {job.id!r} gave no sign of life for {_text(silence)}: call ctx.heartbeat() or ctx.progress() "
                "more often, or allow it more (heartbeat_timeout=)"
            )
        return None

    # -- threads --------------------------------------------------------------------------------------------------

    async def _in_thread(self, job: JobDefinition[Any], context: JobContext[Any]) -> object:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[JobResult[Any]] = loop.create_future()
        variables = contextvars.copy_context()
        has_left = False

        def finish(outcome: Returned | Raised) -> None:
            if has_left:
                self._came_back()
            elif isinstance(outcome, Raised):
                done.set_exception(outcome.error)
            else:
                done.set_result(cast("JobResult[Any]", outcome.value))

        def work() -> None:
            outcome: Returned | Raised
            try:
                outcome = Returned(variables.run(job.handler, context))
            except BaseException as error:  # noqa: BLE001 - it is the outcome, whatever it is
                # A future refuses StopIteration, and a loop does not survive SystemExit in one.
                outcome = Raised(error if _may_travel(error) else RuntimeError(f"{type(error).__name__}: {error}"))
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(finish, outcome)

        # A daemon: a handler that never returns must not keep the process from ending.
        threading.Thread(target=work, name=f"sagaloom-job-{context.run_id}", daemon=True).start()
        try:
            return await done
        except asyncio.CancelledError:
            if not done.done() or done.cancelled():
                has_left = True
                self.left_behind += 1
            raise

    # -- processes ------------------------------------------------------------------------------------------------

    async def _in_process(self, job: JobDefinition[Any], run: JobRun, reports: Reports) -> Came:
        process = await self._pool.take()
        module, file = home_of(job)
        now, result_bytes_max = self._clock.now(), self._options.result_bytes_max
        task = Task(module=module, file=file, run=run, now=now, result_bytes_max=result_bytes_max)

        async def work() -> Came:
            try:
                return await process.work(task, reports)
            except ProcessDied as error:
                return Raised(ProcessDied(f"attempt {run.attempt} of job {job.id!r}: {error.message}"))
            except asyncio.CancelledError as error:
                return Raised(error)

        came: Came | None = None
        try:
            came = await self._in_time(job, reports, work())
            return came
        finally:
            self._pool.give(process, is_clean=came is not None and not isinstance(came, (Returned, Raised)))


def _may_travel(error: BaseException) -> bool:
    return isinstance(error, Exception) and not isinstance(error, StopIteration)


def _text(length: timedelta) -> str:
    return f"{length.total_seconds():g} s"
