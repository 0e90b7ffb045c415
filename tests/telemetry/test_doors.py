"""The doors: which kind of span a publish over the network has, and the trace in log lines."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx2
import pytest
from opentelemetry.propagate import extract
from opentelemetry.trace import SpanKind
from starlette.types import ASGIApp, Receive, Scope, Send

from sagaloom import SagasError, define_saga, send
from sagaloom.cli.logs import configure_logs
from sagaloom.runtime import SagaRuntime
from sagaloom.service import create_app
from sagaloom.telemetry import carrying
from sagaloom.testing import ManualClock, MemoryStore
from sagaloom.web.problems import answer_error
from sagaloom.workers import JobContext, JobResult, create_success_result, define_job_handler
from tests.doors.http_door import PREFIX, PUBLISH
from tests.runtime.conftest import Bench
from tests.telemetry.listening import SPAN_ID, TRACE, TRACE_ID, Listener, attributes_of, parent_id, span_id, trace_id
from tests.workers.jobs_room import open_room

pytestmark = pytest.mark.anyio


class Instrumented:
    """An application behind a server span, as the instrumentations of web servers make them."""

    def __init__(self, app: ASGIApp, listener: Listener) -> None:
        self._app = app
        self._tracer = listener.tracer_provider.get_tracer("server")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        with self._tracer.start_as_current_span("POST", context=extract(headers), kind=SpanKind.SERVER):
            await self._app(scope, receive, send)


@contextlib.asynccontextmanager
async def open_client(listener: Listener, *, is_instrumented: bool = False) -> AsyncIterator[httpx2.AsyncClient]:
    saga = define_saga("s").state({}).on("Do", lambda saga, event, context: []).build()
    runtime = SagaRuntime(MemoryStore(), definitions=[saga], clock=ManualClock(), telemetry=listener.providers)
    async with runtime:
        app = create_app(runtime)
        transport = httpx2.ASGITransport(Instrumented(app, listener) if is_instrumented else app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://sagas") as client:
            yield client


# --- Publishing over HTTP --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_header", [True, False])
async def test_a_publish_over_http_is_a_server_span_under_the_callers(listener: Listener, in_header: bool) -> None:
    headers, body = ({"traceparent": TRACE}, {}) if in_header else ({}, {"traceparent": TRACE})
    async with open_client(listener) as client:
        answer = await client.post(PUBLISH, headers=headers, json={"type": "Do", "idempotencyKey": "i", **body})

    publish, handle = listener.the("saga.publish"), listener.the("saga.handle")
    assert (publish.kind, trace_id(publish), parent_id(publish)) == (SpanKind.SERVER, TRACE_ID, SPAN_ID)
    assert parent_id(handle) == span_id(publish)
    assert dict(attributes_of(publish)) == {
        "netscript.saga.event.type": "Do",
        "netscript.saga.correlation_key": "s:Do",
        "netscript.idempotency.key": "i",
        "messaging.message.id": answer.json()["messageId"],
        "netscript.outcome": "success",
    }


async def test_without_a_context_of_the_caller_the_publish_is_the_root(listener: Listener) -> None:
    async with open_client(listener) as client:
        await client.post(PUBLISH, json={"type": "Do"})

    assert listener.the("saga.publish").parent is None


async def test_behind_a_server_span_the_publish_is_part_of_it(listener: Listener) -> None:
    async with open_client(listener, is_instrumented=True) as client:
        await client.post(PUBLISH, headers={"traceparent": TRACE}, json={"type": "Do"})

    server, publish = listener.the("POST"), listener.the("saga.publish")
    assert (publish.kind, parent_id(publish)) == (SpanKind.PRODUCER, span_id(server))
    assert {trace_id(span) for span in listener.spans()} == {TRACE_ID}


async def test_each_message_of_a_batch_has_a_span_under_its_own_context(listener: Listener) -> None:
    own = TRACE.replace(TRACE_ID, "1" * 32)
    async with open_client(listener) as client:
        messages = [{"type": "Do", "traceparent": own}, {"type": "Do"}]
        await client.post(f"{PREFIX}/publish/batch", headers={"traceparent": TRACE}, json={"messages": messages})

    assert {trace_id(span) for span in listener.spans("saga.publish")} == {"1" * 32, TRACE_ID}
    assert {trace_id(span) for span in listener.spans("saga.handle")} == {"1" * 32, TRACE_ID}


# --- Log lines -------------------------------------------------------------------------------------------------------


class Lines:
    """What the doors write to stderr, as JSON. Begins with the test: pytest's streams are others before."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def begin(self) -> None:
        configure_logs()

    def read(self, containing: str) -> dict[str, Any]:
        """The only line with this text in its event."""
        lines = [json.loads(line) for line in self._capsys.readouterr().err.splitlines()]
        (found,) = [line for line in lines if containing in line["event"]]
        return dict(found)


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Iterator[Lines]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield Lines(capsys)
    root.handlers[:] = handlers
    root.setLevel(level)


def test_a_line_without_a_trace_names_none(lines: Lines) -> None:
    lines.begin()
    logging.getLogger("host").info("hello")

    assert lines.read("hello").keys().isdisjoint({"trace_id", "span_id"})


def test_a_line_names_the_trace_that_is_carried(lines: Lines) -> None:
    lines.begin()
    with carrying(TRACE):
        logging.getLogger("host").info("hello")

    line = lines.read("hello")
    assert (line["trace_id"], line["span_id"]) == (TRACE_ID, SPAN_ID)


def test_what_is_no_trace_is_left_out(lines: Lines) -> None:
    lines.begin()
    with carrying("nonsense"):
        logging.getLogger("host").info("hello")

    assert "trace_id" not in lines.read("hello")


def test_a_line_names_the_current_span(lines: Lines, listener: Listener) -> None:
    lines.begin()
    with listener.tracer_provider.get_tracer("host").start_as_current_span("work") as span, carrying(TRACE):
        logging.getLogger("host").info("hello")

    line, context = lines.read("hello"), span.get_span_context()
    assert (line["trace_id"], line["span_id"]) == (f"{context.trace_id:032x}", f"{context.span_id:016x}")


def test_the_log_line_of_an_error_has_the_trace_of_its_answer(lines: Lines) -> None:
    lines.begin()
    headers = [(b"traceparent", TRACE.encode())]

    _, _, body = answer_error(SagasError("broken", code="INTERNAL"), headers)

    assert json.loads(body)["traceId"] == lines.read("broken")["trace_id"] == TRACE_ID


async def test_lines_about_a_delivery_and_from_a_job_name_their_trace(bench: Bench, lines: Lines) -> None:
    lines.begin()
    bench.receiver.answer = lambda effect: SagasError("no mailbox", retryable=False)
    saga = define_saga("s").state({}).on("Do", lambda saga, event, context: [send("service:mail", {})]).build()
    life = await bench.live(saga)

    @define_job_handler
    def greet(ctx: JobContext[dict[str, Any]]) -> JobResult[None]:
        logging.getLogger("host").info("hello")
        return create_success_result(None)

    await life.publish("Do", key="k", traceparent=TRACE)
    await life.runtime.settled()
    assert lines.read("given up")["trace_id"] == TRACE_ID

    async with open_room(greet) as room:
        await room.run("greet", traceparent=TRACE)
    assert lines.read("hello")["trace_id"] == TRACE_ID
