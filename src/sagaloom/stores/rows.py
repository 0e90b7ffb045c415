"""The rows of the key-value saga store: their keys, and how their values are read and written.

The first part of a key names its table; times are microseconds since 1970:

    correlation     saga id, hash of saga and key       Head; random order, so written only for a new key or run
    state           pk, run                             Instance
    instance_index  saga id, status, created, pk, run   empty; moved when a run's status changes. A key whose first
                                                        message waits is run 0, `pending`, and its row is the Head
    transition      pk, run, entry number               HistoryEntry
    dedupe          pk, hash of the dedupe key          Mark
    inbox, outbox   partition, number                   Envelope, OutboxEffect
    timer           due, id                             Timer
    schedule        saga id                             ScheduleCursor
    slot            saga id, concurrency key, no.   HeldSlot: which message holds it
    child           parent's pk, run, status, place     Child; moved when it ends
    standing        saga id                             SagaStanding
    tombstone       until, saga id, hash                the key whose head is one
    dead_letter     id                                  DeadLetter; found by saga and by key through dead_letter_index
    feed            number of its first event           the FeedRecords of one commit, unit by unit
    member, lease, arrivals                             who may write what: see `sagaloom.stores.tenure`
    definition, saga("registry", id)                    RegisteredDefinition, and its document as JSON for everybody
    saga_seen       saga id                             empty: which sagas have rows
    meta            "schema", "store_id"
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Final, TypeVar

import msgspec

from sagaloom.engine.records import (
    Child,
    ChildStatus,
    DeadLetter,
    Envelope,
    FeedEvent,
    FeedRecord,
    Head,
    HeldSlot,
    HistoryEntry,
    Instance,
    Mark,
    OutboxEffect,
    PendingTimer,
    SagaStanding,
    ScheduleCursor,
    Timer,
)
from sagaloom.errors import StoreCorrupt
from sagaloom.ids import key_hash, partition_of
from sagaloom.ports.keyvalue import Entry, Key, KeyValue, Slot
from sagaloom.ports.store import RegisteredDefinition, RowRef

FEED_KEY: Final[Key] = ("feed", Slot("feed", 0))

encode = msgspec.msgpack.Encoder().encode
to_json = msgspec.json.Encoder().encode
decode_head = msgspec.msgpack.Decoder(Head).decode
decode_instance = msgspec.msgpack.Decoder(Instance).decode
decode_entry = msgspec.msgpack.Decoder(HistoryEntry).decode
decode_mark = msgspec.msgpack.Decoder(Mark).decode
decode_envelope = msgspec.msgpack.Decoder(Envelope).decode
decode_effect = msgspec.msgpack.Decoder(OutboxEffect).decode
decode_timer = msgspec.msgpack.Decoder(Timer).decode
decode_cursor = msgspec.msgpack.Decoder(ScheduleCursor).decode
decode_dead_letter = msgspec.msgpack.Decoder(DeadLetter).decode
_decode_feed = msgspec.msgpack.Decoder(tuple[FeedRecord, ...]).decode
_decode_feed_1 = msgspec.msgpack.Decoder(tuple[tuple[FeedEvent, ...], ...]).decode
decode_lease = msgspec.msgpack.Decoder(tuple[str, int]).decode
decode_child = msgspec.msgpack.Decoder(Child).decode
decode_slot = msgspec.msgpack.Decoder(HeldSlot).decode
decode_standing = msgspec.msgpack.Decoder(SagaStanding).decode
decode_definition = msgspec.msgpack.Decoder(RegisteredDefinition).decode

_R = TypeVar("_R")
_PAGE: Final = 256


@lru_cache(maxsize=16_384)
def slot(counter: str, offset: int) -> Slot:
    return Slot(counter, offset)


def decoded(kv: KeyValue, row: Entry, decode: Callable[[bytes], _R]) -> _R:
    try:
        return decode(row.value)
    except (msgspec.MsgspecError, ValueError) as error:
        raise StoreCorrupt(
            f"{kv.name}: row {row.key!r} cannot be read ({error}): restore the store from a backup, "
            "or upgrade sagaloom if a newer version wrote it"
        ) from error


async def all_below(kv: KeyValue, prefix: Key) -> list[Entry]:
    """Every row below `prefix`, however many pages that takes."""
    found: list[Entry] = []
    while True:
        rows = await kv.scan(prefix, after=found[-1].key if found else None, limit=_PAGE)
        found += rows
        if len(rows) < _PAGE:
            return found


def micros(moment: datetime) -> int:
    # Exact: the float is within a quarter of a microsecond until the year 2255.
    return round(moment.timestamp() * 1_000_000)


@lru_cache(maxsize=16_384)
def placed(saga_id: str, key: str) -> tuple[bytes, int]:
    """The hash and the partition of a correlation key."""
    hashed = key_hash(saga_id, key)
    return hashed, partition_of(hashed)


def head_key(saga_id: str, key: str) -> Key:
    return "correlation", saga_id, placed(saga_id, key)[0]


def mark_key(pk: int, dedupe_key: str) -> Key:
    return "dedupe", pk, hashlib.blake2b(dedupe_key.encode(), digest_size=16).digest()


def timer_key(timer: PendingTimer) -> Key:
    return "timer", micros(timer.due_at), timer.id


CHILD_STATUSES: Final[tuple[ChildStatus, ...]] = ("live", "completed", "failed", "cancelled")
_CHILD_NUMBER: Final = {status: number for number, status in enumerate(CHILD_STATUSES)}


def children_key(pk: int, run: int, status: ChildStatus) -> Key:
    """What the rows of a run's children of one status begin with."""
    return "child", pk, run, _CHILD_NUMBER[status]


def child_key(child: Child, status: ChildStatus) -> Key:
    return *children_key(child.pk, child.parent_run, status), child.revision, child.position


def tombstone_key(head: Head) -> Key:
    """The row that finds a tombstone when its time is over."""
    assert head.tombstone_until is not None
    return "tombstone", micros(head.tombstone_until), head.saga_id, placed(head.saga_id, head.key)[0]


def pending_key(head: Head) -> Key:
    return "instance_index", head.saga_id, "pending", micros(head.created_at), head.pk, 0


def pending_instance(head: Head) -> Instance:
    """A key whose first message waits, as a run with number 0."""
    return Instance(
        saga_id=head.saga_id,
        key=head.key,
        pk=head.pk,
        run=0,
        status="pending",
        revision=0,
        state=b"null",
        def_version=0,
        tier="t1",
        created_at=head.created_at,
        updated_at=head.created_at,
    )


def dead_letter_keys(letter: DeadLetter) -> tuple[Key, Key, Key]:
    """The row of a dead letter, and those that find it by its saga and by its key."""
    return (
        ("dead_letter", letter.id),
        ("dead_letter_index", letter.saga_id, b"", letter.id),
        ("dead_letter_index", letter.saga_id, placed(letter.saga_id, letter.key)[0], letter.id),
    )


def ref_of(row: Entry) -> RowRef:
    _, part, seq = row.key
    assert isinstance(part, int)
    assert isinstance(seq, int)
    return RowRef(part, seq)


def decode_events(value: bytes) -> list[FeedEvent]:
    """The events of a feed row, in their order."""
    try:
        return [event for record in _decode_feed(value) for event in record.events()]
    except msgspec.ValidationError:
        # Schema 1 spelled the events out, unit by unit.
        return [event for events in _decode_feed_1(value) for event in events]


def number_of(row: Entry) -> int:
    number = row.key[-1]
    assert isinstance(number, int)
    return number
