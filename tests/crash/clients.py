"""The clients: publish each order's messages, one after the other, each to a worker chosen at random.

Each message is sent after the one before it was acknowledged, and mostly to another process: only the store can know
that it came later (I9). Those that race are sent at once. Whoever gets no answer, or is told to try again, tries
another worker under the same id.

The way to the door is not a good one: now and then a message is held up, comes twice at once, comes again right behind
itself, or comes once more when its order has long gone on.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from tests.crash.fleet import Fleet, Slot
from tests.crash.ledger import Ledger
from tests.crash.story import Order
from tests.crash.wire import Client

__all__ = ["Clients"]

_CLIENTS: Final = 64
_AT_ONCE: Final = 2
_ANSWER_SECONDS_MAX: Final = 10.0
_RESENT_AT_ONCE: Final = 0.05
_RESENT_LATER: Final = 0.05
_TWINS: Final = 0.03
_HELD_UP: Final = 0.05
_HELD_UP_SECONDS_MAX: Final = 0.1
_STRAYS: Final = 0.02
_STRAYS_SECONDS_MAX: Final = 3.0


class Clients:
    """Publishes `orders`, as far as they are let out; more may be added to them meanwhile."""

    def __init__(self, orders: Sequence[Order], *, fleet: Fleet, ledger: Ledger, rng: random.Random) -> None:
        self._orders = orders
        self._fleet = fleet
        self._ledger = ledger
        self._rngs = [random.Random(rng.random()) for _ in range(_CLIENTS)]
        self._tasks: list[asyncio.Task[None]] = []
        self._more = asyncio.Condition()
        self._next = 0
        self._is_closing = False
        self._acknowledged: list[tuple[Order, dict[str, Any]]] = []
        self._strays: set[asyncio.Task[None]] = set()
        self.let_out = 0
        self.done = 0

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._client(rng)) for rng in self._rngs]

    async def end(self) -> None:
        tasks = [*self._tasks, *self._strays]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def finish(self, seconds: float) -> None:
        """Lets everything out and returns when it is acknowledged; raises `TimeoutError` after `seconds`."""
        self._is_closing = True
        await self.let_out_up_to(len(self._orders))
        async with asyncio.timeout(seconds):
            await asyncio.gather(*self._tasks)
            await asyncio.gather(*self._strays)

    async def let_out_up_to(self, count: int) -> None:
        async with self._more:
            self.let_out = max(self.let_out, min(count, len(self._orders)))
            self._more.notify_all()

    @property
    def are_idle(self) -> bool:
        """Whether everything that was let out is acknowledged."""
        return self.done == self.let_out

    def raise_trouble(self) -> None:
        for task in (*self._tasks, *self._strays):
            if task.done():
                task.result()

    async def _client(self, rng: random.Random) -> None:
        # Of what is sent at once, each needs a connection of its own.
        lines = [[Client() for _ in self._fleet.slots] for _ in range(_AT_ONCE)]
        try:
            while (order := await self._take_order()) is not None:
                messages = order.messages()
                if order.course.races:
                    await self._bring(lines[0], rng, order, messages[0])
                    await asyncio.gather(
                        *(self._bring(line, rng, order, each) for line, each in zip(lines, messages[1:], strict=True))
                    )
                else:
                    for message in messages:
                        if rng.random() < _TWINS:
                            twins = enumerate(lines)
                            await asyncio.gather(
                                *(self._publish(line, rng, order, message, again=twin > 0) for twin, line in twins)
                            )
                        await self._bring(lines[0], rng, order, message)
                self.done += 1
        finally:
            for connection in (each for line in lines for each in line):
                connection.close()

    async def _bring(
        self, connections: list[Client], rng: random.Random, order: Order, message: dict[str, Any]
    ) -> None:
        """Sends one message until it is acknowledged, and perhaps more often than that."""
        if rng.random() < _HELD_UP:
            await asyncio.sleep(rng.uniform(0.0, _HELD_UP_SECONDS_MAX))
        await self._publish(connections, rng, order, message)
        if rng.random() < _RESENT_AT_ONCE:
            await self._publish(connections, rng, order, message, again=True)
        if self._acknowledged and rng.random() < _RESENT_LATER:
            await self._publish(connections, rng, *rng.choice(self._acknowledged), again=True)
        if rng.random() < _STRAYS:
            self._strays.add(asyncio.create_task(self._stray(random.Random(rng.random()), order, message)))
        self._acknowledged.append((order, message))

    async def _stray(self, rng: random.Random, order: Order, message: dict[str, Any]) -> None:
        """A copy that was on its way for long."""
        await asyncio.sleep(rng.uniform(0.0, _STRAYS_SECONDS_MAX))
        connections = [Client() for _ in self._fleet.slots]
        try:
            await self._publish(connections, rng, order, message, again=True)
        finally:
            for connection in connections:
                connection.close()

    async def _take_order(self) -> Order | None:
        async with self._more:
            await self._more.wait_for(lambda: self._next < self.let_out or self._is_closing)
            if self._next >= self.let_out:
                return None
            order = self._orders[self._next]
            self._next += 1
            return order

    async def _publish(
        self,
        connections: list[Client],
        rng: random.Random,
        order: Order,
        message: dict[str, Any],
        *,
        again: bool = False,
    ) -> None:
        """Sends one message, under the same id, until it is acknowledged."""
        self._ledger.duplicates_sent += again
        offered = self._ledger.offer(message["id"])
        body = msgspec.json.encode(message)
        tried: Slot | None = None
        while True:
            tried = await self._fleet.someone(rng, but=tried)
            try:
                async with asyncio.timeout(_ANSWER_SECONDS_MAX):
                    status, answer = await connections[tried.number].request(tried.port, "POST", "/publish", body)
            except (OSError, EOFError, TimeoutError):
                self._ledger.cut_answers += 1
                await asyncio.sleep(0.005)
                continue
            said = msgspec.json.decode(answer)
            if status == 202:
                self._ledger.acknowledge(
                    message["id"],
                    order.id,
                    offered=offered,
                    duplicate=said["duplicate"],
                    disposition=said["dispositions"][0],
                )
                return
            if status != 503:
                raise RuntimeError(f"message {message['id']} was refused for good: {said}")
            self._ledger.refused_retryably[said["code"]] += 1
            await asyncio.sleep(0.01)
