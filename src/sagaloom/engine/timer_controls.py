"""What an operator does to a timer of a run: takes it back, or moves it.

A timer is part of its run, so this is a control like those in `controls.py`: a message of origin `operator` that is
decided in its turn, makes the revision grow by one and stands in the history, while no handler runs. It is applied to a
paused run as well, and leaves what waits there waiting.

The control of a move carries the timer's row, because a run knows only when its timers are due, and the row has to be
written anew under its new time. History keeps what was asked, and not that row.

A timer that has fired, or was taken back before the control had its turn, makes the control one that is ignored. Of a
timer that is due at that very moment, whoever was accepted first wins: the row can be consumed once.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final, Literal

import msgspec

from sagaloom.engine.controls import advanced, recorded
from sagaloom.engine.records import Decision, Envelope, FeedKind, Instance, PendingTimer, Timer
from sagaloom.errors import MessageRejected

__all__ = [
    "CANCEL_TIMER",
    "MOVE_TIMER",
    "TimerControlType",
    "apply_timer_control",
    "as_shown",
    "is_timer_control",
    "timer_control",
    "why_no_timer",
]

TimerControlType = Literal["saga:cancel_timer", "saga:move_timer"]
CANCEL_TIMER: Final = "saga:cancel_timer"
MOVE_TIMER: Final = "saga:move_timer"


class _Said(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """The payload of a timer control. `due_at` is where a move leads, `row` the encoded timer that it moves."""

    timer_id: str
    message_type: str
    name: str | None = None
    due_at: datetime | None = None
    row: bytes | None = None


def timer_control(timer: Timer, *, message_id: str, accepted_at: datetime, due_at: datetime | None = None) -> Envelope:
    """The envelope of the control that takes `timer` back, or moves it to `due_at`. Raises `MessageRejected` for a
    moment without a time zone."""
    row: bytes | None = None
    if due_at is not None:
        if not isinstance(due_at, datetime) or due_at.utcoffset() is None:
            raise MessageRejected(
                f"timer {timer.id} cannot be moved to {due_at!r:.80}: give a moment with a time zone, such as "
                "'2026-01-31T12:00:00Z'",
                data={"field": "dueAt"},
            )
        due_at = due_at.astimezone(UTC)
        row = msgspec.msgpack.encode(timer)
    waiting = timer.envelope
    return Envelope(
        waiting.saga_id,
        waiting.key,
        CANCEL_TIMER if due_at is None else MOVE_TIMER,
        message_id,
        msgspec.json.encode(_Said(timer.id, waiting.type, timer.name, due_at, row)),
        accepted_at,
        "operator",
        waiting.run,
        dedupe_key=message_id,
    )


def is_timer_control(envelope: Envelope) -> bool:
    return envelope.type in (CANCEL_TIMER, MOVE_TIMER)


def as_shown(envelope: Envelope) -> Envelope:
    """A control as history shows it: without the row that a move carries."""
    if envelope.type != MOVE_TIMER:
        return envelope
    said = msgspec.structs.replace(_said(envelope), row=None)
    return msgspec.structs.replace(envelope, payload=msgspec.json.encode(said))


def why_no_timer(instance: Instance, envelope: Envelope) -> str | None:
    """Why a timer control changes nothing about a live run, or None when it does."""
    said = _said(envelope)
    if _pending(instance, said) is not None:
        return None
    return f"run {instance.run} waits for no timer {said.timer_id}: it has fired, or was taken back"


def apply_timer_control(instance: Instance, envelope: Envelope, now: datetime) -> Decision:
    """The Decision about a live run that waits for the timer. A moment in the past is now: late rather than never."""
    said = _said(envelope)
    pending = _pending(instance, said)
    assert pending is not None  # `why_no_timer` was asked first
    what = f"timer {said.name or said.timer_id}"
    moved: tuple[PendingTimer, ...] = ()
    rows: tuple[Timer, ...] = ()
    if said.due_at is None or said.row is None:
        detail = f"{what} was cancelled"
    else:
        due_at = max(said.due_at, now)
        timer = msgspec.msgpack.decode(said.row, type=Timer)
        message = msgspec.structs.replace(timer.envelope, accepted_at=due_at)
        detail = f"{what} was moved to {due_at.isoformat().replace('+00:00', 'Z')}"
        moved = (msgspec.structs.replace(pending, due_at=due_at),)
        rows = (msgspec.structs.replace(timer, due_at=due_at, envelope=message),)
    timers = tuple(kept for each in instance.timers for kept in (moved if each is pending else (each,)))
    new = msgspec.structs.replace(advanced(instance, envelope, now), timers=timers)
    decision = recorded(instance, new, as_shown(envelope), reason=detail, event=FeedKind.STATE_CHANGED, detail=detail)
    return msgspec.structs.replace(decision, timers=rows, timers_ended=(pending,))


def _said(envelope: Envelope) -> _Said:
    return msgspec.json.decode(envelope.payload, type=_Said)


def _pending(instance: Instance, said: _Said) -> PendingTimer | None:
    return next((timer for timer in instance.timers if timer.id == said.timer_id), None)
