"""Who may write what: the leases of a key-value saga store, and how partitions change hands.

The rows:

    member    holder       (epoch, works): everybody who writes
    lease     partition    (holder, epoch) of who holds it; holder "" when it is free
    arrivals  partition    empty; written anew by each commit that brings messages to somebody else's partition

The rules:

1. Every commit checks the member row of its writer: absent or changed, nothing is written. So one check stands for all
   partitions of a holder, and whoever takes one of them away removes the member row first: the old holder's next commit
   fails whole, it drops what it remembers, and joins again.
2. A partition is taken when it is free, or when its holder is not a member, or is not alive any more (`Presence`). Dead
   members are buried in the same commit.
3. A worker takes up to its fair share, 64 partitions by the number of live workers, rounded up. Who holds more is told
   so, ends what is under way there, and gives up the excess. Nobody leads.
4. Who joins rewrites the member row of everybody else, with the same content. Their next commit finds it changed, looks
   who is there, and from then on minds arrivals. So there is no moment in which a newcomer brings messages to somebody
   who believes to be alone.
5. While there are others, a commit that applies messages checks the arrivals row of their partitions: what others
   brought has to be known first (I9). What it meets there is read at once, and only messages of the same instances
   wait.

What we dislike about it: without `Presence` nobody can tell the dead, so the later one takes everything.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Final, Protocol

import msgspec

from sagaloom.errors import BackendUnavailable, Fenced
from sagaloom.ids import PARTITIONS
from sagaloom.ports.keyvalue import Check, Committed, Entry, Key, KeyValue
from sagaloom.ports.store import Holding, InboxRow, Lease
from sagaloom.stores.rows import decode_envelope, decode_lease, decoded, encode, number_of, ref_of

__all__ = ["Presence", "Tenure", "member_key"]

_ROUNDS_MAX: Final = 16
_FREE: Final = ""

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


class Tenure:
    """How one store object stands among all that write to the same data: its lease, its partitions, what it knows of
    arrivals. It writes only rows of its own tables."""

    def __init__(self, kv: KeyValue, presence: Presence | None) -> None:
        self._kv = kv
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
        self._own: set[tuple[int, int]] = set()
        """Inbox rows of our own commits above what is seen, while there are others."""
        self._newest_own = 0
        self._arrived: list[InboxRow] = []

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
        done = await self._kv.commit(reserve={"epoch": 1})
        assert isinstance(done, Committed)  # without checks there is nothing to conflict with
        lease = Lease(holder, done.bases["epoch"])
        for _ in range(_ROUNDS_MAX):
            others = [row for row in await self._members() if row.key != member_key(holder)]
            done = await self._kv.commit(
                checks=[Check(row.key, row.versionstamp) for row in others],
                puts=[
                    *((row.key, row.value) for row in others),
                    (member_key(holder), encode((lease.epoch, works))),
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
            if self._presence is not None:
                self._presence.leave()
                self._presence.nudge()

    def close(self) -> None:
        self._drop()
        self.lease = None
        if self._presence is not None:
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
            alive = self._presence.others() if self._presence is not None else frozenset[str]()
            members = {str(row.key[1]): row for row in await self._members()}
            own = members.pop(lease.holder, None)
            if own is None or decoded(self._kv, own, _decode_member)[0] != lease.epoch:
                raise self.fenced(lease)
            living = {holder: row for holder, row in members.items() if holder in alive}
            dead = [row for holder, row in members.items() if holder not in alive]
            works = [True, *(decoded(self._kv, row, _decode_member)[1] for row in living.values())]
            share = -(-PARTITIONS // sum(works))

            rows = await self._lease_rows()
            held = {part for part, row in rows.items() if self._holder_of(row) == _held_by(lease)}
            kept = held - set(give_up)
            free = [
                part
                for part in range(PARTITIONS)
                if part not in held and (part not in rows or self._holder_of(rows[part])[0] not in living)
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
            self.stamp = own.versionstamp
            self._alive = alive
            self.parts = frozenset(kept)
            self._forget_parts(given)
            self._gain(taken)
            self._wants_more = len(self.parts) < PARTITIONS // sum(works)
            if living and not self.is_shared:
                self._share()
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

    def added(self, first: int, parts: Collection[int]) -> None:
        """Minds the inbox rows of a commit of ours: those are no arrivals."""
        self._newest_own = first + len(parts) - 1
        if self.is_shared:
            self._own.update((part, first + n) for n, part in enumerate(parts) if part in self.parts)

    def nudge(self) -> None:
        if self._presence is not None:
            self._presence.nudge()

    def listen(self, on_nudge: Callable[[], None]) -> bool:
        return self._presence is not None and self._presence.listen(on_nudge)

    def arrival_checks(self, parts: Iterable[int]) -> list[Check]:
        """The conditions under which messages of `parts` may be applied."""
        return [Check(("arrivals", part), self._stamps.get(part)) for part in parts]

    async def read_arrivals(self, limit: int) -> list[InboxRow]:
        """Reads what has arrived since, and keeps it for `take_arrivals`; returns what is new."""
        if not self.is_shared and all(part in self._stamps for part in self.parts):
            return []
        alone = self._may_be_alone
        stamps = {row.key[1]: row.versionstamp for row in await self._kv.scan(("arrivals",), limit=PARTITIONS)}
        found: list[InboxRow] = []
        for part in sorted(self.parts):
            stamp = stamps.get(part)
            if part in self._stamps and self._stamps[part] == stamp:
                continue
            is_read = False
            while not is_read and len(found) < limit:
                after = ("inbox", part, self._seen.get(part, 0))
                rows = await self._kv.scan(("inbox", part), after=after, limit=limit)
                is_read = len(rows) < limit
                for row in rows:
                    place = (part, number_of(row))
                    self._seen[part] = place[1]
                    if place in self._own:
                        self._own.discard(place)
                    else:
                        found.append(InboxRow(ref_of(row), decoded(self._kv, row, decode_envelope)))
            if not is_read:
                break  # The rest of this partition, and the others, another time.
            self._stamps[part] = stamp
        else:
            if alone and self._may_be_alone:
                # Nobody is left who could bring anything, and what the last one brought has been read.
                self.is_shared, self._may_be_alone = False, False
                self._own.clear()
        self._arrived += found
        return found

    def take_arrivals(self, limit: int) -> list[InboxRow]:
        taken, self._arrived = self._arrived[:limit], self._arrived[limit:]
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
        self._arrived.clear()

    def _share(self) -> None:
        """From now on there are others. All that we know of came before the first thing that they brought."""
        self.is_shared = True
        for part in self.parts:
            if part in self._stamps:
                self._seen[part] = max(self._seen.get(part, 0), self._newest_own)

    def _gain(self, parts: Iterable[int]) -> None:
        gained = frozenset(parts)
        self._forget_parts(gained)
        self.parts |= gained

    def _forget_parts(self, parts: Collection[int]) -> None:
        for part in parts:
            self._seen.pop(part, None)
            self._stamps.pop(part, None)
        if parts:
            self._own = {place for place in self._own if place[0] not in parts}
            self._arrived = [row for row in self._arrived if row.ref.part not in parts]

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


def _unchanged(rows: Iterable[Entry]) -> list[Check]:
    return [Check(row.key, row.versionstamp) for row in rows]
