"""A process stops at each of its commits while a family is cancelled, an unwinding is tried again, a saga is paused,
and states are migrated. A new one on the same store brings all of it to the same end: on a file, and on PostgreSQL.

Two parents with three children each. One child of the first completes; then the first parent is cancelled, and the
compensation of one of its children fails once. The second parent calls off its trip, whose hotel fails once too.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sagaloom import (
    ALL_STEPS,
    RetryPolicy,
    SagaMessage,
    define_saga,
    saga_compensate,
    saga_complete,
    send,
    spawn,
)
from sagaloom.kv.postgres import PostgresSagaRows
from sagaloom.kv.presence import FilePresence
from sagaloom.kv.sqlite import SqliteKeyValue
from sagaloom.ports.store import SagaStore
from sagaloom.runtime.options import RuntimeOptions
from sagaloom.runtime.runtime import SagaRuntime
from sagaloom.stores import KvSagaStore, SqlSagaStore
from sagaloom.targets.callables import EffectRequest, callable_target
from sagaloom.testing import ManualClock, check_invariants
from sagaloom.testing.faults import Faults
from tests.schemas import Schema

pytestmark = pytest.mark.anyio

_RETRY = RetryPolicy(maximum_attempts=5, initial_interval_ms=1_000, jitter=0.0)


def _bear(saga: Any, event: Any, context: Any) -> list[Any]:
    name = context.correlation_key
    return [
        spawn("child", SagaMessage("Work", {"child": f"{name}{n}"}, correlation_key=f"{name}{n}")) for n in range(3)
    ]


def _heard(saga: Any, event: Any, context: Any) -> list[Any]:
    saga.state["heard"] = sorted([*saga.state.get("heard", []), event.payload["correlationKey"]])
    return []


def _work(saga: Any, event: Any, context: Any) -> list[Any]:
    saga.state["work"] = event.payload["child"]
    return [send("service:work", {"do": event.payload["child"]})]


def _undo(saga: Any, event: Any, context: Any) -> list[Any]:
    if context.attempt == 1 and event.payload["child"].endswith("2"):
        raise ConnectionError("the first attempt fails")
    return [send("service:work", {"undo": event.payload["child"]})]


def _migrated(state: Any) -> Any:
    return {**state, "version": 2}


def _parent(version: int) -> Any:
    stage = (
        define_saga("parent")
        .state({})
        .retry(_RETRY)
        .on("Bear", _bear)
        .on("child:completed", _heard, starts=False)
        .on("child:cancelled", _heard, starts=False)
        .on("CallOff", lambda saga, event, context: [saga_compensate(ALL_STEPS, "rain")], starts=False)
        .compensate("Bear", lambda saga, event, context: [send("service:work", {"undo": context.correlation_key})])
    )
    return (stage.version(2, migrate={1: _migrated}) if version == 2 else stage).build()


CHILD = (
    define_saga("child")
    .state({})
    .retry(_RETRY)
    .on("Work", _work)
    .on("Done", lambda saga, event, context: [saga_complete({"by": event.id})], starts=False)
    .compensate("Work", _undo)
    .build()
)


@dataclass
class World:
    """What outlives a process: the store, the clock on the wall, and what services got."""

    open_store: Callable[[Faults], Awaitable[SagaStore]]
    clock: ManualClock = field(default_factory=ManualClock)
    arrived: dict[str, set[str]] = field(default_factory=dict)
    """What was asked for -> the effect keys under which it came."""

    async def receive(self, request: EffectRequest) -> list[SagaMessage[Any]]:
        ((verb, what),) = request.payload.items()
        self.arrived.setdefault(f"{verb} {what}", set()).add(request.effect_key)
        return []

    @asynccontextmanager
    async def process(self, faults: Faults | None = None, *, version: int = 2) -> AsyncIterator[SagaRuntime]:
        hook = faults if faults is not None else Faults()
        store = await self.open_store(hook)
        runtime = SagaRuntime(
            store,
            definitions=[_parent(version), CHILD],
            targets=[callable_target("service", self.receive)],
            clock=self.clock,
            options=RuntimeOptions(on_step=hook),
        )
        try:
            yield runtime
        finally:
            hook.disarm()
            await runtime.abandon()
            await store.close()

    async def begin(self) -> None:
        """The past, by a process of the older version: both parents have their children."""
        async with self.process(version=1) as runtime:
            await runtime.start()
            for key in ("p", "q"):
                await runtime.publish(SagaMessage("Bear", {}, id=f"bear-{key}", correlation_key=key))
            await runtime.settled(20)

    async def tell(self, runtime: SagaRuntime) -> None:
        """The story, as an operator and a client tell it who say everything again until it is done."""
        await runtime.start()
        await runtime.migrate_saga("parent")
        await runtime.pause_saga("child")
        await runtime.publish(SagaMessage("Done", {}, id="done", correlation_key="p0"))
        await runtime.resume_saga("child")
        await runtime.settled(20)
        await runtime.cancel("parent", "p", reason="ordered twice")
        await runtime.publish(SagaMessage("CallOff", {}, id="off", correlation_key="q"))
        await runtime.settled(20)
        for _ in range(5):
            self.clock.advance("20s")
            for _ in range(20):
                await asyncio.sleep(0)
            await runtime.settled(20)

    async def ending(self, runtime: SagaRuntime) -> dict[str, Any]:
        found: dict[str, Any] = {"arrived": {what: len(keys) for what, keys in sorted(self.arrived.items())}}
        for key in ("p", "q"):
            parent = await runtime.get_instance("parent", key)
            assert parent is not None
            found[key] = (parent.status, parent.reason, json.loads(parent.state))
            found[f"children of {key}"] = await runtime.count_children("parent", key)
            for n in range(3):
                child = await runtime.get_instance("child", f"{key}{n}")
                assert child is not None
                found[f"{key}{n}"] = (child.status, child.undoing)
        return found


EXPECTED = {
    "arrived": {
        **{f"do {key}{n}": 1 for key in "pq" for n in range(3)},
        "undo p": 1,
        "undo p1": 1,
        "undo p2": 1,
        "undo q": 1,
    },
    "p": ("cancelled", "ordered twice", {"version": 2, "heard": ["p0"]}),
    "children of p": {"live": 0, "completed": 1, "failed": 0, "cancelled": 2},
    "p0": ("completed", None),
    "p1": ("cancelled", None),
    "p2": ("cancelled", None),
    "q": ("failed", "rain", {"version": 2}),
    "children of q": {"live": 3, "completed": 0, "failed": 0, "cancelled": 0},
    "q0": ("running", None),
    "q1": ("running", None),
    "q2": ("running", None),
}


def _on_file(path: Path) -> Callable[[Faults], Awaitable[SagaStore]]:
    async def open_store(hook: Faults) -> SagaStore:
        # Nobody cuts the power here, so nothing has to be on the disk: tests/crash does that part.
        kv = await SqliteKeyValue.open(path, on_step=hook, synchronous="OFF")
        return KvSagaStore(kv, presence=FilePresence(path))

    return open_store


def _on_postgres(schema: Schema) -> Callable[[Faults], Awaitable[SagaStore]]:
    async def open_store(hook: Faults) -> SagaStore:
        return SqlSagaStore(PostgresSagaRows(schema.database()))

    return open_store


async def _struck(world: World, faults: Faults) -> bool:
    async with world.process(faults) as runtime:
        telling = asyncio.create_task(world.tell(runtime))
        strike = asyncio.create_task(faults.wait_until_struck(20))
        await asyncio.wait([telling, strike], return_when=asyncio.FIRST_COMPLETED)
        for task in (telling, strike):
            task.cancel()
        await asyncio.gather(telling, strike, return_exceptions=True)
    return bool(faults.struck)


async def _holds(world: World, told: str) -> None:
    async with world.process() as runtime:
        await world.tell(runtime)
        breaches = await check_invariants(runtime.store)
        ending = await world.ending(runtime)
        letters = await runtime.dead_letters()
        assert breaches == [], told
        assert letters == [], told
    assert ending == EXPECTED, told


@pytest.mark.parametrize("step", ["decided", "committed", "kv:half_written", "kv:committed", "dispatched", "settled"])
async def test_wherever_the_process_stops_a_family_ends_the_same_way(step: str, tmp_path: Path) -> None:
    nth = 1
    while True:
        world, faults = World(_on_file(tmp_path / f"{nth}.db")), Faults()
        await world.begin()
        faults.raise_at(step, nth)
        was_struck = await _struck(world, faults)
        await _holds(world, f"stopped at {step}:{nth}")
        if not was_struck:
            assert nth > 1, f"the story never comes to {step}"
            return
        nth += 1


@pytest.mark.server("postgres")
@pytest.mark.parametrize("step", ["decided", "committed"])
async def test_a_family_on_postgres_ends_the_same_way_too(step: str, schema: Schema) -> None:
    counted = Faults()
    world = World(_on_postgres(schema))
    await world.begin()
    async with world.process(counted) as runtime:
        await world.tell(runtime)
        assert await world.ending(runtime) == EXPECTED
    commits = counted.seen[step]

    struck = 0
    for nth in range(1, commits + 1, max(1, commits // 4)):
        await schema.empty()
        world, faults = World(_on_postgres(schema)), Faults()
        await world.begin()
        faults.raise_at(step, nth)
        struck += await _struck(world, faults)  # the last may not come: batches are not always the same
        await _holds(world, f"stopped at {step}:{nth} of {commits}")
    assert struck >= 3


async def test_a_command_that_is_given_again_after_a_stop_is_in_vain(tmp_path: Path) -> None:
    world = World(_on_file(tmp_path / "saga.db"))
    await world.begin()
    await _holds(world, "undisturbed")

    async with world.process() as runtime:
        await runtime.start()
        outcomes = [
            await runtime.cancel("parent", "p"),
            await runtime.terminate("parent", "q"),
            await runtime.skip("child", "q1"),
            await runtime.migrate("child", "q1"),
        ]

    assert [each.disposition for each in outcomes] == ["ignored"] * 4
