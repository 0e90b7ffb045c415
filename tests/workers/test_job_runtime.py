"""What becomes of a run, from its trigger to its end."""

from __future__ import annotations

import asyncio
import functools
import json
import threading
from datetime import timedelta
from typing import Annotated, Any, TypedDict

import msgspec
import pytest

from sagaloom import RetryPolicy, SagasError
from sagaloom.errors import IdempotencyKeyReused, JobNotFound, JobRunNotFound, MessageRejected
from sagaloom.ports.jobs import JobRun
from sagaloom.workers import (
    JobContext,
    JobDefinition,
    JobResult,
    create_failure_result,
    create_success_result,
    define_job_handler,
)
from tests.workers.jobs_room import PATIENCE_SECONDS, SharedMemory, open_room

AT_ONCE = RetryPolicy(maximum_attempts=3, initial_interval_ms=1_000, jitter=0)
Ctx = JobContext[dict[str, Any]]


class Mail(TypedDict):
    to: Annotated[str, msgspec.Meta(min_length=1)]


def job(fn: Any, **options: Any) -> JobDefinition[Any]:
    return define_job_handler(fn, id="job", **options)


@define_job_handler
async def echo(ctx: Ctx) -> JobResult[Any]:
    return create_success_result(ctx.payload)


# --- How it goes well ------------------------------------------------------------------------------------------------


async def test_an_async_handlers_data_is_kept_with_the_run() -> None:
    async with open_room(echo) as room:
        run = await room.run("echo", {"n": 1})

        assert (run.status, run.result, run.attempt, run.failure) == ("succeeded", b'{"n":1}', 1, None)
        assert await room.runtime.get_run(run.run_id) == run


async def test_a_sync_handler_runs_in_a_thread_and_does_not_hold_up_the_others() -> None:
    release = threading.Event()
    names: list[str] = []

    def blocking(ctx: Ctx) -> JobResult[str]:
        names.append(threading.current_thread().name)
        assert release.wait(PATIENCE_SECONDS)
        return create_success_result("done")

    async with open_room(job(blocking), echo) as room:
        blocked = await room.runtime.trigger("job")
        meanwhile = await room.run("echo")
        release.set()
        run = await room.settled()

        assert meanwhile.status == "succeeded"
        assert (run.run_id, run.result) == (blocked.run_id, b'"done"')
        assert names == [f"sagaloom-job-{run.run_id}"]


async def test_a_sync_function_that_returns_a_coroutine_is_awaited() -> None:
    async with open_room(job(functools.partial(lambda answer, ctx: answer(ctx), echo.handler))) as room:
        assert (await room.run("job", {"n": 2})).result == b'{"n":2}'


async def test_a_handler_knows_its_run() -> None:
    seen: list[JobContext[Mail]] = []

    async def handler(ctx: JobContext[Mail]) -> JobResult[None]:
        seen.append(ctx)
        return create_success_result(None)

    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    async with open_room(job(handler, payload=Mail, timeout="30s")) as room:
        run = await room.run(
            "job", {"to": "me"}, correlation_id="c-1", traceparent=trace, tracestate="a=b", idempotency_key="k"
        )

        assert seen == [
            JobContext(
                job_id="job",
                run_id=run.run_id,
                attempt=1,
                payload=Mail(to="me"),
                now=room.clock.now(),
                deadline_at=room.clock.now() + timedelta(seconds=30),
                idempotency_key=f"job:{run.run_id}",
                traceparent=trace,
                tracestate="a=b",
                correlation_id="c-1",
            )
        ]


async def test_a_run_without_a_trace_gets_one_that_lasts() -> None:
    seen: list[str] = []

    async def handler(ctx: Ctx) -> JobResult[None]:
        seen.append(ctx.traceparent)
        if ctx.attempt == 1:
            raise OSError("not now")
        return create_success_result(None)

    async with open_room(job(handler, retry=AT_ONCE)) as room:
        first = await room.run("job")
        room.clock.advance("1s")
        await room.settled()

        assert seen == [first.traceparent] * 2
        assert seen[0].startswith("00-")


async def test_a_delayed_run_waits_for_its_moment() -> None:
    async with open_room(echo) as room:
        await room.runtime.trigger("echo", delay="5m")
        await room.clock.advance_through("4m")
        early = room.store.settled.qsize()
        await room.clock.advance_through("1m")

        assert early == 0
        assert (await room.settled()).status == "succeeded"


async def test_higher_priorities_go_first_when_places_are_few() -> None:
    order: list[int] = []
    gate = asyncio.Event()

    async def handler(ctx: Ctx) -> JobResult[None]:
        order.append(ctx.payload["n"])
        await gate.wait()
        return create_success_result(None)

    async with open_room(job(handler), concurrency=1, is_started=False) as room:
        for number, priority in enumerate((None, "low", 100, "critical", 51, "high")):
            await room.runtime.trigger("job", {"n": number}, priority=priority)  # type: ignore[arg-type]
            room.clock.advance(1)
        gate.set()
        await room.runtime.start()
        for _ in range(6):
            await room.settled()

        assert order == [2, 3, 5, 4, 0, 1]


async def test_no_more_runs_are_under_way_than_there_are_places() -> None:
    under_way = most = 0
    gate = asyncio.Event()

    async def handler(ctx: Ctx) -> JobResult[None]:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await gate.wait()
        under_way -= 1
        return create_success_result(None)

    async with open_room(job(handler), concurrency=3) as room:
        for _ in range(7):
            await room.runtime.trigger("job")
        for _ in range(20):
            await asyncio.sleep(0)
        full = room.runtime.health().running
        gate.set()
        for _ in range(7):
            await room.settled()

        assert (full, most) == (3, 3)


# --- How it goes wrong -----------------------------------------------------------------------------------------------


async def test_what_a_handler_raises_is_tried_again_by_its_policy_and_then_the_run_has_failed() -> None:
    attempts: list[int] = []

    def handler(ctx: Ctx) -> JobResult[None]:
        attempts.append(ctx.attempt)
        raise OSError("the printer is on fire")

    async with open_room(job(handler, retry=AT_ONCE)) as room:
        began = room.clock.now()
        first = await room.run("job")
        await room.clock.advance_through("999ms")
        early = room.store.settled.qsize()
        await room.clock.advance_through("1ms")
        second = await room.settled()
        await room.clock.advance_through("2s")
        third = await room.settled()

        assert [run.status for run in (first, second, third)] == ["pending", "pending", "failed"]
        assert (first.due_at, second.due_at) == (began + timedelta(seconds=1), began + timedelta(seconds=3))
        assert (attempts, early) == ([1, 2, 3], 0)
        assert third.failure is not None
        assert (third.failure.code, third.failure.message, third.failure.attempt) == (
            "JOB_HANDLER_FAILED",
            "OSError: the printer is on fire",
            3,
        )
        assert "raise OSError" in (third.failure.traceback or "")
        assert third.ended_at == began + timedelta(seconds=3)


async def test_a_later_attempt_may_succeed() -> None:
    async def handler(ctx: Ctx) -> JobResult[int]:
        if ctx.attempt < 3:
            raise OSError("not now")
        return create_success_result(ctx.attempt)

    async with open_room(job(handler, retry=AT_ONCE)) as room:
        await room.run("job")
        for seconds in ("1s", "2s"):
            await room.clock.advance_through(seconds)
            run = await room.settled()

        assert (run.status, run.result) == ("succeeded", b"3")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SagasError("no such user", code="USER_GONE", retryable=False), "USER_GONE"),
        (KeyError("userId"), "JOB_HANDLER_FAILED"),
    ],
)
async def test_what_cannot_get_better_is_not_tried_again(error: Exception, code: str) -> None:
    async def handler(ctx: Ctx) -> JobResult[None]:
        raise error

    policy = RetryPolicy(non_retryable_error_types=("LookupError",))
    async with open_room(job(handler, retry=policy)) as room:
        run = await room.run("job")

        assert run.failure is not None
        assert (run.status, run.attempt, run.failure.code) == ("failed", 1, code)


async def test_a_failure_result_ends_the_run_with_its_data() -> None:
    async def handler(ctx: Ctx) -> JobResult[dict[str, str]]:
        return create_failure_result("no such user", {"userId": "u"})

    async with open_room(job(handler)) as room:
        run = await room.run("job")

        assert run.failure is not None
        assert (run.status, run.failure.code, run.failure.message, run.failure.data) == (
            "failed",
            "JOB_FAILED",
            "no such user",
            b'{"userId":"u"}',
        )
        assert run.result is None


async def test_a_retryable_failure_result_is_tried_again() -> None:
    async def handler(ctx: Ctx) -> JobResult[None]:
        return create_failure_result("busy", retryable=True)

    async with open_room(job(handler, retry=AT_ONCE)) as room:
        first = await room.run("job")
        for seconds in ("1s", "2s"):
            await room.clock.advance_through(seconds)
            last = await room.settled()

        assert (first.status, last.status, last.attempt) == ("pending", "failed", 3)


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        (None, "job 'job' returned None"),
        ({"success": True}, "{'success': True} (dict)"),
        (create_success_result({"at": object()}), "the data of job 'job'"),
        (create_success_result("x" * 2000), "2002 bytes"),
    ],
)
async def test_rubbish_fails_the_run_at_once_and_says_what_was_wrong(returned: object, text: str) -> None:
    async with open_room(job(lambda ctx: returned), result_bytes_max=1000) as room:
        run = await room.run("job")

        assert run.failure is not None
        assert (run.status, run.attempt, run.failure.code) == ("failed", 1, "JOB_RESULT_INVALID")
        assert text in run.failure.message


async def test_an_attempt_that_takes_too_long_is_ended_and_tried_again() -> None:
    ended = asyncio.Event()

    async def handler(ctx: Ctx) -> JobResult[None]:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return create_success_result(None)

    async with open_room(job(handler, timeout=10, retry=AT_ONCE)) as room:
        run = await room.run("job")

        assert run.failure is not None
        assert (run.status, run.failure.code) == ("pending", "JOB_TIMED_OUT")
        assert "within 0.01 s" in run.failure.message
        assert ended.is_set()


async def test_a_thread_that_takes_too_long_keeps_its_place_until_it_ends() -> None:
    release = threading.Event()

    def handler(ctx: Ctx) -> JobResult[None]:
        release.wait(PATIENCE_SECONDS)
        return create_success_result(None)

    async with open_room(job(handler, timeout=10), echo, concurrency=1) as room:
        run = await room.run("job")
        await room.runtime.trigger("echo")
        for _ in range(20):
            await asyncio.sleep(0)
        while_it_hangs = (room.runtime.health().running, room.store.settled.qsize())
        release.set()
        after = await room.settled()

        assert run.status == "pending"
        assert while_it_hangs == (1, 0)
        assert (after.job_id, after.status) == ("echo", "succeeded")


class Bottomless(BaseException):
    """What no `except Exception` catches."""


@pytest.mark.parametrize(
    "error",
    [
        *(TimeoutError("the bank"), asyncio.CancelledError(), StopIteration()),
        *(SystemExit(3), KeyboardInterrupt(), GeneratorExit(), Bottomless()),
    ],
)
@pytest.mark.parametrize("is_async", [True, False])
async def test_no_exception_of_a_handler_harms_the_worker(error: BaseException, is_async: bool) -> None:
    def handler(ctx: Ctx) -> JobResult[None]:
        raise error

    async def async_handler(ctx: Ctx) -> JobResult[None]:
        raise error

    async with open_room(job(async_handler if is_async else handler), echo) as room:
        run = await room.run("job")

        assert run.failure is not None
        assert (run.status, run.failure.code) == ("pending", "JOB_HANDLER_FAILED")
        assert (await room.run("echo")).status == "succeeded"
        assert room.runtime.health().ready


async def test_a_payload_that_no_longer_fits_fails_the_run() -> None:
    kv = SharedMemory()
    async with open_room(job(echo.handler), kv=kv, is_started=False) as before:
        await before.runtime.trigger("job", {"address": "x"})

    async with open_room(job(echo.handler, payload=Mail), kv=kv) as room:
        run = await room.settled()

        assert run.failure is not None
        assert (run.status, run.failure.code) == ("failed", "VALIDATION_ERROR")
        assert "to" in run.failure.message


# --- Who works on it -------------------------------------------------------------------------------------------------


async def test_a_run_cut_off_by_the_end_of_its_process_is_tried_again_and_counted() -> None:
    kv = SharedMemory()
    async with open_room(job(echo.handler), kv=kv, is_started=False) as room:
        receipt = await room.runtime.trigger("job", {"n": 1})
        now = room.clock.now()
        # A process that claims and dies leaves just this behind.
        await room.store.claim("dead", ["job"], now=now, until=now + timedelta(seconds=6), limit=1)
        await room.runtime.start()
        await room.clock.advance_through("5900ms")
        early = room.store.settled.qsize()
        await room.clock.advance_through("100ms")
        run = await room.settled()

        assert early == 0
        assert (run.run_id, run.status, run.attempt) == (receipt.run_id, "succeeded", 2)


async def test_a_job_that_kills_its_process_every_time_is_given_up() -> None:
    called: list[int] = []
    handler = job(lambda ctx: called.append(1), retry=AT_ONCE)
    async with open_room(handler, is_started=False) as room:
        await room.runtime.trigger("job")
        for number in range(3):
            now = room.clock.now()
            claimed = await room.store.claim(f"dead-{number}", ["job"], now=now, until=now, limit=1)
            assert len(claimed.runs) == 1
        await room.runtime.start()
        run = await room.settled()

        assert run.failure is not None
        assert (run.status, run.failure.code, called) == ("failed", "JOB_PROCESS_DIED", [])
        assert "attempt 3 of 3" in run.failure.message


async def test_a_lease_is_renewed_while_the_work_goes_on() -> None:
    gate = asyncio.Event()

    async def handler(ctx: Ctx) -> JobResult[int]:
        await gate.wait()
        return create_success_result(ctx.attempt)

    kv = SharedMemory()
    async with open_room(job(handler), kv=kv) as room, open_room(job(handler), kv=kv, clock=room.clock) as other:
        receipt = await room.runtime.trigger("job")
        for _ in range(10):
            await room.clock.advance_through("2s")
        gate.set()
        holders = await asyncio.wait_for(_first(room.settled(), other.settled()), timeout=PATIENCE_SECONDS)

        assert (holders.run_id, holders.result) == (receipt.run_id, b"1")
        assert other.store.settled.qsize() == 0


async def _first(*waits: Any) -> JobRun:
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    done, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()
    return done.pop().result()


async def test_an_attempt_whose_claim_was_lost_is_ended_and_settles_nothing() -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def handler(ctx: Ctx) -> JobResult[None]:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return create_success_result(None)

    async with open_room(job(handler)) as room:
        receipt = await room.runtime.trigger("job")
        await begun.wait()
        later = room.clock.now() + timedelta(minutes=1)
        [taken] = (await room.store.claim("thief", ["job"], now=later, until=later, limit=1)).runs
        await room.clock.advance_through("2s")
        await asyncio.wait_for(ended.wait(), PATIENCE_SECONDS)

        assert (await room.runtime.get_run(receipt.run_id)) == taken
        assert room.store.settled.qsize() == 0


async def test_what_is_not_done_when_the_runtime_stops_is_given_back_and_does_not_count() -> None:
    begun = asyncio.Event()

    async def handler(ctx: Ctx) -> JobResult[int]:
        begun.set()
        await asyncio.Event().wait()
        return create_success_result(1)

    kv = SharedMemory()
    async with open_room(job(handler), kv=kv, drain_seconds=0) as first:
        await first.runtime.trigger("job")
        await begun.wait()
    released = first.store.settled.get_nowait()

    async with open_room(job(echo.handler), kv=kv) as second:
        run = await second.settled()

        assert (released.status, released.attempt) == ("pending", 0)
        assert (run.status, run.attempt) == ("succeeded", 1)


async def test_what_is_under_way_when_the_runtime_stops_may_end() -> None:
    begun, gate = asyncio.Event(), asyncio.Event()

    async def handler(ctx: Ctx) -> JobResult[int]:
        begun.set()
        await gate.wait()
        return create_success_result(1)

    async with open_room(job(handler), drain_seconds=10) as room:
        await room.runtime.trigger("job")
        await begun.wait()
        room.clock.advance(1)
        await room.runtime.trigger("job", delay="1h")
        stopping = asyncio.create_task(room.runtime.stop())
        await asyncio.sleep(0)
        gate.set()
        await stopping
        statuses = [run.status for run in (await room.runtime.list_runs())[0]]

        assert statuses == ["pending", "succeeded"]
        assert not room.runtime.health().ready


# --- When the store is away ------------------------------------------------------------------------------------------


async def test_work_resumes_by_itself_when_the_store_answers_again() -> None:
    async with open_room(echo, is_started=False) as room:
        await room.runtime.trigger("echo")
        room.store.trouble = "the disk is gone"
        await room.runtime.start()
        await asyncio.wait_for(room.store.tried.get(), PATIENCE_SECONDS)
        for _ in range(5):
            await asyncio.sleep(0)
        health = room.runtime.health()
        room.store.trouble = None
        await room.clock.advance_through("1s")
        run = await room.settled()

        assert (health.ready, health.checks["claimer"]) == (False, "the disk is gone")
        assert run.status == "succeeded"
        assert room.runtime.health().ready


async def test_a_result_is_offered_until_the_store_takes_it() -> None:
    calls = 0

    async def handler(ctx: Ctx) -> JobResult[int]:
        nonlocal calls
        calls += 1
        room.store.trouble = "the disk is full"
        return create_success_result(calls)

    async with open_room(job(handler)) as room:
        await room.runtime.trigger("job")
        while await asyncio.wait_for(room.store.tried.get(), PATIENCE_SECONDS) != "settle":
            pass
        room.store.trouble = None
        run = await room.settled()

        assert (run.status, run.result, calls) == ("succeeded", b"1", 1)


# --- Triggering ------------------------------------------------------------------------------------------------------


async def test_a_trigger_can_be_repeated_under_its_idempotency_key() -> None:
    async with open_room(echo) as room:
        first = await room.runtime.trigger("echo", {"n": 1}, idempotency_key="k")
        again = await room.runtime.trigger("echo", {"n": 1}, idempotency_key="k")

        assert (again.run_id, first.duplicate, again.duplicate) == (first.run_id, False, True)
        with pytest.raises(IdempotencyKeyReused):
            await room.runtime.trigger("echo", {"n": 2}, idempotency_key="k")
        assert len((await room.runtime.list_runs())[0]) == 1


async def test_a_job_that_is_not_loaded_is_refused_with_those_that_are() -> None:
    async with open_room(echo) as room:
        with pytest.raises(JobNotFound, match="loaded are: echo") as caught:
            await room.runtime.trigger("print")

        assert caught.value.data == {"jobs": ["echo"]}


@pytest.mark.parametrize(
    ("payload", "options", "text"),
    [
        ({"to": ""}, {}, "length >= 1"),
        ({}, {}, "missing required field `to`"),
        (None, {}, "missing required field `to`"),
        ([1], {}, "payload of job 'job'"),
        ({"to": object()}, {}, "payload of job 'job'"),
        ({"to": "x" * 2000}, {}, "at most 1000"),
        ({"to": "me"}, {"priority": 101}, "priority must be 0 to 100"),
        ({"to": "me"}, {"priority": "urgent"}, "critical"),
        ({"to": "me"}, {"priority": True}, "priority"),
        ({"to": "me"}, {"delay": "soon"}, "suffix"),
        ({"to": "me"}, {"delay": -1}, "non-negative"),
        ({"to": "me"}, {"idempotency_key": ""}, "idempotency key is empty"),
        ({"to": "me"}, {"correlation_id": "a\nb"}, "control character"),
    ],
)
async def test_what_does_not_fit_is_refused_and_nothing_is_enqueued(
    payload: object, options: dict[str, Any], text: str
) -> None:
    async with open_room(job(echo.handler, payload=Mail), payload_bytes_max=1000) as room:
        with pytest.raises(MessageRejected, match=text):
            await room.runtime.trigger("job", payload, **options)

        assert (await room.runtime.list_runs())[0] == []


async def test_an_undeclared_payload_must_be_an_object() -> None:
    async with open_room(echo) as room:
        with pytest.raises(MessageRejected, match="must be a JSON object"):
            await room.runtime.trigger("echo", [1, 2])


async def test_a_payload_may_be_an_instance_of_its_class() -> None:
    class Letter(msgspec.Struct):
        to: str

    async def handler(ctx: JobContext[Letter]) -> JobResult[str]:
        return create_success_result(ctx.payload.to)

    async with open_room(job(handler, payload=Letter)) as room:
        run = await room.run("job", Letter("me"))

        assert (json.loads(run.payload), run.result) == ({"to": "me"}, b'"me"')


async def test_a_run_that_is_not_there_is_named() -> None:
    async with open_room(echo) as room:
        with pytest.raises(JobRunNotFound, match="abc"):
            await room.runtime.get_run("abc")


async def test_a_stopped_runtime_cannot_be_started_again() -> None:
    async with open_room(echo) as room:
        await room.runtime.stop()
        await room.runtime.stop()

        with pytest.raises(SagasError, match="make a new one"):
            await room.runtime.start()
