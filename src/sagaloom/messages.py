"""Messages: what a saga reacts to.

A message has a *type* (its name on the wire) and a *payload*. Wherever a message goes in, one may write it in three
ways, and `as_message` makes them one:

    SagaMessage("OrderPlaced", {"orderId": "o-1"})       # explicit
    {"type": "OrderPlaced", "payload": {"orderId": "o-1"}}
    OrderPlaced(order_id="o-1")                          # an instance of a declared message class

A message class is any dataclass, `msgspec.Struct`, attrs class, TypedDict or pydantic model. Its name is its type,
unless it says `__message_type__ = "order.placed"`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Generic, TypeVar, cast

import msgspec

from sagaloom.codec import is_declared_class
from sagaloom.errors import MessageRejected

__all__ = ["RESERVED_PREFIX", "SagaMessage", "as_message", "message_type_of"]

P_co = TypeVar("P_co", covariant=True)

RESERVED_PREFIX = "saga:"
"""How the types of the engine's own messages begin. No saga handles them, and no door takes them in."""

_TEXTS = ("correlation_key", "idempotency_key", "concurrency_key", "id", "traceparent", "tracestate")
_WIRE_FIELDS = {
    **{name: name for name in ("type", "payload", "occurred_at", *_TEXTS)},
    "correlationKey": "correlation_key",
    "correlationId": "correlation_key",
    "idempotencyKey": "idempotency_key",
    "concurrencyKey": "concurrency_key",
    "occurredAt": "occurred_at",
    "messageId": "id",
}


class SagaMessage(msgspec.Struct, Generic[P_co], frozen=True):
    """The event or command that is delivered to a handler.

    `type` discriminates; `payload` is the typed body. `correlation_key` names the instance unless the saga has a rule
    of its own; `idempotency_key` (else `id`) is what makes a repeat a duplicate.
    """

    type: str
    payload: P_co
    correlation_key: str | None = None
    idempotency_key: str | None = None
    concurrency_key: str | None = None
    occurred_at: datetime | None = None
    id: str | None = None
    traceparent: str | None = None
    tracestate: str | None = None


def message_type_of(message_class: type) -> str:
    """The wire type of a message class: its own `__message_type__`, else its name.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class OrderPlaced:
    ...     order_id: str
    >>> message_type_of(OrderPlaced)
    'OrderPlaced'
    """
    declared = message_class.__dict__.get("__message_type__", message_class.__name__)
    if not isinstance(declared, str) or not declared.strip():
        raise MessageRejected(f"{message_class.__qualname__}.__message_type__ must be a non-empty string: {declared!r}")
    return declared


def as_message(value: object) -> SagaMessage[Any]:
    """The `SagaMessage` that `value` stands for; raises `MessageRejected` when it stands for none.

    >>> as_message({"type": "OrderPlaced", "payload": {"orderId": "o-1"}, "correlationId": "o-1"}).correlation_key
    'o-1'
    """
    if isinstance(value, SagaMessage):
        return _checked(value)
    if isinstance(value, Mapping):
        return _from_mapping(cast("Mapping[object, Any]", value))
    if not is_declared_class(type(value)):
        raise MessageRejected(
            f"{value!r:.80} is no message: give a SagaMessage, a mapping with 'type' and 'payload', or an instance of "
            "a message class"
        )
    return SagaMessage(message_type_of(type(value)), value)


def _from_mapping(value: Mapping[object, Any]) -> SagaMessage[Any]:
    fields: dict[str, Any] = {}
    for name, content in value.items():
        field = _WIRE_FIELDS.get(name) if isinstance(name, str) else None
        if field is None:
            raise MessageRejected(
                f"message {value.get('type')!r:.80} has the unknown field {name!r:.80}: the business data belongs in "
                "'payload'"
            )
        if content is None and field != "payload":
            continue
        if field in fields and fields[field] != content:
            raise MessageRejected(
                f"message {value.get('type')!r:.80} says {field} twice and differently: {fields[field]!r:.80} and "
                f"{content!r:.80}; give one of them"
            )
        fields[field] = content
    if isinstance(occurred_at := fields.get("occurred_at"), str):
        with contextlib.suppress(msgspec.ValidationError):  # refused below, as the string that it is
            fields["occurred_at"] = msgspec.convert(occurred_at, datetime)
    fields.setdefault("type", None)
    fields.setdefault("payload", {})
    return _checked(SagaMessage(**fields))


def _checked(message: Any) -> SagaMessage[Any]:
    """Returns `message` when its fields have the types that they declare. Keys are checked where they are used."""
    if not isinstance(message.type, str) or not message.type:
        raise MessageRejected(f"message without a type: 'type' must be a non-empty string, got {message.type!r:.80}")
    if (
        message.correlation_key is not None
        or message.idempotency_key is not None
        or message.concurrency_key is not None
        or message.id is not None
        or message.traceparent is not None
        or message.tracestate is not None
    ):
        for field in _TEXTS:
            text = getattr(message, field)
            if text is not None and not isinstance(text, str):
                raise MessageRejected(f"message {message.type!r:.80}: {field} must be a string, got {text!r:.80}")
    at = message.occurred_at
    if at is not None and not (isinstance(at, datetime) and at.utcoffset() is not None):
        raise MessageRejected(
            f"message {message.type!r:.80}: occurred_at must be a moment with a time zone, such as "
            f"'2026-01-31T12:00:00Z', got {at!r:.80}"
        )
    checked: SagaMessage[Any] = message
    return checked
