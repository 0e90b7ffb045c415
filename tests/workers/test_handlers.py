"""define_job_handler: what is a job, and what is refused at the call."""

from __future__ import annotations

import functools
import subprocess
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypedDict

import pytest

from sagaloom import RetryPolicy
from sagaloom.errors import ConfigurationError, DefinitionError
from sagaloom.workers import (
    JobContext,
    JobDefinition,
    JobOptions,
    JobResult,
    create_failure_result,
    create_success_result,
    define_job_handler,
)
from sagaloom.workers.handlers import JobSet


@dataclass(frozen=True)
class Invoice:
    number: int


async def send_invoice(ctx: JobContext[Invoice]) -> JobResult[int]:
    return create_success_result(ctx.payload.number)


def do(ctx: Any) -> JobResult[None]:
    return create_success_result(None)


class Sender:
    async def __call__(self, ctx: Any) -> JobResult[None]:
        return create_success_result(None)


class Unfit:
    def __init__(self, thing: object) -> None:
        self.thing = object()


def test_a_job_is_named_for_its_function() -> None:
    job = define_job_handler(send_invoice, payload=Invoice)

    assert (job.id, job.payload_type, job.is_async) == ("send-invoice", "Invoice", True)
    assert (job.retry, job.timeout) == (RetryPolicy(), timedelta(minutes=5))


def test_it_is_a_decorator_with_and_without_arguments() -> None:
    @define_job_handler
    def plain(ctx: JobContext[dict[str, Any]]) -> JobResult[None]:
        return create_success_result(None)

    @define_job_handler(id="other", payload=Invoice, timeout="30s", retry=RetryPolicy(maximum_attempts=1))
    async def full(ctx: JobContext[Invoice]) -> JobResult[None]:
        return create_success_result(None)

    assert (plain.id, plain.is_async, plain.takes_objects_only) == ("plain", False, True)
    assert (full.id, full.timeout, full.retry.maximum_attempts) == ("other", timedelta(seconds=30), 1)


def test_a_job_is_called_like_its_function() -> None:
    job = define_job_handler(do)

    assert job(None) == create_success_result(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("fn", [Sender(), functools.partial(send_invoice), functools.partial(Sender())])
def test_whatever_can_be_awaited_is_async(fn: Any) -> None:
    assert define_job_handler(fn, id="x").is_async


def generator(ctx: Any) -> Any:
    yield create_success_result(None)


async def async_generator(ctx: Any) -> Any:
    yield create_success_result(None)


@pytest.mark.parametrize(
    ("fn", "options", "text"),
    [
        ("send", {}, "'send' is no function"),
        (Sender, {}, "is no function"),
        (lambda: None, {"id": "x"}, "has the signature"),
        (lambda a, b: None, {"id": "x"}, "has the signature"),
        (generator, {}, "is a generator"),
        (async_generator, {}, "is a generator"),
        (lambda ctx: None, {}, "give the job an id="),
        (functools.partial(do), {}, "give the job an id="),
        (do, {"id": ""}, "must be a text that is not empty"),
        (do, {"id": 7}, "must be a text that is not empty"),
        (do, {"id": "a/b"}, "job id 'a/b'"),
        (do, {"id": "job:x"}, "job id 'job:x'"),
        (do, {"id": "x" * 201}, "more than 200 bytes"),
        (do, {"payload": "Invoice"}, "payload must be a type"),
        (do, {"payload": {}}, "payload must be a type"),
        (do, {"payload": Unfit}, "job 'do': payload"),
        (do, {"retry": 3}, "job 'do': retry takes a RetryPolicy"),
        (do, {"retry": RetryPolicy(maximum_attempts=0)}, "maximum_attempts must be"),
        (do, {"timeout": 0}, "timeout must be longer than nothing"),
        (do, {"timeout": "soon"}, "timeout must be a timedelta"),
    ],
)
def test_what_could_never_run_is_refused_with_the_value_and_the_way_out(
    fn: Any, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(DefinitionError, match=text):
        define_job_handler(fn, **options)


def test_a_job_is_not_made_twice() -> None:
    with pytest.raises(DefinitionError, match="job 'do' is defined already"):
        define_job_handler(define_job_handler(do))  # type: ignore[call-overload]


@pytest.mark.parametrize("options", [{"payload": "Invoice"}, {"retry": 3}, {"id": "a/b"}])
def test_a_decorator_refuses_what_the_function_refuses(options: dict[str, Any]) -> None:
    with pytest.raises(DefinitionError):
        define_job_handler(**options)(do)


def test_results_say_how_it_went() -> None:
    class Sent(TypedDict):
        count: int

    failed = create_failure_result(OSError("no paper"), Sent(count=2), retryable=True)

    assert create_success_result(Sent(count=3)) == JobResult(success=True, data={"count": 3})
    assert failed == JobResult(success=False, data={"count": 2}, error="no paper", retryable=True)
    assert create_failure_result(KeyError()).error == "KeyError"


@pytest.mark.parametrize("error", ["", "  ", None, 3])
def test_a_failure_must_say_what_went_wrong(error: Any) -> None:
    with pytest.raises(DefinitionError, match="must say what went wrong"):
        create_failure_result(error)


def test_two_jobs_with_one_id_are_refused() -> None:
    first, second = define_job_handler(do, id="x"), define_job_handler(do, id="x")

    assert len(JobSet([first, first])) == 1
    with pytest.raises(DefinitionError, match="two different jobs have the id 'x'"):
        JobSet([first, second])


def test_a_function_is_no_job_yet() -> None:
    with pytest.raises(DefinitionError, match="is no job"):
        JobSet([do])  # type: ignore[list-item]


@pytest.mark.parametrize(
    "options",
    [
        {"concurrency": 0},
        {"concurrency": True},
        {"poll_seconds": 0},
        {"lease_seconds": float("nan")},
        {"drain_seconds": -1},
        {"payload_bytes_max": "1"},
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(options: dict[str, Any]) -> None:
    [name] = options

    with pytest.raises(ConfigurationError, match=name):
        JobOptions(**options)


def test_writing_jobs_loads_no_web_framework_and_no_store() -> None:
    code = (
        "import sys; import sagaloom.workers; "
        "print(sorted({'fastapi', 'uvicorn', 'pydantic', 'apsw', 'httpx2'} & set(sys.modules)))"
    )

    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)

    assert loaded.stdout.strip() == "[]"


def test_the_definition_is_what_type_checkers_see() -> None:
    job: JobDefinition[Invoice] = define_job_handler(send_invoice, payload=Invoice)

    assert isinstance(job, JobDefinition)
