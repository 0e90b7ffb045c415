"""POST /publish/batch: one result a message, in order, and no message in another's way."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest

from sagaloom.engine.limits import Limits
from sagaloom.runtime import RuntimeOptions
from tests.doors.http_door import PREFIX, PUBLISH, Door, open_door

BATCH = f"{PUBLISH}/batch"


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    async with open_door() as opened:
        yield opened


async def send_batch(door: Door, *messages: Any, **headers: str) -> httpx2.Response:
    return await door.client.post(BATCH, json={"messages": messages}, headers=headers)


def noted(n: int, **fields: Any) -> dict[str, Any]:
    return {"type": "Noted", "payload": {"n": n}, "correlationId": "n-1", **fields}


async def test_a_batch_that_is_durable_as_a_whole_is_202(door: Door) -> None:
    response = await send_batch(door, *(noted(n, messageId=f"m-{n}") for n in range(5)))

    answer = response.json()
    assert (response.status_code, answer["accepted"], answer["refused"]) == (202, 5, 0)
    assert [result["status"] for result in answer["results"]] == [202] * 5
    assert [result["receipt"]["messageId"] for result in answer["results"]] == [f"m-{n}" for n in range(5)]
    history = (await door.get("/instances/note/n-1/history")).json()["history"]
    assert [entry["payload"]["n"] for entry in history] == list(range(5))


async def test_messages_of_one_batch_share_a_commit(door: Door) -> None:
    before = door.runtime.counters.commits

    await send_batch(door, *({**noted(n), "correlationId": f"n-{n}"} for n in range(200)))

    assert door.runtime.counters.commits == before + 1


async def test_what_is_refused_keeps_no_other_from_being_accepted(door: Door) -> None:
    response = await send_batch(
        door,
        noted(1),
        {"type": "Unknown"},
        {"type": "OrderPaid"},
        "no message",
        {"type": "Noted", "correlationId": "a", "correlationKey": "b"},
        {"type": "OrderPlaced", "payload": {"amount": "much"}, "correlationId": "o-1"},
        {"type": "saga:cancel", "correlationId": "n-1"},
        noted(2),
    )

    answer = response.json()
    assert (response.status_code, answer["accepted"], answer["refused"]) == (200, 2, 6)
    assert [(one["status"], one.get("error", {}).get("code")) for one in answer["results"]] == [
        (202, None),
        (404, "SAGA_NOT_FOUND"),
        (422, "CORRELATION_REQUIRED"),
        (422, "VALIDATION_ERROR"),
        (422, "VALIDATION_ERROR"),
        (422, "VALIDATION_ERROR"),
        (422, "MESSAGE_TYPE_RESERVED"),
        (202, None),
    ]
    assert (await door.get("/instances/note/n-1")).json()["state"] == {"last": {"n": 2}}
    assert (await door.get("/instances/order/o-1")).status_code == 404


async def test_errors_of_one_batch_share_a_trace(door: Door) -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"

    response = await send_batch(door, {"type": "A"}, {"type": "B"}, traceparent=f"00-{trace}-00f067aa0ba902b7-01")

    assert {one["error"]["traceId"] for one in response.json()["results"]} == {trace}


async def test_a_repeat_in_a_batch_is_a_duplicate(door: Door) -> None:
    response = await send_batch(door, noted(1, idempotencyKey="k"), noted(1, idempotencyKey="k"))

    assert response.status_code == 202
    assert [one["receipt"]["duplicate"] for one in response.json()["results"]] == [False, True]
    assert (await door.get("/instances/note/n-1")).json()["version"] == 1


async def test_an_empty_batch_is_taken(door: Door) -> None:
    response = await send_batch(door)

    assert (response.status_code, response.json()) == (202, {"accepted": 0, "refused": 0, "results": []})


async def test_a_store_that_is_down_refuses_each_message_as_retryable(door: Door) -> None:
    door.store.is_down = True

    response = await send_batch(door, noted(1), noted(2))

    assert response.status_code == 200
    assert [(one["status"], one["error"]["retryable"]) for one in response.json()["results"]] == [(503, True)] * 2


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "the body is empty"),
        (b"{}", "messages"),
        (b"[]", "object"),
        (b'{"messages": {}}', "messages"),
        (b'{"messages": [}', "no valid JSON"),
        (b'{"messages": [], "mode": "all"}', "mode"),
        (b'{"messages": ["\xff"]}', "not UTF-8"),
    ],
)
async def test_what_is_no_batch_is_refused_as_a_whole(door: Door, content: bytes, named: str) -> None:
    response = await door.client.post(BATCH, content=content)

    assert (response.status_code, response.json()["code"]) == (422, "VALIDATION_ERROR")
    assert named in response.json()["message"]


async def test_a_batch_with_too_many_messages_takes_none() -> None:
    async with open_door(options=RuntimeOptions(limits=Limits(batch_messages_max=3))) as door:
        fits = await send_batch(door, *(noted(n) for n in range(3)))
        response = await send_batch(door, *(noted(n) for n in range(4)))

        assert (fits.status_code, response.status_code) == (202, 422)
        assert "4 are too many" in response.json()["message"]
        assert (await door.get("/instances/note/n-1")).json()["version"] == 3


@pytest.mark.parametrize(("query", "headers"), [("?wait=5s", {}), ("", {"idempotency-key": "k"})])
async def test_what_makes_sense_for_one_message_only_is_refused(
    door: Door, query: str, headers: dict[str, str]
) -> None:
    response = await door.client.post(BATCH + query, json={"messages": [noted(1)]}, headers=headers)

    assert (response.status_code, response.json()["code"]) == (422, "VALIDATION_ERROR")
    assert not door.store.instances_by_run


async def test_a_batch_may_be_longer_than_a_message(door: Door) -> None:
    async with open_door(body_bytes_max=1_000) as small:
        messages = [noted(n, payload={"text": "x" * 500}) for n in range(4)]

        together = await send_batch(small, *messages)
        too_long = await send_batch(small, *messages, *messages, *messages, *messages)

        assert len(json.dumps({"messages": messages})) > 1_000
        assert (together.status_code, too_long.status_code) == (202, 413)


async def test_a_batch_works_below_a_mount(door: Door) -> None:
    from starlette.applications import Starlette
    from starlette.routing import Mount

    from sagaloom.service import create_app

    transport = httpx2.ASGITransport(Starlette(routes=[Mount("/below", create_app(door.runtime))]))
    async with httpx2.AsyncClient(transport=transport, base_url="http://sagas/below") as client:
        response = await client.post(f"{PREFIX}/publish/batch", json={"messages": [noted(1)]})

    assert response.status_code == 202
