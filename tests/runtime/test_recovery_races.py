"""What goes wrong while others go wrong: recovery meets a restart, a second recovery, and a worker that is leaving."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any

import pytest

from sagaloom import define_saga, send
from sagaloom.kv.postgres import PostgresDatabase, PostgresPresence, PostgresSagaRows
from sagaloom.messages import SagaMessage
from sagaloom.ports.store import Holding, InboxRow, Lease
from sagaloom.runtime import RuntimeOptions, SagaRuntime
from sagaloom.stores import SqlSagaStore
from sagaloom.targets import EffectRequest, callable_target
from sagaloom.testing import check_invariants
from tests.patience import PATIENCE_SECONDS
from tests.runtime.conftest import STORES, Bench, Life
from tests.runtime.test_sharing import PARTITIONS, both, parts_of, until
from tests.servers.finding import own
from tests.servers.postgres import Postgres

__all__ = ["STORES"]

KEYS = 20


def _charging(saga: Any, event: Any, context: Any) -> list[Any]:
    saga.state = {"seen": [*saga.state["seen"], event.payload["n"]]}
    return [send("service:payments", {"n": event.payload["n"], "of": event.payload["key"]})]


CHARGES = (
    define_saga("charges")
    .state({"seen": []})
    .on("Charge", _charging)
    .correlate(lambda message: message.payload["key"])
    .build()
)


def _charge(number: int) -> SagaMessage[Any]:
    return SagaMessage("Charge", {"n": number // KEYS, "key": f"k-{number % KEYS}"}, id=f"m-{number}")


async def _left_waiting(bench: Bench, count: int) -> None:
    """`count` messages in the inbox, taken in by a process that is gone."""
    door = await bench.live(CHARGES, works=False)
    for number in range(count):
        receipt = await door.runtime.publish(_charge(number))
        receipt.raise_for_rejected()
    await bench.die(door)


async def _states(life: Life) -> list[tuple[int, Any]]:
    found = [await life.instance("charges", f"k-{number}") for number in range(KEYS)]
    return [(instance.revision, instance.state) for instance in found]


def _charged(bench: Bench) -> list[tuple[str, int]]:
    return sorted((effect.key, effect.revision) for effect in bench.receiver.got)


async def test_a_list_of_what_to_recover_that_has_gone_stale_changes_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers recover the same list: the second one has done everything before the first one begins."""
    await _left_waiting(bench, 3 * KEYS)
    lives: list[Life] = []
    stale: list[InboxRow] = []
    store, _ = await bench._store(6.0)
    kind = type(store)
    await store.close()
    read = kind.arrivals

    async def arrivals(self: Any, lease: Lease, *, limit: int = 1_000) -> list[InboxRow]:
        rows = await read(self, lease, limit=limit)
        if rows and not stale:
            stale.extend(rows)
            thief, _ = await bench._store(6.0)
            await thief.acquire("thief", now=bench.clock.now())
            await thief.release(await thief.acquire("thief", now=bench.clock.now()))
            await thief.close()
            lives.append(await bench.live(CHARGES))
            await until(lambda: len(bench.receiver.got) == 3 * KEYS)
        return rows

    monkeypatch.setattr(kind, "arrivals", arrivals)
    first = await bench.live(CHARGES)
    await until(lambda: first.runtime.health().backlog == 0 and len(parts_of(first)) > 0)

    assert len(stale) > 0
    assert {revision for revision, _ in await _states(first)} == {3}
    assert len(_charged(bench)) == len(set(_charged(bench))) == 3 * KEYS
    assert await check_invariants(first.runtime.store) == []


async def test_a_worker_that_drains_claims_nothing_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A drain overlaps a takeover: one is leaving slowly, another one dies, and its work goes to whoever stays."""
    leaving, dying = await both(bench, CHARGES, drain_seconds=5.0)
    staying = await bench.live(CHARGES)
    await until(lambda: min(len(parts_of(each)) for each in (leaving, dying, staying)) >= PARTITIONS // 3)
    bench.receiver.gate = asyncio.Event()  # What is on its way keeps the drain from ending.
    for number in range(KEYS):
        (await leaving.runtime.publish(_charge(number), wait=30)).raise_for_rejected()
    gained: list[Collection[int]] = []
    store = leaving.runtime.store
    tend = store.tend

    async def tended(lease: Lease, *, give_up: Collection[int] = ()) -> Holding:
        holding = await tend(lease, give_up=give_up)
        gained.append(holding.gained)
        return holding

    monkeypatch.setattr(store, "tend", tended)
    ending = asyncio.create_task(bench.end(leaving))
    await asyncio.sleep(0)

    await bench.die(dying)
    for number in range(KEYS, 2 * KEYS):
        await until_published(staying, _charge(number))
    bench.receiver.gate.set()
    await ending
    await until(lambda: len(parts_of(staying)) == PARTITIONS)
    await staying.runtime.settled()

    assert not any(gained)
    assert {revision for revision, _ in await _states(staying)} == {2}
    assert set(_charged(bench)) == {(f"k-{number}", revision) for number in range(KEYS) for revision in (1, 2)}
    assert await check_invariants(staying.runtime.store) == []


async def until_published(life: Life, message: SagaMessage[Any]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not (await life.runtime.publish(message)).published:  # noqa: ASYNC110 - a client that tries again
            await asyncio.sleep(0.02)


@pytest.mark.server("postgres")
@pytest.mark.parametrize("store_kind", ["sqlite"])
@pytest.mark.parametrize("step", ["claimed", "decided", "committed"])
async def test_a_database_that_restarts_in_the_middle_of_a_recovery_costs_time_alone(
    store_kind: str, step: str
) -> None:
    charged: list[tuple[str, int, str]] = []
    restarts = 0

    async def pay(request: EffectRequest) -> None:
        charged.append((request.payload["of"], request.payload["n"], request.effect_key))

    with own(Postgres) as server:

        def restart_once(reached: str) -> None:
            nonlocal restarts
            if reached == step and not restarts:
                restarts += 1
                # In the middle of a turn: whatever this worker has sent or is about to send is cut.
                server.kill()
                server.start()

        async def live(**options: Any) -> SagaRuntime:
            database = PostgresDatabase(url=server.url, deadline_seconds=3.0)
            store = SqlSagaStore(PostgresSagaRows(database), presence=PostgresPresence(database, lease_seconds=1.0))
            runtime = SagaRuntime(
                store,
                definitions=[CHARGES],
                targets=[callable_target("service", pay)],
                options=RuntimeOptions(lease_seconds=1.0, **options),
            )
            await store.open()
            await runtime.start()
            return runtime

        door = await live(works=False)
        for number in range(3 * KEYS):
            (await door.publish(_charge(number))).raise_for_rejected()
        await door.abandon()
        await door.store.close()

        worker = await live(on_step=restart_once)
        await until(lambda: len({(of, n) for of, n, _ in charged}) == 3 * KEYS)
        await worker.settled()
        found = [await worker.get_instance("charges", f"k-{number}") for number in range(KEYS)]
        breaches = await check_invariants(worker.store)
        await worker.stop()
        await worker.store.close()

    assert restarts == 1
    assert [each is not None and each.revision for each in found] == [3] * KEYS
    assert len({key for _, _, key in charged}) == 3 * KEYS
    assert breaches == []
