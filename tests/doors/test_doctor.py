"""`sagaloom doctor` finds what stands still in a store of either kind, and the command that repairs it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from sagaloom import Saga, SagaContext, SagaMessage, SagasError, define_saga, schedule, send
from sagaloom.cli.doctor import examine
from sagaloom.cli.store_checks import Finding, look_into
from sagaloom.config import configured, define_saga_config
from sagaloom.definitions import RetryPolicy
from sagaloom.kv.postgres import PostgresPresence, PostgresSagaRows
from sagaloom.kv.presence import FilePresence
from sagaloom.kv.sqlite import SqliteKeyValue
from sagaloom.ports.store import UnitOfWork
from sagaloom.runtime import RuntimeOptions, SagaRuntime
from sagaloom.settings import DoorSettings
from sagaloom.stores import KvSagaStore, SqlSagaStore
from sagaloom.targets import EffectRequest, callable_target
from sagaloom.testing import ManualClock
from tests.schemas import Schema

OpenStore = Callable[[], Awaitable[KvSagaStore]]
State = dict[str, Any]


@pytest.fixture(params=["kv", pytest.param("sql", marks=pytest.mark.server("postgres"))])
def place(request: pytest.FixtureRequest) -> Schema | None:
    """The schema of a store in a database, None for one in a file."""
    return request.getfixturevalue("schema") if request.param == "sql" else None


@pytest.fixture
async def open_store(place: Schema | None, tmp_path: Path) -> AsyncIterator[OpenStore]:
    opened: list[KvSagaStore] = []

    async def open_again() -> KvSagaStore:
        if place is None:
            path = tmp_path / "sagas.db"
            store = KvSagaStore(await SqliteKeyValue.open(path), presence=FilePresence(path))
        else:
            database = place.database()
            store = SqlSagaStore(PostgresSagaRows(database), presence=PostgresPresence(database))
        await store.open()
        opened.append(store)
        return store

    yield open_again
    for store in opened:
        await store.close()


def _placed(saga: Saga[State], event: SagaMessage[Any], context: SagaContext[State]) -> list[Any]:
    match event.payload["course"]:
        case "refused":
            raise SagasError("out of paper", retryable=False)
        case "timed":
            return [schedule(SagaMessage("Reminder", {}), "1h")]
        case "sent" | "given up":
            return [send("service:payments", {"course": event.payload["course"]})]
        case _:
            return []


ORDERS = (
    define_saga("orders")
    .state({})
    .on("Begun", lambda saga, event, context: [])
    .on("Placed", _placed)
    .on("Reminder", lambda saga, event, context: [], starts=False)
    .correlate(lambda message: message.payload.get("id"))
    .retry(RetryPolicy(maximum_attempts=1))
    .build()
)


async def _pay(request: EffectRequest) -> None:
    raise SagasError("the card is refused", retryable=request.payload["course"] == "sent")


async def _lived(store: KvSagaStore, *courses: str, ago: timedelta) -> None:
    """A process that took one order of each course in, some time ago."""
    clock = ManualClock(datetime.now(UTC) - ago)
    options = RuntimeOptions(effect_retry=RetryPolicy(initial_interval_ms=10), drain_seconds=1.0)
    runtime = SagaRuntime(
        store, definitions=[ORDERS], targets=[callable_target("service", _pay)], clock=clock, options=options
    )
    async with runtime:
        for course in courses:
            await runtime.publish(SagaMessage("Begun", {"id": course}), wait=5)
            await runtime.publish(SagaMessage("Placed", {"id": course, "course": course}), wait=5)


async def _found(store: KvSagaStore, *, is_running: bool = True) -> dict[str, Finding]:
    return {finding.check: finding for finding in await look_into(store, is_running=is_running)}


async def test_of_a_healthy_store_everything_is_ok(open_store: OpenStore) -> None:
    store = await open_store()
    await _lived(store, "plain", ago=timedelta())

    found = await _found(store)

    assert {check: finding.status for check, finding in found.items()} == dict.fromkeys(found, "ok")
    assert found["instances"].detail == "1 are live, and none is stuck"


async def test_an_instance_behind_a_message_that_was_given_up_is_stuck(open_store: OpenStore) -> None:
    store = await open_store()
    await _lived(store, "refused", ago=timedelta())
    [letter] = await store.dead_letters()

    found = await _found(store)

    assert found["instances"].status == "broken"
    assert "orders:refused" in found["instances"].detail
    assert "out of paper" in found["instances"].detail
    assert found["instances"].repair == f"sagaloom dead-letters redrive {letter.id}"


async def test_an_instance_that_nothing_will_move_is_worth_a_look_after_a_day(open_store: OpenStore) -> None:
    store = await open_store()
    await _lived(store, "plain", ago=timedelta(days=2))

    found = await _found(store)

    assert found["instances"].status == "note"
    assert "orders:plain, running since" in found["instances"].detail
    assert (found["instances"].repair or "").endswith("sagaloom instances cancel orders plain")


async def test_a_timer_in_the_past_is_late_where_a_server_runs(open_store: OpenStore) -> None:
    store = await open_store()
    await _lived(store, "timed", ago=timedelta(hours=2))

    found = await _found(store)

    assert found["timers"].status == "broken"
    assert "Reminder of orders:timed" in found["timers"].detail
    assert (found["timers"].repair or "").startswith("restart the server")


async def test_an_effect_that_does_not_leave_lags_and_says_why(open_store: OpenStore) -> None:
    store = await open_store()
    await _lived(store, "sent", ago=timedelta(minutes=10))

    found = await _found(store)

    assert found["lag"].status == "broken"
    assert "orders:sent to service:payments" in found["lag"].detail
    assert (found["lag"].repair or "").endswith("sagaloom instances history orders sent")


async def test_a_lane_behind_an_effect_that_was_given_up_stands_still(open_store: OpenStore) -> None:
    store = await open_store()
    await _lived(store, "given up", ago=timedelta())
    [letter] = await store.dead_letters()

    found = await _found(store)

    assert found["lanes"].status == "broken"
    assert found["lanes"].repair == f"sagaloom dead-letters redrive {letter.id}"


async def test_partitions_of_the_dead_are_orphans(open_store: OpenStore) -> None:
    first = await open_store()
    await first.acquire("gone", now=datetime.now(UTC))
    await first.commit([UnitOfWork(part=0)], lease=await first.acquire("gone", now=datetime.now(UTC)))
    await first.close()

    found = await _found(await open_store())
    resting = await _found(await open_store(), is_running=False)

    assert found["leases"].status == "broken"
    assert "64 partitions belong to the dead: gone has 64" in found["leases"].detail
    assert (resting["leases"].status, resting["leases"].repair) == ("note", "sagaloom serve MODULE")


@pytest.mark.server("postgres")
def test_the_whole_examination_reaches_a_store_in_a_database(
    postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NETSCRIPT_SAGA_STORE", "sql")
    schema = "sagaloom_test_doctor_nothing_here"
    monkeypatch.setenv("DATABASE_URL", f"{postgres_url}{'&' if '?' in postgres_url else '?'}schema={schema}")

    findings = {each.check: each for each in examine(["sagaloom.demo"], DoorSettings(), url="http://127.0.0.1:9")}

    assert findings["backend"].detail == "sql"
    assert findings["store"].status == "note"
    assert "has no tables of ours yet" in findings["store"].detail


def test_a_database_that_cannot_be_reached_is_broken_and_says_how_to_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NETSCRIPT_SAGA_STORE", "sql")
    monkeypatch.setenv("DATABASE_URL", "postgresql://postgres:secret@127.0.0.1:9/sagas")

    findings = {each.check: each for each in examine(["sagaloom.demo"], DoorSettings(), url="http://127.0.0.1:9")}

    assert findings["store"].status == "broken"
    assert "127.0.0.1:9/sagas" in findings["store"].detail
    assert "secret" not in findings["store"].detail
    assert "psql" in (findings["store"].repair or "")


async def test_instances_that_live_longer_than_their_saga_says_are_named(open_store: OpenStore) -> None:
    store = await open_store()
    orders = configured(ORDERS, define_saga_config("orders", "shop/orders.py").retention(active_days=3).build())
    async with SagaRuntime(store, definitions=[orders], clock=ManualClock()) as runtime:
        await runtime.publish({"type": "Begun", "payload": {"id": "o-1"}})

    age = next(each for each in await look_into(store, is_running=False) if each.check == "age")

    assert (age.status, "1 of orders for more than 3 days" in age.detail) == ("note", True)
