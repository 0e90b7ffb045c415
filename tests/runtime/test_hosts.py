"""Processes on several hosts, which have nothing in common but the database: no files, no pipes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from sagaloom import SagaMessage, define_saga
from sagaloom.ids import PARTITIONS
from sagaloom.kv.postgres import PostgresDatabase, PostgresPresence, PostgresSagaRows
from sagaloom.runtime import PublishReceipt, RuntimeOptions, SagaRuntime
from sagaloom.stores import SqlSagaStore
from tests.patience import PATIENCE_SECONDS
from tests.schemas import Schema

LEASE_SECONDS = 3.0


def noting(saga: Any, event: Any, context: Any) -> list[Any]:
    saga.state = {"seen": [*saga.state["seen"], event.payload["n"]]}
    return []


NOTES = define_saga("notes").state({"seen": []}).on("Note", noting).build()


class Hosts:
    """Runs a runtime on each of some hosts."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.runtimes: list[SagaRuntime] = []

    async def another(self) -> SagaRuntime:
        rows = PostgresSagaRows(PostgresDatabase(url=self._url))
        store = SqlSagaStore(rows, presence=PostgresPresence(rows.database, lease_seconds=LEASE_SECONDS))
        runtime = SagaRuntime(store, definitions=[NOTES], options=RuntimeOptions(lease_seconds=LEASE_SECONDS))
        self.runtimes.append(runtime)
        await runtime.start()
        return runtime


@pytest.fixture
async def hosts(schema: Schema) -> AsyncIterator[Hosts]:
    made = Hosts(schema.url)
    yield made
    for runtime in made.runtimes:
        await runtime.stop()
        await runtime.store.close()


async def share(runtime: SagaRuntime, parts: int) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while sum(map(runtime.holds, range(PARTITIONS))) != parts:  # noqa: ASYNC110 - it has no event
            await asyncio.sleep(0.01)


async def publish(runtime: SagaRuntime, key: str, n: int) -> PublishReceipt:
    receipt = await runtime.publish(SagaMessage("Note", {"n": n}, correlation_key=key), wait=30)
    assert isinstance(receipt, PublishReceipt), receipt
    return receipt


async def test_messages_reach_their_holder_on_another_host_without_waiting_for_a_renewal(hosts: Hosts) -> None:
    first, second = await hosts.another(), await hosts.another()
    await share(first, PARTITIONS // 2)
    await share(second, PARTITIONS // 2)

    began = time.monotonic()
    for n in range(10):
        for runtime in (first, second):
            assert (await publish(runtime, f"k-{n}", n)).outcomes[0].disposition == "applied"
    took = time.monotonic() - began

    # About ten of these messages are brought; a renewal is a second away from the one before.
    assert took < 10 * LEASE_SECONDS / 3


async def test_what_a_killed_one_held_is_taken_over_when_its_lease_is_over(hosts: Hosts) -> None:
    first, second = await hosts.another(), await hosts.another()
    await share(first, PARTITIONS // 2)
    await share(second, PARTITIONS // 2)
    for n in range(8):
        await publish(first, f"k-{n}", 1)

    hosts.runtimes.remove(first)
    await first.abandon()
    first.store._tenure._presence.leave()  # type: ignore[attr-defined]  # it renews no more, and says nothing
    began = time.monotonic()
    await share(second, PARTITIONS)
    took = time.monotonic() - began
    for n in range(8):
        await publish(second, f"k-{n}", 2)
    found = [await second.get_instance("notes", f"k-{n}") for n in range(8)]
    await first.store.close()

    assert took < 10 * LEASE_SECONDS
    assert [instance and json.loads(instance.state) for instance in found] == [{"seen": [1, 2]}] * 8
