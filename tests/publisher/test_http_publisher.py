"""Publishing over real sockets, both ways: what is sent, what answers mean, and services that misbehave."""

from __future__ import annotations

import asyncio
import gc
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypedDict

import pytest
from opentelemetry import trace

from sagaloom import (
    BackendUnavailable,
    ConfigurationError,
    IdempotencyKeyReused,
    MessageRejected,
    RetryPolicy,
    SagaMessage,
    SagaNotFound,
)
from sagaloom.integration.publisher import SagaPublisherReceipt, SagaPublisherRejected, SagaPublisherResult
from sagaloom.publisher import FetchRequest, FetchResponse, create_saga_publisher, create_sync_saga_publisher
from tests.publisher.conftest import AT_ONCE, Publisher, Service, http, listening, taken
from tests.servers.server import free_port

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

New = Callable[..., Publisher]


@dataclass(frozen=True)
class OrderPlaced:
    order_id: str


class PaymentCaptured(TypedDict):
    order_id: str
    payment_id: str


def accepted(result: SagaPublisherResult) -> SagaPublisherReceipt:
    assert isinstance(result, SagaPublisherReceipt), result
    return result


def rejected(result: SagaPublisherResult) -> SagaPublisherRejected:
    assert isinstance(result, SagaPublisherRejected), result
    result.reason  # noqa: B018  # looked at
    return result


# --- What is sent ----------------------------------------------------------------------------------------------------


async def test_a_message_goes_out_as_the_existing_service_wants_it(publisher: Publisher, service: Service) -> None:
    await publisher.publish(
        {"type": "OrderPlaced", "payload": {"orderId": "o-1"}},
        {"correlation_key": "o-1", "idempotency_key": "k-1", "concurrency_key": "c-1", "topic": "orders"},
    )

    (request,) = service.requests
    assert request.line == "POST /api/v1/sagas/publish HTTP/1.1"
    assert request.headers["content-type"] == "application/json"
    assert request.body == {
        "type": "OrderPlaced",
        "payload": {"orderId": "o-1"},
        "correlationId": "o-1",
        "correlationKey": "o-1",
        "idempotencyKey": "k-1",
        "concurrencyKey": "c-1",
        "topic": "orders",
        "messageId": request.body["messageId"],
    }


@pytest.mark.parametrize(
    "arguments",
    [
        (OrderPlaced("o-1"),),
        (OrderPlaced, OrderPlaced("o-1")),
        ("OrderPlaced", {"order_id": "o-1"}),
        ("OrderPlaced", OrderPlaced("o-1")),
        (SagaMessage("OrderPlaced", OrderPlaced("o-1")),),
        ({"type": "OrderPlaced", "payload": {"order_id": "o-1"}},),
    ],
)
async def test_every_way_to_write_a_message_is_the_same_message(
    publisher: Publisher, service: Service, arguments: tuple[Any, ...]
) -> None:
    accepted(await publisher.publish(*arguments, {"topic": "orders"}))

    assert service.bodies[0]["type"] == "OrderPlaced"
    assert service.bodies[0]["payload"] == {"order_id": "o-1"}
    assert service.bodies[0]["topic"] == "orders"


async def test_a_class_without_instances_of_its_own_is_given_beside_its_payload(
    publisher: Publisher, service: Service
) -> None:
    service.answers = [taken(messageType="PaymentCaptured")]

    accepted(await publisher.publish(PaymentCaptured, {"order_id": "o-1", "payment_id": "p-1"}))

    assert service.bodies[0]["payload"] == {"order_id": "o-1", "payment_id": "p-1"}


async def test_a_payload_that_is_not_of_its_class_is_refused_before_it_is_sent(
    publisher: Publisher, service: Service
) -> None:
    refused = rejected(await publisher.publish(PaymentCaptured, {"order_id": "o-1"}))

    assert "payload contains a value that cannot be serialized as JSON of PaymentCaptured" in refused.reason
    assert service.requests == []


async def test_what_a_message_says_itself_is_sent_and_options_come_first(
    publisher: Publisher, service: Service
) -> None:
    message = SagaMessage(
        "OrderPlaced",
        {},
        correlation_key="o-1",
        idempotency_key="k-1",
        concurrency_key="c-1",
        occurred_at=datetime(2026, 1, 31, 12, tzinfo=UTC),
        id="m-1",
        traceparent=TRACEPARENT,
        tracestate="vendor=1",
    )

    await publisher.publish(message, correlation_key="o-2", concurrency_key=None)

    (request,) = service.requests
    assert request.body == {
        "type": "OrderPlaced",
        "payload": {},
        "correlationId": "o-2",
        "correlationKey": "o-2",
        "idempotencyKey": "k-1",
        "concurrencyKey": "c-1",
        "messageId": "m-1",
        "occurredAt": "2026-01-31T12:00:00Z",
        "traceparent": TRACEPARENT,
        "tracestate": "vendor=1",
    }
    assert (request.headers["traceparent"], request.headers["tracestate"]) == (TRACEPARENT, "vendor=1")


async def test_the_id_of_a_message_is_its_idempotency_key_for_services_that_know_only_that(
    publisher: Publisher, service: Service
) -> None:
    await publisher.publish("OrderPlaced", {}, id="m-1")

    assert (service.bodies[0]["messageId"], service.bodies[0]["idempotencyKey"]) == ("m-1", "m-1")


async def test_two_publishes_are_two_messages(publisher: Publisher, service: Service) -> None:
    await publisher.publish("OrderPlaced", {})
    await publisher.publish("OrderPlaced", {})

    first, second = service.bodies
    assert first["idempotencyKey"] != second["idempotencyKey"]


async def test_the_current_span_is_the_parent_of_a_message(publisher: Publisher, service: Service) -> None:
    span = trace.NonRecordingSpan(
        trace.SpanContext(
            trace_id=int(TRACEPARENT[3:35], 16),
            span_id=int(TRACEPARENT[36:52], 16),
            is_remote=False,
            trace_flags=trace.TraceFlags(trace.TraceFlags.SAMPLED),
            trace_state=trace.TraceState([("vendor", "1")]),
        )
    )

    with trace.use_span(span):
        await publisher.publish("OrderPlaced", {})
        await publisher.publish_many([SagaMessage("OrderPlaced", {}), SagaMessage("OrderPlaced", {})], mode="parallel")

    assert [request.headers["traceparent"] for request in service.requests] == [TRACEPARENT] * 3
    assert [body["tracestate"] for body in service.bodies] == ["vendor=1"] * 3


@pytest.mark.parametrize(
    "traceparent", ["nonsense", "00-" + "0" * 32 + "-00f067aa0ba902b7-01", TRACEPARENT + "\r\nx: y"]
)
async def test_what_is_no_trace_context_is_left_out(publisher: Publisher, service: Service, traceparent: str) -> None:
    accepted(await publisher.publish("OrderPlaced", {}, traceparent=traceparent, tracestate="vendor=1"))

    (request,) = service.requests
    assert {"traceparent", "tracestate"} & (request.headers.keys() | request.body.keys()) == set()


async def test_headers_and_path_are_those_of_the_options(new_publisher: New, service: Service) -> None:
    publisher = new_publisher(
        service.url + "/behind/", publish_path="here?tenant=1", headers={"Authorization": "Bearer t", "X-Tenant": "a"}
    )

    await publisher.publish("OrderPlaced", {}, wait=2)

    (request,) = service.requests
    assert request.line == "POST /behind/here?tenant=1&wait=2 HTTP/1.1"
    assert (request.headers["authorization"], request.headers["x-tenant"]) == ("Bearer t", "a")


async def test_publishes_share_a_connection_until_it_is_closed(publisher: Publisher, service: Service) -> None:
    for _ in range(3):
        accepted(await publisher.publish("OrderPlaced", {}))
    assert len({id(request.connection) for request in service.requests}) == 1

    await publisher.close()

    accepted(await publisher.publish("OrderPlaced", {}))
    assert len({id(request.connection) for request in service.requests}) == 2


# --- What the answers mean -------------------------------------------------------------------------------------------


async def test_a_service_that_names_no_message_id_leaves_the_receipt_ours(
    publisher: Publisher, service: Service
) -> None:
    service.answers = [taken(correlationId="o-1")]

    receipt = accepted(await publisher.publish("OrderPlaced", {}, id="m-1"))

    assert (receipt.published, receipt.message_type, receipt.message_id) == (True, "OrderPlaced", "m-1")
    assert (receipt.correlation_key, receipt.duplicate, receipt.attempts) == ("o-1", False, 1)
    assert (receipt.instance_ids, receipt.outcomes, receipt.reason, receipt.retryable) == ((), (), None, False)
    assert receipt.raise_for_rejected() is receipt
    assert abs((datetime.now(UTC) - receipt.accepted_at).total_seconds()) < 60


async def test_parts_of_an_answer_that_nobody_knows_do_no_harm(publisher: Publisher, service: Service) -> None:
    service.answers = [taken(messageId="m-9", outcomes=[{"disposition": "new"}], instances="many", more={"a": 1})]

    receipt = accepted(await publisher.publish("OrderPlaced", {}))

    assert (receipt.message_id, receipt.instance_ids, receipt.outcomes) == ("m-9", (), ())


@pytest.mark.parametrize(
    ("status", "code", "kind", "retryable"),
    [
        (400, "BAD_REQUEST", MessageRejected, False),
        (401, "UNAUTHORIZED", MessageRejected, False),
        (404, "SAGA_NOT_FOUND", SagaNotFound, False),
        (409, "SAGA_RETRYABLE", MessageRejected, True),
        (422, "IDEMPOTENCY_KEY_REUSED", IdempotencyKeyReused, False),
        (500, "INTERNAL", BackendUnavailable, True),
        (501, "SAGA_NOT_IMPLEMENTED", BackendUnavailable, False),
        (503, "BACKEND_UNAVAILABLE", BackendUnavailable, True),
        (505, "X", BackendUnavailable, False),
        (599, "X", BackendUnavailable, True),
    ],
)
async def test_an_error_answer_is_a_refusal_with_its_code_and_what_it_says(
    publisher: Publisher, service: Service, status: int, code: str, kind: type[Exception], retryable: bool
) -> None:
    service.answers = [http(status, {"code": code, "message": "because", "data": {"field": "x"}})]

    refused = rejected(await publisher.publish("OrderPlaced", {}, correlation_key="o-1"))

    assert (refused.published, refused.code, refused.retryable) == (False, code, retryable)
    assert refused.reason.startswith(f"Saga publish failed with {status}")
    assert "because" in refused.reason
    assert (refused.message_type, refused.correlation_key) == ("OrderPlaced", "o-1")
    assert len(service.requests) == refused.attempts == (4 if retryable else 1)
    assert refused.error.data["field"] == "x"
    with pytest.raises(kind, match="because"):
        refused.raise_for_rejected()


async def test_a_status_of_ones_own_choice_is_tried_again_and_no_other(new_publisher: New, service: Service) -> None:
    publisher = new_publisher(service.url, retryable_status_codes=[418])
    service.answers = [http(418), http(503)]

    refused = rejected(await publisher.publish("OrderPlaced", {}))

    assert (refused.attempts, refused.retryable) == (2, False)


async def test_what_passes_with_the_second_attempt_is_accepted_under_the_same_key(
    publisher: Publisher, service: Service
) -> None:
    service.answers = [http(503), taken()]

    receipt = accepted(await publisher.publish("OrderPlaced", {"at": 1}))

    assert receipt.attempts == 2
    assert service.bodies[0] == service.bodies[1]
    assert service.bodies[0]["idempotencyKey"] == receipt.idempotency_key


async def test_a_service_without_our_errors_is_quoted(publisher: Publisher, service: Service) -> None:
    service.answers = [http(404, b"<html>no such page</html>")]

    refused = rejected(await publisher.publish("OrderPlaced", {}))

    assert "404 Not Found" in refused.reason
    assert "no such page" in refused.reason
    assert "is it a saga service?" in refused.reason


async def test_published_false_is_a_refusal_for_good(publisher: Publisher, service: Service) -> None:
    service.answers = [http(200, {"published": False, "messageType": "OrderPlaced", "reason": "not today"})]

    refused = rejected(await publisher.publish("OrderPlaced", {}))

    assert refused.reason.startswith("Saga API rejected the publish request. It says: not today")
    assert (refused.retryable, refused.attempts, refused.may_have_arrived) == (False, 1, False)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[]", "must be a JSON object"),
        (b"true", "must be a JSON object"),
        (b"{}", "rejected the publish request"),
        (b'{"published": 1, "messageType": "OrderPlaced"}', "rejected the publish request"),
        (b'{"published": true}', "must include messageType"),
        (b'{"published": true, "messageType": "Other"}', "is for 'Other', not 'OrderPlaced'"),
    ],
)
async def test_a_success_that_does_not_say_so_is_not_believed(
    publisher: Publisher, service: Service, content: bytes, reason: str
) -> None:
    service.answers = [http(200, content)]

    refused = rejected(await publisher.publish("OrderPlaced", {}))

    assert reason in refused.reason
    assert (refused.retryable, refused.attempts, refused.may_have_arrived) == (False, 1, True)


@pytest.mark.parametrize("content", [b"", b"<html>hello</html>", b'{"published": tr', b"\xff\xfe", b"[" * 100_000])
async def test_a_success_that_cannot_be_read_is_asked_again_under_the_same_key(
    publisher: Publisher, service: Service, content: bytes
) -> None:
    service.answers = [http(200, content), taken(duplicate=True)]

    receipt = accepted(await publisher.publish("OrderPlaced", {}))

    assert (receipt.duplicate, receipt.attempts) == (True, 2)
    assert service.bodies[0] == service.bodies[1]


async def test_a_port_that_always_answers_html_is_no_success(publisher: Publisher, service: Service) -> None:
    service.answers = [http(200, b"<!doctype html><p>hello", content_type="text/html")]

    refused = rejected(await publisher.publish("OrderPlaced", {}))

    assert "is no JSON: it begins with '<!doctype html><p>hello'; is it a saga service?" in refused.reason
    assert (refused.retryable, refused.attempts, refused.may_have_arrived) == (True, 4, True)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_a_redirect_is_not_followed(publisher: Publisher, service: Service, status: int) -> None:
    service.answers = [http(status, location="http://127.0.0.1:9/elsewhere")]

    refused = rejected(await publisher.publish("OrderPlaced", {}))

    assert "redirects, here to 'http://127.0.0.1:9/elsewhere', are not followed" in refused.reason
    assert (refused.retryable, len(service.requests)) == (False, 1)


async def test_an_answer_without_end_is_not_read_to_its_end(new_publisher: New) -> None:
    sent = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"}")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 9999999999\r\n\r\n")
        try:
            while True:
                writer.write(b"x" * 65_536)
                await writer.drain()
                sent += 65_536
        except ConnectionError:
            pass

    async with listening(talk) as url:
        refused = rejected(await new_publisher(url).publish("OrderPlaced", {}))

    assert "larger than any answer" in refused.reason
    assert (refused.retryable, refused.attempts, refused.may_have_arrived) == (False, 1, True)
    assert sent < 64 << 20


# --- Services that are not there -------------------------------------------------------------------------------------


async def test_a_port_where_nobody_listens_is_a_retryable_refusal(new_publisher: New) -> None:
    port = free_port()

    refused = rejected(await new_publisher(f"http://127.0.0.1:{port}").publish("OrderPlaced", {}))

    assert f"got no answer from http://127.0.0.1:{port}/api/v1/sagas/publish: it cannot be reached" in refused.reason
    assert (refused.code, refused.retryable, refused.attempts) == ("BACKEND_UNAVAILABLE", True, 4)
    assert not refused.may_have_arrived
    with pytest.raises(BackendUnavailable):
        refused.raise_for_rejected()


async def test_a_service_that_hangs_costs_no_more_than_the_timeout(new_publisher: New, service: Service) -> None:
    service.answers = [None]
    twice = RetryPolicy(maximum_attempts=2, initial_interval_ms=1)
    publisher = new_publisher(service.url, retries=twice, attempt_timeout=1.0)
    begun = time.monotonic()

    refused = rejected(await publisher.publish("OrderPlaced", {}))

    assert time.monotonic() - begun < 30
    assert "nothing came within 1 s" in refused.reason
    assert (refused.retryable, refused.may_have_arrived, refused.attempts) == (True, True, 2)
    assert {body["idempotencyKey"] for body in service.bodies} == {refused.idempotency_key}


async def test_a_body_that_trickles_in_does_not_outlast_the_timeout(new_publisher: New) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        gone = asyncio.ensure_future(reader.read())
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 999999\r\n\r\n")
        while not gone.done():
            writer.write(b" ")
            await asyncio.wait([gone], timeout=0.02)

    async with listening(talk) as url:
        begun = time.monotonic()
        refused = rejected(await new_publisher(url, retries=0, timeout=0.9).publish("OrderPlaced", {}))

    assert time.monotonic() - begun < 30
    assert "nothing came within 0." in refused.reason  # what was left of it when the request left
    assert refused.may_have_arrived


async def test_an_answer_that_gets_lost_is_asked_for_again(publisher: Publisher, service: Service) -> None:
    service.answers = [b"", taken(duplicate=True, messageId="m-1")]

    receipt = accepted(await publisher.publish("OrderPlaced", {}, id="m-1"))

    assert (receipt.duplicate, receipt.attempts) == (True, 2)
    assert service.bodies[0] == service.bodies[1]


async def test_a_connection_that_was_closed_meanwhile_is_replaced(publisher: Publisher, service: Service) -> None:
    service.answers = [taken(), b"", taken()]

    assert accepted(await publisher.publish("OrderPlaced", {})).attempts == 1
    assert accepted(await publisher.publish("OrderPlaced", {})).attempts == 2


async def test_too_many_requests_is_asked_again_when_the_service_says_so(new_publisher: New, service: Service) -> None:
    publisher = new_publisher(service.url, retries=RetryPolicy(initial_interval_ms=60_000))
    service.answers = [http(429, retry_after="86400")]

    refused = rejected(await publisher.publish("OrderPlaced", {}))

    assert (refused.code, refused.retryable, refused.attempts) == ("TOO_MANY_REQUESTS", True, 1)
    assert refused.error.data["retryAfterSeconds"] == 86_400.0


async def test_no_address_is_a_refusal_that_names_what_was_read(new_publisher: New) -> None:
    refused = rejected(await new_publisher("http://x", base_url=None).publish("OrderPlaced", {}))

    assert (
        "neither base_url= nor services__sagas-api__https__0, services__sagas-api__http__0, SAGAS_API_URL, "
        "NETSCRIPT_SAGAS_URL is set, and SAGALOOM_DEV is not 1"
    ) in refused.reason
    assert (refused.code, refused.retryable, refused.attempts) == ("CONFIGURATION_ERROR", False, 0)


async def test_an_address_that_is_none_is_a_refusal_that_names_its_variable(new_publisher: New) -> None:
    environment = {"SAGAS_API_URL": "ftp://me:secret@sagas"}
    refused = rejected(
        await new_publisher("http://x", base_url=None, read_env=environment.get).publish("OrderPlaced", {})
    )

    assert "the address of the sagas API in SAGAS_API_URL is no http(s) URL: 'ftp://sagas'" in refused.reason
    assert "secret" not in refused.reason


async def test_an_address_that_only_the_client_can_judge_is_a_refusal_too(new_publisher: New) -> None:
    refused = rejected(await new_publisher("http://\u2603.example").publish("OrderPlaced", {}))

    assert isinstance(refused.error, ConfigurationError)
    assert (refused.retryable, refused.attempts, refused.may_have_arrived) == (False, 1, False)


async def test_credentials_of_an_address_are_used_and_never_shown(new_publisher: New, service: Service) -> None:
    service.answers = [http(503)]
    publisher = new_publisher(service.url.replace("//", "//me:secret@"))

    refused = rejected(await publisher.publish("OrderPlaced", {}))

    assert service.requests[0].headers["authorization"] == "Basic bWU6c2VjcmV0"
    assert "secret" not in f"{refused.reason} {refused.error.data}"


async def test_a_missing_token_is_named(publisher: Publisher, service: Service) -> None:
    service.answers = [http(401, {"code": "UNAUTHORIZED", "message": "who are you"})]

    assert "headers={'Authorization': 'Bearer ...'}" in rejected(await publisher.publish("OrderPlaced", {})).reason


# --- Messages that cannot be sent ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("",), "message without a type"),
        (("\ud800", {}), "lone surrogate"),
        ((None,), "is no message"),
        ((3,), "is no message"),
        ((dict, {}), "dict is no message class"),
        (({"payload": {}},), "message without a type"),
        (({"type": "A", "body": {}},), "unknown field 'body'"),
        (("A", {"x": float("nan")}), "payload.x must contain only finite JSON numbers"),
        (("A", {}, {"corelation_key": "o-1"}), "unknown publish option 'corelation_key'; known are correlation_key"),
        (("A", {}, "o-1"), "its options must be a mapping"),
        (("A", {}, {}, {}), "1 arguments too many"),
        (("A", {}, {"correlation_key": 7}), "correlation_key must be a string"),
        (("A", {}, {"correlation_key": ""}), "correlation key is empty"),
        (("A", {}, {"correlation_key": "x" * 1025}), "has 1025 bytes"),
        (("A", {}, {"idempotency_key": "a\n"}), "idempotency key 'a\\n' holds a control character"),
        (("A", {}, {"id": "\ud800"}), "message id '\\ud800' holds a lone surrogate"),
        (("A", {}, {"topic": 3}), "topic must be a string"),
        (("A", {}, {"occurred_at": datetime(2026, 1, 1)}), "a moment with a time zone"),  # noqa: DTZ001
    ],
)
async def test_what_cannot_be_sent_is_refused_and_not_sent(
    publisher: Publisher, service: Service, arguments: tuple[Any, ...], reason: str
) -> None:
    refused = rejected(await publisher.publish(*arguments))

    assert reason in refused.reason
    assert (refused.retryable, refused.attempts) == (False, 0)
    assert isinstance(refused.error, MessageRejected)
    assert service.requests == []


@pytest.mark.parametrize("wait", [-1, float("nan"), float("inf"), True, "5s", 3601])
async def test_a_wait_is_seconds(publisher: Publisher, wait: Any) -> None:
    assert "must be seconds or a timedelta" in rejected(await publisher.publish("A", {}, wait=wait)).reason


# --- Refusals that nobody looks at -----------------------------------------------------------------------------------


def test_a_refusal_that_nobody_looks_at_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    create_sync_saga_publisher(base_url="http://127.0.0.1:9").publish("A", {"x": float("nan")})
    gc.collect()

    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "a refused publish went unnoticed: A: message 'A': payload.x must" in warning.getMessage()


@pytest.mark.parametrize("look", ["published", "reason", "retryable", "code", "__str__"])
def test_a_refusal_that_somebody_looks_at_is_not_logged(caplog: pytest.LogCaptureFixture, look: str) -> None:
    found = getattr(create_sync_saga_publisher(base_url="http://127.0.0.1:9").publish("A", {"x": float("nan")}), look)
    if callable(found):
        found()
    del found
    gc.collect()

    assert [record for record in caplog.records if record.levelno == logging.WARNING] == []


# --- Many ------------------------------------------------------------------------------------------------------------


def orders(count: int) -> list[SagaMessage[Any]]:
    return [SagaMessage("OrderPlaced", {"number": number}, f"o-{number}") for number in range(count)]


async def test_many_are_sent_one_after_the_other_and_answered_in_order(publisher: Publisher, service: Service) -> None:
    results = await publisher.publish_many(orders(5), topic="orders")

    assert [body["payload"]["number"] for body in service.bodies] == [0, 1, 2, 3, 4]
    assert [accepted(result).correlation_key for result in results] == ["o-0", "o-1", "o-2", "o-3", "o-4"]
    assert service.most_at_once == 1
    assert {body["topic"] for body in service.bodies} == {"orders"}
    assert len({body["idempotencyKey"] for body in service.bodies}) == 5


async def test_many_side_by_side_are_bounded_and_answered_in_order(publisher: Publisher, service: Service) -> None:
    service.hold_until(3)

    results = await publisher.publish_many(orders(9), mode="parallel", concurrency=3)

    assert [accepted(result).correlation_key for result in results] == [f"o-{number}" for number in range(9)]
    assert sorted(body["payload"]["number"] for body in service.bodies) == list(range(9))
    assert service.most_at_once == 3


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
async def test_a_refused_one_among_many_does_not_stop_the_rest(
    publisher: Publisher, service: Service, mode: str
) -> None:
    bad = SagaMessage("OrderPlaced", {"x": float("inf")})

    first, second, third, fourth = await publisher.publish_many(
        [OrderPlaced("o-1"), bad, "OrderPlaced", OrderPlaced("o-2")], mode=mode
    )

    accepted(first)
    accepted(fourth)
    assert "payload.x" in rejected(second).reason
    assert "'OrderPlaced' is no message" in rejected(third).reason
    assert len(service.requests) == 2


async def test_no_messages_are_no_requests(publisher: Publisher, service: Service) -> None:
    assert await publisher.publish_many([], mode="parallel") == []
    assert service.requests == []


async def test_messages_may_come_from_a_generator(publisher: Publisher) -> None:
    results = await publisher.publish_many((order for order in orders(3)), mode="parallel")

    assert len([accepted(result) for result in results]) == 3


@pytest.mark.parametrize(
    ("named", "reason"),
    [
        ({"mode": "both"}, "mode='both' is unknown"),
        ({"mode": "parallel", "concurrency": 0}, "concurrency=0 must be 1 to 100"),
        ({"idempotency_key": "k"}, "would make all but the first a duplicate"),
        ({"options": 3}, "must be a mapping"),
        ({"nonsense": 1}, "unknown publish option 'nonsense'"),
    ],
)
async def test_what_cannot_be_done_for_many_is_refused_for_each(
    publisher: Publisher, service: Service, named: dict[str, Any], reason: str
) -> None:
    results = await publisher.publish_many(orders(2), **named)

    assert [reason in rejected(result).reason for result in results] == [True, True]
    assert service.requests == []


@pytest.mark.parametrize("messages", ["OrderPlaced", {"type": "OrderPlaced"}, SagaMessage("OrderPlaced", {}), 3])
async def test_one_message_in_the_place_of_many_is_refused(publisher: Publisher, messages: Any) -> None:
    (result,) = await publisher.publish_many(messages)

    assert "publish_many takes a list of messages" in rejected(result).reason


# --- Carriers of one's own -------------------------------------------------------------------------------------------


async def test_a_fetcher_carries_the_requests(new_publisher: New) -> None:
    asked: list[FetchRequest] = []

    def fetch(request: FetchRequest) -> FetchResponse:
        asked.append(request)
        return FetchResponse(status=200, content=b'{"published": true, "messageType": "OrderPlaced"}')

    accepted(await new_publisher("http://sagas", fetcher=fetch).publish("OrderPlaced", {}))

    (request,) = asked
    assert request.url == "http://sagas/api/v1/sagas/publish"
    assert 0 < request.timeout_seconds <= 10


async def test_a_fetcher_may_be_a_coroutine_function_where_there_is_a_loop() -> None:
    async def fetch(request: FetchRequest) -> FetchResponse:
        return FetchResponse(status=200, content=b'{"published": true, "messageType": "OrderPlaced"}')

    accepted(await create_saga_publisher(base_url="http://sagas", fetcher=fetch).publish("OrderPlaced", {}))
    refused = rejected(create_sync_saga_publisher(base_url="http://sagas", fetcher=fetch).publish("OrderPlaced", {}))

    assert "a synchronous publisher needs a plain function" in refused.reason
    assert not refused.retryable


@pytest.mark.parametrize(
    "answer",
    [None, {"status": 200}, FetchResponse(status=200, content="text"), FetchResponse(status="200")],  # type: ignore[arg-type]
)
async def test_a_fetcher_that_returns_something_else_is_told_so(new_publisher: New, answer: Any) -> None:
    refused = rejected(await new_publisher("http://sagas", fetcher=lambda _: answer).publish("OrderPlaced", {}))

    assert "the fetcher must return a FetchResponse" in refused.reason
    assert (refused.retryable, refused.attempts) == (False, 1)


@pytest.mark.parametrize(
    ("error", "attempts", "may_have_arrived"),
    [
        (ConnectionRefusedError("nobody"), 4, False),
        (ConnectionResetError("reset"), 4, True),
        (TimeoutError(), 4, True),
        (BackendUnavailable("not now"), 4, True),
        (MessageRejected("never"), 1, True),
        (ValueError("a bug"), 1, True),
    ],
)
async def test_a_fetcher_that_raises_is_tried_again_when_that_can_help(
    new_publisher: New, error: Exception, attempts: int, may_have_arrived: bool
) -> None:
    def fetch(request: FetchRequest) -> FetchResponse:
        raise error

    refused = rejected(await new_publisher("http://sagas", fetcher=fetch).publish("OrderPlaced", {}))

    assert (refused.attempts, refused.may_have_arrived) == (attempts, may_have_arrived)
    assert refused.retryable == (attempts > 1)
    assert refused.error.__cause__ is error


# --- Lifetimes -------------------------------------------------------------------------------------------------------


async def test_a_cancelled_publish_is_cancelled_and_not_refused(service: Service) -> None:
    service.answers = [None]
    service.hold_until(1)
    assert service.all_there is not None
    async with create_saga_publisher(base_url=service.url) as publisher:
        publishing = asyncio.create_task(publisher.publish("OrderPlaced", {}))
        await service.all_there.wait()

        publishing.cancel()

        with pytest.raises(asyncio.CancelledError):
            await publishing


async def test_a_publisher_serves_one_event_loop_after_the_other(service: Service) -> None:
    publisher = create_saga_publisher(base_url=service.url, retries=AT_ONCE)

    def in_a_loop_of_its_own() -> SagaPublisherResult:
        async def once() -> SagaPublisherResult:
            async with publisher:
                return await publisher.publish("OrderPlaced", {})

        return asyncio.run(once())

    results = [await asyncio.to_thread(in_a_loop_of_its_own) for _ in range(2)]

    assert [accepted(result).attempts for result in results] == [1, 1]


def test_a_blocking_publisher_closes_with_its_block() -> None:
    with create_sync_saga_publisher(base_url="http://127.0.0.1:9", retries=0, id="mine") as publisher:
        assert publisher.id == "mine"
        assert repr(publisher) == "<SyncHttpSagaPublisher mine>"
    publisher.close()


def test_the_http_client_is_loaded_with_the_first_publish() -> None:
    code = (
        "import sys; from sagaloom.runtime import create_saga_publisher, HttpSagaPublisherOptions; "
        "create_saga_publisher(base_url='http://x'); print('httpx2' in sys.modules)"
    )

    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout

    assert loaded.strip() == "False"
