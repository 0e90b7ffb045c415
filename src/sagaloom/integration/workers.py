"""The workers' boundary: how other code triggers jobs and tasks, whoever carries the trigger.

    triggers = create_worker_triggers()
    receipt = await triggers.trigger_job("create-user-settings", {"userId": "u-1"}, idempotency_key="signup-7f3a")

A handler of a saga does not trigger: it returns `send("job:create-user-settings", {...})`, which leaves after its
commit. This is for the code around sagas.

Without a client, triggers go over HTTP to the workers API, found as `sagaloom.targets.workers` says. Tasks are served
by NetScript's workers; the jobs of this package know none, and answer that there is no such address.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TypeAlias, TypedDict, TypeVar, Unpack, runtime_checkable

import msgspec

from sagaloom.clock import Clock, SystemClock
from sagaloom.codec import encode_any
from sagaloom.errors import DeliveryFailed, MessageRejected, SagasError
from sagaloom.ids import check_key
from sagaloom.ports.jobs import PRIORITIES, PRIORITY_MAX, JobPriority
from sagaloom.targets.workers import WorkersApi
from sagaloom.telemetry import current_trace

__all__ = [
    "HttpWorkersClient",
    "WorkerPriority",
    "WorkerTriggerOptions",
    "WorkerTriggerReceipt",
    "WorkerTriggers",
    "WorkersClientPort",
    "create_worker_triggers",
    "trigger_job",
    "trigger_task",
]

R = TypeVar("R")

WorkerPriority: TypeAlias = int | JobPriority


class WorkerTriggerOptions(TypedDict, total=False):
    """What may be said about a trigger. `priority` is 0 to 100 (50 by default) or a word; `delay_ms` and
    `scheduled_for` say when the work is due, one or the other. With an `idempotency_key` the trigger can be repeated:
    one run comes of it. Without a `traceparent` it goes on in the trace of what is going on."""

    priority: WorkerPriority | None
    delay_ms: float | None
    scheduled_for: datetime | None
    correlation_id: str | None
    idempotency_key: str | None
    traceparent: str | None
    tracestate: str | None


class WorkerTriggerReceipt(msgspec.Struct, frozen=True, kw_only=True):
    """The run is durable. `run_id` is None where the service does not tell it. `duplicate`: it was there before."""

    id: str
    run_id: str | None
    accepted_at: datetime
    duplicate: bool = False


@runtime_checkable
class WorkersClientPort(Protocol):
    """Triggers jobs and tasks. Raises `DeliveryFailed` when the trigger was refused or not confirmed."""

    async def trigger_job(
        self, job_id: str, payload: object = None, /, **options: Unpack[WorkerTriggerOptions]
    ) -> WorkerTriggerReceipt: ...

    async def trigger_task(
        self, task_id: str, payload: object = None, /, **options: Unpack[WorkerTriggerOptions]
    ) -> WorkerTriggerReceipt: ...


async def trigger_job(
    workers: WorkersClientPort, job_id: str, payload: object = None, **options: Unpack[WorkerTriggerOptions]
) -> WorkerTriggerReceipt:
    """Triggers a job through `workers`, once the options are checked. Raises `MessageRejected` for what could never be
    accepted, and what the client raises."""
    _check(job_id, options, "job")
    return await workers.trigger_job(job_id, payload, **options)


async def trigger_task(
    workers: WorkersClientPort, task_id: str, payload: object = None, **options: Unpack[WorkerTriggerOptions]
) -> WorkerTriggerReceipt:
    """Triggers a task through `workers`; see `trigger_job`."""
    _check(task_id, options, "task")
    return await workers.trigger_task(task_id, payload, **options)


class WorkerTriggers:
    """`trigger_job` and `trigger_task`, bound to a client; made by `create_worker_triggers`."""

    def __init__(self, workers: WorkersClientPort) -> None:
        self._workers = workers

    async def trigger_job(
        self, job_id: str, payload: object = None, **options: Unpack[WorkerTriggerOptions]
    ) -> WorkerTriggerReceipt:
        """Triggers a job, and answers once its run is durable."""
        return await trigger_job(self._workers, job_id, payload, **options)

    async def trigger_task(
        self, task_id: str, payload: object = None, **options: Unpack[WorkerTriggerOptions]
    ) -> WorkerTriggerReceipt:
        """Triggers a task, and answers once it is accepted."""
        return await trigger_task(self._workers, task_id, payload, **options)

    async def close(self) -> None:
        """Closes the connections of the client, if it has any. Twice is no error."""
        close = getattr(self._workers, "close", None)
        if close is not None:
            await close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class HttpWorkersClient:
    """Triggers over HTTP. `base_url` comes before the environment; `token` is the bearer token of the service."""

    def __init__(
        self,
        base_url: str | None = None,
        *,
        token: str | None = None,
        read_env: Callable[[str], str | None] = os.environ.get,
        timeout_seconds: float = 20.0,
        clock: Clock | None = None,
    ) -> None:
        self._clock = clock if clock is not None else SystemClock()
        self._api = WorkersApi(
            base_url, token=token, read_env=read_env, timeout_seconds=timeout_seconds, clock=self._clock
        )

    async def trigger_job(
        self, job_id: str, payload: object = None, /, **options: Unpack[WorkerTriggerOptions]
    ) -> WorkerTriggerReceipt:
        return await self._trigger("jobs", job_id, payload, options)

    async def trigger_task(
        self, task_id: str, payload: object = None, /, **options: Unpack[WorkerTriggerOptions]
    ) -> WorkerTriggerReceipt:
        return await self._trigger("tasks", task_id, payload, options)

    async def close(self) -> None:
        await self._api.close()

    async def _trigger(
        self, kind: Literal["jobs", "tasks"], target_id: str, payload: object, options: WorkerTriggerOptions
    ) -> WorkerTriggerReceipt:
        _check(target_id, options, kind.removesuffix("s"))
        answer = await self._api.trigger(kind, target_id, self._body(payload, options))
        try:
            said = msgspec.json.decode(answer, type=_Answer)
        except msgspec.DecodeError as error:
            # It may have been triggered: whether to repeat it is the caller's decision, and safe under a key.
            raise DeliveryFailed(
                f"the workers API answered the trigger of {target_id!r} with what is no receipt: {error}",
                retryable=False,
            ) from error
        if not said.triggered:
            raise DeliveryFailed(f"the workers API did not trigger {target_id!r}, and does not say why")
        return WorkerTriggerReceipt(
            id=target_id, run_id=said.run_id, accepted_at=self._clock.now(), duplicate=said.duplicate
        )

    def _body(self, payload: object, options: WorkerTriggerOptions) -> dict[str, object]:
        priority, delay = options.get("priority"), options.get("delay_ms")
        moment = options.get("scheduled_for")
        if moment is not None:
            delay = max((moment - self._clock.now()) / timedelta(milliseconds=1), 0)
        traceparent, tracestate = options.get("traceparent"), options.get("tracestate")
        if traceparent is None and (current := current_trace()) is not None:
            traceparent, tracestate = current
        body: dict[str, object] = {
            "payload": msgspec.Raw(_encoded(payload)) if payload is not None else None,
            "priority": PRIORITIES[priority] if isinstance(priority, str) else priority,
            "delay": delay,
            "correlationId": options.get("correlation_id"),
            "idempotencyKey": options.get("idempotency_key"),
            "traceparent": traceparent,
            "tracestate": tracestate,
        }
        return {name: value for name, value in body.items() if value is not None}


class _Answer(msgspec.Struct, rename="camel"):
    triggered: bool
    run_id: str | None = None
    duplicate: bool = False


def create_worker_triggers(
    workers: WorkersClientPort | None = None, *, base_url: str | None = None, token: str | None = None
) -> WorkerTriggers:
    """The triggers, bound to `workers`; without one, to an HTTP client for `base_url` or what the environment names."""
    if workers is not None:
        if base_url is not None or token is not None:
            raise MessageRejected("create_worker_triggers: base_url and token are for the HTTP client, not for workers")
        return WorkerTriggers(workers)
    return WorkerTriggers(HttpWorkersClient(base_url, token=token))


def _encoded(payload: object) -> bytes:
    try:
        return encode_any(payload)
    except SagasError as error:
        raise MessageRejected(f"Worker trigger payload: {error.message}", data=error.data) from error


def _check(target_id: Any, options: WorkerTriggerOptions, kind: str) -> None:
    if not isinstance(target_id, str) or not target_id.strip():
        raise MessageRejected(f"Worker trigger needs the id of a {kind}, got {target_id!r:.80}.")
    unknown = sorted(options.keys() - WorkerTriggerOptions.__optional_keys__)
    if unknown:
        known = ", ".join(sorted(WorkerTriggerOptions.__optional_keys__))
        raise MessageRejected(f"Worker trigger option {unknown[0]!r} is unknown: known are {known}.")
    delay_ms: Any = options.get("delay_ms")
    if delay_ms is not None and (
        isinstance(delay_ms, bool) or not isinstance(delay_ms, (int, float)) or not 0 <= delay_ms < float("inf")
    ):
        raise MessageRejected(f"Worker trigger delayMs must be a non-negative number. Got {delay_ms!r:.80}.")
    moment: Any = options.get("scheduled_for")
    if moment is not None and not (isinstance(moment, datetime) and moment.utcoffset() is not None):
        raise MessageRejected(
            f"Worker trigger scheduledFor must be a valid Date. Got {moment!r:.80}; give an aware datetime, such as "
            f"{datetime(2026, 1, 31, tzinfo=UTC).isoformat()}."
        )
    if delay_ms is not None and moment is not None:
        raise MessageRejected("Worker trigger takes delay_ms or scheduled_for, not both.")
    priority: Any = options.get("priority")
    if priority is not None and not (
        priority in PRIORITIES
        if isinstance(priority, str)
        else isinstance(priority, int) and not isinstance(priority, bool) and 0 <= priority <= PRIORITY_MAX
    ):
        raise MessageRejected(
            f"Worker trigger priority must be 0 to {PRIORITY_MAX}, or one of {', '.join(PRIORITIES)}. Got "
            f"{priority!r:.80}."
        )
    for name, what in (("correlation_id", "correlationId"), ("idempotency_key", "idempotencyKey")):
        key: Any = options.get(name)
        if key is not None:
            check_key(key, what=f"Worker trigger {what}")
