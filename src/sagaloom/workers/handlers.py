"""What a job is: a function that does one thing in the outside world, and says how it went.

    @define_job_handler(payload=Invoice)
    async def send_invoice(ctx: JobContext[Invoice]) -> JobResult[dict[str, str]]:
        receipt = await post.send(ctx.payload.address, ctx.payload.text, idempotency_key=ctx.idempotency_key)
        return create_success_result({"receipt": receipt})

Unlike the handler of a saga it may wait, call and write: a run of it is tried until it is done or given up. So it can
be run more than once for one trigger (its process dies, its answer comes too late), always under the same run id.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Generic, Literal, Protocol, TypeAlias, TypeGuard, TypeVar, cast, get_args, overload

import msgspec

from sagaloom.builder.rules import check_retry
from sagaloom.codec import Codec, codec_for, encode_any, type_name
from sagaloom.cron import parse_cron
from sagaloom.definitions import CatchUp, RetryPolicy, SchedulePolicy
from sagaloom.durations import parse_duration
from sagaloom.errors import DefinitionError, JobNotFound, SagasError
from sagaloom.ids import new_traceparent
from sagaloom.ports.jobs import JobRun
from sagaloom.workers.context import JobContext, Speaker

__all__ = [
    "JobContext",
    "JobDefinition",
    "JobHandler",
    "JobResult",
    "JobSchedule",
    "JobSet",
    "RunIn",
    "create_failure_result",
    "create_success_result",
    "define_job_handler",
    "is_job",
]

P = TypeVar("P")
D_co = TypeVar("D_co", covariant=True)

_ID_BYTES_MAX: Final = 200
_BAD_IN_ID: Final = re.compile(r"[\x00-\x1f\ud800-\udfff:~/]")
_TIMEOUT: Final = timedelta(minutes=5)
RunIn = Literal["loop", "thread", "process"]
"""Where a handler runs: on the event loop, in a thread of its own, or in a process of a pool."""

_SHAPE: Final = "a job handler is a function that takes one argument, ctx"
_RETURN: Final = "end with return create_success_result(data), or create_failure_result(error)"


class JobResult(msgspec.Struct, Generic[D_co], frozen=True, kw_only=True):
    """How a handler says that it went: made by `create_success_result` or `create_failure_result`."""

    success: bool
    data: D_co
    error: str | None = None
    retryable: bool = False


def create_success_result(data: P) -> JobResult[P]:
    """The run is done. `data` is kept with it, as JSON.

    >>> create_success_result({"sent": 3}).success
    True
    """
    return JobResult(success=True, data=data)


@overload
def create_failure_result(error: str | BaseException, *, retryable: bool = False) -> JobResult[None]: ...
@overload
def create_failure_result(error: str | BaseException, data: P, *, retryable: bool = False) -> JobResult[P]: ...
def create_failure_result(
    error: str | BaseException, data: object = None, *, retryable: bool = False
) -> JobResult[Any]:
    """The run has failed, for good unless `retryable`; `data` is kept with the error, as JSON. A handler that raises
    instead is tried again by its retry policy.

    >>> create_failure_result("no such user", {"userId": "u-1"}).error
    'no such user'
    """
    if isinstance(error, BaseException):
        error = str(error) or type(error).__name__
    if not isinstance(error, str) or not error.strip():
        raise DefinitionError(
            f"create_failure_result: the error must say what went wrong, as text or an exception, got {error!r:.80}"
        )
    if not isinstance(retryable, bool):
        raise DefinitionError(f"create_failure_result: retryable must be True or False, got {retryable!r:.80}")
    return JobResult(success=False, data=data, error=error, retryable=retryable)


JobHandler: TypeAlias = Callable[[JobContext[P]], "JobResult[Any] | Awaitable[JobResult[Any]]"]
"""A function of a `JobContext`, sync or async. A sync one runs in a thread of its own."""


@dataclass(frozen=True, slots=True)
class JobSchedule:
    """When a job runs by itself: a five-field `cron` expression in a named zone. Each tick triggers one run, over any
    number of processes. `catch_up` says what becomes of ticks that were missed by more than a minute: the newest one
    runs (`"latest"`), or `"all"`, or `"none"`.

    `payload` is that of the runs; an object gets `scheduledFor` beside its own fields when the job takes any object.
    `ctx.scheduled_for` says the same.
    """

    cron: str
    timezone: str = "UTC"
    catch_up: CatchUp = "latest"
    payload: object = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class JobDefinition(Generic[P]):
    """A job, as `define_job_handler` makes it. Calling it calls the handler, which is how it is tested."""

    id: str
    handler: JobHandler[P]
    codec: Codec[P]
    payload_type: str
    retry: RetryPolicy
    timeout: timedelta
    is_async: bool
    takes_objects_only: bool
    """Whether the payload was not declared, and must therefore be a JSON object."""
    run_in: RunIn = "loop"
    heartbeat_timeout: timedelta | None = None
    schedule: SchedulePolicy | None = None

    def context_of(self, run: JobRun, *, now: datetime, speaker: Speaker) -> JobContext[P]:
        """What the handler is called with for an attempt of `run` that begins now. Raises `DecodeError` when the
        payload fits no more."""
        return JobContext(
            job_id=run.job_id,
            run_id=run.run_id,
            attempt=run.attempt,
            payload=self.codec.decode(run.payload),
            now=now,
            deadline_at=now + self.timeout,
            idempotency_key=f"{run.job_id}:{run.run_id}",
            traceparent=run.traceparent or new_traceparent(),
            tracestate=run.tracestate,
            correlation_id=run.correlation_id,
            scheduled_for=run.scheduled_for,
            speaker=speaker,
        )

    def __call__(self, ctx: JobContext[P]) -> JobResult[Any] | Awaitable[JobResult[Any]]:
        return self.handler(ctx)


class _Decorator(Protocol[P]):
    def __call__(self, fn: JobHandler[P], /) -> JobDefinition[P]: ...


@overload
def define_job_handler(
    fn: JobHandler[P],
    *,
    id: str | None = None,
    payload: type[P],
    retry: RetryPolicy | None = None,
    timeout: timedelta | float | str | None = None,
    heartbeat_timeout: timedelta | float | str | None = None,
    run_in: RunIn | None = None,
    schedule: str | JobSchedule | None = None,
) -> JobDefinition[P]: ...
@overload
def define_job_handler(
    fn: JobHandler[dict[str, Any]],
    *,
    id: str | None = None,
    payload: None = None,
    retry: RetryPolicy | None = None,
    timeout: timedelta | float | str | None = None,
    heartbeat_timeout: timedelta | float | str | None = None,
    run_in: RunIn | None = None,
    schedule: str | JobSchedule | None = None,
) -> JobDefinition[dict[str, Any]]: ...
@overload
def define_job_handler(
    fn: None = None,
    *,
    id: str | None = None,
    payload: type[P],
    retry: RetryPolicy | None = None,
    timeout: timedelta | float | str | None = None,
    heartbeat_timeout: timedelta | float | str | None = None,
    run_in: RunIn | None = None,
    schedule: str | JobSchedule | None = None,
) -> _Decorator[P]: ...
@overload
def define_job_handler(
    fn: None = None,
    *,
    id: str | None = None,
    payload: None = None,
    retry: RetryPolicy | None = None,
    timeout: timedelta | float | str | None = None,
    heartbeat_timeout: timedelta | float | str | None = None,
    run_in: RunIn | None = None,
    schedule: str | JobSchedule | None = None,
) -> _Decorator[dict[str, Any]]: ...
def define_job_handler(
    fn: JobHandler[Any] | None = None,
    *,
    id: str | None = None,
    payload: type[Any] | None = None,
    retry: RetryPolicy | None = None,
    timeout: timedelta | float | str | None = None,
    heartbeat_timeout: timedelta | float | str | None = None,
    run_in: RunIn | None = None,
    schedule: str | JobSchedule | None = None,
) -> JobDefinition[Any] | _Decorator[Any]:
    """A job that runs `fn`; also a decorator, with or without arguments.

    - `id` names the job for life, at the door and in the store; by default the function's name, with hyphens.
    - `payload` is the type that the payload is read as, before a run is taken in and again for `ctx.payload`. Without
      one it is any JSON object, as a dict.
    - `retry` says when a failed attempt is made again: by default five attempts, 1 s apart, doubling, up to 60 s.
    - `timeout` bounds one attempt: by default five minutes. A handler in a thread cannot be stopped; its run goes on
      without it.
    - `heartbeat_timeout` bounds the time between two signs of life (`ctx.heartbeat()` or `ctx.progress(...)`): whatever
      is silent for longer is taken to hang, and the attempt has failed.
    - `run_in` is where the handler runs: on the event `"loop"` (async handlers), in a `"thread"` of its own (sync
      ones), or in a `"process"` of a pool: for what needs the processor, hangs, or ends its process. It must be a
      global of a module that can be imported, then.
    - `schedule` runs it by itself: a cron expression, or a `JobSchedule`.

    Raises `DefinitionError` for what could never run.

    >>> @define_job_handler
    ... def say_hello(ctx: JobContext[dict[str, Any]]) -> JobResult[str]:
    ...     return create_success_result(f"hello {ctx.payload['name']}")
    >>> say_hello.id
    'say-hello'
    """
    if fn is None:

        def decorate(fn: JobHandler[Any], /) -> JobDefinition[Any]:
            if fn is None:
                raise DefinitionError(f"define_job_handler: None is no function: {_SHAPE}")
            return define_job_handler(
                fn,
                id=id,
                payload=cast("type[Any]", payload),
                retry=retry,
                timeout=timeout,
                heartbeat_timeout=heartbeat_timeout,
                run_in=run_in,
                schedule=schedule,
            )

        return decorate
    if isinstance(fn, JobDefinition):
        raise DefinitionError(f"job {fn.id!r} is defined already: define_job_handler takes the function itself")
    _check_function(fn)
    job_id = _checked_id(fn, id)
    where = f"job {job_id!r}"
    policy = RetryPolicy() if retry is None else retry
    check_retry(where, policy)
    codec = _check_payload(where, payload)
    return JobDefinition(
        id=job_id,
        handler=fn,
        codec=codec,
        payload_type="object" if payload is None else type_name(payload),
        retry=policy,
        timeout=_checked_length(where, "timeout", timeout) or _TIMEOUT,
        is_async=_is_async(fn),
        takes_objects_only=payload is None,
        run_in=_checked_place(where, fn, run_in),
        heartbeat_timeout=_checked_length(where, "heartbeat_timeout", heartbeat_timeout),
        schedule=_checked_schedule(where, job_id, schedule, codec, takes_objects_only=payload is None),
    )


def is_job(value: object) -> TypeGuard[JobDefinition[Any]]:
    """Whether it is a job, whatever its payload."""
    return isinstance(value, JobDefinition)


class JobSet:
    """The jobs that a process runs."""

    def __init__(self, jobs: Iterable[JobDefinition[Any]] = ()) -> None:
        self._jobs: dict[str, JobDefinition[Any]] = {}
        for job in jobs:
            if not isinstance(job, JobDefinition):
                raise DefinitionError(
                    f"{job!r:.80} is no job: make one of a function with define_job_handler(function)"
                )
            if self._jobs.setdefault(job.id, job) is not job:
                raise DefinitionError(f"two different jobs have the id {job.id!r}: give one of them another")
        self.ids = frozenset(self._jobs)

    def __getitem__(self, job_id: str) -> JobDefinition[Any]:
        job = self._jobs.get(job_id)
        if job is None:
            known = ", ".join(sorted(self._jobs)) or "none"
            raise JobNotFound(
                f"no job {job_id!r:.80} is loaded here; loaded are: {known}", data={"jobs": sorted(self._jobs)}
            )
        return job

    def __iter__(self) -> Iterator[JobDefinition[Any]]:
        return iter(self._jobs.values())

    def __len__(self) -> int:
        return len(self._jobs)


def _check_function(fn: object) -> None:
    if not callable(fn) or isinstance(fn, type):
        raise DefinitionError(f"define_job_handler: {fn!r:.80} is no function: {_SHAPE}")
    for one in _called(fn):
        if inspect.isgeneratorfunction(one) or inspect.isasyncgenfunction(one):
            raise DefinitionError(f"define_job_handler: {_name(fn)} is a generator, which returns no result: {_RETURN}")
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # some builtins have none
        return
    try:
        signature.bind(None)
    except TypeError as error:
        raise DefinitionError(
            f"define_job_handler: {_name(fn)} has the signature {signature}: {_SHAPE} ({error})"
        ) from error


def _checked_id(fn: object, given: object) -> str:
    job_id = given
    if job_id is None:
        name = getattr(fn, "__name__", "")
        job_id = name.strip("_").replace("_", "-") if isinstance(name, str) and name.isidentifier() else ""
        if not job_id:
            raise DefinitionError(f"define_job_handler: {_name(fn)} has no name of its own: give the job an id=")
    if not isinstance(job_id, str) or not job_id.strip():
        raise DefinitionError(f"define_job_handler: the id must be a text that is not empty, got {given!r:.80}")
    job_id = job_id.strip()
    if _BAD_IN_ID.search(job_id) or len(job_id.encode()) > _ID_BYTES_MAX:
        raise DefinitionError(
            f"job id {job_id!r:.80} holds one of ':', '~', '/', a control character or a lone surrogate, or has more "
            f"than {_ID_BYTES_MAX} bytes: it stands in URLs and in targets such as 'job:send-invoice'; use letters, "
            "digits, '-' and '.'"
        )
    return job_id


def _check_payload(where: str, payload: object) -> Codec[Any]:
    if payload is not None and isinstance(payload, (str, bytes, int, float, dict, list)):
        raise DefinitionError(f"{where}: payload must be a type, such as a dataclass or TypedDict, got {payload!r:.80}")
    try:
        return codec_for(payload)
    except DefinitionError as error:
        raise DefinitionError(f"{where}: payload: {error.message}", data=error.data) from error


def _checked_length(where: str, name: str, given: timedelta | float | str | None) -> timedelta | None:
    if given is None:
        return None
    try:
        length = parse_duration(given)
    except DefinitionError as error:
        raise DefinitionError(
            f"{where}: {name} must be a timedelta, milliseconds or a text such as '30s', got {given!r:.80}"
        ) from error
    if length <= timedelta(0):
        raise DefinitionError(f"{where}: {name} must be longer than nothing, got {given!r:.80}")
    return length


def _checked_place(where: str, fn: object, run_in: object) -> RunIn:
    is_async = _is_async(fn)
    if run_in is None:
        return "loop" if is_async else "thread"
    if run_in not in get_args(RunIn):
        raise DefinitionError(f"{where}: run_in must be one of {', '.join(get_args(RunIn))}, got {run_in!r:.80}")
    if run_in == "loop" and not is_async:
        raise DefinitionError(
            f"{where}: run_in='loop' is for async handlers; a sync one would stop all others: leave it out, or say "
            "'thread' or 'process'"
        )
    if run_in == "thread" and is_async:
        raise DefinitionError(f"{where}: run_in='thread' is for sync handlers: leave it out, or say 'process'")
    name = getattr(fn, "__qualname__", None)
    if run_in == "process" and (not isinstance(name, str) or "<" in name or "." in name):
        raise DefinitionError(
            f"{where}: run_in='process' needs a function that another process can import: a global of its module, got "
            f"{_name(fn)}"
        )
    return cast("RunIn", run_in)


def _checked_schedule(
    where: str, job_id: str, given: object, codec: Codec[Any], *, takes_objects_only: bool
) -> SchedulePolicy | None:
    if given is None:
        return None
    schedule = JobSchedule(given) if isinstance(given, str) else given
    if not isinstance(schedule, JobSchedule) or not isinstance(schedule.cron, str):
        raise DefinitionError(
            f"{where}: schedule must be a cron expression such as '0 3 * * *', or a JobSchedule, got {given!r:.80}"
        )
    if schedule.catch_up not in get_args(CatchUp):
        raise DefinitionError(
            f"{where}: schedule catch_up must be one of {', '.join(get_args(CatchUp))}, got {schedule.catch_up!r:.80}"
        )
    try:
        read = parse_cron(schedule.cron, schedule.timezone)
    except DefinitionError as error:
        raise DefinitionError(f"{where}: schedule: {error.message}") from error
    try:
        payload = encode_any({} if schedule.payload is None else schedule.payload)
        policy = SchedulePolicy(read.expression, job_id, read.timezone, schedule.catch_up, payload)
        value = codec.decode(policy.payload_at(datetime.now(UTC)) if takes_objects_only else payload)
    except SagasError as error:
        raise DefinitionError(
            f"{where}: the runs of its schedule have a payload that it does not take: {error.message}; give one with "
            "schedule=JobSchedule(cron, payload=...)"
        ) from error
    if takes_objects_only and not isinstance(value, dict):
        raise DefinitionError(f"{where}: the payload of its schedule must be an object, got {schedule.payload!r:.80}")
    return policy


def _is_async(fn: object) -> bool:
    return any(map(inspect.iscoroutinefunction, _called(fn)))


def _called(fn: object) -> tuple[object, object]:
    """What runs when `fn` is called: the function behind a partial, or the `__call__` of its class."""
    plain = fn
    while isinstance(plain, functools.partial):
        plain = plain.func
    return plain, inspect.getattr_static(type(plain), "__call__", None)


def _name(fn: object) -> str:
    return str(getattr(fn, "__qualname__", None) or repr(fn))[:80]
