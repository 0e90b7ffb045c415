"""The listener: one loop that speaks to the broker, and a task for each message in flight.

The loop says to the broker what became of messages, and takes as many as there are free places, in one exchange; then
it starts a task for each. What ends while an exchange is under way is said in the next one. So acknowledgements travel
together under load and at once without it, and there is never more at hand than is being worked on: that is all the
back-pressure there is.

A place is taken from the moment at which a message was handed to us until the broker knows what became of it.

The loop ends when it is told to, and for nothing else. Where the broker does not answer, it keeps what it has to say,
and says it again; what was said twice is stale the second time, which changes nothing. Handlers go on meanwhile. A
second task renews the leases of whatever is in flight, three times as often as needed; a message whose lease is over
anyway is somebody else's, and its handler is cancelled.

    running ──stop()──▶ draining: takes nothing, waits for its handlers ──▶ ended
                           ├──grace over──▶ cancels them, gives back ─────────▶
                           └──all are done, and the broker is away for 2 s─────▶
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sagaloom.errors import BackendUnavailable, SagasError
from sagaloom.ports.queue import Delivery, Exchange, QueueBroker, Released, Settlement, Token
from sagaloom.queues.patience import within

__all__ = ["Listener"]

_log = logging.getLogger("sagaloom.queue")
_AGAIN_SECONDS_MAX: Final = 2.0
_END_SECONDS: Final = 5.0
_LOOK_SECONDS: Final = 5.0
"""How long we believe a broker that says nothing: a call for an arrival may get lost."""

Work = Callable[[Delivery, Callable[[Settlement], "asyncio.Future[bool]"]], Coroutine[Any, Any, Settlement | None]]
"""Works on a delivery. Says how to settle it, or None when the other argument was used for it."""


@dataclass(eq=False, slots=True)
class _Flight:
    delivery: Delivery
    task: asyncio.Task[None] | None = None
    is_lost: bool = False
    is_released: bool = False
    is_settled: bool = False
    """It is decided what to say of it."""
    is_said: bool = False
    """The broker knows."""
    is_over: bool = False
    """Its handler has come to an end."""


class Listener:
    """Takes messages from `broker` and has `work` done on each, at most `concurrency` at once; ends with `run`."""

    def __init__(
        self, broker: QueueBroker, work: Work, *, concurrency: int, lease_seconds: float, grace_seconds: float
    ) -> None:
        self._broker = broker
        self._work = work
        self._concurrency = concurrency
        self._lease_seconds = lease_seconds
        self._grace_seconds = grace_seconds
        self._flights: dict[Token, _Flight] = {}
        self._to_say: list[Settlement] = []
        self._said: dict[Token, asyncio.Future[bool]] = {}
        self._wake = asyncio.Event()
        self._may_be_more = True
        self._is_stopping = False
        self._grace_is_over = False
        self._quiet_since = 0.0
        """When the last handler ended, or we were told to stop, whatever came later."""
        self.problem: str | None = None
        """What keeps us from the broker, if anything does."""

    @property
    def in_flight(self) -> int:
        """How many messages are being worked on."""
        return len(self._flights)

    async def run(self) -> None:
        """Listens until `stop`, and then until nothing is in flight. Cancelled, it gives back what is in flight."""
        renewing = asyncio.create_task(self._renew(), name="sagaloom-queue-leases")
        try:
            await self._begin()
            await self._pump()
        except asyncio.CancelledError:
            await self._give_up()
            raise
        finally:
            renewing.cancel()
            for flight in self._flights.values():
                if flight.task is not None:
                    flight.task.cancel()
            for said in self._said.values():
                said.cancel()
            with contextlib.suppress(SagasError, OSError, TimeoutError):
                await within(_END_SECONDS, self._broker.end())

    def stop(self) -> None:
        """Takes no more messages; those in flight may end in their own time, and at the end of the grace they must."""
        if not self._is_stopping:
            self._is_stopping = True
            loop = asyncio.get_running_loop()
            self._quiet_since = loop.time()
            loop.call_later(self._grace_seconds, self._release_all)
            # A handler that does not let itself be cancelled either is left alone: its lease ends by itself.
            loop.call_later(self._grace_seconds + _AGAIN_SECONDS_MAX, self._end_grace)
            self._wake.set()

    # -- the broker's side ----------------------------------------------------------------------------------------

    async def _begin(self) -> None:
        wait_seconds = 0.1
        while not self._is_stopping:
            try:
                await self._broker.begin(self._arrived, prefetch=self._concurrency, lease_seconds=self._lease_seconds)
            except BackendUnavailable as error:
                wait_seconds = await self._wait_for_broker(error, wait_seconds)
            else:
                self._works_again()
                return

    async def _pump(self) -> None:
        wait_seconds = 0.1
        next_in_seconds: float | None = None
        while True:
            self._wake.clear()
            free = 0 if self._is_stopping else self._concurrency - len(self._flights)
            if not self._to_say and not (free and self._may_be_more):
                if self._is_stopping and (self._grace_is_over or not self._flights):
                    return
                if not await self._woken_within(_LOOK_SECONDS if next_in_seconds is None else next_in_seconds):
                    self._may_be_more = True
                continue
            saying, self._to_say = self._to_say, []
            self._may_be_more = False
            # A place of what is about to be said is free in the same exchange.
            free = 0 if self._is_stopping else free + sum(map(self._is_over, saying))
            try:
                exchange = await self._broker.exchange(saying, limit=free)
            except BackendUnavailable as error:
                self._to_say = saying + self._to_say
                self._may_be_more = True
                if self._grace_is_over or self._has_tried_enough():
                    return
                wait_seconds = await self._wait_for_broker(error, wait_seconds)
                continue
            except BaseException:
                self._to_say = saying + self._to_say
                raise
            wait_seconds = 0.1
            self._works_again()
            next_in_seconds = exchange.next_in_seconds
            if len(exchange.deliveries) >= free:
                self._may_be_more = True
            self._take_in(saying, exchange)

    def _take_in(self, said: Sequence[Settlement], exchange: Exchange) -> None:
        stale = frozenset(exchange.stale)
        for settlement in said:
            token = settlement.token
            flight = self._flights.get(token)
            if flight is not None:
                flight.is_said = True
                if flight.is_over:
                    del self._flights[token]
            answer = self._said.pop(token, None)
            if answer is not None and not answer.done():
                answer.set_result(token not in stale)
        if stale:
            _log.warning(
                "%s: %d settlements came too late: somebody else has the messages, or they were told twice",
                *(self._broker.name, len(stale)),
            )
        for delivery in exchange.deliveries:
            flight = _Flight(delivery)
            self._flights[delivery.token] = flight
            flight.task = asyncio.create_task(self._fly(flight))

    def _is_over(self, settlement: Settlement) -> bool:
        flight = self._flights.get(settlement.token)
        return flight is not None and flight.is_over

    def _has_tried_enough(self) -> bool:
        """Whether all that is left is to say something to a broker that does not answer. What it is not told it hands
        out again, as it does when a consumer died."""
        waited_seconds = asyncio.get_running_loop().time() - self._quiet_since
        return (
            self._is_stopping
            and waited_seconds >= _AGAIN_SECONDS_MAX
            and all(flight.is_over for flight in self._flights.values())
        )

    async def _wait_for_broker(self, error: BackendUnavailable, wait_seconds: float) -> float:
        if self.problem is None:
            _log.warning("%s does not answer, the listener waits for it: %s", self._broker.name, error.message)
        self.problem = error.message
        await asyncio.sleep(wait_seconds)
        return min(wait_seconds * 2, _AGAIN_SECONDS_MAX)

    def _works_again(self) -> None:
        if self.problem is not None:
            _log.info("%s answers again", self._broker.name)
            self.problem = None

    async def _woken_within(self, seconds: float) -> bool:
        handle = asyncio.get_running_loop().call_later(max(seconds, 0.0), self._wake.set)
        before = asyncio.get_running_loop().time()
        try:
            await self._wake.wait()
        finally:
            handle.cancel()
        return asyncio.get_running_loop().time() - before < seconds

    def _arrived(self) -> None:
        self._may_be_more = True
        self._wake.set()

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._lease_seconds / 3)
            tokens = [token for token, flight in self._flights.items() if not flight.is_settled]
            if not tokens:
                continue
            try:
                lost = await self._broker.renew(tokens)
            except SagasError as error:
                _log.warning("%s: leases could not be renewed: %s", self._broker.name, error.message)
                continue
            for token in lost:
                self._lose(token)

    # -- the handlers' side ---------------------------------------------------------------------------------------

    async def _fly(self, flight: _Flight) -> None:
        token = flight.delivery.token
        settlement: Settlement | None = None
        try:
            settlement = await self._work(flight.delivery, self._settle)
        except asyncio.CancelledError:
            if flight.is_released:
                settlement = Released(token)
            elif not flight.is_lost:
                raise
        flight.is_over = True
        self._quiet_since = asyncio.get_running_loop().time()
        if flight.is_lost or flight.is_said:
            self._flights.pop(token, None)
        elif settlement is not None and not flight.is_settled:
            flight.is_settled = True
            self._to_say.append(settlement)
        self._wake.set()

    def _settle(self, settlement: Settlement) -> asyncio.Future[bool]:
        """Settles while the handler goes on; True when the broker has believed it."""
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        flight = self._flights.get(settlement.token)
        if flight is None or flight.is_settled:
            answer.set_result(False)
            return answer
        flight.is_settled = True
        self._said[settlement.token] = answer
        self._to_say.append(settlement)
        self._wake.set()
        return answer

    def _lose(self, token: Token) -> None:
        flight = self._flights.get(token)
        if flight is None or flight.is_settled or flight.task is None:
            return
        message = flight.delivery.message
        _log.warning("%s: the lease of message %s is over, its handler is cancelled", self._broker.name, message.id)
        flight.is_lost = True
        flight.task.cancel()

    def _release_all(self) -> None:
        for flight in list(self._flights.values()):
            if not flight.is_settled and flight.task is not None:
                flight.is_released = True
                flight.task.cancel()

    def _end_grace(self) -> None:
        self._grace_is_over = True
        self._wake.set()

    async def _give_up(self) -> None:
        """Gives back what is in flight, as far as the broker answers."""
        self._is_stopping = True
        self._release_all()
        tasks = [flight.task for flight in self._flights.values() if flight.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=_AGAIN_SECONDS_MAX)
        if self._to_say:
            saying, self._to_say = self._to_say, []
            with contextlib.suppress(SagasError, OSError, TimeoutError):
                await within(_AGAIN_SECONDS_MAX, self._broker.exchange(saying, limit=0))
