"""GET /instances and what is below it: filters, pages, keys that look like paths, histories."""

from __future__ import annotations

from collections.abc import AsyncIterator
from urllib.parse import quote

import httpx2
import pytest

from sagaloom.service import create_app
from tests.doors.http_door import PREFIX, Door, Switch, open_door, order_saga, serve

KEYS = ["a/b", "a/history", "history", "a/history/history", "/", "//", "a/", "?run=2", "a%2Fb", "a b+c", "😀/ü", ".x."]

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    async with open_door() as opened:
        yield opened


async def filled(door: Door, count: int = 5) -> None:
    """Orders o-0, o-1, ... a minute apart; the even ones are completed. And one note."""
    for number in range(count):
        await door.publish(correlationId=f"o-{number}", wait="5s")
        if number % 2 == 0:
            await door.publish("OrderPaid", {}, correlationId=f"o-{number}", wait="5s")
        door.clock.advance("1m")
    await door.publish("Noted", {"a": 1}, correlationId="n-0", wait="5s")


def keys_of(response: httpx2.Response) -> list[str]:
    assert response.status_code == 200, response.text
    return [one["correlationId"] for one in response.json()["instances"]]


# --- One instance ----------------------------------------------------------------------------------------------------


async def test_an_instance_shows_its_state_untouched_beside_its_own_fields(door: Door) -> None:
    await door.publish(payload={"amount": 7}, correlationId="o-1", traceparent=TRACE, wait="5s")
    door.clock.advance("90s")
    await door.publish("OrderPaid", {}, correlationId="o-1", wait="5s")

    assert (await door.get("/instances/order/o-1")).json() == {
        "sagaName": "order",
        "sagaId": "order",
        "instanceId": "order:o-1",
        "correlationId": "o-1",
        "correlationKey": "o-1",
        "run": 1,
        "status": "completed",
        "state": {"amount": 7, "status": "the order's own"},
        "version": 2,
        "messageCount": 2,
        "durabilityTier": "t1",
        "isPaused": False,
        "createdAt": "2026-01-01T00:00:00.000Z",
        "updatedAt": "2026-01-01T00:01:30.000Z",
        "completedAt": "2026-01-01T00:01:30.000Z",
        "endedAt": "2026-01-01T00:01:30.000Z",
        "result": {"paid": True},
        "lastMessageType": "OrderPaid",
        "traceparent": TRACE,
    }


async def test_a_failed_instance_says_why(door: Door) -> None:
    await door.publish(correlationId="o-1", wait="5s")
    await door.publish("OrderRefused", {}, correlationId="o-1", wait="5s")

    found = (await door.get("/instances/order/o-1")).json()
    assert found["status"] == "failed"
    assert found["reason"]
    assert "completedAt" not in found


@pytest.mark.parametrize("key", KEYS)
async def test_any_key_is_found_under_its_percent_encoded_path(door: Door, key: str) -> None:
    await door.publish("Noted", {}, correlationId=key, wait="5s")

    found = (await door.get(f"/instances/note/{quote(key, safe='')}")).json()
    history = (await door.get(f"/instances/note/{quote(key, safe='')}/history")).json()

    assert key == found["correlationId"]
    assert [key] == [entry["correlationId"] for entry in history["history"]]


@pytest.mark.parametrize("key", KEYS)
async def test_any_key_is_found_through_a_server_too(door: Door, key: str) -> None:
    await door.publish("Noted", {}, correlationId=key, wait="5s")
    async with serve(create_app(door.runtime)) as port, httpx2.AsyncClient() as client:
        url = f"http://127.0.0.1:{port}{PREFIX}/instances/note/{quote(key, safe='')}"

        assert key == (await client.get(url)).json()["correlationId"]
        assert (await client.get(url + "/history")).json()["total"] == 1


async def test_a_slash_in_a_key_need_not_be_encoded(door: Door) -> None:
    await door.publish("Noted", {}, correlationId="a/b/c", wait="5s")

    assert (await door.get("/instances/note/a/b/c")).json()["correlationId"] == "a/b/c"
    assert (await door.get("/instances/note/a/b/c/history")).json()["total"] == 1


async def test_a_literal_history_at_the_end_is_the_history_of_what_stands_before_it(door: Door) -> None:
    await door.publish("Noted", {}, correlationId="a", wait="5s")
    await door.publish("Noted", {}, correlationId="a/history", wait="5s")

    assert (await door.get("/instances/note/a/history")).json()["history"][0]["correlationId"] == "a"
    assert (await door.get("/instances/note/a%2Fhistory")).json()["correlationId"] == "a/history"


async def test_keys_are_found_when_the_application_is_mounted_below_a_path(door: Door) -> None:
    from starlette.applications import Starlette
    from starlette.routing import Mount

    await door.publish("Noted", {}, correlationId="a/history", wait="5s")
    transport = httpx2.ASGITransport(Starlette(routes=[Mount("/below", create_app(door.runtime))]))
    async with httpx2.AsyncClient(transport=transport, base_url="http://sagas/below") as client:
        found = await client.get(f"{PREFIX}/instances/note/a%2Fhistory")
        published = await client.post(f"{PREFIX}/publish", json={"type": "Noted"})

    assert (found.status_code, published.status_code) == (200, 202)
    assert found.json()["correlationId"] == "a/history"


@pytest.mark.parametrize(
    "key", ["", "%00", "%0A", "k" * 10_240, "%FF"], ids=["empty", "null", "newline", "10 KiB", "no UTF-8"]
)
async def test_a_path_whose_key_cannot_be_one_is_refused(door: Door, key: str) -> None:
    response = await door.get(f"/instances/note/{key}")

    assert (response.status_code, response.json()["code"]) == (422, "VALIDATION_ERROR")


async def test_an_instance_that_is_not_there_is_not_found(door: Door) -> None:
    for path in ("/instances/order/o-9", "/instances/order/o-9/history", "/instances/nothing/o-9"):
        response = await door.get(path)

        assert (response.status_code, response.json()["code"]) == (404, "SAGA_INSTANCE_NOT_FOUND")
        assert "'o-9'" in response.json()["message"]


async def test_a_run_is_chosen_by_number_and_the_newest_by_default(door: Door) -> None:
    for number in (1, 2):
        await door.publish("Noted", {"n": number}, wait="5s")
    path = "/instances/note/note:Noted"

    newest, first = (await door.get(path)).json(), (await door.get(path, run=1)).json()

    assert [(one["run"], one["state"]) for one in (newest, first)] == [(2, {"last": {"n": 2}}), (1, {"last": {"n": 1}})]
    assert newest["instanceId"] == "note~2:note:Noted"
    assert (await door.get(path + "/history", run=1)).json()["history"][0]["run"] == 1
    assert (await door.get(path, run=3)).status_code == 404
    assert (await door.get(path, run="first")).status_code == 422
    assert (await door.get(path, run=0)).status_code == 422


# --- History ---------------------------------------------------------------------------------------------------------


async def test_a_history_entry_says_what_the_message_did(door: Door) -> None:
    await door.publish(payload={"amount": 7}, correlationId="o-1", messageId="m-1", traceparent=TRACE, wait="5s")

    (entry,) = (await door.get("/instances/order/o-1/history")).json()["history"]

    effects = entry.pop("effects")
    assert [(one["kind"], one["target"]) for one in effects] == [("send", "service:payments")]
    assert effects[0]["effectKey"]
    assert [{"phase": "handle", "type": "OrderPlaced", "status": "running", "effects": effects}] == entry.pop("steps")
    assert entry == {
        "id": "order:o-1#1",
        "sagaName": "order",
        "sagaId": "order",
        "instanceId": "order:o-1",
        "correlationId": "o-1",
        "correlationKey": "o-1",
        "run": 1,
        "entryNo": 1,
        "revision": 1,
        "messageType": "OrderPlaced",
        "messageId": "m-1",
        "payload": {"amount": 7},
        "disposition": "applied",
        "outcome": "success",
        "previousStatus": "pending",
        "newStatus": "running",
        "newState": None,
        "transitionAt": "2026-01-01T00:00:00.000Z",
        "attempt": 1,
        "origin": "door",
        "definitionVersion": 1,
        "traceparent": TRACE,
    }


async def test_the_history_of_a_t2_saga_has_the_states(door: Door) -> None:
    for number in (1, 2):
        await door.publish("Noted", {"n": number}, correlationId="n-1", wait="5s")

    _, entry = (await door.get("/instances/note/n-1/history")).json()["history"]

    assert (entry["previousState"], entry["newState"]) == ({"last": {"n": 1}}, {"last": {"n": 2}})


async def test_the_outcome_of_an_entry_is_one_of_four_words() -> None:
    async with open_door(order_saga(Switch())) as door:
        await door.publish(correlationId="o-1", wait="5s")
        await door.publish("OrderShipped", {}, correlationId="o-1", wait="5s")
        await door.publish("OrderRefused", {}, correlationId="o-1", wait="5s")
        await door.publish("OrderPaid", {}, correlationId="o-1", wait="5s")

        history = (await door.get("/instances/order/o-1/history")).json()["history"]

    assert [entry["outcome"] for entry in history] == ["success", "error", "compensated", "skipped"]
    assert [("the parcel is lost" in entry["error"]) if "error" in entry else None for entry in history] == [
        None,
        True,
        None,
        None,
    ]
    assert [entry["disposition"] for entry in history] == ["applied", "dead_lettered", "applied", "ignored"]


async def test_a_history_is_read_in_pages(door: Door) -> None:
    for number in range(5):
        await door.publish("Noted", {"n": number}, correlationId="n-1", wait="5s")
    path = "/instances/note/n-1/history"

    first = (await door.get(path, limit=2)).json()
    second = (await door.get(path, limit=2, after=first["cursor"])).json()
    last = (await door.get(path, limit=2, offset=4)).json()

    assert [[one["entryNo"] for one in page["history"]] for page in (first, second, last)] == [[1, 2], [3, 4], [5]]
    assert [page["cursor"] for page in (first, second, last)] == [2, 4, None]
    assert {5} == {page["total"] for page in (first, second, last)}


# --- Lists -----------------------------------------------------------------------------------------------------------


async def test_instances_are_listed_newest_first(door: Door) -> None:
    await filled(door)

    response = await door.get("/instances")

    assert keys_of(response) == ["n-0", "o-4", "o-3", "o-2", "o-1", "o-0"]
    assert tuple(response.json()[name] for name in ("total", "limit", "offset", "cursor")) == (6, 50, 0, None)


@pytest.mark.parametrize(
    ("query", "keys"),
    [
        ("sagaName=note", ["n-0"]),
        ("sagaId=note", ["n-0"]),
        ("sagaName=note&sagaName=order&limit=2", ["n-0", "o-4"]),
        ("sagaName=note&sagaId=order", []),
        ("sagaName=nothing", []),
        ("status=completed", ["o-4", "o-2", "o-0"]),
        ("status=running&sagaName=order", ["o-3", "o-1"]),
        ("status=failed&status=cancelled", []),
        ("status=", ["n-0", "o-4", "o-3", "o-2", "o-1", "o-0"]),
        ("q=o-", ["o-4", "o-3", "o-2", "o-1", "o-0"]),
        ("topic=default&q=n", ["n-0"]),
        ("topic=other", []),
        ("createdAfter=2026-01-01T00:02:30Z", ["n-0", "o-4", "o-3"]),
        ("createdBefore=2026-01-01T01:00:30%2B01:00", ["o-0"]),
        ("limit=2&offset=1", ["o-4", "o-3"]),
    ],
)
async def test_a_list_is_filtered_by(door: Door, query: str, keys: list[str]) -> None:
    await filled(door)

    assert keys == keys_of(await door.client.get(f"{PREFIX}/instances?{query}"))


async def test_the_total_counts_what_the_filter_leaves(door: Door) -> None:
    await filled(door)

    assert (await door.get("/instances", status="completed", limit=1)).json()["total"] == 3


async def test_a_list_is_read_to_its_end_by_its_cursors(door: Door) -> None:
    await filled(door)
    keys: list[str] = []
    cursor = ""

    while cursor is not None:
        page = await door.get("/instances", limit=4, cursor=cursor)
        keys += keys_of(page)
        cursor = page.json()["cursor"]

    assert keys == ["n-0", "o-4", "o-3", "o-2", "o-1", "o-0"]


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("limit=0", "limit"),
        ("limit=1001", "'1001'"),
        ("limit=many", "'many'"),
        ("offset=-1", "offset"),
        ("status=done", "'done'"),
        ("createdAfter=yesterday", "createdAfter"),
        ("createdAfter=2026-01-01T00:00:00", "timezone"),
        ("createdBefore=0001-01-01T00:00:00%2B14:00", "createdBefore"),
        ("statsu=running", "statsu"),
        ("cursor=nonsense", "cursor"),
        ("status=running&status=done", "status.1"),
    ],
)
async def test_a_filter_that_is_none_is_refused_by_name(door: Door, query: str, named: str) -> None:
    response = await door.client.get(f"{PREFIX}/instances?{query}")

    assert (response.status_code, response.json()["code"]) == (422, "VALIDATION_ERROR")
    assert named in response.json()["message"]
    assert list(response.json()["data"]["fieldErrors"])


async def test_a_total_beyond_what_is_counted_says_that_it_is_an_estimate(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sagaloom.service.reading._COUNTED_MAX", 3)
    await filled(door, 2)
    exact = (await door.get("/instances")).json()
    await filled(door, 4)

    estimated = (await door.get("/instances")).json()

    assert (exact["total"], exact["totalIsEstimate"]) == (3, False)
    assert (estimated["total"], estimated["totalIsEstimate"]) == (3, True)
