"""What is said about a run while it is under way, and by whom it is ended."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from datetime import timedelta
from typing import Any

import pytest

from sagaloom import DefinitionError, RetryPolicy
from sagaloom.errors import BackendUnavailable, JobRunNotFound, MessageRejected
from sagaloom.ports.jobs import JobRun
from sagaloom.workers import (
    JobContext,
    JobDefinition,
    JobResult,
    create_failure_result,
    create_success_result,
    define_job_handler,
)
from tests.workers.jobs_room import PATIENCE_SECONDS, Room, SharedMemory, open_room

Ctx = JobContext[dict[str, Any]]
ONCE = RetryPolicy(maximum_attempts=1)


def job(fn: Any, **options: Any) -> JobDefinition[Any]:
    return define_job_handler(fn, id="job", **options)


class Handler:
    """An async handler that says when it has begun, and goes on when it is let."""

    def __init__(self, work: Any = None) -> None:
        self.begun = asyncio.Event()
        self.go_on = asyncio.Event()
        self._work = work

    async def __call__(self, ctx: Ctx) -> JobResult[Any]:
        self.begun.set()
        if self._work is not None:
            await self._work(ctx)
        await self.go_on.wait()
        return create_success_result("done")


async def until(look: Any) -> Any:
    """What `look` finds, once it finds something."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not (found := await look()):  # noqa: ASYNC110 - what a test looks for has no event
            await asyncio.sleep(0.005)
        return found


async def begun(room: Room, handler: Handler) -> str:
    """Triggers a run, and returns its id when its handler has begun."""
    receipt = await room.runtime.trigger("job")
    async with asyncio.timeout(PATIENCE_SECONDS):
        await handler.begun.wait()
    return receipt.run_id


# --- What handlers say -----------------------------------------------------------------------------------------------


async def test_progress_and_log_are_seen_while_the_job_runs() -> None:
    async def work(ctx: Ctx) -> None:
        ctx.progress(0.25, "reading")
        ctx.log.info("page %d of %d", 1, 4)

    handler = Handler(work)
    async with open_room(job(handler)) as room:
        run_id = await begun(room, handler)

        async def look() -> JobRun | None:
            run = await room.runtime.get_run(run_id)
            return run if run.progress is not None and run.log else None

        run = await until(look)
        handler.go_on.set()
        done = await room.settled()

        assert (run.status, run.progress.fraction, run.progress.message) == ("running", 0.25, "reading")
        assert [(line.level, line.text) for line in run.log] == [("info", "page 1 of 4")]
        assert (done.progress, done.log) == (run.progress, run.log)


async def test_what_is_said_just_before_the_end_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    def handler(ctx: Ctx) -> JobResult[None]:
        for number in range(50):
            ctx.log.warning("line %d", number)
        ctx.progress(1)
        return create_failure_result("no")

    with caplog.at_level(logging.INFO, "sagaloom.job.job"):
        async with open_room(job(handler)) as room:
            run = await room.run("job")

    assert [line.text for line in run.log] == [f"line {number}" for number in range(50)]
    assert run.progress is not None
    assert run.progress.fraction == 1.0
    assert "line 49" in caplog.text


async def test_what_could_not_be_written_down_is_written_down_later() -> None:
    async def work(ctx: Ctx) -> None:
        ctx.log.info("hello")

    handler = Handler(work)
    async with open_room(job(handler)) as room:
        store, note = room.store, room.store.note

        async def failing(*args: Any) -> None:
            store.note = note  # type: ignore[method-assign]
            raise BackendUnavailable("not now")

        store.note = failing  # type: ignore[method-assign]
        await begun(room, handler)
        handler.go_on.set()
        run = await room.settled()

    assert [line.text for line in run.log] == ["hello"]


@pytest.mark.parametrize("fraction", [-0.1, 1.5, True, float("nan"), "half"])
def test_a_progress_that_is_no_part_of_one_is_refused(fraction: Any) -> None:
    with pytest.raises(DefinitionError, match="from 0 to 1"):
        a_context().progress(fraction)


def test_a_progress_that_says_nothing_is_refused() -> None:
    with pytest.raises(DefinitionError, match="words"):
        a_context().progress()


def a_context() -> Ctx:
    from datetime import UTC, datetime

    now = datetime(2026, 1, 1, tzinfo=UTC)
    return JobContext(
        job_id="job",
        run_id="1",
        attempt=1,
        payload={},
        now=now,
        deadline_at=now,
        idempotency_key="k",
        traceparent="00-a",
    )


def test_a_context_of_a_test_may_be_spoken_to() -> None:
    ctx = a_context()

    ctx.progress(0.5)
    ctx.heartbeat()
    ctx.log.info("%d is no text: %s", "a slip")  # noqa: PLE1206
    ctx.raise_if_cancelled()

    assert not ctx.is_cancelled


# --- Silence ---------------------------------------------------------------------------------------------------------


async def test_a_handler_that_gives_no_sign_of_life_is_taken_to_hang() -> None:
    handler = Handler()
    async with open_room(job(handler, heartbeat_timeout="50ms", retry=ONCE)) as room:
        run = await room.run("job")

    assert run.failure is not None
    assert (run.status, run.failure.code) == ("failed", "JOB_SILENT")
    assert "no sign of life for 0.05 s" in run.failure.message


async def test_a_handler_that_gives_signs_of_life_may_take_its_time() -> None:
    def handler(ctx: Ctx) -> JobResult[str]:
        # Much more often than it must, for a busy machine lets nobody wake up in time.
        for _ in range(110):
            time.sleep(0.02)
            ctx.heartbeat()
        return create_success_result("done")

    async with open_room(job(handler, heartbeat_timeout="2s")) as room:
        assert (await room.run("job")).status == "succeeded"


# --- Cancelling ------------------------------------------------------------------------------------------------------


async def test_a_run_that_waits_is_cancelled_at_once() -> None:
    handler = Handler()
    async with open_room(job(handler)) as room:
        receipt = await room.runtime.trigger("job", delay="5m")

        run = await room.runtime.cancel(receipt.run_id, reason="not needed")
        await room.clock.advance_through("10m")

        assert (run.status, run.cancel_reason) == ("cancelled", "not needed")
        assert not handler.begun.is_set()


async def test_an_async_handler_is_cancelled_and_may_clean_up() -> None:
    tidied: list[bool] = []

    async def work(ctx: Ctx) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            tidied.append(ctx.is_cancelled)

    handler = Handler(work)
    async with open_room(job(handler)) as room:
        asked = await room.runtime.cancel(await begun(room, handler), reason="enough")
        run = await room.settled()

        assert (asked.status, run.status, run.cancel_reason) == ("running", "cancelled", "enough")
        assert tidied == [True]
        assert [one.outcome for one in run.history] == ["cancelled"]


async def test_a_sync_handler_asks_whether_it_is_cancelled() -> None:
    started = threading.Event()

    def handler(ctx: Ctx) -> JobResult[None]:
        started.set()
        while True:
            ctx.raise_if_cancelled()
            time.sleep(0.005)

    async with open_room(job(handler)) as room:
        receipt = await room.runtime.trigger("job")
        await asyncio.to_thread(started.wait, PATIENCE_SECONDS)
        await room.runtime.cancel(receipt.run_id)

        assert (await room.settled()).status == "cancelled"


async def test_a_sync_handler_that_does_not_listen_is_left_behind_after_a_while() -> None:
    started, release = threading.Event(), threading.Event()

    def handler(ctx: Ctx) -> JobResult[None]:
        started.set()
        release.wait(PATIENCE_SECONDS)
        return create_success_result(None)

    async with open_room(job(handler), cancel_grace_seconds=0.05) as room:
        receipt = await room.runtime.trigger("job")
        await asyncio.to_thread(started.wait, PATIENCE_SECONDS)
        await room.runtime.cancel(receipt.run_id)
        run = await room.settled()
        taken = room.runtime.health().running
        release.set()

        async def look() -> bool:
            return room.runtime.health().running == 0

        assert run.status == "cancelled"
        assert taken >= 1
        assert await until(look)


async def test_what_a_handler_returns_although_it_was_cancelled_counts() -> None:
    async def stubborn(ctx: Ctx) -> JobResult[str]:
        handler.begun.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return create_success_result("it was too late to stop")
        return create_success_result("never")

    handler = Handler()
    async with open_room(job(stubborn)) as room:
        await room.runtime.cancel(await begun(room, handler))
        run = await room.settled()

        assert (run.status, run.result) == ("succeeded", b'"it was too late to stop"')


async def test_a_cancelled_run_is_not_tried_again() -> None:
    async def clumsy(ctx: Ctx) -> JobResult[str]:
        handler.begun.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise OSError("while tidying up") from None
        return create_success_result("never")

    handler = Handler()
    async with open_room(job(clumsy)) as room:
        await room.runtime.cancel(await begun(room, handler))
        run = await room.settled()

        assert run.failure is not None
        assert (run.status, run.failure.message) == ("cancelled", "OSError: while tidying up")


async def test_a_cancellation_in_another_process_reaches_the_handler() -> None:
    handler, kv = Handler(), SharedMemory()
    async with (
        open_room(job(handler), kv=kv) as room,
        open_room(define_job_handler(handler, id="other"), kv=kv, clock=room.clock) as elsewhere,
    ):
        asked = await elsewhere.runtime.cancel(await begun(room, handler))
        await room.clock.advance_through("3s")

        assert asked.status == "running"
        assert (await room.settled()).status == "cancelled"


async def test_a_run_that_was_cancelled_while_nobody_held_it_is_not_begun() -> None:
    kv, handler = SharedMemory(), Handler()
    async with open_room(job(handler), kv=kv, is_started=False) as room:
        receipt = await room.runtime.trigger("job")
        clock = room.clock
        moment = clock.now()
        await room.store.claim("gone", ["job"], now=moment, until=moment + timedelta(seconds=6), limit=1)
        await room.runtime.cancel(receipt.run_id, reason="enough")
        clock.advance("10s")
        await room.runtime.start()
        run = await room.settled()

        assert (run.status, [one.outcome for one in run.history]) == ("cancelled", ["lost", "cancelled"])
        assert not handler.begun.is_set()


async def test_cancelling_what_is_over_or_was_never_there() -> None:
    async def echo(ctx: Ctx) -> JobResult[Any]:
        return create_success_result(1)

    async with open_room(job(echo)) as room:
        done = await room.run("job")

        assert await room.runtime.cancel(done.run_id) == done
        with pytest.raises(JobRunNotFound):
            await room.runtime.cancel("f" * 32)


# --- Redriving -------------------------------------------------------------------------------------------------------


async def test_a_failed_run_begins_anew_when_it_is_redriven() -> None:
    is_mended = False

    async def handler(ctx: Ctx) -> JobResult[Any]:
        return create_success_result(ctx.attempt) if is_mended else create_failure_result("broken")

    async with open_room(job(handler)) as room:
        failed = await room.run("job")
        is_mended = True
        waiting = await room.runtime.redrive(failed.run_id)
        run = await room.settled()

        assert (failed.status, waiting.status) == ("failed", "pending")
        assert (run.status, run.result, run.run_id) == ("succeeded", b"1", failed.run_id)
        with pytest.raises(MessageRejected) as caught:
            await room.runtime.redrive(run.run_id)
        assert caught.value.code == "JOB_RUN_NOT_OVER"


# --- How much there is -----------------------------------------------------------------------------------------------


async def test_a_full_backlog_takes_no_more_and_says_so() -> None:
    handler = Handler()
    async with open_room(job(handler), backlog_max=3, concurrency=1) as room:
        await begun(room, handler)
        for _ in range(3):
            await room.runtime.trigger("job")
        with pytest.raises(BackendUnavailable) as caught:
            await room.runtime.trigger("job")
        handler.go_on.set()
        for _ in range(4):
            await room.settled()
        after = await room.runtime.trigger("job")

        assert (caught.value.code, caught.value.retryable) == ("JOB_BACKLOG_FULL", True)
        assert not after.duplicate


async def test_runs_are_forgotten_after_a_while() -> None:
    async def echo(ctx: Ctx) -> JobResult[Any]:
        return create_success_result(1)

    async with open_room(job(echo), runs_kept_days=1, events_kept_hours=1) as room:
        old = await room.run("job", idempotency_key="k")
        room.clock.advance("23h")
        young = await room.run("job")
        kept = await room.runtime.get_run(old.run_id)
        room.clock.advance("2h")

        async def look() -> bool:
            return await room.store.get(old.run_id) is None

        assert kept == old
        assert await until(look)
        assert (await room.runtime.get_run(young.run_id)).status == "succeeded"
        assert not (await room.runtime.trigger("job", idempotency_key="k")).duplicate


async def test_a_clock_that_jumps_costs_an_attempt_and_leaves_one_result() -> None:
    handler, kv = Handler(), SharedMemory()
    async with open_room(job(handler), kv=kv) as room, open_room(job(handler), kv=kv) as ahead:
        run_id = await begun(room, handler)
        handler.begun.clear()
        ahead.clock.advance("2d")
        async with asyncio.timeout(PATIENCE_SECONDS):
            await handler.begun.wait()
        handler.go_on.set()
        run = await ahead.settled()
        await asyncio.sleep(0.05)

        assert (run.run_id, run.status, run.attempt) == (run_id, "succeeded", 2)
        assert [one.outcome for one in run.history] == ["lost", "succeeded"]
        assert await room.runtime.get_run(run_id) == run
