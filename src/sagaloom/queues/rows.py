"""How messages and dead letters are written where a broker keeps bytes for us: msgpack arrays, whose fields only ever
grow at the end."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import TypeVar

import msgspec

from sagaloom.errors import StoreCorrupt
from sagaloom.ports.queue import DeadLetterReason, QueueDeadLetter, QueueMessage

__all__ = [
    "LetterRow",
    "MessageRow",
    "decode_letter",
    "decode_message",
    "encode",
    "letter_of",
    "message_of",
    "micros",
    "moment",
    "read",
    "row_of",
    "row_of_letter",
]

_R = TypeVar("_R")


class MessageRow(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A `QueueMessage`. Times are microseconds since 1970."""

    id: str
    body: bytes
    enqueued: int
    headers: dict[str, str]
    priority: int
    key: str | None = None
    deduplication_id: str | None = None


class LetterRow(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A `QueueDeadLetter`."""

    message: MessageRow
    attempt: int
    reason: DeadLetterReason
    failed: int
    error_code: str | None = None
    error_message: str | None = None
    traceback: str | None = None


encode = msgspec.msgpack.Encoder().encode
decode_message = msgspec.msgpack.Decoder(MessageRow).decode
decode_letter = msgspec.msgpack.Decoder(LetterRow).decode


def micros(when: datetime) -> int:
    """Microseconds since 1970."""
    return round(when.timestamp() * 1_000_000)


def moment(at: int) -> datetime:
    """The inverse of `micros`."""
    return datetime.fromtimestamp(at / 1_000_000, UTC)


def row_of(message: QueueMessage) -> MessageRow:
    return MessageRow(
        message.id,
        message.body,
        micros(message.enqueued_at),
        dict(message.headers),
        message.priority,
        message.key,
        message.deduplication_id,
    )


def message_of(row: MessageRow) -> QueueMessage:
    return QueueMessage(
        id=row.id,
        body=row.body,
        enqueued_at=moment(row.enqueued),
        headers=row.headers,
        priority=row.priority,
        key=row.key,
        deduplication_id=row.deduplication_id,
    )


def row_of_letter(letter: QueueDeadLetter) -> LetterRow:
    return LetterRow(
        row_of(letter.message),
        letter.attempt,
        letter.reason,
        micros(letter.failed_at),
        letter.error_code,
        letter.error_message,
        letter.traceback,
    )


def letter_of(queue: str, row: LetterRow) -> QueueDeadLetter:
    return QueueDeadLetter(
        message=message_of(row.message),
        queue=queue,
        attempt=row.attempt,
        reason=row.reason,
        failed_at=moment(row.failed),
        error_code=row.error_code,
        error_message=row.error_message,
        traceback=row.traceback,
    )


def read(broker: str, what: object, data: bytes, decode: Callable[[bytes], _R]) -> _R:
    """`data` decoded; raises `StoreCorrupt` when somebody else has written it."""
    try:
        return decode(data)
    except (msgspec.MsgspecError, ValueError) as error:
        raise StoreCorrupt(
            f"{broker}: {what!r} cannot be read ({error}): restore it from a backup, or upgrade sagaloom if a newer "
            "version wrote it"
        ) from error
