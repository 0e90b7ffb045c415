"""What each step makes of a run: pure functions, the same for every store of job runs.

A store reads a run, asks here what it is to become, and writes that together with the event that `event_of` makes of
it; how it finds the run, and makes sure that nobody was faster, is its own business.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

import msgspec

from sagaloom.errors import Fenced, JobRunNotFound, MessageRejected
from sagaloom.ports.jobs import (
    ATTEMPTS_KEPT,
    LOG_LINES_KEPT,
    REPLY_HEADSTART,
    Cancelled,
    Failed,
    JobAttempt,
    JobClaim,
    JobEvent,
    JobEventType,
    JobFailure,
    JobNote,
    JobReply,
    JobRun,
    JobRunStatus,
    Released,
    Retried,
    Settlement,
    Succeeded,
)

__all__ = [
    "asked_to_end",
    "claimed",
    "event_of",
    "fenced",
    "no_run",
    "noted",
    "progress_event",
    "redriven",
    "reply_postponed",
    "reply_settled",
    "settled",
]

_change = msgspec.structs.replace
_TYPES: dict[JobRunStatus, JobEventType] = {
    "pending": "run:pending",
    "running": "run:running",
    "succeeded": "run:succeeded",
    "failed": "run:failed",
    "cancelled": "run:cancelled",
}


def claimed(run: JobRun, holder: str, *, now: datetime) -> JobRun:
    """A run that `holder` begins to work on: one that waited, or one whose holder is over."""
    history = run.history
    if run.status == "running":
        history = _with(run, _lost(run, now))
    return _change(
        run,
        status="running",
        holder=holder,
        epoch=run.epoch + 1,
        attempt=run.attempt + 1,
        started_at=now,
        history=history,
        progress=None,
    )


def noted(run: JobRun, note: JobNote | None) -> JobRun:
    """A run with what its handler has said."""
    if note is None or (note.progress is None and not note.log):
        return run
    return _change(
        run,
        progress=note.progress or run.progress,
        log=(*run.log, *note.log)[-LOG_LINES_KEPT:] if note.log else run.log,
    )


def settled(run: JobRun, settlement: Settlement, note: JobNote | None = None) -> JobRun:
    """A run whose attempt is over."""
    run = noted(run, note)
    match settlement:
        case Succeeded(result, at):
            return _over(run, "succeeded", at, _attempt(run, "succeeded", at), result=result)
        case Failed(failure):
            return _over(run, "failed", failure.at, _failed(run, failure), failure=failure)
        case Cancelled(at):
            return _over(run, "cancelled", at, _attempt(run, "cancelled", at, message=run.cancel_reason))
        case Retried(failure, _) if run.cancelled_at is not None:
            return _over(run, "cancelled", failure.at, _failed(run, failure), failure=failure)
        case Retried(failure, due_at):
            history = _with(run, _failed(run, failure))
            return _change(run, status="pending", holder=None, failure=failure, due_at=due_at, history=history)
        case Released(at):
            at = at or run.started_at or run.created_at
            if run.cancelled_at is not None:
                return _over(run, "cancelled", at, _attempt(run, "cancelled", at, message=run.cancel_reason))
            history = _with(run, _attempt(run, "released", at))
            return _change(run, status="pending", holder=None, attempt=run.attempt - 1, history=history)


def asked_to_end(run: JobRun, *, at: datetime, reason: str | None, is_held: bool) -> JobRun:
    """A run that is cancelled; itself when there is nothing to change. `is_held`: whether somebody works on it, who is
    to hear of it. Else it is over: perhaps nobody will ever take it again, since its job is gone."""
    if run.is_over or (is_held and run.cancelled_at is not None):
        return run
    if run.cancelled_at is None:
        run = _change(run, cancelled_at=at, cancel_reason=reason)
    if is_held:
        return run
    return _over(run, "cancelled", at, _lost(run, at) if run.status == "running" else None)


def redriven(run: JobRun, *, at: datetime) -> JobRun:
    """A run that begins anew, or one that succeeded, whose refused reply is due again. Raises `MessageRejected`."""
    if run.status == "succeeded" and run.reply is not None and run.reply.state == "refused":
        return _change(run, reply=JobReply("due", at))
    if run.status not in ("failed", "cancelled"):
        raise MessageRejected(
            f"run {run.run_id} of job {run.job_id!r} is {run.status}: only a run that has failed or was cancelled can "
            "be redriven; trigger the job for another one",
            code="JOB_RUN_NOT_OVER",
            data={"runId": run.run_id, "status": run.status},
        )
    return _change(
        run,
        status="pending",
        attempt=0,
        due_at=at,
        ended_at=None,
        cancelled_at=None,
        cancel_reason=None,
        progress=None,
        reply=None,
    )


def reply_postponed(run: JobRun, *, until: datetime) -> JobRun:
    """A run whose reply somebody is delivering until then."""
    assert run.reply is not None
    return _change(run, reply=_change(run.reply, due_at=until))


def reply_settled(run: JobRun, expected: JobRun, reply: JobReply) -> JobRun | None:
    """A run with what became of its reply; None when that is not about the end that `expected` had."""
    if run.epoch != expected.epoch or run.status != expected.status or run.reply is None or run.reply.state != "due":
        return None
    return _change(run, reply=reply)


def event_of(run: JobRun, *, at: datetime) -> JobEvent:
    """What is shown of a run that has changed its status. The store puts the number in."""
    detail = None
    if run.status == "failed" or (run.status == "pending" and run.failure is not None and run.attempt > 0):
        detail = run.failure.message if run.failure is not None else None
    elif run.status == "cancelled":
        detail = run.cancel_reason
    return JobEvent(
        0, _TYPES[run.status], run.run_id, run.job_id, run.attempt, at, detail, correlation_id=run.correlation_id
    )


def progress_event(run: JobRun, note: JobNote) -> JobEvent | None:
    """What is shown of a note, if anything."""
    progress = note.progress
    if progress is None:
        return None
    return JobEvent(
        0,
        "run:progress",
        run.run_id,
        run.job_id,
        run.attempt,
        progress.at,
        progress.message,
        progress.fraction,
        run.correlation_id,
    )


def no_run(run_id: str) -> JobRunNotFound:
    """The error for a run that is not there."""
    return JobRunNotFound(f"there is no run {run_id!r:.80}: it was never triggered, or is forgotten by now")


def fenced(store: str, claim: JobClaim, *, holder: str | None, status: str | None) -> Fenced:
    """The error for a claim that is over: `holder` has the run now, or it has this `status`, or there is none."""
    if holder is not None:
        now = f"{holder!r} has it"
    elif status is not None:
        now = f"it is {status}"
    else:
        now = "there is no such run"
    return Fenced(
        f"{store}: the claim of {claim.holder!r} on run {claim.run_id} (epoch {claim.epoch}) is over, now {now}: "
        "nothing was written; drop the result"
    )


def _over(
    run: JobRun,
    status: Literal["succeeded", "failed", "cancelled"],
    at: datetime,
    attempt: JobAttempt | None,
    *,
    result: bytes | None = None,
    failure: JobFailure | None = None,
) -> JobRun:
    return _change(
        run,
        status=status,
        holder=None,
        ended_at=at,
        result=result,
        failure=failure or run.failure,
        history=run.history if attempt is None else _with(run, attempt),
        reply=None if run.reply_to is None else JobReply("due", at + REPLY_HEADSTART),
    )


def _with(run: JobRun, attempt: JobAttempt) -> tuple[JobAttempt, ...]:
    return (*run.history, attempt)[-ATTEMPTS_KEPT:]


def _failed(run: JobRun, failure: JobFailure) -> JobAttempt:
    return _attempt(run, "failed", failure.at, code=failure.code, message=failure.message)


def _lost(run: JobRun, at: datetime) -> JobAttempt:
    return _attempt(run, "lost", at, message="its process ended, or was not heard of any more")


def _attempt(
    run: JobRun,
    outcome: Literal["succeeded", "failed", "released", "cancelled", "lost"],
    at: datetime,
    *,
    code: str | None = None,
    message: str | None = None,
) -> JobAttempt:
    started_at = run.started_at or run.created_at
    return JobAttempt(run.attempt, started_at, max(at, started_at), outcome, run.holder or "", code, message)
