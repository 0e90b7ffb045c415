"""What publishers see while the disk of PostgreSQL is full, and that nothing of it is left when there is space again.

A server gets a small disk of its own where the machine lets us mount one; where it does not, these are skipped, also
where every server must be there.
"""

from __future__ import annotations

import asyncio
from typing import Any

from sagaloom import SagaMessage, define_saga, send
from sagaloom.kv.postgres import PostgresDatabase, PostgresPresence, PostgresSagaRows
from sagaloom.runtime import PublishReceipt, PublishRejected, SagaRuntime
from sagaloom.stores import SqlSagaStore
from sagaloom.targets import EffectRequest, callable_target
from sagaloom.testing import check_invariants
from tests.patience import PATIENCE_SECONDS
from tests.servers.finding import own
from tests.servers.postgres import Postgres


def _keep(saga: Any, event: Any, context: Any) -> list[Any]:
    saga.state = {"text": event.payload["text"]}
    return [send("service:archive", {"n": event.payload["n"]})]


_KEEPING = define_saga("keeping").state({"text": ""}).on("Kept", _keep).build()


def _message(n: int) -> SagaMessage[Any]:
    return SagaMessage("Kept", {"n": n, "text": f"{n:05}" * 4_000}, correlation_key=f"k-{n}", id=f"m-{n}")


class _Archive:
    def __init__(self, url: str) -> None:
        self.kept: list[tuple[int, str]] = []
        database = PostgresDatabase(url=url, deadline_seconds=2.0)
        store = SqlSagaStore(PostgresSagaRows(database), presence=PostgresPresence(database))
        target = callable_target("service", self._take)
        self.runtime = SagaRuntime(store, definitions=[_KEEPING], targets=[target])

    async def _take(self, request: EffectRequest) -> None:
        self.kept.append((request.payload["n"], request.effect_key))

    async def publish_until_refused(self) -> int:
        """The number of the message that was refused."""
        for n in range(10_000):
            answer = await self.runtime.publish(_message(n))
            if isinstance(answer, PublishRejected):
                assert answer.retryable
                return n
        raise AssertionError("the disk is never full")

    async def publish(self, n: int) -> PublishReceipt:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not isinstance(answer := await self.runtime.publish(_message(n), wait=5), PublishReceipt):  # noqa: ASYNC110 - a client that tries again
                await asyncio.sleep(0.02)
        return answer

    async def assert_whole(self, count: int) -> None:
        """Each of the first `count` messages has been applied once, and its effect has left under one key."""
        await self.runtime.settled()
        for n in range(count):
            instance = await self.runtime.get_instance("keeping", f"k-{n}")
            assert instance is not None
            assert instance.revision == 1
        assert {n for n, _ in self.kept} == set(range(count))
        assert len({key for _, key in self.kept}) == count
        assert await check_invariants(self.runtime.store) == []


async def test_tables_that_cannot_grow_refuse_publishes_say_so_and_go_on_without_a_restart() -> None:
    with own(lambda: Postgres().add_disk(48)) as server:
        server.sql(f"CREATE TABLESPACE small LOCATION '{server.disk}'")
        server.sql("CREATE DATABASE sagas TABLESPACE small")
        archive = _Archive(f"{server.url.rpartition('/')[0]}/sagas")
        async with archive.runtime as runtime:
            await archive.publish(0)
            await asyncio.to_thread(server.fill_disk)

            refused = await archive.publish_until_refused()
            answer = await runtime.publish(_message(refused))
            problem = runtime.store.problem
            is_ready = runtime.health().ready

            await asyncio.to_thread(server.free_disk)
            for n in range(refused, refused + 3):
                await archive.publish(n)
            await archive.assert_whole(refused + 3)
            assert isinstance(answer, PublishRejected)
            assert "No space left" in answer.reason
            assert "free space on the server's disk" in answer.reason
            assert problem is not None
            assert not is_ready
            assert runtime.health().ready
        await runtime.store.close()


async def test_a_log_that_cannot_grow_takes_the_server_down_and_nothing_that_was_acknowledged_with_it() -> None:
    """PostgreSQL stops by itself then, and comes back when somebody has made space and starts it."""

    def with_its_log_on_a_small_disk() -> Postgres:
        server = Postgres(min_wal_size="2MB", max_wal_size="8MB").add_disk(48)
        server.initdb_options = (f"--waldir={server.disk}/wal", "--wal-segsize=1")
        return server

    with own(with_its_log_on_a_small_disk) as server:
        archive = _Archive(server.url)
        async with archive.runtime as runtime:
            await archive.publish(0)
            await asyncio.to_thread(server.fill_disk)

            refused = await archive.publish_until_refused()

            await asyncio.to_thread(server.free_disk)
            await asyncio.to_thread(server.kill)  # if it has not gone yet
            await asyncio.to_thread(server.start)
            for n in range(refused, refused + 3):
                await archive.publish(n)
            await archive.assert_whole(refused + 3)
            assert runtime.health().ready
            assert "No space left on device" in server.log.read_text(encoding="utf-8", errors="replace")
        await runtime.store.close()
