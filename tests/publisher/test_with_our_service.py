"""Publishers in front of our own service over a real socket, and the body of the publisher that came before ours."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any

import httpx2
import pytest

from sagaloom import IdempotencyKeyReused, SagaMessage, SagaNotFound, define_saga
from sagaloom.integration.publisher import SagaPublisherReceipt, SagaPublisherRejected, SagaPublisherResult
from sagaloom.runtime import RuntimeOptions
from sagaloom.service import create_app
from tests.doors.http_door import PUBLISH, Door, OrderPlaced, note_saga, open_door, order_saga, serve
from tests.publisher.conftest import Publisher, listening

New = Callable[..., Publisher]
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    async with open_door(order_saga(), note_saga()) as opened:
        yield opened


@pytest.fixture
async def url(door: Door) -> AsyncIterator[str]:
    async with serve(create_app(door.runtime)) as port:
        yield f"http://127.0.0.1:{port}"


def accepted(result: SagaPublisherResult) -> SagaPublisherReceipt:
    assert isinstance(result, SagaPublisherReceipt), result
    return result


def rejected(result: SagaPublisherResult) -> SagaPublisherRejected:
    assert isinstance(result, SagaPublisherRejected), result
    result.reason  # noqa: B018  # looked at
    return result


async def test_a_published_message_reaches_its_saga(door: Door, new_publisher: New, url: str) -> None:
    receipt = accepted(await new_publisher(url).publish(OrderPlaced, {"amount": 7}, correlation_key="o-1"))

    await door.runtime.settled()
    instance = (await door.get("/instances/order/o-1")).json()
    assert instance["state"] == {"amount": 7, "status": "the order's own"}
    assert (receipt.message_type, receipt.correlation_key, receipt.duplicate) == ("OrderPlaced", "o-1", False)
    assert receipt.instance_ids == ("order:o-1",)
    (entry,) = (await door.get("/instances/order/o-1/history")).json()["history"]
    assert entry["messageId"] == receipt.message_id


async def test_who_waits_sees_what_the_message_did(new_publisher: New, url: str) -> None:
    publisher = new_publisher(url)
    await publisher.publish("OrderPlaced", {"amount": 7}, correlation_key="o-1")

    receipt = accepted(await publisher.publish("OrderPaid", {}, correlation_key="o-1", wait=5))

    (outcome,) = receipt.outcomes
    assert (outcome.disposition, outcome.status, outcome.result) == ("applied", "completed", {"paid": True})
    assert (outcome.instance_id, outcome.revision, outcome.effects) == ("order:o-1", 2, ["complete"])
    assert outcome.message_id == receipt.message_id


async def test_a_dict_with_dates_arrives_as_json(door: Door, new_publisher: New, url: str) -> None:
    moment = datetime(2026, 1, 31, 12, tzinfo=UTC)

    await new_publisher(url).publish("Noted", {"at": moment, "none": None}, correlation_key="n-1", wait=5)

    instance = (await door.get("/instances/note/n-1")).json()
    assert instance["state"] == {"last": {"at": "2026-01-31T12:00:00Z", "none": None}}


async def test_a_repeat_under_one_key_is_a_duplicate_that_changes_nothing(
    door: Door, new_publisher: New, url: str
) -> None:
    publisher = new_publisher(url)
    first = accepted(await publisher.publish("Noted", {"n": 1}, correlation_key="n-1", idempotency_key="k-1"))

    again = accepted(await publisher.publish("Noted", {"n": 1}, correlation_key="n-1", idempotency_key="k-1"))

    assert (first.duplicate, again.duplicate) == (False, True)
    assert again.message_id == first.message_id
    assert (await door.get("/instances/note/n-1")).json()["messageCount"] == 1


async def test_a_key_that_comes_back_with_other_content_is_refused(new_publisher: New, url: str) -> None:
    publisher = new_publisher(url)
    await publisher.publish("Noted", {"n": 1}, correlation_key="n-1", idempotency_key="k-1")

    refused = rejected(await publisher.publish("Noted", {"n": 2}, correlation_key="n-1", idempotency_key="k-1"))

    assert (refused.code, refused.retryable, refused.attempts) == ("IDEMPOTENCY_KEY_REUSED", False, 1)
    with pytest.raises(IdempotencyKeyReused):
        refused.raise_for_rejected()


async def test_a_type_that_nobody_handles_is_refused_by_name(new_publisher: New, url: str) -> None:
    refused = rejected(await new_publisher(url).publish("Nonsense", {}, correlation_key="x"))

    assert refused.code == "SAGA_NOT_FOUND"
    assert "no saga handles message type 'Nonsense'" in refused.reason
    with pytest.raises(SagaNotFound):
        refused.raise_for_rejected()


async def test_a_message_that_names_no_instance_is_refused(new_publisher: New, url: str) -> None:
    assert rejected(await new_publisher(url).publish("OrderPaid", {})).code == "CORRELATION_REQUIRED"


async def test_a_service_with_a_token_wants_it(door: Door, new_publisher: New) -> None:
    async with serve(create_app(door.runtime, token="t-1")) as port:
        url = f"http://127.0.0.1:{port}"
        without = await new_publisher(url).publish("Noted", {}, correlation_key="n-1")
        with_token = await new_publisher(url, headers={"Authorization": "Bearer t-1"}).publish(
            "Noted", {}, correlation_key="n-1"
        )

    assert rejected(without).code == "UNAUTHORIZED"
    accepted(with_token)


async def test_an_overloaded_service_is_asked_again_later(new_publisher: New) -> None:
    async with (
        open_door(note_saga(), options=RuntimeOptions(backlog_max=0)) as door,
        serve(create_app(door.runtime)) as port,
    ):
        publisher = new_publisher(f"http://127.0.0.1:{port}", timeout=0.9)
        refused = rejected(await publisher.publish("Noted", {}, correlation_key="n-1"))

    # It says Retry-After: 1, which is more than this publisher has.
    assert (refused.code, refused.retryable, refused.attempts) == ("SAGA_OVERLOADED", True, 1)
    assert refused.error.data["retryAfterSeconds"] == 1.0


async def test_many_to_one_instance_are_accepted_in_their_order(door: Door, new_publisher: New, url: str) -> None:
    messages = [SagaMessage("Noted", {"n": number}, "n-1") for number in range(20)]

    results = await new_publisher(url).publish_many(messages)

    await door.runtime.settled()
    assert [accepted(result).duplicate for result in results] == [False] * 20
    instance = (await door.get("/instances/note/n-1")).json()
    assert (instance["state"], instance["messageCount"]) == ({"last": {"n": 19}}, 20)


async def test_many_side_by_side_all_arrive(door: Door, new_publisher: New, url: str) -> None:
    messages = [SagaMessage("Noted", {"n": number}, f"n-{number}") for number in range(40)]

    results = await new_publisher(url).publish_many(messages, mode="parallel", concurrency=8)

    assert [accepted(result).instance_ids for result in results] == [(f"note:n-{number}",) for number in range(40)]


# --- A service that dies between acceptance and answer ---------------------------------------------------------------


@contextlib.asynccontextmanager
async def losing_answers(url: str, lost: int) -> AsyncIterator[str]:
    """In front of `url`: passes requests on, and cuts the line instead of the first `lost` answers."""
    host, port = url.removeprefix("http://").split(":")
    left = lost

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal left
        behind, forward = await asyncio.open_connection(host, int(port))
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            forward.write(head + await reader.readexactly(int(length.split(b":")[1])))
            answer = await behind.readuntil(b"\r\n\r\n")
            length = next(line for line in answer.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            answer += await behind.readexactly(int(length.split(b":")[1]))
            left -= 1
            if left < 0:
                writer.write(answer)
                await writer.drain()
        finally:
            forward.close()
            await forward.wait_closed()

    async with listening(talk) as front:
        yield front


async def test_a_message_whose_answer_got_lost_is_applied_once(door: Door, new_publisher: New, url: str) -> None:
    async with losing_answers(url, lost=2) as front:
        receipt = accepted(await new_publisher(front).publish("Noted", {"n": 1}, correlation_key="n-1"))

    await door.runtime.settled()
    assert (receipt.duplicate, receipt.attempts) == (True, 3)
    assert (await door.get("/instances/note/n-1")).json()["messageCount"] == 1
    (entry,) = (await door.get("/instances/note/n-1/history")).json()["history"]
    assert entry["messageId"] == receipt.message_id


async def test_a_message_without_any_key_is_applied_once_too(door: Door, new_publisher: New, url: str) -> None:
    async with losing_answers(url, lost=1) as front:
        receipt = accepted(await new_publisher(front).publish("Noted", {"n": 1}))

    await door.runtime.settled()
    listed = (await door.get("/instances")).json()
    assert (receipt.duplicate, listed["total"]) == (True, 1)
    assert listed["instances"][0]["messageCount"] == 1


async def test_a_refusal_whose_message_arrived_can_be_repeated_under_its_key(
    door: Door, new_publisher: New, url: str
) -> None:
    async with losing_answers(url, lost=99) as front:
        refused = rejected(await new_publisher(front).publish("Noted", {"n": 1}, correlation_key="n-1"))

    again = await new_publisher(url).publish(
        "Noted", {"n": 1}, correlation_key="n-1", idempotency_key=refused.idempotency_key
    )

    await door.runtime.settled()
    assert (refused.retryable, refused.may_have_arrived) == (True, True)
    assert accepted(again).duplicate
    assert (await door.get("/instances/note/n-1")).json()["messageCount"] == 1


# --- The publisher that came before ours -----------------------------------------------------------------------------


async def test_the_body_of_the_existing_publisher_is_taken(url: str) -> None:
    body: dict[str, Any] = {
        "type": "Noted",
        "payload": {"value": 3},
        "correlationId": "n-1",
        "correlationKey": "n-1",
        "idempotencyKey": "k-1",
        "concurrencyKey": "c-1",
        "topic": "notes",
        "traceparent": TRACEPARENT,
        "tracestate": "vendor=1",
    }
    headers = {"traceparent": TRACEPARENT, "tracestate": "vendor=1"}

    async with httpx2.AsyncClient() as client:
        answer = await client.post(url + PUBLISH, json=body, headers=headers)

    assert answer.status_code == 202
    assert (
        answer.json().items()
        >= {
            "published": True,
            "messageType": "Noted",
            "correlationId": "n-1",
            "correlationKey": "n-1",
            "duplicate": False,
        }.items()
    )


async def test_the_trace_of_a_publish_goes_on_in_the_saga(new_publisher: New) -> None:
    seen: list[tuple[str | None, str | None]] = []

    def traced(saga: Any, event: Any, context: Any) -> Any:
        seen.append((event.traceparent, event.tracestate))
        return []

    async with (
        open_door(define_saga("traced").state({}).on("Traced", traced).build()) as door,
        serve(create_app(door.runtime)) as port,
    ):
        publisher = new_publisher(f"http://127.0.0.1:{port}")
        await publisher.publish("Traced", {}, traceparent=TRACEPARENT, tracestate="vendor=1", wait=5)

    assert seen[0] == (TRACEPARENT, "vendor=1")
