"""What makes no sense is answered alike through every door and on every store: by a code, or by a disposition with its
reason; and it changes nothing."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import httpx2
import pytest

from sagaloom import (
    ALL_STEPS,
    RetryPolicy,
    SagaDefinition,
    SagaMessage,
    SagasError,
    define_query,
    define_saga,
    define_signal,
    saga_compensate,
    saga_complete,
    spawn,
)
from sagaloom.runtime import SagaRuntime, create_durable_saga_runtime
from sagaloom.service import create_app
from tests.doors.http_door import PREFIX, serve
from tests.doors.test_cli_operators import Said, command
from tests.schemas import Schema

SAGA = "orders"
KEY = "o 1/x"  # which no door may take apart


class Answered(NamedTuple):
    """What a door says: the code of a refusal, or a disposition, and why."""

    what: str
    why: str = ""


class Door(Protocol):
    """A way in, as a user has it."""

    async def publish(self, type: str) -> Answered: ...

    async def query(self, name: str, key: str = KEY) -> Answered: ...

    async def signal(self, name: str, key: str = KEY) -> Answered: ...

    async def control(self, verb: str) -> Answered: ...

    async def migrate(self) -> Answered: ...


class ByRuntime:
    def __init__(self, runtime: SagaRuntime) -> None:
        self._runtime = runtime

    async def publish(self, type: str) -> Answered:
        receipt = await self._runtime.publish(SagaMessage(type, {}, correlation_key=KEY), wait=5)
        (outcome,) = receipt.raise_for_rejected().outcomes
        return Answered(outcome.disposition, outcome.reason or "")

    async def query(self, name: str, key: str = KEY) -> Answered:
        return await _answered(self._runtime.query(SAGA, key, name))

    async def signal(self, name: str, key: str = KEY) -> Answered:
        return await _answered(self._runtime.signal(SAGA, key, name))

    async def control(self, verb: str) -> Answered:
        return await _answered(getattr(self._runtime, verb)(SAGA, KEY))

    async def migrate(self) -> Answered:
        (trouble,) = (await self._runtime.migrate_saga(SAGA)).troubles
        return Answered(trouble.error.code, trouble.error.message)


async def _answered(asked: Awaitable[Any]) -> Answered:
    try:
        said = await asked
    except SagasError as error:
        return Answered(error.code, error.message)
    return Answered(said.disposition, said.reason or "")


class ByHttp:
    def __init__(self, client: httpx2.AsyncClient) -> None:
        self._client = client

    async def publish(self, type: str) -> Answered:
        body = {"type": type, "payload": {}, "correlationKey": KEY}
        said = (await self._client.post("/publish", json=body, params={"wait": "5s"})).json()
        return _told(said["outcomes"][0])

    async def query(self, name: str, key: str = KEY) -> Answered:
        return _told((await self._client.get(f"{_at(key)}/queries/{name}")).json())

    async def signal(self, name: str, key: str = KEY) -> Answered:
        return _told((await self._client.post(f"{_at(key)}/signals/{name}")).json())

    async def control(self, verb: str) -> Answered:
        said = (await self._client.post(f"{_at(KEY)}/{verb}")).json()
        return _told(said.get("control", said))

    async def migrate(self) -> Answered:
        (trouble,) = (await self._client.post(f"/sagas/{SAGA}/migrate")).json()["troubles"]
        return _told(trouble)


def _at(key: str) -> str:
    return f"/instances/{SAGA}/{key.replace('/', '%2F').replace(' ', '%20')}"


def _told(said: Any) -> Answered:
    return Answered(said.get("code") or said["disposition"], said.get("message") or said.get("reason") or "")


class ByCommand:
    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    async def publish(self, type: str) -> Answered:
        said = await self._run("publish", type, "--correlation-key", KEY, "--wait", "5s", "--json")
        return _told(json.loads(said.out)["outcomes"][0])

    async def query(self, name: str, key: str = KEY) -> Answered:
        return _failed(await self._run("query", SAGA, key, name))

    async def signal(self, name: str, key: str = KEY) -> Answered:
        said = await self._run("signal", SAGA, key, name, "--json")
        return _told(json.loads(said.out)) if said.out else _failed(said)

    async def control(self, verb: str) -> Answered:
        said = await self._run("instances", verb, SAGA, KEY, "--json")
        return _told(json.loads(said.out)["control"]) if said.out else _failed(said)

    async def migrate(self) -> Answered:
        said = await self._run("migrate", SAGA, "--json")
        assert said.error == "1 instance was not migrated"
        (trouble,) = json.loads(said.out)[SAGA]["troubles"]
        return _told(trouble)

    async def _run(self, *args: str) -> Said:
        return await command(self._url, *args)


def _failed(said: Said) -> Answered:
    assert said.error is not None, said
    message, _, code = said.error.rpartition(" (")
    return Answered(code.removesuffix(")"), message)


# --- The saga, and where it is kept -----------------------------------------------------------------------------------


async def _waits() -> int:
    return 1


def _meddles(state: dict[str, Any]) -> int:
    state["n"] = 99
    return 1


def _cannot_be_undone(saga: Any, event: Any, context: Any) -> Any:
    raise RuntimeError("the bank is closed")


def _cannot_be_migrated(state: Any) -> Any:
    raise KeyError("cents")


def _ends(saga: Any, event: Any, context: Any) -> Any:
    return [saga_complete()]


def _counts_wrong(saga: Any, event: Any, context: Any) -> Any:
    saga.state = {}
    return []


def orders(version: int = 1) -> SagaDefinition[Any]:
    return (
        define_saga(SAGA)
        .version(version, migrate=dict.fromkeys(range(1, version), _cannot_be_migrated))
        .retry(RetryPolicy(maximum_attempts=2, initial_interval_ms=3_600_000, maximum_interval_ms=3_600_000))
        .state({"n": 0})
        .on("Placed", lambda saga, event, context: [])
        .compensate("Placed", _cannot_be_undone)
        .on("CalledOff", lambda saga, event, context: [saga_compensate(ALL_STEPS)], starts=False)
        .on("Delivered", _ends, starts=False)
        .on("Spoiled", _counts_wrong, starts=False)
        .on("Split", lambda saga, event, context: [spawn("nobody", {})], starts=False)
        .on_signal(define_signal("hurry"), lambda saga, event, context: [])
        .on_query(define_query("meddles"), _meddles)
        .on_query(define_query("waits"), lambda state: _waits())
        .on_query(define_query("n"), lambda state: state["n"])
        .invariant("n is not negative", lambda state: state["n"] >= 0)
        .build()
    )


class Place:
    """A store that outlives the runtimes on it."""

    def __init__(self, where: dict[str, Any]) -> None:
        self._where = where

    def live(self, definition: SagaDefinition[Any]) -> Any:
        return create_durable_saga_runtime(definitions=[definition], **self._where)


@pytest.fixture(params=["kv", pytest.param("sql", marks=pytest.mark.server("postgres"))])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "kv":
        return Place({"path": tmp_path / "sagas.db"})
    schema: Schema = request.getfixturevalue("schema")
    return Place({"url": schema.url})


Opening: TypeAlias = Callable[[SagaDefinition[Any]], AbstractAsyncContextManager["Opened"]]


class Opened(NamedTuple):
    runtime: SagaRuntime
    door: Door

    async def revision(self) -> int | None:
        found = await self.runtime.get_instance(SAGA, KEY)
        return None if found is None else found.revision


@pytest.fixture(params=["runtime", "http", "command line"])
def opening(request: pytest.FixtureRequest, place: Place) -> Opening:
    """Opens one of the doors in front of a saga."""

    @asynccontextmanager
    async def opened(definition: SagaDefinition[Any]) -> AsyncIterator[Opened]:
        async with place.live(definition) as durable, AsyncExitStack() as stack:
            runtime: SagaRuntime = durable.runtime
            door: Door = ByRuntime(runtime)
            if request.param == "http":
                transport = httpx2.ASGITransport(create_app(runtime))
                client = httpx2.AsyncClient(transport=transport, base_url=f"http://sagas{PREFIX}")
                door = ByHttp(await stack.enter_async_context(client))
            elif request.param == "command line":
                door = ByCommand(await stack.enter_async_context(serve(create_app(runtime))))
            yield Opened(runtime, door)

    return opened


@pytest.fixture
async def order(opening: Opening) -> AsyncIterator[Opened]:
    """An order that was placed."""
    async with opening(orders()) as opened:
        await opened.runtime.publish(SagaMessage("Placed", {}, correlation_key=KEY), wait=5)
        yield opened


# --- What they say ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "code", "why"),
    [
        ("meddles", "SAGA_QUERY_MUTATED", "has changed the state that it was given to read"),
        ("waits", "SAGA_QUERY_ASYNC", "returned coroutine, which has to be awaited"),
        ("m", "QUERY_NOT_FOUND", "it has meddles, waits, n"),
    ],
)
async def test_a_query_that_does_more_than_read_is_an_error_of_its_own(
    order: Opened, query: str, code: str, why: str
) -> None:
    answered = await order.door.query(query)

    assert (answered.what, why in answered.why) == (code, True)
    assert (await order.revision(), await order.runtime.query(SAGA, KEY, "n")) == (1, 0)


async def test_a_signal_to_nobody_and_one_too_late_are_refused_and_one_to_a_paused_run_waits(order: Opened) -> None:
    missing = await order.door.signal("hurry", "nobody")
    unknown = await order.door.signal("hum")
    await order.runtime.pause(SAGA, KEY)
    paused = await order.door.signal("hurry")
    await order.runtime.resume(SAGA, KEY)
    await order.runtime.settled()
    await order.runtime.publish(SagaMessage("Delivered", {}, correlation_key=KEY), wait=5)
    late = await order.door.signal("hurry")

    assert missing == ("SAGA_INSTANCE_NOT_FOUND", "there is no instance 'nobody' of saga 'orders'")
    assert unknown == ("SIGNAL_NOT_FOUND", "saga 'orders' has no signal 'hum': it has hurry")
    assert paused == ("pending", f"orders:{KEY} is paused: it is applied when the run is resumed")
    assert late.what == "SAGA_INSTANCE_ENDED"
    assert "run 1 is completed and takes no more messages" in late.why
    assert await order.revision() == 5


async def test_a_control_in_vain_is_ignored_and_says_why(order: Opened) -> None:
    not_paused = await order.door.control("resume")
    nothing_to_skip = await order.door.control("skip")
    await order.runtime.publish(SagaMessage("Delivered", {}, correlation_key=KEY), wait=5)
    over = [await order.door.control(verb) for verb in ("cancel", "cancel", "terminate", "pause", "resume")]

    assert not_paused == ("ignored", "run 1 is not paused")
    assert nothing_to_skip == ("ignored", "run 1 has no compensation that fails: there is nothing to skip")
    assert over == [("ignored", "run 1 is completed and takes no more messages")] * 5
    assert await order.revision() == 2


async def test_a_cancel_during_an_unwinding_is_ignored_and_a_terminate_ends_it(order: Opened) -> None:
    await order.runtime.publish(SagaMessage("CalledOff", {}, correlation_key=KEY), wait=5)
    cancelled, again = await order.door.control("cancel"), await order.door.control("cancel")
    revision = await order.revision()
    terminated, twice = await order.door.control("terminate"), await order.door.control("terminate")

    assert cancelled == again
    assert cancelled.what == "ignored"
    assert cancelled.why.startswith("run 1 is being unwound already: ")
    assert revision == 2
    assert (terminated.what, twice.what) == ("applied", "ignored")
    assert await order.revision() == 3


async def test_an_invariant_that_raises_gives_the_message_up(order: Opened) -> None:
    answered = await order.door.publish("Spoiled")

    assert answered.what == "dead_lettered"
    assert "invariant 'n is not negative' could not be checked: it raised KeyError: 'n'" in answered.why
    assert await order.revision() == 1


async def test_a_spawn_of_an_unknown_saga_is_a_dead_letter_that_names_it(order: Opened) -> None:
    answered = await order.door.publish("Split")
    await order.runtime.settled()
    (letter,) = await order.runtime.dead_letters()

    assert answered.what == "applied"
    assert "'nobody'" in letter.reason
    assert (letter.saga_id, letter.key) == (SAGA, KEY)


async def test_a_migration_that_raises_changes_nothing(place: Place, opening: Opening) -> None:
    async with place.live(orders()) as before:
        await before.runtime.publish(SagaMessage("Placed", {}, correlation_key=KEY), wait=5)

    async with opening(orders(version=2)) as opened:
        migrated, message = await opened.door.migrate(), await opened.door.publish("Split")
        instance = await opened.runtime.get_instance(SAGA, KEY)

        why = "the migration of 'orders:o 1/x' from version 1 to 2 raised KeyError: 'cents'"
        assert (migrated.what, why in migrated.why) == ("SAGA_MIGRATION_FAILED", True)
        assert (message.what, why in message.why) == ("dead_lettered", True)
        assert instance is not None
        assert (instance.revision, instance.def_version) == (1, 1)
