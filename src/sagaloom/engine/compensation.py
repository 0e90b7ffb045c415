"""Which compensations run, in which order, how that ends a run, and what is left when one of them fails.

A handler's whole list is written down first; then its compensations run one after the other in the order of the list,
each with all that it asks for itself, depth first; then the run ends, if the list says so. The rules:

- `saga_compensate(message)` runs the compensation registered for the type of `message`, with that message. None
  registered is the author's mistake. The applied step that it undoes (the one with the message's id, else the newest
  of its type) is taken off the list of steps, so that nothing undoes it a second time.
- `saga_fail` in a forward handler runs the compensation of the current type first, unless the list asked for it
  already. In a compensation it ends the run; so a compensation that fails the run cannot start itself again.
- `saga_compensate(ALL_STEPS)` unwinds: it runs the compensation of every applied step that is left, newest first, and
  ends the run failed. A `saga_fail` in one of them gives the reason, if nobody gave one, and stops nothing; a
  `saga_complete` is a contradiction. An operator's cancel unwinds the same way, and ends the run cancelled.
- A run ends once. Several failures in one decision are one end, whose reason is the forward handler's, else the first
  one's; any other second end is an error, for one of the two handlers is mistaken about what happens.
- Compensations that compensate are nested, at most `compensation_depth_max` deep: a cycle is an error, not a hang.
- A pivot is a point of no return: when its message has been applied, the steps before it are steps no more.

**When a compensation fails.** What was undone stays undone: the failing one alone is rolled back, with what it had
asked for; the rest is committed, and `Undoing` says what is left. One message of origin `undo` (`saga:undo`) carries it
on, with the attempts that the saga's policy allows for each step that fails; when they are used up it is a dead letter,
and the run stands there `compensating` until an operator redrives the letter, skips the step, or terminates the run.

    unwinding ──a step fails──► compensating, saga:undo waits ──► goes on ──► over
                                        │ attempts used up           ▲
                                        ▼                            │ redrive | skip
                                   dead letter ──────────────────────┘

A compensation that was asked for by name is part of its message as long as that has attempts left: nothing is written,
and both are tried again. Only the last attempt leaves it to `saga:undo`. Messages go on being applied meanwhile. A step
that comes in while the run unwinds is undone with the rest; a handler cannot complete such a run, and one that fails it
or asks for `ALL_STEPS` again makes it try at once.

What we dislike about it: the attempts of a step begin anew when the message that carries it on has undone another one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import msgspec

from sagaloom.codec import encode_any
from sagaloom.definitions import CompensationBinding
from sagaloom.effects import Compensate, Complete, Fail
from sagaloom.engine.ledger import HANDLER_RESULT, LIMIT_EXCEEDED, Refused
from sagaloom.engine.lifecycle import next_status
from sagaloom.engine.records import AppliedStep, Undoing
from sagaloom.engine.transition import Asked, HandlerRaised, Transition
from sagaloom.errors import SagasError
from sagaloom.messages import SagaMessage

__all__ = ["UNDO", "UNWINDING", "begin_unwinding", "carry_out", "go_on", "skip_next"]

UNDO: Final = "saga:undo"
"""The type of the message that carries on what is left."""

UNWINDING: Final = Undoing("", is_unwinding=True, ending="failed")
"""Everything is left to undo."""


def carry_out(transition: Transition, asked: Asked, *, leaves_failures: bool = False) -> None:
    """Does what the forward handler's list asks of the run itself: compensations, then the end. With `leaves_failures`
    a compensation that was asked for by name and fails is left undone, with those behind it, instead of raising."""
    ending, before = asked.ending, transition.undoing
    if isinstance(ending, Complete) and before is None and not asked.compensations:
        transition.complete(ending)
        return
    current = transition.envelope.type
    own = transition.definition.compensations.get(current) if isinstance(ending, Fail) else None
    if own is not None or asked.compensations or isinstance(ending, Compensate):
        begin_unwinding(transition, None)
        first = asked.compensations[0] if asked.compensations else ending
        transition.undo_reason = first.reason if isinstance(first, (Compensate, Fail)) else None
    wanted = [partial(_compensate, transition, effect, path=()) for effect in asked.compensations]
    if own is not None:
        wanted.append(partial(_compensate_current, transition, own))
    for number, undo in enumerate(wanted):
        if not leaves_failures:
            undo()
        elif not _attempt(transition, undo):
            left = [_as_step(transition, effect) for effect in asked.compensations[number:]]
            mine = _current_step(transition)
            is_left = any((step.type, step.id) == (mine.type, mine.id) for step in left)
            if own is not None and not transition.is_current_undone and not is_left:
                left.append(mine)
            _leave(transition, ending, tuple(left))
            return
    _finish(transition, ending, path=(), by=f"the handler for {current!r}")
    if isinstance(ending, Fail) and before is None and transition.undoing is None:
        transition.reason = ending.reason


def begin_unwinding(transition: Transition, reason: str | None) -> None:
    """Makes the run `compensating`. `reason` is shown to those who watch."""
    transition.status = next_status(transition.status, "compensate")
    transition.undo_reason = reason


def go_on(transition: Transition, undoing: Undoing) -> None:
    """Undoes what is left, as far as it goes, and then ends the run as `undoing` says."""
    left: Undoing | None = undoing
    transition.undoing = undoing
    while left is not None and left.asked:
        if not _attempt(transition, partial(_undo_asked, transition, left)) or transition.trouble is not None:
            return
        left = transition.undoing
    if left is None:
        return  # One of those it undid has unwound and ended it.
    if left.is_unwinding:
        _unwind(transition)
    else:
        _end(transition)


def skip_next(transition: Transition, undoing: Undoing, reason: str | None) -> None:
    """Leaves the next compensation out, for good, and goes on behind it."""
    step = undoing.next_of(transition.applied)
    assert step is not None
    if undoing.asked:
        undoing = msgspec.structs.replace(undoing, asked=undoing.asked[1:])
    else:
        transition.applied = transition.applied[:-1]
    transition.note_skipped(step.type, reason)
    go_on(transition, undoing)


def _leave(transition: Transition, ending: Complete | Fail | Compensate | None, left: tuple[AppliedStep, ...]) -> None:
    """Notes what a handler has asked for and is still to be done."""
    before = transition.undoing
    left = (*(before.asked if before is not None else ()), *left)
    result = transition.encode_result(ending.result) if isinstance(ending, Complete) else None
    reason = ending.reason if isinstance(ending, (Fail, Compensate)) else None
    transition.undoing = Undoing(
        before.token if before is not None else "",
        isinstance(ending, Compensate) or (before is not None and before.is_unwinding),
        "completed"
        if isinstance(ending, Complete)
        else "failed"
        if ending is not None
        else before.ending
        if before is not None
        else None,
        reason or transition.reason or (before.reason if before is not None else None),
        result,
        left,
    )


def _compensate_each(transition: Transition, compensations: tuple[Compensate, ...], *, path: tuple[str, ...]) -> None:
    for effect in compensations:
        _compensate(transition, effect, path=path)


def _compensate(transition: Transition, effect: Compensate, *, path: tuple[str, ...]) -> None:
    message = effect.message
    if message is None:
        return  # ALL_STEPS is an ending, and never in such a list.
    if transition.trouble is not None:
        # An unwinding within has failed: this comes behind it.
        _leave(transition, None, (_as_step(transition, effect),))
        return
    binding = _binding(transition, message.type)
    if effect.reason is not None and not transition.is_over:
        transition.reason = effect.reason
    undone = _take_off(transition, message)
    typed = _message(transition, binding, _encoded(transition, message), given=message, undone=undone)
    _run(transition, binding, typed, path=path)


def _compensate_current(transition: Transition, own: CompensationBinding) -> None:
    if transition.is_current_undone:
        return
    if transition.trouble is not None:
        _leave(transition, None, (_current_step(transition),))
        return
    transition.is_current_undone = True
    _run(transition, own, _message(transition, own, transition.envelope.payload), path=())


def _undo_asked(transition: Transition, undoing: Undoing) -> None:
    step = undoing.asked[0]
    transition.undoing = msgspec.structs.replace(undoing, asked=undoing.asked[1:])
    binding = _binding(transition, step.type)
    transition.applied = tuple([each for each in transition.applied if (each.type, each.id) != (step.type, step.id)])
    _run(transition, binding, _message(transition, binding, step.payload, undone=step), path=())


def _run(
    transition: Transition, binding: CompensationBinding, message: SagaMessage[Any], *, path: tuple[str, ...]
) -> None:
    path = (*path, message.type)
    depth_max = transition.limits.compensation_depth_max
    if len(path) > depth_max:
        shown = " -> ".join(path[:6])
        transition.refuse(
            LIMIT_EXCEEDED,
            f"compensations are nested more than {depth_max} deep ({shown} -> ...): one of them compensates what "
            "compensates it; end with saga_fail instead",
        )
    try:
        asked = transition.step("compensate", binding.handler, message)
    except HandlerRaised as raised:
        raised.compensating = raised.compensating or message.type
        raise
    _compensate_each(transition, asked.compensations, path=path)
    _finish(transition, asked.ending, path=path, by=f"the compensation for {message.type!r}")


def _finish(transition: Transition, ending: Any, *, path: tuple[str, ...], by: str) -> None:
    if ending is None:
        return
    undoing = transition.undoing
    if undoing is not None and (undoing.is_unwinding or transition.trouble is not None):
        if isinstance(ending, Complete):
            transition.refuse(
                HANDLER_RESULT,
                f"two terminal effects in one decision: {by} returned saga_complete, but the run is being unwound and "
                f"ends {undoing.ending or 'by what it asks for then'}",
            )
        if undoing.reason is None:
            transition.undoing = undoing = msgspec.structs.replace(undoing, reason=ending.reason)
        if not path and transition.trouble is None:
            go_on(transition, undoing)
    elif isinstance(ending, Compensate):
        before = undoing or UNWINDING
        reason = ending.reason or before.reason
        go_on(transition, msgspec.structs.replace(before, is_unwinding=True, ending="failed", reason=reason))
    else:
        transition.end(ending, by=by)


def _unwind(transition: Transition) -> None:
    while transition.applied:
        if not _attempt(transition, partial(_undo_newest, transition)) or transition.trouble is not None:
            return
    _end(transition)


def _undo_newest(transition: Transition) -> None:
    step = transition.applied[-1]
    transition.applied = transition.applied[:-1]
    binding = _binding(transition, step.type)
    _run(transition, binding, _message(transition, binding, step.payload, undone=step), path=())


def _end(transition: Transition) -> None:
    """Ends the run whose undoing is done, or lets it go on."""
    undoing = transition.undoing
    assert undoing is not None
    transition.undoing = None
    if undoing.ending is None:
        transition.reason = undoing.reason or transition.reason
    elif undoing.ending == "completed":
        transition.status = next_status(transition.status, "complete")
        transition.reason, transition.result = None, undoing.result
    else:
        transition.status = next_status(transition.status, "cancel" if undoing.ending == "cancelled" else "fail")
        since = "" if transition.pivot is None else f" since {transition.pivot!r}"
        transition.reason = undoing.reason or transition.reason or f"every applied step{since} was compensated"


def _attempt(transition: Transition, undo: Callable[[], None]) -> bool:
    """Whether `undo` was done. If not, nothing of it remains, and the transition's `trouble` says why; that is also set
    when an unwinding within it came to a standstill."""
    before = transition.savepoint()
    try:
        undo()
    except (HandlerRaised, Refused) as error:
        transition.roll_back(before)
        transition.trouble = error
        return False
    return True


def _as_step(transition: Transition, effect: Compensate) -> AppliedStep:
    message = effect.message
    assert message is not None
    payload = _encoded(transition, message)
    return AppliedStep(message.type, message.id or transition.envelope.id, payload, transition.revision)


def _current_step(transition: Transition) -> AppliedStep:
    envelope = transition.envelope
    return AppliedStep(envelope.type, envelope.id, envelope.payload, transition.revision)


def _encoded(transition: Transition, message: SagaMessage[Any]) -> bytes:
    try:
        return encode_any(message.payload)
    except SagasError as error:
        transition.refuse(HANDLER_RESULT, f"saga_compensate({message.type!r}): {error.message}")


def _binding(transition: Transition, message_type: str) -> CompensationBinding:
    definition = transition.definition
    binding = definition.compensations.get(message_type)
    if binding is None:
        registered = ", ".join(definition.compensations) or "none"
        transition.refuse(
            HANDLER_RESULT,
            f"saga_compensate({message_type!r}) needs .compensate({message_type!r}, ...); registered are: {registered}",
        )
    return binding


def _take_off(transition: Transition, message: SagaMessage[Any]) -> AppliedStep | None:
    """Marks what `message` undoes as undone: the current message, or an applied step, which is returned."""
    current = transition.envelope
    if message.type == current.type and message.id in (None, current.id):
        transition.is_current_undone = True
        return None
    applied = transition.applied
    for index in range(len(applied) - 1, -1, -1):
        step = applied[index]
        if step.type == message.type and message.id in (None, step.id):
            transition.applied = applied[:index] + applied[index + 1 :]
            return step
    return None


def _message(
    transition: Transition,
    binding: CompensationBinding,
    payload: bytes,
    *,
    given: SagaMessage[Any] | None = None,
    undone: AppliedStep | None = None,
) -> SagaMessage[Any]:
    """What a compensation is handed: the message given, with what it lacks from the step it undoes and from the
    message that set it off."""
    try:
        typed = binding.codec.decode(payload)
    except SagasError as error:
        raise Refused(
            f"saga {transition.definition.id!r}, message {transition.envelope.type!r}: the compensation for "
            f"{binding.type!r} cannot take its payload: {error.message}",
            code=error.code,
        ) from error
    current = transition.envelope
    if given is None:
        given = SagaMessage(binding.type, None)
    return SagaMessage(
        binding.type,
        typed,
        given.correlation_key or current.correlation_key,
        given.idempotency_key,
        given.concurrency_key,
        given.occurred_at or current.occurred_at,
        given.id or (undone.id if undone is not None else current.id),
        given.traceparent or current.traceparent,
        given.tracestate or current.tracestate,
    )
