"""What a saga runtime records: which spans, under which parents, and what they say."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.trace import SpanKind, StatusCode

from sagaloom import (
    ALL_STEPS,
    RetryPolicy,
    SagaDefinition,
    SagaMessage,
    SagasError,
    define_saga,
    saga_compensate,
    saga_complete,
    saga_fail,
    schedule,
    send,
    spawn,
)
from sagaloom.errors import BackendUnavailable, DeliveryFailed
from sagaloom.ports.store import CommitResult, Conflict, Lease, UnitOfWork
from sagaloom.runtime import PublishRejected, SagaRuntime
from sagaloom.telemetry import TelemetryProviders
from sagaloom.testing import ManualClock, MemoryStore
from sagaloom.testing.faults import Faults
from tests.runtime.conftest import Bench, Receiver
from tests.telemetry.listening import (
    SPAN_ID,
    TRACE,
    TRACE_ID,
    Listener,
    attributes_of,
    parent_id,
    span_id,
    statuses,
    trace_id,
    traceparent,
)

pytestmark = pytest.mark.anyio


def _handle(saga: Any, event: Any, context: Any) -> Sequence[Any]:
    match event.payload.get("do"):
        case "charge":
            return [send("service:payments", {"amount": 1})]
        case "fail" if context.attempt < event.payload["until"]:
            raise ConnectionError("not yet")
        case "break":
            raise SagasError("never", code="BROKEN", retryable=False)
        case "end":
            return [saga_complete({"done": True})]
        case "give up":
            return [saga_fail("no stock")]
        case "undo":
            return [saga_compensate(SagaMessage("Do", {}), "changed my mind")]
        case "undo all":
            return [saga_compensate(ALL_STEPS, "changed my mind")]
        case "ask":
            return [
                schedule(SagaMessage("Later", {}), "1h"),
                spawn("child", {"x": 1}),
                send("other", SagaMessage("Tell", {}, "t-1")),
            ]
    return []


def _undo(saga: Any, event: Any, context: Any) -> Sequence[Any]:
    return [send("service:payments", {"refund": 1})]


def parent_saga(durability: Any = "t1") -> SagaDefinition[Any]:
    return (
        define_saga("s")
        .durability(durability)
        .state({})
        .on("Do", _handle)
        .on("Charged", lambda saga, event, context: [], starts=False)
        .on("Later", lambda saga, event, context: [], starts=False)
        .on("child:completed", lambda saga, event, context: [], starts=False)
        .compensate("Do", _undo)
        .retry(RetryPolicy(jitter=0.0))
        .build()
    )


def child_saga() -> SagaDefinition[Any]:
    return define_saga("child").state({}).on("Begin", lambda saga, event, context: [saga_complete()]).build()


def other_saga() -> SagaDefinition[Any]:
    return define_saga("other").state({}).on("Tell", lambda saga, event, context: []).build()


# --- One trace -------------------------------------------------------------------------------------------------------


async def test_a_publish_its_decision_its_effect_and_the_answer_are_one_trace(bench: Bench, listener: Listener) -> None:
    bench.receiver.answer = lambda effect: [SagaMessage("Charged", {})]
    life = await bench.live(parent_saga(), telemetry=listener.providers)

    await life.publish("Do", {"do": "charge"}, key="k", traceparent=TRACE)
    await life.runtime.settled()

    publish = listener.the("saga.publish")
    handle = listener.the("saga.handle", netscript__saga__event__type="Do")
    sent = listener.the("saga.cascade.send")
    answer = listener.the("saga.handle", netscript__saga__event__type="Charged")
    assert {trace_id(span) for span in listener.spans()} == {TRACE_ID}
    assert parent_id(publish) == SPAN_ID
    assert parent_id(handle) == span_id(publish)
    assert parent_id(sent) == span_id(handle)
    assert parent_id(answer) == span_id(sent)


async def test_an_effect_goes_out_in_the_trace_of_its_delivery(bench: Bench, listener: Listener) -> None:
    life = await bench.live(parent_saga(), telemetry=listener.providers)

    await life.publish("Do", {"do": "charge"}, key="k", traceparent=TRACE, tracestate="vendor=1")
    await life.runtime.settled()

    (effect,) = bench.receiver.got
    assert (effect.traceparent, effect.tracestate) == (traceparent(listener.the("saga.cascade.send")), "vendor=1")


async def test_a_handler_sees_the_trace_of_its_decision_at_every_attempt(bench: Bench, listener: Listener) -> None:
    seen: list[str | None] = []

    def handle(saga: Any, event: Any, context: Any) -> Sequence[Any]:
        seen.append(context.traceparent)
        if context.attempt == 1:
            raise ConnectionError("once")
        return []

    life = await bench.live(
        define_saga("s").state({}).on("Do", handle).retry(RetryPolicy(jitter=0.0)).build(),
        telemetry=listener.providers,
    )
    await life.publish("Do", key="k", traceparent=TRACE)
    await bench.advance("1s")

    assert [traceparent(span) for span in listener.spans("saga.handle")] == seen


async def test_history_names_the_span_of_the_decision(bench: Bench, listener: Listener) -> None:
    life = await bench.live(parent_saga(), telemetry=listener.providers)

    await life.publish("Do", key="k", traceparent=TRACE)

    (entry,) = await life.history("s", "k")
    assert entry.traceparent == traceparent(listener.the("saga.handle"))


async def test_a_span_is_linked_to_the_context_that_it_goes_on_from(bench: Bench, listener: Listener) -> None:
    life = await bench.live(parent_saga(), telemetry=listener.providers)

    await life.publish("Do", key="k", traceparent=TRACE)

    handle = listener.the("saga.handle")
    assert [f"{link.context.span_id:016x}" for link in handle.links] == [parent_id(handle)]


async def test_a_message_without_a_trace_begins_one(bench: Bench, listener: Listener) -> None:
    life = await bench.live(parent_saga(), telemetry=listener.providers)

    await life.publish("Do", {"do": "charge"}, key="k")
    await life.runtime.settled()

    publish = listener.the("saga.publish")
    assert publish.parent is None
    assert [trace_id(span) for span in listener.spans()] == [trace_id(publish)] * 3


async def test_a_publish_in_the_middle_of_something_is_part_of_it(bench: Bench, listener: Listener) -> None:
    life = await bench.live(parent_saga(), telemetry=listener.providers)
    tracer = listener.tracer_provider.get_tracer("host")

    with tracer.start_as_current_span("request") as request:
        await life.publish("Do", key="k")
        await life.publish("Do", key="k", traceparent=traceparent(request))  # type: ignore[arg-type]
        await life.publish("Do", key="k", traceparent=TRACE)

    first, second, third = listener.spans("saga.publish")
    request_id = f"{request.get_span_context().span_id:016x}"
    assert [parent_id(first), parent_id(second), parent_id(third)] == [request_id, request_id, SPAN_ID]
    assert [f"{link.context.span_id:016x}" for link in third.links] == [request_id]


async def test_a_runtime_that_was_started_in_a_span_does_not_work_in_it(bench: Bench, listener: Listener) -> None:
    with listener.tracer_provider.get_tracer("host").start_as_current_span("startup"):
        life = await bench.live(parent_saga(), telemetry=listener.providers)
    await life.publish("Do", {"do": "charge"}, key="k", traceparent=TRACE)
    await life.runtime.settled()

    ours = [span for span in listener.spans() if span.name != "startup"]
    assert {trace_id(span) for span in ours} == {TRACE_ID}


async def test_what_cannot_be_read_as_a_trace_begins_a_new_one(bench: Bench, listener: Listener) -> None:
    life = await bench.live(parent_saga(), telemetry=listener.providers)

    outcome = await life.publish("Do", key="k", traceparent="nonsense")

    assert outcome.disposition == "applied"
    assert listener.the("saga.publish").parent is None


# --- What a decision says --------------------------------------------------------------------------------------------


async def test_the_span_of_a_decision_says_what_it_was_about(bench: Bench, listener: Listener) -> None:
    life = await bench.live(parent_saga("t2"), telemetry=listener.providers)

    outcome = await life.publish("Do", key="k", id="m-1")

    handle = listener.the("saga.handle")
    assert handle.kind is SpanKind.INTERNAL
    assert handle.instrumentation_scope is not None
    assert handle.instrumentation_scope.name == "netscript.sagas"
    assert dict(attributes_of(handle)) == {
        "netscript.saga.id": "s",
        "netscript.saga.instance.id": outcome.instance_id,
        "netscript.saga.event.type": "Do",
        "netscript.saga.attempt": 1,
        "netscript.saga.durability_tier": "t2",
        "netscript.saga.correlation_key": "k",
        "netscript.saga.disposition": "applied",
        "netscript.outcome": "success",
        "messaging.message.id": "m-1",
    }
    assert statuses(handle) == {"state.before": "pending", "state.after": "running"}


@pytest.mark.parametrize(
    ("do", "after", "outcome", "disposition"),
    [
        ("nothing", "running", "success", "applied"),
        ("end", "completed", "success", "applied"),
        ("undo", "compensating", "compensated", "applied"),
        ("give up", "failed", "error", "applied"),
        ("break", "running", "error", "dead_lettered"),
    ],
)
async def test_the_outcome_is_that_of_the_message(
    bench: Bench, listener: Listener, do: str, after: str, outcome: str, disposition: str
) -> None:
    life = await bench.live(parent_saga(), telemetry=listener.providers)
    await life.publish("Do", key="k", id="first")

    await life.publish("Do", {"do": do}, key="k", id="second")

    handle = listener.the("saga.handle", messaging__message__id="second")
    assert statuses(handle) == {"state.before": "running", "state.after": after}
    assert attributes_of(handle)["netscript.outcome"] == outcome
    assert attributes_of(handle)["netscript.saga.disposition"] == disposition
    assert ("error.type" in attributes_of(handle)) == (outcome == "error")
    assert (handle.status.status_code is StatusCode.ERROR) == (outcome == "error")


async def test_a_message_that_comes_too_late_is_skipped(bench: Bench, listener: Listener) -> None:
    life = await bench.live(parent_saga(), telemetry=listener.providers)
    await life.publish("Do", {"do": "end"}, key="k")

    await life.publish("Charged", key="k")

    handle = listener.the("saga.handle", netscript__saga__event__type="Charged")
    assert attributes_of(handle)["netscript.outcome"] == "skipped"
    assert statuses(handle) == {"state.before": "completed", "state.after": "completed"}


async def test_a_dead_letter_says_its_code_and_where_it_happened(bench: Bench, listener: Listener) -> None:
    life = await bench.live(parent_saga(), telemetry=listener.providers)

    await life.publish("Do", {"do": "break"}, key="k")

    handle = listener.the("saga.handle")
    (event,) = [event for event in handle.events if event.name == "exception"]
    assert attributes_of(handle)["error.type"] == "BROKEN"
    assert event.attributes is not None
    assert "in _handle" in str(event.attributes["exception.stacktrace"])


async def test_a_duplicate_is_not_decided_again(bench: Bench, listener: Listener) -> None:
    life = await bench.live(parent_saga(), telemetry=listener.providers)

    await life.publish("Do", key="k", id="m-1")
    await life.publish("Do", key="k", id="m-1")

    assert len(listener.spans("saga.handle")) == 1
    assert [attributes_of(span)["netscript.outcome"] for span in listener.spans("saga.publish")] == [
        "success",
        "skipped",
    ]


async def test_a_refused_publish_says_why(bench: Bench, listener: Listener) -> None:
    life = await bench.live(parent_saga(), telemetry=listener.providers)

    rejected = await life.runtime.publish({"type": "Unknown", "payload": {}})

    assert isinstance(rejected, PublishRejected)
    assert rejected.code == "SAGA_NOT_FOUND"
    publish = listener.the("saga.publish")
    assert publish.kind is SpanKind.PRODUCER
    assert attributes_of(publish)["netscript.outcome"] == "error"
    assert attributes_of(publish)["error.type"] == "SAGA_NOT_FOUND"


# --- More than one attempt -------------------------------------------------------------------------------------------


async def test_each_attempt_has_a_span_beside_the_others(bench: Bench, listener: Listener) -> None:
    life = await bench.live(parent_saga(), telemetry=listener.providers)

    await life.publish("Do", {"do": "fail", "until": 3}, key="k", traceparent=TRACE)
    await bench.advance("1s")
    await bench.advance("2s")

    attempts = listener.spans("saga.handle")
    assert [attributes_of(span)["netscript.saga.attempt"] for span in attempts] == [1, 2, 3]
    assert [attributes_of(span)["netscript.outcome"] for span in attempts] == ["error", "error", "success"]
    assert [attributes_of(span).get("error.type") for span in attempts] == ["ConnectionError", "ConnectionError", None]
    assert {parent_id(span) for span in attempts} == {span_id(listener.the("saga.publish"))}


async def test_a_message_that_is_tried_out_of_its_turn_leaves_no_span(bench: Bench, listener: Listener) -> None:
    life = await bench.live(parent_saga(), telemetry=listener.providers)
    await life.publish("Do", key="k")
    await life.publish("Do", {"do": "fail", "until": 3}, key="k", id="waits")

    await life.publish("Do", key="k")
    await life.runtime.settled()

    assert len([s for s in listener.spans("saga.handle") if attributes_of(s)["messaging.message.id"] == "waits"]) == 1


async def test_each_attempt_to_deliver_has_a_span_beside_the_others(bench: Bench, listener: Listener) -> None:
    answers: list[Any] = [DeliveryFailed("busy", data={"status": 503}), ()]
    bench.receiver.answer = lambda effect: answers.pop(0)
    life = await bench.live(parent_saga(), telemetry=listener.providers, effect_retry=RetryPolicy(jitter=0.0))

    await life.publish("Do", {"do": "charge"}, key="k")
    await life.runtime.settled()
    await bench.advance("1s")

    failed, sent = listener.spans("saga.cascade.send")
    assert (parent_id(failed), failed.kind) == (parent_id(sent), SpanKind.CLIENT)
    assert dict(attributes_of(failed)) == {
        "netscript.saga.id": "s",
        "netscript.saga.instance.id": "s:k",
        "netscript.saga.correlation_key": "k",
        "netscript.saga.attempt": 1,
        "netscript.saga.effect.key": bench.receiver.got[0].effect_key,
        "netscript.target.kind": "service",
        "netscript.target.id": "payments",
        "netscript.outcome": "error",
        "error.type": "DELIVERY_FAILED",
        "http.response.status_code": 503,
    }
    assert attributes_of(sent)["netscript.saga.attempt"] == 2
    assert attributes_of(sent)["netscript.outcome"] == "success"


async def test_an_effect_that_nobody_takes_has_a_span_that_says_so(bench: Bench, listener: Listener) -> None:
    bench.receiver.kind = "elsewhere"
    life = await bench.live(parent_saga(), telemetry=listener.providers)

    await life.publish("Do", {"do": "charge"}, key="k")
    await life.runtime.settled()

    assert attributes_of(listener.the("saga.cascade.send"))["error.type"] == "DELIVERY_FAILED"


async def test_a_delivery_that_takes_too_long_has_failed(bench: Bench, listener: Listener) -> None:
    bench.receiver.gate = asyncio.Event()
    life = await bench.live(parent_saga(), telemetry=listener.providers, dispatch_timeout_seconds=0.02)

    await life.publish("Do", {"do": "charge"}, key="k")
    await life.runtime.settled()

    assert attributes_of(listener.the("saga.cascade.send"))["error.type"] == "DELIVERY_FAILED"


@pytest.mark.parametrize(
    ("target", "options", "kind", "attributes"),
    [
        ("job:bill", {}, SpanKind.CLIENT, {"netscript.job.target.id": "bill"}),
        ("queue:mail", {}, SpanKind.PRODUCER, {"messaging.destination.name": "mail"}),
        (
            "email:welcome",
            {"queue": "slow", "idempotency_key": "i", "concurrency_key": "c", "retry": RetryPolicy(maximum_attempts=2)},
            SpanKind.PRODUCER,
            {
                "messaging.destination.name": "slow",
                "netscript.idempotency.key": "i",
                "netscript.concurrency.key": "c",
                "netscript.retry.max_attempts": 2,
            },
        ),
    ],
)
async def test_a_delivery_says_where_to(
    bench: Bench, listener: Listener, target: str, options: Any, kind: SpanKind, attributes: dict[str, Any]
) -> None:
    bench.receiver.kind = target.partition(":")[0]
    saga = define_saga("s").state({}).on("Do", lambda saga, event, context: [send(target, {}, options)]).build()
    life = await bench.live(saga, telemetry=listener.providers)

    await life.publish("Do", key="k")
    await life.runtime.settled()

    sent = listener.the("saga.cascade.send")
    assert sent.kind is kind
    assert attributes.items() <= attributes_of(sent).items()


# --- What a decision asks for ----------------------------------------------------------------------------------------


async def test_timers_children_and_messages_to_sagas_are_noted_beside_their_decision(
    bench: Bench, listener: Listener
) -> None:
    life = await bench.live(parent_saga(), child_saga(), other_saga(), telemetry=listener.providers)

    await life.publish("Do", {"do": "ask"}, key="k", traceparent=TRACE)
    await life.runtime.settled()

    handle = listener.the("saga.handle", netscript__saga__event__type="Do")
    timer, child, message = (listener.the(f"saga.cascade.{kind}") for kind in ("schedule", "spawn", "send"))
    assert [parent_id(span) for span in (timer, child, message)] == [span_id(handle)] * 3
    assert attributes_of(timer)["netscript.saga.delay_ms"] == 3_600_000
    assert attributes_of(timer)["netscript.saga.event.type"] == "Later"
    assert str(attributes_of(timer)["netscript.saga.scheduled_for"]).endswith("+00:00")
    assert attributes_of(child)["netscript.saga.child.id"] == "child"
    spawned = listener.the("saga.handle", netscript__saga__id="child")
    assert (
        attributes_of(child)["netscript.saga.child.instance.id"]
        == (attributes_of(spawned)["netscript.saga.instance.id"])
    )
    assert (message.kind, attributes_of(message)["netscript.target.kind"]) == (SpanKind.PRODUCER, "saga")


async def test_a_child_its_end_and_a_timer_go_on_from_the_decision(bench: Bench, listener: Listener) -> None:
    life = await bench.live(parent_saga(), child_saga(), other_saga(), telemetry=listener.providers)

    await life.publish("Do", {"do": "ask"}, key="k", traceparent=TRACE)
    await life.runtime.settled()
    await bench.advance("1h")

    asked = listener.the("saga.handle", netscript__saga__event__type="Do")
    told = listener.the("saga.handle", netscript__saga__id="other")
    child = listener.the("saga.handle", netscript__saga__id="child")
    end = listener.the("saga.handle", netscript__saga__event__type="child:completed")
    later = listener.the("saga.handle", netscript__saga__event__type="Later")
    assert {trace_id(span) for span in listener.spans()} == {TRACE_ID}
    assert [parent_id(span) for span in (told, child, later)] == [span_id(asked)] * 3
    assert parent_id(end) == span_id(child)


async def test_each_compensation_is_noted_with_its_reason(bench: Bench, listener: Listener) -> None:
    life = await bench.live(parent_saga(), telemetry=listener.providers)
    await life.publish("Do", key="k")
    await life.publish("Do", key="k")

    await life.publish("Do", {"do": "undo all"}, key="k", id="undo")

    handle = listener.the("saga.handle", messaging__message__id="undo")
    compensations = listener.spans("saga.cascade.compensate")
    assert [parent_id(span) for span in compensations] == [span_id(handle)] * 2
    assert attributes_of(compensations[0])["netscript.saga.compensation.reason"] == "changed my mind"
    assert attributes_of(compensations[0])["netscript.saga.compensation.cascade_size"] == 1


async def test_the_end_of_a_run_is_noted(bench: Bench, listener: Listener) -> None:
    life = await bench.live(parent_saga(), telemetry=listener.providers)

    await life.publish("Do", {"do": "end"}, key="k")

    complete = listener.the("saga.cascade.complete")
    assert parent_id(complete) == span_id(listener.the("saga.handle"))
    assert attributes_of(complete)["netscript.saga.status"] == "completed"


async def test_each_tick_begins_a_trace(bench: Bench, listener: Listener) -> None:
    saga = define_saga("s").state({}).on("s:tick", lambda saga, event, context: []).schedule("*/5 * * * *").build()
    with listener.tracer_provider.get_tracer("host").start_as_current_span("startup"):
        await bench.live(saga, telemetry=listener.providers)

    await bench.advance("5m")
    await bench.advance("5m")

    first, second = listener.spans("saga.publish")
    assert (first.parent, second.parent) == (None, None)
    assert trace_id(first) != trace_id(second)
    assert [parent_id(span) for span in listener.spans("saga.handle")] == [span_id(first), span_id(second)]


async def test_a_control_goes_on_in_the_trace_of_whoever_asks_for_it(bench: Bench, listener: Listener) -> None:
    life = await bench.live(parent_saga(), telemetry=listener.providers)
    await life.publish("Do", key="k")

    with listener.tracer_provider.get_tracer("host").start_as_current_span("operator") as operator:
        await life.runtime.cancel("s", "k")

    handle = listener.the("saga.handle", netscript__saga__event__type="saga:cancel")
    assert parent_id(handle) == f"{operator.get_span_context().span_id:016x}"
    assert statuses(handle) == {"state.before": "running", "state.after": "cancelled"}


# --- What goes wrong -------------------------------------------------------------------------------------------------


class Stubborn(MemoryStore):
    """Refuses what the test says, once."""

    trouble: BackendUnavailable | Conflict | None = None

    async def commit(self, units: Sequence[UnitOfWork], *, lease: Lease) -> CommitResult:
        trouble, self.trouble = self.trouble, None
        if isinstance(trouble, BackendUnavailable):
            raise trouble
        if trouble is not None:
            return CommitResult(dict.fromkeys(range(len(units)), trouble), 0, 0, 0)
        return await super().commit(units, lease=lease)


async def test_a_decision_that_was_refused_by_the_store_is_not_the_one_that_counts(listener: Listener) -> None:
    store = Stubborn()
    runtime = SagaRuntime(
        store, definitions=[parent_saga()], targets=[Receiver()], clock=ManualClock(), telemetry=listener.providers
    )
    async with runtime:
        store.trouble = Conflict("revision", "somebody else was faster")
        await runtime.publish({"type": "Do", "payload": {"do": "end"}, "correlationKey": "k"})

    refused, applied = listener.spans("saga.handle")
    assert attributes_of(refused)["netscript.saga.disposition"] == "conflict"
    assert attributes_of(refused)["netscript.outcome"] == "skipped"
    assert statuses(refused) == {}
    assert attributes_of(applied)["netscript.outcome"] == "success"
    assert len(listener.spans("saga.cascade.complete")) == 1
    assert parent_id(refused) == parent_id(applied)


async def test_a_decision_that_could_not_be_written_is_an_error(listener: Listener) -> None:
    store = Stubborn()
    runtime = SagaRuntime(
        store, definitions=[parent_saga()], targets=[Receiver()], clock=ManualClock(), telemetry=listener.providers
    )
    async with runtime:
        store.trouble = BackendUnavailable("the disk is gone")
        rejected = await runtime.publish({"type": "Do", "payload": {}, "correlationKey": "k"})

    assert isinstance(rejected, PublishRejected)
    assert rejected.retryable
    assert attributes_of(listener.the("saga.handle"))["error.type"] == "BACKEND_UNAVAILABLE"
    assert attributes_of(listener.the("saga.publish"))["error.type"] == "BACKEND_UNAVAILABLE"


async def test_a_delivery_that_is_repeated_after_a_crash_has_two_spans_under_one_key(
    bench: Bench, listener: Listener
) -> None:
    faults = Faults()
    faults.raise_at("dispatched", 1)
    life = await bench.live(parent_saga(), telemetry=listener.providers, on_step=faults)
    await life.publish("Do", {"do": "charge"}, key="k")
    for _ in range(1_000):
        if faults.struck:
            break
        await life.runtime.store.dead_letters(limit=1)
    await bench.die(life)

    life = await bench.live(parent_saga(), telemetry=listener.providers)
    await life.runtime.settled()

    first, second = listener.spans("saga.cascade.send")
    handle = listener.the("saga.handle")
    assert parent_id(first) == parent_id(second) == span_id(handle)
    key = "netscript.saga.effect.key"
    assert attributes_of(first)[key] == attributes_of(second)[key]


class Broken(SpanProcessor):
    def on_start(self, span: Any, parent_context: Any = None) -> None:
        raise RuntimeError("cannot begin")

    def on_end(self, span: ReadableSpan) -> None:
        raise RuntimeError("cannot end")


async def test_spans_that_cannot_be_recorded_keep_nothing_from_happening(
    bench: Bench, listener: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    listener.tracer_provider.add_span_processor(Broken())
    life = await bench.live(parent_saga(), telemetry=listener.providers)

    await life.publish("Do", {"do": "charge"}, key="k", traceparent=TRACE)
    await life.runtime.settled()

    assert [effect.traceparent for effect in bench.receiver.got] == [TRACE]
    assert [record.levelname for record in caplog.records if record.name == "sagaloom.telemetry"] == ["ERROR"]


async def test_without_a_tracer_provider_traces_go_through_as_they_are(bench: Bench, listener: Listener) -> None:
    providers = TelemetryProviders(meter_provider=listener.meter_provider)
    life = await bench.live(parent_saga(), telemetry=providers)

    await life.publish("Do", {"do": "charge"}, key="k", traceparent=TRACE, tracestate="vendor=1")
    await life.runtime.settled()

    assert [(effect.traceparent, effect.tracestate) for effect in bench.receiver.got] == [(TRACE, "vendor=1")]
    assert listener.spans() == []
