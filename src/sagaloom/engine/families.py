"""Parents and children: how a child comes to be, how its end is told, and how it is cancelled with its parent.

    parent ──spawn──► child row (live), the child's first message
    child's end ──► child row (how it ended), `<child id>:completed | :failed | :cancelled` to the parent's very run
    parent cancelled ──► saga:cancel_children, page by page ──► saga:cancel to every live child that goes with it

- The spawning commit writes the child's row and its first message; the commit that ends the child moves its row and
  tells the parent. So each side can be seen from the other at any moment, and neither grows with the number of them:
  a parent counts its children and lists them from their rows.
- A child is a run of its own. A spawn whose key has a run already, which is somebody else's, opens none; its message
  is ignored there, and the parent hears `<child id>:failed`, for otherwise it would wait for ever. So it does when an
  operator discards the dead letter of a child's first message.
- An end is told to the parent's run even when no loaded definition of the parent is here: whoever holds it knows. Only
  a parent that is known to have no handler for it is not told. A child cancelled with its parent tells nothing.
- `saga:cancel_children` is carried out by whoever holds the parent, a page of rows in each commit, in the order of
  their spawning. A child's first message may still be waiting then: the cancel lines up behind it.
- Cycles: a spawn and an end are one hop each, so sagas that spawn each other in a circle meet the limit of hops.

What we dislike about it: a parent that ends otherwise than by a cancel leaves its children alone, and says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Final, Literal

import msgspec

from sagaloom.engine.records import Child, ChildStatus, Envelope, Instance, Outgoing, ParentLink
from sagaloom.ids import derived_id, effect_key, instance_id
from sagaloom.messages import SagaMessage

__all__ = [
    "CANCEL_CHILDREN",
    "CancelChildren",
    "cancel_children",
    "child_end_of",
    "child_named",
    "child_spawned",
    "end_of_child",
    "end_told",
    "next_page",
    "refused_child",
    "what_was_asked",
]

CANCEL_CHILDREN: Final = "saga:cancel_children"


class CancelChildren(msgspec.Struct, frozen=True):
    """The payload of `saga:cancel_children`: what to do with the children spawned after `after`, a revision and a
    position of the parent."""

    kind: Literal["saga:cancel", "saga:terminate"]
    compensate: bool = True
    reason: str | None = None
    after: tuple[int, int] | None = None


def cancel_children(
    parent: Instance,
    by: Envelope,
    *,
    kind: Literal["saga:cancel", "saga:terminate"],
    compensate: bool,
    reason: str,
) -> tuple[Envelope, ...]:
    """The message that takes the children of a run down with it; none when it never had any."""
    if not parent.children:
        return ()
    told = f"its parent {instance_id(parent.saga_id, parent.key, parent.run)} was ended: {reason}"
    asked = CancelChildren(kind, compensate, told[:2_000])
    message_id = f"cc{effect_key(parent.saga_id, parent.key, parent.run, parent.revision, -2)}"
    return (
        Envelope(
            parent.saga_id,
            parent.key,
            CANCEL_CHILDREN,
            message_id,
            msgspec.json.encode(asked),
            parent.updated_at,
            "operator",
            parent.run,
            dedupe_key=message_id,
            traceparent=by.traceparent,
            tracestate=by.tracestate,
            causation_id=by.id,
        ),
    )


def what_was_asked(envelope: Envelope) -> CancelChildren:
    return msgspec.json.decode(envelope.payload, type=CancelChildren)


def next_page(envelope: Envelope, last: Child) -> Envelope:
    """The same message, for the children behind `last`."""
    asked = msgspec.structs.replace(what_was_asked(envelope), after=(last.revision, last.position))
    return msgspec.structs.replace(envelope, payload=msgspec.json.encode(asked))


def end_of_child(saga_id: str, key: str, run: int) -> dict[str, object]:
    """What a parent hears of a child that has ended, before what came of it."""
    return {"instanceId": instance_id(saga_id, key, run), "sagaId": saga_id, "correlationKey": key, "run": run}


def end_told(
    parent: ParentLink,
    message_type: str,
    payload: Mapping[str, object],
    *,
    sender: tuple[str, str, int],
    by: Envelope,
    effect_key: str,
) -> Outgoing:
    """The message that tells the parent's run of an end; `payload` is JSON values."""
    return Outgoing(
        "child_end",
        parent.saga_id,
        SagaMessage(message_type, payload),
        effect_key,
        sender,
        by.id,
        by.hops + 1,
        parent.key,
        to_run=parent.run,
        traceparent=by.traceparent,
        tracestate=by.tracestate,
        encoded=msgspec.json.encode(payload),
    )


def child_spawned(outgoing: Outgoing, key: str, now: datetime) -> Child:
    """The row of a child that comes to be under `key`."""
    link = outgoing.parent
    assert link is not None
    return Child(
        link.pk,
        link.run,
        link.revision,
        link.position,
        outgoing.target,
        key,
        outgoing.effect_key,
        now,
        outgoing.on_parent_cancel,
    )


def child_named(link: ParentLink, message: Envelope, *, spawned_at: datetime) -> Child:
    """The row of a child whose first message has been addressed anew."""
    return Child(
        link.pk,
        link.run,
        link.revision,
        link.position,
        message.saga_id,
        message.key,
        link.effect_key,
        spawned_at,
    )


def _child_ended(
    link: ParentLink, saga_id: str, key: str, run: int, *, status: ChildStatus, spawned_at: datetime, now: datetime
) -> Child:
    """The row of a child that is over."""
    return Child(
        link.pk,
        link.run,
        link.revision,
        link.position,
        saga_id,
        key,
        link.effect_key,
        spawned_at,
        status=status,
        run=run,
        ended_at=now,
    )


def child_end_of(instance: Instance, link: ParentLink) -> Child:
    """The row of a run that is over, as the child that it was."""
    status: ChildStatus = "failed"
    if instance.status == "completed" or instance.status == "cancelled":
        status = instance.status
    return _child_ended(
        link,
        instance.saga_id,
        instance.key,
        instance.run,
        status=status,
        spawned_at=instance.created_at,
        now=instance.updated_at,
    )


def refused_child(
    link: ParentLink, message: Envelope, *, reason: str, now: datetime, run: int = 0
) -> tuple[Child, Outgoing]:
    """The row of a child that never came to be, and what its parent hears of it."""
    saga_id, key = message.saga_id, message.key
    known = end_of_child(saga_id, key, run or 1) if key else {"sagaId": saga_id}
    payload = {**known, "reason": reason}
    told = end_told(
        link,
        f"{saga_id}:failed",
        payload,
        sender=(saga_id, key, run),
        by=message,
        effect_key=derived_id("rc", link.effect_key),
    )
    row = _child_ended(link, saga_id, key, run, status="failed", spawned_at=message.accepted_at, now=now)
    return row, told
