"""Sagas as a whole, over HTTP and on the command line: paused, disabled, migrated; and a history decided once more."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from sagaloom import define_saga
from sagaloom.service import create_app
from tests.doors.http_door import Door, open_door, serve
from tests.doors.test_cli_operators import Terminal

MODULE = """
from sagaloom import define_saga, send


def placed(saga, event, context):
    saga.state = {"amount": event.payload["amount"], "at": context.now.isoformat()}
    return []


def priced(saga, event, context):
    saga.state = {**saga.state, "amount": saga.state["amount"] * FACTOR}
    return []


saga = (
    define_saga("s").version(2, migrate={1: lambda state: state}).durability("t2").state({})
    .on("Placed", placed).on("Priced", priced, starts=False).build()
)
"""


def _placed(saga: Any, event: Any, context: Any) -> list[Any]:
    saga.state = {"amount": event.payload["amount"], "at": context.now.isoformat()}
    return []


def _priced(saga: Any, event: Any, context: Any) -> list[Any]:
    saga.state = {**saga.state, "amount": saga.state["amount"] * 2}
    return []


SAGA = (
    define_saga("s")
    .version(2, migrate={1: lambda state: {**state, "migrated": True}})
    .durability("t2")
    .state({})
    .on("Placed", _placed)
    .on("Priced", _priced, starts=False)
    .build()
)


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    async with open_door(SAGA) as opened:
        await opened.publish("Placed", {"amount": 3}, correlationId="k", wait="5s")
        await opened.publish("Priced", {}, correlationId="k", wait="5s")
        yield opened


@pytest.fixture
async def terminal(door: Door) -> AsyncIterator[Terminal]:
    async with serve(create_app(door.runtime)) as port:
        yield Terminal(door, port)


def make_older(door: Door) -> None:
    """Has the store believe that an older version wrote what is there."""
    runs = door.store.instances_by_run
    for place, instance in runs.items():
        runs[place] = replace(instance, def_version=1)
    door.runtime._receiver._memory.clear()


async def test_a_saga_is_paused_and_goes_on(door: Door) -> None:
    paused = (await door.post("/sagas/s/pause", {"reason": "audit"})).json()
    waiting = await door.publish("Priced", {}, correlationId="k", wait="10ms")
    again = (await door.post("/sagas/s/pause")).json()
    resumed = (await door.post("/sagas/s/resume")).json()
    await door.runtime.settled()

    assert (paused["paused"], paused["enabled"], paused["control"]) == (True, True, {"disposition": "applied"})
    assert waiting.json()["outcomes"][0]["disposition"] == "pending"
    assert again["control"] == {"disposition": "ignored", "reason": "saga 's' is paused already"}
    assert resumed["paused"] is False
    assert (await door.get("/instances/s/k")).json()["state"]["amount"] == 12


async def test_a_disabled_saga_answers_503_until_it_is_enabled(door: Door) -> None:
    disabled = (await door.post("/sagas/s/disable", {"reason": "the bank asked us to"})).json()
    refused = await door.publish("Placed", {"amount": 1}, correlationId="new")
    await door.post("/sagas/s/enable")
    accepted = await door.publish("Placed", {"amount": 1}, correlationId="new")

    assert (disabled["enabled"], (await door.get("/sagas/s")).json()["enabled"]) == (False, True)
    assert (refused.status_code, refused.json()["code"], refused.json()["retryable"]) == (503, "SAGA_DISABLED", True)
    assert "the bank asked us to" in refused.json()["message"]
    assert accepted.status_code == 202


@pytest.mark.parametrize("verb", ["pause", "resume", "disable", "enable", "migrate"])
async def test_a_saga_that_is_not_there_is_not_found(door: Door, verb: str) -> None:
    response = await door.post(f"/sagas/nobody/{verb}")

    assert (response.status_code, response.json()["code"]) == (404, "SAGA_NOT_FOUND")


async def test_instances_are_migrated_some_in_each_request(door: Door) -> None:
    make_older(door)

    page = (await door.post("/sagas/s/migrate", {"limit": 10})).json()

    assert page == {"migrated": 1, "failed": 0, "left": 0, "cursor": None, "troubles": []}
    assert (await door.get("/instances/s/k")).json()["state"]["migrated"] is True


@pytest.mark.parametrize("body", [{"limit": 0}, {"limit": 1001}, {"cursor": "?"}, {"unknown": 1}])
async def test_a_migration_that_cannot_be_is_refused(door: Door, body: Any) -> None:
    assert (await door.post("/sagas/s/migrate", body)).status_code == 422


async def test_the_command_line_pauses_and_disables(terminal: Terminal) -> None:
    said = [(await terminal.run("sagas", verb, "s")).out for verb in ("pause", "disable", "resume", "enable", "enable")]
    listed = await terminal.run("sagas", "list")

    assert said == [
        "s is enabled, paused\n",
        "s is disabled, paused\n",
        "s is disabled\n",
        "s is enabled\n",
        "s is enabled: saga 's' is not disabled\n",
    ]
    assert "yes" in listed.out


async def test_the_command_line_migrates_and_counts(terminal: Terminal) -> None:
    make_older(terminal.door)

    one = await terminal.run("migrate")
    document = await terminal.run("migrate", "s", "--json")

    assert one.out.split() == ["saga", "migrated", "left", "s", "1", "0"]
    assert document.json == {"s": {"migrated": 0, "left": 0, "troubles": []}}


async def test_the_command_line_replays_a_history_with_new_code(terminal: Terminal, tmp_path: Path) -> None:
    same, other = tmp_path / "same.py", tmp_path / "other.py"
    same.write_text(MODULE.replace("FACTOR", "2"))
    other.write_text(MODULE.replace("FACTOR", "5"))

    alike = await terminal.run("replay", str(same), "s", "k")
    differing = await terminal.run("replay", str(other), "s", "k")
    document = await terminal.run("replay", str(other), "s", "k", "--json")
    unknown = await terminal.run("replay", str(same), "nobody", "k")

    assert alike.out == "2 messages replayed, 0 decided differently\n"
    assert alike.error is None
    assert "entry 2, Priced at 2026-01-01T00:00:00+00:00" in differing.out
    assert '  state then: {"amount":6,' in differing.out
    assert '  state now:  {"amount":15,' in differing.out
    assert differing.out.endswith("2 messages replayed, 1 decided differently\n")
    assert differing.error is not None
    (told,) = document.json["differing"]
    assert (told["entryNo"], told["stateBefore"]["amount"], told["differences"][0]["what"]) == (2, 3, "state")
    assert "has no saga 'nobody'" in (unknown.error or "")
