"""Children, and compensations that fail, as people see them over HTTP and on the command line."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from sagaloom import ALL_STEPS, RetryPolicy, SagaMessage, define_saga, saga_compensate, saga_complete, spawn
from sagaloom.service import create_app
from tests.doors.http_door import Door, open_door, serve
from tests.doors.test_cli_operators import Terminal


def _nothing(saga: Any, event: Any, context: Any) -> list[Any]:
    return []


def _closed(saga: Any, event: Any, context: Any) -> list[Any]:
    raise ConnectionError("closed")


def _bear(saga: Any, event: Any, context: Any) -> list[Any]:
    return [spawn("child", SagaMessage("Work", {}, correlation_key=f"c-{n}")) for n in range(event.payload["count"])]


PARENT = define_saga("parent").state({}).on("Bear", _bear).build()
CHILD = (
    define_saga("child")
    .state({})
    .on("Work", _nothing)
    .on("Done", lambda saga, event, context: [saga_complete()], starts=False)
    .build()
)
TRIP = (
    define_saga("trip")
    .state({})
    .retry(RetryPolicy(maximum_attempts=1))
    .on("Flight", _nothing)
    .on("CallOff", lambda saga, event, context: [saga_compensate(ALL_STEPS, "rain")], starts=False)
    .on("Issued", _nothing, starts=False, pivot=True)
    .compensate("Flight", _closed)
    .build()
)


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    async with open_door(PARENT, CHILD, TRIP) as opened:
        await opened.publish("Bear", {"count": 3}, correlationId="p", wait="5s")
        await opened.publish("Flight", {}, correlationId="t", wait="5s")
        await opened.publish("CallOff", {}, correlationId="t", wait="5s")
        await opened.runtime.settled()
        await opened.publish("Done", {}, correlationId="c-1", wait="5s")
        await opened.runtime.settled()
        yield opened


@pytest.fixture
async def terminal(door: Door) -> AsyncIterator[Terminal]:
    async with serve(create_app(door.runtime)) as port:
        yield Terminal(door, port)


async def test_a_parent_shows_its_children_and_counts_them(door: Door) -> None:
    parent = (await door.get("/instances/parent/p")).json()
    live = (await door.get("/instances/parent/p/children")).json()
    ended = (await door.get("/instances/parent/p/children", status="completed")).json()

    counts = {"live": 2, "completed": 1, "failed": 0, "cancelled": 0}
    assert parent["children"] == live["counts"] == ended["counts"] == counts
    assert [(each["instanceId"], each["status"], each["run"]) for each in live["children"]] == [
        ("child:c-0", "running", 1),
        ("child:c-2", "running", 1),
    ]
    assert ended["children"][0]["endedAt"] == "2026-01-01T00:00:00.000Z"


async def test_a_child_shows_its_parent_and_has_no_counts(door: Door) -> None:
    child = (await door.get("/instances/child/c-0")).json()

    assert child["parent"]["instanceId"] == "parent:p"
    assert "children" not in child


async def test_children_are_read_page_by_page(door: Door) -> None:
    first = (await door.get("/instances/parent/p/children", limit=1)).json()
    rest = (await door.get("/instances/parent/p/children", limit=2, cursor=first["cursor"])).json()

    assert [each["correlationId"] for each in (*first["children"], *rest["children"])] == ["c-0", "c-2"]
    assert rest["cursor"] is None


@pytest.mark.parametrize(
    ("path", "params", "status"),
    [
        ("/instances/parent/nobody/children", {}, 404),
        ("/instances/parent/p/children", {"cursor": "x"}, 422),
        ("/instances/parent/p/children", {"status": "running"}, 422),
        ("/instances/parent/p/children", {"limit": "0"}, 422),
    ],
)
async def test_a_listing_of_children_that_cannot_be_is_refused(
    door: Door, path: str, params: dict[str, str], status: int
) -> None:
    assert (await door.get(path, **params)).status_code == status


async def test_an_instance_shows_what_is_left_to_undo_and_why(door: Door) -> None:
    trip = (await door.get("/instances/trip/t")).json()
    (letter,) = (await door.get("/dead-letters")).json()["deadLetters"]

    assert trip["status"] == "compensating"
    assert trip["undoing"] == {
        "nextStep": "Flight",
        "stepsLeft": 1,
        "endsAs": "failed",
        "error": "ConnectionError: closed",
        "deadLetterId": letter["id"],
    }


async def test_a_step_is_skipped_and_its_dead_letter_goes_with_it(door: Door) -> None:
    wrong = (await door.post("/instances/trip/t/skip", {"step": "Hotel"})).json()
    right = (await door.post("/instances/trip/t/skip", {"reason": "refunded by hand", "step": "Flight"})).json()

    assert wrong["control"] == {
        "disposition": "ignored",
        "reason": "the next compensation of run 1 is that of 'Flight', not that of 'Hotel'",
    }
    assert (right["status"], right["control"], "undoing" in right) == ("failed", {"disposition": "applied"}, False)
    assert (await door.get("/dead-letters")).json()["deadLetters"] == []


async def test_commands_in_vain_are_answered_with_the_run_and_the_reason(door: Door) -> None:
    cancelled = (await door.post("/instances/trip/t/cancel")).json()
    resumed = (await door.post("/instances/trip/t/resume")).json()
    ended = (await door.post("/instances/trip/t/terminate", {"reason": "enough"})).json()

    assert cancelled["control"]["disposition"] == "ignored"
    assert "is being unwound already" in cancelled["control"]["reason"]
    assert resumed["control"]["reason"] == "run 1 is not paused"
    assert (ended["status"], ended["reason"]) == ("cancelled", "enough")


async def test_a_cancel_without_compensation_is_asked_for_in_its_body(door: Door) -> None:
    await door.publish("Flight", {}, correlationId="u", wait="5s")

    found = (await door.post("/instances/trip/u/cancel", {"compensate": False})).json()
    refused = await door.post("/instances/trip/u/cancel", {"compensate": "no"})

    assert (found["status"], refused.status_code) == ("cancelled", 422)


async def test_a_pivot_that_was_passed_is_shown(door: Door) -> None:
    await door.publish("Flight", {}, correlationId="u", wait="5s")
    await door.publish("Issued", {}, correlationId="u", wait="5s")

    assert (await door.get("/instances/trip/u")).json()["pivot"] == "Issued"


async def test_the_command_line_lists_children(terminal: Terminal) -> None:
    live = await terminal.run("instances", "children", "parent", "p")
    none = await terminal.run("instances", "children", "parent", "p", "--status", "failed")
    document = await terminal.run("instances", "children", "parent", "p", "--json")

    assert "child:c-0  running" in live.out
    assert "2 live, 1 completed, 0 failed, 0 cancelled" in live.out
    assert "no failed children" in none.out
    assert len(document.json["children"]) == 2


async def test_the_command_line_skips_and_terminates(terminal: Terminal) -> None:
    wrong = await terminal.run("instances", "skip", "trip", "t", "--step", "Hotel")
    right = await terminal.run("instances", "skip", "trip", "t", "--reason", "refunded by hand")
    late = await terminal.run("instances", "terminate", "trip", "t")

    assert "trip:t is compensating at revision 2: the next compensation of run 1 is that of 'Flight'" in wrong.out
    assert "undoing Flight fails (ConnectionError: closed), 1 to undo; dead letter dl" in wrong.out
    assert right.out == "trip:t is failed at revision 3\n"
    assert late.out.startswith("trip:t is failed at revision 3: run 1 is failed and takes no more messages")


async def test_the_command_line_cancels_with_and_without_undoing(terminal: Terminal) -> None:
    await terminal.door.publish("Flight", {}, correlationId="u", wait="5s")
    await terminal.door.publish("Flight", {}, correlationId="v", wait="5s")

    plainly = await terminal.run("instances", "cancel", "trip", "u", "--no-compensate")
    undoing = await terminal.run("instances", "cancel", "trip", "v")

    assert plainly.out == "trip:u is cancelled at revision 2\n"
    assert undoing.out.startswith("trip:v is compensating at revision 2\n  undoing Flight fails")
