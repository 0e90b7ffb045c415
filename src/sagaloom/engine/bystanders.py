"""Bystanders: messages that change nothing of a run but its counters.

A bystander is ignored (because the run is over, a control is in vain, nobody handles a child's end) or dead-lettered
(`giving_up.py`). It is recorded in the history of its run, with the reason, while fewer than `bystander_rows_max` such
rows are there, and then only counted: a finished run that is sent messages for ever must not grow with them.

`entries` numbers every history row; `bystanders` counts the messages that changed nothing. The revision stays as it is,
so folding the applied rows alone gives status and revision of the run (I6). A fired timer leaves `Instance.timers` with
the decision that consumes it, whatever that decision is.

A child's first message that is ignored is told to the parent, which would wait for ever otherwise (`families.py`).
"""

from __future__ import annotations

from typing import Literal

import msgspec

from sagaloom.engine.families import refused_child
from sagaloom.engine.moments import shown_bystander
from sagaloom.engine.records import DecideContext, Decision, Envelope, FeedKind, HistoryEntry, Instance, ParentLink
from sagaloom.engine.timer_controls import as_shown
from sagaloom.engine.transition import without_fired
from sagaloom.ids import instance_id

__all__ = ["bystander", "ignore", "ignore_removed", "ignore_terminal", "refuse_child"]


def refuse_child(instance: Instance, message: Envelope, context: DecideContext, parent: ParentLink) -> Decision:
    """A spawn whose key has a run that was not spawned by it: there is no such child, and the parent hears so."""
    name = instance_id(message.saga_id, message.key, instance.run)
    reason = f"{name} is there already, and is not this child: spawn it under a key of its own"
    ended, told = refused_child(parent, message, reason=reason, now=context.now, run=instance.run)
    return msgspec.structs.replace(ignore(instance, message, context, reason), outgoing=(told,), child_end=ended)


def ignore_terminal(instance: Instance, message: Envelope, context: DecideContext) -> Decision:
    reason = f"run {instance.run} is {instance.status} and takes no more messages"
    if message.origin in ("timer", "undo"):
        return Decision("ignored", reason)
    return ignore(instance, message, context, reason)


def ignore_removed(message: Envelope, context: DecideContext) -> Decision:
    """A message to a run that has ended, and was removed since: the key takes no more than it did before."""
    head = context.head
    reason = f"run {head.run} is {head.ended_as} and takes no more messages; it was removed when its retention was over"
    if message.parent is None or message.origin == "parent":
        return Decision("ignored", reason)
    name = instance_id(message.saga_id, message.key, head.run)
    reason = f"{name} was there before, and is not this child: spawn it under a key of its own"
    ended, told = refused_child(message.parent, message, reason=reason, now=context.now, run=head.run)
    return Decision("ignored", reason, outgoing=(told,), child_end=ended)


def ignore(instance: Instance, message: Envelope, context: DecideContext, reason: str) -> Decision:
    entry, counted = bystander(instance, as_shown(message), context, "ignored", reason)
    feed = None
    if entry is not None:
        feed = shown_bystander(FeedKind.MESSAGE_RECEIVED, instance, message, context, reason)
    return Decision("ignored", reason, counted, entry=entry, feed=feed)


def bystander(
    instance: Instance,
    message: Envelope,
    context: DecideContext,
    disposition: Literal["ignored", "dead_lettered"],
    reason: str,
) -> tuple[HistoryEntry | None, Instance]:
    """The history row of a message that changed nothing, and the run with its counters; no row past the limit."""
    has_row = instance.bystanders < context.limits.bystander_rows_max
    entry_no = instance.entries + 1 if has_row else instance.entries
    counted = msgspec.structs.replace(
        instance,
        entries=entry_no,
        bystanders=instance.bystanders + 1,
        timers=without_fired(instance.timers, message),
    )
    if not has_row:
        return None, counted
    entry = HistoryEntry(
        entry_no=entry_no,
        revision=instance.revision,
        disposition=disposition,
        type=message.type,
        message_id=message.id,
        at=context.now,
        status_before=instance.status,
        status_after=instance.status,
        attempt=message.attempt + 1,
        payload=message.payload,
        reason=reason,
        origin=message.origin,
        causation_id=message.causation_id,
        traceparent=message.traceparent,
        tracestate=message.tracestate,
        def_version=instance.def_version,
    )
    return entry, counted
