"""Health, sagas, dead letters, documents, and everything that is the same for all routes."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from sagaloom.errors import ConfigurationError
from sagaloom.service import create_app, shapes
from sagaloom.service.openapi import EXAMPLES
from sagaloom.web.health import ReadyView
from sagaloom.web.problems import Problem
from tests.doors.http_door import PREFIX, PUBLISH, Door, Switch, open_door, order_saga, serve, speak


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    async with open_door() as opened:
        yield opened


@pytest.fixture
async def guarded() -> AsyncIterator[Door]:
    async with open_door(token="a token") as opened:
        yield opened


# --- Health ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", PREFIX])
async def test_a_running_service_is_healthy_live_and_ready(door: Door, prefix: str) -> None:
    health, live, ready = [await door.client.get(prefix + "/health" + name) for name in ("", "/live", "/ready")]

    assert [one.status_code for one in (health, live, ready)] == [200, 200, 200]
    assert health.json()["status"] == "healthy"
    assert health.json()["timestamp"] == "2026-01-01T00:00:00.000Z"
    assert {"ok"} == set(health.json()["checks"].values())
    assert live.json() == {"status": "ok"}
    assert ready.json()["ready"]


async def test_a_store_that_is_down_makes_the_service_not_ready_and_says_why(door: Door) -> None:
    door.store.is_down = True
    await door.publish("Noted", {})

    health, ready = await door.client.get("/health"), await door.client.get("/health/ready")

    assert [health.status_code, ready.status_code] == [503, 503]
    assert health.json()["status"] == "unhealthy"
    assert not ready.json()["ready"]
    assert "the disk is gone" in ready.json()["checks"]["store"]
    assert (await door.client.get("/health/live")).status_code == 200


async def test_a_runtime_that_is_not_started_is_not_ready() -> None:
    async with open_door(is_started=False) as door:
        assert (await door.client.get("/health/ready")).status_code == 503
        assert (await door.client.get("/health/live")).status_code == 200


async def test_a_runtime_that_was_stopped_is_not_ready(door: Door) -> None:
    await door.runtime.stop()

    assert (await door.client.get("/health/ready")).status_code == 503


async def test_health_answers_head_requests_as_well(door: Door) -> None:
    assert (await door.client.head("/health")).status_code == 200


# --- Sagas -----------------------------------------------------------------------------------------------------------


async def test_a_saga_is_described_by_what_it_really_is(door: Door) -> None:
    found = (await door.get("/sagas/order")).json()

    view = msgspec.convert(found, shapes.SagaView, strict=True)
    assert (view.name, view.topic, view.enabled, view.durability_tier) == ("order", "default", True, "t1")
    assert [one.type for one in view.handled_message_types] == [
        "OrderPlaced",
        "OrderPaid",
        "OrderShipped",
        "OrderRefused",
    ]
    assert [one.type for one in view.handled_message_types if one.starts] == ["OrderPlaced"]
    assert [one.type for one in view.compensations] == ["OrderRefused"]
    assert view.retry.max_attempts == 5
    assert view.fingerprint == door.runtime.definitions.by_id["order"].fingerprint
    assert {"from": "start", "to": "OrderPlaced", "kind": "starts"} in found["graph"]["edges"]


async def test_an_unknown_saga_is_not_found(door: Door) -> None:
    response = await door.get("/sagas/nothing")

    assert (response.status_code, response.json()["code"]) == (404, "SAGA_NOT_FOUND")


@pytest.mark.parametrize(
    ("query", "ids", "total"),
    [
        ("", ["note", "order"], 2),
        ("?limit=1", ["note"], 2),
        ("?offset=1", ["order"], 2),
        ("?topic=default&enabled=true", ["note", "order"], 2),
        ("?topic=other", [], 0),
        ("?enabled=false", [], 0),
        ("?tags=billing", [], 0),
    ],
)
async def test_sagas_are_listed_by_id(door: Door, query: str, ids: list[str], total: int) -> None:
    found = (await door.client.get(f"{PREFIX}/sagas{query}")).json()

    assert (ids, total) == ([one["id"] for one in found["sagas"]], found["total"])


async def test_the_service_describes_itself(door: Door) -> None:
    found = msgspec.convert((await door.get("/describe")).json(), shapes.Description, strict=True)

    assert found.contract_versions == ["v1"]
    assert found.store.id == "memory-saga-store"
    assert [saga.id for saga in found.sagas] == ["note", "order"]


# --- Dead letters ----------------------------------------------------------------------------------------------------


@pytest.fixture
def switch() -> Switch:
    return Switch()


@pytest.fixture
async def broken(switch: Switch) -> AsyncIterator[Door]:
    """A door behind which the message `OrderShipped` of order o-1 has become a dead letter."""
    async with open_door(order_saga(switch)) as opened:
        await opened.publish(correlationId="o-1", wait="5s")
        await opened.publish("OrderShipped", {"n": 1}, correlationId="o-1", messageId="m-1", wait="5s")
        yield opened


async def only_letter(door: Door) -> dict[str, Any]:
    (letter,) = (await door.get("/dead-letters")).json()["deadLetters"]
    return letter  # type: ignore[no-any-return]


async def test_a_dead_letter_is_listed_and_shown_with_its_content(broken: Door) -> None:
    listed = await only_letter(broken)
    shown = (await broken.get(f"/dead-letters/{listed['id']}")).json()

    assert "Traceback" in shown.pop("traceback")
    assert shown.pop("payload") == {"n": 1}
    assert listed == shown
    assert tuple(listed[name] for name in ("kind", "sagaName", "correlationId", "type", "messageId")) == (
        "message",
        "order",
        "o-1",
        "OrderShipped",
        "m-1",
    )
    assert "the parcel is lost" in listed["reason"]


async def test_a_redriven_message_is_applied(broken: Door, switch: Switch) -> None:
    letter = await only_letter(broken)
    switch.is_broken = False

    response = await broken.post(f"/dead-letters/{letter['id']}/redrive")
    await broken.runtime.settled()

    assert (200, letter["id"]) == (response.status_code, response.json()["id"])
    assert (await broken.get("/instances/order/o-1")).json()["state"]["isShipped"]
    assert (await broken.get("/dead-letters")).json()["deadLetters"] == []


async def test_a_discarded_message_is_gone_and_frees_its_key(broken: Door, switch: Switch) -> None:
    letter = await only_letter(broken)

    response = await broken.post(f"/dead-letters/{letter['id']}/discard")

    assert response.status_code == 200
    assert (await broken.get("/dead-letters")).json()["deadLetters"] == []
    switch.is_broken = False
    again = await broken.publish("OrderShipped", {"n": 2}, correlationId="o-1", messageId="m-1", wait="5s")
    assert again.json()["outcomes"][0]["disposition"] == "applied"


@pytest.mark.parametrize(
    ("query", "count"),
    [
        ("sagaName=order", 1),
        ("sagaId=order&correlationId=o-1", 1),
        ("sagaId=order&correlationKey=o-2", 0),
        ("sagaName=other", 0),
        ("limit=1", 1),
    ],
)
async def test_dead_letters_are_filtered_by(broken: Door, query: str, count: int) -> None:
    found = (await broken.client.get(f"{PREFIX}/dead-letters?{query}")).json()

    assert count == len(found["deadLetters"])


async def test_dead_letters_are_read_in_pages(broken: Door) -> None:
    for number in range(4):
        broken.clock.advance("1s")
        await broken.publish("OrderShipped", {}, correlationId="o-1", messageId=f"n-{number}", wait="5s")
    seen: list[str] = []
    cursor: str | None = ""

    while cursor is not None:
        page = (await broken.get("/dead-letters", limit=2, cursor=cursor)).json()
        seen += [one["messageId"] for one in page["deadLetters"]]
        cursor = page["cursor"]

    assert seen == ["n-3", "n-2", "n-1", "n-0", "m-1"]


@pytest.mark.parametrize("path", ["/dead-letters/nothing", "/dead-letters/" + "x" * 201])
async def test_a_dead_letter_that_is_not_there_is_not_found(broken: Door, path: str) -> None:
    assert (await broken.get(path)).status_code in (404, 422)
    for verb in ("redrive", "discard"):
        response = await broken.post(f"{path}/{verb}")

        assert response.json()["code"] in ("DEAD_LETTER_NOT_FOUND", "VALIDATION_ERROR")


async def test_two_spellings_that_differ_are_refused(broken: Door) -> None:
    response = await broken.client.get(f"{PREFIX}/dead-letters?sagaName=a&sagaId=b")

    assert (response.status_code, response.json()["code"]) == (422, "VALIDATION_ERROR")


# --- Who may come in -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer", "Bearer a", "Basic a token", "a token"])
async def test_a_token_that_is_missing_or_wrong_is_401(guarded: Door, header: str | None) -> None:
    headers = {"authorization": header} if header is not None else {}
    for method, path in (
        ("GET", "/health"),
        ("GET", "/api/docs"),
        ("GET", "/api/openapi.json"),
        ("GET", PREFIX + "/instances"),
        ("POST", PUBLISH),
        ("GET", "/nothing"),
    ):
        response = await guarded.client.request(method, path, headers=headers)

        assert (response.status_code, response.json()["code"]) == (401, "UNAUTHORIZED"), path
        assert response.headers["www-authenticate"] == "Bearer"
        assert "a token" not in response.json()["message"]


@pytest.mark.parametrize("header", ["Bearer a token", "bearer a token", "BEARER  a token "])
async def test_the_right_token_lets_in(guarded: Door, header: str) -> None:
    headers = {"authorization": header}

    assert (await guarded.client.get("/health", headers=headers)).status_code == 200
    assert (await guarded.client.post(PUBLISH, headers=headers, json={"type": "Noted"})).status_code == 202


@pytest.mark.parametrize("prefix", ["", PREFIX])
async def test_liveness_needs_no_token(guarded: Door, prefix: str) -> None:
    assert (await guarded.client.get(prefix + "/health/live")).status_code == 200


@pytest.mark.parametrize("token", ["", " "])
async def test_an_empty_token_is_no_token_and_refused(door: Door, token: str) -> None:
    with pytest.raises(ConfigurationError, match="token is empty"):
        create_app(door.runtime, token=token)


@pytest.mark.parametrize("origin", ["https://evil.example", "http://sagas:81", "null"])
async def test_a_web_page_of_another_site_cannot_publish(door: Door, origin: str) -> None:
    response = await door.client.post(PUBLISH, json={"type": "Noted"}, headers={"origin": origin})

    assert (response.status_code, response.json()["code"]) == (403, "FORBIDDEN")
    assert not door.store.instances_by_run


async def test_a_web_page_of_this_service_can_publish(door: Door) -> None:
    response = await door.client.post(PUBLISH, json={"type": "Noted"}, headers={"origin": "http://sagas"})

    assert response.status_code == 202


async def test_no_answer_invites_other_sites(door: Door) -> None:
    headers = {"origin": "https://evil.example", "access-control-request-method": "POST"}

    preflight = await door.client.options(PUBLISH, headers=headers)
    read = await door.client.get(PREFIX + "/instances", headers=headers)

    assert not preflight.is_success
    for response in (preflight, read):
        assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        (b"localhost:8092", 200),
        (b"127.0.0.1", 200),
        (b"[::1]:8092", 200),
        (b"sagas.localhost", 200),
        (b"good.example", 200),
        (b"evil.example:8092", 403),
        (b"127.0.0.1.evil.example", 403),
        (b"localhost.evil.example", 403),
    ],
)
async def test_over_loopback_only_hosts_of_this_machine_are_served(door: Door, host: bytes, status: int) -> None:
    async with serve(create_app(door.runtime, allowed_hosts=["good.example"])) as port:
        found, body = await speak(port, b"GET /health HTTP/1.1\r\nhost: " + host + b"\r\n\r\n", is_ending=False)

    assert status == found, body


async def test_with_a_token_any_host_is_served(door: Door) -> None:
    async with serve(create_app(door.runtime, token="t")) as port:
        request = b"GET /health HTTP/1.1\r\nhost: sagas.example\r\nauthorization: Bearer t\r\n\r\n"
        status, _ = await speak(port, request, is_ending=False)

    assert status == 200


# --- Every error has one shape ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "NOT_FOUND"),
        ("GET", "/", 404, "NOT_FOUND"),
        ("GET", PREFIX, 404, "NOT_FOUND"),
        ("POST", PREFIX + "/subscribe", 405, "METHOD_NOT_ALLOWED"),
        ("GET", PREFIX + "/timers/x", 405, "METHOD_NOT_ALLOWED"),
        ("POST", PREFIX + "/instances/order/o-1", 404, "NOT_FOUND"),
        ("POST", PREFIX + "/instances/order/o-1/explode", 404, "NOT_FOUND"),
        ("GET", PREFIX + "/instances/order", 404, "NOT_FOUND"),
        ("GET", "/api/rpc", 404, "NOT_FOUND"),
        ("GET", PUBLISH, 405, "METHOD_NOT_ALLOWED"),
        ("PUT", PUBLISH, 405, "METHOD_NOT_ALLOWED"),
        ("GET", PUBLISH + "/batch", 405, "METHOD_NOT_ALLOWED"),
        ("POST", "/metrics", 405, "METHOD_NOT_ALLOWED"),
        ("POST", "/health", 405, "METHOD_NOT_ALLOWED"),
        ("DELETE", PREFIX + "/instances/order/o-1", 405, "METHOD_NOT_ALLOWED"),
        ("GET", PREFIX + "/dead-letters/x/redrive", 405, "METHOD_NOT_ALLOWED"),
    ],
)
async def test_a_route_or_method_that_is_not_served(door: Door, method: str, path: str, status: int, code: str) -> None:
    response = await door.client.request(method, path)

    problem = msgspec.convert(response.json(), Problem, strict=True)
    assert (status, code) == (response.status_code, problem.code)
    assert path in problem.message
    assert not problem.retryable
    assert (status == 405) == ("allow" in response.headers)


async def test_an_unexpected_error_of_a_reading_route_is_500_without_its_traceback(
    door: Door, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a secret of the house")

    monkeypatch.setattr(door.runtime, "list_instances", fail)
    response = await door.get("/instances")

    assert (response.status_code, response.json()["code"]) == (500, "INTERNAL")
    assert "secret" not in response.text
    assert "a secret of the house" in caplog.text
    assert response.json()["traceId"] in caplog.text


async def test_a_store_that_cannot_be_read_is_503(door: Door) -> None:
    door.store.is_down = True

    response = await door.get("/instances")

    assert (response.status_code, response.json()["code"]) == (503, "BACKEND_UNAVAILABLE")
    assert response.headers["retry-after"]


# --- Documents -------------------------------------------------------------------------------------------------------


async def test_the_openapi_document_lists_what_is_served_and_nothing_else(door: Door) -> None:
    document = (await door.client.get("/api/openapi.json")).json()

    assert {
        "/health",
        "/health/live",
        "/health/ready",
        f"{PREFIX}/describe",
        f"{PREFIX}/sagas",
        f"{PREFIX}/sagas/{{id}}",
        *(f"{PREFIX}/sagas/{{id}}/{verb}" for verb in ("pause", "resume", "disable", "enable", "migrate")),
        f"{PREFIX}/instances",
        f"{PREFIX}/instances/{{sagaName}}/{{correlationId}}",
        f"{PREFIX}/instances/{{sagaName}}/{{correlationId}}/history",
        f"{PREFIX}/instances/{{sagaName}}/{{correlationId}}/children",
        f"{PREFIX}/instances/{{sagaName}}/{{correlationId}}/cancel",
        f"{PREFIX}/instances/{{sagaName}}/{{correlationId}}/terminate",
        f"{PREFIX}/instances/{{sagaName}}/{{correlationId}}/skip",
        f"{PREFIX}/instances/{{sagaName}}/{{correlationId}}/pause",
        f"{PREFIX}/instances/{{sagaName}}/{{correlationId}}/resume",
        PUBLISH,
        f"{PUBLISH}/batch",
        f"{PREFIX}/subscribe",
        f"{PREFIX}/timers",
        f"{PREFIX}/timers/{{id}}",
        f"{PREFIX}/schedules",
        f"{PREFIX}/schedules/{{id}}/trigger",
        f"{PREFIX}/dead-letters",
        f"{PREFIX}/dead-letters/{{id}}",
        f"{PREFIX}/dead-letters/{{id}}/redrive",
        f"{PREFIX}/dead-letters/{{id}}/discard",
        f"{PREFIX}/dead-letters/redrive",
        f"{PREFIX}/dead-letters/discard",
        f"{PREFIX}/instances/{{sagaName}}/{{correlationId}}/signals/{{name}}",
        f"{PREFIX}/instances/{{sagaName}}/{{correlationId}}/updates/{{name}}",
        f"{PREFIX}/instances/{{sagaName}}/{{correlationId}}/queries/{{name}}",
        f"{PREFIX}/instances/{{sagaName}}/{{correlationId}}/replies",
    } == document["paths"].keys()
    assert document["openapi"].startswith("3.1")


async def test_every_reference_of_the_openapi_document_leads_somewhere(door: Door) -> None:
    text = (await door.client.get("/api/openapi.json")).text

    named = set(re.findall(r'"#/components/schemas/([^"]+)"', text))

    assert named
    assert named <= json.loads(text)["components"]["schemas"].keys()


async def test_every_operation_of_the_openapi_document_says_what_it_answers(door: Door) -> None:
    document = (await door.client.get("/api/openapi.json")).json()
    operations = [operation for path in document["paths"].values() for operation in path.values()]

    for operation in operations:
        assert operation["description"], operation["operationId"]
        assert "500" in operation["responses"]
        for response in operation["responses"].values():
            assert all(content["schema"] for content in response["content"].values())
    assert len(operations) == len({operation["operationId"] for operation in operations})


async def test_with_a_token_the_openapi_document_asks_for_it(guarded: Door) -> None:
    document = (await guarded.client.get("/api/openapi.json", headers={"authorization": "Bearer a token"})).json()

    assert document["security"] == [{"token": []}]
    assert document["paths"]["/health/live"]["get"]["security"] == []


@pytest.mark.parametrize("shape", EXAMPLES, ids=lambda shape: shape.__name__)
def test_an_example_has_the_shape_it_is_an_example_of(shape: type) -> None:
    msgspec.json.decode(msgspec.json.encode(EXAMPLES[shape]), type=shape, strict=True)


async def test_the_answers_have_the_shapes_that_the_document_promises(broken: Door) -> None:
    letter = await only_letter(broken)
    for path, shape in (
        ("/instances", shapes.InstanceList),
        ("/instances/order/o-1", shapes.InstanceView),
        ("/instances/order/o-1/history", shapes.HistoryList),
        ("/sagas", shapes.SagaList),
        ("/dead-letters", shapes.DeadLetterList),
        (f"/dead-letters/{letter['id']}", shapes.DeadLetterView),
        ("/health", shapes.HealthView),
        ("/health/ready", ReadyView),
    ):
        msgspec.json.decode((await broken.get(path)).content, type=shape, strict=True)


async def test_the_docs_page_shows_every_route_and_loads_nothing(door: Door) -> None:
    document = (await door.client.get("/api/openapi.json")).json()
    page = await door.client.get("/api/docs")

    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for path in document["paths"]:
        assert f"<code>{path}</code>" in page.text
    assert not re.search(r"<script|<link|<img|@import|url\(|https?:", page.text)
