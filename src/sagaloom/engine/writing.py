"""The Decision of a message that was applied: the run after it, its history row, and what it sets going.

An applied message makes the revision grow by one (I2), and so does nothing else. Its history row holds the steps, and
the state before and after it unless the saga is `t1`. Folding the applied rows gives status and revision of the run
(I6).

- A run that is over has no steps left to undo, no gathered messages and no timers, and tells its parent.
- A message that has a compensation is an applied step from now on, until it is undone or a pivot is passed. What
  `ALL_STEPS` may have to undo is kept in the run with the state, and bounded with it.
- What could not be undone is carried on by a message of origin `undo`, which is written with this decision; or by the
  dead letter of one, when it has no attempts left. `compensation.py` tells when that happens.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from sagaloom.engine.compensation import UNDO
from sagaloom.engine.controls import CANCEL
from sagaloom.engine.families import child_end_of, end_of_child
from sagaloom.engine.giving_up import letter_of
from sagaloom.engine.ledger import LIMIT_EXCEEDED, Refused
from sagaloom.engine.lifecycle import TERMINAL
from sagaloom.engine.moments import DETAIL_MAX, moments_of
from sagaloom.engine.records import (
    AppliedStep,
    DeadLetter,
    DecideContext,
    Decision,
    Envelope,
    FeedKind,
    FeedMoment,
    FeedRecord,
    HistoryEntry,
    Instance,
    ParentLink,
    Undoing,
)
from sagaloom.engine.retrying import backoff, describe, is_retryable, storable
from sagaloom.engine.transition import HandlerRaised, Transition
from sagaloom.ids import effect_key

__all__ = ["written"]


def written(transition: Transition, context: DecideContext, *, is_last_attempt: bool = False) -> Decision:
    """The Decision of a message that was applied."""
    definition, message, instance = transition.definition, transition.envelope, transition.instance
    saga_id, key, message_type, message_id = definition.id, message.key, message.type, message.id
    now, run, revision = transition.now, transition.run, transition.revision
    status, state = transition.status, transition.state
    reason = None if transition.reason is None else storable(transition.reason)
    applied, undoing, pivot = transition.applied, transition.undoing, transition.pivot
    parent = instance.parent if instance is not None else message.parent
    is_over = status in TERMINAL
    if is_over:
        applied, undoing = (), None
        transition.gathered = ()
        transition.end_all_timers()
        if parent is not None and message.origin != "parent":
            _tell_parent(transition, parent)
    elif message_type in definition.compensations and not transition.is_current_undone:
        applied = _with_step(transition)
    elif definition.pivots and status == "running" and message_type in definition.pivots:
        applied, pivot = (), message_type
    carrying: _Carrying | None = None
    if transition.trouble is not None and undoing is not None:
        carrying = _carry_on(transition, undoing, transition.trouble, is_last_attempt=is_last_attempt)
        undoing = carrying.undoing
    entries = instance.entries + 1 if instance is not None else 1
    new = Instance(
        saga_id,
        key,
        context.head.pk,
        run,
        status,
        revision,
        state,
        definition.version,
        definition.durability,
        instance.created_at if instance is not None else now,
        now,
        entries,
        instance.bystanders if instance is not None else 0,
        instance.message_count + 1 if instance is not None else 1,
        message_type,
        transition.result,
        reason if reason is not None or instance is None or is_over else instance.reason,
        now if status == "completed" else None,
        now if is_over else None,
        instance is not None and instance.is_paused and message_type != CANCEL,
        parent,
        instance.traceparent if instance is not None else message.traceparent,
        instance.tracestate if instance is not None else message.tracestate,
        applied,
        transition.open_timers,
        "json",
        undoing,
        pivot,
        transition.spawned if instance is None else instance.children + transition.spawned,
        transition.gathered,
    )
    keeps_states = definition.durability != "t1"
    steps = transition.records()
    entry = HistoryEntry(
        entries,
        revision,
        "applied",
        message_type,
        message_id,
        now,
        transition.status_before,
        status,
        steps,
        message.attempt + 1,
        message.payload,
        reason,
        message.origin,
        message.causation_id,
        message.traceparent,
        message.tracestate,
        transition.state_before if keeps_states else None,
        state if keeps_states else None,
        definition.version,
    )
    decision = Decision(
        "applied",
        reason,
        new,
        instance is None,
        entry,
        tuple(transition.effects),
        tuple(transition.outgoing),
        transition.timers,
        transition.timers_ended,
        None,
        FeedRecord(now, saga_id, key, run, revision, message_type, message_id, moments_of(transition, steps, reason)),
    )
    if is_over and parent is not None:
        decision = msgspec.structs.replace(decision, child_end=child_end_of(new, parent))
    return decision if carrying is None else _with_carrying(decision, carrying)


class _Carrying(NamedTuple):
    """Who carries on what is left to undo: a message, or a dead letter that has it; neither when one is under way."""

    undoing: Undoing
    message: Envelope | None = None
    letter: DeadLetter | None = None


def _carry_on(
    transition: Transition, undoing: Undoing, trouble: HandlerRaised | Refused, *, is_last_attempt: bool
) -> _Carrying:
    envelope, policy = transition.envelope, transition.definition.retry
    error = trouble.error if isinstance(trouble, HandlerRaised) else trouble
    if undoing.token and envelope.origin not in ("undo", "operator", "parent"):
        return _Carrying(msgspec.structs.replace(undoing, error=describe(error)))
    step = undoing.next_of(transition.applied)
    token = f"un{effect_key(envelope.saga_id, envelope.key, transition.run, transition.revision, -1)}"
    message = Envelope(
        envelope.saga_id,
        envelope.key,
        UNDO,
        token,
        msgspec.json.encode({"step": None if step is None else step.type}),
        transition.now,
        "undo",
        transition.run,
        dedupe_key=token,
        traceparent=envelope.traceparent,
        tracestate=envelope.tracestate,
        causation_id=envelope.id,
        hops=envelope.hops,
    )
    undoing = msgspec.structs.replace(undoing, token=token, error=describe(error), dead_letter_id=None)
    if isinstance(trouble, Refused) and trouble.code == LIMIT_EXCEEDED and transition.has_steps:
        return _Carrying(undoing, message)  # Too much for one decision: the next one goes on where this one stopped.
    has_attempts = policy.maximum_attempts > 1 and not is_last_attempt
    if has_attempts and not isinstance(trouble, Refused) and is_retryable(error, policy):
        retry_at = transition.now + backoff(policy, attempt=1, message_id=token)
        message = msgspec.structs.replace(message, attempt=1, due_at=retry_at, last_error=undoing.error)
        return _Carrying(undoing, message)
    message = msgspec.structs.replace(message, attempt=envelope.attempt if is_last_attempt else 0)
    letter = letter_of(transition.definition, transition.instance, message, transition.now, error)
    return _Carrying(msgspec.structs.replace(undoing, dead_letter_id=letter.id), letter=letter)


def _with_carrying(decision: Decision, carrying: _Carrying) -> Decision:
    feed, letter = decision.feed, carrying.letter
    if letter is not None and feed is not None:
        moment = FeedMoment(FeedKind.DEAD_LETTERED, "compensating", letter.reason[:DETAIL_MAX])
        feed = msgspec.structs.replace(feed, moments=(*feed.moments, moment))
    follow_ups = () if carrying.message is None else (carrying.message,)
    return msgspec.structs.replace(decision, follow_ups=follow_ups, dead_letter=letter, feed=feed)


def _with_step(transition: Transition) -> tuple[AppliedStep, ...]:
    """The applied steps with this message: what a later `ALL_STEPS` would undo."""
    message, applied, size_max = transition.envelope, transition.applied, transition.limits.state_bytes_max
    size = len(transition.state) + len(message.payload) + sum(len(step.payload) for step in applied)
    if size > size_max:
        transition.refuse(
            LIMIT_EXCEEDED,
            f"the state and the {len(applied) + 1} applied steps that may have to be compensated have {size} bytes, "
            f"at most {size_max} are allowed: complete the run sooner, or keep large data elsewhere",
        )
    return (*applied, AppliedStep(message.type, message.id, message.payload, transition.revision))


def _tell_parent(transition: Transition, parent: ParentLink) -> None:
    saga_id, key, run = transition.definition.id, transition.envelope.key, transition.run
    payload = end_of_child(saga_id, key, run)
    if transition.status == "completed":
        payload["result"] = None if transition.result is None else msgspec.json.decode(transition.result)
    else:
        payload["reason"] = None if transition.reason is None else storable(transition.reason)
    transition.tell_parent(parent, f"{saga_id}:{transition.status}", payload)
