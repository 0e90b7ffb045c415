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
   opens a run. A terminal run takes nothing (I1): the message is ignored. Timers of a finished run end without a trace.
   A key whose newest run was removed after its time (a *tombstone*) takes what that run would have taken, which is a
   starting message that opens the next one, or nothing.
   A paused run defers whatever comes, except what operators ask for themselves (`controls.py`).
2. *State.* Read from its bytes for each step alone (`read_ahead.py`), so that no handler sees an object that another
   one, or an attempt that failed, has changed. That of an older definition is brought up to date first
   (`migrating.py`).
3. *Steps.* The forward handler, then the compensations it asks for (`compensation.py`), in one decision and one
   revision (I2). `lifecycle.py` says which status follows; `ledger.py` writes the effects down and numbers them.
4. *Failure.* What user code raises is retried by the saga's policy; what the engine refuses is a dead letter at once.
   Either way nothing of the decision's changes remains: a Decision that is not `applied` carries no effects, no timers,
   no new state.

**Where the rest is told.** What a message that was applied leaves behind: `writing.py`. One that is ignored, and how
both are counted: `bystanders.py`. One that is tried again or given up: `giving_up.py`. What those see who watch:
`moments.py`.

What we dislike about it: a handler that loops for ever stops the worker, for a synchronous call cannot be cut short.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Final

import msgspec

from sagaloom.definitions import HandlerBinding, SagaDefinition, SagaHandler
from sagaloom.effects import saga_fail
from sagaloom.engine.bystanders import ignore, ignore_removed, ignore_terminal, refuse_child
from sagaloom.engine.compensation import UNDO, begin_unwinding, carry_out, go_on, skip_next
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
from sagaloom.engine.expecting import UNEXPECTED, gather, handler_during, why_not_gathered
from sagaloom.engine.families import refused_child
from sagaloom.engine.giving_up import after_error, give_up, wait_for_newer
from sagaloom.engine.ledger import Refused
from sagaloom.engine.lifecycle import TERMINAL
from sagaloom.engine.migrating import MadeByNewer, initial_state, migrated, readable_state
from sagaloom.engine.records import (
    DecideContext,
    Decision,
    Envelope,
    FeedKind,
    Instance,
    Undoing,
)
from sagaloom.engine.signals import Update, answered, binding_of, refused_update
from sagaloom.engine.timer_controls import apply_timer_control, is_timer_control, why_no_timer
from sagaloom.engine.transition import ASKED_NOTHING, HandlerRaised, Transition
from sagaloom.engine.writing import written
from sagaloom.errors import InstanceNotFound, SagasError, UpdateRefused
from sagaloom.messages import SagaMessage

__all__ = ["DecideContext", "decide", "steer"]

HANDLER_MISSING: Final = "SAGA_HANDLER_MISSING"
HOPS_EXCEEDED: Final = "SAGA_HOPS_EXCEEDED"
_PASSES_PAUSE: Final = ("operator", "parent")


class _Stale(Exception):
    """A message of the engine's own that nobody waits for any more."""


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
        if instance.status in TERMINAL:
            if is_bound or definition.reuse != "new_run" or binding is None or not binding.starts:
                if message.parent is not None and message.origin != "parent":
                    return refuse_child(instance, message, context, message.parent)
                return ignore_terminal(instance, message, context)
            instance = None
        elif message.parent is not None and message.origin != "parent":
            return refuse_child(instance, message, context, message.parent)
        elif instance.is_paused and message.origin not in _PASSES_PAUSE:
            return Decision("deferred", f"run {instance.run} of {definition.id}:{message.key} is paused")
    elif context.head.ended_as is not None and (definition.reuse != "new_run" or binding is None or not binding.starts):
        return ignore_removed(message, context)
    if message.hops > context.limits.hops_max:
        return give_up(
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
            return ignore(instance, message, context, f"saga {definition.id!r} has no handler for {message.type!r}")
        handled = ", ".join(definition.handlers)
        missing = Refused(
            f"saga {definition.id!r} has no handler for {message.type!r} any more: it handles {handled}; load the "
            "definition that has one, and redrive",
            code=HANDLER_MISSING,
        )
        return give_up(definition, instance, message, context, missing)
    if instance is None and not binding.starts:
        return _without_instance(definition, binding, message, context)
    try:
        return _apply(definition, binding, instance, message, context)
    except HandlerRaised as raised:
        if binding.answers and isinstance(raised.error, UpdateRefused) and instance is not None:
            return refused_update(ignore(instance, message, context, raised.error.message), raised.error)
        decision = after_error(definition, instance, message, context, raised.error)
        if decision.disposition == "dead_lettered" and raised.compensating is not None:
            # Its last attempt: what the handler did stands, and the compensation is left to be done.
            with contextlib.suppress(Exception):
                decision = _apply(definition, binding, instance, message, context, leaves_failures=True)
        # An error object that the handler keeps and raises again collects the frames of every raise otherwise.
        raised.error.__traceback__ = None
        return decision
    except MadeByNewer as newer:
        return wait_for_newer(definition, message, context, str(newer))
    except Refused as refused:
        return give_up(definition, instance, message, context, refused)
    except Exception as error:  # noqa: BLE001
        # An effect built by hand out of the wrong parts can fail anywhere in the ledger. Raised from here it would
        # stop the neighbours of this message, and come back; as a dead letter its traceback shows whose fault it is.
        return give_up(definition, instance, message, context, error)


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
    if instance.status in TERMINAL:
        return ignore_terminal(instance, message, context)
    is_about_timer = is_timer_control(message)
    in_vain = why_no_timer(instance, message) if is_about_timer else why_in_vain(instance, message)
    if in_vain is not None:
        return ignore(instance, message, context, in_vain)
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
        return ignore(instance, message, context, reason)
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
        return written(transition, context)
    except HandlerRaised as raised:
        decision = after_error(definition, instance, message, context, raised.error)
        raised.error.__traceback__ = None
        return decision
    except MadeByNewer as newer:
        return wait_for_newer(definition, message, context, str(newer))
    except _Stale as stale:
        return Decision("ignored", str(stale))
    except Refused as refused:
        if message.origin == "operator":
            # Whoever asked hears why, and asks again when it is mended.
            return ignore(instance, message, context, refused.message)
        return give_up(definition, instance, message, context, refused)


def _migrate(
    definition: SagaDefinition[Any], instance: Instance, message: Envelope, context: DecideContext
) -> Decision:
    """An operator's migrate: the state in the definition's version, and nothing else."""
    before, after = instance.def_version, definition.version
    if before == after:
        return ignore(instance, message, context, f"run {instance.run} has version {after} already")
    try:
        state = migrated(definition, instance)
    except (MadeByNewer, Refused) as error:
        return ignore(instance, message, context, str(error))
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
    state = initial_state(definition) if instance is None else readable_state(definition, instance)
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
            return ignore(instance, message, context, why)
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
    decision = written(transition, context, is_last_attempt=leaves_failures)
    return answered(decision, transition) if isinstance(transition, Update) else decision


def _unexpected(
    binding: HandlerBinding, instance: Instance | None, message: Envelope, context: DecideContext, expected: str
) -> Decision:
    """A message that comes in a status in which nobody handles it."""
    if binding.on_unexpected == "dead_letter":
        raise Refused(f"saga {message.saga_id!r}: {expected}", code=UNEXPECTED)
    if binding.on_unexpected == "ignore" and instance is not None:
        return ignore(instance, message, context, expected)
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
    return give_up(definition, None, message, context, InstanceNotFound(reason))
