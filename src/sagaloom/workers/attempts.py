"""The attempts that are under way: each is a task that calls the handler, and settles the run when it is over.

- An async handler runs on the loop, a sync one in a thread of its own; both until their deadline. A thread cannot be
  stopped: when its time is up the run goes on without it, and its place is taken until it ends.
- A settlement that the store does not take (because it does not answer) is offered again until it does, or until the
  claim is somebody else's.
- An attempt that is cut short by the end of the process is given back and does not count. One whose claim was lost is
  dropped: whoever has the claim now does the same work.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from sagaloom.clock import Clock
from sagaloom.engine.retrying import USER_ERRORS
from sagaloom.errors import Fenced, SagasError
from sagaloom.ids import new_traceparent
from sagaloom.ports.jobs import Failed, JobClaim, JobRun, JobRunStore, Released, Retried, Settlement
from sagaloom.telemetry.trace_context import CARRIED, Trace
from sagaloom.workers.handlers import JobContext, JobDefinition, JobResult, JobSet
from sagaloom.workers.options import JobOptions
from sagaloom.workers.outcomes import AttemptTimedOut, Raised, Returned, is_worn_out, settlement_of, worn_out

if TYPE_CHECKING:
    from sagaloom.telemetry.jobs import JobTelemetry

__all__ = ["Attempts"]

_log = logging.getLogger("sagaloom.jobs")
_AGAIN_SECONDS_MAX: Final = 2.0


@dataclass(eq=False, slots=True)
class _Attempt:
    run: JobRun
    task: asyncio.Task[None] | None = None
    cut: Literal["released", "lost"] | None = None
    """Why it was ended from outside."""


class Attempts:
    """Begins, ends and counts attempts. `on_free` is called when a place is free again."""

    def __init__(
        self, store: JobRunStore, jobs: JobSet, clock: Clock, options: JobOptions, *, on_free: Callable[[], None]
    ) -> None:
        self._store = store
        self._jobs = jobs
        self._clock = clock
        self._options = options
        self._on_free = on_free
        self._under_way: dict[JobClaim, _Attempt] = {}
        self._left_threads = 0
        self._is_empty = asyncio.Event()
        self._is_empty.set()
        self.telemetry: JobTelemetry | None = None
        """Who is told of attempts, if anybody listens."""

    @property
    def places_taken(self) -> int:
        return len(self._under_way) + self._left_threads

    @property
    def claims(self) -> list[JobClaim]:
        """The claims that are held."""
        return list(self._under_way)

    def begin(self, run: JobRun) -> None:
        """Works on a claimed run."""
        attempt = _Attempt(run)
        self._under_way[run.claim] = attempt
        self._is_empty.clear()
        attempt.task = asyncio.create_task(self._work(attempt), name=f"sagaloom-job-{run.run_id}")
        attempt.task.add_done_callback(lambda task: self._ended(run, task))

    def lose(self, claim: JobClaim) -> None:
        """Drops an attempt whose claim is over."""
        self._cut(claim, "lost")

    async def drain(self, seconds: float) -> None:
        """Waits until nothing is under way, for a while; what is not done then is given back."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._is_empty.wait()
        for claim in self.claims:
            self._cut(claim, "released")
        await self._is_empty.wait()

    def _cut(self, claim: JobClaim, why: Literal["released", "lost"]) -> None:
        attempt = self._under_way.get(claim)
        if attempt is not None and attempt.task is not None and attempt.cut is None:
            attempt.cut = why
            attempt.task.cancel()

    async def _work(self, attempt: _Attempt) -> None:
        run = attempt.run
        if run.traceparent is not None:
            CARRIED.set(Trace(run.traceparent, run.tracestate))  # for as long as this task lives
        try:
            settlement = await self._worked(run)
            await self._settle(run, settlement)
        except asyncio.CancelledError:
            if attempt.cut == "released":
                await self._give_back(run)
            elif attempt.cut == "lost":
                _log.warning("job %s: run %s has another worker now; this attempt ends", run.job_id, run.run_id)
            else:
                raise

    def _ended(self, run: JobRun, task: asyncio.Task[None]) -> None:
        # Called for a task that was cancelled before it began as well, unlike anything inside of it.
        del self._under_way[run.claim]
        if not self._under_way:
            self._is_empty.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("job %s: run %s met what nobody expected", run.job_id, run.run_id, exc_info=error)
        self._on_free()

    async def _worked(self, run: JobRun) -> Settlement:
        """How `run` is to be settled, after an attempt."""
        if self.telemetry is None:
            return await self._settlement(run)
        with self.telemetry.attempt(run) as attempting:
            settlement = await self._settlement(attempting.run)
            attempting.came_to(settlement)
            return settlement

    async def _settlement(self, run: JobRun) -> Settlement:
        job = self._jobs[run.job_id]
        now = self._clock.now()
        if is_worn_out(job, run):
            return worn_out(job, run, now=now)
        outcome: Returned | Raised
        try:
            payload = job.codec.decode(run.payload)
        except SagasError as error:
            # It fitted when it was taken in, so the job is another one now.
            outcome = Raised(error)
        else:
            context = JobContext(
                job_id=run.job_id,
                run_id=run.run_id,
                attempt=run.attempt,
                payload=payload,
                now=now,
                deadline_at=now + job.timeout,
                idempotency_key=f"{run.job_id}:{run.run_id}",
                traceparent=run.traceparent or new_traceparent(),
                tracestate=run.tracestate,
                correlation_id=run.correlation_id,
            )
            outcome = await self._call(job, context)
        return settlement_of(job, run, outcome, now=self._clock.now(), result_bytes_max=self._options.result_bytes_max)

    async def _call(self, job: JobDefinition[Any], context: JobContext[Any]) -> Returned | Raised:
        seconds = job.timeout.total_seconds()
        deadline = asyncio.timeout(seconds)
        task = asyncio.current_task()
        assert task is not None
        cancelled_before = task.cancelling()
        try:
            async with deadline:
                answer = job.handler(context) if job.is_async else await self._in_thread(job, context)
                if inspect.isawaitable(answer):
                    answer = await cast("Any", answer)
            return Returned(answer)
        except asyncio.CancelledError as error:
            if task.cancelling() > cancelled_before:
                raise
            return Raised(error)  # The handler's own doing: a task of its own that it cancelled and awaited.
        except USER_ERRORS as error:
            if isinstance(error, TimeoutError) and deadline.expired():
                late = AttemptTimedOut(f"job {job.id!r} did not end within {seconds:g} s: give it more time (timeout=)")
                late.__cause__ = error
                return Raised(late)
            return Raised(error)

    async def _in_thread(self, job: JobDefinition[Any], context: JobContext[Any]) -> object:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[JobResult[Any]] = loop.create_future()
        variables = contextvars.copy_context()
        has_left = False

        def finish(outcome: Returned | Raised) -> None:
            if has_left:
                self._left_threads -= 1
                self._on_free()
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
                self._left_threads += 1
            raise

    async def _settle(self, run: JobRun, settlement: Settlement) -> None:
        wait_seconds = 0.1
        while True:
            try:
                settled = await self._store.settle(run.claim, settlement)
            except Fenced as error:
                _log.warning("job %s: the result of run %s came too late: %s", run.job_id, run.run_id, error.message)
                return
            except SagasError as error:
                if not error.retryable:
                    _log.exception("job %s: run %s cannot be settled", run.job_id, run.run_id)
                    return
                _log.warning("job %s: run %s is not settled yet: %s", run.job_id, run.run_id, error.message)
                await asyncio.sleep(wait_seconds)
                wait_seconds = min(wait_seconds * 2, _AGAIN_SECONDS_MAX)
            else:
                _say(settled, settlement)
                return

    async def _give_back(self, run: JobRun) -> None:
        try:
            await self._store.settle(run.claim, Released())
        except SagasError as error:
            # Its lease ends by itself.
            _log.warning("job %s: run %s was not given back: %s", run.job_id, run.run_id, error.message)
        else:
            _log.info("job %s: run %s was not done in time, and goes on elsewhere", run.job_id, run.run_id)


def _may_travel(error: BaseException) -> bool:
    return isinstance(error, Exception) and not isinstance(error, StopIteration)


def _say(run: JobRun, settlement: Settlement) -> None:
    match settlement:
        case Failed(failure):
            _log.error("job %s: run %s failed: %s", run.job_id, run.run_id, failure.message)
        case Retried(failure, due_at):
            _log.warning(
                "job %s: attempt %d of run %s failed, the next one is at %s: %s",
                *(run.job_id, run.attempt, run.run_id, due_at.isoformat(timespec="milliseconds"), failure.message),
            )
        case _:
            _log.info("job %s: run %s %s", run.job_id, run.run_id, run.status)
