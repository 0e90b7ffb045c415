"""The foyer: messages that somebody's own transaction has left in the store, until they are taken in.

A transaction of the host writes them beside its own data, so they are there when it has committed, and never else. Each
is taken in by the process that holds its partition, as if it had just come through a door: deduplicated, ordered,
committed. Only then it is taken out of the foyer, so a process that ends in between leaves it for the next one, which
finds that it was seen before.

Nothing is locked while such a transaction is open, so it holds nobody up; the price is that the place of its messages
in the order of acceptance is that in which they are found, a moment after its commit.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from sagaloom.errors import SagasError
from sagaloom.ports.store import JoinsTransactions, SagaStore
from sagaloom.runtime.deliveries import Delivery

__all__ = ["Foyer"]

_log = logging.getLogger("sagaloom.foyer")
_AT_ONCE: Final = 1_000
_PAUSE_SECONDS: Final = 0.5
_REST_SECONDS: Final = 0.05
"""How long it takes no notice after a look: others wake it with every commit, nearly always for something else."""


class Foyer:
    """Takes in what was left for us."""

    def __init__(
        self, store: SagaStore, *, parts: Callable[[], frozenset[int]], offer: Callable[[Delivery], None]
    ) -> None:
        self._store = store if isinstance(store, JoinsTransactions) else None
        self._parts = parts
        self._offer = offer
        self._is_due = asyncio.Event()
        self._is_due.set()

    def wake(self) -> None:
        """Looks as soon as possible."""
        self._is_due.set()

    async def run(self) -> None:
        """Takes in whatever there is when woken, until cancelled."""
        while self._store is not None:
            await self._is_due.wait()
            self._is_due.clear()
            try:
                while await self._take_in(self._store):
                    pass
                await asyncio.sleep(_REST_SECONDS)
            except SagasError as error:
                _log.debug("what was left cannot be taken in: %s", error.message)
                await asyncio.sleep(_PAUSE_SECONDS)
                self._is_due.set()

    async def _take_in(self, store: JoinsTransactions) -> bool:
        """Takes in some, and says whether there may be more."""
        rows = await store.left(self._parts(), limit=_AT_ONCE)
        loop = asyncio.get_running_loop()
        waiting = [
            (number, Delivery(envelope, (envelope.saga_id, envelope.key), enters=True, answered=loop.create_future()))
            for number, envelope in rows
        ]
        for _, delivery in waiting:
            self._offer(delivery)
        done: list[int] = []
        trouble: SagasError | None = None
        for number, delivery in waiting:
            assert delivery.answered is not None
            try:
                await delivery.answered
                done.append(number)
            except SagasError as error:
                if error.retryable:
                    trouble = error
                else:
                    _log.warning("message %s is refused, and forgotten: %s", delivery.envelope.id, error.message)
                    done.append(number)
        if done:
            await store.take_left(done)
        if trouble is not None:
            raise trouble
        return len(rows) == _AT_ONCE
