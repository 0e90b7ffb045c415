"""The saga store over an ordered key-value store: one row a fact, one key-value commit a batch.

The rows (the first part of a key names its table; times are microseconds since 1970):

    correlation     saga id, hash of saga and key       Head; random order, so written only for a new key or run
    state           pk, run                             Instance
    instance_index  saga id, status, created, pk, run   empty; moved when a run's status changes. A key whose first
                                                        message waits is run 0, `pending`, and its row is the Head
    transition      pk, run, entry number               HistoryEntry
    dedupe          pk, hash of the dedupe key          Mark
    inbox, outbox   partition, number                   Envelope, OutboxEffect
    timer           due, id                             Timer
    dead_letter     id                                  DeadLetter; found by saga and by key through dead_letter_index
    feed            number of its first event           the events of one commit, unit by unit
    lease           partition                           (holder, epoch)
    definition, saga("registry", id)                    RegisteredDefinition, and its document as JSON for everybody
    saga_seen       saga id                             empty: which sagas have rows
    meta            "schema", "store_id"

How a commit works:

1. The batch is planned in memory as if its units were written one after the other: each meets what the store knows
   and what the units before it changed. A unit that does not fit is left out with its conflict, and so are the later
   units of the same instance, which were decided on top of it. Everything is encoded here, so that a value that cannot
   be stored is refused as the fault of its own unit.
2. What planning needs and is not in memory is read first, in one read.
3. The rest is one key-value commit. It checks the lease row, the versionstamp of each head that it replaces, and the
   absence of each mark, new head, new run and new history row. A failed check is news: it is read, and the batch
   planned again.

What is believed without asking, and why that is sound:

- `acquire` writes all 64 lease rows in one commit, so all of them change together and one check stands for all.
- Only the holder of the lease writes instances, inbox, outbox, timers and dead letters, and a lease belongs to one
  object. As long as that check holds, nobody but this object has touched them since `acquire`; so a run still is at
  the revision that it remembers, and a row that it added or handed out, and has not consumed since, is there. What it
  does not remember is looked up. The memory is bounded, and dropped with the lease, after any error, and when the
  lease of somebody else is used.
- No row can carry a surrogate number (pk) that this object reserved and has not used: there is nothing to check.
- A conflict found by memory alone is never reported: the rows are read, and the unit looked at once more.

What we dislike about it: a state is written whole at each transition, and a listing over many sagas merges as many
scans as there are sagas times statuses.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import heapq
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from datetime import datetime
from functools import lru_cache, partial
from typing import Final, Protocol, TypeVar, cast

import msgspec

from sagaloom.definitions import SAGA_INSTANCE_STATUSES, SagaDurabilityTier, SagaInstanceStatus
from sagaloom.engine.records import (
    DeadLetter,
    Envelope,
    FeedEvent,
    Head,
    HistoryEntry,
    Instance,
    Mark,
    OutboxEffect,
    PendingTimer,
    Timer,
)
from sagaloom.errors import BackendUnavailable, ConfigurationError, Fenced, MessageRejected, SagasError, StoreCorrupt
from sagaloom.ids import PARTITIONS, instance_id, key_hash, partition_of
from sagaloom.ports.keyvalue import Check, Committed, Conflicted, Entry, Key, KeyValue, Slot
from sagaloom.ports.store import (
    CommitResult,
    Conflict,
    InboxRow,
    InstanceFilter,
    Lease,
    Loaded,
    OutboxRow,
    RegisteredDefinition,
    RowRef,
    UnitOfWork,
)

__all__ = ["ROW_BYTES_MAX", "SCHEMA", "KvSagaStore", "Ownership"]

SCHEMA: Final = 1
ROW_BYTES_MAX: Final = 256 << 20

_TIERS: Final[frozenset[SagaDurabilityTier]] = frozenset({"t1", "t2"})
_RUNS_KNOWN_MAX: Final = 65_536
_HEADS_KNOWN_MAX: Final = 65_536
_ROWS_KNOWN_MAX: Final = 262_144
_FRESH_PKS_MAX: Final = 65_536
_ROUNDS_MAX: Final = 16
_PAGE: Final = 256

_SCHEMA_KEY: Final[Key] = ("meta", "schema")
_STORE_ID_KEY: Final[Key] = ("meta", "store_id")
_PROBE_KEY: Final[Key] = ("meta", "probe")
_FEED_KEY: Final[Key] = ("feed", Slot("feed", 0))

_encode = msgspec.msgpack.Encoder().encode
_to_json = msgspec.json.Encoder().encode
_decode_head = msgspec.msgpack.Decoder(Head).decode
_decode_instance = msgspec.msgpack.Decoder(Instance).decode
_decode_entry = msgspec.msgpack.Decoder(HistoryEntry).decode
_decode_mark = msgspec.msgpack.Decoder(Mark).decode
_decode_envelope = msgspec.msgpack.Decoder(Envelope).decode
_decode_effect = msgspec.msgpack.Decoder(OutboxEffect).decode
_decode_timer = msgspec.msgpack.Decoder(Timer).decode
_decode_dead_letter = msgspec.msgpack.Decoder(DeadLetter).decode
_decode_events = msgspec.msgpack.Decoder(tuple[tuple[FeedEvent, ...], ...]).decode
_decode_lease = msgspec.msgpack.Decoder(tuple[str, int]).decode
_decode_definition = msgspec.msgpack.Decoder(RegisteredDefinition).decode

_R = TypeVar("_R")
_RunKey = tuple[int, int]
_RunFacts = tuple[int, int, SagaInstanceStatus, datetime]
"""Of a stored run: revision, entries, status, created_at."""


# What a named tuple's own constructor does, without its Python frame: a third of the time, for each row of a commit.
_check: Final = cast("Callable[[tuple[Key, int | None]], Check]", partial(tuple.__new__, Check))  # pyright: ignore[reportUnknownMemberType]


@lru_cache(maxsize=16_384)
def _slot(counter: str, offset: int) -> Slot:
    return Slot(counter, offset)


class Ownership(Protocol):
    """Keeps other live processes out of a store while this one has it; `sagaloom.kv.ownership.OwnerLock` is one."""

    def take(self, holder: str) -> None:
        """Takes the store, or raises a typed, retryable error that names who has it. Taking twice is no error."""
        ...

    def free(self) -> None:
        """Lets the next one in. Freeing twice is no error."""
        ...


class _Plan:
    """What a batch will write, unit by unit, and what it will have changed."""

    __slots__ = (
        "assumed_new",
        "checks",
        "conflicts",
        "consumed",
        "dead_letters",
        "events",
        "feed_count",
        "heads",
        "inbox",
        "inserts",
        "lost",
        "marks",
        "outbox",
        "pks",
        "runs",
        "sagas",
        "timers",
        "writes",
    )

    def __init__(self) -> None:
        self.conflicts: dict[int, Conflict] = {}
        self.lost: set[int] = set()
        """Surrogate numbers of instances of which a unit was left out."""
        self.checks: list[Check] = []
        self.writes: dict[Key, bytes | None] = {}
        """The last word on each key; None deletes."""
        self.inserts: list[tuple[Key, bytes]] = []
        """Rows that must be new: history, marks, and those whose number the commit gives."""
        self.runs: dict[_RunKey, _RunFacts] = {}
        self.heads: dict[Key, Head] = {}
        self.marks: dict[Key, bool] = {}
        self.assumed_new: set[Key] = set()
        """Marks whose absence only their insert will find out."""
        self.consumed: set[Key] = set()
        self.timers: set[Key] = set()
        self.dead_letters: dict[str, DeadLetter] = {}
        self.inbox: list[int] = []
        """The partition of each new row, in the order of their numbers."""
        self.outbox: list[int] = []
        self.events: list[msgspec.Raw] = []
        self.feed_count = 0
        self.pks: set[int] = set()
        self.sagas: set[str] = set()


class KvSagaStore:
    """A `SagaStore` over a `KeyValue`, which it closes with itself. One object belongs to one event loop.

    `owner` keeps a second live process from taking a store that lives in a file. Without it the lease alone decides:
    the later process wins, and the earlier one's writes are refused.

    >>> import asyncio
    >>> from datetime import UTC, datetime
    >>> from sagaloom.kv import MemoryKeyValue
    >>> async def example() -> int:
    ...     store = KvSagaStore(MemoryKeyValue())
    ...     lease = await store.acquire("worker-1", now=datetime(2024, 5, 1, tzinfo=UTC))
    ...     result = await store.commit([], lease=lease)
    ...     return len(result.conflicts)
    >>> asyncio.run(example())
    0
    """

    def __init__(self, kv: KeyValue, *, owner: Ownership | None = None) -> None:
        self._kv = kv
        self._owner = owner
        self._writing = asyncio.Lock()
        self._store_id = ""
        self._problem: str | None = None
        self._lease: Lease | None = None
        self._lease_stamp = 0
        # How many commits have ended: a read that saw another number may not teach us what is there.
        self._generation = 0
        self._runs: dict[_RunKey, tuple[int, _RunFacts]] = {}
        self._heads: dict[Key, tuple[int, Head]] = {}
        self._rows: dict[Key, None] = {}  # inbox, outbox and timers that are there
        self._fresh_pks: set[int] = set()
        self._sagas_seen: set[str] = set()

    @property
    def id(self) -> str:
        return "kv-saga-store"

    @property
    def store_id(self) -> str:
        """Known after the first awaited call; `open()` is one that does nothing else."""
        if not self._store_id:
            raise ConfigurationError(
                f"{self._kv.name} has not been opened: await store.open() or store.acquire() first"
            )
        return self._store_id

    @property
    def tiers(self) -> frozenset[SagaDurabilityTier]:
        return _TIERS

    @property
    def problem(self) -> str | None:
        problem: str | None = self._problem or getattr(self._kv, "problem", None)
        return problem

    async def open(self) -> None:
        """Reads the store's marker, or writes it into an empty store. Every other method does so by itself."""
        if self._store_id:
            return
        schema, store_id = await self._kv.get_many([_SCHEMA_KEY, _STORE_ID_KEY])
        if schema is None:
            await self._commit_kv(
                checks=[Check(_SCHEMA_KEY, None)],
                puts=[(_SCHEMA_KEY, str(SCHEMA).encode()), (_STORE_ID_KEY, uuid.uuid4().hex.encode())],
            )
            # Conflicted means that somebody else was faster; either way there is one now.
            schema, store_id = await self._kv.get_many([_SCHEMA_KEY, _STORE_ID_KEY])
        if schema is None or store_id is None or not schema.value.isdigit():
            raise StoreCorrupt(f"{self._kv.name}: rows {_SCHEMA_KEY!r} and {_STORE_ID_KEY!r} are no store's marker")
        if int(schema.value) > SCHEMA:
            raise ConfigurationError(
                f"{self._kv.name} was written with schema {int(schema.value)}, this version reads up to {SCHEMA}: "
                "upgrade sagaloom, or choose another store"
            )
        self._store_id = store_id.value.decode()

    async def close(self) -> None:
        self._forget()
        self._lease = None
        await self._kv.close()
        if self._owner is not None:
            self._owner.free()

    # -- the lease ------------------------------------------------------------------------------------------------

    async def acquire(self, holder: str, *, now: datetime) -> Lease:
        if self._owner is not None:
            self._owner.take(holder)
        try:
            await self.open()
            async with self._writing:
                return await self._acquire(holder)
        except BaseException:
            if self._owner is not None and self._lease is None:
                self._owner.free()
            raise

    async def _acquire(self, holder: str) -> Lease:
        self._forget()
        for _ in range(_ROUNDS_MAX):
            rows = await self._kv.get_many([("lease", part) for part in range(PARTITIONS)])
            epochs = [_decoded(self._kv, row, _decode_lease)[1] for row in rows if row is not None]
            lease = Lease(holder, max(epochs, default=0) + 1)
            value = _encode(_held_by(lease))
            done = await self._commit_kv(
                checks=[
                    Check(("lease", part), None if row is None else row.versionstamp) for part, row in enumerate(rows)
                ],
                puts=[(("lease", part), value) for part in range(PARTITIONS)],
            )
            if isinstance(done, Committed):
                self._lease, self._lease_stamp = lease, done.versionstamp
                return lease
        raise BackendUnavailable(f"{self._kv.name}: others took the lease {_ROUNDS_MAX} times while {holder} tried")

    async def release(self, lease: Lease) -> None:
        async with self._writing:
            self._forget()
            rows = await self._kv.get_many([("lease", part) for part in range(PARTITIONS)])
            held = [
                row for row in rows if row is not None and _decoded(self._kv, row, _decode_lease) == _held_by(lease)
            ]
            if held:
                value = _encode(("", lease.epoch))
                await self._commit_kv(
                    checks=[Check(row.key, row.versionstamp) for row in held], puts=[(row.key, value) for row in held]
                )
            if lease == self._lease:
                self._lease = None
        if self._owner is not None and self._lease is None:
            self._owner.free()

    async def _take_up(self, lease: Lease, part: int) -> None:
        """Makes `lease` the one that commits check; raises `Fenced` when it is not the newest."""
        row = await self._kv.get(("lease", part))
        if row is None or _decoded(self._kv, row, _decode_lease) != _held_by(lease):
            self._lease = None
            self._forget()
            raise self._fenced(lease, row)
        if lease != self._lease or row.versionstamp != self._lease_stamp:
            self._forget()
            self._lease, self._lease_stamp = lease, row.versionstamp

    def _fenced(self, lease: Lease, row: Entry | None) -> Fenced:
        holder, epoch = ("", 0) if row is None else _decoded(self._kv, row, _decode_lease)
        now = f"{holder!r} holds it with epoch {epoch}" if holder else "nobody holds it"
        return Fenced(
            f"{self._kv.name}: the lease of {lease.holder!r} (epoch {lease.epoch}) is over, now {now}: "
            "nothing was written; stop writing and acquire again"
        )

    # -- writing --------------------------------------------------------------------------------------------------

    async def reserve_pks(self, count: int) -> int:
        await self.open()
        done = await self._commit_kv(reserve={"pk": count})
        assert isinstance(done, Committed)  # without checks there is nothing to conflict with
        first = done.bases["pk"]
        if len(self._fresh_pks) + count <= _FRESH_PKS_MAX:
            self._fresh_pks.update(range(first, first + count))
        return first

    async def probe(self) -> None:
        await self.open()
        await self._commit_kv(puts=[(_PROBE_KEY, b"")])

    async def put_definitions(self, definitions: Sequence[RegisteredDefinition]) -> None:
        await self.open()
        puts: list[tuple[Key, bytes]] = []
        for definition in definitions:
            puts.append((("definition", definition.saga_id), _encode(definition)))
            puts.append((("saga", "registry", definition.saga_id), _to_json(definition.document)))
        await self._commit_kv(puts=puts)

    async def commit(self, units: Sequence[UnitOfWork], *, lease: Lease) -> CommitResult:
        if not self._store_id:
            await self.open()
        async with self._writing:
            part = units[0].part if units else 0
            if lease != self._lease:
                await self._take_up(lease, part)
            return await self._commit_or_bisect(units, lease, set())

    async def _commit_or_bisect(self, units: Sequence[UnitOfWork], lease: Lease, lost: set[int]) -> CommitResult:
        """Commits `units`; when the batch as a whole is refused, halves it until the unit at fault stands alone.

        The halves are committed in order, nothing comes between them, and `lost` tells the second what the first left
        out: so the outcome and the numbers are those of one commit.
        """
        try:
            return await self._commit_planned(units, lease, lost)
        except (TypeError, ValueError, OverflowError) as error:
            self._forget()
            if len(units) == 1:
                lost.add(_pk_of(units[0]))
                return CommitResult({0: _refused(error)}, 0, 0, 0)
            half = len(units) // 2
            first = await self._commit_or_bisect(units[:half], lease, lost)
            second = await self._commit_or_bisect(units[half:], lease, lost)
            return CommitResult(
                {**first.conflicts, **{half + index: conflict for index, conflict in second.conflicts.items()}},
                first.inbox_base or second.inbox_base,
                first.outbox_base or second.outbox_base,
                first.feed_base or second.feed_base,
            )
        except BaseException:
            self._forget()
            raise

    async def _commit_planned(self, units: Sequence[UnitOfWork], lease: Lease, lost: set[int]) -> CommitResult:
        lease_key: Key = ("lease", units[0].part if units else 0)
        marks_there: set[Key] = set()
        doubted: list[Key] = []
        looked_twice = False
        for _ in range(_ROUNDS_MAX):
            dead_letters = await self._read_unknown(units, doubted, marks_there)
            plan = _Plan()
            plan.lost |= lost
            for index, unit in enumerate(units):
                try:
                    conflict = self._place(plan, unit, marks_there, dead_letters)
                    if conflict is not None:
                        _encode(unit)  # What can never be written is refused, whatever else is in its way.
                except (TypeError, ValueError, OverflowError) as error:
                    conflict = _refused(error)
                if conflict is not None:
                    plan.conflicts[index] = conflict
                    plan.lost.add(_pk_of(unit))
            if plan.conflicts and not looked_twice:
                looked_twice = True
                doubted = [key for index in plan.conflicts for key in self._doubt(units[index])]
                if doubted:
                    continue

            done = await self._write(plan, lease_key)
            if isinstance(done, Committed):
                lost |= plan.lost
                bases = done.bases
                return CommitResult(plan.conflicts, bases.get("inbox", 0), bases.get("outbox", 0), bases.get("feed", 0))
            if lease_key in done.failed:
                await self._take_up(lease, units[0].part if units else 0)
            doubted = []
            for key in done.failed:
                if key[0] == "dedupe":
                    marks_there.add(key)
                elif key[0] == "transition":
                    doubted.append(("state", *key[1:3]))
                elif key != lease_key:
                    doubted.append(key)
        raise BackendUnavailable(f"{self._kv.name}: somebody without the lease keeps changing the rows of this batch")

    async def _write(self, plan: _Plan, lease_key: Key) -> Committed | Conflicted:
        """One key-value commit for `plan`, and what is learnt from it."""
        check = Check(lease_key, self._lease_stamp)
        if not plan.writes and not plan.inserts and not plan.feed_count:
            row = await self._kv.get(lease_key)
            if row is None or row.versionstamp != self._lease_stamp:
                return Conflicted((lease_key,))
            return Committed(self._lease_stamp, {})

        puts: list[tuple[Key, bytes]] = []
        deletes: list[Key] = []
        for key, value in plan.writes.items():
            if value is None:
                deletes.append(key)
            else:
                puts.append((key, value))
        inserts = plan.inserts
        if not plan.sagas <= self._sagas_seen:
            puts += [(("saga_seen", saga_id), b"") for saga_id in plan.sagas - self._sagas_seen]
        reserve: dict[str, int] = {}
        if plan.inbox:
            reserve["inbox"] = len(plan.inbox)
        if plan.outbox:
            reserve["outbox"] = len(plan.outbox)
        if plan.feed_count:
            reserve["feed"] = plan.feed_count
            events = _encode(plan.events)
            _check_size(len(events))
            inserts.append((_FEED_KEY, events))
        done = await self._commit_kv(
            checks=[check, *plan.checks], inserts=inserts, puts=puts, deletes=deletes, reserve=reserve
        )
        if isinstance(done, Committed):
            self._generation += 1
            self._learn(plan, done)
        return done

    async def _commit_kv(
        self,
        *,
        checks: Sequence[Check] = (),
        inserts: Sequence[tuple[Key, bytes]] = (),
        puts: Sequence[tuple[Key, bytes]] = (),
        deletes: Sequence[Key] = (),
        reserve: dict[str, int] | None = None,
    ) -> Committed | Conflicted:
        try:
            done = await self._kv.commit(checks=checks, inserts=inserts, puts=puts, deletes=deletes, reserve=reserve)
        except SagasError as error:
            self._problem = error.message
            raise
        self._problem = None
        return done

    # -- planning -------------------------------------------------------------------------------------------------

    def _place(
        self, plan: _Plan, unit: UnitOfWork, marks_there: set[Key], dead_letters: dict[str, DeadLetter]
    ) -> Conflict | None:
        """Adds `unit` to `plan`, whole; or says why not, and leaves `plan` as it was."""
        if unit.outbox_done is not None and unit == UnitOfWork(part=unit.part, outbox_done=unit.outbox_done):
            # Every effect ends as such a unit, so half of all units are.
            row: Key = ("outbox", *unit.outbox_done)
            if row not in self._rows or row in plan.consumed:
                return Conflict("gone", f"outbox row {unit.outbox_done}")
            plan.writes[row] = None
            plan.consumed.add(row)
            return None
        shape = _misshapen(unit)
        if shape is not None:
            return Conflict("refused", shape)
        pk = _pk_of(unit)
        if pk and pk in plan.lost:
            return Conflict("revision", "an earlier unit of the same instance in this batch was not written")
        checks: list[Check] = []
        rows: list[tuple[Key, bytes | None]] = []
        inserts: list[tuple[Key, bytes]] = []

        instance = unit.instance
        run_key = (0, 0)
        if instance is not None:
            run_key = (pk, instance.run)
            run_row: Key = ("state", pk, instance.run)
            facts = plan.runs.get(run_key)
            if facts is None:
                known = self._runs.get(run_key)
                if known is not None:
                    facts = known[1]
                elif pk not in self._fresh_pks:
                    checks.append(_check((run_row, None)))
            if unit.revision_before is None:
                if facts is not None:
                    return _wrong_revision(instance, facts)
            elif facts is None or facts[0] != unit.revision_before or facts[1] != unit.entries_before:
                return _wrong_revision(instance, facts)
            rows.append((run_row, _encode(instance)))
            status = instance.status
            if facts is None or facts[2] != status or facts[3] != instance.created_at:
                if facts is not None:
                    rows.append((("instance_index", instance.saga_id, facts[2], _micros(facts[3]), *run_key), None))
                rows.append((("instance_index", instance.saga_id, status, _micros(instance.created_at), *run_key), b""))
            entry = unit.entry
            if entry is not None:
                # The second belt: whoever else has written this run has written this entry.
                inserts.append((("transition", pk, instance.run, entry.entry_no), _encode(entry)))

        head = unit.head
        head_row: Key = ()
        if head is not None:
            head_row = _head_row(head.saga_id, head.key)
            stored = plan.heads.get(head_row)
            if stored is None:
                known_head = self._heads.get(head_row)
                if known_head is not None:
                    stored = known_head[1]
                    checks.append(_check((head_row, known_head[0])))
            if stored != unit.head_before:
                return Conflict("revision", f"the head of {head.saga_id}:{head.key} is not what was read")
            encoded = _encode(head)
            if stored is None:
                inserts.append((head_row, encoded))
            else:
                rows.append((head_row, encoded))
            if stored is not None and stored.awaits_start and stored.run == 0:
                rows.append((_pending_row(stored), None))
            if head.awaits_start and head.run == 0:
                rows.append((_pending_row(head), encoded))

        unmarked_row: Key = ()
        if unit.unmark is not None:
            unmarked_row = _mark_row(*unit.unmark)
            rows.append((unmarked_row, None))
        mark = unit.mark
        mark_row: Key = ()
        if mark is not None:
            mark_row = _mark_row(unit.mark_pk, mark.dedupe_key)
            if mark_row != unmarked_row:
                is_marked = plan.marks.get(mark_row)
                if is_marked or (is_marked is None and mark_row in marks_there):
                    return Conflict("mark", f"{mark.dedupe_key!r} was seen before")
            inserts.append((mark_row, _encode(mark)))

        # Rows that the unit consumes or replaces must be there. Updates come first: a unit may do both.
        there = self._rows
        consumed: list[Key] = []
        key: Key
        if unit.inbox_update is not None:
            key = ("inbox", *unit.inbox_update.ref)
            if key not in there or key in plan.consumed:
                return Conflict("gone", f"inbox row {unit.inbox_update.ref}")
            rows.append((key, _encode(unit.inbox_update.envelope)))
        if unit.inbox_done is not None:
            key = ("inbox", *unit.inbox_done)
            if key not in there or key in plan.consumed:
                return Conflict("gone", f"inbox row {unit.inbox_done}")
            rows.append((key, None))
            consumed.append(key)
        if unit.outbox_update is not None:
            key = ("outbox", *unit.outbox_update.ref)
            if key not in there or key in plan.consumed:
                return Conflict("gone", f"outbox row {unit.outbox_update.ref}")
            rows.append((key, _encode(unit.outbox_update.effect)))
        if unit.outbox_done is not None:
            key = ("outbox", *unit.outbox_done)
            if key not in there or key in plan.consumed:
                return Conflict("gone", f"outbox row {unit.outbox_done}")
            rows.append((key, None))
            consumed.append(key)
        if unit.timer_done is not None:
            key = _timer_row(unit.timer_done)
            if key not in plan.timers and (key not in there or key in plan.consumed):
                return Conflict("gone", f"timer {unit.timer_done.id}")
            rows.append((key, None))
            consumed.append(key)
        dead_letter: DeadLetter | None = None
        if unit.dead_letter_done is not None:
            dead_letter = plan.dead_letters.get(unit.dead_letter_done)
            if dead_letter is None and ("dead_letter", unit.dead_letter_done) not in plan.consumed:
                dead_letter = dead_letters.get(unit.dead_letter_done)
            if dead_letter is None:
                return Conflict("gone", f"dead letter {unit.dead_letter_done}")
            rows += [(row, None) for row in _dead_letter_rows(dead_letter)]

        inbox_parts: list[int] = []
        if unit.inbox_add:
            number = len(plan.inbox)
            for envelope in unit.inbox_add:
                part = _placed(envelope.saga_id, envelope.key)[1]
                inserts.append((("inbox", part, _slot("inbox", number)), _encode(envelope)))
                inbox_parts.append(part)
                number += 1
        if unit.outbox_add:
            number = len(plan.outbox)
            for effect in unit.outbox_add:
                inserts.append((("outbox", unit.part, _slot("outbox", number)), _encode(effect)))
                number += 1
        if unit.timers_remove:
            for pending in unit.timers_remove:
                key = _timer_row(pending)
                rows.append((key, None))
                consumed.append(key)
        timers_added: list[Key] = []
        if unit.timers_add:
            for timer in unit.timers_add:
                key = ("timer", _micros(timer.due_at), timer.id)
                rows.append((key, _encode(timer)))
                timers_added.append(key)
        if unit.dead_letters_add:
            for letter in unit.dead_letters_add:
                keys = _dead_letter_rows(letter)
                rows += [(keys[0], _encode(letter)), (keys[1], b""), (keys[2], b"")]
        events = _encode(unit.events) if unit.events else b""

        _check_size(max([len(row[1]) for row in rows if row[1]] + [len(row[1]) for row in inserts], default=0))

        # From here on nothing is refused.
        plan.writes.update(rows)
        if unmarked_row and plan.marks.get(unmarked_row):
            plan.inserts = [row for row in plan.inserts if row[0] != unmarked_row]
            if unmarked_row in plan.assumed_new:
                # The delete comes before every insert: it would hide that the first of the two was a duplicate.
                plan.checks.append(_check((unmarked_row, None)))
                plan.assumed_new.discard(unmarked_row)
        plan.inserts += inserts
        if checks:
            plan.checks += checks
        if inbox_parts:
            plan.inbox += inbox_parts
        if unit.outbox_add:
            plan.outbox += [unit.part] * len(unit.outbox_add)
        if events:
            plan.events.append(msgspec.Raw(events))
            plan.feed_count += len(unit.events)
        if instance is not None:
            plan.runs[run_key] = (instance.revision, instance.entries, instance.status, instance.created_at)
            plan.pks.add(pk)
            plan.sagas.add(instance.saga_id)
        if head is not None:
            plan.heads[head_row] = head
            plan.pks.add(head.pk)
            plan.sagas.add(head.saga_id)
        if unmarked_row:
            plan.marks[unmarked_row] = False
        if mark_row:
            if mark_row not in plan.marks:
                plan.assumed_new.add(mark_row)
            plan.marks[mark_row] = True
            plan.pks.add(unit.mark_pk)
        if consumed:
            plan.consumed.update(consumed)
            plan.timers.difference_update(consumed)
        if timers_added:
            plan.timers.update(timers_added)
        if dead_letter is not None:
            plan.consumed.add(("dead_letter", dead_letter.id))
            plan.dead_letters.pop(dead_letter.id, None)
        if unit.dead_letters_add:
            for letter in unit.dead_letters_add:
                plan.dead_letters[letter.id] = letter
        return None

    async def _read_unknown(
        self, units: Sequence[UnitOfWork], doubted: Iterable[Key], marks_there: set[Key]
    ) -> dict[str, DeadLetter]:
        """Reads what planning `units` needs and memory does not have, and what is `doubted`. Adds the marks that it
        meets to `marks_there`, and returns the dead letters that the units consume."""
        wanted: dict[Key, None] = dict.fromkeys(doubted)
        runs, heads, rows = self._runs, self._heads, self._rows
        made: set[object] = set()
        for unit in units:
            instance = unit.instance
            if instance is not None:
                run_key = (instance.pk, instance.run)
                if unit.revision_before is not None and run_key not in runs and run_key not in made:
                    wanted["state", instance.pk, instance.run] = None
                made.add(run_key)
            head = unit.head
            if head is not None:
                head_row = _head_row(head.saga_id, head.key)
                if unit.head_before is not None and head_row not in heads and head_row not in made:
                    wanted[head_row] = None
                made.add(head_row)
            if unit.outbox_done is not None:
                key: Key = ("outbox", *unit.outbox_done)
                if key not in rows:
                    wanted[key] = None
            if unit.inbox_done or unit.inbox_update or unit.outbox_update or unit.timer_done:
                for key in _consumed_rows(unit):
                    if key not in rows:
                        wanted[key] = None
            if unit.dead_letter_done is not None:
                wanted["dead_letter", unit.dead_letter_done] = None
        dead_letters: dict[str, DeadLetter] = {}
        if wanted:
            keys = list(wanted)
            for key, row in zip(keys, await self._kv.get_many(keys), strict=True):
                if key[0] == "dead_letter":
                    if row is not None:
                        letter = _decoded(self._kv, row, _decode_dead_letter)
                        dead_letters[letter.id] = letter
                elif key[0] == "dedupe":
                    if row is not None:
                        marks_there.add(key)
                else:
                    self._learn_row(key, row)
        return dead_letters

    def _doubt(self, unit: UnitOfWork) -> list[Key]:
        """The rows on which a conflict of `unit` may rest, or that may name a better one; all but those that every
        round reads anyway."""
        keys: list[Key] = []
        if unit.instance is not None:
            keys.append(("state", unit.instance.pk, unit.instance.run))
        if unit.head is not None:
            keys.append(_head_row(unit.head.saga_id, unit.head.key))
        if unit.mark is not None:
            keys.append(_mark_row(unit.mark_pk, unit.mark.dedupe_key))
        keys += _consumed_rows(unit)
        return keys

    # -- what is believed -----------------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._generation += 1
        self._runs.clear()
        self._heads.clear()
        self._rows.clear()
        self._fresh_pks.clear()
        self._sagas_seen.clear()

    def _learn(self, plan: _Plan, done: Committed) -> None:
        """Takes over what a commit has changed."""
        stamp = done.versionstamp
        rows = self._rows
        for run_key, facts in plan.runs.items():
            self._runs[run_key] = (stamp, facts)
        for head_row, head in plan.heads.items():
            self._heads[head_row] = (stamp, head)
        for key in plan.consumed:
            rows.pop(key, None)
        base = done.bases.get("inbox", 0)
        for offset, part in enumerate(plan.inbox):
            rows["inbox", part, base + offset] = None
        base = done.bases.get("outbox", 0)
        for offset, part in enumerate(plan.outbox):
            rows["outbox", part, base + offset] = None
        for key in plan.timers:
            rows[key] = None
        self._fresh_pks -= plan.pks
        self._sagas_seen |= plan.sagas
        self._bound()

    def _bound(self) -> None:
        # Forgetting is always right: what is not remembered is looked up.
        _shrink(self._runs, _RUNS_KNOWN_MAX)
        _shrink(self._heads, _HEADS_KNOWN_MAX)
        _shrink(self._rows, _ROWS_KNOWN_MAX)

    def _learn_row(self, key: Key, row: Entry | None) -> None:
        """Takes over what was read under `key`."""
        table = key[0]
        if table == "state":
            _, pk, run = key
            assert isinstance(pk, int)
            assert isinstance(run, int)
            if row is None:
                self._runs.pop((pk, run), None)
            else:
                self._learn_instance(_decoded(self._kv, row, _decode_instance), row.versionstamp)
        elif table == "correlation":
            if row is None:
                self._heads.pop(key, None)
            else:
                self._heads[key] = (row.versionstamp, _decoded(self._kv, row, _decode_head))
        elif row is None:
            self._rows.pop(key, None)
        else:
            self._rows[key] = None

    def _learn_instance(self, instance: Instance, stamp: int) -> None:
        facts = (instance.revision, instance.entries, instance.status, instance.created_at)
        self._runs[instance.pk, instance.run] = (stamp, facts)

    def _learn_rows(self, rows: Iterable[Entry], generation: int) -> None:
        if generation == self._generation:
            self._rows.update((row.key, None) for row in rows)
            _shrink(self._rows, _ROWS_KNOWN_MAX)

    # -- what the runtime reads -----------------------------------------------------------------------------------

    async def load(self, keys: Sequence[tuple[str, str]]) -> list[Loaded]:
        await self.open()
        generation = self._generation
        head_rows = await self._kv.get_many([_head_row(*key) for key in keys])
        heads = [None if row is None else _decoded(self._kv, row, _decode_head) for row in head_rows]
        wanted: list[Key] = [("state", head.pk, head.run) for head in heads if head is not None and head.run]
        rows = iter(await self._kv.get_many(wanted) if wanted else ())
        loaded: list[Loaded] = []
        believed = generation == self._generation
        for head_row, head in zip(head_rows, heads, strict=True):
            instance: Instance | None = None
            if head is not None and head_row is not None:
                if believed:
                    self._heads[head_row.key] = (head_row.versionstamp, head)
                if head.run and (row := next(rows)) is not None:
                    instance = _decoded(self._kv, row, _decode_instance)
                    if believed:
                        self._learn_instance(instance, row.versionstamp)
            loaded.append(Loaded(head, instance))
        self._bound()
        return loaded

    async def load_run(self, saga_id: str, key: str, run: int) -> Instance | None:
        await self.open()
        head = await self._read(_head_row(saga_id, key), _decode_head)
        return None if head is None else await self._read(("state", head.pk, run), _decode_instance)

    async def marks(self, wanted: Sequence[tuple[int, str]]) -> list[Mark | None]:
        await self.open()
        return await self._read_many([_mark_row(*pair) for pair in wanted], _decode_mark)

    async def inbox_page(self, *, after: RowRef | None, limit: int) -> list[InboxRow]:
        return [
            InboxRow(_ref(row), _decoded(self._kv, row, _decode_envelope))
            for row in await self._waiting("inbox", after, limit)
        ]

    async def inbox_rows(self, refs: Sequence[RowRef]) -> list[Envelope | None]:
        await self.open()
        return await self._read_many([("inbox", *ref) for ref in refs], _decode_envelope)

    async def outbox_page(self, *, after: RowRef | None, limit: int) -> list[OutboxRow]:
        return [
            OutboxRow(_ref(row), _decoded(self._kv, row, _decode_effect))
            for row in await self._waiting("outbox", after, limit)
        ]

    async def outbox_rows(self, refs: Sequence[RowRef]) -> list[OutboxEffect | None]:
        await self.open()
        return await self._read_many([("outbox", *ref) for ref in refs], _decode_effect)

    async def timers(
        self, *, due_by: datetime | None = None, after: PendingTimer | None = None, limit: int = 100
    ) -> list[Timer]:
        await self.open()
        generation = self._generation
        rows = await self._kv.scan(
            ("timer",),
            after=None if after is None else _timer_row(after),
            before=None if due_by is None else ("timer", _micros(due_by) + 1),
            limit=limit,
        )
        self._learn_rows(rows, generation)
        return [_decoded(self._kv, row, _decode_timer) for row in rows]

    async def _waiting(self, table: str, after: RowRef | None, limit: int) -> list[Entry]:
        await self.open()
        generation = self._generation
        rows = await self._kv.scan((table,), after=None if after is None else (table, *after), limit=limit)
        self._learn_rows(rows, generation)
        return rows

    # -- what people read -----------------------------------------------------------------------------------------

    async def instances(
        self, wanted: InstanceFilter, *, limit: int, offset: int = 0, cursor: str | None = None
    ) -> tuple[list[Instance], str | None]:
        await self.open()
        found: list[Instance] = []
        skip = offset
        async for instance in self._listed(
            wanted, None if cursor is None else _from_cursor(cursor), limit + offset + 1
        ):
            if skip:
                skip -= 1
            elif len(found) < limit:
                found.append(instance)
            else:
                return found, _to_cursor(found[-1]) if found else None
        return found, None

    async def count_instances(self, wanted: InstanceFilter, *, limit: int = 10_000) -> int:
        await self.open()
        counted = 0
        if wanted.key_prefix:
            async for _ in self._listed(wanted, None, _PAGE):
                counted += 1
                if counted >= limit:
                    break
            return min(counted, limit)
        for prefix in await self._index_prefixes(wanted):
            if counted >= limit:
                break
            if wanted.created_after is None and wanted.created_before is None:
                counted += await self._kv.count(prefix, limit=limit - counted)
            else:
                async for _ in _Walk(self._kv, prefix, wanted, None, _PAGE):
                    counted += 1
                    if counted >= limit:
                        break
        return counted

    async def runs(self, saga_id: str, key: str) -> list[Instance]:
        await self.open()
        head = await self._read(_head_row(saga_id, key), _decode_head)
        found: list[Instance] = []
        before: Key | None = None
        while head is not None:
            rows = await self._kv.scan(("state", head.pk), before=before, limit=_PAGE, reverse=True)
            found += [_decoded(self._kv, row, _decode_instance) for row in rows]
            if len(rows) < _PAGE:
                break
            before = rows[-1].key
        return found

    async def history(self, instance: Instance, *, after_entry: int = 0, limit: int = 50) -> list[HistoryEntry]:
        await self.open()
        prefix: Key = ("transition", instance.pk, instance.run)
        rows = await self._kv.scan(prefix, after=(*prefix, after_entry), limit=limit)
        return [_decoded(self._kv, row, _decode_entry) for row in rows]

    async def dead_letters(
        self, *, saga_id: str | None = None, key: str | None = None, after: str | None = None, limit: int = 50
    ) -> list[DeadLetter]:
        await self.open()
        if saga_id is None:
            prefix: Key = ("dead_letter",)
        elif key is None:
            prefix = ("dead_letter_index", saga_id, b"")
        else:
            prefix = ("dead_letter_index", saga_id, _placed(saga_id, key)[0])
        found: list[DeadLetter] = []
        before = None if after is None else (*prefix, after)
        while len(found) < limit:
            rows = await self._kv.scan(prefix, before=before, limit=limit, reverse=True)
            if saga_id is None:
                letters = [_decoded(self._kv, row, _decode_dead_letter) for row in rows]
            else:
                keys: list[Key] = [("dead_letter", row.key[-1]) for row in rows]
                read = await self._read_many(keys, _decode_dead_letter)
                letters = [letter for letter in read if letter is not None]
            found += [letter for letter in letters if key is None or letter.key == key]
            if len(rows) < limit:
                break
            before = rows[-1].key
        return found[:limit]

    async def dead_letter(self, dead_letter_id: str) -> DeadLetter | None:
        await self.open()
        return await self._read(("dead_letter", dead_letter_id), _decode_dead_letter)

    async def feed(self, *, after: int, limit: int) -> list[tuple[int, FeedEvent]]:
        await self.open()
        # The row that holds number after + 1 may begin before it.
        rows = await self._kv.scan(("feed",), before=("feed", after + 2), limit=1, reverse=True)
        found: list[tuple[int, FeedEvent]] = []
        while True:
            for row in rows:
                number = _number(row)
                for events in _decoded(self._kv, row, _decode_events):
                    for event in events:
                        if number > after and len(found) < limit:
                            found.append((number, event))
                        number += 1
            if len(found) >= limit:
                return found
            last: Key = rows[-1].key if rows else ("feed", after)
            rows = await self._kv.scan(("feed",), after=last, limit=min(limit, _PAGE))
            if not rows:
                return found

    async def feed_bounds(self) -> tuple[int, int]:
        await self.open()
        oldest = await self._kv.scan(("feed",), limit=1)
        newest = await self._kv.scan(("feed",), limit=1, reverse=True)
        if not oldest or not newest:
            return 1, 0
        events = sum(map(len, _decoded(self._kv, newest[0], _decode_events)))
        return _number(oldest[0]), _number(newest[0]) + events - 1

    async def definitions(self) -> list[RegisteredDefinition]:
        await self.open()
        return [_decoded(self._kv, row, _decode_definition) for row in await self._all(("definition",))]

    # -- listing --------------------------------------------------------------------------------------------------

    async def _listed(
        self, wanted: InstanceFilter, before: tuple[int, int, int] | None, expected: int
    ) -> AsyncIterator[Instance]:
        """The instances that `wanted` asks for, newest first, below the position `before`."""
        page = max(1, min(expected, _PAGE))
        walks = [_Walk(self._kv, prefix, wanted, before, page) for prefix in await self._index_prefixes(wanted)]
        ahead: list[tuple[int, int, int, int, Entry]] = []
        for order, walk in enumerate(walks):
            if (row := await walk.next()) is not None:
                ahead.append((*_newest_first(row), order, row))
        heapq.heapify(ahead)
        while ahead:
            rows: list[Entry] = []
            while ahead and len(rows) < page:
                order, row = ahead[0][3:]
                rows.append(row)
                if (following := await walks[order].next()) is None:
                    heapq.heappop(ahead)
                else:
                    heapq.heapreplace(ahead, (*_newest_first(following), order, following))
            for instance in await self._instances_of(rows):
                if instance is not None and instance.key.startswith(wanted.key_prefix):
                    yield instance

    async def _instances_of(self, rows: Sequence[Entry]) -> list[Instance | None]:
        """What index rows stand for; None where a run has changed its status since the index was read."""
        keys: list[Key] = [("state", *row.key[4:]) for row in rows if not row.value]
        read = iter(await self._read_many(keys, _decode_instance))
        found: list[Instance | None] = []
        for row in rows:
            if row.value:
                found.append(_pending_instance(_decoded(self._kv, row, _decode_head)))
            else:
                instance = next(read)
                found.append(instance if instance is not None and instance.status == row.key[2] else None)
        return found

    async def _index_prefixes(self, wanted: InstanceFilter) -> list[Key]:
        saga_ids = wanted.saga_ids or await self._saga_ids()
        statuses = wanted.statuses or SAGA_INSTANCE_STATUSES
        return [
            ("instance_index", saga_id, status)
            for saga_id in dict.fromkeys(saga_ids)
            for status in dict.fromkeys(statuses)
        ]

    async def _saga_ids(self) -> tuple[str, ...]:
        return tuple(str(row.key[1]) for row in await self._all(("saga_seen",)))

    # -- reading rows ---------------------------------------------------------------------------------------------

    async def _read(self, key: Key, decode: Callable[[bytes], _R]) -> _R | None:
        row = await self._kv.get(key)
        return None if row is None else _decoded(self._kv, row, decode)

    async def _read_many(self, keys: Sequence[Key], decode: Callable[[bytes], _R]) -> list[_R | None]:
        rows = await self._kv.get_many(keys) if keys else []
        return [None if row is None else _decoded(self._kv, row, decode) for row in rows]

    async def _all(self, prefix: Key) -> list[Entry]:
        found: list[Entry] = []
        while True:
            rows = await self._kv.scan(prefix, after=found[-1].key if found else None, limit=_PAGE)
            found += rows
            if len(rows) < _PAGE:
                return found


class _Walk:
    """The index rows of one saga and status, newest first, a page at a time."""

    def __init__(
        self,
        kv: KeyValue,
        prefix: Key,
        wanted: InstanceFilter,
        before: tuple[int, int, int] | None,
        page: int,
    ) -> None:
        self._kv = kv
        self._prefix = prefix
        # A key sorts before those that continue it, so the lower bound is inclusive and the upper one is not.
        self._after: Key | None = None
        if wanted.created_after is not None:
            self._after = (*prefix, _micros(wanted.created_after))
        self._before: Key | None = None if before is None else (*prefix, *before)
        if wanted.created_before is not None:
            bound = _micros(wanted.created_before)
            if before is None or bound <= before[0]:
                self._before = (*prefix, bound)
        self._page = page
        self._rows: list[Entry] = []
        self._at = 0
        self._is_last = False

    async def next(self) -> Entry | None:
        if self._at == len(self._rows):
            if self._is_last:
                return None
            self._rows = await self._kv.scan(
                self._prefix, after=self._after, before=self._before, limit=self._page, reverse=True
            )
            self._at = 0
            self._is_last = len(self._rows) < self._page
            if not self._rows:
                return None
            self._before = self._rows[-1].key
        self._at += 1
        return self._rows[self._at - 1]

    def __aiter__(self) -> _Walk:
        return self

    async def __anext__(self) -> Entry:
        row = await self.next()
        if row is None:
            raise StopAsyncIteration
        return row


def _check_size(size: int) -> None:
    if size > ROW_BYTES_MAX:
        raise ValueError(f"a row of {size} bytes is too large for the store: at most {ROW_BYTES_MAX} are allowed")


def _misshapen(unit: UnitOfWork) -> str | None:
    """Why no store could write `unit`, whatever it holds: a fault of the caller."""
    instance = unit.instance
    entry = unit.entry
    if instance is None:
        return None if entry is None else "a history entry comes with its instance"
    revision = unit.revision_before or 0
    entries = unit.entries_before
    if instance.revision == revision:
        if instance.entries < entries:
            return f"{_name(instance)}: {entries} entries cannot become {instance.entries}"
    elif instance.revision != revision + 1 or instance.entries < entries:
        return f"{_name(instance)}: a step leads from revision {revision} to {revision + 1}, not to {instance.revision}"
    if entry is not None and not entries < entry.entry_no <= instance.entries:
        return f"{_name(instance)}: entry {entry.entry_no} is not one of {entries + 1} to {instance.entries}"
    return None


def _pk_of(unit: UnitOfWork) -> int:
    """Which instance `unit` is about; 0 when it does not say."""
    if unit.instance is not None:
        return unit.instance.pk
    if unit.head is not None:
        return unit.head.pk
    return unit.mark_pk


def _consumed_rows(unit: UnitOfWork) -> list[Key]:
    """The inbox, outbox and timer rows that must be there for `unit`."""
    keys: list[Key] = []
    if unit.outbox_done is not None:
        keys.append(("outbox", *unit.outbox_done))
    if unit.inbox_done is not None:
        keys.append(("inbox", *unit.inbox_done))
    if unit.timer_done is not None:
        keys.append(_timer_row(unit.timer_done))
    if unit.inbox_update is not None:
        keys.append(("inbox", *unit.inbox_update.ref))
    if unit.outbox_update is not None:
        keys.append(("outbox", *unit.outbox_update.ref))
    return keys


def _refused(error: Exception) -> Conflict:
    return Conflict("refused", f"{type(error).__name__}: {error}")


def _wrong_revision(instance: Instance, facts: _RunFacts | None) -> Conflict:
    found = "does not exist" if facts is None else f"is at revision {facts[0]} with {facts[1]} entries"
    return Conflict("revision", f"{_name(instance)} {found}")


def _name(instance: Instance) -> str:
    return instance_id(instance.saga_id, instance.key, instance.run)


def _held_by(lease: Lease) -> tuple[str, int]:
    return lease.holder, lease.epoch


def _decoded(kv: KeyValue, row: Entry, decode: Callable[[bytes], _R]) -> _R:
    try:
        return decode(row.value)
    except (msgspec.MsgspecError, ValueError) as error:
        raise StoreCorrupt(
            f"{kv.name}: row {row.key!r} cannot be read ({error}): restore the store from a backup, "
            "or upgrade sagaloom if a newer version wrote it"
        ) from error


def _micros(moment: datetime) -> int:
    # Exact: the float is within a quarter of a microsecond until the year 2255.
    return round(moment.timestamp() * 1_000_000)


@lru_cache(maxsize=16_384)
def _placed(saga_id: str, key: str) -> tuple[bytes, int]:
    """The hash and the partition of a correlation key."""
    hashed = key_hash(saga_id, key)
    return hashed, partition_of(hashed)


def _head_row(saga_id: str, key: str) -> Key:
    return "correlation", saga_id, _placed(saga_id, key)[0]


def _mark_row(pk: int, dedupe_key: str) -> Key:
    return "dedupe", pk, hashlib.blake2b(dedupe_key.encode(), digest_size=16).digest()


def _timer_row(timer: PendingTimer) -> Key:
    return "timer", _micros(timer.due_at), timer.id


def _pending_row(head: Head) -> Key:
    return "instance_index", head.saga_id, "pending", _micros(head.created_at), head.pk, 0


def _pending_instance(head: Head) -> Instance:
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


def _dead_letter_rows(letter: DeadLetter) -> tuple[Key, Key, Key]:
    """The row of a dead letter, and those that find it by its saga and by its key."""
    return (
        ("dead_letter", letter.id),
        ("dead_letter_index", letter.saga_id, b"", letter.id),
        ("dead_letter_index", letter.saga_id, _placed(letter.saga_id, letter.key)[0], letter.id),
    )


def _ref(row: Entry) -> RowRef:
    _, part, seq = row.key
    assert isinstance(part, int)
    assert isinstance(seq, int)
    return RowRef(part, seq)


def _number(row: Entry) -> int:
    number = row.key[-1]
    assert isinstance(number, int)
    return number


def _newest_first(row: Entry) -> tuple[int, int, int]:
    created, pk, run = row.key[3:]
    assert isinstance(created, int)
    assert isinstance(pk, int)
    assert isinstance(run, int)
    return -created, -pk, -run


def _to_cursor(instance: Instance) -> str:
    position = f"{_micros(instance.created_at)}.{instance.pk}.{instance.run}"
    return base64.urlsafe_b64encode(position.encode()).decode().rstrip("=")


def _from_cursor(cursor: str) -> tuple[int, int, int]:
    try:
        position = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode()
        created, pk, run = map(int, position.split("."))
    except (ValueError, binascii.Error) as error:
        raise MessageRejected(f"{cursor!r:.80} is no cursor of this listing: leave it out to start over") from error
    return created, pk, run


_K = TypeVar("_K")
_V = TypeVar("_V")


def _shrink(known: dict[_K, _V], most: int) -> None:
    """Drops the oldest entries of `known` beyond `most`, some more at once so that it is seldom done."""
    if len(known) > most:
        for key in list(known)[: len(known) - most + most // 8]:
            del known[key]
