"""Fills a store beforehand: what lines 6, 7 and 8 find when they start. A file through the store's own `commit`,
without syncing; PostgreSQL, after the first thousand, by COPY.

Accounts are live instances with one transition each. `Waiting` says how many of them have something beside that: an
inbox row (half of them due), an effect whose lane backs off, a timer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from bench.databases import database_of, server_url
from bench.workload import CountingStore, account, account_state, open_store
from sagaloom.engine.records import (
    EffectSummary,
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
from sagaloom.ids import PARTITIONS, content_digest, effect_key, key_hash, partition_of
from sagaloom.ports.store import Lease, UnitOfWork

__all__ = ["Waiting", "account_id", "add_effects", "add_timers", "fill"]

_BATCH = 1_000
_LONG = timedelta(hours=1)
_PAYLOAD = b'{"accountId":"a-0000000","cents":1}'


class Waiting(NamedTuple):
    """How many of the accounts have a row of each kind waiting."""

    inbox: int = 0
    outbox: int = 0
    timers: int = 0


_NOTHING = Waiting()


def account_id(number: int) -> str:
    return f"a-{number:07d}"


def fill(path: Path, accounts: int, waiting: Waiting = _NOTHING) -> None:
    """Makes a store with so many live accounts."""
    first = min(accounts, _BATCH) if server_url() is not None else accounts
    pk = asyncio.run(_fill(path, first, accounts - first, waiting))
    if first < accounts:
        _copied(path, accounts - first, _opened_from, first, pk, datetime.now(UTC), waiting)


async def _fill(path: Path, accounts: int, others: int, waiting: Waiting) -> int:
    """Makes the store, and returns the first of the numbers that it has reserved for other accounts."""
    now = datetime.now(UTC)

    async def write(store: CountingStore, lease: Lease) -> int:
        for first in range(0, accounts, _BATCH):
            numbers = range(first, min(first + _BATCH, accounts))
            pk = await store.reserve_pks(len(numbers))
            await _commit(store, lease, _opened_from(numbers, 0, pk - first, now, waiting))
        return await store.reserve_pks(others) if others else 0

    return await _writing(path, write)


def add_timers(path: Path, accounts: int, timers: int) -> None:
    """Gives so many timers to the accounts of a store, due in an hour and later."""
    _add(path, timers, _timers_of, accounts)


def add_effects(path: Path, accounts: int, effects: int) -> None:
    """Gives so many effects to the accounts of a store, each in a lane of its own that backs off for an hour."""
    _add(path, effects, _effects_of, accounts)


def _add(path: Path, count: int, make: Callable[..., list[UnitOfWork]], accounts: int) -> None:
    now = datetime.now(UTC)
    if server_url() is not None:
        _copied(path, count, make, accounts, now)
        return

    async def write(store: CountingStore, lease: Lease) -> int:
        for first in range(0, count, _BATCH):
            await _commit(store, lease, make(range(first, min(first + _BATCH, count)), accounts, now))
        return count

    asyncio.run(_writing(path, write))


def _copied(path: Path, count: int, make: Callable[..., list[UnitOfWork]], *arguments: object) -> None:
    from bench.copying import copied

    copied(asyncio.run(database_of(path)), count, make, *arguments)


def _opened_from(numbers: range, first: int, pk: int, now: datetime, waiting: Waiting) -> list[UnitOfWork]:
    """The accounts `first + number`, with `pk + number`."""
    return [
        _opened(pk + at, first + at, now, account.state_codec.encode(account_state(account_id(first + at))), waiting)
        for at in numbers
    ]


def _timers_of(numbers: range, accounts: int, now: datetime) -> list[UnitOfWork]:
    return [UnitOfWork(part=0, timers_add=tuple(_timer(number % accounts, number, now) for number in numbers))]


def _effects_of(numbers: range, accounts: int, now: datetime) -> list[UnitOfWork]:
    by_part: dict[int, list[OutboxEffect]] = {part: [] for part in range(PARTITIONS)}
    for number in numbers:
        by_part[_part(account_id(number % accounts))].append(_effect(number % accounts, number, now))
    return [UnitOfWork(part=part, outbox_add=tuple(found)) for part, found in by_part.items() if found]


async def _writing(path: Path, write: Callable[[CountingStore, Lease], Awaitable[int]]) -> int:
    _, store = await open_store(path, durable=False)
    try:
        lease = await store.acquire("bench", now=datetime.now(UTC))
        written = await write(store, lease)
        await store.release(lease)
        return written
    finally:
        await store.close()


async def _commit(store: CountingStore, lease: Lease, units: Iterable[UnitOfWork]) -> None:
    result = await store.commit(list(units), lease=lease)
    if result.conflicts:
        raise RuntimeError(f"the store cannot be filled: {result.conflicts}")


def _part(key: str) -> int:
    return partition_of(key_hash(account.id, key))


def _opened(pk: int, number: int, now: datetime, state: bytes, waiting: Waiting) -> UnitOfWork:
    key = account_id(number)
    part = _part(key)
    message_id = f"opened-{number:025d}"
    head = Head(account.id, key, pk, part, 1, now)
    timers: Sequence[Timer] = (_timer(number, number, now),) if number < waiting.timers else ()
    instance = Instance(
        saga_id=account.id,
        key=key,
        pk=pk,
        run=1,
        status="running",
        revision=1,
        state=state,
        def_version=account.version,
        tier="t1",
        created_at=now,
        updated_at=now,
        entries=1,
        message_count=1,
        last_message_type="Opened",
        timers=tuple(PendingTimer(timer.id, timer.due_at, timer.name) for timer in timers),
    )
    step = StepRecord("handle", "Opened", "running", (EffectSummary("send", "bench:ledger", "0" * 40),))
    entry = HistoryEntry(1, 1, "applied", "Opened", message_id, now, "pending", "running", (step,), 1, _PAYLOAD)
    moments = (FeedMoment(FeedKind.STARTED, "running"),)
    inbox: tuple[Envelope, ...] = ()
    if number < waiting.inbox:
        inbox = (_envelope(number, f"waiting-{number:024d}", now),)
        if number % 2:
            # It has failed before, and is not due for a while.
            inbox = (_envelope(number, f"waiting-{number:024d}", now, due_at=now + _LONG),)
    return UnitOfWork(
        part=part,
        head=head,
        instance=instance,
        entry=entry,
        mark_pk=pk,
        mark=Mark(message_id, message_id, content_digest("Opened", _PAYLOAD), now, 1),
        inbox_add=inbox,
        outbox_add=(_effect(number, number, now),) if number < waiting.outbox else (),
        timers_add=tuple(timers),
        feed=(FeedRecord(now, account.id, key, 1, 1, "Opened", message_id, moments),),
    )


def _envelope(number: int, message_id: str, now: datetime, *, due_at: datetime | None = None) -> Envelope:
    key = account_id(number)
    return Envelope(
        account.id,
        key,
        "Moved",
        message_id,
        _PAYLOAD.replace(b"a-0000000", key.encode()),
        now,
        dedupe_key=message_id,
        correlation_key=key,
        attempt=1 if due_at is not None else 0,
        due_at=due_at,
    )


def _timer(number: int, position: int, now: datetime) -> Timer:
    timer_id = f"tm{effect_key(account.id, account_id(number), 1, 1, position)}"
    due_at = now + _LONG + timedelta(milliseconds=position)
    return Timer(timer_id, due_at, _envelope(number, timer_id, due_at))


def _effect(number: int, position: int, now: datetime) -> OutboxEffect:
    key = account_id(number)
    return OutboxEffect(
        effect_key=effect_key(account.id, key, 1, 1, position),
        lane=f"{account.id}\0{key}\0001\0bench:waiting-{position}",
        target_kind="bench",
        target_id="waiting",
        payload=_PAYLOAD,
        saga_id=account.id,
        key=key,
        run=1,
        revision=1,
        position=0,
        message_id=f"opened-{number:025d}",
        created_at=now,
        attempt=1,
        due_at=now + _LONG,
        last_error="no answer within 30 s",
    )
