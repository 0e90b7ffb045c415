"""The commands of operators, run inside this process against a server inside this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner

from sagaloom import SagaMessage, define_saga, schedule
from sagaloom.cli.app import app
from sagaloom.cli.timing import _moment
from sagaloom.errors import SagasError
from sagaloom.service import create_app
from tests.doors.http_door import Door, Switch, open_door, order_saga, serve


class Said(NamedTuple):
    """What a command printed, and why it failed, if it did."""

    out: str
    error: str | None

    @property
    def json(self) -> Any:
        return json.loads(self.out)


async def command(url: str, *args: str) -> Said:
    """Runs one against the server at `url`."""
    result = await asyncio.to_thread(CliRunner().invoke, app, list(args), env={"SAGALOOM_URL": url})
    if result.exception is None:
        return Said(result.stdout, None)
    if isinstance(result.exception, SystemExit):
        return Said(result.stdout, result.stderr)
    assert isinstance(result.exception, SagasError), result.exception
    return Said(result.stdout, result.exception.message)


class Terminal:
    """Runs commands against the API of a door."""

    def __init__(self, door: Door, port: int) -> None:
        self.door = door
        self._url = f"http://127.0.0.1:{port}"

    async def run(self, *args: str) -> Said:
        return await command(self._url, *args)


@pytest.fixture
async def terminal() -> AsyncIterator[Terminal]:
    """In front of orders o-1 and a/b, each with a message that was given up, and a saga that ticks every day."""
    switch = Switch()
    report = define_saga("report").state({}).on("report:tick", lambda saga, event, context: []).schedule("0 3 * * *")
    async with open_door(order_saga(switch), report.build()) as door, serve(create_app(door.runtime)) as port:
        for key in ("o-1", "a/b"):
            await door.publish(correlationId=key, wait="5s")
            await door.publish("OrderShipped", {}, correlationId=key, wait="5s")
        switch.is_broken = False
        yield Terminal(door, port)


async def test_an_instance_is_paused_resumed_and_cancelled(terminal: Terminal) -> None:
    paused = await terminal.run("instances", "pause", "order", "a/b", "--reason", "bank is down")
    resumed = await terminal.run("instances", "resume", "order", "a/b", "--json")
    cancelled = await terminal.run("instances", "cancel", "order", "a/b", "--reason", "ordered twice")

    assert paused == Said("order:a/b is running, paused at revision 2\n", None)
    assert (resumed.json["isPaused"], resumed.json["version"]) == (False, 3)
    assert cancelled == Said("order:a/b is cancelled at revision 4\n", None)
    shown = (await terminal.run("instances", "show", "order", "a/b", "--json")).json
    assert (shown["status"], shown["reason"]) == ("cancelled", "ordered twice")


async def test_an_instance_that_is_not_there_is_an_error(terminal: Terminal) -> None:
    said = await terminal.run("instances", "cancel", "order", "o-9")

    assert said.error is not None
    assert "SAGA_INSTANCE_NOT_FOUND" in said.error


async def test_dead_letters_of_one_key_are_redriven_together(terminal: Terminal) -> None:
    said = await terminal.run("dead-letters", "redrive", "--saga", "order", "--key", "a/b")
    await terminal.door.runtime.settled()

    assert said == Said("redriven: 1\n", None)
    (left,) = (await terminal.run("dead-letters", "list", "--json")).json["deadLetters"]
    assert left["correlationId"] == "o-1"


async def test_all_dead_letters_are_discarded_a_portion_at_a_time(terminal: Terminal) -> None:
    first = await terminal.run("dead-letters", "discard", "--all", "--limit", "1")
    second = await terminal.run("dead-letters", "discard", "--all", "--json")

    assert first == Said("discarded: 1, and more match: run it again\n", None)
    assert (second.json["done"], second.json["hasMore"]) == (1, False)


async def test_one_dead_letter_is_repaired_by_its_id(terminal: Terminal) -> None:
    letters = (await terminal.run("dead-letters", "list", "--json")).json["deadLetters"]

    said = await terminal.run("dead-letters", "redrive", letters[0]["id"])

    assert said == Said(f"redriven: OrderShipped of order:{letters[0]['correlationId']}\n", None)


async def test_what_could_not_be_repaired_is_named_and_an_error(terminal: Terminal) -> None:
    letters = (await terminal.run("dead-letters", "list", "--json")).json["deadLetters"]

    said = await terminal.run("dead-letters", "discard", letters[0]["id"], "dl-none")

    assert "discarded: 1\n" in said.out
    assert "dl-none" in said.out
    assert said.error == "1 was not discarded; the rest was"


@pytest.mark.parametrize("args", [[], ["--all", "--saga", "order"], ["dl-1", "--all"], ["dl-1", "--key", "o-1"]])
async def test_which_dead_letters_has_to_be_said_in_one_way(terminal: Terminal, args: list[str]) -> None:
    said = await terminal.run("dead-letters", "discard", *args)

    assert said.error is not None
    assert "say which dead letters" in said.error
    assert len(terminal.door.store.dead_letters_by_id) == 2


async def test_a_schedule_is_listed_and_triggered(terminal: Terminal) -> None:
    listed = (await terminal.run("schedules", "list", "--json")).json["schedules"]
    table = await terminal.run("schedules", "list")
    triggered = await terminal.run("schedules", "trigger", "report")

    assert [(one["sagaName"], one["cron"], one["nextTickAt"]) for one in listed] == [
        ("report", "0 3 * * *", "2026-01-01T03:00:00.000Z")
    ]
    assert "report" in table.out
    assert "0 3 * * *" in table.out
    assert triggered.out.startswith("report:tick ")
    assert (await terminal.door.get("/instances", sagaName="report")).json()["total"] == 1


async def test_a_saga_without_a_schedule_cannot_be_triggered(terminal: Terminal) -> None:
    said = await terminal.run("schedules", "trigger", "order")

    assert said.error is not None
    assert "SCHEDULE_NOT_FOUND" in said.error


async def test_the_openapi_document_is_that_of_the_server(terminal: Terminal) -> None:
    said = await terminal.run("openapi", "--json")

    assert said.json == (await terminal.door.client.get("/api/openapi.json")).json()
    assert "security" not in said.json
    assert "security" in (await terminal.run("openapi", "--with-token")).json


async def test_timers_are_listed_moved_and_cancelled() -> None:
    def remind(saga: Any, event: Any, context: Any) -> list[Any]:
        return [schedule(SagaMessage("Remind", {}), "10m", name="reminder")]

    orders = define_saga("order").state({}).on("Placed", remind).on("Remind", remind, starts=False).build()
    async with open_door(orders) as door, serve(create_app(door.runtime)) as port:
        terminal = Terminal(door, port)
        await door.publish("Placed", {}, correlationId="o-1", wait="5s")
        (timer,) = (await terminal.run("timers", "list", "--saga", "order", "--json")).json["timers"]

        table = await terminal.run("timers", "list")
        moved = await terminal.run("timers", "move", timer["id"], "2026-06-01T12:00:00Z")
        refused = await terminal.run("timers", "move", timer["id"], "tomorrow")
        cancelled = await terminal.run("timers", "cancel", timer["id"])
        gone = await terminal.run("timers", "cancel", timer["id"])

    assert timer["id"] in table.out
    assert moved == Said("order:o-1: timer reminder was moved to 2026-06-01T12:00:00Z\n", None)
    assert refused.error is not None
    assert "'tomorrow' is no moment" in refused.error
    assert cancelled == Said("order:o-1: timer reminder was cancelled\n", None)
    assert gone.error is not None
    assert "TIMER_NOT_FOUND" in gone.error


@pytest.mark.parametrize(("text", "seconds"), [("now", 0), ("10m", 600), ("2026-06-01T12:00:00+02:00", None)])
def test_a_timer_is_moved_to_a_moment_or_by_a_delay(text: str, seconds: int | None) -> None:
    found = _moment(text)

    if seconds is None:
        assert found == datetime(2026, 6, 1, 10, tzinfo=UTC)
    else:
        assert abs((found - datetime.now(UTC)).total_seconds() - seconds) < 60
