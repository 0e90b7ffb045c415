"""What the receiver works on: deliveries, the unit of work that each decision becomes, and work that needs none.

A delivery comes from one of four places, and its unit consumes what it comes from:

| from | is in the store | until its turn | the unit |
|---|---|---|---|
| a door | no | its publisher waits, and is told to try again when it cannot be committed | leaves a mark |
| an inbox row | yes | waits in its row | consumes the row |
| a timer | yes | waits in its row, where it can be cancelled | consumes the row |
| the answer to an effect | no, but its effect is | the lane of its effect waits | settles the effect |
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, ClassVar, Protocol

import msgspec

from sagaloom.engine.records import (
    DeadLetter,
    Decision,
    Envelope,
    FeedKind,
    FeedMoment,
    FeedRecord,
    Head,
    Instance,
    Mark,
    PendingTimer,
)
from sagaloom.errors import SagasError
from sagaloom.ids import content_digest, key_hash, partition_of
from sagaloom.messages import SagaMessage
from sagaloom.ports.store import Conflict, InboxRow, RowRef, UnitOfWork
from sagaloom.runtime.cache import Hot
from sagaloom.runtime.receipts import Outcome

__all__ = [
    "Delivery",
    "HandedOver",
    "InstanceKey",
    "Planned",
    "Work",
    "answer",
    "mark_for",
    "refuse",
    "settling",
    "unit_of_accept",
    "unit_of_decision",
    "unit_of_loss",
]

InstanceKey = tuple[str, str]


class HandedOver(msgspec.Struct):
    """An effect that its target has taken over, and answered with one message: the unit which first mentions the answer
    settles it. Until then it stands in outbox row `ref`, at the head of its lane. `happened` is what the feed shows of
    it, before what the answer causes. `done` is called once: with None when it is settled, else with what stood against
    it: a conflict of its row, or why nothing can be committed any more."""

    ref: RowRef
    happened: FeedRecord
    done: Callable[[SagasError | Conflict | None], None]


class Delivery(msgspec.Struct, eq=False):
    """One message on its way through the receiver.

    It `enters` through a door, which means that the store knows nothing of it until the commit that first mentions it;
    or it comes from an inbox `row`, from the row of a `timer`, or is the answer to an `effect`. `key` is the saga id
    and the correlation key of its envelope. `answered` resolves when the message is durable, `settled` when it
    is done with. `is_aside`: it waits for its next attempt; `is_offer`: it is tried in between, because its instance
    has moved; `is_lined_up`: it waits behind a starter or a pause; `awaits_slot`: it needs a slot of its concurrency
    key; `goes_without`: one behind it holds that slot; `is_deferred`: it stands aside for its instance to change or
    appear, at most until `until`; `yielded`: how often it was decided without knowing of something older that others
    had brought. `typed` is the message as it was read at the door, until a handler has had it in its hands. `refusal`:
    the store can never write what the message asked for.
    """

    envelope: Envelope
    key: InstanceKey
    row: RowRef | None = None
    enters: bool = False
    timer: PendingTimer | None = None
    effect: HandedOver | None = None
    typed: SagaMessage[Any] | None = None
    answered: asyncio.Future[Outcome] | None = None
    settled: asyncio.Future[Outcome] | None = None
    is_aside: bool = False
    is_lined_up: bool = False
    is_offer: bool = False
    awaits_slot: bool = False
    goes_without: bool = False
    is_deferred: bool = False
    until: datetime | None = None
    yielded: int = 0
    refusal: SagasError | None = None

    @property
    def is_stored(self) -> bool:
        """Whether it has a row in which it can wait for another turn; else it gets one by being accepted."""
        return self.row is not None or self.timer is not None

    @property
    def passes(self) -> bool:
        """Whether nothing that holds its key concerns it: it opens a run of its own, or an operator sent it."""
        return self.envelope.opens_run or self.envelope.origin == "operator"

    @property
    def wakes_at(self) -> datetime | None:
        """When it gets its turn while it stands aside, whatever happens until then."""
        return self.until if self.is_deferred else self.envelope.due_at

    @property
    def part(self) -> int:
        """The partition of its instance."""
        return self.row.part if self.row is not None else partition_of(key_hash(*self.key))


class Planned(msgspec.Struct, gc=False):
    """The unit of one delivery and what follows from it, once it is committed: `hot` is what to remember of the key.
    `decision` is None when the message was only accepted. `waits`: its message is in the inbox now, decided or not.
    `awaits_slot`: it was accepted, and waits for a slot. `is_deferred`: it stands aside from then on. `holds`: its key
    waits for it. `is_next`: it was accepted to get its place, and has its turn as soon as it comes. `successor` is the
    same message as it is found in the inbox from then on, when it waits there for the first time."""

    delivery: Delivery
    unit: UnitOfWork
    decision: Decision | None
    hot: Hot | None
    waits: bool = True
    holds: bool = False
    is_next: bool = False
    is_deferred: bool = False
    awaits_slot: bool = False
    successor: Delivery | None = None


class Work(Protocol):
    """A unit that needs no decision: settled effects, an operator's request. `is_patient`: it waits for a store that
    does not answer, instead of failing."""

    is_patient: ClassVar[bool]

    @property
    def unit(self) -> UnitOfWork: ...

    def done(self, trouble: SagasError | Conflict | None) -> None:
        """Is called once, after the commit, with what stood against it."""
        ...

    def apart(self) -> Sequence[Work]:
        """What it is made of, when that is several things which may be committed without each other."""
        ...


def mark_for(envelope: Envelope, run: int) -> Mark:
    """What the store remembers of a message that came through a door."""
    return Mark(
        envelope.dedupe_key or envelope.id,
        envelope.id,
        content_digest(envelope.type, envelope.payload),
        envelope.accepted_at,
        run,
    )


def unit_of_accept(delivery: Delivery, head: Head, head_before: Head | None) -> UnitOfWork:
    """Puts a message into the inbox as it is: something older of its instance has to come first, or something else has
    to happen."""
    return UnitOfWork(
        part=head.part,
        head=head if head is not head_before else None,
        head_before=head_before,
        mark_pk=head.pk,
        mark=mark_for(delivery.envelope, 0) if delivery.enters else None,
        inbox_add=(delivery.envelope,),
        timer_done=delivery.timer,
    )


def unit_of_loss(delivery: Delivery, decision: Decision) -> UnitOfWork:
    """Gives a message up whose instance cannot be read: it is taken out of the inbox, and nothing else is touched."""
    assert decision.dead_letter is not None
    return UnitOfWork(
        part=partition_of(key_hash(*delivery.key)),
        inbox_done=delivery.row,
        timer_done=delivery.timer,
        dead_letters_add=(decision.dead_letter,),
        feed=() if decision.feed is None else (decision.feed,),
    )


def unit_of_decision(
    delivery: Delivery,
    decision: Decision,
    head: Head,
    head_before: Head | None,
    before: Instance | None,
    cascaded: Sequence[Envelope] = (),
    dead_letters: Sequence[DeadLetter] = (),
) -> UnitOfWork:
    """Everything `decision` asks for, as one unit. `before` is the stored run that `decision.instance` replaces; a
    new run replaces none. When the attempt failed, the message itself is the first of `inbox_add`."""
    envelope, row, instance = delivery.envelope, delivery.row, decision.instance
    waits = decision.disposition == "pending"
    inbox_add = tuple(cascaded) if cascaded else ()
    if waits:
        envelope = msgspec.structs.replace(
            envelope,
            attempt=envelope.attempt + decision.spends_attempt,
            due_at=decision.retry_at,
            last_error=decision.error,
        )
        if row is None:
            inbox_add = (envelope, *cascaded)
    # A discarded message to a key that was never seen leaves nothing behind, not even a head.
    leaves_trace = head_before is not None or instance is not None or decision.disposition != "ignored"
    mark = None
    if leaves_trace and delivery.enters:
        mark = mark_for(envelope, instance.run if instance is not None else 0)
    # What a message from a door writes, and only then what the others do beside it: CPython calls with up to 15
    # keywords directly, and with more of them through a dict, which takes five times as long.
    unit = UnitOfWork(
        part=head.part,
        head=head if leaves_trace and head is not head_before else None,
        head_before=head_before,
        instance=instance,
        status_before=before.status if before is not None else None,
        revision_before=before.revision if before is not None else None,
        entries_before=before.entries if before is not None else 0,
        entry=decision.entry,
        mark_pk=head.pk,
        mark=mark,
        inbox_add=inbox_add,
        outbox_add=decision.effects,
        timers_add=decision.timers,
        timers_remove=decision.timers_ended,
        feed=() if decision.feed is None else (decision.feed,),
    )
    if row is not None or delivery.timer is not None:
        unit = msgspec.structs.replace(
            unit,
            inbox_update=InboxRow(row, envelope) if waits and row is not None else None,
            inbox_done=None if waits else row,
            timer_done=delivery.timer,
        )
    if instance is None:
        unit = msgspec.structs.replace(unit, about=delivery.key)
    if decision.dead_letter is not None:
        unit = msgspec.structs.replace(unit, dead_letters_add=(decision.dead_letter, *dead_letters))
    elif dead_letters:
        feed = (*unit.feed, *(_gave_up(letter, instance) for letter in dead_letters))
        unit = msgspec.structs.replace(unit, dead_letters_add=tuple(dead_letters), feed=feed)
    return unit


def settling(unit: UnitOfWork, effect: HandedOver) -> UnitOfWork:
    """`unit`, which decides about the answer to `effect` or accepts it, and settles the effect with it."""
    return msgspec.structs.replace(unit, outbox_done=(effect.ref,), feed=(effect.happened, *unit.feed))


def _gave_up(letter: DeadLetter, sender: Instance | None) -> FeedRecord:
    """What the feed shows of a message between sagas that nobody takes: it happened to the run that sent it."""
    return FeedRecord(
        letter.at,
        letter.saga_id,
        letter.key,
        sender.run if sender is not None else 0,
        sender.revision if sender is not None else 0,
        letter.type,
        letter.envelope.id if letter.envelope is not None else "",
        (FeedMoment(FeedKind.DEAD_LETTERED, sender.status if sender is not None else None, letter.reason),),
    )


def answer(delivery: Delivery, outcome: Outcome) -> None:
    answered, settled = delivery.answered, delivery.settled
    if answered is not None and not answered.done():
        answered.set_result(outcome)
    if settled is not None and not settled.done():
        settled.set_result(outcome)


def refuse(delivery: Delivery, error: SagasError) -> None:
    for future in (delivery.answered, delivery.settled):
        if future is not None and not future.done():
            future.set_exception(error)
            future.exception()  # The one who waits may have gone; that is no reason for a warning at exit.
