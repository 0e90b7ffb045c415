"""Tier t3: what was acknowledged is on a synchronous standby, too, and survives the primary."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, Literal

import pytest

from sagaloom import Saga, SagaContext, SagaMessage, define_saga, send
from sagaloom.composition import create_durable_saga_runtime
from sagaloom.errors import BackendUnavailable, DefinitionError
from sagaloom.ids import PARTITIONS
from sagaloom.kv.postgres import PostgresDatabase, PostgresPresence, PostgresSagaRows
from sagaloom.runtime import PublishReceipt, RuntimeOptions, SagaRuntime
from sagaloom.runtime.receipts import PublishRejected
from sagaloom.stores.sql import SqlSagaStore
from sagaloom.targets import EffectRequest, callable_target
from tests.patience import PATIENCE_SECONDS
from tests.servers.finding import own
from tests.servers.postgres import Postgres

pytestmark = pytest.mark.server("postgres")

DEADLINE_SECONDS = 2.0


def _placed(saga: Saga[dict[str, Any]], event: SagaMessage[Any], context: SagaContext[dict[str, Any]]) -> list[Any]:
    saga.state["placed"] = event.payload["orderId"]
    return [send("service:payments", {"charge": event.payload["orderId"]})]


def _saga(saga_id: str, tier: Literal["t1", "t3"]) -> Any:
    return (
        define_saga(saga_id)
        .durability(tier)
        .state({})
        .on(f"{saga_id}:placed", _placed)
        .correlate(lambda message: message.payload["orderId"])
        .build()
    )


PRECIOUS, PLAIN = _saga("precious", "t3"), _saga("plain", "t1")


def _order(saga_id: str, order_id: str) -> SagaMessage[Any]:
    return SagaMessage(f"{saga_id}:placed", {"orderId": order_id}, id=f"m-{order_id}")


@pytest.fixture(scope="module")
def primary() -> Iterator[Postgres]:
    # What asks for no replica does not wait for one; what does, does.
    with own(lambda: Postgres(synchronous_commit="local")) as server:
        yield server


@pytest.fixture(scope="module")
def standby(primary: Postgres) -> Iterator[Postgres]:
    server = primary.add_standby()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def _is_left_as_it_was(request: pytest.FixtureRequest) -> Iterator[None]:
    """What fails beside a frozen standby must not fail those that come after it."""
    yield
    if "standby" in request.fixturenames:
        request.getfixturevalue("standby").thaw()


@asynccontextmanager
async def _serving(url: str, charged: list[str]) -> AsyncIterator[SagaRuntime]:
    async def pay(request: EffectRequest) -> None:
        charged.append(request.payload["charge"])

    database = PostgresDatabase(url=url, deadline_seconds=DEADLINE_SECONDS)
    rows = PostgresSagaRows(database)
    store = SqlSagaStore(rows, presence=PostgresPresence(database))
    await store.open()
    options = RuntimeOptions(drain_seconds=1.0)
    runtime = SagaRuntime(
        store, definitions=[PRECIOUS, PLAIN], targets=[callable_target("service", pay)], options=options
    )
    try:
        async with runtime:
            yield runtime
    finally:
        await store.close()


async def _until(condition: Any, seconds: float = PATIENCE_SECONDS) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - nobody sets an event
            await asyncio.sleep(0.01)


async def _published(runtime: SagaRuntime, message: SagaMessage[Any]) -> PublishReceipt:
    """The receipt, however often it takes: a client that tries again."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not isinstance(answer := await runtime.publish(message), PublishReceipt):
            assert answer.retryable, answer
            await asyncio.sleep(0.05)
    return answer


async def test_without_its_standby_nothing_hangs_and_nothing_is_acknowledged_or_sent(
    primary: Postgres, standby: Postgres
) -> None:
    charged: list[str] = []
    async with _serving(primary.url, charged) as runtime:
        await _until(lambda: all(map(runtime.holds, range(PARTITIONS))))
        await asyncio.to_thread(standby.freeze)
        began = time.monotonic()

        answer = await runtime.publish(_order("precious", "o-a"))

        assert isinstance(answer, PublishRejected)
        assert (answer.code, answer.retryable) == ("BACKEND_UNAVAILABLE", True)
        assert time.monotonic() - began < PATIENCE_SECONDS  # the standby would keep it for ever
        assert runtime.store.problem is not None
        assert charged == []

        await asyncio.to_thread(standby.thaw)
        await _until(lambda: charged == ["o-a"])
        again = await _published(runtime, _order("precious", "o-a"))
        assert again.duplicate
        assert charged == ["o-a"]


async def test_another_process_calls_a_message_a_duplicate_only_when_it_is_on_the_standby(
    primary: Postgres, standby: Postgres
) -> None:
    async with _serving(primary.url, []) as first, _serving(primary.url, []) as second:
        await asyncio.to_thread(standby.freeze)
        await first.publish(_order("precious", "o-b"))

        answer = await second.publish(_order("precious", "o-b"))

        assert isinstance(answer, PublishRejected)
        await asyncio.to_thread(standby.thaw)
        again = await _published(second, _order("precious", "o-b"))
        assert again.duplicate


async def test_a_wait_that_somebody_cancels_is_no_acknowledgement(primary: Postgres, standby: Postgres) -> None:
    rows = PostgresSagaRows(PostgresDatabase(url=primary.url, deadline_seconds=10))
    try:
        await rows.open()
        await asyncio.to_thread(standby.freeze)
        confirming = asyncio.create_task(rows.confirm())
        waiting = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        while not (pid := await asyncio.to_thread(primary.sql, waiting)):  # noqa: ASYNC110 - nor does the server
            await asyncio.sleep(0.01)

        await asyncio.to_thread(primary.sql, f"SELECT pg_cancel_backend({pid})")

        with pytest.raises(BackendUnavailable, match="synchronous replication") as raised:
            await confirming
        assert raised.value.data["outcome"] == "unknown"
        await asyncio.to_thread(standby.thaw)
        await rows.confirm()
    finally:
        await rows.close()


async def test_a_saga_that_asks_for_no_replica_does_not_wait_for_one(primary: Postgres, standby: Postgres) -> None:
    charged: list[str] = []
    async with _serving(primary.url, charged) as runtime:
        # What others held has to be on the standby before it is gone on with, so everything is taken over first.
        await _until(lambda: all(map(runtime.holds, range(PARTITIONS))))
        await asyncio.to_thread(standby.freeze)

        receipt = await runtime.publish(_order("plain", "o-d"))

        assert isinstance(receipt, PublishReceipt)
        await _until(lambda: charged == ["o-d"])
        await asyncio.to_thread(standby.thaw)


async def test_a_standby_that_is_no_longer_named_is_missed_by_the_next_commit(
    primary: Postgres, standby: Postgres
) -> None:
    async with _serving(primary.url, []) as runtime:
        primary.configure(synchronous_standby_names="''")
        while await asyncio.to_thread(primary.sql, "SHOW synchronous_standby_names"):  # noqa: ASYNC110 - nor here
            await asyncio.sleep(0.01)

        answer = await runtime.publish(_order("precious", "o-e"))

        assert isinstance(answer, PublishRejected)
        assert "synchronous_standby_names" in answer.reason
        primary.configure(synchronous_standby_names="'standby'")
        await asyncio.to_thread(primary.wait_until_synchronous)


async def test_an_order_is_there_after_the_primary_is_destroyed_and_the_standby_promoted(
    primary: Postgres, standby: Postgres
) -> None:
    """The last one with these two."""
    async with _serving(primary.url, []) as runtime:
        for number in range(20):
            receipt = await runtime.publish(_order("precious", f"o-f{number}"))
            assert isinstance(receipt, PublishReceipt)
        await asyncio.to_thread(primary.kill)

    await asyncio.to_thread(standby.promote)

    store = SqlSagaStore(PostgresSagaRows(PostgresDatabase(url=standby.url)))
    try:
        loaded = await store.load([("precious", f"o-f{number}") for number in range(20)])
        assert [each.instance is not None and each.instance.revision for each in loaded] == [1] * 20
        lease = await store.acquire("successor", now=runtime.clock.now())
        await store.release(lease)
    finally:
        await store.close()


async def test_a_database_without_a_standby_refuses_the_tier_and_says_what_to_do() -> None:
    with own(Postgres) as server:
        opening = create_durable_saga_runtime("sql", url=server.url, definitions=[PRECIOUS])

        with pytest.raises(DefinitionError, match=r"'precious' asks for durability 't3'.*synchronous_standby_names"):
            await opening


async def test_a_database_that_does_not_flush_refuses_every_tier() -> None:
    with own(lambda: Postgres(fsync="off")) as server:
        opening = create_durable_saga_runtime("sql", url=server.url, definitions=[PLAIN])

        with pytest.raises(DefinitionError, match=r"'plain' asks for durability 't1'.*fsync = on"):
            await opening


async def test_a_server_that_would_not_flush_each_commit_is_told_to_for_ours() -> None:
    with own(lambda: Postgres(synchronous_commit="off")) as server:
        rows = PostgresSagaRows(PostgresDatabase(url=server.url))
        try:
            await rows.open()
            statement = (
                "SELECT current_setting('synchronous_commit') FROM (SELECT public.saga_runtime_durability(false)) AS d"
            )
            assert [row[0] for row in await rows.database.fetch(statement)] == ["local"]
        finally:
            await rows.close()
