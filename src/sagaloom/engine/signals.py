"""Signals and updates: what somebody says to one instance by its name.

A signal is a message like any other: it enters the inbox of its instance, is applied in its turn (I9), once (I4), by a
handler that may change the state and return effects, and stands in the history. Two things set it apart. Its type is
the engine's (`saga:signal:<name>`), so no door, saga or target sends one by accident, and a signal and a message of one
name do not meet. And it is addressed: it starts no instance, and no rule is asked for its key.

An update is a signal whose caller waits for what the handler has to say:

    the handler returns answer(value)     applied; the caller gets the value, None when there is none
    the handler raises UpdateRefused      ignored, with its reason; the caller gets the refusal, nothing is changed
    the handler raises something else     tried again by the saga's policy, at last a dead letter
    the run ends, or is over              ignored; the caller is told

What was answered is kept in the history row of the update, in the commit that applied it. So whoever asks again under
the same id gets the same answer, from whatever process, and after a crash. (Of refusals as of everything ignored an
instance keeps a hundred rows.)

What we dislike about it: the answer of an update is found by looking through the history from its end, which takes long
for one that was answered many thousand messages ago.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final, Literal

import msgspec

from sagaloom.codec import encode_any
from sagaloom.definitions import HandlerBinding, SagaDefinition
from sagaloom.effects import Answer
from sagaloom.engine.ledger import HANDLER_RESULT
from sagaloom.engine.records import DecideContext, Decision, EffectSummary, Envelope, Instance, UpdateAnswer
from sagaloom.engine.retrying import storable
from sagaloom.engine.transition import Transition
from sagaloom.errors import MessageRejected, SagasError, SignalNotFound, UpdateRefused

__all__ = [
    "SIGNAL_PREFIX",
    "UPDATE_PREFIX",
    "SignalKind",
    "Update",
    "answered",
    "binding_of",
    "refused_update",
    "refused_with",
    "said_to",
]

SignalKind = Literal["signal", "update"]
SIGNAL_PREFIX: Final = "saga:signal:"
UPDATE_PREFIX: Final = "saga:update:"

_PREFIX: Final[dict[SignalKind, str]] = {"signal": SIGNAL_PREFIX, "update": UPDATE_PREFIX}


class _Refusal(msgspec.Struct):
    """What is kept of an `UpdateRefused`."""

    code: str
    message: str
    data: dict[str, Any]


def said_to(
    definition: SagaDefinition[Any],
    kind: SignalKind,
    name: str,
    *,
    key: str,
    payload_json: bytes,
    message_id: str,
    accepted_at: datetime,
    run: int | None = None,
) -> Envelope:
    """The envelope of a signal or an update for run number `run`, or for the newest when it is decided. Raises
    `SignalNotFound`, and `MessageRejected` for a payload that its handler cannot take."""
    bindings = definition.signals if kind == "signal" else definition.updates
    binding = bindings.get(name)
    if binding is None:
        raise SignalNotFound(
            f"saga {definition.id!r} has no {kind} {name!r:.80}: it has {', '.join(bindings) or 'none'}",
            data={"sagaId": definition.id, kind: name},
        )
    try:
        binding.codec.decode(payload_json)
    except SagasError as error:
        raise MessageRejected(
            f"saga {definition.id!r}: the payload of {kind} {name!r} is not what its handler takes: {error.message}",
            data=error.data,
        ) from error
    return Envelope(
        definition.id,
        key,
        _PREFIX[kind] + name,
        message_id,
        payload_json,
        accepted_at,
        "door",
        run,
        dedupe_key=message_id,
    )


def binding_of(definition: SagaDefinition[Any], message_type: str) -> HandlerBinding | None:
    """Who takes the signal or update that `message_type` stands for; None when it stands for none, or nobody does."""
    if message_type.startswith(SIGNAL_PREFIX):
        return definition.signals.get(message_type.removeprefix(SIGNAL_PREFIX))
    if message_type.startswith(UPDATE_PREFIX):
        return definition.updates.get(message_type.removeprefix(UPDATE_PREFIX))
    return None


class Update(Transition):
    """A transition for whose answer somebody waits."""

    __slots__ = ("answer",)

    def __init__(
        self,
        definition: SagaDefinition[Any],
        instance: Instance | None,
        envelope: Envelope,
        context: DecideContext,
        state: bytes,
    ) -> None:
        super().__init__(definition, instance, envelope, context, state)
        self.answer: bytes | None = None

    def take_answer(self, phase: Literal["handle", "compensate"], effect: Answer) -> EffectSummary:
        if self.answer is not None:
            self.refuse(HANDLER_RESULT, "its handler returned two answers: an update has one")
        summary = self.note("answer")
        try:
            self.answer = encode_any(effect.value)
        except SagasError as error:
            self.refuse(HANDLER_RESULT, f"answer: {error.message}")
        self.count_bytes(len(self.answer))
        return summary


def answered(decision: Decision, update: Update) -> Decision:
    """`decision` about an update that was applied, with the answer in its history."""
    entry = decision.entry
    assert entry is not None
    answer = UpdateAnswer(update.answer or b"null")
    return msgspec.structs.replace(decision, entry=msgspec.structs.replace(entry, answer=answer))


def refused_update(decision: Decision, refusal: UpdateRefused) -> Decision:
    """`decision` to ignore an update, with the handler's reason in its history."""
    if decision.entry is None:
        return decision
    try:
        data = encode_any(dict(refusal.data))
    except SagasError:
        data = b"{}"  # What cannot be sent is left out; the refusal itself has to arrive.
    kept = _Refusal(storable(refusal.code), storable(refusal.message), msgspec.json.decode(data))
    entry = msgspec.structs.replace(decision.entry, answer=UpdateAnswer(msgspec.json.encode(kept), is_refused=True))
    return msgspec.structs.replace(decision, entry=entry)


def refused_with(answer: UpdateAnswer) -> UpdateRefused:
    """The refusal that `refused_update` has kept."""
    kept = msgspec.json.decode(answer.content, type=_Refusal)
    return UpdateRefused(kept.message, code=kept.code, data=kept.data)
