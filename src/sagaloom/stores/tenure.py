"""Who may write what: the leases of a key-value saga store, and how partitions change hands.

The rows:

    member    holder       (epoch, works): everybody who writes
    joined    0            empty; written anew by everybody who joins, so that of two who do so at once one looks again
    lease     partition    (holder, epoch) of who holds it; holder "" when it is free
    arrivals  partition    empty; written anew by each commit that brings messages to somebody else's partition

The rules:

1. Every commit checks the member row of its writer: absent or changed, nothing is written. So one check stands for all
   partitions of a holder, and whoever takes one of them away removes the member row first: the old holder's next commit
   fails whole, it drops what it remembers, and joins again.
2. A partition is taken when it is free, or when its holder is not a member (or is one anew, with another epoch), or is
   not alive any more (`Presence`). Dead members are buried in the same commit.
3. A worker takes up to its fair share: 64 partitions by the number of live workers, and one more for the first of them
   by name when that does not come out even. Who holds more is told so, ends what is under way there, and gives up the
   excess. Nobody leads.
4. Who joins rewrites the member row of everybody else, with the same content. Their next commit finds it changed, looks
   who is there, and from then on minds arrivals. So there is no moment in which a newcomer brings messages to somebody
   who believes to be alone.
5. While there are others, a commit that decides messages checks the arrivals row of their partitions: what others
   brought has to be known first (I9). What it meets there is read at once, and of the same instances only messages with
   a smaller number than that are decided before it is handed out. A message that stands in the inbox below everything
   that is known of its partition needs no check: nothing older can come.
6. Where commits run side by side (`ReadsTogether`) they look for the messages themselves instead: a check for each
   message that is decided says that its partition has no row of the same saga and key above what is known, and below
   its own row if it has one. Neither a lock nor a versionstamp is needed: what was acknowledged before our message was
   offered is visible to a statement that begins later, and whatever comes afterwards may come later. Our own rows above
   what is known are named in the check, for they are known, too.

What we dislike about it: without `Presence` nobody can tell the dead, so the later one takes everything.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Final, NamedTuple, Protocol, cast, runtime_checkable

import msgspec

from sagaloom.errors import BackendUnavailable, Fenced
from sagaloom.ids import PARTITIONS
from sagaloom.ports.keyvalue import Check, Committed, Entry, Key, KeyValue
from sagaloom.ports.store import Holding, InboxRow, Lease, RowRef
from sagaloom.stores.rows import decode_envelope, decode_lease, decoded, encode, number_of, ref_of

__all__ = ["Presence", "Tenure", "Writer", "member_key"]

_ROUNDS_MAX: Final = 16
_FREE: Final = ""
_JOINED_KEY: Final[Key] = ("joined", 0)
_NO_ROW: Final = 2**63 - 1
"""A number above those of all inbox rows."""
_OWN_MAX: Final = 1_000
_UNREAD: Final = -1
"""A versionstamp that no row has, and a number below those of all inbox rows: of a partition of which nothing has been
read. Unless somebody has ever brought something there, its rows are those that its holders have loaded."""

_decode_member = msgspec.msgpack.Decoder(tuple[int, bool]).decode


class Presence(Protocol):
    """Tells the live from the dead; `sagaloom.kv.presence.FilePresence` is one."""

    def enter(self, holder: str) -> None:
        """Shows that `holder` lives, from now on."""
        ...

    def renew(self) -> bool:
        """Shows that we still live; False when the others had reason to think that we do not."""
        ...

    def others(self) -> frozenset[str]:
        """Who else is alive."""
        ...

    def nudge(self) -> None:
        """Tells the others that there is something for them in the store."""
        ...

    def listen(self, on_nudge: Callable[[], None]) -> bool:
        """Has `on_nudge` called when we are nudged; False when that cannot be."""
        ...

    def leave(self) -> None:
        """Shows ourselves no more. Leaving twice is no error."""
        ...


@runtime_checkable
class LooksAnew(Protocol):
    """What a `Presence` can do that has to ask somebody who else is alive. Optional."""

    async def look(self) -> None:
        """Shows that we live, and has `others` answer from here on with what is true by now."""
        ...

    async def goodbye(self) -> None:
        """Leaves, and has the others know it."""
        ...


@runtime_checkable
class ReadsTogether(Protocol):
    """What a `KeyValue` can do whose every read is a round trip. Optional. Its commits can check besides that an inbox
    has nothing older of a saga and key: see `Tenure.older_check`."""

    async def inbox_above(self, seen: Mapping[int, int], *, limit: int) -> list[Entry]:
        """Inbox rows above a number of each partition, in the order of their numbers, at most `limit` of each."""
        ...


class Writer(NamedTuple):
    """Somebody who has entered a store, or holds partitions of it."""

    holder: str
    parts: frozenset[int]
    is_alive: bool


class Tenure:
    """How one store object stands among all that write to the same data: its lease, its partitions, what it knows of
    arrivals. It writes only rows of its own tables."""

    def __init__(self, kv: KeyValue, presence: Presence | None) -> None:
        self._kv = kv
        self._reads_together = kv if isinstance(kv, ReadsTogether) else None
        self._presence = presence
        self.lease: Lease | None = None
        self.stamp = 0
        """The versionstamp that the member row must have."""
        self.parts: frozenset[int] = frozenset()
        self.is_shared = False
        """Whether anybody else writes: then arrivals have to be minded."""
        self._alive: frozenset[str] | None = None
        self._wants_more = False
        self._may_be_alone = False
        self._seen: dict[int, int] = {}
        """Of each partition held: the number up to which its inbox rows are known."""
        self._stamps: dict[int, int | None] = {}
        """Of each partition held: the versionstamp that its arrivals row had when its inbox was read."""
        self._own: dict[int, dict[int, tuple[str, str]]] = {}
        """Of each partition held: the inbox rows of our own commits above what is seen, with the saga and key of each,
        while there are others."""
        self._own_count = 0
        self._newest_own: dict[int, int] = {}
        """Of each partition: the newest inbox row of ours. Within a partition numbers are in the order of the commits;
        where commits run side by side they need not be so across partitions."""
        self._arrived: list[InboxRow] = []
        self._oldest_arrived: dict[tuple[str, str], int] = {}
        """The smallest number among them for each (saga, key)."""

    @property
    def tells_the_dead(self) -> bool:
        """Whether others are known to live; else whoever came last has everything."""
        return self._presence is not None

    # -- coming and going -----------------------------------------------------------------------------------------

    async def join(self, holder: str, *, works: bool) -> Lease:
        """Makes `holder` a member, and has everybody else look up."""
        self._drop()
        if self._presence is not None:
            self._presence.enter(holder)
        if isinstance(self._presence, LooksAnew):
            await self._presence.look()
        done = await self._kv.commit(reserve={"epoch": 1})
        assert isinstance(done, Committed)  # without checks there is nothing to conflict with
        lease = Lease(holder, done.bases["epoch"])
        for _ in range(_ROUNDS_MAX):
            last = await self._kv.get(_JOINED_KEY)  # before the members: who comes in between changes it
            others = [row for row in await self._members() if row.key != member_key(holder)]
            done = await self._kv.commit(
                checks=[Check(_JOINED_KEY, last.versionstamp if last else None), *_unchanged(others)],
                puts=[
                    *((row.key, row.value) for row in others),
                    (member_key(holder), encode((lease.epoch, works))),
                    (_JOINED_KEY, b""),
                ],
            )
            if isinstance(done, Committed):
                self.lease, self.stamp = lease, done.versionstamp
                self.is_shared = bool(others)
                self.nudge()
                return lease
        raise self._crowded(holder)

    async def take_all(self, lease: Lease) -> None:
        """Takes every partition from whoever has it."""
        for _ in range(_ROUNDS_MAX):
            rows = await self._lease_rows()
            members = await self._members()
            done = await self._kv.commit(
                checks=[Check(member_key(lease.holder), self.stamp), *_unchanged(rows.values())],
                puts=[(("lease", part), encode(_held_by(lease))) for part in range(PARTITIONS)],
                deletes=[row.key for row in members if row.key != member_key(lease.holder)],
            )
            if isinstance(done, Committed):
                self._gain(range(PARTITIONS))
                self.is_shared = False
                return
            await self.look(lease)
        raise self._crowded(lease.holder)

    async def leave(self, lease: Lease) -> None:
        """Gives up what `lease` still holds."""
        for _ in range(_ROUNDS_MAX):
            row = await self._kv.get(member_key(lease.holder))
            if row is None or decoded(self._kv, row, _decode_member)[0] != lease.epoch:
                break
            held = [each for each in (await self._lease_rows()).values() if self._holder_of(each) == _held_by(lease)]
            done = await self._kv.commit(
                checks=[Check(row.key, row.versionstamp), *_unchanged(held)],
                puts=[(each.key, encode((_FREE, lease.epoch))) for each in held],
                deletes=[row.key],
            )
            if isinstance(done, Committed):
                break
        if lease == self.lease:
            self._drop()
            self.lease = None
            if isinstance(self._presence, LooksAnew):
                self._presence.nudge()
                await self._presence.goodbye()
            elif self._presence is not None:
                self._presence.leave()
                self._presence.nudge()

    async def close(self) -> None:
        self._drop()
        self.lease = None
        if isinstance(self._presence, LooksAnew):
            await self._presence.goodbye()
        elif self._presence is not None:
            self._presence.leave()

    # -- sharing out ----------------------------------------------------------------------------------------------

    def stands(self) -> bool:
        """Whether nothing has changed since `tend`, as far as can be seen without touching a table."""
        if self._presence is None:
            return True
        in_time = self._presence.renew()
        return in_time and not self._wants_more and self._presence.others() == self._alive

    async def tend(self, lease: Lease, give_up: Collection[int]) -> Holding:
        """Takes up to a fair share, gives up, and buries the dead; tells what came of it."""
        for _ in range(_ROUNDS_MAX):
            # Whoever joins shows itself first, so one who is a member and not alive afterwards is dead, or has left.
            members = {str(row.key[1]): row for row in await self._members()}
            if isinstance(self._presence, LooksAnew):
                await self._presence.look()
            alive = self._presence.others() if self._presence is not None else frozenset[str]()
            own = members.pop(lease.holder, None)
            if own is None or decoded(self._kv, own, _decode_member)[0] != lease.epoch:
                raise self.fenced(lease)
            living = {holder: row for holder, row in members.items() if holder in alive}
            leases = {(holder, decoded(self._kv, row, _decode_member)[0]) for holder, row in living.items()}
            dead = [row for holder, row in members.items() if holder not in alive]
            workers = [holder for holder, row in living.items() if decoded(self._kv, row, _decode_member)[1]]
            share = _fair_share(lease.holder, workers)

            rows = await self._lease_rows()
            held = {part for part, row in rows.items() if self._holder_of(row) == _held_by(lease)}
            kept = held - set(give_up)
            free = [
                part
                for part in range(PARTITIONS)
                if part not in held and (part not in rows or self._holder_of(rows[part]) not in leases)
            ]
            if lease.epoch % 2:
                free.reverse()  # so that two who come at the same time seldom reach for the same one
            taken = free[: max(0, share - len(kept))]
            given = held - kept
            changed = [*taken, *given]
            if changed or dead:
                done = await self._kv.commit(
                    checks=[
                        Check(own.key, own.versionstamp),
                        *(Check(row.key, row.versionstamp) for row in dead),
                        *(
                            Check(("lease", part), rows[part].versionstamp if part in rows else None)
                            for part in changed
                        ),
                    ],
                    puts=[
                        *((("lease", part), encode(_held_by(lease))) for part in taken),
                        *((("lease", part), encode((_FREE, lease.epoch))) for part in given),
                    ],
                    deletes=[row.key for row in dead],
                )
                if not isinstance(done, Committed):
                    continue
            if given:
                self.nudge()
            if (members or own.versionstamp != self.stamp) and not self.is_shared:
                self._share()  # also when they are gone again: what they brought is still to be read
            self.stamp = own.versionstamp
            # Those who are about to join are looked at again.
            self._alive = alive if len(alive) == len(living) else None
            self.parts = frozenset(kept)
            self._forget_parts(given)
            self._gain(taken)
            self._wants_more = len(self.parts) < share
            self._may_be_alone = not living
            return Holding(self.parts, frozenset(taken), max(0, len(self.parts) - share), bool(living))
        raise self._crowded(lease.holder)

    async def look(self, lease: Lease) -> None:
        """Finds out why the member row is not what it was: somebody came, or the lease is over (`Fenced`)."""
        row = await self._kv.get(member_key(lease.holder))
        if row is None or decoded(self._kv, row, _decode_member)[0] != lease.epoch:
            if lease == self.lease:
                self._drop()
            raise self.fenced(lease)
        self.stamp = row.versionstamp
        self._alive, self._may_be_alone = None, False
        if lease != self.lease:
            self._drop()
            self.lease = lease
            rows = await self._lease_rows()
            self._gain(part for part, each in rows.items() if self._holder_of(each) == _held_by(lease))
        if not self.is_shared:
            self._share()

    def fenced(self, lease: Lease) -> Fenced:
        return Fenced(
            f"{self._kv.name}: the lease of {lease.holder!r} (epoch {lease.epoch}) is over: nothing was written; "
            "stop writing and join again"
        )

    # -- arrivals -------------------------------------------------------------------------------------------------

    def added(self, first: int, parts: Collection[int], keys: Collection[tuple[str, str]]) -> None:
        """Minds the inbox rows of a commit of ours, with the saga and key of each: those are no arrivals."""
        self._newest_own.update(zip(parts, range(first, first + len(parts)), strict=True))
        if self.is_shared:
            for n, (part, key) in enumerate(zip(parts, keys, strict=True), first):
                if part in self.parts:
                    self._own.setdefault(part, {})[n] = key
                    self._own_count += 1

    def is_settled(self, ref: RowRef | None) -> bool:
        """Whether nothing older than inbox row `ref` can turn up in its partition any more."""
        return ref is not None and ref.seq <= self._seen.get(ref.part, 0)

    def is_behind(self, saga_id: str, key: str, ref: RowRef | None) -> bool:
        """Whether a message of (saga_id, key), in inbox row `ref` or in none yet, comes after one that has arrived and
        was not handed out."""
        oldest = self._oldest_arrived.get((saga_id, key))
        return oldest is not None and (ref is None or ref.seq > oldest)

    def nudge(self) -> None:
        if self._presence is not None:
            self._presence.nudge()

    def listen(self, on_nudge: Callable[[], None]) -> bool:
        return self._presence is not None and self._presence.listen(on_nudge)

    def consumed(self, keys: Iterable[Key]) -> None:
        """Minds that these rows are gone."""
        if self._own:
            for part, seq in [cast("tuple[int, int]", key[1:]) for key in keys if key[0] == "inbox"]:
                own = self._own.get(part)
                if own is not None and own.pop(seq, None) is not None:
                    self._own_count -= 1

    @property
    def looks_for_older(self) -> bool:
        """Whether commits look for older messages themselves, instead of checking that nothing at all has arrived."""
        return self._reads_together is not None

    def older_check(self, part: int, saga_id: str, key: str, ref: RowRef | None) -> Check:
        """The condition under which nothing older has arrived than a message of (saga_id, key), in inbox row `ref` or
        in none yet."""
        above, below = self._seen.get(part, _UNREAD), _NO_ROW if ref is None else ref.seq
        own = [n for n, whose in self._own.get(part, {}).items() if whose == (saga_id, key)]
        return Check(("older", part, saga_id, key, above, below, *own), None)

    async def bound_own(self) -> None:
        """Keeps the rows of our own that are to be told from arrivals few, by reading what has arrived."""
        if self._own_count > _OWN_MAX and self._reads_together is not None:
            await self._read_together(self._reads_together, _OWN_MAX)

    def arrival_checks(self, parts: Iterable[int]) -> list[Check]:
        """The conditions under which nothing has arrived in `parts` that is not known."""
        return [Check(("arrivals", part), self._stamps.get(part)) for part in parts]

    def nothing_arrived(self, parts: Iterable[int]) -> None:
        """Minds that these checks have held in the commit that has just ended."""
        for part in parts:
            if part in self._stamps:
                self._know(part)

    async def read_arrivals(self, limit: int) -> None:
        """Reads what has arrived since, some `limit` messages at most, and keeps it for `take_arrivals`."""
        if not self.is_shared and all(part in self._stamps for part in self.parts):
            return
        if self._reads_together is not None:
            if len(self._arrived) < limit:
                await self._read_together(self._reads_together, limit)
            return
        stamps = {row.key[1]: row.versionstamp for row in await self._kv.scan(("arrivals",), limit=PARTITIONS)}
        enough = len(self._arrived) + limit
        for part in sorted(self.parts):
            stamp = stamps.get(part)
            is_read = self._stamps.get(part, _UNREAD) == stamp
            own = self._own.get(part, ())
            while not is_read and len(self._arrived) < enough:
                after = ("inbox", part, self._seen.get(part, 0))
                rows = await self._kv.scan(("inbox", part), after=after, limit=limit)
                is_read = len(rows) < limit
                for row in rows:
                    # At once: what is seen is not read again, should the next read fail.
                    self._take(row, ref_of(row), own)
            if not is_read:
                break  # The rest of this partition, and the others, another time.
            self._stamps[part] = stamp
            self._know(part)
        else:
            self._be_alone()

    async def _read_together(self, kv: ReadsTogether, limit: int) -> None:
        """The same in one read, `limit` messages of each partition at most. A partition of which it shows fewer has no
        others: our own newest row was there before, and so were all below it."""
        parts = sorted(self.parts)
        unread = dict.fromkeys(parts, limit)
        for row in await kv.inbox_above({part: self._seen.get(part, 0) for part in parts}, limit=limit):
            ref = ref_of(row)
            unread[ref.part] -= 1
            self._take(row, ref, self._own.get(ref.part, ()))
        for part, more in unread.items():
            if more:
                self._stamps[part] = None
                self._know(part)
        if all(unread.values()):
            self._be_alone()

    def _take(self, row: Entry, ref: RowRef, own: Collection[int]) -> None:
        """Minds that an inbox row of ours has been read, and keeps it unless we have brought it ourselves."""
        self._seen[ref.part] = ref.seq
        if ref.seq not in own:
            envelope = decoded(self._kv, row, decode_envelope)
            self._arrived.append(InboxRow(ref, envelope))
            self._oldest_arrived.setdefault((envelope.saga_id, envelope.key), ref.seq)

    def _be_alone(self) -> None:
        if self._may_be_alone:
            # Nobody is left who could bring anything, and what the last one brought has been read.
            self.is_shared, self._may_be_alone = False, False
            self._own.clear()
            self._own_count = 0

    def take_arrivals(self, limit: int) -> list[InboxRow]:
        taken, self._arrived = self._arrived[:limit], self._arrived[limit:]
        self._oldest_arrived.clear()
        self._mind(self._arrived)
        return taken

    # -- small things ---------------------------------------------------------------------------------------------

    def _drop(self) -> None:
        self.parts = frozenset()
        self.is_shared = False
        self._alive = None
        self._wants_more = False
        self._may_be_alone = False
        self._seen.clear()
        self._stamps.clear()
        self._own.clear()
        self._own_count = 0
        self._newest_own.clear()
        self._arrived.clear()
        self._oldest_arrived.clear()

    def _share(self) -> None:
        """From now on there are others. All that we know of came before the first thing that they brought."""
        self.is_shared = True
        for part in self.parts:
            if part in self._stamps:
                self._know(part)

    def _know(self, part: int) -> None:
        """Nothing that others brought to `part` is unknown: whatever comes gets a number above all that we added."""
        self._seen[part] = max(self._seen.get(part, 0), self._newest_own.get(part, 0))
        self._own_count -= len(self._own.pop(part, ()))

    def _mind(self, rows: Iterable[InboxRow]) -> None:
        for row in rows:
            self._oldest_arrived.setdefault((row.envelope.saga_id, row.envelope.key), row.ref.seq)

    def _gain(self, parts: Iterable[int]) -> None:
        gained = frozenset(parts)
        self._forget_parts(gained)
        self.parts |= gained

    def _forget_parts(self, parts: Collection[int]) -> None:
        for part in parts:
            self._seen.pop(part, None)
            self._stamps.pop(part, None)
            self._own_count -= len(self._own.pop(part, ()))
            self._newest_own.pop(part, None)
        if parts:
            self._arrived = [row for row in self._arrived if row.ref.part not in parts]
            self._oldest_arrived.clear()
            self._mind(self._arrived)

    async def writers(self) -> list[Writer]:
        """Everybody who writes, and those who are gone and still hold something."""
        if isinstance(self._presence, LooksAnew):
            await self._presence.look()
        alive = self._presence.others() if self._presence is not None else frozenset[str]()
        parts: dict[str, set[int]] = {str(row.key[1]): set() for row in await self._members()}
        for part, row in (await self._lease_rows()).items():
            holder, _ = self._holder_of(row)
            if holder != _FREE:
                parts.setdefault(holder, set()).add(part)
        return [Writer(holder, frozenset(held), holder in alive) for holder, held in sorted(parts.items())]

    async def _members(self) -> list[Entry]:
        return await self._kv.scan(("member",), limit=1_000)

    async def _lease_rows(self) -> dict[int, Entry]:
        return {number_of(row): row for row in await self._kv.scan(("lease",), limit=PARTITIONS)}

    def _holder_of(self, row: Entry) -> tuple[str, int]:
        return decoded(self._kv, row, decode_lease)

    def _crowded(self, holder: str) -> BackendUnavailable:
        return BackendUnavailable(
            f"{self._kv.name}: others changed the leases {_ROUNDS_MAX} times while {holder} tried"
        )


def member_key(holder: str) -> Key:
    return "member", holder


def _held_by(lease: Lease) -> tuple[str, int]:
    return lease.holder, lease.epoch


def _fair_share(holder: str, others: Collection[str]) -> int:
    """How many partitions `holder` should have when `others` work beside it: the shares of all make up the whole."""
    even, rest = divmod(PARTITIONS, 1 + len(others))
    return even + (sum(other < holder for other in others) < rest)


def _unchanged(rows: Iterable[Entry]) -> list[Check]:
    return [Check(row.key, row.versionstamp) for row in rows]
