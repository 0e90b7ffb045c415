"""POST /publish: what is taken in, what it answers, and what is refused."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import httpx2
import pytest

from sagaloom import define_saga
from sagaloom.engine.limits import Limits
from sagaloom.runtime import RuntimeOptions
from sagaloom.service import create_app
from tests.doors.http_door import PUBLISH, Door, Switch, open_door, order_saga, serve, speak
from tests.patience import PATIENCE_SECONDS

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    async with open_door() as opened:
        yield opened


def refused(response: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    """The body of an error, checked for what every error has."""
    body: dict[str, Any] = response.json()
    assert (status, code) == (response.status_code, body["code"]), body
    assert body.keys() - {"data"} == {"code", "message", "retryable", "traceId"}
    assert body["message"]
    assert len(body["traceId"]) == 32
    return body


# --- Taken in --------------------------------------------------------------------------------------------------------


async def test_a_message_is_answered_with_202_and_its_names(door: Door) -> None:
    response = await door.publish(correlationId="o-1", messageId="m-1")

    assert response.status_code == 202
    assert response.json() == {
        "published": True,
        "messageType": "OrderPlaced",
        "messageId": "m-1",
        "duplicate": False,
        "instances": [
            {
                "sagaName": "order",
                "instanceId": "order:o-1",
                "correlationId": "o-1",
                "correlationKey": "o-1",
                "run": 1,
            }
        ],
        "correlationId": "o-1",
        "correlationKey": "o-1",
    }


async def test_a_message_without_an_id_gets_one(door: Door) -> None:
    assert (await door.publish(correlationId="o-1")).json()["messageId"]


async def test_a_wait_shows_what_the_message_did(door: Door) -> None:
    response = await door.publish(payload={"amount": 7}, correlationId="o-1", wait="5s")

    assert response.json()["outcomes"] == [
        {
            "instanceId": "order:o-1",
            "sagaId": "order",
            "correlationId": "o-1",
            "correlationKey": "o-1",
            "run": 1,
            "disposition": "applied",
            "effects": ["send"],
            "status": "running",
            "revision": 1,
            "state": {"amount": 7, "status": "the order's own"},
        }
    ]


@pytest.mark.parametrize("wait", ["5", "0.5", "500ms", "5s"])
async def test_a_wait_is_seconds_or_a_duration(door: Door, wait: str) -> None:
    assert "outcomes" in (await door.publish(correlationId="o-1", wait=wait)).json()


async def test_a_wait_of_zero_is_no_wait(door: Door) -> None:
    assert "outcomes" not in (await door.publish(correlationId="o-1", wait="0")).json()


async def test_a_wait_that_ends_early_is_pending_and_no_error() -> None:
    def failing(saga: Any, event: Any, context: Any) -> Any:
        raise OSError("not now")

    async with open_door(define_saga("slow").state({}).on("Slow", failing).build()) as door:
        response = await door.publish("Slow", correlationId="s-1", wait="10ms")

        assert response.status_code == 202
        assert response.json()["outcomes"][0]["disposition"] == "pending"


async def test_the_result_of_a_completed_saga_is_shown_to_who_waits(door: Door) -> None:
    await door.publish(correlationId="o-1")

    (outcome,) = (await door.publish("OrderPaid", {}, correlationId="o-1", wait="5s")).json()["outcomes"]

    assert (outcome["status"], outcome["result"]) == ("completed", {"paid": True})


async def test_correlation_key_is_another_spelling_of_correlation_id(door: Door) -> None:
    assert (await door.publish(correlationKey="o-1")).json()["correlationId"] == "o-1"
    assert (await door.publish(correlationId="o-2", correlationKey="o-2")).status_code == 202


async def test_two_different_correlation_keys_are_refused(door: Door) -> None:
    response = await door.publish(correlationId="o-1", correlationKey="o-2")

    body = refused(response, 422, "VALIDATION_ERROR")
    assert "'o-1'" in body["message"]
    assert "'o-2'" in body["message"]
    assert not door.store.instances_by_run


async def test_a_payload_that_is_left_out_or_null_is_an_empty_object(door: Door) -> None:
    for body in ({"type": "Noted", "correlationId": "n"}, {"type": "Noted", "payload": None, "correlationId": "n"}):
        await door.client.post(PUBLISH, json=body)

        assert (await door.get("/instances/note/n")).json()["state"] == {"last": {}}


async def test_a_message_without_any_key_opens_a_run_of_its_own_each_time(door: Door) -> None:
    answers = [(await door.publish("Noted", {}, wait="5s")).json() for _ in range(2)]

    assert [one["instances"][0]["instanceId"] for one in answers] == ["note:note:Noted", "note~2:note:Noted"]


async def test_when_it_occurred_and_its_trace_are_kept_with_the_message(door: Door) -> None:
    switch = Switch()
    async with open_door(order_saga(switch)) as broken:
        await broken.publish(correlationId="o-1")
        await broken.publish(
            "OrderShipped",
            {},
            correlationId="o-1",
            occurredAt="2026-01-02T03:04:05+01:00",
            traceparent=TRACE,
            tracestate="vendor=1",
        )

        (letter,) = broken.store.dead_letters_by_id.values()
        assert letter.envelope is not None
        assert datetime(2026, 1, 2, 2, 4, 5, tzinfo=UTC) == letter.envelope.occurred_at
        assert (letter.envelope.traceparent, letter.envelope.tracestate) == (TRACE, "vendor=1")


async def test_the_trace_of_the_headers_is_taken_when_the_body_has_none(door: Door) -> None:
    body = {"type": "Noted", "correlationId": "n-1"}
    await door.client.post(PUBLISH, json=body, headers={"traceparent": TRACE, "tracestate": "vendor=1"})

    (entry,) = (await door.get("/instances/note/n-1/history")).json()["history"]
    assert (entry["traceparent"], entry["tracestate"]) == (TRACE, "vendor=1")


@pytest.mark.parametrize("trace", ["nonsense", "00-" + "0" * 32 + "-00f067aa0ba902b7-01"])
async def test_a_malformed_trace_gives_way_to_a_new_one_and_the_message_is_taken(door: Door, trace: str) -> None:
    response = await door.publish("Noted", {}, correlationId="n-1", traceparent=trace)

    assert response.status_code == 202
    (entry,) = (await door.get("/instances/note/n-1/history")).json()["history"]
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-01", entry["traceparent"])
    assert entry["traceparent"] != trace


@pytest.mark.parametrize("content_type", [None, "application/json; charset=utf-8", "application/cloudevents+json"])
async def test_json_is_taken_under_its_names_and_under_none(door: Door, content_type: str | None) -> None:
    headers = {"content-type": content_type} if content_type is not None else {}
    content = json.dumps({"type": "Noted"}).encode()

    assert (await door.client.post(PUBLISH, content=content, headers=headers)).status_code == 202


# --- Duplicates ------------------------------------------------------------------------------------------------------


async def test_a_repeat_under_one_idempotency_key_is_a_duplicate_with_the_first_receipt(door: Door) -> None:
    first = await door.publish(correlationId="o-1", idempotencyKey="k-1")
    again = await door.publish(correlationId="o-1", idempotencyKey="k-1")

    assert again.status_code == 202
    assert {**first.json(), "duplicate": True} == again.json()
    assert (await door.get("/instances/order/o-1")).json()["version"] == 1


async def test_an_idempotency_key_with_other_content_is_refused(door: Door) -> None:
    await door.publish(payload={"amount": 1}, correlationId="o-1", idempotencyKey="k-1")
    response = await door.publish(payload={"amount": 2}, correlationId="o-1", idempotencyKey="k-1")

    assert not refused(response, 422, "IDEMPOTENCY_KEY_REUSED")["retryable"]


@pytest.mark.parametrize("header", ["k-1", '"k-1"'])
async def test_the_idempotency_key_header_says_the_same_as_the_body(door: Door, header: str) -> None:
    await door.publish(correlationId="o-1", idempotencyKey="k-1")
    body = {"type": "OrderPlaced", "payload": {"amount": 1}, "correlationId": "o-1"}

    response = await door.client.post(PUBLISH, json=body, headers={"Idempotency-Key": header})

    assert response.json()["duplicate"]


async def test_an_idempotency_key_header_that_contradicts_the_body_is_refused(door: Door) -> None:
    body = {"type": "Noted", "idempotencyKey": "k-1"}

    response = await door.client.post(PUBLISH, json=body, headers={"Idempotency-Key": "k-2"})

    assert "'k-2'" in refused(response, 422, "VALIDATION_ERROR")["message"]


# --- Refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "position"),
    [
        (b'{"type": nope}', 13),
        (b'{"type": "Noted"', 16),
        (b'{"type": "Noted"} x', 19),
        (b'{"type": "Noted", "payload": {"a": \xff}}', 35),
        (b'{"type": "Noted", "payload": {"a": "\xff"}}', 36),
    ],
)
async def test_malformed_json_is_refused_with_the_position(door: Door, content: bytes, position: int) -> None:
    response = await door.client.post(PUBLISH, content=content)

    body = refused(response, 422, "VALIDATION_ERROR")
    assert position == body["data"]["position"]
    assert str(position) in body["message"]


@pytest.mark.parametrize("content", [b"", b"  ", b"[]", b"1", b"null", b'"text"'])
async def test_a_body_that_is_no_object_is_refused_with_an_example(door: Door, content: bytes) -> None:
    response = await door.client.post(PUBLISH, content=content)

    assert "OrderPlaced" in refused(response, 422, "VALIDATION_ERROR")["message"]


async def test_a_body_nested_without_end_is_refused(door: Door) -> None:
    deep = b'{"type": "Noted", "payload": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"

    refused(await door.client.post(PUBLISH, content=deep), 422, "VALIDATION_ERROR")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"payload": {}}, "type"),
        ({"type": ""}, "type"),
        ({"type": None}, "type"),
        ({"type": 3}, "type"),
        ({"type": "Noted", "correlationId": 7}, "correlationId"),
        ({"type": "Noted", "occurredAt": "yesterday"}, "occurredAt"),
        ({"type": "Noted", "occurredAt": "2026-01-01T00:00:00"}, "occurredAt"),
        ({"type": "Noted", "occurredAt": "0001-01-01T00:00:00+14:00"}, "occurredAt"),
        ({"type": "Noted", "idempotencykey": "k"}, "idempotencykey"),
    ],
)
async def test_a_field_that_is_not_what_it_should_be_is_named(door: Door, body: Any, field: str) -> None:
    response = await door.client.post(PUBLISH, json=body)

    assert field in refused(response, 422, "VALIDATION_ERROR")["message"]


async def test_an_unknown_type_is_not_found(door: Door) -> None:
    response = await door.publish("OrderVanished")

    assert "'OrderVanished'" in refused(response, 404, "SAGA_NOT_FOUND")["message"]


@pytest.mark.parametrize("payload", [{"amount": "many"}, {}, [], "text", 3])
async def test_a_payload_of_the_wrong_type_is_refused_with_its_place(door: Door, payload: Any) -> None:
    response = await door.publish(payload=payload, correlationId="o-1")

    assert "'order'" in refused(response, 422, "VALIDATION_ERROR")["message"]
    assert not door.store.instances_by_run


async def test_a_message_that_names_no_instance_and_may_not_start_one_is_refused(door: Door) -> None:
    refused(await door.publish("OrderPaid", {}), 422, "CORRELATION_REQUIRED")


@pytest.mark.parametrize(
    "key",
    ["", "k" * 10_240, "\x00", "a\nb", "".join(map(chr, range(32)))],
    ids=["empty", "10 KiB", "null", "newline", "controls"],
)
@pytest.mark.parametrize("field", ["correlationId", "idempotencyKey", "messageId"])
async def test_a_key_that_is_empty_too_long_or_full_of_controls_is_refused(door: Door, field: str, key: str) -> None:
    response = await door.publish("Noted", {}, **{"correlationId": "n-1", field: key})

    refused(response, 422, "VALIDATION_ERROR")
    assert not door.store.instances_by_run


async def test_a_lone_surrogate_in_a_key_is_refused(door: Door) -> None:
    content = b'{"type": "Noted", "correlationId": "\\ud800"}'

    refused(await door.client.post(PUBLISH, content=content), 422, "VALIDATION_ERROR")


async def test_a_payload_above_the_limit_of_the_runtime_is_too_large() -> None:
    options = RuntimeOptions(limits=Limits(payload_bytes_max=100))
    async with open_door(options=options) as door:
        response = await door.publish("Noted", {"text": "x" * 100})

        refused(response, 413, "PAYLOAD_TOO_LARGE")


async def test_a_payload_exactly_at_the_limit_fits_into_a_body() -> None:
    payload = {"text": "x" * ((1 << 20) - 11)}
    async with open_door() as door:
        assert (await door.publish("Noted", payload)).status_code == 202
        refused(await door.publish("Noted", {"text": payload["text"] + "x"}), 413, "PAYLOAD_TOO_LARGE")


async def test_a_body_above_its_limit_is_too_large() -> None:
    async with open_door(body_bytes_max=100) as door:
        body = refused(await door.publish("Noted", {"text": "x" * 100}), 413, "PAYLOAD_TOO_LARGE")

        assert "100" in body["message"]
        assert (await door.publish("Noted", {})).status_code == 202


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
async def test_what_a_web_form_can_send_is_no_json(door: Door, content_type: str) -> None:
    response = await door.client.post(PUBLISH, content=b'{"type": "Noted"}', headers={"content-type": content_type})

    assert content_type in refused(response, 415, "UNSUPPORTED_MEDIA_TYPE")["message"]


async def test_a_compressed_body_is_refused(door: Door) -> None:
    response = await door.client.post(PUBLISH, content=b"\x1f\x8b", headers={"content-encoding": "gzip"})

    assert "gzip" in refused(response, 415, "UNSUPPORTED_MEDIA_TYPE")["message"]


@pytest.mark.parametrize("wait", ["", "soon", "-1", "1e99999", "nan", "31", "1h", "5 s"])
async def test_a_wait_that_is_no_duration_or_too_long_is_refused(door: Door, wait: str) -> None:
    assert "wait=" in refused(await door.publish("Noted", {}, wait=wait), 422, "VALIDATION_ERROR")["message"]


async def test_an_unknown_query_parameter_is_refused(door: Door) -> None:
    response = await door.client.post(PUBLISH + "?wiat=5s", json={"type": "Noted"})

    assert "'wiat'" in refused(response, 422, "VALIDATION_ERROR")["message"]


async def test_an_overloaded_runtime_answers_503_with_retry_after() -> None:
    async with open_door(options=RuntimeOptions(backlog_max=0)) as door:
        response = await door.publish("Noted", {})

        assert refused(response, 503, "SAGA_OVERLOADED")["retryable"]
        assert response.headers["retry-after"] == "1"


async def test_a_runtime_that_is_not_started_answers_503() -> None:
    async with open_door(is_started=False) as door:
        assert refused(await door.publish("Noted", {}), 503, "SAGA_NOT_STARTED")["retryable"]


async def test_a_store_that_is_down_answers_503_and_recovers_by_itself(door: Door) -> None:
    door.store.is_down = True
    response = await door.publish("Noted", {}, correlationId="n-1", idempotencyKey="k")
    assert "the disk is gone" in refused(response, 503, "BACKEND_UNAVAILABLE")["message"]

    door.store.is_down = False
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not door.runtime.health().ready:  # noqa: ASYNC110  # the store is probed again in real time
            await asyncio.sleep(0.005)
    response = await door.publish("Noted", {}, correlationId="n-1", idempotencyKey="k")

    assert response.status_code == 202
    assert not response.json()["duplicate"]


async def test_the_trace_of_the_caller_is_the_trace_of_the_error(door: Door) -> None:
    response = await door.client.post(PUBLISH, json={"type": "Nothing"}, headers={"traceparent": TRACE})

    assert response.json()["traceId"] == "4bf92f3577b34da6a3ce929d0e0e4736"


async def test_an_unexpected_error_is_500_and_its_traceback_stays_in_the_log(
    door: Door, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a secret of the house")

    monkeypatch.setattr(door.runtime, "publish", fail)
    body = refused(await door.publish(), 500, "INTERNAL")

    assert not body["retryable"]
    assert "secret" not in body["message"]
    assert "a secret of the house" in caplog.text
    assert body["traceId"] in caplog.text


# --- On the wire -----------------------------------------------------------------------------------------------------


async def test_a_chunked_body_is_taken(door: Door) -> None:
    async with serve(create_app(door.runtime)) as port:
        status, body = await speak(
            port,
            b"POST /api/v1/sagas/publish HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n",
            b'9\r\n{"type": \r\n8\r\n"Noted"}\r\n0\r\n\r\n',
            is_ending=False,
        )

    assert (status, json.loads(body)["messageType"]) == (202, "Noted")


async def test_a_chunked_body_without_end_is_refused_before_it_ends(door: Door) -> None:
    chunk = b"400\r\n" + b"x" * 1024 + b"\r\n"
    async with serve(create_app(door.runtime, body_bytes_max=10_000)) as port:
        status, body = await speak(
            port,
            b"POST /api/v1/sagas/publish HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n",
            chunk * 10,
            is_ending=False,
        )

    assert (status, json.loads(body)["code"]) == (413, "PAYLOAD_TOO_LARGE")


async def test_a_content_length_above_the_limit_is_refused_without_reading(door: Door) -> None:
    async with serve(create_app(door.runtime)) as port:
        status, body = await speak(
            port,
            b"POST /api/v1/sagas/publish HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99999999999\r\n\r\n",
            is_ending=False,
        )

    assert (status, json.loads(body)["code"]) == (413, "PAYLOAD_TOO_LARGE")


async def test_a_body_shorter_than_its_content_length_is_not_waited_for_without_end(door: Door) -> None:
    async with serve(create_app(door.runtime, body_seconds_max=0.01)) as port:
        status, body = await speak(
            port,
            b"POST /api/v1/sagas/publish HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n",
            b'{"type": "Noted"}',
            is_ending=False,
        )

    assert (status, json.loads(body)["code"]) == (408, "REQUEST_TIMEOUT")
    assert json.loads(body)["retryable"]


async def test_a_body_longer_than_its_content_length_is_refused(door: Door) -> None:
    async with serve(create_app(door.runtime)) as port:
        status, body = await speak(
            port,
            b"POST /api/v1/sagas/publish HTTP/1.1\r\nhost: localhost\r\ncontent-length: 10\r\n\r\n",
            b'{"type": "Noted"}',
            is_ending=False,
        )

    # One parser reads as far as it was told; another sees at once that what follows is no request.
    assert status in (400, 422), body


async def test_a_client_that_leaves_while_sending_publishes_nothing(door: Door) -> None:
    sent: list[Any] = []
    events = iter([{"type": "http.request", "body": b'{"type": "No', "more_body": True}, {"type": "http.disconnect"}])
    scope = {
        "type": "http",
        "method": "POST",
        "path": PUBLISH,
        "raw_path": PUBLISH.encode(),
        "query_string": b"",
        "headers": [],
    }

    async def receive() -> Any:
        return next(events)

    async def send(message: Any) -> None:
        sent.append(message)

    await create_app(door.runtime)(scope, receive, send)

    assert not sent
    assert not door.store.instances_by_run
