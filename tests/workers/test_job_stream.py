"""`GET /runs/subscribe`, on a real socket, and the operators' routes beside it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any, NamedTuple

import httpx2
import pytest

from sagaloom.errors import ConfigurationError
from sagaloom.workers import (
    JobContext,
    JobResult,
    JobSchedule,
    create_failure_result,
    create_jobs_app,
    create_success_result,
    define_job_handler,
)
from sagaloom.workers.registry import ModuleTrouble
from tests.doors.http_door import serve
from tests.doors.sse import Subscriber, Told, subscribed
from tests.workers.jobs_room import Room, SharedMemory, open_room

PREFIX = "/api/v1/workers"
PATH = f"{PREFIX}/runs/subscribe"
Ctx = JobContext[dict[str, Any]]


@define_job_handler
async def mail(ctx: Ctx) -> JobResult[Any]:
    if "fail" in ctx.payload:
        return create_failure_result("no paper")
    ctx.progress(0.5, "half")
    return create_success_result(None)


@define_job_handler(run_in="process", schedule=JobSchedule("0 3 * * *", payload={}), heartbeat_timeout="30s")
def report(ctx: Ctx) -> JobResult[Any]:
    return create_success_result(None)


class Served(NamedTuple):
    room: Room
    port: int


@contextlib.asynccontextmanager
async def serving(*, kv: SharedMemory | None = None, **app_options: Any) -> AsyncIterator[Served]:
    async with (
        open_room(mail, report, kv=kv) as room,
        serve(create_jobs_app(room.runtime, **app_options)) as port,
    ):
        yield Served(room, port)
        room.runtime.feed.close()


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving() as made:
        yield made


def types_of(told: list[Told]) -> list[str]:
    return [one.event for one in told]


async def post(served: Served, path: str, body: Any = None) -> httpx2.Response:
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{served.port}{PREFIX}") as client:
        return await client.post(path, json=body)


async def get(served: Served, path: str) -> Any:
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{served.port}") as client:
        return (await client.get(path)).json()


# --- The stream ------------------------------------------------------------------------------------------------------


async def test_what_happens_to_a_run_is_told_as_it_happens(served: Served) -> None:
    async with subscribed(served.port, path=PATH) as stream:
        first = await stream.next()
        receipt = await served.room.runtime.trigger("mail", {}, correlation_id="c-1")
        told = await stream.take(3)

    assert stream.status == 200
    assert first is not None
    assert (first.event, first.id, stream.retry) == ("heartbeat", 0, 2000)
    assert types_of(told)[:2] == ["run:pending", "run:running"]
    assert [one.id for one in told] == [1, 2, 3]
    assert told[0].data == {
        "type": "run:pending",
        "timestamp": "2026-01-01T00:00:00.000Z",
        "jobId": "mail",
        "runId": receipt.run_id,
        "attempt": 0,
        "correlationId": "c-1",
    }


async def test_a_reader_who_was_cut_off_misses_nothing(served: Served) -> None:
    async with subscribed(served.port, path=PATH) as stream:
        await stream.next()
        await served.room.run("mail", {"fail": 1})
        before = await stream.take(2)
    await served.room.run("mail", {"fail": 1})
    async with subscribed(served.port, before[-1].id, path=PATH) as stream:
        after = await stream.take(4)

    assert [one.id for one in before + after] == [1, 2, 3, 4, 5, 6]
    assert types_of(before + after) == ["run:pending", "run:running", "run:failed"] * 2
    assert after[0].data["detail"] == "no paper"


async def test_what_another_process_does_is_told_too() -> None:
    kv = SharedMemory()
    async with serving(kv=kv) as here, serving(kv=kv) as there, subscribed(here.port, path=PATH) as stream:
        await stream.next()
        await there.room.runtime.trigger("mail", {}, delay="5m")

        assert types_of(await stream.take(1)) == ["run:pending"]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"type": "run:failed,run:cancelled"}, ["run:failed", "run:cancelled"]),
        ({"jobId": "report"}, ["run:pending", "run:cancelled"]),
        ({"correlationId": "c-2", "type": "run:pending"}, ["run:pending"]),
    ],
)
async def test_a_reader_gets_what_it_asked_for(served: Served, params: dict[str, str], expected: list[str]) -> None:
    await served.room.run("mail", {"fail": 1}, correlation_id="c-2")
    waiting = await served.room.runtime.trigger("report", delay="5m")
    await served.room.runtime.cancel(waiting.run_id)

    async with subscribed(served.port, path=PATH, after=0, **params) as stream:
        assert types_of(await stream.take(len(expected))) == expected


async def test_a_place_that_leads_nowhere_is_told_once(served: Served) -> None:
    await served.room.run("mail", {"fail": 1})

    async with subscribed(served.port, 4711, path=PATH) as stream:
        told = await stream.take(4)

    assert types_of(told) == ["reset", "run:pending", "run:running", "run:failed"]


async def test_a_place_that_was_forgotten_is_told_once(served: Served) -> None:
    for _ in range(2):
        await served.room.run("mail", {"fail": 1})
    await served.room.store.prune_events(before=served.room.clock.now() + timedelta(days=1), limit=4)

    async with subscribed(served.port, 1, path=PATH) as stream:
        told = await stream.take(3)

    assert [(one.event, one.id) for one in told] == [("reset", 4), ("run:running", 5), ("run:failed", 6)]


async def test_a_quiet_stream_says_that_it_lives() -> None:
    async with serving(heartbeat_seconds=0.05) as served, subscribed(served.port, path=PATH) as stream:
        told = [await stream.next() for _ in range(3)]

    assert [one.event for one in told if one is not None] == ["heartbeat"] * 3


async def test_many_readers_get_the_same(served: Served) -> None:
    async with contextlib.AsyncExitStack() as stack:
        streams: list[Subscriber] = []
        for _ in range(20):
            streams.append(await stack.enter_async_context(subscribed(served.port, path=PATH)))
            await streams[-1].next()
        await served.room.run("mail", {"fail": 1})
        told = [types_of(await stream.take(3)) for stream in streams]

    assert told == [["run:pending", "run:running", "run:failed"]] * 20


async def test_a_stream_ends_when_the_runtime_stops(served: Served) -> None:
    async with subscribed(served.port, path=PATH) as stream:
        await stream.next()
        await served.room.runtime.stop()

        assert await stream.next() is None


@pytest.mark.parametrize(
    ("params", "text"), [({"after": "yesterday"}, "no number of an event"), ({"type": "run:lost"}, "no event of runs")]
)
async def test_what_cannot_be_subscribed_to_is_refused(served: Served, params: dict[str, str], text: str) -> None:
    async with subscribed(served.port, path=PATH, **params) as answer:
        assert answer.status == 422
        assert text in (await answer.body())["message"]


# --- Operators -------------------------------------------------------------------------------------------------------


async def test_a_run_is_cancelled_and_redriven_over_http(served: Served) -> None:
    receipt = await served.room.runtime.trigger("report", delay="5m")

    cancelled = await post(served, f"/runs/{receipt.run_id}/cancel", {"reason": "not needed"})
    redriven = await post(served, f"/runs/{receipt.run_id}/redrive")
    refused = await post(served, f"/runs/{receipt.run_id}/redrive")
    unknown = await post(served, "/runs/nowhere/cancel")

    assert (cancelled.status_code, redriven.status_code) == (200, 200)
    assert (cancelled.json()["status"], cancelled.json()["cancelReason"]) == ("cancelled", "not needed")
    assert redriven.json()["status"] == "pending"
    assert (refused.status_code, refused.json()["code"]) == (409, "JOB_RUN_NOT_OVER")
    assert (unknown.status_code, unknown.json()["code"]) == (404, "JOB_RUN_NOT_FOUND")


async def test_a_task_is_a_job_by_another_word(served: Served) -> None:
    answer = await post(served, "/tasks/mail/trigger", {"payload": {}})

    assert (answer.status_code, answer.json()["jobId"]) == (202, "mail")


async def test_a_job_shows_where_and_when_it_runs(served: Served) -> None:
    found = await get(served, f"{PREFIX}/jobs/report")

    assert (found["runIn"], found["heartbeatTimeoutSeconds"]) == ("process", 30.0)
    assert found["schedule"] == {
        "cron": "0 3 * * *",
        "timezone": "UTC",
        "catchUp": "latest",
        "nextTickAt": "2026-01-01T03:00:00.000Z",
    }


async def test_modules_that_could_not_be_loaded_are_told() -> None:
    trouble = ModuleTrouble("shop.mail", ConfigurationError("Job registry module shop.mail cannot be loaded: no"))
    async with serving(problems=[trouble]) as served:
        listed, health = await get(served, f"{PREFIX}/jobs"), await get(served, "/health")

    expected = [{"module": "shop.mail", "problem": "Job registry module shop.mail cannot be loaded: no"}]
    assert listed["problems"] == health["problems"] == expected
    assert health["status"] == "healthy"
