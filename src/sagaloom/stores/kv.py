"""The saga store over an ordered key-value store: one row a fact, one key-value commit a batch.

`sagaloom.stores.rows` names the rows. They are read in `sagaloom.stores.reading` for the runtime, and in
`sagaloom.stores.looking` for people; here they are written, by whoever holds the lease.

How a commit works:

1. The batch is planned in memory as if its units were written one after the other: each meets what the store knows
   and what the units before it changed. A unit that does not fit is left out with its conflict, and so are the later
   units of the same instance, which were decided on top of it. Everything is encoded here, so that a value that cannot
   be stored is refused as the fault of its own unit.
2. A unit that does not fit what is in memory, or of which memory does not know enough, is doubted: its rows are read,
   all in one read, and the batch is planned once more.
3. The rest is one key-value commit. It checks the member row of its writer, the versionstamp of each head that it
   replaces, and the absence of each mark, new head, new run and new history row; while there are others, also that
   nothing has arrived in the partitions it applies messages of, or nothing older than these messages. A failed check is
   news: it is read, and the batch planned again.

What is believed without asking, and why that is sound, is told at the head of `sagaloom.stores.beliefs`.

What we dislike about it: a state is written whole at each transition.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from datetime import datetime
from itertools import pairwise
from typing import Final, TypeVar

from sagaloom.definitions import SagaDurabilityTier
from sagaloom.engine.records import DeadLetter, Instance, SagaStanding, ScheduleCursor
from sagaloom.errors import BackendUnavailable
from sagaloom.ports.keyvalue import Check, Committed, Conflicted, Entry, Key, KeyValue, SeesOthers
from sagaloom.ports.store import (
    CommitResult,
    Conflict,
    Holding,
    InboxRow,
    Lease,
    RegisteredDefinition,
    Swept,
    UnitOfWork,
)
from sagaloom.stores.looking import LookingStore
from sagaloom.stores.planning import ROW_BYTES_MAX, Plan, refused
from sagaloom.stores.reading import SCHEMA
from sagaloom.stores.removing import Remover, mark_cursor, mark_place
from sagaloom.stores.rows import decode_cursor, decode_mark, decoded, encode, number_of, to_json
from sagaloom.stores.tenure import Presence, Tenure, Writer, member_key
from sagaloom.stores.units import brings_only, consumed_row, decided_key, doubt, pk_of

__all__ = ["ROW_BYTES_MAX", "SCHEMA", "KvSagaStore"]

_TIERS: Final[frozenset[SagaDurabilityTier]] = frozenset({"t1", "t2"})
_ROUNDS_MAX: Final = 16
_ARRIVALS_MAX: Final = 3
"""How often a commit looks at what has arrived meanwhile; then it leaves out whatever would have to know of it."""
_PAGE: Final = 256

_PROBE_KEY: Final[Key] = ("meta", "probe")

_R = TypeVar("_R")


class KvSagaStore(LookingStore):
    """A `SagaStore` over a `KeyValue`, which it closes with itself. One object belongs to one event loop.

    `presence` tells which other processes are alive, so that several of them share the work. Without it the later
    process takes everything, and the earlier one's writes are refused.

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

    _keeps_indexes = True
    """Whether rows of ours find runs and dead letters; a store that has indexes does it without."""

    def __init__(self, kv: KeyValue, *, presence: Presence | None = None, reads_only: bool = False) -> None:
        super().__init__(kv, reads_only=reads_only)
        self._tenure = Tenure(kv, presence)
        self._writing = asyncio.Lock()
        self._version_seen: int | None = None
        self._remover = Remover(
            kv, self._beliefs, self._tenure, commit=self._commit_removal, keeps_indexes=self._keeps_indexes
        )

    @property
    def id(self) -> str:
        return "kv-saga-store"

    @property
    def tiers(self) -> frozenset[SagaDurabilityTier]:
        return _TIERS

    def why_not(self, tier: SagaDurabilityTier) -> str | None:
        if tier in self.tiers:
            return None
        return (
            f"{self._kv.name} has no replica that a commit could wait for: lower the tier to t2, or use PostgreSQL "
            "with a synchronous standby (NETSCRIPT_SAGA_STORE=sql)"
        )

    async def close(self) -> None:
        self._beliefs.forget()
        await self._tenure.close()
        await self._kv.close()

    # -- the lease ------------------------------------------------------------------------------------------------

    async def acquire(self, holder: str, *, now: datetime) -> Lease:
        await self.open()
        async with self._writing:
            self._beliefs.forget()
            lease = await self._tenure.join(holder, works=True)
            await self._tenure.take_all(lease)
            return lease

    async def join(self, holder: str, *, works: bool = True) -> Lease:
        await self.open()
        async with self._writing:
            self._beliefs.forget()
            return await self._tenure.join(holder, works=works)

    async def tend(self, lease: Lease, *, give_up: Collection[int] = ()) -> Holding:
        async with self._writing:
            holding = await self._tenure.tend(lease, give_up)
            if holding.gained or give_up:
                self._beliefs.forget()
            return holding

    @property
    def is_shareable(self) -> bool:
        return self._tenure.tells_the_dead

    @property
    def is_remote(self) -> bool:
        return False

    async def writers(self) -> list[Writer]:
        """Everybody who writes, and those who are gone and still hold something: for operators."""
        await self.open()
        return await self._tenure.writers()

    def stands(self) -> bool:
        return self._tenure.stands()

    def listen(self, on_news: Callable[[], None]) -> bool:
        return self._tenure.listen(on_news)

    def has_news(self) -> bool:
        version = self.others_version()
        before, self._version_seen = self._version_seen, version
        return version is None or version != before

    def others_version(self) -> int | None:
        return self._kv.others_version() if isinstance(self._kv, SeesOthers) else None

    async def arrivals(self, lease: Lease, *, limit: int = 1_000) -> list[InboxRow]:
        async with self._writing:
            if lease != self._tenure.lease:
                await self._tenure.look(lease)
            generation = self._beliefs.generation
            await self._tenure.read_arrivals(limit)
            rows = self._tenure.take_arrivals(limit)
            self._beliefs.learn_keys((("inbox", *row.ref) for row in rows), generation)
            return rows

    async def release(self, lease: Lease) -> None:
        async with self._writing:
            self._beliefs.forget()
            await self._tenure.leave(lease)

    # -- writing --------------------------------------------------------------------------------------------------

    async def reserve_pks(self, count: int) -> int:
        await self.open()
        done = await self._commit_kv(reserve={"pk": count})
        assert isinstance(done, Committed)  # without checks there is nothing to conflict with
        return done.bases["pk"]

    async def probe(self) -> None:
        await self.open()
        await self._commit_kv(puts=[(_PROBE_KEY, b"")])

    async def put_definitions(self, definitions: Sequence[RegisteredDefinition]) -> None:
        await self.open()
        puts: list[tuple[Key, bytes]] = []
        for definition in definitions:
            puts.append((("definition", definition.saga_id), encode(definition)))
            puts.append((("saga", "registry", definition.saga_id), to_json(definition.document)))
        await self._commit_kv(puts=puts)

    async def put_standing(self, standing: SagaStanding) -> None:
        await self.open()
        await self._commit_kv(puts=[(("standing", standing.saga_id), encode(standing))])

    async def put_schedule_cursor(self, cursor: ScheduleCursor, *, replaces: ScheduleCursor | None) -> bool:
        await self.open()
        key: Key = ("schedule", cursor.saga_id)
        row = await self._kv.get(key)
        stored = None if row is None else decoded(self._kv, row, decode_cursor)
        if stored != replaces:
            return False
        check = Check(key, None if row is None else row.versionstamp)
        return isinstance(await self._commit_kv(checks=[check], puts=[(key, encode(cursor))]), Committed)

    async def commit(self, units: Sequence[UnitOfWork], *, lease: Lease) -> CommitResult:
        if not self._store_id:
            await self.open()
        async with self._writing:
            if lease != self._tenure.lease:
                self._beliefs.forget()
                await self._tenure.look(lease)
            return await self._commit_or_bisect(units, lease, set())

    async def _commit_or_bisect(self, units: Sequence[UnitOfWork], lease: Lease, lost: set[int]) -> CommitResult:
        """Commits `units`; when the batch as a whole is refused, halves it until the unit at fault stands alone.

        The halves are committed in order, nothing comes between them, and `lost` tells the second what the first left
        out: so the outcome and the numbers are those of one commit.
        """
        try:
            return await self._commit_planned(units, lease, lost)
        except (TypeError, ValueError, OverflowError) as error:
            self._beliefs.forget()
            if len(units) == 1:
                lost.add(pk_of(units[0]))
                return CommitResult({0: refused(error)}, 0, 0, 0)
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
            self._beliefs.forget()
            raise

    async def _commit_planned(self, units: Sequence[UnitOfWork], lease: Lease, lost: set[int]) -> CommitResult:
        tenure = self._tenure
        member = member_key(lease.holder)
        arrived = 0
        marks_there: set[Key] = set()
        dead_letters: dict[str, tuple[DeadLetter, int]] = {}
        doubted: list[Key] = []
        self._beliefs.slots.clear()
        looked_twice = is_careful = False
        strays: set[Key] = set()  # rows of the index that nothing accounts for
        older: dict[Key, bool] = {}  # what a commit has looked for among the arrivals, and whether it was there
        await tenure.bound_own()
        for _ in range(_ROUNDS_MAX):
            if doubted:
                await self._beliefs.look_up(doubted, marks_there, dead_letters)
            plan = Plan(indexes=self._keeps_indexes, is_careful=is_careful)
            plan.lost |= lost
            minded: set[int] = set()
            looked_for: dict[Key, Check] = {}
            for index, unit in enumerate(units):
                conflict: Conflict | None
                try:
                    if unit.part not in tenure.parts and not brings_only(unit):
                        conflict = Conflict("moved", f"partition {unit.part} is not held by {lease.holder!r}")
                    elif unit.outbox_done and not tenure.parts.issuperset([ref.part for ref in unit.outbox_done]):
                        conflict = Conflict(
                            "moved", f"a partition of {unit.outbox_done} is not held by {lease.holder!r}"
                        )
                    else:
                        conflict = None
                        if tenure.is_shared and (decided := decided_key(unit)) is not None:
                            row = consumed_row(unit)
                            if tenure.is_behind(*decided, row):
                                conflict = Conflict("behind", f"something older of {decided[1]!r:.80} has arrived")
                            elif tenure.is_settled(row):
                                pass
                            elif tenure.looks_for_older:
                                check = tenure.older_check(unit.part, *decided, row)
                                if check.key not in older:
                                    looked_for[check.key] = check
                                elif older[check.key]:
                                    conflict = Conflict("behind", f"something older of {decided[1]!r:.80} has arrived")
                            elif arrived > _ARRIVALS_MAX:
                                conflict = Conflict("behind", f"messages keep arriving in partition {unit.part}")
                            else:
                                minded.add(unit.part)
                        if conflict is None:
                            conflict = plan.place(unit, self._beliefs, marks_there, dead_letters)
                    if conflict is not None:
                        encode(unit)  # What can never be written is refused, whatever else is in its way.
                except (TypeError, ValueError, OverflowError) as error:
                    conflict = refused(error)
                if conflict is not None:
                    plan.conflicts[index] = conflict
                    plan.lost.add(pk_of(unit))
            if plan.conflicts and not looked_twice:
                looked_twice = True
                doubted = list({key: None for index in plan.conflicts for key in doubt(units[index])})
                if doubted:
                    continue

            try:
                events = plan.seal(strays)
            except (TypeError, ValueError, OverflowError):
                if is_careful:
                    raise
                is_careful = True
                continue
            plan.checks += looked_for.values()
            plan.checks += tenure.arrival_checks(minded)
            done = await self._write(plan, events, member)
            if isinstance(done, Committed):
                tenure.nothing_arrived(minded)
                lost |= plan.lost
                bases = done.bases
                return CommitResult(plan.conflicts, bases.get("inbox", 0), bases.get("outbox", 0), bases.get("feed", 0))
            if member in done.failed:
                await tenure.look(lease)
            doubted = []
            if any(key[0] == "older" for key in done.failed):
                # The others were looked for as well: what arrives from now on may come after them.
                older.update((key, key in done.failed) for key in looked_for)
                continue
            if any(key[0] == "arrivals" for key in done.failed):
                arrived += 1
                await tenure.read_arrivals(_PAGE)
            for key in done.failed:
                if key[0] == "dedupe":
                    marks_there.add(key)
                elif key[0] == "transition":
                    doubted.append(("state", *key[1:3]))
                elif key[0] == "instance_index":
                    strays.add(key)
                elif key[0] != "arrivals" and key != member:
                    doubted.append(key)
        raise BackendUnavailable(f"{self._kv.name}: somebody without the lease keeps changing the rows of this batch")

    async def _write(self, plan: Plan, events: int, member: Key) -> Committed | Conflicted:
        """One key-value commit for `plan`, and what is learnt from it."""
        tenure = self._tenure
        if not plan.writes and not plan.inserts and not plan.checks:
            row = await self._kv.get(member)
            if row is None or row.versionstamp != tenure.stamp:
                return Conflicted((member,))
            return Committed(tenure.stamp, {})

        puts: list[tuple[Key, bytes]] = []
        deletes: list[Key] = []
        for key, value in plan.writes.items():
            if value is None:
                deletes.append(key)
            else:
                puts.append((key, value))
        inserts = plan.inserts
        if not plan.sagas <= self._beliefs.sagas_seen:
            puts += [(("saga_seen", saga_id), b"") for saga_id in plan.sagas - self._beliefs.sagas_seen]
        reserve: dict[str, int] = {}
        if plan.inbox:
            reserve["inbox"] = len(plan.inbox)
            puts += [(("arrivals", part), b"") for part in set(plan.inbox) - tenure.parts]
        if plan.outbox:
            reserve["outbox"] = len(plan.outbox)
        if events:
            reserve["feed"] = events
        done = await self._commit_kv(
            checks=[Check(member, tenure.stamp), *plan.checks],
            inserts=inserts,
            puts=puts,
            deletes=deletes,
            reserve=reserve,
        )
        if isinstance(done, Committed):
            self._beliefs.learn(plan, done)
            tenure.consumed(plan.consumed)
            if plan.inbox:
                tenure.added(done.bases["inbox"], plan.inbox, plan.inbox_keys)
                if not tenure.parts.issuperset(plan.inbox):
                    tenure.nudge()
        return done

    # -- removing -------------------------------------------------------------------------------------------------

    async def remove_runs(self, runs: Sequence[Instance], *, tombstone_until: datetime, lease: Lease) -> int:
        return await self._removed(lease, lambda: self._remover.remove_runs(runs, tombstone_until, lease))

    async def remove_tombstones(self, *, due_by: datetime, limit: int, lease: Lease) -> list[tuple[str, str]]:
        return await self._removed(lease, lambda: self._remover.remove_tombstones(due_by, limit, lease))

    async def _removed(self, lease: Lease, remove: Callable[[], Awaitable[_R]]) -> _R:
        await self.open()
        async with self._writing:
            try:
                if lease != self._tenure.lease:
                    self._beliefs.forget()
                    await self._tenure.look(lease)
                return await remove()
            except BaseException:
                self._beliefs.forget()
                raise

    async def _commit_removal(
        self, checks: Sequence[Check], puts: Sequence[tuple[Key, bytes]], deletes: Sequence[Key]
    ) -> Committed | Conflicted:
        return await self._commit_kv(checks=checks, puts=puts, deletes=deletes)

    async def prune_marks(self, *, before: datetime, after: str | None = None, limit: int = 1_000) -> Swept:
        await self.open()
        rows = await self._kv.scan(("dedupe",), after=None if after is None else mark_place(after), limit=limit)
        old = [row for row in rows if decoded(self._kv, row, decode_mark).at < before]
        if old and not await self._forget_marks(old):
            return Swept(
                0, mark_cursor(rows[-1].key)
            )  # One of them was freed and given anew: the next walk looks again.
        return Swept(len(old), mark_cursor(rows[-1].key) if len(rows) == limit else None)

    async def _forget_marks(self, rows: Sequence[Entry]) -> bool:
        """Deletes rows of marks that are still what they were when they were read."""
        checks = [Check(row.key, row.versionstamp) for row in rows]
        return isinstance(await self._commit_kv(checks=checks, deletes=[row.key for row in rows]), Committed)

    async def prune_feed(self, *, before: int, limit: int) -> int:
        await self.open()
        rows = await self._kv.scan(("feed",), limit=limit + 1)
        # The last event of a row is the one before the first of the next.
        keys = [row.key for row, following in pairwise(rows) if number_of(following) <= before]
        if keys:
            await self._commit_kv(deletes=keys)
        return len(keys)
