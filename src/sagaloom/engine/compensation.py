"""Which compensations run, in which order, and how that ends a run.

A handler's whole list is written down first; then its compensations run one after the other in the order of the list,
each with all that it asks for itself, depth first; then the run ends, if the list says so. The rules:

- `saga_compensate(message)` runs the compensation registered for the type of `message`, with that message. None
  registered is the author's mistake. The applied step that it undoes (the one with the message's id, else the newest
  of its type) is taken off the list of steps, so that nothing undoes it a second time.
- `saga_fail` in a forward handler runs the compensation of the current type first, unless the list asked for it
  already. In a compensation it ends the run; so a compensation that fails the run cannot start itself again.
- `saga_compensate(ALL_STEPS)` runs the compensation of every applied step that is left, newest first, and ends the
  run failed. A `saga_fail` in one of them gives the reason, if nobody gave one, and stops nothing; a `saga_complete`
  is a contradiction.
- A run ends once. Several failures in one decision are one end, whose reason is the forward handler's, else the first
  one's; any other second end is an error, for one of the two handlers is mistaken about what happens.
- Compensations that compensate are nested, at most `compensation_depth_max` deep: a cycle is an error, not a hang.
"""

from __future__ import annotations

from typing import Any, Final

from sagaloom.codec import encode_any
from sagaloom.definitions import CompensationBinding
from sagaloom.effects import Compensate, Fail
from sagaloom.engine.ledger import HANDLER_RESULT, LIMIT_EXCEEDED, Refused
from sagaloom.engine.lifecycle import next_status
from sagaloom.engine.records import AppliedStep
from sagaloom.engine.transition import Asked, Transition
from sagaloom.errors import SagasError
from sagaloom.messages import SagaMessage

__all__ = ["carry_out"]

_ALL_STEPS_REASON: Final = "every applied step was compensated"


def carry_out(transition: Transition, asked: Asked) -> None:
    """Does what the forward handler's list asks of the run itself: compensations, then the end."""
    ending = asked.ending
    current = transition.envelope.type
    own = transition.definition.compensations.get(current) if isinstance(ending, Fail) else None
    if own is not None or asked.compensations or isinstance(ending, Compensate):
        transition.status = next_status(transition.status, "compensate")
        first = asked.compensations[0] if asked.compensations else ending
        transition.undo_reason = first.reason if isinstance(first, (Compensate, Fail)) else None
    _compensate_each(transition, asked.compensations, path=())
    if own is not None and not transition.is_current_undone:
        transition.is_current_undone = True
        _run(transition, own, _message(transition, own, transition.envelope.payload), path=())
    _finish(transition, ending, path=(), by=f"the handler for {current!r}")
    if isinstance(ending, Fail):
        transition.reason = ending.reason


def _compensate_each(transition: Transition, compensations: tuple[Compensate, ...], *, path: tuple[str, ...]) -> None:
    for effect in compensations:
        message = effect.message
        if message is None:
            continue  # ALL_STEPS is an ending, and never in this list.
        binding = _binding(transition, message.type)
        if effect.reason is not None and not transition.is_over:
            transition.reason = effect.reason
        undone = _take_off(transition, message)
        try:
            payload = encode_any(message.payload)
        except SagasError as error:
            transition.refuse(HANDLER_RESULT, f"saga_compensate({message.type!r}): {error.message}")
        typed = _message(transition, binding, payload, given=message, undone=undone)
        _run(transition, binding, typed, path=path)


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
    asked = transition.step("compensate", binding.handler, message)
    _compensate_each(transition, asked.compensations, path=path)
    _finish(transition, asked.ending, path=path, by=f"the compensation for {message.type!r}")


def _finish(transition: Transition, ending: Any, *, path: tuple[str, ...], by: str) -> None:
    if isinstance(ending, Compensate):
        _unwind(transition, ending.reason, path=path)
    elif ending is not None:
        transition.end(ending, by=by)


def _unwind(transition: Transition, reason: str | None, *, path: tuple[str, ...]) -> None:
    while transition.applied:
        step = transition.applied[-1]
        transition.applied = transition.applied[:-1]
        binding = _binding(transition, step.type)
        _run(transition, binding, _message(transition, binding, step.payload, undone=step), path=path)
    transition.end(Fail(reason or _ALL_STEPS_REASON), by="saga_compensate(ALL_STEPS)")
    if reason is not None:
        transition.reason = reason


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
