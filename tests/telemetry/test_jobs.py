"""What a job runtime records, and one trace from a trigger on 8091 to the effect of a saga."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest
from opentelemetry import trace
from opentelemetry.trace import SpanKind, StatusCode

from sagaloom import RetryPolicy, define_saga, send
from sagaloom.publisher import create_saga_publisher
from sagaloom.runtime import SagaRuntime
from sagaloom.service import create_app
from sagaloom.targets import EffectRequest, callable_target
from sagaloom.testing import ManualClock, MemoryStore
from sagaloom.workers import JobContext, JobResult, create_jobs_app, create_success_result, define_job_handler
from tests.doors.http_door import serve
from tests.telemetry.listening import (
    SPAN_ID,
    TRACE,
    TRACE_ID,
    Listener,
    attributes_of,
    parent_id,
    span_id,
    trace_id,
    traceparent,
)
from tests.workers.jobs_room import open_room

pytestmark = pytest.mark.anyio


async def test_from_a_trigger_through_job_publish_and_saga_to_the_effect_it_is_one_trace(listener: Listener) -> None:
    effects: list[EffectRequest] = []
    saga = define_saga("s").state({}).on("Do", lambda saga, event, context: [send("email:hello", {})]).build()
    sagas = SagaRuntime(
        MemoryStore(),
        definitions=[saga],
        targets=[callable_target("email", effects.append)],
        clock=ManualClock(),
        telemetry=listener.providers,
    )

    @define_job_handler
    async def greet(ctx: JobContext[dict[str, Any]]) -> JobResult[str]:
        async with create_saga_publisher(base_url=f"http://127.0.0.1:{sagas_port}") as publisher:
            receipt = await publisher.publish("Do", {}, correlation_key="k", wait=5)
        return create_success_result(receipt.raise_for_rejected().message_id)

    async with (
        sagas,
        serve(create_app(sagas)) as sagas_port,
        open_room(greet, telemetry=listener.providers) as room,
        serve(create_jobs_app(room.runtime)) as jobs_port,
        httpx2.AsyncClient(base_url=f"http://127.0.0.1:{jobs_port}") as client,
    ):
        await client.post("/api/v1/workers/jobs/greet/trigger", json={}, headers={"traceparent": TRACE})
        await room.settled()
        await room.runtime.stop()
        await sagas.settled()

    order = ["job.trigger", "job.run", "saga.publish", "saga.handle", "saga.cascade.send"]
    spans = [listener.the(name) for name in order]
    assert [span.name for span in listener.spans()] == order
    assert {trace_id(span) for span in spans} == {TRACE_ID}
    assert [parent_id(span) for span in spans] == [SPAN_ID, *(span_id(span) for span in spans[:-1])]
    assert [span.kind for span in spans[:3]] == [SpanKind.PRODUCER, SpanKind.CONSUMER, SpanKind.SERVER]
    assert [effect.traceparent for effect in effects] == [traceparent(spans[-1])]


async def test_each_attempt_of_a_run_has_a_span_beside_the_others(listener: Listener) -> None:
    @define_job_handler(retry=RetryPolicy(jitter=0.0))
    async def shaky(ctx: JobContext[dict[str, Any]]) -> JobResult[None]:
        if ctx.attempt == 1:
            raise ConnectionError("not yet")
        return create_success_result(None)

    async with open_room(shaky, telemetry=listener.providers) as room:
        run = await room.run("shaky", {}, correlation_id="c", idempotency_key="i")
        room.clock.advance("1s")
        await room.settled()
        await room.runtime.stop()

    trigger = listener.the("job.trigger")
    first, second = listener.spans("job.run")
    assert dict(attributes_of(trigger)) == {
        "netscript.job.id": "shaky",
        "netscript.job.run.id": run.run_id,
        "netscript.correlation.id": "c",
        "netscript.idempotency.key": "i",
        "netscript.outcome": "success",
    }
    assert (parent_id(first), parent_id(second)) == (span_id(trigger), span_id(trigger))
    assert dict(attributes_of(first)) == {
        "netscript.job.id": "shaky",
        "netscript.job.run.id": run.run_id,
        "netscript.job.attempt": 1,
        "netscript.correlation.id": "c",
        "netscript.outcome": "error",
        "error.type": "JOB_HANDLER_FAILED",
    }
    assert first.status.status_code is StatusCode.ERROR
    assert attributes_of(second)["netscript.job.attempt"] == 2
    assert attributes_of(second)["netscript.outcome"] == "success"


async def test_a_handler_works_in_the_span_of_its_attempt(listener: Listener) -> None:
    seen: list[tuple[str, int]] = []

    @define_job_handler
    def sync(ctx: JobContext[dict[str, Any]]) -> JobResult[None]:
        seen.append((ctx.traceparent, trace.get_current_span().get_span_context().span_id))
        return create_success_result(None)

    async with open_room(sync, telemetry=listener.providers) as room:
        await room.run("sync")
        await room.runtime.stop()

    run = listener.the("job.run")
    assert run.context is not None
    assert seen == [(traceparent(run), run.context.span_id)]


async def test_a_trigger_that_is_repeated_is_skipped_and_one_that_is_refused_an_error(listener: Listener) -> None:
    @define_job_handler
    async def greet(ctx: JobContext[dict[str, Any]]) -> JobResult[None]:
        return create_success_result(None)

    async with open_room(greet, telemetry=listener.providers) as room:
        await room.run("greet", {}, idempotency_key="i")
        await room.runtime.trigger("greet", {}, idempotency_key="i")
        with pytest.raises(Exception, match="idempotency key"):
            await room.runtime.trigger("greet", {"other": 1}, idempotency_key="i")

    assert [attributes_of(span)["netscript.outcome"] for span in listener.spans("job.trigger")] == [
        "success",
        "skipped",
        "error",
    ]
