"""What the receiver does while a store that works elsewhere is at a commit: it decides what comes next, and nothing
that depends on how the commit ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Collection, Sequence
from typing import Any

import pytest
from msgspec.structs import replace

from sagaloom import SagaMessage, define_saga, send
from sagaloom.errors import BackendUnavailable, SagasError
from sagaloom.ports.store import CommitResult, Conflict, Holding, Lease, Loaded, UnitOfWork
from sagaloom.runtime.options import RuntimeOptions
from sagaloom.runtime.receipts import PublishReceipt
from sagaloom.runtime.runtime import SagaRuntime
from sagaloom.testing import MemoryStore
from tests.patience import PATIENCE_SECONDS

pytestmark = pytest.mark.anyio


class FarStore(MemoryStore):
    """Commits when the test lets it; `sent` are the keys of each commit that has come."""

    def __init__(self) -> None:
        super().__init__()
        self.is_slow = False
        self.sent: list[list[str]] = []
        self.has_come = asyncio.Condition()
        self.let_go = asyncio.Semaphore(0)
        self.troubles: list[Exception] = []
        self.conflicts: list[dict[int, Conflict]] = []
        self.load_troubles: list[Exception | None] = []
        self.is_shared = False

    async def tend(self, lease: Lease, *, give_up: Collection[int] = ()) -> Holding:
        return replace(await super().tend(lease, give_up=give_up), is_shared=self.is_shared)

    @property
    def is_remote(self) -> bool:
        return True

    async def commit(self, units: Sequence[UnitOfWork], *, lease: Lease) -> CommitResult:
        if not self.is_slow:
            return await super().commit(units, lease=lease)
        async with self.has_come:
            self.sent.append([unit.head.key if unit.head else "" for unit in units])
            self.has_come.notify_all()
        await self.let_go.acquire()
        if self.troubles:
            raise self.troubles.pop(0)
        if self.conflicts:
            return CommitResult(self.conflicts.pop(0), 0, 0, 0)
        return await super().commit(units, lease=lease)

    async def load(self, keys: Sequence[tuple[str, str]], *, parts: Collection[int] | None = None) -> list[Loaded]:
        trouble = self.load_troubles.pop(0) if self.load_troubles else None
        if trouble is not None:
            raise trouble
        return await super().load(keys, parts=parts)

    async def commits(self, count: int) -> None:
        """Returns when so many commits have come."""
        async with asyncio.timeout(PATIENCE_SECONDS), self.has_come:
            await self.has_come.wait_for(lambda: len(self.sent) >= count)


class Shop:
    """A runtime on a far store, and what its handlers were called with, in order."""

    def __init__(self) -> None:
        self.store = FarStore()
        self.decided: list[str] = []
        self.publishing: list[asyncio.Task[PublishReceipt]] = []
        definition = (
            define_saga("order")
            .durability("t1")
            .state({"seen": []})
            .on("Placed", self._on_placed)
            .on("Passed", self._on_placed)
            .build()
        )
        options = RuntimeOptions(batch_max=1_000)
        self.runtime = SagaRuntime(self.store, definitions=[definition], options=options)

    def _on_placed(self, saga: Any, message: SagaMessage[Any], context: Any) -> list[Any]:
        self.decided.append(f"{message.correlation_key}:{message.payload['n']}")
        saga.state = {"seen": [*saga.state["seen"], message.payload["n"]]}
        passed_to = message.payload.get("to")
        return [send("saga:order", SagaMessage("Passed", {"n": "passed"}, passed_to))] if passed_to else []

    async def publish(self, key: str, n: int, **more: Any) -> asyncio.Task[PublishReceipt]:
        message = SagaMessage("Placed", {"n": n, **more}, correlation_key=key)

        async def published() -> PublishReceipt:
            async with asyncio.timeout(PATIENCE_SECONDS):
                return (await self.runtime.publish(message)).raise_for_rejected()

        task = asyncio.create_task(published())
        self.publishing.append(task)
        await turns_of_the_loop()
        return task

    async def seen(self, key: str) -> list[Any]:
        instance = await self.runtime.get_instance("order", key)
        return [] if instance is None else json.loads(instance.state)["seen"]

    async def settle(self) -> None:
        self.store.is_slow = False
        for _ in range(100):
            self.store.let_go.release()
        await self.runtime.settled()


async def turns_of_the_loop() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.fixture
async def shop() -> AsyncIterator[Shop]:
    shop = Shop()
    async with shop.runtime:
        shop.store.is_slow = True
        yield shop
        await shop.settle()
        for task in shop.publishing:
            with contextlib.suppress(SagasError):
                await task


async def test_the_next_messages_are_decided_while_a_commit_is_under_way_and_sent_when_it_is_written(
    shop: Shop,
) -> None:
    first = await shop.publish("a", 1)
    await shop.store.commits(1)
    second = await shop.publish("b", 1)

    assert shop.decided == ["a:1"]  # What came after the batch was taken waits for the next one.
    shop.store.let_go.release()
    await first
    await shop.store.commits(2)
    third = await shop.publish("c", 1)

    assert not second.done()
    shop.store.let_go.release()
    await second
    await shop.store.commits(3)
    assert not third.done()


async def test_a_publisher_hears_of_its_message_while_the_next_commit_is_under_way(shop: Shop) -> None:
    tasks = [await shop.publish(f"k{n}", 1) for n in range(3)]
    await shop.store.commits(1)

    shop.store.let_go.release()
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED, timeout=PATIENCE_SECONDS)

    assert tasks[0].done()
    assert not all(task.done() for task in tasks)
    await shop.store.commits(2)


async def _two_turns(shop: Shop, monkeypatch: pytest.MonkeyPatch, *messages: tuple[str, int, dict[str, Any]]) -> Any:
    """Has the messages wait together, and be taken one after the other: the first is under way when this returns."""
    monkeypatch.setattr("sagaloom.runtime.receiver._HALF_MIN", 1)
    async with shop.runtime._receiver.turning:  # pyright: ignore[reportPrivateUsage]
        tasks = [await shop.publish(key, n, **more) for key, n, more in messages]
    await shop.store.commits(1)
    await turns_of_the_loop()
    return tasks


async def test_a_half_is_decided_while_the_other_is_committed(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    await _two_turns(shop, monkeypatch, ("a", 1, {}), ("b", 1, {}))

    assert shop.store.sent == [["a"]]
    assert shop.decided == ["a:1", "b:1"]


async def test_nothing_is_decided_ahead_while_others_write_to_the_store(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.store.is_shared = True
    shop.store.is_slow = False
    shop.runtime._receiver.attend(standing=True)  # pyright: ignore[reportPrivateUsage]
    await shop.runtime.settled()
    shop.store.is_slow = True

    await _two_turns(shop, monkeypatch, ("a", 1, {}), ("b", 1, {}))
    await shop.publish("c", 1)

    assert shop.store.sent == [["a", "b"]]
    assert shop.decided == ["a:1", "b:1"]


async def test_a_message_waits_for_the_one_of_its_key_that_is_under_way(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    await _two_turns(shop, monkeypatch, ("a", 1, {}), ("b", 1, {}), ("a", 2, {}), ("a", 3, {}), ("c", 1, {}))

    assert "a:2" not in shop.decided[: shop.decided.index("b:1")]
    await shop.settle()

    assert await shop.seen("a") == [1, 2, 3]
    assert [each for each in shop.decided if each.startswith("a")] == ["a:1", "a:2", "a:3"]


async def test_a_message_waits_for_one_that_is_being_sent_to_its_key(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that is sent is accepted by the commit that is under way, so it comes before (I9)."""
    await _two_turns(shop, monkeypatch, ("a", 1, {"to": "b"}), ("b", 1, {}))

    assert shop.decided == ["a:1"]
    await shop.settle()

    assert await shop.seen("b") == ["passed", 1]


async def test_what_was_decided_on_top_of_a_commit_that_failed_is_not_sent(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.store.troubles = [BackendUnavailable("the far store is gone", data={"outcome": "unknown"})]
    tasks = await _two_turns(shop, monkeypatch, ("a", 1, {}), ("b", 1, {}))

    shop.store.let_go.release()
    with pytest.raises(BackendUnavailable):
        await tasks[0]

    assert shop.store.sent == [["a"]]
    with pytest.raises(BackendUnavailable):
        await tasks[1]
    await shop.settle()
    assert (await shop.seen("a"), await shop.seen("b")) == ([], [])


async def test_rows_that_were_decided_on_top_of_a_commit_that_failed_are_decided_again(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = await _two_turns(shop, monkeypatch, ("a", 1, {"to": "x"}), ("b", 1, {"to": "y"}))
    shop.store.let_go.release()
    shop.store.let_go.release()
    await asyncio.gather(*tasks)
    shop.store.troubles = [BackendUnavailable("the far store is gone", data={"outcome": "not_written"})]

    await shop.settle()

    assert (await shop.seen("x"), await shop.seen("y")) == (["passed"], ["passed"])


async def test_a_conflict_of_a_commit_is_no_matter_of_the_next(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.store.conflicts = [{0: Conflict("revision", "somebody else was faster")}]
    tasks = await _two_turns(shop, monkeypatch, ("a", 1, {}), ("b", 1, {}))

    shop.store.let_go.release()
    await shop.store.commits(2)

    assert shop.store.sent == [["a"], ["b"]]
    await shop.settle()
    await asyncio.gather(*tasks)
    assert (await shop.seen("a"), await shop.seen("b")) == ([1], [1])


async def test_when_the_next_turn_cannot_be_decided_the_one_before_is_written_and_told(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.store.load_troubles = [None, BackendUnavailable("the far store does not answer")]
    tasks = await _two_turns(shop, monkeypatch, ("a", 1, {}), ("b", 1, {}))

    shop.store.let_go.release()
    await tasks[0]

    with pytest.raises(BackendUnavailable):
        await tasks[1]
    assert (await shop.seen("a"), shop.decided) == ([1], ["a:1"])


async def test_a_runtime_that_ends_in_the_middle_leaves_no_commit_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    shop = Shop()
    await shop.runtime.start()
    shop.store.is_slow = True
    tasks = await _two_turns(shop, monkeypatch, ("a", 1, {}), ("b", 1, {}))

    await shop.runtime.abandon()

    assert [task for task in asyncio.all_tasks() if "commit" in repr(task.get_coro())] == []
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
