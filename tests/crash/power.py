"""The power-loss run: the same story in one process, on a disk that forgets what was not synced.

Each round opens the store on a `PowerLossVfs`, publishes, and loses the power: at a step of the store or of the walk,
in the middle of a sync, or at a random moment. What was written and not synced is gone, or kept here and there, as a
real disk may keep it. The runtime is abandoned on the spot. Then the file is opened on the plain disk: every
acknowledged message must still be there, and every invariant hold. The receiver is on another machine, so to speak: it
keeps what it got.

What we dislike about it: a loss between two steps hits only where the event loop can be interrupted, between awaits;
the steps inside a commit and the syncs are there because commits are not.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import apsw

from sagaloom.errors import BackendUnavailable, SagasError
from sagaloom.kv.presence import FilePresence
from sagaloom.kv.sqlite import SqliteKeyValue
from sagaloom.messages import SagaMessage
from sagaloom.ports.store import SagaStore
from sagaloom.runtime.options import RuntimeOptions, no_step
from sagaloom.runtime.receipts import PublishRejected
from sagaloom.runtime.runtime import SagaRuntime
from sagaloom.stores.kv import KvSagaStore
from sagaloom.targets.callables import EffectRequest, callable_target
from sagaloom.testing.disk import PowerLossVfs
from sagaloom.testing.faults import KV_STEPS, WALK_STEPS, Cut
from sagaloom.testing.invariants import check_invariants
from tests.crash.ledger import Ledger
from tests.crash.receiver import Arrivals, answers_to
from tests.crash.story import Order, definitions
from tests.crash.verdict import Verdict, find_forgotten, judge
from tests.crash.worker import effect_retry, what_waits

__all__ = ["AT_RANDOM", "AT_SYNC", "PowerReport", "PowerRun", "plan_power_losses"]

AT_SYNC: Final = "in a sync"
AT_RANDOM: Final = "at random"
_LOSSES_MAX: Final = 30
_CLIENTS: Final = 32
_PLANNED_AGAIN_MAX: Final = 5
_ROUND_SECONDS_MAX: Final = 10.0
_SETTLE_SECONDS_MAX: Final = 30.0


Story = tuple[Order, list[dict[str, Any]]]
"""An order, and those of its messages that are not acknowledged yet."""


def plan_power_losses(count: int, rng: random.Random) -> list[tuple[str, int]]:
    """(where, nth) of each loss: every step once, a few syncs and random moments; more up to `count`, at most 30."""
    places = [*KV_STEPS, *WALK_STEPS, AT_SYNC, AT_SYNC, AT_RANDOM, AT_RANDOM]
    while len(places) < min(count, _LOSSES_MAX):
        places.append(rng.choice((*KV_STEPS, AT_SYNC, AT_SYNC, AT_RANDOM)))
    rng.shuffle(places)
    return [(place, rng.randint(1, 2 if place in ("accepted", "compensated", "timer_due") else 12)) for place in places]


@dataclass
class PowerReport:
    """What happened, for the table and the closing lines."""

    verdict: Verdict = field(default_factory=Verdict)
    losses: Counter[str] = field(default_factory=Counter)
    messages: int = 0
    seconds: float = 0.0
    unanswered: int = 0


class _Disk(PowerLossVfs):
    """Loses its power inside the nth sync, before anything of it is on the disk, when told to."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.fails_at_sync = 0
        self.lost = asyncio.Event()
        # Half of the losses keep nothing that was not synced, the others any of it, each write by itself.
        self._kept = rng.choice((0.0, 0.5))
        self._rng = rng

    def cut(self) -> None:
        if not self.lost.is_set():
            self.lose_power(survives=lambda: self._rng.random() < self._kept)
            self.lost.set()

    def count_sync(self) -> None:
        super().count_sync()
        if self.syncs == self.fails_at_sync:
            self.cut()
            raise apsw.IOError("the power went away in a sync")


class PowerRun:
    """One run on one store file in `directory`."""

    def __init__(
        self,
        directory: Path,
        *,
        orders: Sequence[Order],
        losses: Sequence[tuple[str, int]],
        rng: random.Random,
        tell: Callable[[str], None],
    ) -> None:
        self._path = directory / "power.db"
        self._orders = list(orders)
        self._losses = list(losses)
        self._rng = rng
        self._tell = tell
        self._ledger = Ledger()
        self._arrivals = Arrivals()
        self._report = PowerReport()

    async def run(self) -> PowerReport:
        """Loses the power as planned, finishes the story on a disk that works, and judges."""
        began = time.monotonic()
        report = self._report
        losses = [*self._losses]
        # Some orders stay for losses that have to be planned again, and for the end.
        portion = len(self._orders) / (len(losses) + _PLANNED_AGAIN_MAX)
        todo = [*self._orders]
        half_done: list[Story] = []
        for number, (place, nth) in enumerate(losses, start=1):
            taken = int(portion * number) - int(portion * (number - 1))
            stories = half_done + [(order, order.messages()) for order in todo[:taken]]
            todo = todo[taken:]
            half_done, lost = await self._round(place, nth, stories)
            report.losses[place if lost else AT_RANDOM] += 1
            if not lost and len(losses) < len(self._losses) + _PLANNED_AGAIN_MAX:
                losses.append((place, 1))  # the load was not enough for the nth time; the first time will come
            await self._look_after(number)
            if number % 10 == 0 or number == len(losses):
                self._tell(
                    f"  power lost {number}/{len(losses)} times, {len(self._ledger.acknowledged)} messages "
                    f"acknowledged, {time.monotonic() - began:.1f} s"
                )
        await self._finish(half_done + [(order, order.messages()) for order in todo])
        report.messages = 3 * len(self._orders)
        report.seconds = time.monotonic() - began
        return report

    # ------------------------------------------------------------------ one loss

    async def _round(self, place: str, nth: int, stories: list[Story]) -> tuple[list[Story], bool]:
        """Publishes until the power is gone. Returns what is not acknowledged, and whether it went where planned."""
        disk = _Disk(self._rng)
        seen = itertools.count(1)

        def on_step(step: str) -> None:
            if disk.lost.is_set() or (step == place and next(seen) == nth):
                disk.cut()
                raise Cut(step)

        kv = await SqliteKeyValue.open(self._path, vfs=disk.name, exclusive=True, on_step=on_step)
        store = KvSagaStore(kv, presence=FilePresence(self._path))
        runtime = self._runtime(store, on_step)
        planned = True
        publishing: asyncio.Task[None] | None = None
        try:
            if place == AT_SYNC:
                disk.fails_at_sync = disk.syncs + nth
            await runtime.start()
            publishing = asyncio.create_task(self._publish_all(runtime, stories))
            if place == AT_RANDOM:
                await asyncio.sleep(self._rng.uniform(0.0, 0.05))
            else:
                planned = await self._lost_or_idle(disk, publishing)
        except (Cut, SagasError):
            if not disk.lost.is_set():
                raise
        finally:
            disk.cut()
            if publishing is not None:
                publishing.cancel()
                await asyncio.gather(publishing, return_exceptions=True)
            # A process without power says goodbye to nobody; here it has to be taken apart.
            with contextlib.suppress(SagasError, Cut):
                await runtime.abandon()
            with contextlib.suppress(SagasError, apsw.Error):
                await store.close()
            disk.unregister()
        return [story for story in stories if story[1]], planned

    async def _lost_or_idle(self, disk: _Disk, publishing: asyncio.Task[None]) -> bool:
        """Whether the power went by itself, before everything was published and settled."""
        lost = asyncio.create_task(disk.lost.wait())
        try:
            await asyncio.wait([lost, publishing], timeout=_ROUND_SECONDS_MAX, return_when=asyncio.FIRST_COMPLETED)
            if not lost.done():
                # Effects, replies and timers go on for a while after the last message.
                await asyncio.wait([lost], timeout=0.6)
            return lost.done()
        finally:
            lost.cancel()

    def _runtime(self, store: SagaStore, on_step: Callable[[str], None] = no_step) -> SagaRuntime:
        options = RuntimeOptions(effect_retry=effect_retry(), drain_seconds=5.0, on_step=on_step)
        return SagaRuntime(
            store, definitions=definitions(), targets=[callable_target("service", self._receive)], options=options
        )

    async def _receive(self, request: EffectRequest) -> list[dict[str, Any]]:
        manners = self._arrivals.manners(request.effect_key)
        self._arrivals.note(request.effect_key, request.payload, takes=manners.status == 200)
        if manners.delay_seconds:
            await asyncio.sleep(manners.delay_seconds)
        if manners.cuts or manners.status != 200:
            raise ConnectionError("no answer")
        return answers_to(request.payload)

    # ------------------------------------------------------------------ publishing

    async def _publish_all(self, runtime: SagaRuntime, stories: list[Story]) -> None:
        """Publishes what is left of each order, taking away what is acknowledged."""
        waiting = iter(stories)

        async def client() -> None:
            for order, messages in waiting:
                while messages:
                    if not await self._publish(runtime, order, messages[0]):
                        self._report.unanswered += 1
                        return
                    acknowledged = messages.pop(0)
                    if self._rng.random() < 0.1:
                        await self._publish(runtime, order, acknowledged)

        await asyncio.gather(*(client() for _ in range(_CLIENTS)))

    async def _publish(self, runtime: SagaRuntime, order: Order, message: dict[str, Any]) -> bool:
        offered = self._ledger.offer(message["id"])
        answer = await runtime.publish(SagaMessage(message["type"], message["payload"], id=message["id"]))
        if isinstance(answer, PublishRejected):
            if not answer.retryable:
                self._ledger.odd(f"I10 message {message['id']} was refused for good: {answer.code} {answer.reason}")
            return False
        self._ledger.acknowledge(
            message["id"],
            order.id,
            offered=offered,
            duplicate=answer.duplicate,
            disposition=answer.outcomes[0].disposition,
        )
        return True

    # ------------------------------------------------------------------ looking

    async def _look_after(self, number: int) -> None:
        """Opens the file on the plain disk: what was acknowledged is there, and the invariants hold."""
        store = KvSagaStore(await SqliteKeyValue.open(self._path))
        try:
            breaches = await check_invariants(store)
            self._report.verdict.breaches += [f"{breach} (after loss {number})" for breach in breaches]
            forgotten = await find_forgotten(store, self._ledger)
            self._report.verdict.lost += [f"{message}, after loss {number}" for message in forgotten]
        finally:
            await store.close()

    async def _finish(self, stories: list[Story]) -> None:
        store = KvSagaStore(await SqliteKeyValue.open(self._path), presence=FilePresence(self._path))
        runtime = self._runtime(store)
        try:
            await runtime.start()
            await self._publish_all(runtime, stories)
            deadline = time.monotonic() + _SETTLE_SECONDS_MAX
            while await what_waits(store) and time.monotonic() < deadline:  # noqa: ASYNC110 - nobody would set an event
                await asyncio.sleep(0.02)
            await runtime.stop()
            lease = await store.acquire("judge", now=datetime.now(UTC))
            verdict = await judge(
                store, orders=self._orders, ledger=self._ledger, arrivals=self._arrivals.by_key.values()
            )
            await store.release(lease)
        except BackendUnavailable as error:
            verdict = Verdict(stuck=[f"the store did not come back: {error.message}"])
        finally:
            await runtime.stop()
            await store.close()
        earlier = self._report.verdict
        verdict.lost = [*earlier.lost, *verdict.lost]
        verdict.breaches = [*earlier.breaches, *verdict.breaches]
        self._report.verdict = verdict
