"""A bench for the runtime: one store file, a manual clock, and as many lives as a test wants."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from sagaloom import SagaDefinition, SagaMessage
from sagaloom.engine.records import HistoryEntry, Instance, OutboxEffect
from sagaloom.kv.postgres import PostgresPresence, PostgresSagaRows
from sagaloom.kv.presence import FilePresence
from sagaloom.kv.sqlite import SqliteKeyValue
from sagaloom.ports.store import SagaStore
from sagaloom.runtime.options import RuntimeOptions
from sagaloom.runtime.receipts import Outcome, PublishReceipt
from sagaloom.runtime.runtime import SagaRuntime
from sagaloom.stores import KvSagaStore, SqlSagaStore
from sagaloom.telemetry import TelemetryProviders
from sagaloom.testing import MemoryStore
from sagaloom.testing.clock import ManualClock
from tests.schemas import Schema


class Receiver:
    """A target that writes down what it gets, and answers as the test says."""

    def __init__(self, kind: str = "service") -> None:
        self.kind = kind
        self.got: list[OutboxEffect] = []
        self.answer: Callable[[OutboxEffect], Any] = lambda effect: ()
        self.gate: asyncio.Event | None = None

    async def deliver(self, effect: OutboxEffect) -> Iterable[SagaMessage[Any]]:
        if self.gate is not None:
            await self.gate.wait()
        self.got.append(effect)
        answer = self.answer(effect)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    async def close(self) -> None:
        return None

    @property
    def payloads(self) -> list[bytes]:
        return [effect.payload for effect in self.got]


class Life:
    """One runtime on the store file of the bench; several may follow each other."""

    def __init__(self, runtime: SagaRuntime, kv: Any) -> None:
        self.runtime = runtime
        self.kv = kv

    async def publish(self, type: str, payload: object = None, *, key: str | None = None, **fields: Any) -> Outcome:
        """Publishes and returns the only outcome, whatever it is."""
        wait = fields.pop("wait", None)
        message = SagaMessage(type, {} if payload is None else payload, correlation_key=key, **fields)
        receipt = await self.runtime.publish(message, wait=wait)
        assert isinstance(receipt, PublishReceipt), receipt
        (outcome,) = receipt.outcomes
        return outcome

    async def instance(self, saga_id: str, key: str, run: int | None = None) -> Instance:
        found = await self.runtime.get_instance(saga_id, key, run=run)
        assert found is not None
        return found

    async def history(self, saga_id: str, key: str, run: int | None = None) -> list[HistoryEntry]:
        return await self.runtime.history(saga_id, key, run=run)


class Bench:
    """Makes lives on one store: a file, or a schema of PostgreSQL."""

    def __init__(self, path: Path, schema: Schema | None = None) -> None:
        self.path = path
        self.schema = schema
        self.clock = ManualClock()
        self.receiver = Receiver()
        self._lives: list[Life] = []

    async def live(
        self, *definitions: SagaDefinition[Any], telemetry: TelemetryProviders | None = None, **options: Any
    ) -> Life:
        store, kv = await self._store(options.get("lease_seconds", 6.0))
        runtime = SagaRuntime(
            store,
            definitions=definitions,
            targets=[self.receiver],
            clock=self.clock,
            options=RuntimeOptions(**options),
            telemetry=telemetry,
        )
        await runtime.start()
        life = Life(runtime, kv)
        self._lives.append(life)
        return life

    async def _store(self, lease_seconds: float) -> tuple[SagaStore, Any]:
        files = FilePresence(self.path, lease_seconds=lease_seconds)
        if self.schema is None:
            kv = await SqliteKeyValue.open(self.path)
            return KvSagaStore(kv, presence=files), kv
        rows = PostgresSagaRows(self.schema.database())
        presence = PostgresPresence(rows.database, lease_seconds=lease_seconds, files=files)
        return SqlSagaStore(rows, presence=presence), rows

    async def damage(self, pk: int, run: int) -> None:
        """Makes the state of a run unreadable."""
        if self.schema is None:
            kv = await SqliteKeyValue.open(self.path)
            await kv.commit(puts=[(("state", pk, run), b"\xc1 no record")])
            await kv.close()
        else:
            connection = await self.schema.connect()
            changed = "UPDATE saga_runtime_state SET v = $3 WHERE pk = $1 AND run = $2"
            await connection.execute(changed, pk, run, b"\xc1 no record")
            await connection.close()

    async def die(self, life: Life) -> None:
        """Ends a life as a kill would: nothing is drained."""
        await life.runtime.abandon()
        await life.runtime.store.close()
        self._lives.remove(life)

    async def end(self, life: Life) -> None:
        await life.runtime.stop()
        await life.runtime.store.close()
        self._lives.remove(life)

    async def advance(self, by: str) -> None:
        """Moves the clock and lets everything that became due run to its end."""
        self.clock.advance(by)
        for _ in range(20):
            await asyncio.sleep(0)
        for life in self._lives:
            await life.runtime.settled()

    async def close(self) -> None:
        for life in list(self._lives):
            await self.end(life)


STORES = ("sqlite", "postgres")
"""A module that takes this name has its tests of `bench` run on each: for what must hold whatever is below."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    stores = getattr(metafunc.module, "STORES", None)
    chosen = any("store_kind" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if stores is not None and "store_kind" in metafunc.fixturenames and not chosen:
        marks = {"postgres": (pytest.mark.server("postgres"),)}
        metafunc.parametrize("store_kind", [pytest.param(each, marks=marks.get(each, ())) for each in stores])


@pytest.fixture
def store_kind() -> str:
    return "sqlite"


@pytest.fixture
def bench_schema(store_kind: str, request: pytest.FixtureRequest) -> Schema | None:
    found: Schema | None = request.getfixturevalue("schema") if store_kind == "postgres" else None
    return found


@pytest.fixture
async def bench(tmp_path: Path, bench_schema: Schema | None) -> AsyncIterator[Bench]:
    made = Bench(tmp_path / "sagas.db", bench_schema)
    yield made
    await made.close()


@pytest.fixture(params=["embedded", "memory", pytest.param("postgres", marks=pytest.mark.server("postgres"))])
def any_store_kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture
def schema_if_asked(any_store_kind: str, request: pytest.FixtureRequest) -> Schema | None:
    """No coroutine, for those cannot ask for others that are."""
    return request.getfixturevalue("schema") if any_store_kind == "postgres" else None


@pytest.fixture
async def store(any_store_kind: str, schema_if_asked: Schema | None, tmp_path: Path) -> AsyncIterator[SagaStore]:
    """An empty store of each kind, for what must be the same on all of them."""
    made: SagaStore
    if schema_if_asked is not None:
        made = SqlSagaStore(PostgresSagaRows(schema_if_asked.database()))
    elif any_store_kind == "memory":
        made = MemoryStore()
    else:
        made = KvSagaStore(await SqliteKeyValue.open(tmp_path / "one.db"))
    yield made
    await made.close()
