"""The saga store as plain dicts: what every other store is compared with.

The rules of `sagaloom.ports.store`, written down so that one can see at a glance that they hold; nothing is fast, and
nothing survives the process. One unit after the other is looked at, then written.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime

import msgspec

from sagaloom.definitions import SagaDurabilityTier
from sagaloom.engine.lifecycle import is_terminal
from sagaloom.engine.records import (
    Child,
    ChildStatus,
    DeadLetter,
    Envelope,
    FeedEvent,
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
from sagaloom.errors import BackendUnavailable, Fenced, MessageRejected
from sagaloom.ids import PARTITIONS, key_hash, partition_of
from sagaloom.ports.store import (
    CommitResult,
    Conflict,
    Holding,
    InboxRow,
    InstanceFilter,
    Lease,
    Loaded,
    OutboxRow,
    RegisteredDefinition,
    RowRef,
    SlotClaim,
    Swept,
    UnitOfWork,
)

__all__ = ["MemoryStore"]


class MemoryStore:
    """A `SagaStore` in memory, for tests. Its contents are public: look at them, compare them.

    >>> import asyncio
    >>> async def example() -> int:
    ...     return len(await MemoryStore().definitions())
    >>> asyncio.run(example())
    0
    """

    def __init__(self) -> None:
        self.heads: dict[tuple[str, str], Head] = {}
        self.instances_by_run: dict[tuple[int, int], Instance] = {}
        self.entries: dict[tuple[int, int], list[HistoryEntry]] = {}
        self.marks_by_key: dict[tuple[int, str], Mark] = {}
        self.inbox: dict[RowRef, Envelope] = {}
        self.outbox: dict[RowRef, OutboxEffect] = {}
        self.timers_by_place: dict[tuple[datetime, str], Timer] = {}
        self.cursors_by_saga: dict[str, ScheduleCursor] = {}
        self.dead_letters_by_id: dict[str, DeadLetter] = {}
        self.slots_by_place: dict[tuple[str, str, int], HeldSlot] = {}
        self.children_by_place: dict[tuple[int, int, int, int], Child] = {}
        self.standings_by_saga: dict[str, SagaStanding] = {}
        self.events: list[FeedEvent] = []
        """The feed, with what was pruned: `feed_start` is the number of the oldest that is still there."""
        self.feed_start = 1
        self.definitions_by_id: dict[str, RegisteredDefinition] = {}
        self.lease: Lease | None = None
        self._epoch = 0
        self._loaded_by: Lease | None = None
        self._last_pk = 0
        self._last_inbox = 0
        self._last_outbox = 0
        self._feed_commits: list[int] = []  # the number of the first event of each commit
        self._store_id = uuid.uuid4().hex
        self._is_closed = False

    @property
    def id(self) -> str:
        return "memory-saga-store"

    @property
    def store_id(self) -> str:
        return self._store_id

    @property
    def tiers(self) -> frozenset[SagaDurabilityTier]:
        return frozenset({"t1", "t2"})

    def why_not(self, tier: SagaDurabilityTier) -> str | None:
        return None if tier in self.tiers else "what is in memory has no replica: lower the tier to t2"

    @property
    def problem(self) -> str | None:
        return "the store is closed" if self._is_closed else None

    async def acquire(self, holder: str, *, now: datetime) -> Lease:
        self._refuse_if_closed()
        self._epoch += 1
        self.lease = Lease(holder, self._epoch)
        return self.lease

    async def join(self, holder: str, *, works: bool = True) -> Lease:
        return await self.acquire(holder, now=datetime.now(UTC))

    async def tend(self, lease: Lease, *, give_up: Collection[int] = ()) -> Holding:
        if lease != self.lease:
            raise Fenced(f"the lease of {lease.holder!r} (epoch {lease.epoch}) is over, now: {self.lease}")
        return Holding(frozenset(range(PARTITIONS)), frozenset(range(PARTITIONS)))

    @property
    def is_shareable(self) -> bool:
        return False

    @property
    def is_remote(self) -> bool:
        return False

    def stands(self) -> bool:
        return True

    def listen(self, on_news: Callable[[], None]) -> bool:
        return False

    def has_news(self) -> bool:
        return False

    async def arrivals(self, lease: Lease, *, limit: int = 1_000) -> list[InboxRow]:
        """Everything, once: nobody else writes here."""
        waiting = [] if lease == self._loaded_by else await self.inbox_page(after=None, limit=len(self.inbox))
        self._loaded_by = lease
        return waiting

    async def release(self, lease: Lease) -> None:
        if self.lease == lease:
            self.lease = None

    async def reserve_pks(self, count: int) -> int:
        self._refuse_if_closed()
        first = self._last_pk + 1
        self._last_pk += count
        return first

    async def probe(self) -> None:
        self._refuse_if_closed()

    async def close(self) -> None:
        self._is_closed = True

    # -- writing --------------------------------------------------------------------------------------------------

    async def commit(self, units: Sequence[UnitOfWork], *, lease: Lease) -> CommitResult:
        self._refuse_if_closed()
        if lease != self.lease:
            raise Fenced(f"the lease of {lease.holder!r} (epoch {lease.epoch}) is over, now: {self.lease}")
        conflicts: dict[int, Conflict] = {}
        unwritten_pks: set[int] = set()
        before = self._last_inbox, self._last_outbox, len(self.events)
        for index, unit in enumerate(units):
            pk = unit.instance.pk if unit.instance else unit.head.pk if unit.head else unit.mark_pk
            conflict = self._why_refused(unit)
            if conflict is None and pk and pk in unwritten_pks:
                conflict = Conflict("revision", "an earlier unit of this instance was not written")
            if conflict is None:
                conflict = self._why_conflicting(unit)
            if conflict is None:
                self._write(unit)
            else:
                conflicts[index] = conflict
                unwritten_pks.add(pk)
        after = self._last_inbox, self._last_outbox, len(self.events)
        if after[2] > before[2]:
            self._feed_commits.append(before[2] + 1)
        bases = [first + 1 if last > first else 0 for first, last in zip(before, after, strict=True)]
        return CommitResult(conflicts, *bases)

    def _why_refused(self, unit: UnitOfWork) -> Conflict | None:
        try:
            msgspec.msgpack.encode(unit)
        except (TypeError, ValueError, OverflowError) as error:
            return Conflict("refused", f"cannot be encoded: {error}")
        if unit.instance is None:
            return None if unit.entry is None else Conflict("refused", "an entry without its instance")
        revision, entries = unit.revision_before or 0, unit.entries_before
        is_next_revision = unit.instance.revision == revision + 1 and unit.instance.entries >= entries
        is_more_history = unit.instance.revision == revision and unit.instance.entries >= entries
        if not is_next_revision and not is_more_history:
            return Conflict("refused", f"no step leads from {revision} to {unit.instance.revision}")
        if unit.entry is not None and not entries < unit.entry.entry_no <= unit.instance.entries:
            return Conflict("refused", f"entry {unit.entry.entry_no} is none of the next")
        return None

    def _why_conflicting(self, unit: UnitOfWork) -> Conflict | None:
        if unit.instance is not None:
            stored = self.instances_by_run.get((unit.instance.pk, unit.instance.run))
            if unit.revision_before is None:
                fits = stored is None
            else:
                expected = (unit.revision_before, unit.entries_before)
                fits = stored is not None and (stored.revision, stored.entries) == expected
            if not fits:
                return Conflict("revision", f"stored is {stored}")
        if unit.head is not None and self.heads.get((unit.head.saga_id, unit.head.key)) != unit.head_before:
            return Conflict("revision", "another head is stored")
        if unit.mark is not None:
            place = (unit.mark_pk, unit.mark.dedupe_key)
            if place in self.marks_by_key and place != unit.unmark:
                return Conflict("mark", unit.mark.dedupe_key)
        if unit.inbox_update is not None and unit.inbox_update.ref not in self.inbox:
            return Conflict("gone", str(unit.inbox_update.ref))
        if unit.inbox_done is not None and unit.inbox_done not in self.inbox:
            return Conflict("gone", str(unit.inbox_done))
        if unit.outbox_update is not None and unit.outbox_update.ref not in self.outbox:
            return Conflict("gone", str(unit.outbox_update.ref))
        if any(ref not in self.outbox for ref in unit.outbox_done):
            return Conflict("gone", str(unit.outbox_done))
        if unit.timer_done is not None and _place(unit.timer_done) not in self.timers_by_place:
            return Conflict("gone", unit.timer_done.id)
        if unit.dead_letter_done is not None and unit.dead_letter_done not in self.dead_letters_by_id:
            return Conflict("gone", unit.dead_letter_done)
        claim = unit.slot
        if claim is not None and claim.use != "free" and len(self._held(claim.saga_id, claim.key)) >= claim.limit:
            return Conflict("limit", f"all slots of {claim.key!r} are held")
        return None

    def _held(self, saga_id: str, key: str) -> dict[int, HeldSlot]:
        return {place[2]: held for place, held in self.slots_by_place.items() if place[:2] == (saga_id, key)}

    def _write_slot(self, claim: SlotClaim) -> None:
        held, owner = self._held(claim.saga_id, claim.key), (claim.correlation_key, claim.message_id)
        if claim.use == "take":
            number = min(set(range(len(held) + 1)) - held.keys())
            slot = HeldSlot(claim.saga_id, claim.key, number, *owner, claim.at)
            self.slots_by_place[claim.saga_id, claim.key, number] = slot
        elif claim.use == "free":
            for number, slot in sorted(held.items()):
                if (slot.correlation_key, slot.message_id) == owner:
                    del self.slots_by_place[claim.saga_id, claim.key, number]
                    break

    def _write(self, unit: UnitOfWork) -> None:
        if unit.slot is not None:
            self._write_slot(unit.slot)
        if unit.instance is not None:
            run = (unit.instance.pk, unit.instance.run)
            self.instances_by_run[run] = unit.instance
            if unit.entry is not None:
                self.entries.setdefault(run, []).append(unit.entry)
        if unit.head is not None:
            self.heads[unit.head.saga_id, unit.head.key] = unit.head
        if unit.unmark is not None:
            self.marks_by_key.pop(unit.unmark, None)
        if unit.mark is not None:
            self.marks_by_key[unit.mark_pk, unit.mark.dedupe_key] = unit.mark

        if unit.inbox_update is not None:
            self.inbox[unit.inbox_update.ref] = unit.inbox_update.envelope
        if unit.inbox_done is not None:
            del self.inbox[unit.inbox_done]
        for envelope in unit.inbox_add:
            self._last_inbox += 1
            self.inbox[RowRef(partition_of(key_hash(envelope.saga_id, envelope.key)), self._last_inbox)] = envelope

        if unit.outbox_update is not None:
            self.outbox[unit.outbox_update.ref] = unit.outbox_update.effect
        for ref in unit.outbox_done:
            del self.outbox[ref]
        for effect in unit.outbox_add:
            self._last_outbox += 1
            self.outbox[RowRef(unit.part, self._last_outbox)] = effect

        if unit.timer_done is not None:
            del self.timers_by_place[_place(unit.timer_done)]
        for pending in unit.timers_remove:
            self.timers_by_place.pop(_place(pending), None)
        for timer in unit.timers_add:
            self.timers_by_place[_place(timer)] = timer

        if unit.dead_letter_done is not None:
            del self.dead_letters_by_id[unit.dead_letter_done]
        for letter in unit.dead_letters_add:
            self.dead_letters_by_id[letter.id] = letter

        for child in (*unit.children_add, unit.child_done):
            if child is not None:
                self.children_by_place[child.pk, child.parent_run, child.revision, child.position] = child

        self.events.extend(unit.events)

    # -- what the runtime reads -----------------------------------------------------------------------------------

    async def load(self, keys: Sequence[tuple[str, str]], *, parts: Collection[int] | None = None) -> list[Loaded]:
        found: list[Loaded] = []
        for head in [self.heads.get(key) for key in keys]:
            is_wanted = head is not None and (parts is None or head.part in parts)
            found.append(Loaded(head, self.instances_by_run.get((head.pk, head.run)) if head and is_wanted else None))
        return found

    async def load_run(self, saga_id: str, key: str, run: int) -> Instance | None:
        head = self.heads.get((saga_id, key))
        return self.instances_by_run.get((head.pk, run)) if head else None

    async def slots(self, saga_id: str, *, key: str | None = None, limit: int = 1_000) -> list[HeldSlot]:
        found = [held for place, held in sorted(self.slots_by_place.items()) if place[0] == saga_id]
        return [held for held in found if key is None or held.key == key][:limit]

    async def marks(self, wanted: Sequence[tuple[int, str]]) -> list[Mark | None]:
        return [self.marks_by_key.get(place) for place in wanted]

    async def inbox_page(self, *, after: RowRef | None, limit: int) -> list[InboxRow]:
        rows = [InboxRow(ref, self.inbox[ref]) for ref in sorted(self.inbox) if after is None or ref > after]
        return rows[:limit]

    async def inbox_rows(self, refs: Sequence[RowRef]) -> list[Envelope | None]:
        return [self.inbox.get(ref) for ref in refs]

    async def outbox_page(
        self, *, after: RowRef | None, limit: int, parts: Collection[int] | None = None
    ) -> list[OutboxRow]:
        rows = [OutboxRow(ref, self.outbox[ref]) for ref in sorted(self.outbox) if after is None or ref > after]
        return [row for row in rows if parts is None or row.ref.part in parts][:limit]

    async def outbox_rows(self, refs: Sequence[RowRef]) -> list[OutboxEffect | None]:
        return [self.outbox.get(ref) for ref in refs]

    async def timers(
        self, *, due_by: datetime | None = None, after: PendingTimer | None = None, limit: int = 100
    ) -> list[Timer]:
        timers = [
            timer
            for place, timer in sorted(self.timers_by_place.items())
            if (due_by is None or timer.due_at <= due_by) and (after is None or place > _place(after))
        ]
        return timers[:limit]

    async def timer(self, timer_id: str) -> Timer | None:
        return next((timer for timer in self.timers_by_place.values() if timer.id == timer_id), None)

    async def schedule_cursors(self) -> list[ScheduleCursor]:
        return [cursor for _, cursor in sorted(self.cursors_by_saga.items())]

    async def put_schedule_cursor(self, cursor: ScheduleCursor, *, replaces: ScheduleCursor | None) -> bool:
        self._refuse_if_closed()
        if self.cursors_by_saga.get(cursor.saga_id) != replaces:
            return False
        self.cursors_by_saga[cursor.saga_id] = cursor
        return True

    # -- what people read -----------------------------------------------------------------------------------------

    async def instances(
        self, wanted: InstanceFilter, *, limit: int, offset: int = 0, cursor: str | None = None
    ) -> tuple[list[Instance], str | None]:
        found = self._listed(wanted)
        if cursor is not None:
            position = _from_cursor(cursor)
            found = [instance for instance in found if _rank(instance) < position]
        page = found[offset : offset + limit]
        has_more = len(found) > offset + limit
        return page, _to_cursor(page[-1]) if page and has_more else None

    async def count_instances(self, wanted: InstanceFilter, *, limit: int = 10_000) -> int:
        return min(len(self._listed(wanted)), limit)

    def _listed(self, wanted: InstanceFilter) -> list[Instance]:
        waiting = [_pending(head) for head in self.heads.values() if head.awaits_start and head.run == 0]
        found = [instance for instance in (*self.instances_by_run.values(), *waiting) if _is_wanted(instance, wanted)]
        return sorted(found, key=_rank, reverse=True)

    async def runs(self, saga_id: str, key: str) -> list[Instance]:
        head = self.heads.get((saga_id, key))
        found = [instance for (pk, _), instance in self.instances_by_run.items() if head and pk == head.pk]
        return sorted(found, key=lambda instance: instance.run, reverse=True)

    async def children(
        self, pk: int, run: int, *, status: ChildStatus = "live", after: tuple[int, int] | None = None, limit: int = 50
    ) -> list[Child]:
        found = [child for child in self._children_of(pk, run) if child.status == status]
        return [child for child in found if after is None or (child.revision, child.position) > after][:limit]

    async def count_children(self, pk: int, run: int) -> Mapping[ChildStatus, int]:
        counts: dict[ChildStatus, int] = {"live": 0, "completed": 0, "failed": 0, "cancelled": 0}
        for child in self._children_of(pk, run):
            counts[child.status] += 1
        return counts

    def _children_of(self, pk: int, run: int) -> list[Child]:
        return [child for place, child in sorted(self.children_by_place.items()) if place[:2] == (pk, run)]

    async def history(self, instance: Instance, *, after_entry: int = 0, limit: int = 50) -> list[HistoryEntry]:
        entries = self.entries.get((instance.pk, instance.run), [])
        return [entry for entry in entries if entry.entry_no > after_entry][:limit]

    async def dead_letters(
        self, *, saga_id: str | None = None, key: str | None = None, after: str | None = None, limit: int = 50
    ) -> list[DeadLetter]:
        found = [
            letter
            for letter_id, letter in sorted(self.dead_letters_by_id.items(), reverse=True)
            if (saga_id is None or letter.saga_id == saga_id)
            and (key is None or letter.key == key)
            and (after is None or letter_id < after)
        ]
        return found[:limit]

    async def dead_letter(self, dead_letter_id: str) -> DeadLetter | None:
        return self.dead_letters_by_id.get(dead_letter_id)

    async def feed(self, *, after: int, limit: int) -> list[tuple[int, FeedEvent]]:
        skipped = max(after, self.feed_start - 1)
        return list(enumerate(self.events[skipped : skipped + limit], skipped + 1))

    async def feed_bounds(self) -> tuple[int, int]:
        return self.feed_start, len(self.events)

    async def prune_feed(self, *, before: int, limit: int) -> int:
        self._refuse_if_closed()
        ends = [number for number in self._feed_commits if self.feed_start < number <= before][:limit]
        self.feed_start = max(ends, default=self.feed_start)
        return len(ends)

    async def remove_runs(self, runs: Sequence[Instance], *, tombstone_until: datetime, lease: Lease) -> int:
        self._refuse_if_closed()
        if lease != self.lease:
            raise Fenced(f"the lease of {lease.holder!r} (epoch {lease.epoch}) is over, now: {self.lease}")
        removed = 0
        for run in runs:
            place = (run.pk, run.run)
            children = {at: child for at, child in self.children_by_place.items() if at[:2] == place}
            if (
                self.instances_by_run.get(place) != run
                or not is_terminal(run.status)
                or (run.children and any(child.status == "live" for child in children.values()))
            ):
                continue
            del self.instances_by_run[place]
            self.entries.pop(place, None)
            for at in children if run.children else ():
                del self.children_by_place[at]
            head = self.heads[run.saga_id, run.key]
            if head.run == run.run:
                tombstone = msgspec.structs.replace(head, tombstone_until=tombstone_until, ended_as=run.status)
                self.heads[run.saga_id, run.key] = tombstone
            removed += 1
        return removed

    async def remove_tombstones(self, *, due_by: datetime, limit: int, lease: Lease) -> list[tuple[str, str]]:
        self._refuse_if_closed()
        if lease != self.lease:
            raise Fenced(f"the lease of {lease.holder!r} (epoch {lease.epoch}) is over, now: {self.lease}")
        with_runs = {pk for pk, _ in self.instances_by_run}
        over = [
            (head.saga_id, head.key)
            for until, _, _, head in sorted(
                (head.tombstone_until, head.saga_id, key_hash(head.saga_id, head.key), head)
                for head in self.heads.values()
                if head.tombstone_until is not None
            )
            if until <= due_by and head.pk not in with_runs
        ]
        for key in over[:limit]:
            del self.heads[key]
        return over[:limit]

    async def prune_marks(self, *, before: datetime, after: str | None = None, limit: int = 1_000) -> Swept:
        self._refuse_if_closed()
        places = sorted(place for place in self.marks_by_key if after is None or f"{place[0]:020}.{place[1]}" > after)
        looked_at = places[:limit]
        old = [place for place in looked_at if self.marks_by_key[place].at < before]
        for place in old:
            del self.marks_by_key[place]
        has_more = len(places) > len(looked_at)
        return Swept(len(old), f"{looked_at[-1][0]:020}.{looked_at[-1][1]}" if has_more and looked_at else None)

    def others_version(self) -> int | None:
        return 0  # Nobody else can reach it.

    async def put_standing(self, standing: SagaStanding) -> None:
        self._refuse_if_closed()
        self.standings_by_saga[standing.saga_id] = standing

    async def standings(self) -> list[SagaStanding]:
        return [standing for _, standing in sorted(self.standings_by_saga.items())]

    async def put_definitions(self, definitions: Sequence[RegisteredDefinition]) -> None:
        self._refuse_if_closed()
        for definition in definitions:
            self.definitions_by_id[definition.saga_id] = definition

    async def definitions(self) -> list[RegisteredDefinition]:
        return [definition for _, definition in sorted(self.definitions_by_id.items())]

    def _refuse_if_closed(self) -> None:
        if self._is_closed:
            raise BackendUnavailable("the memory store is closed: make another one", retryable=False)


def _place(timer: Timer | PendingTimer) -> tuple[datetime, str]:
    return timer.due_at, timer.id


def _rank(instance: Instance) -> tuple[datetime, int, int]:
    return instance.created_at, instance.pk, instance.run


def _is_wanted(instance: Instance, wanted: InstanceFilter) -> bool:
    return (
        (not wanted.saga_ids or instance.saga_id in wanted.saga_ids)
        and (not wanted.statuses or instance.status in wanted.statuses)
        and instance.key.startswith(wanted.key_prefix)
        and (wanted.created_after is None or instance.created_at >= wanted.created_after)
        and (wanted.created_before is None or instance.created_at < wanted.created_before)
        and (wanted.version_below is None or instance.def_version < wanted.version_below)
    )


def _pending(head: Head) -> Instance:
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


def _to_cursor(instance: Instance) -> str:
    return f"{instance.created_at.isoformat()} {instance.pk} {instance.run}"


def _from_cursor(cursor: str) -> tuple[datetime, int, int]:
    try:
        created_at, pk, run = cursor.split(" ")
        return datetime.fromisoformat(created_at), int(pk), int(run)
    except ValueError as error:
        raise MessageRejected(f"{cursor!r} is no cursor of this listing") from error
