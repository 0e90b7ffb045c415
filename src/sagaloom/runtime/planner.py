"""The planner: decides the messages of a turn, and says what the store is to write of each.

Each message of a batch is decided on top of what those before it in the batch decided. Most become the unit that their
decision asks for. Some have no turn yet: what has no row then is only accepted, what has one already costs nothing and
waits in the backlog. The answer to an effect settles the effect, whatever else its unit does.

| | has its row | is in none yet |
|---|---|---|
| its partition is another's | is left alone | accepted |
| a starter or a pause holds its key | lines up | accepted, lines up |
| it may have come behind something unread | (a timer: once more) | accepted, is next |
| it found no free slot | | accepted, waits for one |
| its decision: not yet (*deferred*) | stands aside, or lines up | accepted, likewise |
| more than a turn can carry, or something deferred comes first | is postponed | is postponed |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Final

import msgspec

from sagaloom.clock import Clock
from sagaloom.engine.controls import ends_pause
from sagaloom.engine.correlation import DefinitionSet, dead_letter_id, route
from sagaloom.engine.decide import DecideContext, decide, steer
from sagaloom.engine.families import CANCEL_CHILDREN, child_spawned
from sagaloom.engine.lifecycle import is_terminal
from sagaloom.engine.records import (
    Child,
    DeadLetter,
    Decision,
    Envelope,
    FeedKind,
    FeedMoment,
    FeedRecord,
    Head,
    Instance,
    Mark,
)
from sagaloom.engine.retrying import traceback_text
from sagaloom.errors import IdempotencyKeyReused, SagasError, StoreCorrupt
from sagaloom.ids import content_digest
from sagaloom.ports.store import Conflict, SagaStore
from sagaloom.runtime.backlog import Backlog
from sagaloom.runtime.cache import Hot
from sagaloom.runtime.counters import Counters
from sagaloom.runtime.deliveries import (
    Delivery,
    InstanceKey,
    Planned,
    answer,
    refuse,
    settling,
    unit_of_accept,
    unit_of_decision,
    unit_of_loss,
)
from sagaloom.runtime.memory import Memory
from sagaloom.runtime.options import RuntimeOptions
from sagaloom.runtime.outcomes import outcome_of_duplicate
from sagaloom.runtime.share import Share
from sagaloom.runtime.slots import Slots

if TYPE_CHECKING:
    from sagaloom.telemetry.sagas import SagaTelemetry

__all__ = ["DISCARD", "REDRIVE", "Planner"]

REDRIVE: Final = "saga:redrive"
DISCARD: Final = "saga:discard"
_CARRIED_OUT: Final = frozenset((REDRIVE, DISCARD, CANCEL_CHILDREN))
"""What operators ask of the process that holds a partition, without a decision."""

_BATCH_BYTES: Final = 8 << 20
"""When payloads, states and effects of a turn are more than this, the rest of its messages waits for the next."""
_UNKNOWN_AGAIN: Final = timedelta(seconds=2)
_UNKNOWN_PATIENCE: Final = timedelta(hours=1)


class Planner:
    """Plans turns. Nothing that it does is seen by anybody before the commit, except that a message which was seen
    before is answered, and one that waits is moved within the backlog."""

    def __init__(
        self,
        store: SagaStore,
        clock: Clock,
        options: RuntimeOptions,
        *,
        counters: Counters,
        definitions: Callable[[], DefinitionSet],
        backlog: Backlog,
        memory: Memory,
        slots: Slots,
        share: Share,
        on_repair: Callable[[Delivery], None],
    ) -> None:
        self._store = store
        self._clock = clock
        self._options = options
        self._counters = counters
        self._definitions = definitions
        self._backlog = backlog
        self._memory = memory
        self._slots = slots
        self._share = share
        self._on_repair = on_repair

    async def plan(
        self, batch: Sequence[Delivery], telemetry: SagaTelemetry | None
    ) -> tuple[list[Planned], list[Delivery]]:
        """Decides each delivery on top of what those before it in this batch decided. The second list is what is left
        for another turn, in order."""
        newest, corrupt = await self._memory.load(batch, self._share.parts)
        now = self._clock.now()
        definitions = self._definitions()
        seen: dict[tuple[int, str], Mark] = {}
        holding: set[InstanceKey] = set()  # The keys whose next messages of this batch have to wait.
        placing: set[InstanceKey] = set()  # The keys whose next messages have to get a place first, as one before did.
        marks = self._memory.marks
        parts, holds_some = self._share.parts, self._backlog.holds_some
        defers_some = self._backlog.defers_some
        limited_ids = definitions.limited
        deferring: set[InstanceKey] = set()  # The keys of which a message of this batch was deferred.
        stopped: set[InstanceKey] = set()  # The keys that have moved since: what was deferred comes first now.
        postponed: list[Delivery] = []
        planned: list[Planned] = []
        size = 0
        for delivery in batch:
            key, envelope = delivery.key, delivery.envelope
            if size > _BATCH_BYTES or (stopped and key in stopped and not delivery.passes):
                postponed.append(delivery)
                continue
            known = newest[key]
            head = known.head or self._memory.new_head(key, now)
            where = (head.pk, envelope.dedupe_key or envelope.id)
            if delivery.enters:
                mark = seen.get(where) or marks.get(where)
                if mark is not None:
                    instance = known.instance
                    if head.part not in parts:
                        found, _ = await self._memory.read([key])
                        instance = found[key].instance if key in found else None
                    self._answer_duplicate(delivery, mark, instance, is_in_batch=where in seen)
                    continue
            if head.part not in parts:
                if not delivery.enters:
                    # Its holder has it. To bring it once more would be to apply it twice.
                    if delivery.effect is not None:
                        delivery.effect.done(Conflict("moved", f"partition {head.part} is held by another process"))
                    continue
                unit = unit_of_accept(delivery, head, known.head)
                newest[key] = Hot(head, known.instance)
                step = Planned(delivery, unit, None, None)
            elif envelope.origin == "operator" and envelope.type in _CARRIED_OUT:
                self._on_repair(delivery)
                continue
            elif (holds_some and self._backlog.is_held(delivery)) or (key in holding and not delivery.passes):
                if delivery.is_stored:
                    self._backlog.wait_behind(delivery)
                    continue
                unit = unit_of_accept(delivery, head, known.head)
                step = Planned(delivery, unit, None, Hot(head, known.instance))
            elif (delivery.yielded or placing) and (
                delivery.yielded > (delivery.timer is not None) or (key in placing and not delivery.is_stored)
            ):
                placing.add(key)
                unit = unit_of_accept(delivery, head, known.head)
                step = Planned(delivery, unit, None, Hot(head, known.instance), is_next=True)
            elif limited_ids and delivery.awaits_slot and not delivery.is_stored:
                unit = unit_of_accept(delivery, head, known.head)
                step = Planned(delivery, unit, None, Hot(head, known.instance), holds=True, awaits_slot=True)
            else:
                addressed, damage = known.instance, corrupt.get(key)
                if envelope.run is not None and envelope.run != head.run and damage is None:
                    # Rare: a reply, timer or child of a run that is not the newest. Such runs are read each time.
                    addressed = await self._store.load_run(envelope.saga_id, envelope.key, envelope.run)
                if telemetry is None:
                    decision = self._decide(delivery, addressed, head, definitions, now, damage, envelope)
                else:
                    definition = definitions.get(envelope.saga_id)
                    tier = None if definition is None else definition.durability
                    run = partial(self._decide, delivery, addressed, head, definitions, now, damage)
                    decision = telemetry.decide(delivery, addressed, tier, run)
                if delivery.is_offer and decision.disposition in ("pending", "deferred") and not _is_held(decision):
                    self._backlog.put_aside(delivery)
                    continue
                if decision.stands_aside:
                    deferring.add(key)
                    if delivery.is_stored:
                        self._backlog.defer(delivery, decision.retry_at)
                        continue
                if decision.disposition == "deferred" and delivery.is_stored:
                    self._backlog.wait_behind(delivery)  # A timer keeps its row, so that it can still be cancelled.
                    continue
                if decision.disposition == "deferred":
                    if decision.stands_aside and known.head is None:
                        head = msgspec.structs.replace(head, awaits_start=False)  # It does not start what it waits for.
                    unit = unit_of_accept(delivery, head, known.head)
                    is_deferred = decision.stands_aside
                    shown = decision if is_deferred else None
                    step = Planned(delivery, unit, shown, Hot(head, known.instance), is_deferred=is_deferred)
                elif damage is not None:
                    step = Planned(delivery, unit_of_loss(delivery, decision), decision, None, waits=False)
                else:
                    step = self._plan_decision(delivery, decision, known, head, addressed, definitions, now)
                if (
                    (defers_some or deferring)
                    and decision.disposition == "applied"
                    and (key in deferring or self._backlog.has_deferred(key))
                ):
                    stopped.add(key)
            if delivery.effect is not None:
                step.unit = settling(step.unit, delivery.effect)
            if envelope.slot is not None or (limited_ids and key[0] in limited_ids):
                step.unit = self._slots.claim(definitions.get(key[0]), delivery, step.unit, step.decision, now)
            if step.holds or (envelope.origin != "door" and ends_pause(envelope)):
                holding.add(key)
            if step.hot is not None:
                newest[key] = step.hot
            planned.append(step)
            unit = step.unit
            if unit.mark is not None:
                seen[where] = unit.mark
            size += len(envelope.payload)
            if unit.instance is not None:
                size += len(unit.instance.state)
            for effect in unit.outbox_add:
                size += len(effect.payload)
        return planned, postponed

    def _decide(
        self,
        delivery: Delivery,
        addressed: Instance | None,
        head: Head,
        definitions: DefinitionSet,
        now: datetime,
        corrupt: StoreCorrupt | None,
        envelope: Envelope,
    ) -> Decision:
        """The decision about `envelope`, which is that of the delivery, or the same in the trace of its decision."""
        definition = definitions.get(envelope.saga_id)
        if definition is None and corrupt is None:
            if envelope.origin in ("operator", "parent"):
                return steer(addressed, envelope, DecideContext(now, head, self._options.limits))
            if self._may_be_known_elsewhere(envelope, now):
                missing = _vanished(envelope.saga_id).message
                return Decision("pending", missing, retry_at=now + _UNKNOWN_AGAIN, error=missing, spends_attempt=False)
        if definition is None or corrupt is not None or delivery.refusal is not None:
            return _give_up(envelope, now, corrupt or delivery.refusal or _vanished(envelope.saga_id))
        about = definition.about
        if (about.paused or not about.enabled) and envelope.origin not in ("operator", "parent"):
            # Nothing is written for those that wait, however long that is.
            what = "paused" if about.enabled else "disabled"
            return Decision("deferred", f"saga {envelope.saga_id!r} is {what}")
        typed, delivery.typed = delivery.typed, None
        if typed is not None and envelope is not delivery.envelope:
            typed = msgspec.structs.replace(typed, traceparent=envelope.traceparent, tracestate=envelope.tracestate)
        return decide(definition, addressed, envelope, DecideContext(now, head, self._options.limits, typed))

    def _may_be_known_elsewhere(self, envelope: Envelope, now: datetime) -> bool:
        """Whether another process may have the definition that is missing here, as in the middle of a release: then the
        message waits for a holder that knows it, for a while."""
        return self._share.is_shared and now - envelope.accepted_at < _UNKNOWN_PATIENCE

    def _plan_decision(
        self,
        delivery: Delivery,
        decision: Decision,
        known: Hot,
        head: Head,
        addressed: Instance | None,
        definitions: DefinitionSet,
        now: datetime,
    ) -> Planned:
        """The unit that `decision` about run `addressed` becomes, and what is known of the key after it."""
        instance, before, head_before = decision.instance, addressed, known.head
        waits = decision.disposition == "pending"
        if instance is not None and instance.run > head.run:
            before = None
            head = msgspec.structs.replace(
                head, run=instance.run, awaits_start=False, tombstone_until=None, ended_as=None
            )
        elif head.run == 0 and head.awaits_start != waits:
            head = msgspec.structs.replace(head, awaits_start=waits)
        cascaded: Sequence[Envelope] = decision.follow_ups
        dead_letters: Sequence[DeadLetter] = ()
        children: Sequence[Child] = ()
        if decision.outgoing:
            cascaded, dead_letters, children = _routed(decision, definitions, now)
        unit = unit_of_decision(delivery, decision, head, head_before, before, cascaded, dead_letters)
        if children or decision.child_end is not None:
            unit = msgspec.structs.replace(unit, children_add=tuple(children), child_done=decision.child_end)
        newest, hot = known.instance, None
        if head_before is not None or unit.head is not None:
            hot = Hot(head, instance if instance is not None and instance.run == head.run else newest)
        holds = False
        if waits:
            envelope = delivery.envelope
            would_start = newest is None or is_terminal(newest.status)
            holds = would_start and not envelope.opens_run and envelope.run is None
        return Planned(delivery, unit, decision, hot, waits, holds)

    def _answer_duplicate(
        self, delivery: Delivery, mark: Mark, instance: Instance | None, *, is_in_batch: bool
    ) -> None:
        """Answers a message that was seen before. Most are found here; the rest the commit itself finds."""
        envelope = delivery.envelope
        if mark.digest != content_digest(envelope.type, envelope.payload):
            refuse(
                delivery,
                IdempotencyKeyReused(
                    f"idempotency key {mark.dedupe_key!r:.80} of saga {envelope.saga_id!r} was used before for message "
                    f"{mark.message_id} with other content: give every message a key of its own",
                    data={"messageId": mark.message_id, "sagaId": envelope.saga_id},
                ),
            )
        elif is_in_batch:
            # The first one is in this very batch: its commit has to come before anybody hears of it.
            self._backlog.add(delivery)
        else:
            self._counters.decided[envelope.saga_id, "duplicate"] += 1
            answer(delivery, outcome_of_duplicate(envelope, mark, instance))


def _routed(
    decision: Decision, definitions: DefinitionSet, now: datetime
) -> tuple[list[Envelope], list[DeadLetter], list[Child]]:
    """The messages that `decision` leaves in the store, those of them that nobody takes, and the children it spawns."""
    cascaded = list(decision.follow_ups)
    dead_letters: list[DeadLetter] = []
    children: list[Child] = []
    for outgoing in decision.outgoing:
        routed = route(definitions, outgoing, now=now)
        if outgoing.kind == "spawn":
            child_key = routed.envelopes[0].key if routed.envelopes else ""
            children.append(child_spawned(outgoing, child_key, now))
        cascaded.extend(routed.envelopes)
        dead_letters.extend(routed.dead_letters)
    return cascaded, dead_letters, children


def _is_held(decision: Decision) -> bool:
    """Whether the message has to wait behind its run, which is paused."""
    return decision.disposition == "deferred" and not decision.stands_aside


def _vanished(saga_id: str) -> SagasError:
    return SagasError(
        f"no loaded definition has the id {saga_id!r}: load its module again and redrive this message",
        code="SAGA_NOT_FOUND",
    )


def _give_up(envelope: Envelope, now: datetime, error: SagasError) -> Decision:
    """The decision about a message that no definition can be asked about."""
    return Decision(
        disposition="dead_lettered",
        reason=error.message,
        dead_letter=DeadLetter(
            id=dead_letter_id(now, envelope.saga_id, envelope.key, envelope.id, envelope.attempt),
            at=now,
            saga_id=envelope.saga_id,
            key=envelope.key,
            type=envelope.type,
            code=error.code,
            reason=error.message,
            attempts=envelope.attempt + 1,
            traceback=traceback_text(error),
            envelope=envelope,
        ),
        feed=FeedRecord(
            now,
            envelope.saga_id,
            envelope.key,
            envelope.run or 0,
            0,
            envelope.type,
            envelope.id,
            (FeedMoment(FeedKind.DEAD_LETTERED, None, error.message),),
        ),
    )
