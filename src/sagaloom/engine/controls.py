"""What an operator does to a run: cancel it, pause it, let it go on.

A control is a message like any other: it goes through the inbox of its instance, is decided in its turn, makes the
revision grow by one, and stands in the history. Two things set it apart. Its origin is `operator`, which no door, saga
or target can give a message; and no definition is asked about it, so a run whose saga is no longer loaded can still be
cancelled. Message types that begin with `saga:` belong to the engine, and no saga may handle one. A cancel may also
come from a timer: that is how the configuration of a saga bounds how long a run may take.

    running, compensating --cancel-----> cancelled, or compensating while a compensation fails
    running, compensating --terminate--> cancelled
    any live run          --pause------> the same status, paused
    a paused run          --resume-----> the same status, going on
    a run being unwound   --skip-------> what is left but one step, undone

- *Cancel* undoes every applied step, newest first, and ends the run (`compensation.py` says what happens when a
  compensation fails). Without compensation, or when there is nothing to undo, it ends the run as it stands. Timers end,
  children that were spawned to be cancelled with their parent are (`families.py`), effects that were committed still
  leave, and a parent hears `<saga id>:cancelled`. A run that is unwinding already is left to it.
- *Terminate* ends the run as it stands, whatever it is doing: nothing is undone, and what was left to undo is given up.
- *Pause* keeps messages, replies and timers from being applied: `decide` defers them, and the caller keeps them in
  their order until a control `ends_pause`. Controls themselves are applied to a paused run, effects that were committed
  leave, and answers to them wait like everything else.
- *Migrate* brings the state up to the version of the loaded definition, as the next message would.
- *Skip* leaves out the compensation that fails, for good, and goes on with the next one.
- A control that finds the run as it wants it, or over, is ignored and recorded. One that finds no run is ignored: a key
  whose first message still waits has none, and there is nothing yet to cancel or to pause.

What we dislike about it: a cancel undoes things, and yet is called like what merely stops them elsewhere.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final, Literal, NamedTuple

import msgspec

from sagaloom.definitions import SagaInstanceStatus
from sagaloom.engine.families import cancel_children, child_end_of, end_of_child, end_told
from sagaloom.engine.lifecycle import next_status
from sagaloom.engine.records import (
    Child,
    Decision,
    Envelope,
    FeedKind,
    FeedMoment,
    FeedRecord,
    HistoryEntry,
    Instance,
    Outgoing,
    ParentLink,
)
from sagaloom.engine.retrying import storable
from sagaloom.errors import MessageRejected
from sagaloom.ids import effect_key

__all__ = [
    "CANCEL",
    "MIGRATE",
    "PAUSE",
    "REASON_LENGTH_MAX",
    "RESUME",
    "SKIP",
    "TERMINATE",
    "ControlType",
    "advanced",
    "apply_control",
    "control",
    "ends_pause",
    "needs_definition",
    "recorded",
    "said_by",
    "why_in_vain",
    "why_said",
]

ControlType = Literal["saga:cancel", "saga:terminate", "saga:pause", "saga:resume", "saga:skip", "saga:migrate"]
CANCEL: Final = "saga:cancel"
MIGRATE: Final = "saga:migrate"
PAUSE: Final = "saga:pause"
RESUME: Final = "saga:resume"
SKIP: Final = "saga:skip"
TERMINATE: Final = "saga:terminate"
REASON_LENGTH_MAX: Final = 2_000

_DEFAULT_REASONS: Final = {CANCEL: "cancelled by an operator", TERMINATE: "terminated by an operator"}
_ENDS: Final = (CANCEL, TERMINATE)


class _Said(msgspec.Struct, omit_defaults=True):
    """The payload of a control. `step` is the type of the message whose compensation is to be skipped."""

    reason: str | None = None
    compensate: bool = True
    step: str | None = None


class _Change(NamedTuple):
    """What a control makes of a run."""

    status: SagaInstanceStatus
    is_paused: bool
    event: FeedKind
    """The feed event that shows it."""
    detail: str | None


def control(
    kind: ControlType,
    saga_id: str,
    key: str,
    *,
    message_id: str,
    accepted_at: datetime,
    run: int | None = None,
    reason: str | None = None,
    compensate: bool = True,
    step: str | None = None,
    parent: ParentLink | None = None,
) -> Envelope:
    """The envelope of a control for run number `run`, or for the newest when it is decided. `compensate` is for cancel;
    `step` is for skip: what its author believes to be next. With `parent` it comes from there, and concerns its child
    alone. Raises `MessageRejected` for a reason that is no text or
    too long."""
    if reason is not None and (not isinstance(reason, str) or len(reason) > REASON_LENGTH_MAX):
        size = f"has {len(reason)} characters" if isinstance(reason, str) else f"is {type(reason).__name__}"
        raise MessageRejected(
            f"the reason of {kind!r} {size}: give a text of at most {REASON_LENGTH_MAX} characters, or none",
            data={"field": "reason"},
        )
    said = _Said(storable(reason) if reason else None, compensate, step)
    return Envelope(
        saga_id,
        key,
        kind,
        message_id,
        msgspec.json.encode(said),
        accepted_at,
        "operator" if parent is None else "parent",
        run,
        dedupe_key=message_id,
        parent=parent,
    )


def ends_pause(envelope: Envelope) -> bool:
    """Whether messages that wait for a paused run have to be asked again after this one."""
    return envelope.origin in ("operator", "parent") and envelope.type in (CANCEL, TERMINATE, RESUME)


def needs_definition(instance: Instance, envelope: Envelope) -> bool:
    """Whether the control has something undone or migrated, which only the saga's definition can do."""
    if envelope.type in (SKIP, MIGRATE):
        return True
    if envelope.type != CANCEL or not _said(envelope).compensate:
        return False
    return bool(instance.steps) or instance.undoing is not None


def said_by(envelope: Envelope) -> str:
    """The reason that a control gives, or the one that it has by itself."""
    return _said(envelope).reason or _DEFAULT_REASONS[envelope.type]


def why_said(envelope: Envelope) -> str | None:
    """The reason that whoever sent the control has given."""
    return _said(envelope).reason


def _said(envelope: Envelope) -> _Said:
    return msgspec.json.decode(envelope.payload, type=_Said)


def why_in_vain(instance: Instance, envelope: Envelope) -> str | None:
    """Why a control changes nothing about a live run, or None when it does."""
    if envelope.type == PAUSE and instance.is_paused:
        return f"run {instance.run} is paused already"
    if envelope.type == RESUME and not instance.is_paused:
        return f"run {instance.run} is not paused"
    undoing = instance.undoing
    if envelope.type == CANCEL and undoing is not None and undoing.is_unwinding:
        return (
            f"run {instance.run} is being unwound already: its dead letter can be redriven, the step skipped, or the "
            "run terminated"
        )
    if envelope.type == SKIP:
        return _why_not_skipped(instance, _said(envelope).step)
    return None


def _why_not_skipped(instance: Instance, wanted: str | None) -> str | None:
    undoing = instance.undoing
    if undoing is None:
        return f"run {instance.run} has no compensation that fails: there is nothing to skip"
    step = undoing.next_of(instance.steps)
    if step is None:
        return f"run {instance.run} has nothing left to undo"
    if wanted not in (None, step.type):
        return f"the next compensation of run {instance.run} is that of {step.type!r}, not that of {wanted!r:.80}"
    return None


def apply_control(instance: Instance, envelope: Envelope, now: datetime) -> Decision:
    """The Decision about a live run that the control changes."""
    said = why_said(envelope)
    change = _change(instance, envelope, said)
    is_over = envelope.type in _ENDS
    reason = said_by(envelope) if is_over else instance.reason
    new = msgspec.structs.replace(
        advanced(instance, envelope, now),
        status=change.status,
        reason=reason,
        ended_at=now if is_over else None,
        is_paused=change.is_paused,
        steps=() if is_over else instance.steps,
        timers=() if is_over else instance.timers,
        undoing=None if is_over else instance.undoing,
    )
    decision = recorded(
        instance, new, envelope, reason=reason if is_over else said, event=change.event, detail=change.detail
    )
    if not is_over:
        return decision
    outgoing: tuple[Outgoing, ...] = ()
    ended: Child | None = None
    if instance.parent is not None:
        ended = child_end_of(new, instance.parent)
        if envelope.origin != "parent":
            outgoing = (_end(new, envelope, instance.parent),)
    # The timer that brought it, when a configured timeout cancels, is consumed as the message that it is.
    others = tuple(timer for timer in instance.timers if timer.id != envelope.id)
    return msgspec.structs.replace(
        decision,
        outgoing=outgoing,
        timers_ended=others,
        child_end=ended,
        follow_ups=children_go_along(new, envelope),
    )


def children_go_along(instance: Instance, envelope: Envelope) -> tuple[Envelope, ...]:
    """What the control that ends `instance` sends on its way to the children."""
    if not instance.children:
        return ()
    kind: Literal["saga:cancel", "saga:terminate"] = TERMINATE if envelope.type == TERMINATE else CANCEL
    said = _said(envelope)
    return cancel_children(instance, envelope, kind=kind, compensate=said.compensate, reason=said_by(envelope))


def advanced(instance: Instance, envelope: Envelope, now: datetime) -> Instance:
    """The run one revision on, with nothing else changed."""
    return msgspec.structs.replace(
        instance,
        revision=instance.revision + 1,
        updated_at=now,
        entries=instance.entries + 1,
        message_count=instance.message_count + 1,
        last_message_type=envelope.type,
    )


def recorded(
    before: Instance, new: Instance, envelope: Envelope, *, reason: str | None, event: FeedKind, detail: str | None
) -> Decision:
    """The Decision that a control makes `new` of `before`, with its history row and the feed events that show it."""
    keeps_states = new.tier != "t1"
    entry = HistoryEntry(
        new.entries,
        new.revision,
        "applied",
        envelope.type,
        envelope.id,
        new.updated_at,
        before.status,
        new.status,
        attempt=envelope.attempt + 1,
        payload=envelope.payload,
        reason=reason,
        origin=envelope.origin,
        before=before.state if keeps_states else None,
        after=new.state if keeps_states else None,
        def_version=new.def_version,
    )
    return Decision(
        "applied",
        reason,
        new,
        entry=entry,
        feed=FeedRecord(
            new.updated_at,
            new.saga_id,
            new.key,
            new.run,
            new.revision,
            envelope.type,
            envelope.id,
            (FeedMoment(FeedKind.MESSAGE_RECEIVED, before.status), FeedMoment(event, new.status, detail)),
        ),
    )


def _change(instance: Instance, envelope: Envelope, said: str | None) -> _Change:
    if envelope.type in _ENDS:
        status = next_status(instance.status, "cancel")
        return _Change(status, is_paused=False, event=FeedKind.CANCELLED, detail=said_by(envelope))
    is_paused = envelope.type == PAUSE
    what = "paused" if is_paused else "resumed"
    return _Change(instance.status, is_paused, FeedKind.STATE_CHANGED, f"{what}: {said}" if said else what)


def _end(instance: Instance, envelope: Envelope, parent: ParentLink) -> Outgoing:
    """Tells the parent's run that this one was cancelled."""
    saga_id, key, run = instance.saga_id, instance.key, instance.run
    payload = {**end_of_child(saga_id, key, run), "reason": instance.reason}
    name = effect_key(saga_id, key, run, instance.revision, 0)
    message_type, sender = f"{saga_id}:{instance.status}", (saga_id, key, run)
    traced = msgspec.structs.replace(envelope, traceparent=instance.traceparent, tracestate=instance.tracestate)
    return end_told(parent, message_type, payload, sender=sender, by=traced, effect_key=name)
