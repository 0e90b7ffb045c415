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
from datetime import datetime, timedelta
from typing import Any, Final, Generic, Protocol, TypeAlias, TypeVar, cast, overload

import msgspec

from sagaloom.builder import check_retry
from sagaloom.codec import Codec, codec_for, type_name
from sagaloom.definitions import RetryPolicy
from sagaloom.durations import parse_duration
from sagaloom.errors import DefinitionError, JobNotFound

__all__ = [
    "JobContext",
    "JobDefinition",
    "JobHandler",
    "JobResult",
    "JobSet",
    "create_failure_result",
    "create_success_result",
    "define_job_handler",
]

P = TypeVar("P")
P_co = TypeVar("P_co", covariant=True)
D_co = TypeVar("D_co", covariant=True)

_ID_BYTES_MAX: Final = 200
_BAD_IN_ID: Final = re.compile(r"[\x00-\x1f\ud800-\udfff:~/]")
_TIMEOUT: Final = timedelta(minutes=5)
_SHAPE: Final = "a job handler is a function that takes one argument, ctx"
_RETURN: Final = "end with return create_success_result(data), or create_failure_result(error)"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobContext(Generic[P_co]):
    """What a handler knows of its run. `attempt` counts from 1; `now` is when this attempt began, and `deadline_at`
    when it will be given up.

    `idempotency_key` is the same in every attempt of the run, and in no other run: what the handler does elsewhere
    under it is done once. `traceparent` is never empty: a run that was triggered without one has one of its own.
    """

    job_id: str
    run_id: str
    attempt: int
    payload: P_co
    now: datetime
    deadline_at: datetime
    idempotency_key: str
    traceparent: str
    tracestate: str | None = None
    correlation_id: str | None = None


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
) -> JobDefinition[P]: ...
@overload
def define_job_handler(
    fn: JobHandler[dict[str, Any]],
    *,
    id: str | None = None,
    payload: None = None,
    retry: RetryPolicy | None = None,
    timeout: timedelta | float | str | None = None,
) -> JobDefinition[dict[str, Any]]: ...
@overload
def define_job_handler(
    fn: None = None,
    *,
    id: str | None = None,
    payload: type[P],
    retry: RetryPolicy | None = None,
    timeout: timedelta | float | str | None = None,
) -> _Decorator[P]: ...
@overload
def define_job_handler(
    fn: None = None,
    *,
    id: str | None = None,
    payload: None = None,
    retry: RetryPolicy | None = None,
    timeout: timedelta | float | str | None = None,
) -> _Decorator[dict[str, Any]]: ...
def define_job_handler(
    fn: JobHandler[Any] | None = None,
    *,
    id: str | None = None,
    payload: type[Any] | None = None,
    retry: RetryPolicy | None = None,
    timeout: timedelta | float | str | None = None,
) -> JobDefinition[Any] | _Decorator[Any]:
    """A job that runs `fn`; also a decorator, with or without arguments.

    - `id` names the job for life, at the door and in the store; by default the function's name, with hyphens.
    - `payload` is the type that the payload is read as, before a run is taken in and again for `ctx.payload`. Without
      one it is any JSON object, as a dict.
    - `retry` says when a failed attempt is made again: by default five attempts, 1 s apart, doubling, up to 60 s.
    - `timeout` bounds one attempt: by default five minutes. A sync handler cannot be stopped; its run goes on without
      it.

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
            return define_job_handler(fn, id=id, payload=cast("type[Any]", payload), retry=retry, timeout=timeout)

        return decorate
    if isinstance(fn, JobDefinition):
        raise DefinitionError(f"job {fn.id!r} is defined already: define_job_handler takes the function itself")
    _check_function(fn)
    job_id = _checked_id(fn, id)
    where = f"job {job_id!r}"
    policy = RetryPolicy() if retry is None else retry
    check_retry(where, policy)
    return JobDefinition(
        id=job_id,
        handler=fn,
        codec=_check_payload(where, payload),
        payload_type="object" if payload is None else type_name(payload),
        retry=policy,
        timeout=_checked_timeout(where, timeout),
        is_async=_is_async(fn),
        takes_objects_only=payload is None,
    )


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


def _checked_timeout(where: str, timeout: timedelta | float | str | None) -> timedelta:
    if timeout is None:
        return _TIMEOUT
    try:
        length = parse_duration(timeout)
    except DefinitionError as error:
        raise DefinitionError(
            f"{where}: timeout must be a timedelta, milliseconds or a text such as '30s', got {timeout!r:.80}"
        ) from error
    if length <= timedelta(0):
        raise DefinitionError(f"{where}: timeout must be longer than nothing, got {timeout!r:.80}")
    return length


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
