"""What one message does to one instance, decided as a value.

`decide(definition, instance, message, context) -> Decision` is the whole engine, and it is pure: it reads no clock, no
randomness and no world, it logs nothing and writes nothing. The same four arguments give an equal Decision, today,
after a crash and in another process; that is what makes it safe to decide again whenever a commit was refused or its
answer was lost. Somebody else writes the Decision down, all of it or nothing.

**The walk.**

    message ──► which run? ──► may it be applied? ──► load state ──► steps ──► applied
                   │                  │                   │            │
                   │                  │                   │            ├─ a handler raised ──► pending | dead_lettered
                   │                  │                   │            └─ refused ───────────► dead_lettered
                   │                  │                   ├─ unreadable, no migration ───────► dead_lettered
                   │                  │                   └─ made by a newer definition ─────► pending, no attempt spent
                   │                  ├─ the run is paused ──────────────────────────────────► deferred
                   │                  └─ no handler, no instance, too many hops ─────────────► dead_lettered | ignored
                   └─ bound to a run that is over, or the key takes no more ─────────────────► ignored

1. *Which run.* `instance` is the newest run of the key, or the one the envelope is bound to. An envelope that opens a
   run of its own always opens run `head.run + 1`; any other starting message does so when no run is there, or when
   the newest is terminal and the saga says `.reuse("new_run")`. A bound envelope (timer, reply, end of a child) never
   opens a run. A terminal run takes nothing (I1): the message is ignored, and recorded in that run's history while
   fewer than `bystander_rows_max` such rows are there, then counted. Timers of a finished run end without a trace.
   A key whose newest run was removed after its time (a *tombstone*) takes what that run would have taken, which is a
   starting message that opens the next one, or nothing.
   A paused run defers whatever comes, except what operators ask for themselves (`controls.py`).
2. *State.* Decoded from bytes anew for each step, so that no handler sees an object that another one, or an attempt
   that failed, has changed. State of an older definition is brought up to date first, version by version.
3. *Steps.* The forward handler, then the compensations it asks for (`compensation.py`), in one decision and one
   revision (I2). `lifecycle.py` says which status follows; `ledger.py` writes the effects down and numbers them.
4. *Failure.* What user code raises is retried by the saga's policy (`retrying.py`). What the engine refuses (a handler
   that returned a coroutine, a state that cannot be encoded, a broken invariant) would be refused for ever, and is a
   dead letter at once. Either way nothing of the decision's changes remains: a Decision that is not `applied` carries
   no effects, no timers, no new state.

**Counting.** An applied message makes the revision grow by one (I2), and so does nothing else. `entries` numbers every
history row; `bystanders` counts the messages that changed nothing. Folding the applied rows gives status and revision
of the run (I6). A fired timer leaves `Instance.timers` with the decision that consumes it, whatever that decision is.

**The feed.** Each applied message shows `saga:message_received`, `saga:started` if it opened a run,
`saga:state_changed` for each step, `saga:compensating` when a step leads there, and `saga:completed` or `saga:failed`
at the end. What is given up shows `saga:dead_lettered`, and so does an effect; one that has left shows
`saga:effect_dispatched`, which the dispatcher writes. A control shows `saga:message_received`, then `saga:cancelled` or
what has changed.

What we dislike about it: a handler that loops for ever stops the worker, for a synchronous call cannot be cut short;
and traceback texts read the source files of the frames they show, which is the one look at the world in here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any, Final, Literal, NamedTuple

import msgspec

from sagaloom.codec import encode_any
from sagaloom.definitions import HandlerBinding, SagaDefinition, SagaHandler, SagaInstanceStatus
from sagaloom.effects import saga_fail
from sagaloom.engine.compensation import begin_unwinding, carry_out, go_on, skip_next
from sagaloom.engine.controls import (
    CANCEL,
    MIGRATE,
    SKIP,
    advanced,
    apply_control,
    children_go_along,
    needs_definition,
    recorded,
    said_by,
    why_in_vain,
    why_said,
)
from sagaloom.engine.correlation import dead_letter_id
from sagaloom.engine.expecting import UNEXPECTED, gather, handler_during, why_not_gathered
from sagaloom.engine.families import child_end_of, end_of_child, refused_child
from sagaloom.engine.ledger import LIMIT_EXCEEDED, Refused
from sagaloom.engine.lifecycle import is_terminal
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
    StepRecord,
    Undoing,
)
from sagaloom.engine.retrying import (
    USER_ERRORS,
    backoff,
    describe,
    has_to_be_awaited,
    is_retryable,
    storable,
    traceback_text,
)
from sagaloom.engine.signals import Update, answered, binding_of, refused_update
from sagaloom.engine.timer_controls import apply_timer_control, as_shown, is_timer_control, why_no_timer
from sagaloom.engine.transition import ASKED_NOTHING, STATE_UNREADABLE, HandlerRaised, Transition, without_fired
from sagaloom.errors import HandlerError, InstanceNotFound, SagasError, UpdateRefused
from sagaloom.ids import effect_key, instance_id
from sagaloom.messages import SagaMessage

__all__ = ["DecideContext", "MadeByNewer", "decide", "readable_state", "steer"]

HANDLER_MISSING: Final = "SAGA_HANDLER_MISSING"
HOPS_EXCEEDED: Final = "SAGA_HOPS_EXCEEDED"
MIGRATION_FAILED: Final = "SAGA_MIGRATION_FAILED"
UNDO: Final = "saga:undo"
_PASSES_PAUSE: Final = ("operator", "parent")
_DETAIL_MAX: Final = 2_000  # The feed is kept in memory by those who watch. History has the whole of it.


class _Stale(Exception):
    """A message of the engine's own that nobody waits for any more."""


class MadeByNewer(Exception):
    """The stored state belongs to a newer version of the definition than this worker has."""


def decide(
    definition: SagaDefinition[Any], instance: Instance | None, message: Envelope, context: DecideContext
) -> Decision:
    """Everything that `message` asks for. Never raises for what users did; see the theory above."""
    is_bound = message.run is not None
    if is_bound and (instance is None or instance.run != message.run):
        return Decision("ignored", f"run {message.run} of {definition.id}:{message.key} is gone")
    binding = definition.handlers.get(message.type)
    if message.opens_run:
        instance = None
    elif instance is not None:
        if is_terminal(instance.status):
            if is_bound or definition.reuse != "new_run" or binding is None or not binding.starts:
                if message.parent is not None and message.origin != "parent":
                    return _refuse_child(instance, message, context, message.parent)
                return _ignore_terminal(instance, message, context)
            instance = None
        elif message.parent is not None and message.origin != "parent":
            return _refuse_child(instance, message, context, message.parent)
        elif instance.is_paused and message.origin not in _PASSES_PAUSE:
            return Decision("deferred", f"run {instance.run} of {definition.id}:{message.key} is paused")
    elif context.head.ended_as is not None and (definition.reuse != "new_run" or binding is None or not binding.starts):
        return _ignore_removed(message, context)
    if message.hops > context.limits.hops_max:
        return _give_up(
            definition,
            instance,
            message,
            context,
            Refused(
                f"saga {definition.id!r}: {message.type!r} is message number {message.hops} of a cascade, and at most "
                f"{context.limits.hops_max} may follow from one: sagas that send to each other in a circle?",
                code=HOPS_EXCEEDED,
            ),
        )
    if binding is None:
        # No saga handles what the engine sends itself, so nobody else has to ask whether this is of that kind.
        if message.origin in _PASSES_PAUSE or (message.origin == "timer" and message.type == CANCEL):
            return steer(instance, message, context, definition=definition)
        if message.origin == "undo" and message.type == UNDO and instance is not None:
            return _safely(definition, instance, message, context, _go_on_undoing)
        binding = binding_of(definition, message.type)
    if binding is None:
        if message.origin == "child" and instance is not None:
            return _ignore(instance, message, context, f"saga {definition.id!r} has no handler for {message.type!r}")
        handled = ", ".join(definition.handlers)
        missing = Refused(
            f"saga {definition.id!r} has no handler for {message.type!r} any more: it handles {handled}; load the "
            "definition that has one, and redrive",
            code=HANDLER_MISSING,
        )
        return _give_up(definition, instance, message, context, missing)
    if instance is None and not binding.starts:
        return _without_instance(definition, binding, message, context)
    try:
        return _apply(definition, binding, instance, message, context)
    except HandlerRaised as raised:
        if binding.answers and isinstance(raised.error, UpdateRefused) and instance is not None:
            return refused_update(_ignore(instance, message, context, raised.error.message), raised.error)
        decision = _after_error(definition, instance, message, context, raised.error)
        if decision.disposition == "dead_lettered" and raised.compensating is not None:
            # Its last attempt: what the handler did stands, and the compensation is left to be done.
            with contextlib.suppress(Exception):
                decision = _apply(definition, binding, instance, message, context, leaves_failures=True)
        # An error object that the handler keeps and raises again collects the frames of every raise otherwise.
        raised.error.__traceback__ = None
        return decision
    except MadeByNewer as newer:
        return _wait_for_newer(definition, message, context, str(newer))
    except Refused as refused:
        return _give_up(definition, instance, message, context, refused)
    except Exception as error:  # noqa: BLE001
        # An effect built by hand out of the wrong parts can fail anywhere in the ledger. Raised from here it would
        # stop the neighbours of this message, and come back; as a dead letter its traceback shows whose fault it is.
        return _give_up(definition, instance, message, context, error)


def steer(
    instance: Instance | None,
    message: Envelope,
    context: DecideContext,
    *,
    definition: SagaDefinition[Any] | None = None,
) -> Decision:
    """What an operator's control does to a run. It needs no definition unless something is to be undone: one that is
    gone keeps nobody from terminating what it left behind."""
    if instance is None or (message.run is not None and message.run != instance.run):
        named = "run" if message.run is None else f"run {message.run}"
        return Decision("ignored", f"there is no {named} of {message.saga_id}:{message.key}")
    if message.parent is not None and (
        instance.parent is None or instance.parent.effect_key != message.parent.effect_key
    ):
        return Decision("ignored", f"run {instance.run} of {message.saga_id}:{message.key} is not that child")
    if is_terminal(instance.status):
        return _ignore_terminal(instance, message, context)
    is_about_timer = is_timer_control(message)
    in_vain = why_no_timer(instance, message) if is_about_timer else why_in_vain(instance, message)
    if in_vain is not None:
        return _ignore(instance, message, context, in_vain)
    if is_about_timer:
        return apply_timer_control(instance, message, context.now)
    if not needs_definition(instance, message):
        return apply_control(instance, message, context.now)
    if definition is None:
        todo = "a state to migrate" if message.type == MIGRATE else f"{len(instance.steps)} steps to undo"
        reason = (
            f"run {instance.run} has {todo}, and saga {message.saga_id!r} is not loaded here: load its module, or "
            "terminate the run"
        )
        return _ignore(instance, message, context, reason)
    if message.type == MIGRATE:
        return _migrate(definition, instance, message, context)
    if message.type == SKIP:
        return _safely(definition, instance, message, context, _skip)
    decision = _safely(definition, instance, message, context, _unwind)
    if decision.disposition != "applied" or decision.instance is None:
        return decision
    follow_ups = (*decision.follow_ups, *children_go_along(decision.instance, message))
    return msgspec.structs.replace(decision, follow_ups=follow_ups)


def _safely(
    definition: SagaDefinition[Any],
    instance: Instance,
    message: Envelope,
    context: DecideContext,
    undo: Callable[[Transition], None],
) -> Decision:
    """What comes of undoing something without a message of the saga's own."""
    try:
        transition = Transition(definition, instance, message, context, readable_state(definition, instance))
        undo(transition)
        return _written(transition, context)
    except HandlerRaised as raised:
        decision = _after_error(definition, instance, message, context, raised.error)
        raised.error.__traceback__ = None
        return decision
    except MadeByNewer as newer:
        return _wait_for_newer(definition, message, context, str(newer))
    except _Stale as stale:
        return Decision("ignored", str(stale))
    except Refused as refused:
        if message.origin == "operator":
            # Whoever asked hears why, and asks again when it is mended.
            return _ignore(instance, message, context, refused.message)
        return _give_up(definition, instance, message, context, refused)


def _migrate(
    definition: SagaDefinition[Any], instance: Instance, message: Envelope, context: DecideContext
) -> Decision:
    """An operator's migrate: the state in the definition's version, and nothing else."""
    before, after = instance.def_version, definition.version
    if before == after:
        return _ignore(instance, message, context, f"run {instance.run} has version {after} already")
    try:
        state = _migrated(definition, instance)
    except (MadeByNewer, Refused) as error:
        return _ignore(instance, message, context, str(error))
    new = msgspec.structs.replace(advanced(instance, message, context.now), state=state, def_version=after)
    return recorded(
        instance,
        new,
        message,
        reason=why_said(message),
        event=FeedKind.STATE_CHANGED,
        detail=f"migrated from version {before} to {after}",
    )


def _unwind(transition: Transition) -> None:
    """An operator's cancel: everything is undone, and the run ends cancelled."""
    reason = said_by(transition.envelope)
    begin_unwinding(transition, reason)
    undoing = transition.undoing
    asked = undoing.asked if undoing is not None else ()
    go_on(transition, Undoing("", is_unwinding=True, ending="cancelled", reason=reason, asked=asked))


def _skip(transition: Transition) -> None:
    assert transition.undoing is not None  # or the control would be in vain
    skip_next(transition, transition.undoing, why_said(transition.envelope))


def _go_on_undoing(transition: Transition) -> None:
    undoing = transition.undoing
    if undoing is None or undoing.token != transition.envelope.id:
        raise _Stale("what was left to undo has been taken on by something else")
    go_on(transition, undoing)
    if transition.trouble is not None and not transition.has_steps:
        raise transition.trouble  # An attempt of this message, and no more than that.


def _apply(
    definition: SagaDefinition[Any],
    binding: HandlerBinding,
    instance: Instance | None,
    message: Envelope,
    context: DecideContext,
    *,
    leaves_failures: bool = False,
) -> Decision:
    state = _initial_state(definition) if instance is None else readable_state(definition, instance)
    typed = context.typed if not leaves_failures else None
    handler = binding.handler
    if binding.during is not None:
        bound, expected = handler_during(definition, binding, state)
        if bound is not None:
            handler = bound
        elif binding.on_unexpected == "fail":
            handler = _failing(expected)
        else:
            return _unexpected(binding, instance, message, context, expected)
    if binding.is_gathered_only and instance is not None:
        why = why_not_gathered(binding, instance.gathered)
        if why is not None:
            return _ignore(instance, message, context, why)
    if typed is None:
        typed = _read(definition, binding, message)
    new_transition = Update if binding.answers else Transition
    transition = new_transition(definition, instance, message, context, state)
    asked = ASKED_NOTHING
    if not binding.is_gathered_only:
        asked = transition.step("handle", handler, typed)
    if binding.joins and asked is ASKED_NOTHING:
        asked = gather(transition, binding, typed)
        if not transition.has_steps:
            transition.step("handle", handler, typed)
    if asked is not ASKED_NOTHING:
        carry_out(transition, asked, leaves_failures=leaves_failures)
    decision = _written(transition, context, is_last_attempt=leaves_failures)
    return answered(decision, transition) if isinstance(transition, Update) else decision


def _unexpected(
    binding: HandlerBinding, instance: Instance | None, message: Envelope, context: DecideContext, expected: str
) -> Decision:
    """A message that comes in a status in which nobody handles it."""
    if binding.on_unexpected == "dead_letter":
        raise Refused(f"saga {message.saga_id!r}: {expected}", code=UNEXPECTED)
    if binding.on_unexpected == "ignore" and instance is not None:
        return _ignore(instance, message, context, expected)
    return Decision("deferred", expected, stands_aside=True)


def _failing(reason: str) -> SagaHandler[Any, Any]:
    return lambda saga, event, context: [saga_fail(reason)]


def _read(definition: SagaDefinition[Any], binding: HandlerBinding, message: Envelope) -> SagaMessage[Any]:
    """The message as the handler takes it."""
    try:
        payload = binding.codec.decode(message.payload)
    except SagasError as error:
        raise Refused(
            f"saga {definition.id!r}: the handler for {message.type!r} cannot take its payload: {error.message}",
            code=error.code,
        ) from error
    return SagaMessage(
        binding.type,
        payload,
        message.correlation_key,
        message.idempotency_key,
        message.concurrency_key,
        message.occurred_at,
        message.id,
        message.traceparent,
        message.tracestate,
    )


def _written(transition: Transition, context: DecideContext, *, is_last_attempt: bool = False) -> Decision:
    """The Decision of a message that was applied."""
    definition, message, instance = transition.definition, transition.envelope, transition.instance
    now, run, revision = transition.now, transition.run, transition.revision
    status, state = transition.status, transition.state
    reason = None if transition.reason is None else storable(transition.reason)
    applied, undoing, pivot = transition.applied, transition.undoing, transition.pivot
    parent = instance.parent if instance is not None else message.parent
    is_over = is_terminal(status)
    if is_over:
        applied, undoing = (), None
        transition.gathered = ()
        transition.end_all_timers()
        if parent is not None and message.origin != "parent":
            _tell_parent(transition, parent)
    elif message.type in definition.compensations and not transition.is_current_undone:
        applied = _with_step(transition)
    elif definition.pivots and status == "running" and message.type in definition.pivots:
        applied, pivot = (), message.type
    carrying: _Carrying | None = None
    if transition.trouble is not None and undoing is not None:
        carrying = _carry_on(transition, undoing, transition.trouble, is_last_attempt=is_last_attempt)
        undoing = carrying.undoing
    entries = instance.entries + 1 if instance is not None else 1
    new = Instance(
        definition.id,
        message.key,
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
        message.type,
        transition.result,
        reason if reason is not None or instance is None or is_over else instance.reason,
        now if status == "completed" else None,
        now if is_over else None,
        instance is not None and instance.is_paused and message.type != CANCEL,
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
        message.type,
        message.id,
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
        _shown(transition, steps, reason),
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
    letter = _letter_of(transition.definition, transition.instance, message, transition.now, error)
    return _Carrying(msgspec.structs.replace(undoing, dead_letter_id=letter.id), letter=letter)


def _with_carrying(decision: Decision, carrying: _Carrying) -> Decision:
    feed, letter = decision.feed, carrying.letter
    if letter is not None and feed is not None:
        moment = FeedMoment(FeedKind.DEAD_LETTERED, "compensating", letter.reason[:_DETAIL_MAX])
        feed = msgspec.structs.replace(feed, moments=(*feed.moments, moment))
    follow_ups = () if carrying.message is None else (carrying.message,)
    return msgspec.structs.replace(decision, follow_ups=follow_ups, dead_letter=letter, feed=feed)


def _shown(transition: Transition, steps: tuple[StepRecord, ...], reason: str | None) -> FeedRecord:
    """What the feed shows of a message that was applied."""
    message, before, status = transition.envelope, transition.status_before, transition.status
    is_new = transition.instance is None
    if len(steps) == 1 and reason is None:
        moments = _moments_of_one_step(before, status, is_new=is_new)
    else:
        undo_reason = None if transition.undo_reason is None else storable(transition.undo_reason)
        moments = _moments(before, status, steps, reason, undo_reason, is_new=is_new)
    return FeedRecord(
        transition.now,
        transition.definition.id,
        message.key,
        transition.run,
        transition.revision,
        message.type,
        message.id,
        moments,
    )


# Nearly every message takes one step, and what that shows depends on so little that it is made once.
@lru_cache(maxsize=256)
def _moments_of_one_step(
    before: SagaInstanceStatus, status: SagaInstanceStatus, *, is_new: bool
) -> tuple[FeedMoment, ...]:
    return _moments(before, status, (StepRecord("handle", "", status),), None, None, is_new=is_new)


def _moments(
    before: SagaInstanceStatus,
    status: SagaInstanceStatus,
    steps: tuple[StepRecord, ...],
    reason: str | None,
    undo_reason: str | None,
    *,
    is_new: bool,
) -> tuple[FeedMoment, ...]:
    moments = [FeedMoment(FeedKind.MESSAGE_RECEIVED, before)]
    if is_new:
        moments.append(FeedMoment(FeedKind.STARTED, "running"))
    was_compensating = before == "compensating"
    for step in steps:
        if step.phase == "handle":
            moments.append(FeedMoment(FeedKind.STATE_CHANGED, step.status))
            continue
        if step.phase == "skip":
            moments.append(FeedMoment(FeedKind.STATE_CHANGED, step.status, f"skipped the compensation of {step.type}"))
            continue
        if not was_compensating:
            was_compensating = True
            moments.append(FeedMoment(FeedKind.COMPENSATING, "compensating", undo_reason and undo_reason[:_DETAIL_MAX]))
        moments.append(FeedMoment(FeedKind.STATE_CHANGED, step.status, f"compensated {step.type}"))
    if is_terminal(status):
        moments.append(FeedMoment(_END[status], status, reason and reason[:_DETAIL_MAX]))
    return tuple(moments)


_END: Final = {"completed": FeedKind.COMPLETED, "failed": FeedKind.FAILED, "cancelled": FeedKind.CANCELLED}


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


def _without_instance(
    definition: SagaDefinition[Any], binding: HandlerBinding, message: Envelope, context: DecideContext
) -> Decision:
    """A message for an instance that is not there, and that it may not start."""
    starting = ", ".join(definition.starting_types) or "none"
    reason = (
        f"saga {definition.id!r} has no live instance {message.key!r}, and {message.type!r} does not start one "
        f"(starting: {starting})"
    )
    if binding.on_missing == "discard":
        if message.parent is None:
            return Decision("ignored", reason)
        ended, told = refused_child(message.parent, message, reason=reason, now=context.now)
        return Decision("ignored", reason, outgoing=(told,), child_end=ended)
    if binding.on_missing == "wait":
        deadline = message.accepted_at + binding.patience
        if context.now < deadline:
            return Decision("deferred", reason, retry_at=deadline, stands_aside=True)
        reason += f"; none has come within {binding.patience}"
    return _give_up(definition, None, message, context, InstanceNotFound(reason))


def _refuse_child(instance: Instance, message: Envelope, context: DecideContext, parent: ParentLink) -> Decision:
    """A spawn whose key has a run that was not spawned by it: there is no such child, and the parent hears so."""
    name = instance_id(message.saga_id, message.key, instance.run)
    reason = f"{name} is there already, and is not this child: spawn it under a key of its own"
    ended, told = refused_child(parent, message, reason=reason, now=context.now, run=instance.run)
    return msgspec.structs.replace(_ignore(instance, message, context, reason), outgoing=(told,), child_end=ended)


def _ignore_terminal(instance: Instance, message: Envelope, context: DecideContext) -> Decision:
    reason = f"run {instance.run} is {instance.status} and takes no more messages"
    if message.origin in ("timer", "undo"):
        return Decision("ignored", reason)
    return _ignore(instance, message, context, reason)


def _ignore_removed(message: Envelope, context: DecideContext) -> Decision:
    """A message to a run that has ended, and was removed since: the key takes no more than it did before."""
    head = context.head
    reason = f"run {head.run} is {head.ended_as} and takes no more messages; it was removed when its retention was over"
    if message.parent is None or message.origin == "parent":
        return Decision("ignored", reason)
    name = instance_id(message.saga_id, message.key, head.run)
    reason = f"{name} was there before, and is not this child: spawn it under a key of its own"
    ended, told = refused_child(message.parent, message, reason=reason, now=context.now, run=head.run)
    return Decision("ignored", reason, outgoing=(told,), child_end=ended)


def _ignore(instance: Instance, message: Envelope, context: DecideContext, reason: str) -> Decision:
    entry, counted = _bystander(instance, as_shown(message), context, "ignored", reason)
    feed = None
    if entry is not None:
        feed = _shown_bystander(FeedKind.MESSAGE_RECEIVED, instance, message, context, reason)
    return Decision("ignored", reason, counted, entry=entry, feed=feed)


def _after_error(
    definition: SagaDefinition[Any],
    instance: Instance | None,
    message: Envelope,
    context: DecideContext,
    error: BaseException,
) -> Decision:
    """What comes of an exception of user code: another attempt, or none."""
    attempt, policy = message.attempt + 1, definition.retry
    if attempt >= policy.maximum_attempts or not is_retryable(error, policy):
        return _give_up(definition, instance, message, context, error)
    retry_at = context.now + backoff(policy, attempt=attempt, message_id=message.id)
    return Decision("pending", retry_at=retry_at, error=describe(error))


def _wait_for_newer(definition: SagaDefinition[Any], message: Envelope, context: DecideContext, why: str) -> Decision:
    # No attempt is spent: during a deployment, time alone would turn good messages into dead letters.
    retry_at = context.now + backoff(definition.retry, attempt=message.attempt + 1, message_id=message.id)
    return Decision("pending", retry_at=retry_at, error=why, spends_attempt=False)


def _give_up(
    definition: SagaDefinition[Any],
    instance: Instance | None,
    message: Envelope,
    context: DecideContext,
    error: BaseException,
) -> Decision:
    """The message is a dead letter; of the run it only changes the counters."""
    letter = _letter_of(definition, instance, message, context.now, error)
    reason = letter.reason
    entry = counted = None
    if instance is not None:
        entry, counted = _bystander(instance, message, context, "dead_lettered", reason)
        if message.origin == "undo" and counted.undoing is not None:
            standing = msgspec.structs.replace(counted.undoing, error=describe(error), dead_letter_id=letter.id)
            counted = msgspec.structs.replace(counted, undoing=standing)
    feed = _shown_bystander(FeedKind.DEAD_LETTERED, instance, message, context, reason)
    return Decision("dead_lettered", reason, counted, entry=entry, dead_letter=letter, feed=feed, error=reason)


def _letter_of(
    definition: SagaDefinition[Any],
    instance: Instance | None,
    message: Envelope,
    now: datetime,
    error: BaseException,
) -> DeadLetter:
    """What is kept of a message that is given up for `error`."""
    attempts, state_before, state_after = message.attempt + 1, None, None
    if isinstance(error, Refused):
        code, reason, shown = error.code, error.message, error.traceback
        if error.state_after is not None:
            state_after = error.state_after
            state_before = instance.state if instance is not None else _initial_state(definition)
    elif isinstance(error, InstanceNotFound):
        code, reason, shown = error.code, error.message, None
    else:
        code = error.code if isinstance(error, SagasError) else HandlerError.default_code
        tried = "" if attempts == 1 else f" (attempt {attempts} of {definition.retry.maximum_attempts})"
        reason = f"saga {definition.id!r}: {_doing(message)} failed{tried}: {describe(error)}"
        shown = traceback_text(error)
    return DeadLetter(
        id=dead_letter_id(now, message.saga_id, message.key, message.id, message.attempt),
        at=now,
        saga_id=message.saga_id,
        key=message.key,
        type=message.type,
        code=code,
        reason=reason,
        attempts=attempts,
        traceback=shown,
        envelope=message,
        state_before=state_before,
        state_after=state_after,
    )


def _doing(message: Envelope) -> str:
    if message.type != UNDO:
        return f"handling {message.type!r}"
    step = msgspec.json.decode(message.payload, type=_UndoSaid).step
    return f"undoing {step!r}"


class _UndoSaid(msgspec.Struct):
    """The payload of a message that carries on what is left to undo: which step it was about at first."""

    step: str | None = None


def _bystander(
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


def _shown_bystander(
    kind: FeedKind, instance: Instance | None, message: Envelope, context: DecideContext, detail: str
) -> FeedRecord:
    """What the feed shows of a message that changed nothing."""
    return FeedRecord(
        at=context.now,
        saga_id=message.saga_id,
        key=message.key,
        run=instance.run if instance is not None else 0,
        revision=instance.revision if instance is not None else 0,
        message_type=message.type,
        message_id=message.id,
        moments=(FeedMoment(kind, instance.status if instance is not None else "pending", detail[:_DETAIL_MAX]),),
    )


@lru_cache(maxsize=1024)
def _initial_state(definition: SagaDefinition[Any]) -> bytes:
    try:
        return definition.state_codec.encode(definition.initial_state)
    except SagasError as error:
        raise Refused(
            f"saga {definition.id!r}: its initial state cannot be stored: {error.message}",
            code=error.code,
        ) from error


def readable_state(definition: SagaDefinition[Any], instance: Instance) -> bytes:
    """The state of a run, in the definition's version."""
    return instance.state if instance.def_version == definition.version else _migrated(definition, instance)


def _migrated(definition: SagaDefinition[Any], instance: Instance) -> bytes:
    """The stored state, brought up from its version to the definition's."""
    saga_id, stored, wanted = definition.id, instance.def_version, definition.version
    name = instance_id(saga_id, instance.key, instance.run)
    if stored > wanted:
        raise MadeByNewer(
            f"the state of {name!r} was written by version {stored} of saga {saga_id!r}, and this worker has version "
            f"{wanted}: a worker with version {stored} or newer must take it"
        )
    try:
        state: Any = msgspec.json.decode(instance.state)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Refused(
            f"saga {saga_id!r}: the stored state of {name!r} is no JSON: {error}", code=STATE_UNREADABLE
        ) from error
    for version in range(stored, wanted):
        migrate = definition.migrations.get(version)
        if migrate is None:
            raise Refused(
                f"saga {saga_id!r}: the state of {name!r} has version {stored}, and no migration leads from version "
                f"{version} to {version + 1}: add it to .version({wanted}, migrate={{{version}: ...}}), and redrive",
                code=MIGRATION_FAILED,
            )
        try:
            state = migrate(state)
        except USER_ERRORS as error:
            refused = Refused(
                f"saga {saga_id!r}: the migration of {name!r} from version {version} to {version + 1} raised "
                f"{describe(error)}",
                code=MIGRATION_FAILED,
            )
            refused.traceback = traceback_text(error)
            raise refused from error
        if has_to_be_awaited(state):
            raise Refused(
                f"saga {saga_id!r}: the migration of {name!r} from version {version} to {version + 1} returned "
                f"{type(state).__name__}, which has to be awaited: a migration is a plain function of the old state",
                code=MIGRATION_FAILED,
            )
    try:
        encoded = encode_any(state)
    except SagasError as error:
        raise Refused(
            f"saga {saga_id!r}: the state of {name!r}, migrated to version {wanted}, cannot be written as JSON: "
            f"{error.message}",
            code=MIGRATION_FAILED,
        ) from error
    try:
        read: object = definition.state_codec.decode(encoded)
        # A state without a declared type takes any JSON, and yet it is a dict.
        trouble = (
            f"got {type(read).__name__}" if isinstance(definition.initial_state, dict) != isinstance(read, dict) else ""
        )
    except SagasError as error:
        trouble = error.message
    if trouble:
        raise Refused(
            f"saga {saga_id!r}: the migration of {name!r} from version {stored} returned what is no state of version "
            f"{wanted}: {trouble}",
            code=MIGRATION_FAILED,
        )
    return encoded
