"""What can be read off a unit of work alone: what it is about, what it does, and what it may be in conflict with.

Nothing here knows the store, or what is believed of it (`sagaloom.stores.beliefs`).
"""

from __future__ import annotations

from sagaloom.engine.records import Instance
from sagaloom.ids import instance_id
from sagaloom.ports.keyvalue import Key
from sagaloom.ports.store import RowRef, UnitOfWork
from sagaloom.stores.rows import head_key, mark_key, timer_key

__all__ = ["brings_only", "consumed_row", "decided_key", "doubt", "misshapen", "name_of", "only_settles", "pk_of"]


def brings_only(unit: UnitOfWork) -> bool:
    """Whether `unit` does nothing but bring messages, which everybody may do for any partition."""
    return unit.instance is None and not (
        unit.outbox_done
        or unit.inbox_done
        or unit.timer_done
        or unit.inbox_update
        or unit.outbox_update
        or unit.outbox_add
        or unit.timers_add
        or unit.timers_remove
    )


def decided_key(unit: UnitOfWork) -> tuple[str, str] | None:
    """The saga and the correlation key whose message `unit` decides; None when it decides none."""
    instance = unit.instance
    return unit.about if instance is None else (instance.saga_id, instance.key)


def consumed_row(unit: UnitOfWork) -> RowRef | None:
    """The inbox row that the message of `unit` stands in; None when it comes from elsewhere."""
    if unit.inbox_done is not None:
        return unit.inbox_done
    return None if unit.inbox_update is None else unit.inbox_update.ref


def doubt(unit: UnitOfWork) -> list[Key]:
    """The rows on which a conflict of `unit` may rest, or that may name a better one."""
    keys: list[Key] = []
    if unit.instance is not None:
        keys.append(("state", unit.instance.pk, unit.instance.run))
    if unit.head is not None:
        keys.append(head_key(unit.head.saga_id, unit.head.key))
    if unit.mark is not None:
        keys.append(mark_key(unit.mark_pk, unit.mark.dedupe_key))
    keys += [("outbox", *ref) for ref in unit.outbox_done]
    if unit.inbox_done is not None:
        keys.append(("inbox", *unit.inbox_done))
    if unit.timer_done is not None:
        keys.append(timer_key(unit.timer_done))
    if unit.inbox_update is not None:
        keys.append(("inbox", *unit.inbox_update.ref))
    if unit.outbox_update is not None:
        keys.append(("outbox", *unit.outbox_update.ref))
    if unit.dead_letter_done is not None:
        keys.append(("dead_letter", unit.dead_letter_done))
    if unit.slot is not None:
        keys.append(("slot", unit.slot.saga_id, unit.slot.key))
    return keys


def only_settles(unit: UnitOfWork) -> bool:
    """Whether a unit with an `outbox_done` writes nothing else but its feed."""
    return not (
        unit.mark
        or unit.instance
        or unit.entry
        or unit.head
        or unit.inbox_add
        or unit.inbox_done
        or unit.inbox_update
        or unit.outbox_add
        or unit.outbox_update
        or unit.timers_add
        or unit.timers_remove
        or unit.timer_done
        or unit.dead_letters_add
        or unit.dead_letter_done
        or unit.unmark
    )


def misshapen(unit: UnitOfWork) -> str | None:
    """Why no store could write `unit`, whatever it holds: a fault of the caller."""
    instance = unit.instance
    entry = unit.entry
    if instance is None:
        return None if entry is None else "a history entry comes with its instance"
    revision = unit.revision_before or 0
    entries = unit.entries_before
    if entry is not None and instance.revision == revision + 1 and entries < entry.entry_no <= instance.entries:
        return None  # as nearly every unit is
    if instance.revision == revision:
        if instance.entries < entries:
            return f"{name_of(instance)}: {entries} entries cannot become {instance.entries}"
    elif instance.revision != revision + 1 or instance.entries < entries:
        return (
            f"{name_of(instance)}: a step leads from revision {revision} to {revision + 1}, not to {instance.revision}"
        )
    if entry is not None and not entries < entry.entry_no <= instance.entries:
        return f"{name_of(instance)}: entry {entry.entry_no} is not one of {entries + 1} to {instance.entries}"
    return None


def pk_of(unit: UnitOfWork) -> int:
    """Which instance `unit` is about; 0 when it does not say."""
    if unit.instance is not None:
        return unit.instance.pk
    if unit.head is not None:
        return unit.head.pk
    return unit.mark_pk


def name_of(instance: Instance) -> str:
    return instance_id(instance.saga_id, instance.key, instance.run)
