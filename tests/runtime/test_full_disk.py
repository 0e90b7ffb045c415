"""What publishers see while the disk is full, and that nothing of it is left when there is space again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from sagaloom import SagaMessage, define_saga, send
from sagaloom.kv.sqlite import SqliteKeyValue
from sagaloom.runtime import PublishReceipt, PublishRejected, SagaRuntime
from sagaloom.stores import KvSagaStore
from sagaloom.testing.disk import FullDiskVfs
from tests.patience import PATIENCE_SECONDS
from tests.runtime.conftest import Receiver

pytestmark = pytest.mark.anyio


def _charge(saga: Any, event: Any, context: Any) -> list[Any]:
    saga.state = {"charged": saga.state["charged"] + 1}
    return [send("service:payments", {"n": event.payload["n"]})]


_orders = define_saga("orders").state({"charged": 0}).on("OrderPlaced", _charge).build()


def _placed(number: int) -> SagaMessage[Any]:
    return SagaMessage("OrderPlaced", {"n": number}, correlation_key="o-1", id=f"m-{number}")


@pytest.fixture
def disk() -> Iterator[FullDiskVfs]:
    vfs = FullDiskVfs()
    yield vfs
    vfs.unregister()


@pytest.fixture
def payments() -> Receiver:
    return Receiver()


@pytest.fixture
async def runtime(tmp_path: Path, disk: FullDiskVfs, payments: Receiver) -> AsyncIterator[SagaRuntime]:
    kv = await SqliteKeyValue.open(tmp_path / "sagas.db", vfs=disk.name)
    async with SagaRuntime(KvSagaStore(kv), definitions=[_orders], targets=[payments]) as runtime:
        yield runtime
    await kv.close()


async def test_a_full_disk_refuses_publishes_says_so_and_is_got_over_without_a_restart(
    runtime: SagaRuntime, disk: FullDiskVfs, payments: Receiver
) -> None:
    assert isinstance(await runtime.publish(_placed(1)), PublishReceipt)
    await runtime.settled()

    disk.full = True
    refused = await runtime.publish(_placed(2))
    assert isinstance(refused, PublishRejected)
    assert (refused.code, refused.retryable) == ("BACKEND_UNAVAILABLE", True)
    assert "full" in refused.reason
    assert not runtime.health().ready

    disk.full = False
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not runtime.health().ready:  # noqa: ASYNC110 - nobody tells, and that is what is tested
            await asyncio.sleep(0.001)
    again = await runtime.publish(_placed(2), wait=30)
    await runtime.settled()

    assert isinstance(again, PublishReceipt)
    assert again.outcomes[0].state == {"charged": 2}
    assert payments.payloads == [b'{"n":1}', b'{"n":2}']
    assert len({effect.effect_key for effect in payments.got}) == 2
