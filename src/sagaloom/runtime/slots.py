"""Slots: which messages of the receiver hold one, and which wait for one. What they are is told in
`sagaloom.engine.concurrency`.

A message that lacks one waits at the head of its instance, with those behind it, and tries again when a message of this
process gives one back. What other processes give back is found by looking again, a few times a second, as long as
somebody waits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

import msgspec

from sagaloom.clock import Clock
from sagaloom.definitions import SagaDefinition
from sagaloom.engine.concurrency import SlotUse, key_of, needs_slot
from sagaloom.engine.correlation import DefinitionSet
from sagaloom.engine.records import Decision, Envelope
from sagaloom.errors import ConcurrencyLimited
from sagaloom.ports.store import InboxRow, SlotClaim, UnitOfWork
from sagaloom.runtime.backlog import Backlog
from sagaloom.runtime.counters import Counters
from sagaloom.runtime.deliveries import Delivery, refuse

__all__ = ["Slots"]

_LOOK_AGAIN: Final = timedelta(milliseconds=250)
_SETTLED: Final = frozenset(("applied", "ignored", "dead_lettered"))

_Where = tuple[str, str]
"""A saga and a concurrency key."""


class Slots:
    """Says what each message does to the slots of its saga, and has those that lack one wait in the backlog."""

    def __init__(
        self, clock: Clock, backlog: Backlog, counters: Counters, definitions: Callable[[], DefinitionSet]
    ) -> None:
        self._clock = clock
        self._backlog = backlog
        self._counters = counters
        self._definitions = definitions
        self._waiting: dict[_Where, dict[int, Delivery]] = {}

    @property
    def some_wait(self) -> bool:
        return bool(self._waiting)

    def claim(
        self,
        definition: SagaDefinition[Any] | None,
        delivery: Delivery,
        unit: UnitOfWork,
        decision: Decision | None,
        now: datetime,
    ) -> UnitOfWork:
        """`unit`, with what the message of `delivery` does to slots. `decision` is None when it is only accepted."""
        envelope = delivery.envelope
        is_settled = decision is not None and decision.disposition in _SETTLED
        if envelope.slot is not None:
            return _with(unit, "free", envelope, envelope.slot, 0, now) if is_settled else unit
        policy = definition.concurrency if definition is not None else None
        if definition is None or policy is None or delivery.goes_without or not needs_slot(envelope):
            return unit
        key = key_of(definition, envelope)
        if delivery.awaits_slot:
            self._leave(delivery, key)
        if is_settled:
            return _with(unit, "pass", envelope, key, policy.limit, now)
        if decision is None:
            takes = delivery.enters and envelope.origin == "door" and policy.on_limit == "reject"
        else:
            takes = decision.disposition == "pending"
        return _holding(_with(unit, "take", envelope, key, policy.limit, now), key) if takes else unit

    def lacks(self, delivery: Delivery) -> bool:
        """Does what is to be done about a message that found no free slot; whether it is decided again right away."""
        definition = self._definitions().get(delivery.key[0])
        if definition is None or definition.concurrency is None:
            return True
        if not delivery.awaits_slot:
            self._counters.throttled[definition.id] += 1
        key = key_of(definition, delivery.envelope)
        if not delivery.is_stored:
            if delivery.envelope.origin == "door" and definition.concurrency.on_limit == "reject":
                refuse(delivery, _limited(definition, delivery, key))
                return False
            delivery.awaits_slot = True
            return True
        if any(each.envelope.slot == key for each in self._backlog.behind(delivery.key)):
            delivery.goes_without = True
            return True
        self._wait(delivery, key)
        return False

    def wait(self, delivery: Delivery) -> None:
        """Holds the instance of an accepted message until there is a slot for it."""
        definition = self._definitions().get(delivery.key[0])
        assert definition is not None
        self._wait(delivery, key_of(definition, delivery.envelope))

    def pass_on(self, units: Sequence[UnitOfWork]) -> None:
        """Gives whoever has waited longest for a slot that one of `units` has given back, or has shown to be free, its
        turn."""
        now = self._clock.now()
        for unit in units:
            claim = unit.slot
            if claim is None or claim.use == "take":
                continue
            waiting = self._waiting.get((claim.saga_id, claim.key), {})
            first = next((each for each in waiting.values() if each.is_aside), None)
            if first is not None:
                self._backlog.hasten(first, now)

    def _wait(self, delivery: Delivery, key: str) -> None:
        delivery.awaits_slot = True
        self._waiting.setdefault((delivery.key[0], key), {})[id(delivery)] = delivery
        until = self._clock.now() + _LOOK_AGAIN
        if delivery.envelope.opens_run:
            self._backlog.defer(delivery, until)  # Nothing is behind it: its run has yet to be opened.
            return
        delivery.is_deferred, delivery.until = True, until
        self._backlog.hold(delivery)

    def _leave(self, delivery: Delivery, key: str) -> None:
        """Notes that it waits no more."""
        where = (delivery.key[0], key)
        waiting = self._waiting.get(where)
        if waiting is not None:
            waiting.pop(id(delivery), None)
            if not waiting:
                del self._waiting[where]


def _limited(definition: SagaDefinition[Any], delivery: Delivery, key: str) -> ConcurrencyLimited:
    """The refusal of a message that finds no slot."""
    assert definition.concurrency is not None
    limit = definition.concurrency.limit
    return ConcurrencyLimited(
        f"saga {definition.id!r}: {limit} {'message is' if limit == 1 else 'messages are'} under way for "
        f"concurrency key {key!r:.80}, and no more may be: try again when one of them is settled",
        data={"sagaId": definition.id, "concurrencyKey": key, "limit": limit, "messageId": delivery.envelope.id},
    )


def _with(unit: UnitOfWork, use: SlotUse, envelope: Envelope, key: str, limit: int, now: datetime) -> UnitOfWork:
    claim = SlotClaim(use, envelope.saga_id, key, limit, envelope.key, envelope.id, now)
    return msgspec.structs.replace(unit, slot=claim)


def _holding(unit: UnitOfWork, key: str) -> UnitOfWork:
    """`unit`, whose message knows from now on that it holds a slot."""
    update = unit.inbox_update
    if update is not None:
        return msgspec.structs.replace(
            unit, inbox_update=InboxRow(update.ref, msgspec.structs.replace(update.envelope, slot=key))
        )
    first, *others = unit.inbox_add
    return msgspec.structs.replace(unit, inbox_add=(msgspec.structs.replace(first, slot=key), *others))
