"""`JobRuntime`: takes triggers in, and runs jobs.

    trigger ──► store ──► claimer ──► attempts ──► store ──► replier ──► sagas
    ticker ───┘              ▲         │    │
                             └ lifeline┘    └ scribe

A trigger is durable when `trigger` returns. The runtime owns its tasks and the claims that it holds while it runs; it
never closes a store that it was given.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import msgspec

from sagaloom.clock import Clock, SystemClock
from sagaloom.codec import encode_any
from sagaloom.durations import resolve_delay
from sagaloom.errors import DefinitionError, IdempotencyKeyReused, MessageRejected, SagasError
from sagaloom.ids import check_key, new_message_id, new_traceparent
from sagaloom.ports.jobs import (
    PRIORITIES,
    PRIORITY_DEFAULT,
    PRIORITY_MAX,
    JobPriority,
    JobReplyTo,
    JobRun,
    JobRunStatus,
    JobRunStore,
)
from sagaloom.stores.job_moves import no_run
from sagaloom.telemetry import TelemetryProviders, carried_trace, find_providers
from sagaloom.workers.attempts import Attempts
from sagaloom.workers.backlog import Backlog
from sagaloom.workers.feed import JobFeed
from sagaloom.workers.handlers import JobDefinition, JobSet
from sagaloom.workers.options import JobOptions
from sagaloom.workers.replying import HttpReplies, Replier, RepliesPort
from sagaloom.workers.roles import Claimer, Lifeline, Pruner, Role, Scribe
from sagaloom.workers.ticking import Ticker, tick_key

if TYPE_CHECKING:
    from sagaloom.telemetry.jobs import JobTelemetry

__all__ = ["JobHealth", "JobRuntime", "TriggerReceipt"]

_log = logging.getLogger("sagaloom.jobs")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobHealth:
    """Whether runs are taken in and worked on, and what stands against it. `checks` has `ok` or a reason for each
    part. `running` of `concurrency` places are taken."""

    ready: bool
    checks: Mapping[str, str]
    running: int
    concurrency: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TriggerReceipt:
    """The run is durable. `duplicate`: it was before, under the same idempotency key; it may be over already."""

    job_id: str
    run_id: str
    duplicate: bool
    triggered: Literal[True] = True


class JobRuntime:
    """Runs `jobs` on one store. Start it with `async with runtime:` or `start()` and `stop()`.

    async with JobRuntime(store, jobs=[create_user_settings]) as runtime:
        receipt = await runtime.trigger("create-user-settings", {"userId": "u-1"})
    """

    def __init__(
        self,
        store: JobRunStore,
        *,
        jobs: Iterable[JobDefinition[Any]],
        clock: Clock | None = None,
        options: JobOptions | None = None,
        telemetry: TelemetryProviders | None = None,
        replies: RepliesPort | None = None,
    ) -> None:
        """`replies` carries the ends of runs to the sagas that asked for them; by default it is HTTP, to the address
        that the environment names. `telemetry` says where spans and metrics go; without it they go to the providers
        that the process has set before `start`, if it has."""
        self.store = store
        self.jobs = JobSet(jobs)
        self.clock: Clock = clock if clock is not None else SystemClock()
        self.options = options if options is not None else JobOptions()
        self.holder = f"jobs-{os.getpid()}-{secrets.token_hex(4)}"
        self._state: Literal["new", "running", "stopped"] = "new"
        self._providers = telemetry
        self._telemetry: JobTelemetry | None = None
        self._replier = Replier(
            store,
            replies if replies is not None else HttpReplies(),
            self.clock,
            poll_seconds=self.options.poll_seconds,
        )
        self._attempts = Attempts(
            store,
            self.jobs,
            self.clock,
            self.options,
            on_free=self._wake,
            on_news=self._news,
            on_over=self._replier.deliver,
        )
        self._claimer = Claimer(store, self.jobs, self._attempts, self.clock, self.options, holder=self.holder)
        self._lifeline = Lifeline(store, self._attempts, self.clock, self.options)
        self._scribe = Scribe(self._attempts, self.clock, self.options)
        self._pruner = Pruner(store, self.clock, self.options)
        self._ticker = Ticker(store, self.jobs, self.clock, fire=self._fire)
        self._roles: tuple[Role, ...] = (
            *(self._lifeline, self._scribe, self._claimer, self._replier, self._ticker, self._pruner),
        )
        self._backlog = Backlog(store, self.clock, limit=self.options.backlog_max)
        self.feed = JobFeed(store)

    # -- lifecycle ------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begins to work. Starting twice is no error; after `stop` it needs a new runtime."""
        if self._state == "running":
            return
        if self._state == "stopped":
            raise DefinitionError("this job runtime was stopped: make a new one")
        self._listen()
        await self.store.join(self.holder)
        self._state = "running"
        for role in self._roles:
            await role.start()

    async def stop(self) -> None:
        """Takes no more runs, lets those under way end, and gives back what does not. Stopping twice is no error."""
        was, self._state = self._state, "stopped"
        if was != "running":
            return
        self.feed.close()
        for source in (self._ticker, self._claimer):
            source.drain()
            await source.stop()
        await self._attempts.drain(self.options.drain_seconds)
        for role in self._roles:
            role.drain()
            await role.stop()
        await self._replier.settled(self.options.drain_seconds)
        await self.store.leave()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def health(self) -> JobHealth:
        """How it is, without asking the store anything."""
        checks = {"store": self.store.problem or "ok"}
        for role in self._roles:
            if role is self._ticker and not self._ticker.is_needed:
                continue
            checks[role.name] = role.problem or ("ok" if role.is_running else "it does not run")
        return JobHealth(
            ready=all(check == "ok" for check in checks.values()),
            checks=checks,
            running=self._attempts.places_taken,
            concurrency=self.options.concurrency,
        )

    # -- what comes in --------------------------------------------------------------------------------------------

    async def trigger(
        self,
        job_id: str,
        payload: object = None,
        *,
        priority: int | JobPriority | None = None,
        delay: datetime | timedelta | float | str | None = None,
        correlation_id: str | None = None,
        idempotency_key: str | None = None,
        traceparent: str | None = None,
        tracestate: str | None = None,
        reply_to: JobReplyTo | None = None,
    ) -> TriggerReceipt:
        """Enqueues a run of a job, and returns once it is durable.

        `payload` is an instance of the job's payload type or its JSON value; None means an empty object. Of runs that
        are due, those with a higher `priority` (0 to 100, by default 50; or a word) go first. `delay` is a moment, a
        timedelta, milliseconds, or a text such as `"5m"`. With an `idempotency_key` the same trigger can be repeated:
        it answers with the first run. `reply_to` is the run of a saga that hears of the end.

        Raises `JobNotFound`, `IdempotencyKeyReused`, `MessageRejected` for what does not fit, and `BackendUnavailable`
        (code `JOB_BACKLOG_FULL`) while too many runs are pending.
        """
        job = self.jobs[job_id]
        await self._backlog.refuse_if_full()
        now = self.clock.now()
        run = JobRun(
            run_id=new_message_id(now),
            job_id=job_id,
            payload=self._checked_payload(job, payload),
            created_at=now,
            due_at=_due_at(job_id, delay, now),
            priority=_checked_priority(job_id, priority),
            correlation_id=None if correlation_id is None else check_key(correlation_id, what="correlationId"),
            idempotency_key=None if idempotency_key is None else check_key(idempotency_key, what="idempotency key"),
            traceparent=traceparent,
            tracestate=tracestate if traceparent is not None else None,
            reply_to=reply_to,
        )
        return await self._enqueue(run)

    async def _fire(self, job: JobDefinition[Any], tick: datetime) -> None:
        """Triggers the run of a tick."""
        assert job.schedule is not None
        now = self.clock.now()
        payload = job.schedule.payload_at(tick) if job.takes_objects_only else job.schedule.payload
        run = JobRun(
            run_id=new_message_id(now),
            job_id=job.id,
            payload=self._checked_payload(job, msgspec.Raw(payload)),
            created_at=now,
            due_at=now,
            idempotency_key=tick_key(tick),
            scheduled_for=tick,
        )
        try:
            await self._enqueue(run)
        except IdempotencyKeyReused as error:
            # A process that knew the job with another payload has fired it, and died before it moved the cursor.
            _log.info("job %s: tick %s came before: %s", job.id, tick, error.message)

    async def _enqueue(self, run: JobRun) -> TriggerReceipt:
        if run.traceparent is None and (trace := carried_trace()) is not None:
            run = msgspec.structs.replace(run, traceparent=trace.traceparent, tracestate=trace.tracestate)
        if self._telemetry is None or not self._telemetry.makes_spans:
            enqueued = await self.store.enqueue(_with_some_trace(run))
        else:
            with self._telemetry.trigger(run) as triggering:
                enqueued = await self.store.enqueue(triggering.run)
                triggering.took(enqueued)
        self._backlog.grew()
        self._wake()
        return TriggerReceipt(job_id=run.job_id, run_id=enqueued.run.run_id, duplicate=enqueued.duplicate)

    # -- what operators do ----------------------------------------------------------------------------------------

    async def cancel(self, run_id: str, *, reason: str | None = None) -> JobRun:
        """Ends a run: one that waits at once; one that is under way is asked to end, wherever it is, and has
        `cancel_grace_seconds` to do so. One that is over is left as it is. Raises `JobRunNotFound`."""
        run = await self.store.cancel(run_id, at=self.clock.now(), reason=reason)
        if run.is_over:
            self._replier.deliver(run)
        elif (claim := self._attempts.claim_of(run_id)) is not None:
            self._attempts.cancel(claim)
        return run

    async def redrive(self, run_id: str) -> JobRun:
        """Lets a failed or cancelled run begin anew, with a fresh count of attempts; sends a refused reply of one that
        succeeded again. Raises `JobRunNotFound`, and `MessageRejected` (code `JOB_RUN_NOT_OVER`) for any other."""
        run = await self.store.redrive(run_id, at=self.clock.now())
        if run.status == "pending":
            self._wake()
        else:
            self._replier.deliver(run)
        return run

    # -- what people look at --------------------------------------------------------------------------------------

    async def get_run(self, run_id: str) -> JobRun:
        """The run; raises `JobRunNotFound`."""
        run = await self.store.get(run_id)
        if run is None:
            raise no_run(run_id)
        return run

    async def list_runs(
        self,
        *,
        job_ids: Collection[str] = (),
        statuses: Collection[JobRunStatus] = (),
        cursor: str | None = None,
        limit: int = 50,
    ) -> tuple[list[JobRun], str | None]:
        """Runs, the newest first, and the cursor of the next page. Jobs that are not loaded here are listed as well."""
        return await self.store.runs(job_ids=job_ids, statuses=statuses, cursor=cursor, limit=limit)

    async def next_ticks(self) -> Mapping[str, datetime | None]:
        """When each job with a schedule runs next by itself."""
        return await self._ticker.next_ticks()

    def _listen(self) -> None:
        """Finds out whether anybody wants to hear what happens here."""
        providers = self._providers if self._providers is not None else find_providers()
        if providers is not None:
            from sagaloom.telemetry.jobs import JobTelemetry  # and with it OpenTelemetry, which nobody else needs

            self._telemetry = self._attempts.telemetry = JobTelemetry(providers)

    def _wake(self) -> None:
        self._claimer.wake()

    def _news(self) -> None:
        self._scribe.wake()

    def _checked_payload(self, job: JobDefinition[Any], payload: object) -> bytes:
        """The payload as JSON that the job can read."""
        where = f"the payload of job {job.id!r}"
        if isinstance(payload, msgspec.Raw):
            data = bytes(payload) or b"{}"
        else:
            try:
                data = encode_any({} if payload is None else payload)
            except SagasError as error:
                raise MessageRejected(f"{where}: {error.message}", data=error.data) from error
        if len(data) > self.options.payload_bytes_max:
            raise MessageRejected(
                f"{where} has {len(data)} bytes, at most {self.options.payload_bytes_max} are taken: keep bulk data "
                "elsewhere, and send its address",
                code="PAYLOAD_TOO_LARGE",
                data={"bytesMax": self.options.payload_bytes_max},
            )
        try:
            value = job.codec.decode(data)
        except SagasError as error:
            path = str(error.data.get("path", "$"))
            field = f"payload{path.removeprefix('$')}"
            raise MessageRejected(
                f"{where}: {error.message}", data={"formErrors": [], "fieldErrors": {field: [error.message]}}
            ) from error
        if job.takes_objects_only and not isinstance(value, dict):
            raise MessageRejected(
                f"{where} must be a JSON object, got {data[:80].decode(errors='replace')}: declare another type with "
                "define_job_handler(..., payload=...)",
                data={"formErrors": [], "fieldErrors": {"payload": ["must be a JSON object"]}},
            )
        return data


def _with_some_trace(run: JobRun) -> JobRun:
    """`run`, in a trace of its own if it came without one, so that what it sets off can be followed."""
    return run if run.traceparent is not None else msgspec.structs.replace(run, traceparent=new_traceparent())


def _due_at(job_id: str, delay: datetime | timedelta | float | str | None, now: datetime) -> datetime:
    if delay is None:
        return now
    try:
        return resolve_delay(delay, now)
    except DefinitionError as error:
        raise MessageRejected(f"trigger of job {job_id!r}: {error.message}") from error


def _checked_priority(job_id: str, priority: object) -> int:
    if priority is None:
        return PRIORITY_DEFAULT
    number = PRIORITIES.get(priority) if isinstance(priority, str) else priority
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= PRIORITY_MAX:
        raise MessageRejected(
            f"trigger of job {job_id!r}: priority must be 0 to {PRIORITY_MAX}, or one of {', '.join(PRIORITIES)}, got "
            f"{priority!r:.80}"
        )
    return number
