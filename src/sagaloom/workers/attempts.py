"""The attempts that are under way: each is a task that has the handler called, and settles the run when it is over.

- A settlement that the store does not take (because it does not answer) is offered again until it does, or until the
  claim is somebody else's.
- An attempt that is cut short by the end of the process is given back and does not count. One whose claim was lost is
  dropped: whoever has the claim now does the same work.
- A run that was asked to end before it began is settled without an attempt.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from sagaloom.clock import Clock
from sagaloom.errors import Fenced, SagasError
from sagaloom.ports.jobs import Cancelled, Failed, JobClaim, JobRun, JobRunStore, Released, Retried, Settlement
from sagaloom.telemetry.trace_context import CARRIED, Trace
from sagaloom.workers.context import Reports
from sagaloom.workers.execution import Execution
from sagaloom.workers.handlers import JobSet
from sagaloom.workers.options import JobOptions
from sagaloom.workers.outcomes import is_worn_out, worn_out

if TYPE_CHECKING:
    from sagaloom.telemetry.jobs import JobTelemetry

__all__ = ["Attempts"]

_log = logging.getLogger("sagaloom.jobs")
_AGAIN_SECONDS_MAX: Final = 2.0


@dataclass(eq=False, slots=True)
class _Attempt:
    run: JobRun
    reports: Reports
    task: asyncio.Task[None] | None = None
    cut: Literal["released", "lost"] | None = None
    """Why it was ended from outside."""


class Attempts:
    """Begins, ends and counts attempts. `on_free` is called when a place is free again, `on_news` when a handler has
    said something, on whichever thread, and `on_over` for each run that is over."""

    def __init__(
        self,
        store: JobRunStore,
        jobs: JobSet,
        clock: Clock,
        options: JobOptions,
        *,
        on_free: Callable[[], None],
        on_news: Callable[[], None],
        on_over: Callable[[JobRun], None],
    ) -> None:
        self._store = store
        self._jobs = jobs
        self._clock = clock
        self._on_free = on_free
        self._on_news = on_news
        self._on_over = on_over
        self._execution = Execution(clock, options, on_free=on_free)
        self._under_way: dict[JobClaim, _Attempt] = {}
        self._is_empty = asyncio.Event()
        self._is_empty.set()
        self.telemetry: JobTelemetry | None = None
        """Who is told of attempts, if anybody listens."""

    @property
    def places_taken(self) -> int:
        return len(self._under_way) + self._execution.left_behind

    @property
    def claims(self) -> list[JobClaim]:
        """The claims that are held."""
        return list(self._under_way)

    def begin(self, run: JobRun) -> None:
        """Works on a claimed run."""
        attempt = _Attempt(run, Reports(self._clock, on_news=self._on_news))
        self._under_way[run.claim] = attempt
        self._is_empty.clear()
        attempt.task = asyncio.create_task(self._work(attempt), name=f"sagaloom-job-{run.run_id}")
        attempt.task.add_done_callback(lambda task: self._ended(run, task))

    def lose(self, claim: JobClaim) -> None:
        """Drops an attempt whose claim is over."""
        self._cut(claim, "lost")

    def cancel(self, claim: JobClaim) -> None:
        """The run of a claim was asked to end."""
        attempt = self._under_way.get(claim)
        if attempt is not None:
            attempt.reports.cancel()

    def claim_of(self, run_id: str) -> JobClaim | None:
        """Under which claim a run is under way here, if it is."""
        return next((claim for claim in self._under_way if claim.run_id == run_id), None)

    async def write_down(self) -> bool:
        """Writes down what handlers have said since the last time. Whether there was anything."""
        has_written = False
        for claim, attempt in list(self._under_way.items()):
            note = attempt.reports.take()
            if note is None:
                continue
            has_written = True
            try:
                await self._store.note(claim, note)
            except Fenced:
                continue  # the lifeline finds out as well, and ends the attempt
            except SagasError:
                attempt.reports.put_back(note)
                raise
        return has_written

    async def drain(self, seconds: float) -> None:
        """Waits until nothing is under way, for a while; what is not done then is given back."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._is_empty.wait()
        for claim in self.claims:
            self._cut(claim, "released")
        await self._is_empty.wait()
        await self._execution.close()

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
            settlement = await self._worked(attempt)
            await self._settle(attempt, settlement)
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

    async def _worked(self, attempt: _Attempt) -> Settlement:
        """How a run is to be settled, after an attempt."""
        run, job = attempt.run, self._jobs[attempt.run.job_id]
        if run.cancelled_at is not None:
            return Cancelled(self._clock.now())
        if is_worn_out(job, run):
            return worn_out(job, run, now=self._clock.now())
        if self.telemetry is None:
            return await self._execution.settlement(job, run, attempt.reports)
        with self.telemetry.attempt(run) as attempting:
            settlement = await self._execution.settlement(job, attempting.run, attempt.reports)
            attempting.came_to(settlement)
            return settlement

    async def _settle(self, attempt: _Attempt, settlement: Settlement) -> None:
        run, note, wait_seconds = attempt.run, attempt.reports.take(), 0.1
        while True:
            try:
                settled = await self._store.settle(run.claim, settlement, note=note)
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
                if settled.is_over:
                    self._on_over(settled)
                return

    async def _give_back(self, run: JobRun) -> None:
        try:
            await self._store.settle(run.claim, Released(self._clock.now()))
        except SagasError as error:
            # Its lease ends by itself.
            _log.warning("job %s: run %s was not given back: %s", run.job_id, run.run_id, error.message)
        else:
            _log.info("job %s: run %s was not done in time, and goes on elsewhere", run.job_id, run.run_id)


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
