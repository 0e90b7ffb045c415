"""The clients: publish each order's messages, one after the other, each to a worker chosen at random.

Each message is sent after the one before it was acknowledged, and mostly to another process: only the store can know
that it came later (I9). Whoever gets no answer, or is told to try again, tries another worker under the same id.
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
_ANSWER_SECONDS_MAX: Final = 10.0
_RESENT_AT_ONCE: Final = 0.05
_RESENT_LATER: Final = 0.05


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
        self.let_out = 0
        self.done = 0

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._client(rng)) for rng in self._rngs]

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def finish(self, seconds: float) -> None:
        """Lets everything out and returns when it is acknowledged; raises `TimeoutError` after `seconds`."""
        self._is_closing = True
        await self.let_out_up_to(len(self._orders))
        async with asyncio.timeout(seconds):
            await asyncio.gather(*self._tasks)

    async def let_out_up_to(self, count: int) -> None:
        async with self._more:
            self.let_out = max(self.let_out, min(count, len(self._orders)))
            self._more.notify_all()

    @property
    def are_idle(self) -> bool:
        """Whether everything that was let out is acknowledged."""
        return self.done == self.let_out

    def raise_trouble(self) -> None:
        for task in self._tasks:
            if task.done():
                task.result()

    async def _client(self, rng: random.Random) -> None:
        connections = [Client() for _ in self._fleet.slots]
        try:
            while (order := await self._take_order()) is not None:
                for message in order.messages():
                    await self._publish(connections, rng, order, message)
                    if rng.random() < _RESENT_AT_ONCE:
                        await self._publish(connections, rng, order, message, again=True)
                    if self._acknowledged and rng.random() < _RESENT_LATER:
                        await self._publish(connections, rng, *rng.choice(self._acknowledged), again=True)
                    self._acknowledged.append((order, message))
                self.done += 1
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
                    message["id"], order.id, duplicate=said["duplicate"], disposition=said["dispositions"][0]
                )
                return
            if status != 503:
                raise RuntimeError(f"message {message['id']} was refused for good: {said}")
            self._ledger.refused_retryably[said["code"]] += 1
            await asyncio.sleep(0.01)
