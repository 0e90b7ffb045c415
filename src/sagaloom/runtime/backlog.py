"""What waits for the receiver, in memory: an index over the inbox that knows whose turn it is.

    queue   deliveries in the order of acceptance; what `take` gives out
    held    keys whose starter failed: nothing behind it can be applied before it, so the rest of the key waits here
    aside   messages whose attempt failed and that hold nobody up; they come back when they are due, and are offered
            in between whenever their instance has moved

The order within a key is the order of acceptance (I9); only a message that stands aside is overtaken.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from datetime import datetime

from sagaloom.runtime.deliveries import Delivery, InstanceKey

__all__ = ["Backlog"]


class Backlog:
    """The waiting deliveries of one receiver."""

    def __init__(self) -> None:
        self._queue: deque[Delivery] = deque()
        self._starters: dict[InstanceKey, Delivery] = {}
        self._behind: dict[InstanceKey, list[Delivery]] = {}
        self._aside: dict[InstanceKey, list[Delivery]] = {}
        self._due: list[tuple[datetime, int, Delivery]] = []
        self._count = itertools.count()
        self._lined_up = 0

    def __len__(self) -> int:
        """How many could be taken now."""
        return len(self._queue)

    @property
    def waiting(self) -> int:
        """How many wait in all, for their turn, a starter or their next attempt."""
        return len(self._queue) + len(self._due) + self._lined_up

    def add(self, delivery: Delivery) -> None:
        self._queue.append(delivery)

    def put_back(self, deliveries: Sequence[Delivery]) -> None:
        """Gives deliveries the first places of the queue, in their order."""
        self._queue.extendleft(reversed(deliveries))

    def take(self, most: int) -> list[Delivery]:
        queue = self._queue
        if len(queue) <= most:
            taken = list(queue)
            queue.clear()
            return taken
        return [queue.popleft() for _ in range(most)]

    def oldest(self) -> Delivery | None:
        return self._queue[0] if self._queue else None

    def is_held(self, delivery: Delivery) -> bool:
        """Whether a failing starter of its key stands before this delivery."""
        starter = self._starters.get(delivery.key)
        return starter is not None and starter is not delivery and not delivery.envelope.opens_run

    def hold(self, starter: Delivery) -> None:
        """Keeps the key of a failed starter until `release`; the starter itself comes back when it is due."""
        self._starters[starter.key] = starter
        self._await_due(starter)

    def wait_behind(self, delivery: Delivery) -> None:
        """Lines a delivery up behind the starter that holds its key."""
        delivery.is_lined_up = True
        self._behind.setdefault(delivery.key, []).append(delivery)
        self._lined_up += 1

    def put_aside(self, delivery: Delivery) -> None:
        """Lets others go on until the delivery is due, or its instance has moved."""
        delivery.is_offer = False
        self._aside.setdefault(delivery.key, []).append(delivery)
        self._await_due(delivery)

    def moved(self, key: InstanceKey, by: Delivery) -> None:
        """An instance has changed: whoever waited for that gets a turn before anyone younger."""
        if not self._starters and not self._aside:
            return
        first = self._aside.pop(key, [])
        for delivery in first:
            delivery.is_aside = False
            delivery.is_offer = True
        self.put_back(first + self._let_go(key, by))

    def gave_up(self, key: InstanceKey, by: Delivery) -> None:
        """A message will not move its instance any more: if it was a starter that held its key, the next ones try."""
        if self._starters:
            self.put_back(self._let_go(key, by))

    def _let_go(self, key: InstanceKey, by: Delivery) -> list[Delivery]:
        if self._starters.get(key) is not by:
            return []
        del self._starters[key]
        behind = self._behind.pop(key, [])
        for delivery in behind:
            delivery.is_lined_up = False
        self._lined_up -= len(behind)
        return behind

    def bring_back(self, now: datetime) -> datetime | None:
        """Queues what is due at `now`; returns when the next one will be."""
        while self._due and self._due[0][0] <= now:
            due_at, _, delivery = heapq.heappop(self._due)
            if not delivery.is_aside or delivery.envelope.due_at != due_at:
                continue  # It had its turn in between.
            delivery.is_aside = False
            standing = self._aside.get(delivery.key)
            if standing is not None and delivery in standing:
                standing.remove(delivery)
                if not standing:
                    del self._aside[delivery.key]
            self._queue.append(delivery)
        return self._due[0][0] if self._due else None

    def clear(self) -> list[Delivery]:
        """Empties everything and returns what was there."""
        everything = list(self._everything())
        self.__init__()  # type: ignore[misc]  # back to the beginning
        return everything

    def _everything(self) -> Iterator[Delivery]:
        yield from self._queue
        yield from self._starters.values()
        for lined_up in (*self._behind.values(), *self._aside.values()):
            yield from lined_up

    def _await_due(self, delivery: Delivery) -> None:
        assert delivery.envelope.due_at is not None
        delivery.is_aside = True
        heapq.heappush(self._due, (delivery.envelope.due_at, next(self._count), delivery))
