"""How a message and a dead letter are written into what AMQP has for them, and read from it.

The body is the message's own; its headers are AMQP headers. What AMQP has no place for stands in headers of ours:

    sagaloom-enqueued   when it was sent, in microseconds since 1970
    sagaloom-attempts   how often it was handed out before it was published anew; the server adds its own count
                        (`x-delivery-count`), of consumers that were lost since
    sagaloom-id         its id, if that is longer than AMQP has room for
    sagaloom-letter     of a dead letter, why it is one: JSON

All of them may be missing or wrong, since anybody can publish into the queue: then a value is made of what there is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

import msgspec
from pamqp.commands import Basic

from sagaloom.ids import derived_id
from sagaloom.ports.queue import QueueDeadLetter, QueueMessage, is_reserved_header
from sagaloom.queues.rows import micros, moment

if TYPE_CHECKING:
    from aiormq.abc import DeliveredMessage

__all__ = ["attempts_of", "letter_of", "message_of", "properties_of", "properties_of_letter"]

_ATTEMPTS: Final = "sagaloom-attempts"
_ENQUEUED: Final = "sagaloom-enqueued"
_LETTER: Final = "sagaloom-letter"
_LONG_ID: Final = "sagaloom-id"
"""The id of a message that is longer than AMQP has room for."""
_ID_BYTES_MAX: Final = 255


class _Letter(msgspec.Struct, frozen=True):
    """What is written beside a dead letter."""

    attempt: int
    reason: str
    failed: int
    error_code: str | None = None
    error_message: str | None = None
    traceback: str | None = None


_letter: Final = msgspec.json.Decoder(_Letter).decode


def properties_of(message: QueueMessage, attempts: int) -> Basic.Properties:
    headers: dict[str, Any] = {
        **message.headers,
        _ENQUEUED: micros(message.enqueued_at),
        _ATTEMPTS: attempts,
    }
    message_id = message.id
    if len(message_id.encode()) > _ID_BYTES_MAX:
        headers[_LONG_ID] = message_id
        message_id = derived_id("long-", message_id)
    return Basic.Properties(content_type="application/json", delivery_mode=2, message_id=message_id, headers=headers)


def properties_of_letter(letter: QueueDeadLetter) -> Basic.Properties:
    properties = properties_of(letter.message, letter.attempt)
    assert properties.headers is not None
    beside = _Letter(
        letter.attempt,
        letter.reason,
        micros(letter.failed_at),
        letter.error_code,
        letter.error_message,
        letter.traceback,
    )
    properties.headers[_LETTER] = msgspec.json.encode(beside).decode()
    return properties


def _headers(delivered: DeliveredMessage) -> dict[str, Any]:
    return cast("dict[str, Any]", delivered.header.properties.headers or {})


def attempts_of(delivered: DeliveredMessage) -> int:
    """How often it was handed out before this time."""
    headers = _headers(delivered)
    before, lost = headers.get(_ATTEMPTS, 0), headers.get("x-delivery-count", 0)
    return (before if isinstance(before, int) else 0) + (lost if isinstance(lost, int) else 0)


def message_of(delivered: DeliveredMessage) -> QueueMessage:
    """The message; one that somebody else has published gets an id that depends on what it is."""
    properties, headers = delivered.header.properties, _headers(delivered)
    enqueued = headers.get(_ENQUEUED)
    if not isinstance(enqueued, int):
        enqueued = micros(properties.timestamp) if properties.timestamp is not None else 0
    return QueueMessage(
        id=str(headers.get(_LONG_ID) or properties.message_id or derived_id("amqp-", delivered.body.hex(), enqueued)),
        body=delivered.body,
        enqueued_at=moment(enqueued),
        headers={
            name: value if isinstance(value, str) else str(value)
            for name, value in headers.items()
            if not is_reserved_header(name)
        },
    )


def letter_of(queue: str, delivered: DeliveredMessage) -> QueueDeadLetter:
    message = message_of(delivered)
    try:
        beside = _letter(str(_headers(delivered).get(_LETTER, "")))
    except msgspec.MsgspecError:
        # Somebody else has put it there.
        beside = _Letter(attempts_of(delivered), "rejected", micros(message.enqueued_at))
    return QueueDeadLetter(
        message=message,
        queue=queue,
        attempt=beside.attempt,
        reason=cast("Any", beside.reason),
        failed_at=moment(beside.failed),
        error_code=beside.error_code,
        error_message=beside.error_message,
        traceback=beside.traceback,
    )
