"""From decisions to what a publisher is told."""

from __future__ import annotations

import msgspec

from sagaloom.engine.records import Decision, Disposition, Envelope, HistoryEntry, Instance, Mark
from sagaloom.ids import instance_id
from sagaloom.ports.store import SagaStore, UnitOfWork
from sagaloom.runtime.deliveries import Delivery
from sagaloom.runtime.receipts import Outcome

__all__ = ["outcome_elsewhere", "outcome_of", "outcome_of_duplicate", "outcome_of_left", "with_details"]

_ENTRIES_SEARCHED = 200

_decode = msgspec.json.Decoder().decode


def outcome_of(delivery: Delivery, decision: Decision | None, unit: UnitOfWork) -> Outcome:
    """What a message did, without what only those get who wait for it."""
    envelope, instance = delivery.envelope, unit.instance
    disposition: Disposition = "pending"
    reason: str | None = None
    if decision is not None:
        disposition, reason = decision.disposition, decision.reason or decision.error
    run, status, revision = envelope.run or 0, None, None
    if instance is not None:
        run, status, revision = instance.run, instance.status, instance.revision
        if reason is None:
            reason = instance.reason
    return Outcome(
        message_id=envelope.id,
        instance_id=instance_id(envelope.saga_id, envelope.key, run),
        saga_id=envelope.saga_id,
        correlation_key=envelope.key,
        run=run,
        disposition=disposition,
        status=status,
        revision=revision,
        reason=reason,
    )


def with_details(outcome: Outcome, decision: Decision, unit: UnitOfWork) -> Outcome:
    """`outcome` with state, effects and result, for those who wait for them."""
    instance, entry = unit.instance, decision.entry
    return msgspec.structs.replace(
        outcome,
        state=_decode(instance.state) if instance is not None else None,
        effects=() if entry is None else tuple(effect.kind for step in entry.steps for effect in step.effects),
        result=_decode(instance.result) if instance is not None and instance.result else None,
        answer=None if entry is None else entry.answer,
    )


def outcome_of_duplicate(envelope: Envelope, mark: Mark, instance: Instance | None) -> Outcome:
    """The facts of the first one, as far as they still stand."""
    run = mark.run or (instance.run if instance is not None else 0)
    same = instance is not None and instance.run == run
    return Outcome(
        message_id=mark.message_id,
        instance_id=instance_id(envelope.saga_id, envelope.key, run),
        saga_id=envelope.saga_id,
        correlation_key=envelope.key,
        run=run,
        disposition="duplicate",
        status=instance.status if instance is not None and same else None,
        revision=instance.revision if instance is not None and same else None,
        state=_decode(instance.state) if instance is not None and same else None,
        result=_decode(instance.result) if instance is not None and same and instance.result else None,
        reason=f"the same message was accepted before as {mark.message_id}",
    )


def outcome_of_left(envelope: Envelope) -> Outcome:
    """That of a message which is part of somebody's own transaction, and has not been taken in yet."""
    run = envelope.run or 0
    return Outcome(
        message_id=envelope.id,
        instance_id=instance_id(envelope.saga_id, envelope.key, run),
        saga_id=envelope.saga_id,
        correlation_key=envelope.key,
        run=run,
        disposition="pending",
    )


async def outcome_elsewhere(store: SagaStore, envelope: Envelope) -> Outcome:
    """How a message ended that another process was to apply, read from what that one wrote."""
    saga_id, key = envelope.saga_id, envelope.key
    (loaded,) = await store.load([(saga_id, key)])
    instance = loaded.instance
    if instance is not None and envelope.run is not None and envelope.run != instance.run:
        instance = await store.load_run(saga_id, key, envelope.run)
    entry: HistoryEntry | None = None
    while instance is not None and entry is None:
        last = await store.history(instance, after_entry=max(0, instance.entries - _ENTRIES_SEARCHED), limit=1_000)
        entry = next((each for each in reversed(last) if each.message_id == envelope.id), None)
        if entry is None:
            # It may have opened, or ended, a run that is not the newest any more.
            instance = await store.load_run(saga_id, key, instance.run - 1) if instance.run > 1 else None
    letters = () if entry is not None else await store.dead_letters(saga_id=saga_id, key=key, limit=20)
    letter = next((each for each in letters if each.envelope is not None and each.envelope.id == envelope.id), None)
    run = instance.run if instance is not None else envelope.run or 0
    return Outcome(
        message_id=envelope.id,
        instance_id=instance_id(saga_id, key, run),
        saga_id=saga_id,
        correlation_key=key,
        run=run,
        disposition=entry.disposition if entry is not None else "dead_lettered" if letter is not None else "ignored",
        status=entry.status_after if entry is not None else None,
        revision=entry.revision if entry is not None else None,
        state=_decode(instance.state) if instance is not None else None,
        effects=tuple(effect.kind for step in entry.steps for effect in step.effects) if entry is not None else (),
        result=_decode(instance.result) if instance is not None and instance.result else None,
        reason=entry.reason if entry is not None else letter.reason if letter is not None else None,
        answer=entry.answer if entry is not None else None,
    )
