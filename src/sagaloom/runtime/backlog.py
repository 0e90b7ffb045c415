"""What waits for the receiver, in memory: an index over the inbox that knows whose turn it is.

    rows    deliveries that the store has, in the order of acceptance; what `take` gives out first. Timers and answers
            to effects stand among them as they come: they have no place in that order yet
    doors   deliveries that nobody has acknowledged yet; they get their turn when every row has had its own
    held    keys whose starter failed: nothing behind it can be applied before it, so the rest of the key waits here;
            so do messages to a paused run, until it goes on
    aside   messages whose attempt failed and that hold nobody up; they come back when they are due, and are offered
            in between whenever their instance has moved; and messages that were *deferred* until it moves, which most
            of them wait for without end

The order within a key is the order of acceptance (I9); only a message that stands aside is overtaken, and when it comes
back because its instance has moved, it comes before everything younger. Rows go before
doors because some of them were accepted by other processes, and are found later than they came.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from datetime import datetime
from math import inf

from sagaloom.runtime.deliveries import Delivery, InstanceKey

__all__ = ["Backlog"]


class Backlog:
    """The waiting deliveries of one receiver. `on_due` is told when one that stands aside wants to be brought back."""

    def __init__(self, on_due: Callable[[datetime], None]) -> None:
        self._on_due = on_due
        self._rows: deque[Delivery] = deque()
        self._doors: deque[Delivery] = deque()
        self._starters: dict[InstanceKey, Delivery] = {}
        self._behind: dict[InstanceKey, list[Delivery]] = {}
        self._aside: dict[InstanceKey, list[Delivery]] = {}
        self._due: list[tuple[datetime, int, Delivery]] = []
        self._count = itertools.count()
        self._lined_up = 0
        self._standing = 0
        self._deferred = 0

    def __len__(self) -> int:
        """How many could be taken now."""
        return len(self._rows) + len(self._doors)

    def waiting(self) -> int:
        """How many wait in all, for their turn, a starter or their next attempt."""
        return len(self._rows) + len(self._doors) + self._standing + self._lined_up

    def weight(self) -> int:
        """The bytes of all payloads that wait. Looks at each of them."""
        return sum(len(each.envelope.payload) for each in self._everything())

    def add(self, delivery: Delivery) -> None:
        (self._doors if delivery.enters else self._rows).append(delivery)

    def add_in_order(self, deliveries: Sequence[Delivery]) -> None:
        """Queues rows, each before those of its instance that were accepted after it and are queued already, and before
        its timers and answers."""
        oldest: dict[InstanceKey, float] = {}
        for delivery in deliveries:
            oldest.setdefault(delivery.key, _number(delivery))
        younger = [each for each in self._rows if each.key in oldest and _number(each) > oldest[each.key]]
        if younger:
            moved = set(map(id, younger))
            self._rows = deque(each for each in self._rows if id(each) not in moved)
            deliveries = sorted([*deliveries, *younger], key=_number)
        self._rows.extend(deliveries)

    def put_back(self, deliveries: Sequence[Delivery]) -> None:
        """Gives deliveries the first places of their queue, in their order."""
        for delivery in reversed(deliveries):
            (self._doors if delivery.enters else self._rows).appendleft(delivery)

    def take(self, most: int) -> list[Delivery]:
        """The next deliveries, `most` at the most; none from the doors while a row is left."""
        taken = _taken(self._rows, most)
        if len(taken) < most and self._doors:
            if not taken:
                return _taken(self._doors, most)
            taken += _taken(self._doors, most - len(taken))
        return taken

    def drop(self, parts: Collection[int]) -> list[Delivery]:
        """Forgets what waits in `parts`, which somebody else holds now, and returns it; doors stay."""
        dropped = [each for each in self._everything() if not each.enters and each.part in parts]
        if not dropped:
            return dropped
        gone = set(map(id, dropped))
        self._rows = deque(each for each in self._rows if id(each) not in gone)
        for delivery in dropped:
            self._lined_up -= delivery.is_lined_up
            self._comes_back(delivery)
            delivery.is_lined_up = False
        self._starters = {key: each for key, each in self._starters.items() if id(each) not in gone}
        for standing in (self._behind, self._aside):
            for key in list(standing):
                left = [each for each in standing[key] if id(each) not in gone]
                if left:
                    standing[key] = left
                else:
                    del standing[key]
        return dropped

    def oldest(self) -> Delivery | None:
        queue = self._rows or self._doors
        return queue[0] if queue else None

    @property
    def holds_some(self) -> bool:
        """Whether any key is held at all; if not, none need be asked for."""
        return bool(self._starters)

    def is_held(self, delivery: Delivery) -> bool:
        """Whether a failing starter of its key stands before this delivery."""
        starter = self._starters.get(delivery.key)
        return starter is not None and starter is not delivery and not delivery.passes

    def hold(self, starter: Delivery) -> None:
        """Keeps the key of a failed starter until that has moved its instance, or is given up. The starter itself comes
        back when it is due."""
        self._starters[starter.key] = starter
        self._deferred += starter.is_deferred
        self._await_due(starter)

    def behind(self, key: InstanceKey) -> Sequence[Delivery]:
        """What is lined up behind the one that holds this key."""
        return self._behind.get(key, ())

    def hasten(self, delivery: Delivery, now: datetime) -> None:
        """Has a delivery that stands aside come back now."""
        delivery.until = now
        heapq.heappush(self._due, (now, next(self._count), delivery))
        self._on_due(now)

    def wait_behind(self, delivery: Delivery) -> None:
        """Lines a delivery up behind the starter that holds its key, or the pause of its run."""
        delivery.is_lined_up = True
        lined_up = self._behind.setdefault(delivery.key, [])
        row, last = delivery.row, lined_up[-1].row if lined_up else None
        if row is None or (last is not None and last < row):
            lined_up.append(delivery)
        else:
            # Others may have brought it, and we learnt of it late. Timers stay where they are.
            rows = enumerate(each.row for each in lined_up)
            lined_up.insert(next((place for place, each in rows if each and each > row), len(lined_up)), delivery)
        self._lined_up += 1

    def put_aside(self, delivery: Delivery) -> None:
        """Lets others go on until the delivery is due, or its instance has moved."""
        delivery.is_offer = False
        self._deferred += delivery.is_deferred
        self._aside.setdefault(delivery.key, []).append(delivery)
        self._await_due(delivery)

    def defer(self, delivery: Delivery, until: datetime | None) -> None:
        """Lets it stand aside until its instance has moved, at most until then."""
        delivery.is_deferred, delivery.until = True, until
        self.put_aside(delivery)

    def moved(self, key: InstanceKey, by: Delivery) -> None:
        """An instance has changed: whoever waited for that gets a turn before anyone younger."""
        if not self._starters and not self._aside:
            return
        first = self._aside.pop(key, [])
        if len(first) > 1:
            first.sort(key=_number)
        for delivery in first:
            # What is tried between two attempts costs none; what was deferred has not been tried at all.
            delivery.is_offer = not delivery.is_deferred
            self._comes_back(delivery)
        self.put_back(first + self._let_go(key, by))

    @property
    def defers_some(self) -> bool:
        """Whether any message is deferred at all; if not, none need be asked for."""
        return self._deferred > 0

    def has_deferred(self, key: InstanceKey) -> bool:
        """Whether a message waits for this instance to move."""
        return any(each.is_deferred for each in self._aside.get(key, ()))

    def _comes_back(self, delivery: Delivery) -> None:
        self._standing -= delivery.is_aside
        self._deferred -= delivery.is_aside and delivery.is_deferred
        delivery.is_aside = delivery.is_deferred = False

    def gave_up(self, key: InstanceKey, by: Delivery) -> None:
        """A message will not move its instance any more: if it was a starter that held its key, the next ones try."""
        if self._starters:
            self.put_back(self._let_go(key, by))

    def _let_go(self, key: InstanceKey, by: Delivery) -> list[Delivery]:
        if self._starters.get(key) is not by:
            return []
        del self._starters[key]
        return self._fall_out(key)

    def release(self, keys: Iterable[InstanceKey]) -> list[Delivery]:
        """Takes out what is lined up for keys that no starter holds, in order. Those that still have to wait line up
        again when it is their turn, so asking them once too often does no harm."""
        if not self._behind:
            return []
        free = [key for key in dict.fromkeys(keys) if key not in self._starters]
        return [delivery for key in free for delivery in self._fall_out(key)]

    def keys_behind(self, saga_ids: Collection[str]) -> list[InstanceKey]:
        """The keys of these sagas that something is lined up for."""
        return [key for key in self._behind if key[0] in saga_ids]

    def _fall_out(self, key: InstanceKey) -> list[Delivery]:
        behind = self._behind.pop(key, [])
        for delivery in behind:
            delivery.is_lined_up = False
        self._lined_up -= len(behind)
        return behind

    def bring_back(self, now: datetime) -> datetime | None:
        """Queues what is due at `now`; returns when the next one will be."""
        while self._due and self._due[0][0] <= now:
            due_at, _, delivery = heapq.heappop(self._due)
            if not delivery.is_aside or delivery.wakes_at != due_at:
                continue  # It had its turn in between.
            self._comes_back(delivery)
            standing = self._aside.get(delivery.key)
            if standing is not None and delivery in standing:
                standing.remove(delivery)
                if not standing:
                    del self._aside[delivery.key]
            self._rows.append(delivery)
        return self._due[0][0] if self._due else None

    def clear(self) -> list[Delivery]:
        """Empties everything and returns what was there."""
        everything = list(self._everything())
        self.__init__(self._on_due)  # type: ignore[misc]  # back to the beginning
        return everything

    def _everything(self) -> Iterator[Delivery]:
        yield from self._rows
        yield from self._doors
        yield from self._starters.values()
        for lined_up in (*self._behind.values(), *self._aside.values()):
            yield from lined_up

    def _await_due(self, delivery: Delivery) -> None:
        self._standing += not delivery.is_aside
        delivery.is_aside = True
        wakes_at = delivery.wakes_at
        if wakes_at is not None:
            heapq.heappush(self._due, (wakes_at, next(self._count), delivery))
            self._on_due(wakes_at)


def _number(delivery: Delivery) -> float:
    """Its place in the order of acceptance. A timer and an answer get one with the commit that has them applied."""
    return delivery.row.seq if delivery.row is not None else inf


def _taken(queue: deque[Delivery], most: int) -> list[Delivery]:
    if len(queue) <= most:
        taken = list(queue)
        queue.clear()
        return taken
    return [queue.popleft() for _ in range(most)]
