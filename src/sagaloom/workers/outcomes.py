"""What becomes of a run when an attempt is over: a pure function from how it went to a settlement.

handler did                                       the run
returned create_success_result(data)              succeeded, with data
returned create_failure_result(e)                 failed
returned create_failure_result(e, retryable=True) tried again, by its policy
raised, was silent, or took too long              tried again, by its policy
raised SagasError(retryable=False) or a type      failed
  that the policy lists
returned anything else, or data that is no JSON   failed: it would be the same again
ended because it was cancelled                    cancelled
(its process died in it, as often as the policy   failed
  has attempts)
"""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Any, Final, NamedTuple, TypeGuard

from sagaloom.codec import encode_any
from sagaloom.engine.retrying import backoff, describe, is_retryable, storable, traceback_text
from sagaloom.errors import JobCancelled, SagasError
from sagaloom.ports.jobs import Cancelled, Failed, JobFailure, JobRun, Retried, Settlement, Succeeded
from sagaloom.workers.handlers import JobDefinition, JobResult

__all__ = [
    "AttemptSilent",
    "AttemptTimedOut",
    "ProcessDied",
    "Raised",
    "Returned",
    "is_worn_out",
    "settlement_of",
    "unusable",
    "worn_out",
]

_TEXT_MAX: Final = 2_000


class Returned(NamedTuple):
    """What the handler returned, whatever it is."""

    value: object


class Raised(NamedTuple):
    """What the handler raised, or was ended by."""

    error: BaseException


class AttemptTimedOut(SagasError):
    """An attempt that did not end before its deadline."""

    default_code = "JOB_TIMED_OUT"
    default_retryable = True


class AttemptSilent(SagasError):
    """An attempt that gave no sign of life for too long."""

    default_code = "JOB_SILENT"
    default_retryable = True


class ProcessDied(SagasError):
    """An attempt whose process, one of the pool, ended in the middle of it."""

    default_code = "JOB_PROCESS_DIED"
    default_retryable = True


def settlement_of(
    job: JobDefinition[Any],
    run: JobRun,
    outcome: Returned | Raised,
    *,
    now: datetime,
    result_bytes_max: int,
    is_cancelled: bool = False,
) -> Settlement:
    """How `run` is settled after the attempt that it counts. `is_cancelled`: it was asked to end, and its handler knew
    of it."""
    if isinstance(outcome, Raised):
        error = outcome.error
        if is_cancelled and isinstance(error, (JobCancelled, asyncio.CancelledError)):
            return Cancelled(now)
        code = error.code if isinstance(error, SagasError) else "JOB_HANDLER_FAILED"
        text = error.message if isinstance(error, SagasError) else describe(error)
        failure = _failure(run, code, text, now, traceback=traceback_text(error))
        return _again_or_never(job, run, failure, may_retry=is_retryable(error, job.retry))
    result = outcome.value
    if not _is_result(result):
        shown = f"{result!r:.80} ({type(result).__name__})" if result is not None else "None"
        text = (
            f"job {job.id!r} returned {shown}: end it with return create_success_result(data), or "
            "create_failure_result(error)"
        )
        return Failed(_failure(run, "JOB_RESULT_INVALID", text, now))
    try:
        data = encode_any(result.data)
    except SagasError as error:
        return Failed(_failure(run, "JOB_RESULT_INVALID", f"the data of job {job.id!r}: {error.message}", now))
    if len(data) > result_bytes_max:
        text = (
            f"job {job.id!r} returned {len(data)} bytes of data, at most {result_bytes_max} are kept: store them "
            "elsewhere, and return where"
        )
        return Failed(_failure(run, "JOB_RESULT_INVALID", text, now))
    if result.success:
        return Succeeded(data, now)
    failure = _failure(run, "JOB_FAILED", str(result.error), now, data=data if result.data is not None else None)
    return _again_or_never(job, run, failure, may_retry=result.retryable)


def unusable(run: JobRun, error: SagasError, *, now: datetime) -> Settlement:
    """The settlement of a run that cannot be worked on, and will not be able to be before somebody has changed the
    program: its job is not where it should be, or its payload does not fit it any more."""
    return Failed(_failure(run, error.code, error.message, now))


def is_worn_out(job: JobDefinition[Any], run: JobRun) -> bool:
    """Whether a claimed run had all its attempts before this one: none of them ended, they were cut off."""
    return run.attempt > job.retry.maximum_attempts


def worn_out(job: JobDefinition[Any], run: JobRun, *, now: datetime) -> Settlement:
    """The settlement of a run that `is_worn_out`. A job that kills its process must not do so for ever."""
    attempts = job.retry.maximum_attempts
    text = (
        f"the process ended in the middle of attempt {attempts} of {attempts} of job {job.id!r}: look at what the job "
        "does to its process (memory, signals, os._exit)"
    )
    return Failed(_failure(run, "JOB_PROCESS_DIED", text, now))


def _is_result(value: object) -> TypeGuard[JobResult[Any]]:
    return isinstance(value, JobResult)


def _again_or_never(job: JobDefinition[Any], run: JobRun, failure: JobFailure, *, may_retry: bool) -> Settlement:
    if not may_retry or run.attempt >= job.retry.maximum_attempts:
        return Failed(failure)
    return Retried(failure, failure.at + backoff(job.retry, attempt=run.attempt, message_id=run.run_id))


def _failure(
    run: JobRun, code: str, text: str, now: datetime, *, traceback: str | None = None, data: bytes | None = None
) -> JobFailure:
    return JobFailure(code, storable(text)[:_TEXT_MAX], run.attempt, now, traceback, data)
