"""Timers and schedules over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from sagaloom import SagaMessage, define_saga, schedule
from sagaloom.testing import check_invariants
from tests.doors.http_door import PREFIX, Door, open_door


def _remind(saga: Any, event: Any, context: Any) -> list[Any]:
    saga.state = {"seen": []}
    return [
        schedule(SagaMessage("Remind", {}), "10m", name="reminder"),
        schedule(SagaMessage("Remind", {}), "20m"),
    ]


def _note(saga: Any, event: Any, context: Any) -> list[Any]:
    saga.state = {"seen": [*saga.state["seen"], context.now.isoformat()]}
    return []


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    """Two orders with two timers each, and a saga that ticks every night."""
    orders = define_saga("order").state({}).on("Placed", _remind).on("Remind", _note, starts=False).build()
    report = define_saga("report").state({}).on("report:tick", lambda saga, event, context: []).schedule("0 3 * * *")
    async with open_door(orders, report.build()) as opened:
        for key in ("o-1", "o-2"):
            await opened.publish("Placed", {}, correlationId=key, wait="5s")
            opened.clock.advance("1s")
        yield opened


async def advance(door: Door, by: str) -> None:
    """Moves the clock and lets everything that became due run to its end."""
    door.clock.advance(by)
    for _ in range(20):
        await asyncio.sleep(0)
    await door.runtime.settled()


async def timers_of(door: Door, **params: Any) -> list[dict[str, Any]]:
    response = await door.get("/timers", **params)
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = response.json()["timers"]
    return found


async def test_timers_are_listed_the_next_one_first(door: Door) -> None:
    first, *others = await timers_of(door)

    assert first.pop("id").startswith("tm")
    assert first == {
        "dueAt": "2026-01-01T00:10:00.000Z",
        "sagaName": "order",
        "sagaId": "order",
        "instanceId": "order:o-1",
        "correlationId": "o-1",
        "correlationKey": "o-1",
        "run": 1,
        "messageType": "Remind",
        "name": "reminder",
    }
    assert [(one["correlationId"], one.get("name")) for one in others] == [
        ("o-2", "reminder"),
        ("o-1", None),
        ("o-2", None),
    ]


@pytest.mark.parametrize(
    ("query", "count"),
    [
        ("sagaName=order", 4),
        ("sagaId=order&correlationId=o-1", 2),
        ("correlationKey=o-2", 2),
        ("sagaName=report", 0),
        ("limit=3", 3),
    ],
)
async def test_timers_are_filtered_by(door: Door, query: str, count: int) -> None:
    assert len((await door.client.get(f"{PREFIX}/timers?{query}")).json()["timers"]) == count


async def test_timers_are_read_in_pages(door: Door) -> None:
    seen: list[str] = []
    cursor: str | None = ""

    while cursor is not None:
        page = (await door.get("/timers", limit=3, cursor=cursor)).json()
        seen += [one["id"] for one in page["timers"]]
        cursor = page["cursor"]

    assert seen == [one["id"] for one in await timers_of(door)]


@pytest.mark.parametrize(
    ("query", "field"), [("cursor=nonsense", "cursor"), ("limit=0", "limit"), ("sagaName=a&sagaId=b", "sagaId")]
)
async def test_a_filter_that_is_none_is_refused_by_name(door: Door, query: str, field: str) -> None:
    response = await door.client.get(f"{PREFIX}/timers?{query}")

    assert (response.status_code, list(response.json()["data"]["fieldErrors"])) == (422, [field])


async def test_a_cancelled_timer_never_fires_and_stands_in_the_history(door: Door) -> None:
    timer, *_ = await timers_of(door)

    response = await door.client.delete(f"{PREFIX}/timers/{timer['id']}")
    again = await door.client.delete(f"{PREFIX}/timers/{timer['id']}")
    await advance(door, "1h")

    assert (response.status_code, response.json()["instanceId"], response.json()["version"]) == (200, "order:o-1", 2)
    assert "cancelled" in response.json()["reason"]
    assert (again.status_code, again.json()["code"]) == (404, "TIMER_NOT_FOUND")
    assert len((await door.get("/instances/order/o-1")).json()["state"]["seen"]) == 1
    history = (await door.get("/instances/order/o-1/history")).json()["history"]
    assert history[1]["origin"] == "operator"
    assert await check_invariants(door.store) == []


async def test_a_moved_timer_fires_then(door: Door) -> None:
    timer, *_ = await timers_of(door)

    response = await door.client.patch(f"{PREFIX}/timers/{timer['id']}", json={"dueAt": "2026-01-01T01:02:03+01:00"})
    await advance(door, "3m")

    assert (response.status_code, response.json()["id"]) == (200, timer["id"])
    state = (await door.get("/instances/order/o-1")).json()["state"]
    assert state == {"seen": ["2026-01-01T00:03:02+00:00"]}


@pytest.mark.parametrize(
    "body",
    [
        None,
        {},
        {"dueAt": "soon"},
        {"dueAt": "2026-01-01T00:00:00"},
        {"dueAt": 1_700_000_000},
        {"dueAt": "0001-01-01T00:00:00+14:00"},
        {"dueAt": "2026-01-01T00:00:00Z", "by": "me"},
    ],
)
async def test_a_moment_that_is_none_moves_nothing(door: Door, body: Any) -> None:
    timer, *_ = await timers_of(door)

    response = await door.client.patch(f"{PREFIX}/timers/{timer['id']}", json=body)

    assert (response.status_code, response.json()["code"]) == (422, "VALIDATION_ERROR")
    assert timer in await timers_of(door)


async def test_a_timer_that_is_not_there_is_not_found(door: Door) -> None:
    moved = await door.client.patch(f"{PREFIX}/timers/tm-none", json={"dueAt": "2026-01-01T00:00:00Z"})

    assert (moved.status_code, moved.json()["code"]) == (404, "TIMER_NOT_FOUND")


async def test_a_web_page_of_another_site_cannot_cancel_a_timer(door: Door) -> None:
    timer, *_ = await timers_of(door)

    response = await door.client.delete(f"{PREFIX}/timers/{timer['id']}", headers={"origin": "https://evil.example"})

    assert response.status_code == 403
    assert timer in await timers_of(door)


async def test_schedules_are_listed_with_their_next_tick(door: Door) -> None:
    response = await door.get("/schedules")

    assert response.json() == {
        "schedules": [
            {
                "sagaName": "report",
                "sagaId": "report",
                "cron": "0 3 * * *",
                "timezone": "UTC",
                "catchUp": "latest",
                "messageType": "report:tick",
                "nextTickAt": "2026-01-01T03:00:00.000Z",
            }
        ]
    }


async def test_a_schedule_that_has_ticked_says_when(door: Door) -> None:
    await door.runtime.settled()
    await advance(door, "4h")

    (found,) = (await door.get("/schedules")).json()["schedules"]

    assert (found["lastTickAt"], found["nextTickAt"]) == ("2026-01-01T03:00:00.000Z", "2026-01-02T03:00:00.000Z")


async def test_a_schedule_is_triggered_by_hand(door: Door) -> None:
    response = await door.post("/schedules/report/trigger")

    answer = response.json()
    assert (response.status_code, answer["published"], answer["messageType"]) == (202, True, "report:tick")
    assert (await door.get("/instances", sagaName="report")).json()["total"] == 1


@pytest.mark.parametrize("saga", ["order", "none", "a%2Fb"])
async def test_a_saga_without_a_schedule_cannot_be_triggered(door: Door, saga: str) -> None:
    response = await door.post(f"/schedules/{saga}/trigger")

    assert (response.status_code, response.json()["code"]) in [(404, "SCHEDULE_NOT_FOUND"), (404, "NOT_FOUND")]
