"""The saga store: where everything durable lives, behind one atomic `commit`.

A `UnitOfWork` is what one message writes (or a settled effect, or both as one): all of it or none of it. A commit
carries many units; each stands or falls alone, so a conflict never takes its neighbours down. The store assigns the two
orders that only a commit can know: inbox numbers (the order of acceptance, I9) and outbox numbers.

Guarantees every implementation gives, and `sagaloom.testing.contracts` checks:

- when `commit` returns, what was written is on stable storage (I10) and visible to every reader;
- a unit is written whole or not at all (the house law);
- a unit conflicts, and nothing of it is written, when the run it writes is not at `revision - 1` with the `entries`
  it expects (I2), when its mark is already there (I4), or when the row it claims to consume (inbox, timer, outbox,
  dead letter) is gone (I3, I4);
- a commit under a lease that is over writes nothing and raises `Fenced` (I7);
- several processes may write at once. Each holds some of the partitions, and is the only one that changes instances in
  them or consumes their rows. Everybody may *bring* messages to any partition: a unit that only adds inbox rows, with
  the head and the mark that go with them. Its holder finds them through `arrivals`, and what it decides without knowing
  of an older one conflicts (`behind`), until that was handed out: so the order of acceptance holds whoever accepted.

What we dislike about it: the reads are many. They are here because people look at sagas in many ways, and a store
that cannot answer them is not inspectable.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import msgspec

from sagaloom.definitions import SagaDurabilityTier, SagaInstanceStatus
from sagaloom.engine.concurrency import SlotUse
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

__all__ = [
    "CommitResult",
    "Conflict",
    "Holding",
    "InboxRow",
    "InstanceFilter",
    "JoinsTransactions",
    "Lease",
    "Loaded",
    "OutboxRow",
    "RegisteredDefinition",
    "RowRef",
    "SagaStore",
    "SlotClaim",
    "Swept",
    "UnitOfWork",
]


class RowRef(NamedTuple):
    """The place of an inbox or outbox row: its partition and its number, which grows in the order of acceptance."""

    part: int
    seq: int


class InboxRow(NamedTuple):
    ref: RowRef
    envelope: Envelope


class OutboxRow(NamedTuple):
    ref: RowRef
    effect: OutboxEffect


class Lease(msgspec.Struct, frozen=True):
    """The right to write: who holds it, and the epoch that the store checks on every commit."""

    holder: str
    epoch: int


class Holding(msgspec.Struct, frozen=True):
    """How a worker stands among the others: the partitions it holds now, those of them that are new, how many it holds
    above its fair share, and whether anybody else writes to the store."""

    parts: frozenset[int]
    gained: frozenset[int] = frozenset()
    excess: int = 0
    is_shared: bool = False


class Loaded(NamedTuple):
    """What the store knows of one correlation key: its head and its newest run. Both None: never seen."""

    head: Head | None
    instance: Instance | None


class SlotClaim(msgspec.Struct, frozen=True):
    """What a message does to the slots of its saga under one concurrency key. `take`: it holds one from now on; `pass`:
    one must be free, and it takes none; `free`: it gives the one back that it holds, if it does. The message is named
    by its correlation key and its id. At most `limit` are held at once: the unit conflicts (`limit`) when a slot is
    needed and none is free."""

    use: SlotUse
    saga_id: str
    key: str
    limit: int
    correlation_key: str
    message_id: str
    at: datetime


class UnitOfWork(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """All that one message writes, or what settles some effects; a message that answers an effect does both. `part` is
    the partition of its instance.

    `instance` must be exactly one revision ahead of the stored one, or have the same revision and no fewer entries (a
    message that changed nothing was noted or counted), as told by `revision_before` and `entries_before`; a new run has
    `revision_before=None`.
    """

    part: int
    head: Head | None = None
    head_before: Head | None = None
    instance: Instance | None = None
    status_before: SagaInstanceStatus | None = None
    revision_before: int | None = None
    entries_before: int = 0
    entry: HistoryEntry | None = None
    mark_pk: int = 0
    mark: Mark | None = None
    inbox_add: tuple[Envelope, ...] = ()
    """New rows; the store numbers them in order. Their partition is that of their own (saga, key)."""
    inbox_update: InboxRow | None = None
    """A row that stays under its number with a new attempt."""
    inbox_done: RowRef | None = None
    outbox_add: tuple[OutboxEffect, ...] = ()
    outbox_update: OutboxRow | None = None
    outbox_done: tuple[RowRef, ...] = ()
    """Consumed: the unit conflicts when one is gone. They may be of any partitions that its writer holds."""
    timers_add: tuple[Timer, ...] = ()
    timers_remove: tuple[PendingTimer, ...] = ()
    """Removed if there: those the decision cancelled or replaced."""
    timer_done: PendingTimer | None = None
    """Consumed: the unit conflicts when it is gone."""
    dead_letters_add: tuple[DeadLetter, ...] = ()
    dead_letter_done: str | None = None
    unmark: tuple[int, str] | None = None
    """(pk, dedupe key) of a mark to forget: a discarded dead letter frees its key."""
    feed: tuple[FeedRecord, ...] = ()
    children_add: tuple[Child, ...] = ()
    """Rows of children, written over what is there under their place: of children that are spawned."""
    child_done: Child | None = None
    """The row of a child that has ended, in the place of the live one. Its parent may be of any partition."""
    slot: SlotClaim | None = None
    """What it does to the slots of its concurrency key."""
    about: tuple[str, str] | None = None
    """The saga and the correlation key whose message was decided, when there is no `instance` to say so."""

    @property
    def events(self) -> tuple[FeedEvent, ...]:
        """What the feed shows of this unit; each gets a number of its own."""
        return tuple(event for record in self.feed for event in record.events())


class Conflict(msgspec.Struct, frozen=True):
    """Why a unit was not written. `revision`: load again and decide again. `mark`: seen before. `gone`: consumed
    by somebody else. `refused`: no store can write it (too large, not encodable, no legal step): do not try again.
    `behind`: something older of its instance has arrived, or may have, see `arrivals`; a message that is not in the
    inbox yet finds its place by being put there. `moved`: its partition is not held here. `limit`: it needs a slot,
    and none is free."""

    kind: Literal["revision", "mark", "gone", "refused", "behind", "moved", "limit"]
    what: str


class CommitResult(msgspec.Struct, frozen=True):
    """What a commit did. The units without a conflict are written; the rows that they added to the inbox and to the
    outbox are numbered consecutively from `inbox_base` and `outbox_base`, unit by unit in the order of the batch."""

    conflicts: Mapping[int, Conflict]
    inbox_base: int
    outbox_base: int
    feed_base: int


class InstanceFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which runs to list. Empty tuples mean all. Times bound `created_at`; `version_below` leaves out runs whose state
    was written by that version of their definition, or a newer one."""

    saga_ids: tuple[str, ...] = ()
    statuses: tuple[SagaInstanceStatus, ...] = ()
    key_prefix: str = ""
    created_after: datetime | None = None
    created_before: datetime | None = None
    version_below: int | None = None


class RegisteredDefinition(msgspec.Struct, frozen=True):
    """What the registry keeps of a definition, under `("saga", "registry", id)`: `document` is its description."""

    saga_id: str
    version: int
    fingerprint: str
    document: Mapping[str, object]
    registered_at: datetime


class Swept(NamedTuple):
    """How many rows were removed, and where the walk goes on: None when it has come to its end."""

    removed: int
    cursor: str | None


@runtime_checkable
class JoinsTransactions(Protocol):
    """What a store can do that lies in a database which its user writes to as well. Optional."""

    async def leave(self, connection: object, envelopes: Sequence[Envelope]) -> None:
        """Leaves messages in the transaction that `connection` has open: they are there when it commits. Raises
        `MessageRejected` when that is no connection of this kind of database, or has no transaction."""
        ...

    async def left(self, parts: Collection[int], *, limit: int) -> list[tuple[int, Envelope]]:
        """Messages that were left in these partitions, with the numbers under which they lie, in their order."""
        ...

    async def take_left(self, numbers: Sequence[int]) -> None:
        """Takes them away."""
        ...


@runtime_checkable
class SagaStore(Protocol):
    """A durable home for sagas. Every method raises `BackendUnavailable` when the store does not answer in time."""

    @property
    def id(self) -> str:
        """What kind of store this is, for example `kv-saga-store`."""
        ...

    @property
    def store_id(self) -> str:
        """Names this very store, for life; part of feed cursors."""
        ...

    @property
    def tiers(self) -> frozenset[SagaDurabilityTier]:
        """The durability tiers this store can promise; known when it is open."""
        ...

    def why_not(self, tier: SagaDurabilityTier) -> str | None:
        """Why this store cannot promise `tier`, and what would help; None when it can."""
        ...

    @property
    def problem(self) -> str | None:
        """What is wrong right now, for readiness; None when writes are believed to work."""
        ...

    async def acquire(self, holder: str, *, now: datetime) -> Lease:
        """Takes every partition from whoever has it, with an epoch above every earlier one: for tests and repairs."""
        ...

    async def join(self, holder: str, *, works: bool = True) -> Lease:
        """Enters among those who write. A worker gets its partitions by `tend`; who does not work only brings messages.
        Joining again under one name ends the earlier lease."""
        ...

    async def tend(self, lease: Lease, *, give_up: Collection[int] = ()) -> Holding:
        """Gives partitions up, buries the dead, and takes what is free, up to a fair share. Raises `Fenced` when the
        lease is over."""
        ...

    @property
    def is_shareable(self) -> bool:
        """Whether several processes can work on it side by side; if not, the later one takes everything."""
        ...

    @property
    def is_remote(self) -> bool:
        """Whether commits are worked on elsewhere, so that something else can be done here meanwhile."""
        ...

    def stands(self) -> bool:
        """Shows that we live, and says whether nothing has changed among the others since `tend`. Asked every moment:
        it touches no table."""
        ...

    def listen(self, on_news: Callable[[], None]) -> bool:
        """Has `on_news` called when another process has brought us something; False when it has to be looked for. Good
        from `join` to the end of its lease."""
        ...

    def has_news(self) -> bool:
        """Whether another process has written since this was last asked; may say so when none has."""
        ...

    async def arrivals(self, lease: Lease, *, limit: int = 1_000) -> list[InboxRow]:
        """Messages in the partitions held that were not handed out before and did not come with a commit of ours, in
        order; at first all that wait there. Fewer than `limit` are all that there were."""
        ...

    async def release(self, lease: Lease) -> None:
        """Gives everything up and leaves."""
        ...

    async def reserve_pks(self, count: int) -> int:
        """The first of `count` fresh surrogate numbers. Gaps are harmless."""
        ...

    async def commit(self, units: Sequence[UnitOfWork], *, lease: Lease) -> CommitResult: ...

    async def probe(self) -> None:
        """Raises what is wrong when the store cannot commit right now; writes nothing that anybody sees."""
        ...

    async def close(self) -> None: ...

    # What the runtime reads.

    async def load(self, keys: Sequence[tuple[str, str]], *, parts: Collection[int] | None = None) -> list[Loaded]:
        """Head and newest run for each (saga id, correlation key), in order. With `parts` no run is read of a key
        outside of these partitions."""
        ...

    async def load_run(self, saga_id: str, key: str, run: int) -> Instance | None: ...

    async def marks(self, wanted: Sequence[tuple[int, str]]) -> list[Mark | None]:
        """The mark for each (pk, dedupe key), in order."""
        ...

    async def inbox_page(self, *, after: RowRef | None, limit: int) -> list[InboxRow]:
        """Waiting messages in (partition, number) order."""
        ...

    async def inbox_rows(self, refs: Sequence[RowRef]) -> list[Envelope | None]: ...

    async def outbox_page(
        self, *, after: RowRef | None, limit: int, parts: Collection[int] | None = None
    ) -> list[OutboxRow]:
        """Effects that have not been settled, in (partition, number) order; of `parts`, else of all."""
        ...

    async def outbox_rows(self, refs: Sequence[RowRef]) -> list[OutboxEffect | None]: ...

    async def timers(
        self, *, due_by: datetime | None = None, after: PendingTimer | None = None, limit: int = 100
    ) -> list[Timer]:
        """Timers in the order of (due_at, id), at most those due by `due_by`."""
        ...

    async def timer(self, timer_id: str) -> Timer | None:
        """The timer of this id. It may have to look at all of them: for operators."""
        ...

    async def schedule_cursors(self) -> list[ScheduleCursor]:
        """How far each schedule has come, by saga id."""
        ...

    async def put_schedule_cursor(self, cursor: ScheduleCursor, *, replaces: ScheduleCursor | None) -> bool:
        """Writes `cursor` if what is stored for its saga is `replaces` (None: nothing is), and says whether it did: of
        two who move a schedule on from one place, one does. Needs no lease."""
        ...

    async def slots(self, saga_id: str, *, key: str | None = None, limit: int = 1_000) -> list[HeldSlot]:
        """The slots that messages of a saga hold, by concurrency key and number; of one key, or all."""
        ...

    # What people read.

    async def instances(
        self, wanted: InstanceFilter, *, limit: int, offset: int = 0, cursor: str | None = None
    ) -> tuple[list[Instance], str | None]:
        """Runs, newest `created_at` first, and the cursor of the next page. Accepted first messages that are not
        applied yet come as runs with number 0 and status `pending`."""
        ...

    async def count_instances(self, wanted: InstanceFilter, *, limit: int = 10_000) -> int: ...

    async def runs(self, saga_id: str, key: str) -> list[Instance]:
        """All runs of one key, newest first."""
        ...

    async def children(
        self, pk: int, run: int, *, status: ChildStatus = "live", after: tuple[int, int] | None = None, limit: int = 50
    ) -> list[Child]:
        """The children of one status that run `run` of number `pk` has spawned, in the order of their spawning; `after`
        is the revision and the position of the last one of the page before."""
        ...

    async def count_children(self, pk: int, run: int) -> Mapping[ChildStatus, int]:
        """How many children there are of each status."""
        ...

    async def history(self, instance: Instance, *, after_entry: int = 0, limit: int = 50) -> list[HistoryEntry]:
        """History rows in the order in which they were written."""
        ...

    async def dead_letters(
        self, *, saga_id: str | None = None, key: str | None = None, after: str | None = None, limit: int = 50
    ) -> list[DeadLetter]:
        """Dead letters, newest first; `after` is the id of the last one of the page before."""
        ...

    async def dead_letter(self, dead_letter_id: str) -> DeadLetter | None: ...

    async def feed(self, *, after: int, limit: int) -> list[tuple[int, FeedEvent]]:
        """Feed events with numbers above `after`, in order, without a gap."""
        ...

    async def feed_bounds(self) -> tuple[int, int]:
        """The oldest and the newest feed number that are kept; (1, 0) when there is none."""
        ...

    async def prune_feed(self, *, before: int, limit: int) -> int:
        """Forgets the oldest commits of the feed whose events are all numbered below `before`, at most `limit` of them
        in one commit, and returns how many that were. The newest one stays, so that its number is known. Needs no
        lease."""
        ...

    async def remove_runs(self, runs: Sequence[Instance], *, tombstone_until: datetime, lease: Lease) -> int:
        """Removes finished runs with their histories and the rows of their children, in one commit, and returns how
        many that were. Left out are those that are not stored exactly as given, are not finished, have live children,
        or lie in partitions that are not held. Where the newest run of a key goes, its head stays as a tombstone until
        `tombstone_until`. Dead letters, effects that have yet to leave, and marks stay."""
        ...

    async def remove_tombstones(self, *, due_by: datetime, limit: int, lease: Lease) -> list[tuple[str, str]]:
        """Removes the heads whose time as tombstones is over by `due_by`, of partitions held, at most `limit` in one
        commit, and returns the saga ids and keys that it has dealt with; fewer than `limit` were all. A key that has
        opened another run since, or has older runs left, keeps its head. A removed key has never been seen."""
        ...

    async def prune_marks(self, *, before: datetime, after: str | None = None, limit: int = 1_000) -> Swept:
        """Looks at `limit` marks behind the cursor `after` and forgets those of messages accepted before `before`, in
        one commit. From the beginning to the end, a walk looks at all of them. Needs no lease."""
        ...

    async def put_standing(self, standing: SagaStanding) -> None:
        """Keeps what an operator has said about a saga, in the place of what was said before. Needs no lease."""
        ...

    async def standings(self) -> list[SagaStanding]:
        """What operators have said about sagas, by saga id."""
        ...

    async def put_definitions(self, definitions: Sequence[RegisteredDefinition]) -> None: ...

    async def definitions(self) -> list[RegisteredDefinition]: ...
