"""The columns that stand beside a stored record, for people and for indexes."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

import msgspec

from sagaloom.engine.records import (
    Child,
    DeadLetter,
    Envelope,
    Head,
    HeldSlot,
    HistoryEntry,
    Instance,
    OutboxEffect,
    Timer,
)
from sagaloom.ids import key_hash

__all__ = [
    "child_row",
    "entry_row",
    "head_changes",
    "head_row",
    "inbox_changes",
    "inbox_row",
    "left_row",
    "letter_row",
    "outbox_changes",
    "outbox_row",
    "run_changes",
    "run_row",
    "slot_row",
    "text",
    "timer_row",
]

_Row = tuple[object, ...]

_head: Final = msgspec.msgpack.Decoder(Head).decode
_instance: Final = msgspec.msgpack.Decoder(Instance).decode
_entry: Final = msgspec.msgpack.Decoder(HistoryEntry).decode
_envelope: Final = msgspec.msgpack.Decoder(Envelope).decode
_effect: Final = msgspec.msgpack.Decoder(OutboxEffect).decode
_timer: Final = msgspec.msgpack.Decoder(Timer).decode
_child: Final = msgspec.msgpack.Decoder(Child).decode
_slot: Final = msgspec.msgpack.Decoder(HeldSlot).decode
_letter: Final = msgspec.msgpack.Decoder(DeadLetter).decode


def text(value: str | None) -> str | None:
    """`value` as a column of text can hold it: without NUL and lone surrogates, which the record itself keeps."""
    if value is None or (value.isascii() and "\0" not in value):
        return value
    return value.replace("\0", "\N{SYMBOL FOR NULL}").encode("utf-8", "replace").decode()


def _texts(*values: str) -> tuple[str | None, ...]:
    """The same of several at once, which nearly always can be held as they are."""
    together = "".join(values)
    return values if together.isascii() and "\0" not in together else tuple(map(text, values))


def head_row(hashed: bytes, value: bytes) -> _Row:
    head = _head(value)
    where = (hashed, head.saga_id, text(head.key), head.pk, head.part)
    return (*where, head.run, head.awaits_start, head.created_at, value)


def head_changes(hashed: bytes, value: bytes) -> _Row:
    head = _head(value)
    return hashed, head.run, head.awaits_start, value


def run_row(pk: int, run: int, value: bytes) -> _Row:
    each = _instance(value)
    return (
        *(pk, run, each.saga_id, text(each.key), each.status, each.revision, _json(each.state), _json(each.result)),
        *(text(each.reason), text(each.last_message_type), each.is_paused),
        *(each.created_at, each.updated_at, each.ended_at, value),
    )


def run_changes(pk: int, run: int, value: bytes) -> _Row:
    each = _instance(value)
    return (
        *(pk, run, each.status, each.revision, _json(each.state), _json(each.result)),
        *(text(each.reason), text(each.last_message_type), each.is_paused),
        *(each.updated_at, each.ended_at, value),
    )


def entry_row(pk: int, run: int, number: int, value: bytes) -> _Row:
    entry = _entry(value)
    return (
        *(pk, run, number, entry.revision, entry.disposition, *_texts(entry.type, entry.message_id)),
        *(entry.status_after, text(entry.reason), entry.at, value),
    )


def inbox_row(part: int, value: bytes) -> _Row:
    each = _envelope(value)
    return (
        *(part, *_texts(each.saga_id, each.key, each.type, each.id)),
        *(each.attempt, each.due_at, each.accepted_at, text(each.last_error), value),
    )


def inbox_changes(part: int, seq: int, value: bytes) -> _Row:
    each = _envelope(value)
    return part, seq, each.attempt, each.due_at, text(each.last_error), value


def left_row(part: int, value: bytes) -> _Row:
    each = _envelope(value)
    return (part, *_texts(each.saga_id, each.key, each.type, each.id), each.accepted_at, value)


def outbox_row(part: int, value: bytes) -> _Row:
    each = _effect(value)
    saga_id, key, target, effect_key = _texts(
        each.saga_id, each.key, f"{each.target_kind}:{each.target_id}", each.effect_key
    )
    return (part, saga_id, key, each.run, target, effect_key, each.created_at, value)


def outbox_changes(part: int, seq: int, value: bytes) -> _Row:
    each = _effect(value)
    return part, seq, each.attempt, each.due_at, text(each.last_error), text(each.dead_letter_id), value


def timer_row(due: int, timer_id: str, value: bytes) -> _Row:
    timer = _timer(value)
    envelope = timer.envelope
    whose = (text(envelope.saga_id), text(envelope.key), envelope.run)
    return (due, timer_id, *whose, text(timer.name), text(envelope.type), _moment(due), value)


def letter_row(letter_id: str, value: bytes) -> _Row:
    each = _letter(value)
    return (
        *(letter_id, text(each.saga_id), text(each.key), key_hash(each.saga_id, each.key), text(each.type)),
        *(text(each.code), text(each.reason), each.attempts, each.at, value),
    )


def child_row(place: tuple[int, int, int, int, int], value: bytes) -> _Row:
    each = _child(value)
    return (*place, text(each.saga_id), text(each.key), each.run, each.spawned_at, each.ended_at, value)


def slot_row(place: tuple[str, str, int], value: bytes) -> _Row:
    each = _slot(value)
    return (*place, text(each.correlation_key), text(each.message_id), each.taken_at, value)


def _json(value: bytes | None) -> str | None:
    return None if value is None else text(value.decode("utf-8", "replace"))


def _moment(micros: int) -> datetime:
    seconds, rest = divmod(micros, 1_000_000)
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest)
