"""Sagas, messages and units of an ordinary kind, for tests of a store."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from msgspec.structs import replace

from sagaloom.engine.concurrency import SlotUse
from sagaloom.engine.records import (
    Child,
    DeadLetter,
    Envelope,
    FeedKind,
    FeedMoment,
    FeedRecord,
    Head,
    HistoryEntry,
    Instance,
    Mark,
    OutboxEffect,
    PendingTimer,
    StepRecord,
    Timer,
)
from sagaloom.ids import effect_key, key_hash, partition_of
from sagaloom.ports.store import CommitResult, InstanceFilter, Lease, RowRef, SagaStore, SlotClaim, UnitOfWork

__all__ = [
    "EVERY",
    "NOW",
    "accepted",
    "at",
    "child_of",
    "claims",
    "current",
    "dead_letter_of",
    "effect_of",
    "envelope_of",
    "feed_of",
    "head_of",
    "kinds",
    "mark_of",
    "next_of",
    "part_of",
    "pending_of",
    "sent",
    "start_of",
    "started",
    "step_of",
    "timer_of",
    "write",
]

NOW = datetime(2024, 5, 1, 9, 30, 0, 123456, tzinfo=UTC)
EVERY = InstanceFilter()


def at(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def part_of(key: str, saga_id: str = "orders") -> int:
    return partition_of(key_hash(saga_id, key))


def head_of(key: str, pk: int, *, saga_id: str = "orders", **more: Any) -> Head:
    """A head, as a first message that was applied leaves it."""
    return replace(Head(saga_id, key, pk, part_of(key, saga_id), 1, NOW), **more)


def envelope_of(key: str, message_id: str, **more: Any) -> Envelope:
    envelope = Envelope("orders", key, "OrderPlaced", message_id, b'{"n":1}', NOW, dedupe_key=message_id)
    return replace(envelope, **more)


def mark_of(message_id: str, **more: Any) -> Mark:
    return Mark(dedupe_key=message_id, message_id=message_id, digest=b"d" * 16, at=NOW, **more)


def feed_of(instance: Instance, *details: str) -> tuple[FeedRecord, ...]:
    """A record of the feed with one event for each of `details`."""
    moments = tuple(FeedMoment(FeedKind.STATE_CHANGED, instance.status, detail) for detail in details)
    saga_id, key, run, revision = instance.saga_id, instance.key, instance.run, instance.revision
    return (FeedRecord(NOW, saga_id, key, run, revision, "OrderPlaced", "m-1", moments),)


def effect_of(instance: Instance, position: int = 0, **more: Any) -> OutboxEffect:
    """An effect of the newest revision of `instance`."""
    effect = OutboxEffect(
        effect_key=effect_key(instance.saga_id, instance.key, instance.run, instance.revision, position),
        lane=f"{instance.key}/charge",
        target_kind="job",
        target_id="charge",
        payload=b'{"amount":42}',
        saga_id=instance.saga_id,
        key=instance.key,
        run=instance.run,
        revision=instance.revision,
        position=position,
        message_id="m-1",
        created_at=NOW,
    )
    return replace(effect, **more)


def timer_of(key: str, timer_id: str, seconds: float, **more: Any) -> Timer:
    return Timer(id=timer_id, due_at=at(seconds), envelope=envelope_of(key, f"m-{timer_id}", origin="timer"), **more)


def dead_letter_of(letter_id: str, key: str = "o-1", **more: Any) -> DeadLetter:
    letter = DeadLetter(
        letter_id, NOW, "orders", key, "OrderPlaced", "SAGA_HANDLER_FAILED", "boom", 5, envelope=envelope_of(key, "m-1")
    )
    return replace(letter, **more)


def start_of(head: Head, **more: Any) -> Instance:
    """The first revision of the newest run of `head`."""
    instance = Instance(
        saga_id=head.saga_id,
        key=head.key,
        pk=head.pk,
        run=head.run,
        status="running",
        revision=1,
        state=b'{"paid":false}',
        def_version=1,
        tier="t1",
        created_at=head.created_at,
        updated_at=head.created_at,
        entries=1,
    )
    return replace(instance, **more)


def step_of(before: Instance | None, after: Instance, **more: Any) -> UnitOfWork:
    """A unit that leads from `before` to `after`, with its history entry."""
    entry = HistoryEntry(
        entry_no=after.entries,
        revision=after.revision,
        disposition="applied",
        type="OrderPlaced",
        message_id=f"m-{after.pk}-{after.run}-{after.entries}",
        at=after.updated_at,
        status_before="pending" if before is None else before.status,
        status_after=after.status,
        steps=(StepRecord("handle", "OrderPlaced", after.status),),
    )
    unit = UnitOfWork(
        part=part_of(after.key, after.saga_id),
        instance=after,
        status_before=None if before is None else before.status,
        revision_before=None if before is None else before.revision,
        entries_before=0 if before is None else before.entries,
        entry=entry,
        mark_pk=after.pk,
    )
    return replace(unit, **more)


def next_of(instance: Instance, **more: Any) -> Instance:
    """`instance` one revision and one entry later."""
    return replace(instance, revision=instance.revision + 1, entries=instance.entries + 1, **more)


def child_of(pk: int, revision: int, position: int, **more: Any) -> Child:
    """A live child of run 1 of number `pk`."""
    facts = {"parent_run": 1, "key": f"child-{revision}-{position}"} | more
    effect_key = f"effect-{pk}-{facts['parent_run']}-{revision}-{position}"
    child = Child(pk, 1, revision, position, "shipments", "", effect_key, NOW)
    return replace(child, **facts)


def pending_of(timer: Timer) -> PendingTimer:
    return PendingTimer(timer.id, timer.due_at, timer.name)


def kinds(result: CommitResult) -> dict[int, str]:
    return {index: conflict.kind for index, conflict in result.conflicts.items()}


def claims(use: SlotUse, owner: str, *, limit: int = 3, key: str = "k", saga_id: str = "orders") -> UnitOfWork:
    """What message `m-1` of this correlation key does to slots."""
    return UnitOfWork(part=part_of(owner, saga_id), slot=SlotClaim(use, saga_id, key, limit, owner, "m-1", NOW))


async def write(store: SagaStore, lease: Lease, *units: UnitOfWork) -> CommitResult:
    """Commits `units`, none of which may conflict."""
    result = await store.commit(units, lease=lease)
    assert result.conflicts == {}
    return result


async def started(store: SagaStore, lease: Lease, key: str, **more: Any) -> Instance:
    """A run that is in `store`, freshly started."""
    head_facts = {name: more.pop(name) for name in ("saga_id", "created_at") if name in more}
    head = head_of(key, await store.reserve_pks(1), **head_facts)
    instance = start_of(head, **more)
    await write(store, lease, step_of(None, instance, head=head))
    return instance


async def accepted(store: SagaStore, lease: Lease, *envelopes: Envelope) -> list[RowRef]:
    """Inbox rows that are in `store`."""
    result = await write(store, lease, UnitOfWork(part=0, inbox_add=envelopes))
    return [RowRef(part_of(each.key, each.saga_id), result.inbox_base + n) for n, each in enumerate(envelopes)]


async def sent(store: SagaStore, lease: Lease, instance: Instance, count: int = 1) -> list[RowRef]:
    """Outbox rows that are in `store`."""
    part = part_of(instance.key, instance.saga_id)
    effects = tuple(effect_of(instance, position) for position in range(count))
    result = await write(store, lease, UnitOfWork(part=part, outbox_add=effects))
    return [RowRef(part, result.outbox_base + n) for n in range(count)]


async def current(store: SagaStore, instance: Instance) -> Instance | None:
    return await store.load_run(instance.saga_id, instance.key, instance.run)
