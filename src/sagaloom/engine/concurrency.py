"""How many messages of a saga are under way at once, per concurrency key.

A saga with `.concurrency(limit, key)` has `limit` slots for each concurrency key. A slot is a row of the store. It is
held by a message from its acceptance, or from its first attempt, until it is settled, retries included; the commit that
settles the message deletes the row. So no slot outlives its message, whoever is killed, and the count is right across
processes, for the store itself refuses a slot too many.

    a message from a door, accepted to wait     takes a slot with `reject`; with none left it is refused, 409, retryable
    any message whose attempt fails             takes one, and keeps it over its attempts
    a message that is settled at once           needs a free one, and takes none
    a message without one that finds none       waits for one at the head of its instance, in its place

The messages of the engine (controls, signals, updates) need none. A message that is deferred, or waits for its instance
to appear, holds none while it stands aside. Of one instance, messages behind may have taken the slot that the one at
the head lacks: then it goes first without, for they are not under way before it.
"""

from __future__ import annotations

from typing import Any, Final, Literal

from sagaloom.definitions import SagaDefinition
from sagaloom.engine.records import Envelope
from sagaloom.engine.retrying import USER_ERRORS, describe
from sagaloom.errors import MessageRejected, SagasError
from sagaloom.ids import check_key
from sagaloom.messages import RESERVED_PREFIX, SagaMessage

__all__ = ["SHARED_KEY", "SlotUse", "concurrency_key", "key_of", "needs_slot"]

SlotUse = Literal["take", "pass", "free"]
SHARED_KEY: Final = "global"
"""The concurrency key of messages that have none: they share the saga's slots."""


def concurrency_key(definition: SagaDefinition[Any], message: SagaMessage[Any]) -> str:
    """The key under which `message` needs a slot: its own, else what the saga's function says, else the shared one.
    Raises `MessageRejected` for a function that raises, or returns what is no key."""
    policy = definition.concurrency
    if message.concurrency_key is not None or policy is None or policy.key is None:
        return message.concurrency_key or SHARED_KEY
    try:
        found: object = policy.key(message)
    except USER_ERRORS as error:
        raise MessageRejected(
            f"saga {definition.id!r}: the concurrency key of {message.type!r} raised {describe(error)}"
        ) from error
    if not isinstance(found, str):
        raise MessageRejected(
            f"saga {definition.id!r}: the concurrency key of {message.type!r} is {type(found).__name__} {found!r:.80}: "
            "it must be a string"
        )
    return check_key(found, what="concurrency key")


def needs_slot(envelope: Envelope) -> bool:
    """Whether a message is one of the saga's own, and none of the engine's."""
    return not envelope.type.startswith(RESERVED_PREFIX)


def key_of(definition: SagaDefinition[Any], envelope: Envelope) -> str:
    """The concurrency key of a message that was accepted. One that no door has asked for its key (a timer, a reply)
    and that the saga's function cannot read, shares the saga's slots."""
    if envelope.concurrency_key is not None:
        return envelope.concurrency_key
    binding = definition.handlers.get(envelope.type)
    if binding is None or definition.concurrency is None or definition.concurrency.key is None:
        return SHARED_KEY
    try:
        payload = binding.codec.decode(envelope.payload)
        return concurrency_key(definition, SagaMessage(envelope.type, payload, envelope.correlation_key))
    except SagasError:
        return SHARED_KEY
