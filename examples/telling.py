"""How the examples beside this file are told: the same story on whatever store, once from beginning to end, or in as
many lives as it takes.

A story is what happens to some sagas: messages come in, services answer, time passes. `python -m examples.orders` tells
one on a file, and prints how it ended. The tests tell it again and stop the process at every commit, in the middle of
it, and with `kill -9`; whoever tells it next goes on where the last one was, and it ends the same way.

What outlives a process stands in the folder of the story:

    sagas.db         the store, unless it is a database
    outside.jsonl    what the services were asked for: they remember effect keys, so a repeat changes nothing
    now              what time it is; a story that takes a year does not wait for it
    told             how many steps have been told to their end; the next one is told again from its beginning, and its
                     messages have the ids that they had
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final, TypeAlias

from sagaloom import SagaDefinition, SignalDefinition
from sagaloom.durations import parse_duration
from sagaloom.ids import PARTITIONS
from sagaloom.messages import SagaMessage, as_message
from sagaloom.runtime import Outcome, RuntimeOptions, SagaRuntime, SignalReceipt, create_durable_saga_runtime
from sagaloom.targets import EffectRequest, callable_target
from sagaloom.testing import ManualClock, check_invariants
from sagaloom.testing.faults import Faults
from sagaloom.testing.invariants import every_instance

__all__ = ["Act", "Ending", "Story", "Teller", "play", "tell_as_script"]

_PATIENCE_SECONDS: Final = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Act:
    """The part of a story in which one version of the sagas runs."""

    sagas: Sequence[SagaDefinition[Any]]
    steps: Sequence[Step]


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """What happens, and what the services outside answer when they are asked for something the first time."""

    name: str
    acts: Sequence[Act]
    answer: Callable[[EffectRequest], object] = lambda request: None
    holds: Callable[[Ending], bool] = lambda ending: True
    """What must be true of how it ends."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a story ended: each instance with its status, state, result and reason; what the services were asked for,
    each thing once for every effect key; and what is wrong with the store, which is nothing."""

    instances: dict[str, dict[str, Any]]
    outside: list[str]
    breaches: list[str]


class World:
    """What outlives a process, in a folder."""

    def __init__(self, folder: Path, story: Story) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._story = story
        self._replies: dict[str, list[SagaMessage[Any]]] = {}
        self.asked: list[str] = []
        if (ledger := folder / "outside.jsonl").exists():
            # A line that was cut off in the middle was never acknowledged.
            for line in ledger.read_text().split("\n")[:-1]:
                self._remember(json.loads(line))

    @property
    def told(self) -> int:
        return int(_read(self.folder / "told", "0"))

    def has_told(self, steps: int) -> None:
        _write(self.folder / "told", str(steps))

    @property
    def now(self) -> datetime:
        return datetime.fromisoformat(_read(self.folder / "now", "2026-01-01T00:00:00+00:00"))

    def time_is(self, now: datetime) -> None:
        _write(self.folder / "now", now.isoformat())

    async def receive(self, request: EffectRequest) -> list[SagaMessage[Any]]:
        """What a service does that remembers effect keys: the work once, and the same answer every time."""
        key = request.effect_key
        if key not in self._replies:
            answered = self._story.answer(request)
            said = [] if answered is None else [as_message(answered)]
            entry = {
                "key": key,
                "asked": f"{request.kind}:{request.target_id} {json.dumps(request.payload, sort_keys=True)}",
                "replies": [{"type": one.type, "payload": one.payload} for one in said],
            }
            with (self.folder / "outside.jsonl").open("a") as ledger:
                ledger.write(json.dumps(entry, default=vars) + "\n")
            self._remember(json.loads(json.dumps(entry, default=vars)))
        return self._replies[key]

    def _remember(self, entry: dict[str, Any]) -> None:
        self.asked.append(entry["asked"])
        self._replies[entry["key"]] = [SagaMessage(one["type"], one["payload"]) for one in entry["replies"]]


@dataclass(slots=True)
class Teller:
    """Tells a step: publishes, lets time pass, and waits until nothing is left to do."""

    runtime: SagaRuntime
    world: World
    clock: ManualClock
    step: int
    _begun_at: datetime
    _passed: timedelta = timedelta(0)
    _said: int = 0

    async def publish(self, message: object, *, key: str | None = None) -> list[Outcome]:
        """Publishes, as a client does that says it again under the same id until it is acknowledged."""
        self._said += 1
        named = {"id": f"{self.step}-{self._said}", **({} if key is None else {"correlation_key": key})}
        answer = await self.runtime.publish(message, named)
        await self.settled()
        return list(answer.raise_for_rejected().outcomes)

    async def signal(
        self, saga_id: str, key: str, signal: SignalDefinition[Any], payload: object = None
    ) -> SignalReceipt:
        """Says something to an instance, likewise."""
        self._said += 1
        receipt = await self.runtime.signal(saga_id, key, signal, payload, id=f"{self.step}-{self._said}")
        await self.settled()
        return receipt

    async def update(self, saga_id: str, key: str, update: SignalDefinition[Any], payload: object = None) -> Any:
        """Says something to an instance and returns its answer, the same one however often it is said; raises
        `UpdateRefused`."""
        self._said += 1
        receipt = await self.runtime.update(saga_id, key, update, payload, id=f"{self.step}-{self._said}")
        await self.settled()
        return receipt.answer

    async def let_pass(self, time: str) -> None:
        """Moves the clock, and has everything happen that is due. A step that is told again does not wait twice."""
        self._passed += parse_duration(time)
        until = self._begun_at + self._passed
        if until > self.clock.now():
            self.world.time_is(until)
            self.clock.advance(until - self.clock.now())
        for _ in range(20):  # until the alarms have rung
            await asyncio.sleep(0)
        await self.settled()

    async def settled(self) -> None:
        """Returns when nothing is left that could be done now. Raises when the runtime has stopped before that."""
        await self.runtime.settled(_PATIENCE_SECONDS)
        if not (health := self.runtime.health()).ready:
            raise RuntimeError(f"the runtime has stopped in the middle of the story: {health.checks}")


Step: TypeAlias = Callable[[Teller], Awaitable[None]]


async def play(story: Story, folder: Path, *, url: str | None = None, faults: Faults | None = None) -> Ending:
    """Tells what is left of a story, and returns how it ends. When it is cut short (cancelled), the runtime is left as
    a killed process would leave it."""
    world, first = World(folder, story), 0
    for number, act in enumerate(story.acts):
        last = first + len(act.steps)
        is_final = number == len(story.acts) - 1
        if world.told < last or is_final:
            async with _runtime(story, act, world, url=url, faults=faults) as (runtime, clock):
                for step in range(max(first, world.told), last):
                    # Where the clock stands now is where a step begins that is told for the first time; one that is
                    # told again began where its first teller found it.
                    begun_at = _begin(world, step, clock.now())
                    teller = Teller(runtime, world, clock, step, begun_at)
                    await act.steps[step - first](teller)
                    await teller.settled()
                    world.has_told(step + 1)
                if is_final:
                    return await ending_of(runtime, world)
        first = last
    raise AssertionError("a story has at least one act")


async def ending_of(runtime: SagaRuntime, world: World) -> Ending:
    await runtime.stop()  # Time has passed, and the pruner would take events away while they are looked at.
    instances = {
        f"{one.saga_id}:{one.key}" + (f" run {one.run}" if one.run > 1 else ""): {
            "status": one.status,
            "state": json.loads(one.state),
            "result": None if one.result is None else json.loads(one.result),
            "reason": one.reason,
        }
        async for one in every_instance(runtime.store)
    }
    return Ending(dict(sorted(instances.items())), sorted(world.asked), await check_invariants(runtime.store))


def tell_as_script(story: Story) -> None:
    """Tells the story on a file in a temporary folder, or on the database `DATABASE_URL` names, and prints its end."""
    url = sys.argv[1] if len(sys.argv) > 1 else None
    with tempfile.TemporaryDirectory() as folder:
        ending = asyncio.run(play(story, Path(folder), url=url))
    for name, instance in ending.instances.items():
        said = instance["reason"] or instance["result"] or ""
        print(f"{name}: {instance['status']} {json.dumps(instance['state'])} {said if said else ''}".rstrip())
    for asked in ending.outside:
        print(f"asked {asked}")


@asynccontextmanager
async def _runtime(
    story: Story, act: Act, world: World, *, url: str | None, faults: Faults | None
) -> AsyncGenerator[tuple[SagaRuntime, ManualClock]]:
    clock = ManualClock(world.now)
    hook = faults if faults is not None else Faults()
    durable = await create_durable_saga_runtime(
        path=None if url else world.folder / "sagas.db",
        url=url,
        definitions=act.sagas,
        targets=[callable_target("service", world.receive)],
        clock=clock,
        options=RuntimeOptions(on_step=hook),
    )
    try:
        await durable.start()
        # What a process before us held comes to us when that is found dead. Until then there is nothing that we could
        # do, and so `settled` would return at once.
        async with asyncio.timeout(_PATIENCE_SECONDS):
            while not all(durable.runtime.holds(part) for part in range(PARTITIONS)):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        yield durable.runtime, clock
    except BaseException:
        hook.disarm()
        await durable.runtime.abandon()
        raise
    finally:
        hook.disarm()
        await durable.dispose()


def _begin(world: World, step: int, now: datetime) -> datetime:
    begun = world.folder / "begun"
    number, _, at = _read(begun, "-1 ").partition(" ")
    if int(number) == step:
        return datetime.fromisoformat(at)
    _write(begun, f"{step} {now.isoformat()}")
    return now


def _read(file: Path, default: str) -> str:
    return file.read_text() if file.exists() else default


def _write(file: Path, text: str) -> None:
    # Whole or not at all, wherever the process is killed.
    beside = file.with_suffix(".new")
    beside.write_text(text)
    beside.replace(file)
