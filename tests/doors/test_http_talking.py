"""Signals, updates and queries over HTTP and on the command line."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from sagaloom import SagasError, UpdateRefused, answer, define_query, define_saga, define_signal, saga_complete
from sagaloom.service import create_app
from tests.doors.http_door import Door, open_door, serve
from tests.doors.test_cli_operators import Terminal


def approved(saga: Any, event: Any, context: Any) -> Any:
    if saga.state["by"] is not None:
        raise UpdateRefused(f"{saga.state['by']} was faster", code="APPROVED_ALREADY", data={"by": saga.state["by"]})
    saga.state["by"] = event.payload["by"]
    return [answer({"approvedBy": event.payload["by"]})]


def hurried(saga: Any, event: Any, context: Any) -> Any:
    saga.state["hurries"] += 1
    return []


def stumbled(saga: Any, event: Any, context: Any) -> Any:
    raise SagasError("a stone", retryable=False)


def meddling(state: Any) -> Any:
    state["by"] = "me"
    return None


APPROVAL = (
    define_saga("approval")
    .state({"by": None, "hurries": 0})
    .on("Asked", lambda saga, event, context: [])
    .on_update(define_signal("approve", dict[str, str]), approved)
    .on_signal(define_signal("hurry"), hurried)
    .on_signal(define_signal("stumble"), stumbled)
    .on_signal(define_signal("end/now"), lambda saga, event, context: [saga_complete()])
    .on_query(define_query("by"), lambda state: state["by"])
    .on_query(define_query("meddle"), meddling)
    .on_query(define_query("missing"), lambda state: state["no such field"])
    .build()
)
AT = "/instances/approval/a%2Fsignals%2Fhurry"
"""The instance with the key `a/signals/hurry`."""


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    async with open_door(APPROVAL) as opened:
        await opened.publish("Asked", {}, correlationId="a/signals/hurry", wait="5s")
        yield opened


async def state(door: Door) -> Any:
    return (await door.get(AT)).json()["state"]


async def test_a_signal_is_answered_with_what_became_of_it(door: Door) -> None:
    response = await door.post(f"{AT}/signals/hurry", {"id": "h-1"})

    assert response.status_code == 202
    assert response.json() == {
        "signal": "hurry",
        "messageId": "h-1",
        "sagaName": "approval",
        "instanceId": "approval:a/signals/hurry",
        "correlationId": "a/signals/hurry",
        "correlationKey": "a/signals/hurry",
        "run": 1,
        "disposition": "applied",
        "status": "running",
        "revision": 2,
    }


async def test_a_repeat_by_header_or_by_body_is_a_duplicate(door: Door) -> None:
    await door.post(f"{AT}/signals/hurry", {"id": "h-1"})

    response = await door.client.post(
        f"/api/v1/sagas{AT}/signals/hurry", headers={"idempotency-key": "h-1"}, content=b""
    )

    assert (response.status_code, response.json()["disposition"]) == (202, "duplicate")
    assert (await state(door))["hurries"] == 1


async def test_a_name_may_hold_anything_that_is_encoded(door: Door) -> None:
    response = await door.post(f"{AT}/signals/end%2Fnow")

    assert (response.json()["signal"], response.json()["status"]) == ("end/now", "completed")


async def test_an_update_is_answered_with_what_its_handler_says(door: Door) -> None:
    first = await door.post(f"{AT}/updates/approve", {"payload": {"by": "ann"}, "id": "u-1"}, wait="5s")
    again = await door.post(f"{AT}/updates/approve", {"payload": {"by": "ann"}, "id": "u-1"})

    assert (first.status_code, first.json()["answer"], first.json()["duplicate"]) == (200, {"approvedBy": "ann"}, False)
    assert (again.json()["answer"], again.json()["duplicate"]) == ({"approvedBy": "ann"}, True)


async def test_a_refused_update_is_an_error_with_the_handlers_code(door: Door) -> None:
    await door.post(f"{AT}/updates/approve", {"payload": {"by": "ann"}})

    response = await door.post(f"{AT}/updates/approve", {"payload": {"by": "bob"}})

    assert response.status_code == 422
    problem = response.json()
    assert (problem["code"], problem["data"], problem["retryable"]) == ("APPROVED_ALREADY", {"by": "ann"}, False)
    history = (await door.get(f"{AT}/history")).json()["history"]
    assert [(entry.get("answer"), entry.get("refusal", {}).get("code")) for entry in history] == [
        (None, None),
        ({"approvedBy": "ann"}, None),
        (None, "APPROVED_ALREADY"),
    ]


async def test_an_update_to_a_paused_run_is_pending(door: Door) -> None:
    await door.post(f"{AT}/pause")

    response = await door.post(f"{AT}/updates/approve", {"payload": {"by": "ann"}}, wait="10ms")

    assert (response.status_code, response.json()["disposition"], response.json()["answer"]) == (200, "pending", None)


async def test_a_query_is_answered_with_the_run_it_speaks_of(door: Door) -> None:
    await door.post(f"{AT}/updates/approve", {"payload": {"by": "ann"}})

    response = await door.get(f"{AT}/queries/by", run=1)

    found = response.json()
    assert (response.status_code, found["answer"], found["version"], found["run"]) == (200, "ann", 2, 1)


async def test_a_query_that_meddles_is_refused_and_changes_nothing(door: Door) -> None:
    before = await state(door)

    response = await door.get(f"{AT}/queries/meddle")

    assert (response.status_code, response.json()["code"]) == (422, "SAGA_QUERY_MUTATED")
    assert not response.json()["retryable"]
    assert before == await state(door)


async def test_a_query_that_raises_is_refused_and_the_log_has_where_that_was(
    door: Door, caplog: pytest.LogCaptureFixture
) -> None:
    response = await door.get(f"{AT}/queries/missing")

    problem = response.json()
    assert (response.status_code, problem["code"]) == (422, "SAGA_QUERY_FAILED")
    assert "query 'missing' of 'approval:a/signals/hurry' raised KeyError: 'no such field'" in problem["message"]
    [record] = [record for record in caplog.records if record.name == "sagaloom.web"]
    assert problem["traceId"] in record.getMessage()
    assert "test_http_talking.py" in caplog.text


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("POST", f"{AT}/signals/hum", 404, "SIGNAL_NOT_FOUND"),
        ("POST", f"{AT}/updates/hurry", 404, "SIGNAL_NOT_FOUND"),
        ("GET", f"{AT}/queries/mood", 404, "QUERY_NOT_FOUND"),
        ("POST", "/instances/approval/nobody/signals/hurry", 404, "SAGA_INSTANCE_NOT_FOUND"),
        ("GET", "/instances/approval/nobody/queries/by", 404, "SAGA_INSTANCE_NOT_FOUND"),
        ("POST", "/instances/aproval/a/signals/hurry", 404, "SAGA_NOT_FOUND"),
        ("POST", f"{AT}/updates/approve", 422, "VALIDATION_ERROR"),
        ("POST", f"{AT}/updates/approve?wait=soon", 422, "VALIDATION_ERROR"),
        ("POST", f"{AT}/updates/approve?wait=9d", 422, "VALIDATION_ERROR"),
        ("POST", f"{AT}/signals/%FF", 422, "VALIDATION_ERROR"),
    ],
)
async def test_what_cannot_be_said_or_asked_is_refused(
    door: Door, method: str, path: str, status: int, code: str
) -> None:
    response = await door.client.request(method, f"/api/v1/sagas{path}")

    assert (response.status_code, response.json()["code"]) == (status, code)


async def test_a_signal_that_is_sent_with_get_is_told_how(door: Door) -> None:
    response = await door.get("/instances/approval/b/signals/hurry")

    assert response.status_code == 404
    assert response.json()["message"].endswith("; what is said to an instance is sent with POST")


async def test_a_signal_to_a_run_that_is_over_is_a_conflict(door: Door) -> None:
    await door.post(f"{AT}/signals/end%2Fnow")

    response = await door.post(f"{AT}/signals/hurry")

    assert (response.status_code, response.json()["code"]) == (409, "SAGA_INSTANCE_ENDED")
    assert response.json()["retryable"] is False


async def test_a_saga_is_described_with_its_signals_updates_and_queries(door: Door) -> None:
    found = (await door.get("/sagas/approval")).json()

    assert [one["name"] for one in found["signals"]] == ["hurry", "stumble", "end/now"]
    assert found["updates"] == [
        {"name": "approve", "schema": {"type": "object", "additionalProperties": {"type": "string"}}}
    ]
    assert [one["name"] for one in found["queries"]] == ["by", "meddle", "missing"]


# --- On the command line ---------------------------------------------------------------------------------------------


@pytest.fixture
async def terminal(door: Door) -> AsyncIterator[Terminal]:
    async with serve(create_app(door.runtime)) as port:
        yield Terminal(door, port)


KEY = "a/signals/hurry"


async def test_the_command_line_signals_updates_and_asks(terminal: Terminal) -> None:
    hurried = await terminal.run("signal", "approval", KEY, "hurry", "--id", "h-1")
    approved = await terminal.run("update", "approval", KEY, "approve", "--payload", '{"by": "ann"}')
    asked = await terminal.run("query", "approval", KEY, "by")

    assert hurried.out == "hurry h-1 to approval:a/signals/hurry: applied\n"
    assert approved.json == {"approvedBy": "ann"}
    assert asked.json == "ann"


async def test_the_command_line_prints_whole_answers_as_json(terminal: Terminal) -> None:
    approved = await terminal.run("update", "approval", KEY, "approve", "--payload", '{"by": "ann"}', "--json")
    asked = await terminal.run("query", "approval", KEY, "by", "--run", "1", "--json")

    assert (approved.json["answer"], approved.json["revision"]) == ({"approvedBy": "ann"}, 2)
    assert (asked.json["answer"], asked.json["version"]) == ("ann", 2)


async def test_a_refusal_fails_the_command_with_its_reason(terminal: Terminal) -> None:
    await terminal.run("update", "approval", KEY, "approve", "--payload", '{"by": "ann"}')

    said = await terminal.run("update", "approval", KEY, "approve", "--payload", '{"by": "bob"}')

    assert said.error == "ann was faster (APPROVED_ALREADY)"


async def test_a_signal_that_is_given_up_fails_the_command(terminal: Terminal) -> None:
    said = await terminal.run("signal", "approval", KEY, "stumble", "--id", "s-1")

    assert "stumble s-1 to approval:a/signals/hurry: dead_lettered (" in said.out
    assert "a stone" in said.out
    assert said.error == (
        "the signal was accepted, but approval:a/signals/hurry gave it up; see 'sagaloom dead-letters list'"
    )


async def test_an_update_that_waits_says_how_to_ask_again(terminal: Terminal) -> None:
    await terminal.run("instances", "pause", "approval", KEY)

    said = await terminal.run(
        "update", "approval", KEY, "approve", "--payload", '{"by": "ann"}', "--id", "u-1", "--wait", "10ms"
    )

    assert said.out.startswith("approve u-1 to approval:a/signals/hurry: pending (")
    assert said.out.endswith("; ask again with --id u-1\n")
