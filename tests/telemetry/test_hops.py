"""A trace goes from hop to hop though nobody records it: one trace id, from whoever asked to whoever did it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import httpx2
import pytest

from sagaloom import SagaMessage, define_saga, saga_complete, schedule, send, spawn
from sagaloom.integration.workers import create_worker_triggers
from sagaloom.publisher import create_saga_publisher, create_sync_saga_publisher
from sagaloom.runtime import SagaRuntime
from sagaloom.service import create_app
from sagaloom.targets import EffectRequest, JobTarget, ServiceTarget, callable_target
from sagaloom.telemetry import Trace, carrying, current_trace
from sagaloom.testing import ManualClock, MemoryStore
from sagaloom.workers import JobContext, JobResult, create_jobs_app, create_success_result, define_job_handler
from tests.doors.http_door import PUBLISH, open_door, serve
from tests.runtime.conftest import Bench, Life
from tests.telemetry.listening import TRACE, TRACE_ID
from tests.workers.jobs_room import open_room

pytestmark = pytest.mark.anyio

FRESH = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-01")
JOBS = "/api/v1/workers/jobs"


def taker(saga_id: str = "s", message_type: str = "Do", effects: Sequence[Any] = ()) -> Any:
    """A saga that answers one type of message with these effects."""
    return define_saga(saga_id).state({}).on(message_type, lambda saga, event, context: list(effects)).build()


async def trace_in(life: Life, saga_id: str, key: str, entry: int = -1) -> tuple[str | None, str | None]:
    found = (await life.history(saga_id, key))[entry]
    return found.traceparent, found.tracestate


# --- Into the service ------------------------------------------------------------------------------------------------


async def history_trace(door: Any, key: str) -> str:
    (entry,) = (await door.get(f"/instances/s/{key}/history")).json()["history"]
    return str(entry["traceparent"])


async def test_over_http_by_the_header_and_by_the_body() -> None:
    async with open_door(taker()) as door:
        await door.client.post(PUBLISH, json={"type": "Do", "correlationId": "a"}, headers={"traceparent": TRACE})
        await door.publish("Do", {}, correlationId="b", traceparent=TRACE)

        assert await history_trace(door, "a") == TRACE
        assert await history_trace(door, "b") == TRACE


async def test_over_http_a_message_without_a_trace_gets_one_of_its_own() -> None:
    async with open_door(taker()) as door:
        await door.publish("Do", {}, correlationId="a")
        await door.post("/publish/batch", {"messages": [{"type": "Do", "correlationId": key} for key in "bc"]})

        traces = [await history_trace(door, key) for key in "abc"]
        assert all(FRESH.fullmatch(trace) for trace in traces)
        assert len(set(traces)) == 3


async def test_a_message_of_the_program_itself_gets_none(bench: Bench) -> None:
    life = await bench.live(taker())

    await life.publish("Do", key="k")

    assert await trace_in(life, "s", "k") == (None, None)


async def test_by_a_publisher_that_is_told_and_by_one_that_is_not() -> None:
    async with open_door(taker()) as door, serve(create_app(door.runtime)) as port:
        async with create_saga_publisher(base_url=f"http://127.0.0.1:{port}") as publisher:
            await publisher.publish("Do", {}, correlation_key="a", traceparent=TRACE)
            with carrying(TRACE):
                await publisher.publish("Do", {}, correlation_key="b")

        assert await history_trace(door, "a") == TRACE
        assert await history_trace(door, "b") == TRACE


# --- Inside ----------------------------------------------------------------------------------------------------------


async def test_to_another_saga(bench: Bench) -> None:
    life = await bench.live(taker(effects=[send("other", SagaMessage("Tell", {}, "o"))]), taker("other", "Tell"))

    await life.publish("Do", key="k", traceparent=TRACE, tracestate="vendor=1")
    await life.runtime.settled()

    assert await trace_in(life, "other", "o") == (TRACE, "vendor=1")


async def test_to_a_target_and_back_with_its_answer(bench: Bench) -> None:
    bench.receiver.answer = lambda effect: [SagaMessage("Answer", {})]
    saga = (
        define_saga("s")
        .state({})
        .on("Do", lambda saga, event, context: [send("service:p", {})])
        .on("Answer", lambda saga, event, context: [], starts=False)
        .build()
    )
    life = await bench.live(saga)

    await life.publish("Do", key="k", traceparent=TRACE, tracestate="vendor=1")
    await life.runtime.settled()

    assert [(effect.traceparent, effect.tracestate) for effect in bench.receiver.got] == [(TRACE, "vendor=1")]
    assert await trace_in(life, "s", "k") == (TRACE, "vendor=1")


async def test_an_answer_may_bring_a_trace_of_its_own(bench: Bench) -> None:
    own = TRACE.replace("00f067aa0ba902b7", "1111111111111111")
    bench.receiver.answer = lambda effect: [SagaMessage("Answer", {}, traceparent=own)]
    saga = (
        define_saga("s")
        .state({})
        .on("Do", lambda saga, event, context: [send("service:p", {})])
        .on("Answer", lambda saga, event, context: [], starts=False)
        .build()
    )
    life = await bench.live(saga)

    await life.publish("Do", key="k", traceparent=TRACE)
    await life.runtime.settled()

    assert await trace_in(life, "s", "k") == (own, None)


async def test_to_a_child_and_back_with_its_end(bench: Bench) -> None:
    parent = (
        define_saga("s")
        .state({})
        .on("Do", lambda saga, event, context: [spawn("child", SagaMessage("Begin", {}, "c"))])
        .on("child:completed", lambda saga, event, context: [], starts=False)
        .build()
    )
    life = await bench.live(parent, taker("child", "Begin", [saga_complete()]))

    await life.publish("Do", key="k", traceparent=TRACE, tracestate="vendor=1")
    await life.runtime.settled()

    assert await trace_in(life, "child", "c") == (TRACE, "vendor=1")
    assert (await life.history("s", "k"))[-1].type == "child:completed"
    assert await trace_in(life, "s", "k") == (TRACE, "vendor=1")


async def test_to_the_parent_of_a_child_that_is_cancelled(bench: Bench) -> None:
    parent = (
        define_saga("s")
        .state({})
        .on("Do", lambda saga, event, context: [spawn("child", SagaMessage("Begin", {}, "c"))])
        .on("child:cancelled", lambda saga, event, context: [], starts=False)
        .build()
    )
    life = await bench.live(parent, taker("child", "Begin"))
    await life.publish("Do", key="k", traceparent=TRACE)
    await life.runtime.settled()

    await life.runtime.cancel("child", "c")
    await life.runtime.settled()

    assert (await life.history("s", "k"))[-1].type == "child:cancelled"
    assert await trace_in(life, "s", "k") == (TRACE, None)


async def test_through_a_timer_and_a_restart(bench: Bench) -> None:
    saga = (
        define_saga("s")
        .state({})
        .on("Do", lambda saga, event, context: [schedule(SagaMessage("Later", {}), "1h")])
        .on("Later", lambda saga, event, context: [], starts=False)
        .build()
    )
    life = await bench.live(saga)
    await life.publish("Do", key="k", traceparent=TRACE, tracestate="vendor=1")
    await bench.die(life)

    life = await bench.live(saga)
    await bench.advance("1h")

    assert (await life.history("s", "k"))[-1].type == "Later"
    assert await trace_in(life, "s", "k") == (TRACE, "vendor=1")


async def test_through_a_dead_letter_and_its_redrive(bench: Bench) -> None:
    broken = [True]

    def handle(saga: Any, event: Any, context: Any) -> Sequence[Any]:
        if broken[0]:
            raise RuntimeError("not today")
        return []

    life = await bench.live(define_saga("s").state({}).on("Do", handle).build())
    await life.publish("Do", key="k", traceparent=TRACE)
    for _ in range(4):
        await bench.advance("1m")
    (letter,) = await life.runtime.dead_letters()

    broken[0] = False
    await life.runtime.redrive(letter.id)
    await life.runtime.settled()

    assert await trace_in(life, "s", "k") == (TRACE, None)


async def test_each_tick_of_a_schedule_begins_a_trace(bench: Bench) -> None:
    seen: list[str] = []

    def tick(saga: Any, event: Any, context: Any) -> Sequence[Any]:
        seen.append(context.traceparent)
        return []

    with carrying(TRACE):
        life = await bench.live(define_saga("s").state({}).on("s:tick", tick).schedule("*/5 * * * *").build())
    await bench.advance("5m")
    await bench.advance("5m")
    await life.runtime.trigger_schedule("s")
    await life.runtime.settled()

    assert len(set(seen)) == 3
    assert all(FRESH.fullmatch(trace) and TRACE_ID not in trace for trace in seen)


# --- Out of the service ----------------------------------------------------------------------------------------------


async def test_to_a_service_in_the_headers_of_its_request() -> None:
    requests: list[httpx2.Request] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        requests.append(request)
        return httpx2.Response(204)

    target = ServiceTarget({"p": "http://payments"}, transport=httpx2.MockTransport(answer))
    saga = taker(effects=[send("service:p", {})])
    async with SagaRuntime(MemoryStore(), definitions=[saga], targets=[target], clock=ManualClock()) as runtime:
        await runtime.publish({"type": "Do", "payload": {}, "traceparent": TRACE, "tracestate": "vendor=1"})
        await runtime.settled()
    await target.close()

    (request,) = requests
    assert (request.headers["traceparent"], request.headers["tracestate"]) == (TRACE, "vendor=1")


async def test_to_a_function_of_the_host_and_on_from_what_it_publishes(bench: Bench) -> None:
    got: list[EffectRequest] = []
    life = await bench.live(taker(effects=[send("email:welcome", {})]), taker("other", "Tell"))

    async def mail(request: EffectRequest) -> None:
        got.append(request)
        await life.publish("Tell", key="o")

    life.runtime.add_target(callable_target("email", mail))
    await life.publish("Do", key="k", traceparent=TRACE, tracestate="vendor=1")
    await life.runtime.settled()

    assert [(request.traceparent, request.tracestate) for request in got] == [(TRACE, "vendor=1")]
    assert await trace_in(life, "other", "o") == (TRACE, "vendor=1")


async def test_a_function_that_runs_in_a_thread_goes_on_in_the_trace_as_well(bench: Bench) -> None:
    seen: list[Trace | None] = []

    def mail(request: EffectRequest) -> None:
        seen.append(current_trace())

    life = await bench.live(taker(effects=[send("email:welcome", {})]))
    life.runtime.add_target(callable_target("email", mail))
    await life.publish("Do", key="k", traceparent=TRACE)
    await life.runtime.settled()
    await life.publish("Do", key="k")
    await life.runtime.settled()

    assert seen == [Trace(TRACE), None]


# --- Through a job ---------------------------------------------------------------------------------------------------


async def test_from_a_trigger_through_a_job_and_its_publish_to_the_effect_of_a_saga() -> None:
    effects: list[EffectRequest] = []
    target = callable_target("email", effects.append)
    async with (
        open_door(taker(effects=[send("email:welcome", {})]), targets=[target]) as door,
        serve(create_app(door.runtime)) as sagas_port,
    ):

        @define_job_handler
        async def greet(ctx: JobContext[dict[str, Any]]) -> JobResult[str]:
            async with create_saga_publisher(base_url=f"http://127.0.0.1:{sagas_port}") as publisher:
                receipt = await publisher.publish("Do", {}, correlation_key="k", wait=5)
            return create_success_result(receipt.raise_for_rejected().message_id)

        async with open_room(greet) as room, serve(create_jobs_app(room.runtime)) as jobs_port:
            async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{jobs_port}") as client:
                await client.post(f"{JOBS}/greet/trigger", json={}, headers={"traceparent": TRACE})
            run = await room.settled()
        await door.runtime.settled()

        assert run.status == "succeeded"
        assert run.traceparent == TRACE
        assert await history_trace(door, "k") == TRACE
        assert [effect.traceparent for effect in effects] == [TRACE]


async def test_a_sync_job_goes_on_in_the_trace_of_its_run() -> None:
    @define_job_handler
    def look(ctx: JobContext[dict[str, Any]]) -> JobResult[Any]:
        return create_success_result([ctx.traceparent, current_trace()])

    async with open_room(look) as room:
        run = await room.run("look", traceparent=TRACE, tracestate="vendor=1")

    assert run.result == f'["{TRACE}",["{TRACE}","vendor=1"]]'.encode()


async def test_a_run_that_is_triggered_without_a_trace_begins_one() -> None:
    @define_job_handler
    async def look(ctx: JobContext[dict[str, Any]]) -> JobResult[str]:
        return create_success_result(ctx.traceparent)

    async with open_room(look) as room:
        run = await room.run("look")

    assert run.traceparent is not None
    assert FRESH.fullmatch(run.traceparent)
    assert run.result == f'"{run.traceparent}"'.encode()


async def test_from_a_saga_to_a_job_and_from_job_to_job() -> None:
    @define_job_handler
    async def second(ctx: JobContext[dict[str, Any]]) -> JobResult[str]:
        return create_success_result(ctx.traceparent)

    @define_job_handler
    async def first(ctx: JobContext[dict[str, Any]]) -> JobResult[None]:
        async with create_worker_triggers(base_url=url) as triggers:
            await triggers.trigger_job("second", {})
        return create_success_result(None)

    async with open_room(first, second) as room, serve(create_jobs_app(room.runtime)) as port:
        url = f"http://127.0.0.1:{port}"
        target = JobTarget(url)
        saga = taker(effects=[send("job:first", {})])
        async with SagaRuntime(MemoryStore(), definitions=[saga], targets=[target], clock=ManualClock()) as runtime:
            await runtime.publish({"type": "Do", "payload": {}, "traceparent": TRACE})
            runs = {(run := await room.settled()).job_id: run for _ in range(2)}
        await target.close()

    assert {name: run.traceparent for name, run in runs.items()} == {"first": TRACE, "second": TRACE}


def test_what_is_carried_is_forgotten_afterwards() -> None:
    with carrying(TRACE, "vendor=1"):
        inside = current_trace()
        with carrying(None):
            nothing = current_trace()

    assert (inside, nothing, current_trace()) == (Trace(TRACE, "vendor=1"), None, None)


def test_a_blocking_publisher_goes_on_in_what_is_carried() -> None:
    bodies: list[bytes] = []

    def fetch(request: Any) -> Any:
        bodies.append(request.content)
        raise ConnectionError("nobody there")

    with create_sync_saga_publisher(base_url="http://sagas", fetcher=fetch, retries=0) as publisher, carrying(TRACE):
        rejected = publisher.publish("Do", {})

    assert not rejected.published
    assert rejected.retryable
    assert [TRACE.encode() in body for body in bodies] == [True]
