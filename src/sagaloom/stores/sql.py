"""The saga store on a relational database.

What makes the key-value store correct makes this one correct: batches are planned on what is believed
(`sagaloom.stores.beliefs`), partitions are held by leases (`sagaloom.stores.tenure`), and everything a batch asks for
is one commit of one statement. What a database does better is asked of it: listing and counting runs and dead letters,
the feed with many who commit, and reads of many rows in one round trip.

What we dislike about it: a record is decoded once more on its way in, for the columns that people read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, Protocol, TypeVar, runtime_checkable

from msgspec.structs import replace

from sagaloom.definitions import SAGA_DURABILITY_TIERS, SAGA_INSTANCE_STATUSES, SagaDurabilityTier
from sagaloom.engine.records import DeadLetter, Envelope, FeedEvent, Instance, Mark, Timer
from sagaloom.ids import PARTITIONS
from sagaloom.ports.keyvalue import Check, Committed, Conflicted, Entry, Key, KeyValue
from sagaloom.ports.store import (
    CommitResult,
    Holding,
    InstanceFilter,
    Lease,
    Loaded,
    OutboxRow,
    RegisteredDefinition,
    RowRef,
    UnitOfWork,
)
from sagaloom.stores.kv import KvSagaStore
from sagaloom.stores.listing import from_cursor, to_cursor
from sagaloom.stores.rows import (
    all_below,
    decode_dead_letter,
    decode_effect,
    decode_envelope,
    decode_events,
    decode_head,
    decode_instance,
    decode_timer,
    decoded,
    encode,
    head_key,
    pending_instance,
    placed,
    ref_of,
)
from sagaloom.stores.tenure import Presence

__all__ = ["SqlRows", "SqlSagaStore"]

_EPOCH: Final = datetime.fromtimestamp(0, UTC)
_FIRST: Final = datetime(1, 1, 2, tzinfo=UTC)
_LAST: Final = datetime(9999, 12, 30, tzinfo=UTC)
_R = TypeVar("_R")
_PAGE: Final = 256
_LAST_PLACE: Final = (_LAST, 2**63 - 1, 2**31 - 1)


@runtime_checkable
class SqlRows(KeyValue, Protocol):
    """The rows of a saga store in a relational database; `sagaloom.kv.postgres.PostgresSagaRows` is one."""

    @property
    def store_id(self) -> str: ...

    is_replicated: bool
    """Whether the next commit waits until it is on a synchronous standby; raises `BackendUnavailable` when that takes
    too long, and then commits nothing more until it is there, or was never written."""

    has_ended: bool
    """Set when a commit of unknown outcome turns out to be written: then the lease is over."""

    def why_not(self, tier: SagaDurabilityTier) -> str | None: ...

    async def confirm(self) -> None:
        """Returns when everything that was committed before is on the synchronous standby."""
        ...

    async def open(self) -> None:
        """Brings the schema up to the present version, and finds out `store_id`."""
        ...

    async def listed(
        self,
        saga_ids: Sequence[str],
        statuses: Sequence[str],
        *,
        key_prefix: str,
        created: tuple[datetime, datetime],
        before: tuple[datetime, int, int],
        limit: int,
    ) -> list[tuple[bytes, bool]]: ...

    async def counted(
        self,
        saga_ids: Sequence[str],
        statuses: Sequence[str],
        *,
        key_prefix: str,
        created: tuple[datetime, datetime],
        limit: int,
    ) -> int: ...

    async def loaded(
        self, hashes: Sequence[bytes], *, parts: Collection[int]
    ) -> list[tuple[bytes, int, bytes | None] | None]: ...

    async def effects(self, parts: Collection[int], *, after: tuple[int, int], limit: int) -> list[Entry]: ...

    async def inbox_above(self, seen: Mapping[int, int], *, limit: int) -> list[Entry]: ...

    async def timer_of_id(self, timer_id: str) -> bytes | None: ...

    async def letters(
        self, *, saga_id: str | None, hashed: bytes | None, before: str | None, limit: int
    ) -> list[bytes]: ...

    async def feed_page(self, *, after: int, limit: int) -> list[tuple[int, bytes]]: ...

    async def feed_bounds(self) -> tuple[int, int]: ...

    async def prune_feed(self, *, before: int, limit: int) -> int: ...

    async def commit_removal(
        self, checks: Sequence[Check], puts: Sequence[tuple[Key, bytes]], deletes: Sequence[Key]
    ) -> Committed | Conflicted: ...

    async def forget_marks(self, rows: Sequence[Entry]) -> None: ...

    async def leave(self, connection: object, messages: Sequence[tuple[int, bytes]]) -> None: ...

    async def left(self, parts: Collection[int], *, limit: int) -> list[tuple[int, bytes]]: ...

    async def take_left(self, numbers: Sequence[int]) -> None: ...


@runtime_checkable
class TellsOfLeft(Protocol):
    """What a `Presence` can do that hears when somebody has left messages in a transaction of their own. Optional."""

    may_have_left: bool
    """Set when that may be so, and never when it is certain that it is not."""


class SqlSagaStore(KvSagaStore):
    """A `SagaStore` over `SqlRows`, which it closes with itself. One object belongs to one event loop."""

    _keeps_indexes = False

    def __init__(self, rows: SqlRows, *, presence: Presence | None = None) -> None:
        super().__init__(rows, presence=presence)
        self._rows = rows
        self._tells_of_left = presence if isinstance(presence, TellsOfLeft) else None
        self._none_left: Collection[int] = ()
        """The partitions in which nothing was left when they were last looked at."""
        self._has_heard = True
        """Whether somebody has nudged us since we were last asked for news."""
        self._replicated: frozenset[str] = frozenset()
        """The sagas of tier t3 that are defined here."""

    @property
    def id(self) -> str:
        return "sql-saga-store"

    @property
    def tiers(self) -> frozenset[SagaDurabilityTier]:
        return frozenset(tier for tier in SAGA_DURABILITY_TIERS if self._rows.why_not(tier) is None)

    def why_not(self, tier: SagaDurabilityTier) -> str | None:
        return self._rows.why_not(tier)

    @property
    def is_remote(self) -> bool:
        return True

    async def open(self) -> None:
        if not self._store_id:
            await self._rows.open()
            self._store_id = self._rows.store_id

    async def join(self, holder: str, *, works: bool = True) -> Lease:
        self._rows.has_ended = False
        return await super().join(holder, works=works)

    def stands(self) -> bool:
        return not self._rows.has_ended and super().stands()

    def listen(self, on_news: Callable[[], None]) -> bool:
        def heard() -> None:
            self._has_heard = True
            on_news()

        return super().listen(heard)

    def has_news(self) -> bool:
        heard, self._has_heard = self._has_heard, False
        return heard

    # -- what somebody's own transaction leaves ---------------------------------------------------------------------

    async def leave(self, connection: object, envelopes: Sequence[Envelope]) -> None:
        await self.open()
        messages = [(placed(each.saga_id, each.key)[1], encode(each)) for each in envelopes]
        await self._rows.leave(connection, messages)

    async def left(self, parts: Collection[int], *, limit: int) -> list[tuple[int, Envelope]]:
        await self.open()
        told = self._tells_of_left
        if told is not None:
            if not told.may_have_left and parts == self._none_left:
                return []
            told.may_have_left, self._none_left = False, ()
        left = [
            (number, self._decoded(("left", number), value, decode_envelope))
            for number, value in await self._rows.left(parts, limit=limit)
        ]
        if not left:
            self._none_left = parts
        return left

    async def take_left(self, numbers: Sequence[int]) -> None:
        await self._rows.take_left(numbers)

    # -- what has to be on a standby ------------------------------------------------------------------------------
    #
    # What another process has written is seen as soon as it is committed, which may be before it is on the standby. So
    # whatever is told to anybody, or sent, because of such a row waits for the standby first.

    async def put_definitions(self, definitions: Sequence[RegisteredDefinition]) -> None:
        self._replicated = frozenset(
            definition.saga_id for definition in definitions if definition.document.get("durabilityTier") == "t3"
        )
        await super().put_definitions(definitions)

    async def commit(self, units: Sequence[UnitOfWork], *, lease: Lease) -> CommitResult:
        result = await super().commit(units, lease=lease)
        if self._replicated and any(conflict.kind == "mark" for conflict in result.conflicts.values()):
            await self._rows.confirm()
        return result

    async def _commit_planned(self, units: Sequence[UnitOfWork], lease: Lease, lost: set[int]) -> CommitResult:
        self._rows.is_replicated = bool(self._replicated) and any(map(self._is_replicated, units))
        return await super()._commit_planned(units, lease, lost)

    def _is_replicated(self, unit: UnitOfWork) -> bool:
        if unit.instance is not None:
            return unit.instance.tier == "t3"
        return any(envelope.saga_id in self._replicated for envelope in unit.inbox_add)

    async def tend(self, lease: Lease, *, give_up: Collection[int] = ()) -> Holding:
        holding = await super().tend(lease, give_up=give_up)
        if self._replicated and holding.gained:
            await self._rows.confirm()
        return holding

    async def marks(self, wanted: Sequence[tuple[int, str]]) -> list[Mark | None]:
        marks = await super().marks(wanted)
        if self._replicated and any(marks):
            await self._rows.confirm()
        return marks

    # -- what the runtime reads -----------------------------------------------------------------------------------

    async def load(self, keys: Sequence[tuple[str, str]], *, parts: Collection[int] | None = None) -> list[Loaded]:
        await self.open()
        beliefs = self._beliefs
        generation = beliefs.generation
        wanted = range(PARTITIONS) if parts is None else parts
        rows = await self._rows.loaded([placed(*key)[0] for key in keys], parts=wanted)
        is_believed = generation == beliefs.generation
        loaded: list[Loaded] = []
        for key, row in zip(keys, rows, strict=True):
            if row is None:
                loaded.append(Loaded(None, None))
                continue
            where = head_key(*key)
            head = self._decoded(where, row[0], decode_head)
            instance: Instance | None = None
            if head.run and row[2] is not None:
                instance = self._decoded(("state", head.pk, head.run), row[2], decode_instance)
            if is_believed:
                beliefs.heads[where] = (row[1], head)
                if instance is not None:
                    beliefs.learn_instance(instance)
            loaded.append(Loaded(head, instance))
        beliefs.bound()
        return loaded

    async def outbox_page(
        self, *, after: RowRef | None, limit: int, parts: Collection[int] | None = None
    ) -> list[OutboxRow]:
        if parts is None:
            return await super().outbox_page(after=after, limit=limit)
        await self.open()
        generation = self._beliefs.generation
        rows = await self._rows.effects(parts, after=(-1, 0) if after is None else after, limit=limit)
        self._beliefs.learn_rows(rows, generation)
        return [OutboxRow(ref_of(row), decoded(self._kv, row, decode_effect)) for row in rows]

    async def timer(self, timer_id: str) -> Timer | None:
        await self.open()
        if "\0" in timer_id or not timer_id.isascii():
            return None
        value = await self._rows.timer_of_id(timer_id)
        return None if value is None else self._decoded(("timer", timer_id), value, decode_timer)

    # -- what people read -----------------------------------------------------------------------------------------

    async def instances(
        self, wanted: InstanceFilter, *, limit: int, offset: int = 0, cursor: str | None = None
    ) -> tuple[list[Instance], str | None]:
        await self.open()
        if wanted.version_below is not None:
            return await self._older(wanted, limit=limit, offset=offset, cursor=cursor)
        before = _LAST_PLACE if cursor is None else _place(cursor)
        rows = await self._rows.listed(
            await self._sagas_of(wanted),
            list(dict.fromkeys(wanted.statuses or SAGA_INSTANCE_STATUSES)),
            key_prefix=wanted.key_prefix,
            created=_window(wanted),
            before=before,
            limit=limit + offset + 1,
        )
        found: list[Instance] = []
        for value, waits in rows[offset:]:
            if waits:
                found.append(pending_instance(self._decoded(("correlation",), value, decode_head)))
            else:
                found.append(self._decoded(("state",), value, decode_instance))
        page = found[:limit]
        return page, to_cursor(page[-1]) if page and len(found) > limit else None

    async def _older(
        self, wanted: InstanceFilter, *, limit: int, offset: int, cursor: str | None
    ) -> tuple[list[Instance], str | None]:
        """A page of the runs below a version. It is in no column: few ask, and only between two releases."""
        assert wanted.version_below is not None
        everything = replace(wanted, version_below=None)
        found: list[Instance] = []
        while True:
            page, cursor = await self.instances(everything, limit=_PAGE, cursor=cursor)
            found += [each for each in page if each.def_version < wanted.version_below]
            if cursor is None or len(found) > offset + limit:
                break
        page = found[offset : offset + limit]
        return page, to_cursor(page[-1]) if page and len(found) > offset + limit else None

    async def count_instances(self, wanted: InstanceFilter, *, limit: int = 10_000) -> int:
        await self.open()
        if wanted.version_below is not None:
            return len((await self._older(wanted, limit=limit, offset=0, cursor=None))[0])
        return await self._rows.counted(
            await self._sagas_of(wanted),
            list(dict.fromkeys(wanted.statuses or SAGA_INSTANCE_STATUSES)),
            key_prefix=wanted.key_prefix,
            created=_window(wanted),
            limit=limit,
        )

    async def dead_letters(
        self, *, saga_id: str | None = None, key: str | None = None, after: str | None = None, limit: int = 50
    ) -> list[DeadLetter]:
        await self.open()
        hashed = placed(saga_id, key)[0] if saga_id is not None and key is not None else None
        found: list[DeadLetter] = []
        while len(found) < limit:
            values = await self._rows.letters(saga_id=saga_id, hashed=hashed, before=after, limit=limit)
            letters = [self._decoded(("dead_letter",), value, decode_dead_letter) for value in values]
            found += [letter for letter in letters if key is None or letter.key == key]
            if len(values) < limit:
                break
            after = letters[-1].id
        return found[:limit]

    async def feed(self, *, after: int, limit: int) -> list[tuple[int, FeedEvent]]:
        await self.open()
        found: list[tuple[int, FeedEvent]] = []
        for base, value in await self._rows.feed_page(after=after, limit=limit):
            for number, event in enumerate(self._decoded(("feed", base), value, decode_events), base):
                if number > after and len(found) < limit:
                    found.append((number, event))
        return found

    async def feed_bounds(self) -> tuple[int, int]:
        await self.open()
        return await self._rows.feed_bounds()

    async def prune_feed(self, *, before: int, limit: int) -> int:
        await self.open()
        return await self._rows.prune_feed(before=before, limit=limit)

    async def _commit_removal(
        self, checks: Sequence[Check], puts: Sequence[tuple[Key, bytes]], deletes: Sequence[Key]
    ) -> Committed | Conflicted:
        return await self._rows.commit_removal(checks, puts, deletes)

    async def _forget_marks(self, rows: Sequence[Entry]) -> bool:
        await self._rows.forget_marks(rows)
        return True

    async def _sagas_of(self, wanted: InstanceFilter) -> list[str]:
        if wanted.saga_ids:
            return [saga_id for saga_id in dict.fromkeys(wanted.saga_ids) if "\0" not in saga_id]
        return [str(row.key[1]) for row in await all_below(self._kv, ("saga_seen",))]

    def _decoded(self, key: Key, value: bytes, decode: Callable[[bytes], _R]) -> _R:
        return decoded(self._kv, Entry(key, value, 0), decode)


def _window(wanted: InstanceFilter) -> tuple[datetime, datetime]:
    return wanted.created_after or _FIRST, wanted.created_before or _LAST


def _place(cursor: str) -> tuple[datetime, int, int]:
    created, pk, run = from_cursor(cursor)
    return _EPOCH + timedelta(microseconds=created), pk, run
