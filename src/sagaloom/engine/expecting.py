"""What a saga expects when: handlers of a business status, and handlers of several messages together.

**During.** A type that is bound to statuses (`.during`) is handled by the handler of the status that the state has
right now; the status is a field of the state, which the saga's own handlers set. In any other status the type is
unexpected:

    defer        the message waits, in its place, and is offered again after each transition of its instance, before
                 anything newer; when the run ends, it is ignored like everything that comes too late
    ignore       it changes nothing, and stands in the history
    dead_letter  it is given up at once, for an operator to look at
    fail         the run fails, as if the handler had returned `saga_fail`

A deferred message has written nothing but its place in the inbox. So it costs no attempt, survives restarts and
takeovers, and is asked again from the then current state, like any other.

**When all.** The messages of a join (`.when_all`) are kept with the run as they come, in whatever order; the one that
makes them complete runs the handler, once, with all of them. Each arrival is a transition of its own. Of two messages
of one type the first one counts; the second is ignored, unless its type has a handler beside the join.

What we dislike about it: what a join has gathered is part of the instance row, so it is written at each transition
until the join is complete.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, Final, cast

import msgspec

from sagaloom.definitions import Gathered, HandlerBinding, JoinBinding, SagaDefinition, SagaHandler
from sagaloom.engine.ledger import LIMIT_EXCEEDED
from sagaloom.engine.records import GatheredMessage
from sagaloom.engine.transition import ASKED_NOTHING, STATE_UNREADABLE, Asked, Transition
from sagaloom.errors import SagasError
from sagaloom.messages import SagaMessage

__all__ = ["UNEXPECTED", "gather", "handler_during", "status_in", "why_not_gathered"]

UNEXPECTED: Final = "SAGA_MESSAGE_UNEXPECTED"
_RAN: Final = ""
"""The type of the row by which a run remembers that a join has run."""


def status_in(definition: SagaDefinition[Any], state: object) -> object:
    """The business status that `state` has; None when it has none."""
    found: object
    if isinstance(state, Mapping):
        found = cast("Mapping[str, object]", state).get(definition.status_field)
    else:
        found = getattr(state, definition.status_field, None)
    return found.value if isinstance(found, Enum) else found


def handler_during(
    definition: SagaDefinition[Any], binding: HandlerBinding, state_json: bytes
) -> tuple[SagaHandler[Any, Any] | None, str]:
    """Who handles the type in the status of this state, None when nobody does, and what there is to say of that."""
    assert binding.during is not None
    try:
        status = status_in(definition, definition.state_codec.decode(state_json))
    except SagasError as error:
        raise SagasError(
            f"saga {definition.id!r}: the stored state cannot be read: {error.message}; if its shape has changed, "
            "declare it with .version(n, migrate={...})",
            code=STATE_UNREADABLE,
        ) from error
    handler = binding.during.get(status) if isinstance(status, str) else None
    expected = ", ".join(map(repr, binding.during))
    return handler, f"{binding.type!r} is expected during {expected}, and the {definition.status_field} is {status!r}"


def why_not_gathered(binding: HandlerBinding, gathered: tuple[GatheredMessage, ...]) -> str | None:
    """Why a message that only joins wait for changes nothing; None when one still waits for it."""
    if not binding.is_gathered_only:
        return None
    reasons: list[str] = []
    for join in binding.joins:
        if _has_run(join, gathered):
            reasons.append(f"{join.name} have all come before")
        elif any(one.join == join.name and one.type == binding.type for one in gathered):
            reasons.append(f"{binding.type!r} has come before, and not all of {join.name} have")
        else:
            return None
    return "; ".join(reasons)


def gather(transition: Transition, binding: HandlerBinding, message: SagaMessage[Any]) -> Asked:
    """Adds the message to the joins of its type, and runs the handlers of those that it completes. Returns what the
    last of them asked for."""
    asked = ASKED_NOTHING
    for join in binding.joins:
        if asked is not ASKED_NOTHING:
            break  # The run ends, or is undone: there is nothing left to wait for.
        gathered = transition.gathered
        if _has_run(join, gathered) or any(one.join == join.name and one.type == binding.type for one in gathered):
            continue
        envelope = transition.envelope
        gathered = (*gathered, GatheredMessage(join.name, binding.type, envelope.id, envelope.payload))
        own = [one for one in gathered if one.join == join.name]
        if len(own) < len(join.codecs):
            _check_size(transition, gathered)
            transition.gathered = gathered
            continue
        transition.gathered = (
            *(one for one in gathered if one.join != join.name),
            GatheredMessage(join.name, _RAN, envelope.id, b""),
        )
        payload = _read(transition, join, own)
        asked = transition.step("handle", join.handler, msgspec.structs.replace(message, payload=payload))
    return asked


def _has_run(join: JoinBinding, gathered: tuple[GatheredMessage, ...]) -> bool:
    return any(one.join == join.name and one.type == _RAN for one in gathered)


def _check_size(transition: Transition, gathered: tuple[GatheredMessage, ...]) -> None:
    size = len(transition.state) + sum(len(one.payload) for one in gathered)
    if size > transition.limits.state_bytes_max:
        transition.refuse(
            LIMIT_EXCEEDED,
            f"the state and the {len(gathered)} messages that were gathered have {size} bytes, at most "
            f"{transition.limits.state_bytes_max} are allowed: keep large data elsewhere and send a reference",
        )


def _read(transition: Transition, join: JoinBinding, own: list[GatheredMessage]) -> Gathered:
    payloads: dict[str, Any] = {}
    for one in own:
        try:
            payloads[one.type] = join.codecs[one.type].decode(one.payload)
        except (SagasError, KeyError) as error:
            transition.refuse(
                "VALIDATION_ERROR",
                f"the handler of {join.name} cannot take the payload of {one.type!r}, which came as {one.id}: {error}",
            )
    # In the order of the declaration, whatever order they came in.
    return Gathered({name: payloads[name] for name in join.codecs})
