"""What `sagaloom doctor` finds in a store: what stands still, what is late, who holds what, and the command that
repairs each. It reads what the store shows, and writes nothing."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final, Literal, cast

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sagaloom.definitions import SagaInstanceStatus
    from sagaloom.engine.records import Instance, OutboxEffect
    from sagaloom.ports.store import RowRef
    from sagaloom.stores import KvSagaStore

__all__ = ["Finding", "look_into"]

_SHOWN_MAX: Final = 5
_LOOKED_AT_MAX: Final = 10_000
_LATE: Final = timedelta(minutes=1)
_DAYS_MAX: Final = 300_000
_LIVE: Final[tuple[SagaInstanceStatus, ...]] = ("pending", "running", "compensating")
_SILENT: Final = timedelta(days=1)
"""After how long an instance that waits for nothing of ours is worth a look."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at. `note` is worth knowing, `broken` makes the command fail."""

    check: str
    status: Literal["ok", "note", "broken"]
    detail: str
    repair: str | None = None


async def look_into(store: KvSagaStore, *, is_running: bool) -> list[Finding]:
    """Everything there is to say of an open store. `is_running`: a server works on it right now."""
    return [
        await _leases(store, is_running=is_running),
        await _dead_letters(store),
        await _lanes(store),
        await _lag(store, is_running=is_running),
        await _waiting(store, is_running=is_running),
        await _timers(store, is_running=is_running),
        await _instances(store),
        await _overdue(store),
    ]


async def _leases(store: KvSagaStore, *, is_running: bool) -> Finding:
    writers = await store.writers()
    orphans = [writer for writer in writers if writer.parts and not writer.is_alive]
    if not orphans:
        live = [f"{writer.holder} holds {len(writer.parts)}" for writer in writers if writer.is_alive]
        held = ", ".join(live) or "nobody holds any; they are taken at the next start"
        return Finding(check="leases", status="ok", detail=f"partitions: {held}")
    first = orphans[0]
    count = sum(len(writer.parts) for writer in orphans)
    return Finding(
        check="leases",
        status="broken" if is_running else "note",
        detail=f"{count} partitions belong to the dead: {first.holder} has {len(first.parts)} of them"
        + (", and the server that runs has not taken them over" if is_running else ""),
        repair="restart the server: it takes them as it starts" if is_running else "sagaloom serve MODULE",
    )


async def _dead_letters(store: KvSagaStore) -> Finding:
    letters = await store.dead_letters(limit=_SHOWN_MAX + 1)
    if not letters:
        return Finding(check="dead letters", status="ok", detail="none")
    newest = letters[0]
    count = str(len(letters)) if len(letters) <= _SHOWN_MAX else f"more than {_SHOWN_MAX}"
    return Finding(
        check="dead letters",
        status="broken",
        detail=f"{count}; the newest: {newest.type} of {newest.saga_id}:{newest.key}: {newest.reason}",
        repair=f"sagaloom dead-letters show {newest.id}, then redrive or discard it",
    )


async def _lanes(store: KvSagaStore) -> Finding:
    stalled: list[OutboxEffect] = []
    after: RowRef | None = None
    looked_at = 0
    while looked_at < _LOOKED_AT_MAX and (page := await store.outbox_page(after=after, limit=1_000)):
        stalled += [row.effect for row in page if row.effect.dead_letter_id is not None]
        after, looked_at = page[-1].ref, looked_at + len(page)
    if not stalled:
        return Finding(check="lanes", status="ok", detail=f"none stands still; {looked_at} effects wait to leave")
    first = stalled[0]
    return Finding(
        check="lanes",
        status="broken",
        detail=f"{len(stalled)} stand still behind a dead letter; first {first.saga_id}:{first.key} to "
        f"{first.target_kind}:{first.target_id}: {first.last_error}",
        repair=f"sagaloom dead-letters redrive {first.dead_letter_id}",
    )


async def _waiting(store: KvSagaStore, *, is_running: bool) -> Finding:
    late = datetime.now(UTC) - _LATE
    waiting = [
        row.envelope for row in await store.inbox_page(after=None, limit=1_000) if row.envelope.accepted_at < late
    ]
    if not waiting:
        return Finding(check="inbox", status="ok", detail="no message has waited for more than a minute")
    oldest = min(waiting, key=lambda envelope: envelope.accepted_at)
    said = f": {oldest.last_error}" if oldest.last_error else ""
    return Finding(
        check="inbox",
        status="note",
        detail=f"{len(waiting)} messages wait since {oldest.accepted_at.isoformat(timespec='seconds')} or later, "
        f"first {oldest.type} of {oldest.saga_id}:{oldest.key}, attempt {oldest.attempt}{said}",
        repair=f"sagaloom instances history {oldest.saga_id} {oldest.key}" if is_running else "sagaloom serve MODULE",
    )


async def _timers(store: KvSagaStore, *, is_running: bool) -> Finding:
    late = await store.timers(due_by=datetime.now(UTC) - _LATE, limit=100)
    if not late:
        return Finding(check="timers", status="ok", detail="none is late")
    first = late[0]
    return Finding(
        check="timers",
        status="broken" if is_running else "note",
        detail=f"{len(late)} are late, the first since {first.due_at.isoformat(timespec='seconds')} "
        f"({first.envelope.type} of {first.envelope.saga_id}:{first.envelope.key})",
        repair="restart the server: it fires what is late as it starts"
        if is_running
        else "sagaloom serve MODULE: it fires what is late as it starts",
    )


async def _lag(store: KvSagaStore, *, is_running: bool) -> Finding:
    """Effects that should have left by now and have not, and whose lane does not stand still."""
    now = datetime.now(UTC)
    late: list[OutboxEffect] = []
    after: RowRef | None = None
    looked_at = 0
    while looked_at < _LOOKED_AT_MAX and (page := await store.outbox_page(after=after, limit=1_000)):
        late += [
            row.effect
            for row in page
            if row.effect.dead_letter_id is None and (row.effect.due_at or row.effect.created_at) < now - _LATE
        ]
        after, looked_at = page[-1].ref, looked_at + len(page)
    if not late:
        return Finding(check="lag", status="ok", detail="no effect is a minute late")
    first = min(late, key=lambda effect: effect.created_at)
    waits = timedelta(seconds=round((now - first.created_at).total_seconds()))
    said = f": {first.last_error}" if first.last_error else ""
    return Finding(
        check="lag",
        status="broken" if is_running else "note",
        detail=f"{len(late)} effects are late, the first for {waits}: {first.saga_id}:{first.key} to "
        f"{first.target_kind}:{first.target_id}, attempt {first.attempt}{said}",
        repair=f"see why {first.target_kind}:{first.target_id} does not take it: "
        f"sagaloom instances history {first.saga_id} {first.key}"
        if is_running
        else "sagaloom serve MODULE",
    )


async def _instances(store: KvSagaStore) -> Finding:
    """Live instances that nothing moves any more: a message of theirs was given up, or they wait for one that nobody
    has sent for long."""
    from sagaloom.ports.store import InstanceFilter

    live: list[Instance] = []
    cursor: str | None = None
    while len(live) < _LOOKED_AT_MAX:
        wanted = InstanceFilter(statuses=("running", "compensating"))
        page, cursor = await store.instances(wanted, limit=500, cursor=cursor)
        live += page
        if cursor is None:
            break
    keys = {(instance.saga_id, instance.key) for instance in live}
    letters = [
        letter
        for letter in await store.dead_letters(limit=500)
        if letter.envelope is not None and (letter.saga_id, letter.key) in keys
    ]
    if letters:
        first = letters[-1]
        return Finding(
            check="instances",
            status="broken",
            detail=f"{len({(each.saga_id, each.key) for each in letters})} are stuck behind a message that was given "
            f"up; first {first.saga_id}:{first.key}: {first.type}: {first.reason}",
            repair=f"sagaloom dead-letters redrive {first.id}",
        )
    waiting = {(row.envelope.saga_id, row.envelope.key) for row in await store.inbox_page(after=None, limit=1_000)}
    silent_since = datetime.now(UTC) - _SILENT
    silent = [
        instance
        for instance in live
        if instance.updated_at < silent_since
        and not instance.timers
        and (instance.saga_id, instance.key) not in waiting
    ]
    if not silent:
        return Finding(check="instances", status="ok", detail=f"{len(live)} are live, and none is stuck")
    first_silent = min(silent, key=lambda instance: instance.updated_at)
    where = f"{first_silent.saga_id} {first_silent.key}"
    return Finding(
        check="instances",
        status="note",
        detail=f"{len(silent)} have heard nothing for more than a day and wait for no timer; longest "
        f"{first_silent.saga_id}:{first_silent.key}, {first_silent.status} since "
        f"{first_silent.updated_at.isoformat(timespec='seconds')}" + (" (paused)" if first_silent.is_paused else ""),
        repair=f"sagaloom instances resume {where}"
        if first_silent.is_paused
        else f"send what it waits for, or: sagaloom instances cancel {where}",
    )


async def _overdue(store: KvSagaStore) -> Finding:
    """Live instances that are older than their saga's `active_days`."""
    from sagaloom.ports.store import InstanceFilter

    found: list[str] = []
    for definition in await store.definitions():
        retention = cast("Mapping[str, object]", definition.document.get("retention") or {})
        days = retention.get("activeDays")
        if not isinstance(days, int | float):
            continue
        before = datetime.now(UTC) - timedelta(days=min(days, _DAYS_MAX))
        old = InstanceFilter(saga_ids=(definition.saga_id,), statuses=_LIVE, created_before=before)
        if count := await store.count_instances(old, limit=_LOOKED_AT_MAX):
            found.append(f"{count} of {definition.saga_id} for more than {days:g} days")
    if not found:
        return Finding(check="age", status="ok", detail="no instance is live for longer than its saga's active days")
    return Finding(
        check="age",
        status="note",
        detail=f"live instances that should be over by now: {'; '.join(found)}",
        repair="sagaloom instances list --status running: the oldest are last",
    )
