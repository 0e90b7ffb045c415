"""Who gets a message: from a message to the instances it is addressed to. Pure, and decided from the message alone.

The rules, in the order in which they are asked (the first that gives a key wins):

1. the saga's rule for the message type, else its general rule; a rule may pass by returning None;
2. the message's own `correlation_key`;
3. for a singleton, the one key that all its messages share;
4. for a message that may start an instance, the default key `<saga id>:<message type>`, and then it opens a run of its
   own: two messages without any key never meet in one instance;
5. otherwise it is refused with `CORRELATION_REQUIRED`. A message id is never a key.

The key that is found goes into the `Envelope` and is final: nothing asks again.

Messages between sagas (`Outgoing`) are routed here too. Whatever id, key and order they get depends on the effect key
of the effect they came from and on nothing else, so that the same decision, taken twice, sends the same messages.

What we dislike about it: a rule may see only what is in the message, so it cannot find an instance by its state; and
`route` needs every loaded definition, which is why `decide` leaves it to the caller.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import msgspec

from sagaloom.codec import UNTYPED, encode_any, is_declared_class
from sagaloom.definitions import ANY_TYPE, SagaDefinition
from sagaloom.engine.concurrency import concurrency_key
from sagaloom.engine.records import DeadLetter, Envelope, Origin, Outgoing, ParentLink
from sagaloom.engine.retrying import USER_ERRORS, describe
from sagaloom.errors import DefinitionError, MessageRejected, SagaNotFound, SagasError
from sagaloom.ids import check_key, derived_id
from sagaloom.messages import SagaMessage, as_message, message_type_of

__all__ = [
    "CORRELATION_REQUIRED",
    "SINGLETON_KEY",
    "Correlated",
    "DefinitionSet",
    "Routed",
    "address",
    "as_sent",
    "correlate",
    "dead_letter_id",
    "default_key",
    "has_default_key",
    "route",
]

CORRELATION_REQUIRED: Final = "CORRELATION_REQUIRED"
_TEXT_FIELDS: Final = ("idempotency_key", "concurrency_key", "traceparent", "tracestate")
SINGLETON_KEY: Final = "singleton"
"""The correlation key of every instance of a `.singleton()` saga."""


class Correlated(msgspec.Struct, frozen=True, gc=False):
    """The key of a message for one saga. `opens_run`: it came without any, and opens a run of its own."""

    key: str
    opens_run: bool = False


class Routed(NamedTuple):
    """Where an `Outgoing` went: one envelope for each saga that takes it, and what could not be delivered."""

    envelopes: tuple[Envelope, ...] = ()
    dead_letters: tuple[DeadLetter, ...] = ()


class DefinitionSet:
    """Every loaded definition, by id and by message type. It never changes; `with_definition` makes another."""

    __slots__ = ("_by_id", "_by_type", "limited")

    def __init__(self, definitions: Iterable[SagaDefinition[Any]] = ()) -> None:
        by_id: dict[str, SagaDefinition[Any]] = {}
        by_type: dict[str, tuple[SagaDefinition[Any], ...]] = {}
        for definition in definitions:
            other = by_id.setdefault(definition.id, definition)
            if other is definition:
                continue
            raise DefinitionError(
                f"two sagas are called {definition.id!r}: {other.source or 'unknown place'} and "
                f"{definition.source or 'unknown place'}; an id names one definition"
            )
        for definition in by_id.values():
            if not definition.about.enabled:
                continue  # It keeps its id, and what was accepted for it waits; nothing new is for it.
            for message_type in definition.handlers:
                by_type[message_type] = (*by_type.get(message_type, ()), definition)
        self._by_id = by_id
        self._by_type = by_type
        self.limited = frozenset(each.id for each in by_id.values() if each.concurrency is not None)
        """The ids of those that bound how many messages are under way."""

    @property
    def by_id(self) -> Mapping[str, SagaDefinition[Any]]:
        return MappingProxyType(self._by_id)

    @property
    def by_type(self) -> Mapping[str, tuple[SagaDefinition[Any], ...]]:
        return MappingProxyType(self._by_type)

    def get(self, saga_id: str) -> SagaDefinition[Any] | None:
        """The definition of this id, or None."""
        return self._by_id.get(saga_id)

    def handling(self, message_type: str) -> tuple[SagaDefinition[Any], ...]:
        """The enabled sagas with a handler for this type, in the order in which they were given."""
        return self._by_type.get(message_type, ())

    def disabled_for(self, message_type: str) -> tuple[SagaDefinition[Any], ...]:
        """The sagas that would handle this type, were they not disabled."""
        return tuple(each for each in self._by_id.values() if not each.about.enabled and message_type in each.handlers)

    def with_definition(self, definition: SagaDefinition[Any]) -> DefinitionSet:
        """These definitions and this one, which takes the place of one with the same id."""
        return DefinitionSet({**self._by_id, definition.id: definition}.values())

    def __iter__(self) -> Iterator[SagaDefinition[Any]]:
        return iter(self._by_id.values())

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, saga_id: object) -> bool:
        return saga_id in self._by_id


def default_key(saga_id: str, message_type: str) -> str:
    """The key of runs that were opened by a message without any."""
    return f"{saga_id}:{message_type}"


def has_default_key(definition: SagaDefinition[Any], key: str) -> bool:
    """Whether `key` is shared by runs that have nothing to do with each other."""
    prefix = f"{definition.id}:"
    return key.startswith(prefix) and key[len(prefix) :] in definition.handlers


def correlate(
    definition: SagaDefinition[Any], message: SagaMessage[Any], *, payload_json: bytes | None = None
) -> Correlated:
    """The key of `message` for this saga, by the rules above.

    `payload_json` is the payload as JSON, when the caller has it already. Raises `MessageRejected` (`SagaNotFound` when
    the saga does not handle the type).
    """
    return Correlated(*_find_key(definition, message, _typed(definition, message, payload_json, message.id)))


# Its parameters may be given by position: Python looks up one by one the defaults of those that may not.
def address(
    definition: SagaDefinition[Any],
    message: SagaMessage[Any],
    payload_json: bytes,
    accepted_at: datetime,
    message_id: str,
    read: Any = msgspec.UNSET,
    origin: Origin = "door",
    correlation_key: str | None = None,
    causation_id: str | None = None,
    hops: int = 0,
    parent: ParentLink | None = None,
    key_if_none: str | None = None,
) -> tuple[Envelope, SagaMessage[Any]]:
    """The envelope that takes `message` to an instance of this saga, and the message as the saga's handler takes it.

    `read` is what an untyped handler takes `payload_json` for, if that was read already and nobody else has it.
    `correlation_key` counts as the message's own where that has none. `key_if_none` is the key for a message that no
    rule and no key names an instance for. Raises `MessageRejected`.
    """
    # Keys are checked where they are found. These are stored beside them, and an unstorable one must not get far.
    if message.id is not None:
        check_key(message_id, what="message id")
    if message.idempotency_key or message.concurrency_key or message.traceparent or message.tracestate:
        for field in _TEXT_FIELDS:
            text = getattr(message, field)
            if text is not None:
                check_key(text, what=field)
    if correlation_key is not None and message.correlation_key is None:
        message = msgspec.structs.replace(message, correlation_key=correlation_key)
    typed = _typed(definition, message, payload_json, message_id, read)
    try:
        key, opens_run = _find_key(definition, message, typed)
        if opens_run and key_if_none is not None:
            key, opens_run = key_if_none, False
    except MessageRejected as refused:
        if refused.code != CORRELATION_REQUIRED or key_if_none is None:
            raise
        key, opens_run = key_if_none, False
    if definition.concurrency is not None:
        # Found at the door, like the key of the instance, and then final.
        slot = concurrency_key(definition, typed)
        message = msgspec.structs.replace(message, concurrency_key=slot)
        typed = msgspec.structs.replace(typed, concurrency_key=slot)
    envelope = Envelope(
        definition.id,
        key,
        message.type,
        message_id,
        payload_json,
        accepted_at,
        origin,
        None,
        opens_run,
        message.idempotency_key or message_id,
        message.correlation_key,
        message.idempotency_key,
        message.concurrency_key,
        message.occurred_at,
        message.traceparent,
        message.tracestate,
        causation_id,
        hops,
        parent,
    )
    return envelope, typed


def route(definitions: DefinitionSet, outgoing: Outgoing, *, now: datetime) -> Routed:
    """Where a message between sagas goes: to one saga, or to every saga that handles its type.

    A saga that nobody loaded, a type that nobody handles and a correlation that fails are dead letters of the sender,
    each alone. A child's end whose parent has no handler for it is dropped: the parent did not ask.
    """
    named = definitions.get(outgoing.target)
    if outgoing.kind == "child_end":
        message_type: str = outgoing.payload.type
        if named is not None and message_type not in named.handlers:
            return Routed()
        # A parent that is not loaded here may be known to whoever holds it.
        return Routed((_child_end(outgoing, message_type, now),))
    try:
        message, payload_json = _message_of(outgoing, named)
    except SagasError as refused:
        return Routed((), (_undeliverable(outgoing, None, outgoing.encoded, refused, now),))
    receivers = (named,) if named is not None else definitions.handling(message.type)
    if named is None and (outgoing.kind == "spawn" or not receivers):
        what = "child saga" if outgoing.kind == "spawn" else "saga or message type"
        missing = SagaNotFound(
            f"saga {outgoing.sender[0]!r} sent {message.type!r} to {outgoing.target!r}, but no loaded definition is a "
            f"{what} of that name: load it, or correct the target"
        )
        return Routed((), (_undeliverable(outgoing, message, payload_json, missing, now),))
    envelopes: list[Envelope] = []
    dead_letters: list[DeadLetter] = []
    for receiver in receivers:
        try:
            envelope, _ = address(
                receiver,
                message,
                payload_json,
                now,
                message.id or outgoing.effect_key,
                origin="spawn" if outgoing.kind == "spawn" else "saga",
                correlation_key=outgoing.correlation_key,
                causation_id=outgoing.causation_id,
                hops=outgoing.hops,
                parent=outgoing.parent,
                key_if_none=outgoing.effect_key if outgoing.kind == "spawn" else None,
            )
            envelopes.append(envelope)
        except MessageRejected as refused:
            dead_letters.append(_undeliverable(outgoing, message, payload_json, refused, now, receiver=receiver.id))
    return Routed(tuple(envelopes), tuple(dead_letters))


def as_sent(payload: object) -> SagaMessage[Any] | None:
    """The message that the payload of a send to a saga is: a `SagaMessage`, or a mapping with exactly `type` and
    `payload`. None when it is a bare payload."""
    return as_message(payload) if _is_message(payload) else None


def dead_letter_id(now: datetime, *parts: object) -> str:
    """An id that sorts by time and depends on its arguments alone."""
    return f"dl{int(now.timestamp() * 1000):012x}{derived_id('', *parts)[:16]}"


def _is_message(payload: object) -> bool:
    return isinstance(payload, SagaMessage) or (isinstance(payload, Mapping) and payload.keys() == {"type", "payload"})


def _typed(
    definition: SagaDefinition[Any],
    message: SagaMessage[Any],
    payload_json: bytes | None,
    message_id: str | None,
    read: Any = msgspec.UNSET,
) -> SagaMessage[Any]:
    """The message as this saga's rules and handlers see it."""
    if message.type not in definition.handlers:
        handled = ", ".join(definition.handlers)
        raise SagaNotFound(f"saga {definition.id!r} has no handler for {message.type!r}: it handles {handled}")
    if payload_json is None:
        payload_json = _encoded(definition.id, message)
    try:
        codec = definition.handlers[message.type].codec
        payload = codec.decode(payload_json) if read is msgspec.UNSET or codec is not UNTYPED else read
    except SagasError as error:
        raise MessageRejected(
            f"saga {definition.id!r}: the payload of {message.type!r} is not what its handler takes: {error.message}",
            data=error.data,
        ) from error
    # Not msgspec.structs.replace: this runs for every message, and naming the fields is three times as fast.
    return SagaMessage(
        message.type,
        payload,
        message.correlation_key,
        message.idempotency_key,
        message.concurrency_key,
        message.occurred_at,
        message_id,
        message.traceparent,
        message.tracestate,
    )


def _find_key(definition: SagaDefinition[Any], message: SagaMessage[Any], typed: SagaMessage[Any]) -> tuple[str, bool]:
    """The key, and whether the message opens a run of its own."""
    rules = definition.correlations
    rule = rules.get(message.type) or rules.get(ANY_TYPE)
    if rule is not None:
        try:
            found: object = rule(typed)
        except USER_ERRORS as error:
            raise MessageRejected(
                f"saga {definition.id!r}: the correlation rule for {message.type!r} raised {describe(error)}"
            ) from error
        if found is not None:
            if not isinstance(found, str):
                close = getattr(found, "close", None)
                if callable(close) and hasattr(found, "send"):
                    close()  # An async rule: its coroutine would warn that it was never awaited.
                raise MessageRejected(
                    f"saga {definition.id!r}: the correlation rule for {message.type!r} returned "
                    f"{type(found).__name__} {found!r:.80}: a key is a string; return None to use the message's own"
                )
            return check_key(found), False
    if message.correlation_key is not None:
        return check_key(message.correlation_key), False
    if definition.is_singleton:
        return SINGLETON_KEY, False
    if definition.handlers[message.type].starts:
        return check_key(default_key(definition.id, message.type)), True
    raise MessageRejected(
        f"saga {definition.id!r}: {message.type!r} names no instance: give the message a correlation_key, or the saga "
        "a .correlate(...) rule, or make it a .singleton()",
        code=CORRELATION_REQUIRED,
    )


def _message_of(outgoing: Outgoing, named: SagaDefinition[Any] | None) -> tuple[SagaMessage[Any], bytes]:
    """The message that `outgoing.payload` stands for, with the sender's keys where it has none, and its payload."""
    message = as_sent(outgoing.payload)
    if message is None:
        message = SagaMessage(_type_for(outgoing, named), outgoing.payload)
    if named is None and message.type != outgoing.target and outgoing.kind != "spawn":
        raise MessageRejected(
            f"saga {outgoing.sender[0]!r} sent a message of type {message.type!r} to the message type "
            f"{outgoing.target!r}: give the payload alone, or send to a saga id"
        )
    return (
        SagaMessage(
            message.type,
            message.payload,
            message.correlation_key,
            message.idempotency_key or outgoing.idempotency_key,
            message.concurrency_key or outgoing.concurrency_key,
            message.occurred_at,
            message.id,
            message.traceparent or outgoing.traceparent,
            message.tracestate or outgoing.tracestate,
        ),
        outgoing.encoded or _encoded(outgoing.sender[0], message),
    )


def _type_for(outgoing: Outgoing, named: SagaDefinition[Any] | None) -> str:
    """The type of a bare payload: its class's, if the saga handles that, else the saga's first starting type."""
    if named is None:
        return outgoing.target
    payload: object = outgoing.payload
    if is_declared_class(type(payload)):
        declared = message_type_of(type(payload))
        if declared in named.handlers:
            return declared
    for name, binding in named.handlers.items():
        if binding.starts:
            return name
    raise MessageRejected(
        f"saga {outgoing.sender[0]!r} sent a bare payload to saga {named.id!r}, which no message starts: send a "
        f"SagaMessage of one of its types: {', '.join(named.handlers)}"
    )


def _child_end(outgoing: Outgoing, message_type: str, now: datetime) -> Envelope:
    # The parent's very run: no rule is asked, for the link says exactly who waits.
    return Envelope(
        saga_id=outgoing.target,
        key=outgoing.correlation_key or "",
        type=message_type,
        id=outgoing.effect_key,
        payload=outgoing.encoded or _encoded(outgoing.sender[0], outgoing.payload),
        accepted_at=now,
        origin="child",
        run=outgoing.to_run,
        dedupe_key=outgoing.effect_key,
        correlation_key=outgoing.correlation_key,
        traceparent=outgoing.traceparent,
        tracestate=outgoing.tracestate,
        causation_id=outgoing.causation_id,
        hops=outgoing.hops,
    )


def _undeliverable(
    outgoing: Outgoing,
    message: SagaMessage[Any] | None,
    payload_json: bytes,
    why: SagasError,
    now: datetime,
    *,
    receiver: str | None = None,
) -> DeadLetter:
    """A dead letter of the sender, whose envelope has no key yet: a redrive must address it again."""
    saga_id, key, _ = outgoing.sender
    message_type = message.type if message is not None else outgoing.target
    envelope = Envelope(
        saga_id=receiver or outgoing.target,
        key="",
        type=message_type,
        id=(message.id if message is not None else None) or outgoing.effect_key,
        payload=payload_json,
        accepted_at=now,
        origin="spawn" if outgoing.kind == "spawn" else "saga",
        correlation_key=(message.correlation_key if message is not None else None) or outgoing.correlation_key,
        idempotency_key=message.idempotency_key if message is not None else outgoing.idempotency_key,
        concurrency_key=message.concurrency_key if message is not None else outgoing.concurrency_key,
        traceparent=outgoing.traceparent,
        tracestate=outgoing.tracestate,
        causation_id=outgoing.causation_id,
        hops=outgoing.hops,
        parent=outgoing.parent,
    )
    return DeadLetter(
        id=dead_letter_id(now, saga_id, key, outgoing.effect_key, envelope.saga_id),
        at=now,
        saga_id=saga_id,
        key=key,
        type=message_type,
        code=why.code,
        reason=why.message,
        attempts=1,
        envelope=envelope,
    )


def _encoded(saga_id: str, message: SagaMessage[Any]) -> bytes:
    try:
        return encode_any(message.payload)
    except SagasError as error:
        raise MessageRejected(
            f"saga {saga_id!r}: the payload of {message.type!r} cannot be written as JSON: {error.message}"
        ) from error
