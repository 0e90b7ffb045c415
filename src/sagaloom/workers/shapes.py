"""What goes over the wire of the jobs API, and how records become it.

Names are camelCase, times ISO 8601 in UTC with milliseconds, what is not known is left out. Payloads and results are
passed through as the JSON they are stored as.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Literal, TypeVar

from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from sagaloom.definitions import CatchUp
from sagaloom.ports.jobs import (
    PRIORITIES,
    JobAttempt,
    JobFailure,
    JobProgress,
    JobReply,
    JobReplyTo,
    JobRun,
    JobRunStatus,
)
from sagaloom.web.routes import wire_time
from sagaloom.workers.handlers import JobDefinition, RunIn

__all__ = [
    "AttemptView",
    "EndBody",
    "FailureView",
    "JobList",
    "JobView",
    "JobsHealthView",
    "LogLineView",
    "ModuleProblem",
    "ProgressView",
    "ReplyToBody",
    "ReplyView",
    "RetryView",
    "RunList",
    "RunView",
    "ScheduleView",
    "TriggerAnswer",
    "TriggerBody",
    "job_view",
    "run_view",
]

Time = Annotated[str, Meta(extra_json_schema={"format": "date-time"})]
T = TypeVar("T")


class _Shape(Struct, frozen=True, kw_only=True, rename="camel"):
    pass


# Any text is let through to the runtime, which refuses one that is none of these with a list of them.
PriorityWord = Annotated[str, Meta(extra_json_schema={"enum": list(PRIORITIES)})]


class TriggerBody(_Shape, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a run is to be. Unknown fields are refused: a misspelt `idempotencyKey` would otherwise make every retry a
    run of its own."""

    payload: Annotated[
        Raw | UnsetType, Meta(description="What the job is about, of the type that it declares; by default `{}`.")
    ] = UNSET
    priority: Annotated[
        int | PriorityWord | None,
        Meta(description="0 to 100, or a word for 25, 50, 75, 100; higher goes first. By default 50."),
    ] = None
    delay: Annotated[
        int | float | str | None,
        Meta(description="How long the run waits: milliseconds, or a duration such as `30s`, `5m`, `2h`, `1d`."),
    ] = None
    correlation_id: Annotated[str | None, Meta(description="Kept with the run, for whoever looks for it.")] = None
    idempotency_key: Annotated[
        str | None, Meta(description="Makes a repeat a duplicate; the Idempotency-Key header says the same.")
    ] = None
    traceparent: Annotated[
        str | None, Meta(description="W3C trace context; the traceparent header says the same. Made up without one.")
    ] = None
    tracestate: str | None = None
    reply_to: ReplyToBody | None = None


class ReplyToBody(_Shape, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The run of a saga that hears of the end, by a message `<job id>:completed`, `:failed` or `:cancelled`."""

    saga_id: str
    correlation_key: str
    run: Annotated[int, Meta(ge=1)]
    effect_key: Annotated[str, Meta(description="The effect that asks for the job.")]
    hops: Annotated[int, Meta(ge=0)] = 0


class EndBody(_Shape, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why a run is to end."""

    reason: Annotated[str, Meta(max_length=500)] | None = None


class TriggerAnswer(_Shape, frozen=True, kw_only=True):
    """The run is durable. `duplicate`: it was before, under the same idempotency key."""

    job_id: str
    run_id: str
    triggered: bool
    duplicate: bool


class RetryView(_Shape, frozen=True, kw_only=True):
    """When a failed attempt is made again."""

    max_attempts: int
    initial_interval_ms: int
    maximum_interval_ms: int
    backoff_coefficient: float


class JobView(_Shape, frozen=True, kw_only=True):
    """A job that is loaded."""

    id: str
    payload_type: str
    payload_schema: Annotated[Mapping[str, Any], Meta(description="JSON Schema of the payload.")]
    retry: RetryView
    timeout_seconds: float
    run_in: RunIn
    heartbeat_timeout_seconds: float | UnsetType = UNSET
    schedule: ScheduleView | UnsetType = UNSET


class ScheduleView(_Shape, frozen=True, kw_only=True):
    """When a job runs by itself."""

    cron: str
    timezone: str
    catch_up: CatchUp
    next_tick_at: Time | None


class ModuleProblem(_Shape, frozen=True, kw_only=True):
    """A module whose jobs are not there, and why."""

    module: str
    problem: str


class JobList(_Shape, frozen=True, kw_only=True):
    """The loaded jobs, by id, and the modules that could not be loaded."""

    jobs: Sequence[JobView]
    total: int
    problems: Sequence[ModuleProblem] = ()


def job_view(job: JobDefinition[Any], next_tick_at: datetime | None) -> JobView:
    """One job, as the wire shows it."""
    return JobView(
        id=job.id,
        payload_type=job.payload_type,
        payload_schema={"type": "object"} if job.takes_objects_only else job.codec.json_schema(),
        retry=RetryView(
            max_attempts=job.retry.maximum_attempts,
            initial_interval_ms=job.retry.initial_interval_ms,
            maximum_interval_ms=job.retry.maximum_interval_ms,
            backoff_coefficient=job.retry.backoff_coefficient,
        ),
        timeout_seconds=job.timeout.total_seconds(),
        run_in=job.run_in,
        heartbeat_timeout_seconds=UNSET if job.heartbeat_timeout is None else job.heartbeat_timeout.total_seconds(),
        schedule=UNSET
        if job.schedule is None
        else ScheduleView(
            cron=job.schedule.cron,
            timezone=job.schedule.timezone,
            catch_up=job.schedule.catch_up,
            next_tick_at=None if next_tick_at is None else wire_time(next_tick_at),
        ),
    )


class FailureView(_Shape, frozen=True, kw_only=True):
    """Why the newest failed attempt failed."""

    code: str
    message: str
    attempt: int
    at: Time
    data: Raw | UnsetType = UNSET
    traceback: str | UnsetType = UNSET


class AttemptView(_Shape, frozen=True, kw_only=True):
    """An attempt that is over. `lost`: its process ended, or was not heard of any more; `released`: it was given back
    and does not count."""

    attempt: int
    started_at: Time
    ended_at: Time
    outcome: Literal["succeeded", "failed", "released", "cancelled", "lost"]
    worker: str
    code: str | UnsetType = UNSET
    message: str | UnsetType = UNSET


class ProgressView(_Shape, frozen=True, kw_only=True):
    """How far the newest attempt has come, as its handler says."""

    at: Time
    fraction: float | UnsetType = UNSET
    message: str | UnsetType = UNSET


class LogLineView(_Shape, frozen=True, kw_only=True):
    """What a handler has written down."""

    at: Time
    level: str
    text: str


class ReplyView(_Shape, frozen=True, kw_only=True):
    """What has become of the message by which a saga hears of the end."""

    saga_id: str
    correlation_key: str
    run: int
    state: Literal["waiting", "due", "delivered", "refused"]
    attempts: int = 0
    problem: str | UnsetType = UNSET


class RunView(_Shape, frozen=True, kw_only=True):
    """One run. `pending` with an attempt above 0 waits to be tried again. `worker` has it while it is running."""

    run_id: str
    job_id: str
    status: JobRunStatus
    attempt: Annotated[int, Meta(description="Attempts begun so far.")]
    priority: int
    payload: Raw
    created_at: Time
    due_at: Time
    started_at: Annotated[Time | UnsetType, Meta(description="When the newest attempt began.")] = UNSET
    ended_at: Time | UnsetType = UNSET
    result: Annotated[Raw | UnsetType, Meta(description="What the job returned.")] = UNSET
    failure: FailureView | UnsetType = UNSET
    correlation_id: str | UnsetType = UNSET
    idempotency_key: str | UnsetType = UNSET
    traceparent: str | UnsetType = UNSET
    tracestate: str | UnsetType = UNSET
    worker: str | UnsetType = UNSET
    progress: ProgressView | UnsetType = UNSET
    cancelled_at: Annotated[Time | UnsetType, Meta(description="When it was asked to end.")] = UNSET
    cancel_reason: str | UnsetType = UNSET
    scheduled_for: Annotated[Time | UnsetType, Meta(description="The tick of a schedule that it is.")] = UNSET
    reply: ReplyView | UnsetType = UNSET
    history: Annotated[
        Sequence[AttemptView] | UnsetType, Meta(description="Attempts that are over, oldest first; of one run alone.")
    ] = UNSET
    log: Annotated[
        Sequence[LogLineView] | UnsetType, Meta(description="The newest lines of its log; of one run alone.")
    ] = UNSET


class RunList(_Shape, frozen=True, kw_only=True):
    """A page of runs, newest first. `cursor` asks for the next page and is null on the last one."""

    runs: Sequence[RunView]
    limit: int
    cursor: str | None


def run_view(run: JobRun, *, is_whole: bool) -> RunView:
    """One run, as the wire shows it; `is_whole` with its history, its log and the traceback of its failure."""
    return RunView(
        run_id=run.run_id,
        job_id=run.job_id,
        status=run.status,
        attempt=run.attempt,
        priority=run.priority,
        payload=Raw(run.payload),
        created_at=wire_time(run.created_at),
        due_at=wire_time(run.due_at),
        started_at=_time_if(run.started_at),
        ended_at=_time_if(run.ended_at),
        result=UNSET if run.result is None else Raw(run.result),
        failure=UNSET if run.failure is None else _failure_view(run.failure, with_traceback=is_whole),
        correlation_id=_if_known(run.correlation_id),
        idempotency_key=_if_known(run.idempotency_key),
        traceparent=_if_known(run.traceparent),
        tracestate=_if_known(run.tracestate),
        worker=_if_known(run.holder),
        progress=UNSET if run.progress is None else _progress_view(run.progress),
        cancelled_at=_time_if(run.cancelled_at),
        cancel_reason=_if_known(run.cancel_reason),
        scheduled_for=_time_if(run.scheduled_for),
        reply=UNSET if run.reply_to is None else _reply_view(run.reply_to, run.reply),
        history=[_attempt_view(one) for one in run.history] if is_whole else UNSET,
        log=[LogLineView(at=wire_time(line.at), level=line.level, text=line.text) for line in run.log]
        if is_whole
        else UNSET,
    )


def _progress_view(progress: JobProgress) -> ProgressView:
    return ProgressView(
        at=wire_time(progress.at), fraction=_if_known(progress.fraction), message=_if_known(progress.message)
    )


def _attempt_view(attempt: JobAttempt) -> AttemptView:
    return AttemptView(
        attempt=attempt.attempt,
        started_at=wire_time(attempt.started_at),
        ended_at=wire_time(attempt.ended_at),
        outcome=attempt.outcome,
        worker=attempt.holder,
        code=_if_known(attempt.code),
        message=_if_known(attempt.message),
    )


def _reply_view(to: JobReplyTo, reply: JobReply | None) -> ReplyView:
    return ReplyView(
        saga_id=to.saga_id,
        correlation_key=to.key,
        run=to.run,
        state="waiting" if reply is None else reply.state,
        attempts=0 if reply is None else reply.attempt,
        problem=UNSET if reply is None else _if_known(reply.problem),
    )


def _failure_view(failure: JobFailure, *, with_traceback: bool) -> FailureView:
    return FailureView(
        code=failure.code,
        message=failure.message,
        attempt=failure.attempt,
        at=wire_time(failure.at),
        data=UNSET if failure.data is None else Raw(failure.data),
        traceback=_if_known(failure.traceback) if with_traceback else UNSET,
    )


class JobsHealthView(_Shape, frozen=True, kw_only=True):
    """How the service is. A check says `ok`, or what is wrong."""

    status: Literal["healthy", "unhealthy"]
    timestamp: Time
    version: str
    checks: Mapping[str, str]
    running: Annotated[int, Meta(description="Runs under way in this process.")]
    concurrency: Annotated[int, Meta(description="How many may be.")]
    problems: Annotated[Sequence[ModuleProblem], Meta(description="Modules that could not be loaded.")] = ()


def _time_if(moment: datetime | None) -> str | UnsetType:
    return UNSET if moment is None else wire_time(moment)


def _if_known(value: T | None) -> T | UnsetType:
    return UNSET if value is None else value
