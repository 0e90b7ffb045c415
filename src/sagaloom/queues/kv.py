"""A queue in an ordered key-value store: the embedded broker, a file that any number of processes of one host share.

The rows (the first part of a key names its table, the second one the queue; times are microseconds since 1970):

    queue_ready    100 - priority, seq     a message that waits
    queue_later    due, seq                a message that is not due yet
    queue_claim    seq                     a message that is being worked on, and who does
    queue_lane     lane, seq               a message that waits behind another one of its key
    queue_head     lane                    empty: one of the key is in ready, later or claim
    queue_dedupe   hash                    until when a deduplication id counts
    queue_expiry   until, hash             the same, in the order in which they end
    queue_dead     failed, id              a dead letter
    queue_dead_at  id                      when it failed
    queue_holder   name                    empty: a consumer; rewritten whenever it settles
    queue_turn                             empty: rewritten whenever anybody takes messages
    queue_meta     "schema"                (without a queue)

How it works:

- A message is in one of ready, later, claim and lane, or dead, whole; each move is one commit. An exchange is one
  commit, too: what was settled goes, what is taken comes.
- A consumer has one row for all of its claims. Each of its commits checks that row, and whoever takes over from it
  removes the row with the same commit; so one check fences as many settlements as there are, and nobody takes over what
  was settled a moment ago. In the same way one row is the turn to take: of two consumers that look at the same messages
  one commits, and the other looks again. A check for each message would be a third of the work.
- Who holds a claim is alive as long as the kernel keeps a lock for it, and as long as it says so
  (`sagaloom.kv.presence`). No row is written to renew a lease, and no clock can jump.
- `seq` is given anew whenever a message begins to wait, so that what comes back stands behind what was there.

What we dislike about it: to take over from the dead, all claims are read; they are few.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from typing import Final, NamedTuple, Protocol, cast

import msgspec

from sagaloom.errors import BackendUnavailable, ConfigurationError, QueueFull, StoreCorrupt
from sagaloom.ports.keyvalue import Check, Committed, Entry, Key, KeyValue, Slot
from sagaloom.ports.queue import (
    PRIORITY_MAX,
    Acked,
    Buried,
    Delivery,
    Exchange,
    QueueCapabilities,
    QueueDeadLetter,
    QueueDepth,
    QueueMessage,
    Released,
    Retried,
    Settlement,
    Token,
)
from sagaloom.queues.rows import (
    MessageRow,
    decode_letter,
    encode,
    letter_of,
    message_of,
    micros,
    read,
    row_of,
    row_of_letter,
)

__all__ = ["SCHEMA", "KvQueueBroker", "Presence"]

SCHEMA: Final = 1

_SCHEMA_KEY: Final[Key] = ("queue_meta", "schema")
_ROUNDS_MAX: Final = 64
_PAGE: Final = 256
_CLAIMS_MAX: Final = 100_000
_COUNT_MAX: Final = 1_000_000
_LOOK_SECONDS: Final = 0.5
_CAPABILITIES: Final = QueueCapabilities(
    durability="kill -9 of every process, and power loss: what was sent is synced to disk",
    delay="to the millisecond, by the clock of this host",
    leases="renewed",
    priority=True,
    deduplication=True,
    order_by_key=True,
    atomic_batches=True,
)


class Presence(Protocol):
    """Shows one consumer to the others, and them to it; `sagaloom.kv.presence.FilePresence` is one."""

    def enter(self, holder: str) -> None: ...

    def renew(self) -> bool: ...

    def others(self) -> frozenset[str]: ...

    def nudge(self) -> None: ...

    def listen(self, on_nudge: Callable[[], None]) -> bool: ...

    def leave(self) -> None: ...


class _Waiting(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A message that waits: `due` is its moment while it stands in a lane, else 0; `attempt` counts those behind it."""

    message: MessageRow
    attempt: int = 0
    due: int = 0


class _Claim(msgspec.Struct, frozen=True, array_like=True, gc=False):
    message: MessageRow
    attempt: int
    holder: str


_decode_waiting: Final = msgspec.msgpack.Decoder(_Waiting).decode
_decode_claim: Final = msgspec.msgpack.Decoder(_Claim).decode


class _Lease(NamedTuple):
    """A token: the claim's `seq` and the version of its row."""

    seq: int
    versionstamp: int


class _Writes:
    """What one commit will do."""

    def __init__(self) -> None:
        self.checks: list[Check] = []
        self.inserts: list[tuple[Key, bytes]] = []
        self.puts: list[tuple[Key, bytes]] = []
        self.deletes: list[Key] = []
        self.numbers = 0

    def __bool__(self) -> bool:
        return bool(self.inserts or self.puts or self.deletes)

    def move(self, row: Entry) -> None:
        """Takes `row` away, if it is still what it was."""
        self.checks.append(Check(row.key, row.versionstamp))
        self.deletes.append(row.key)


class KvQueueBroker:
    """One queue over a `KeyValue`. `close` calls `on_close`, for whoever has opened the store."""

    def __init__(
        self,
        queue: str,
        kv: KeyValue,
        *,
        presence: Callable[[float], Presence],
        now: Callable[[], datetime],
        deduplication_seconds: float = 300.0,
        max_length: int | None = None,
        on_close: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`presence` makes one that is believed for so many seconds."""
        self._queue = queue
        self._kv = kv
        self._make_presence = presence
        self._bell = presence(1.0)
        """For nudging those who consume; it never enters."""
        self._presence: Presence | None = None
        self._now = now
        self._deduplication_micros = round(deduplication_seconds * 1_000_000)
        self._max_length = max_length
        self._on_close = on_close
        self._holder = ""
        self._standing = 0
        """The version of our own row, which nobody else may touch while we live."""
        self._lease_seconds = 0.0
        self._on_arrival: Callable[[], None] | None = None
        self._claims: dict[int, tuple[int, _Claim]] = {}
        self._seen: frozenset[str] = frozenset()
        self._looked_at = 0.0
        self._scanned_at = 0.0
        self._counter = f"queue:{queue}"
        self._is_closed = False

    @property
    def name(self) -> str:
        return f"kv queue {self._queue!r} in {self._kv.name.removeprefix('kv:')}"

    @property
    def queue(self) -> str:
        return self._queue

    @property
    def capabilities(self) -> QueueCapabilities:
        return _CAPABILITIES

    async def open(self) -> None:
        """Reads the marker of the rows, or writes it."""
        row = await self._kv.get(_SCHEMA_KEY)
        if row is None:
            await self._kv.commit(checks=[Check(_SCHEMA_KEY, None)], puts=[(_SCHEMA_KEY, str(SCHEMA).encode())])
            row = await self._kv.get(_SCHEMA_KEY)
        if row is None or not row.value.isdigit():
            raise StoreCorrupt(f"{self._kv.name}: row {_SCHEMA_KEY!r} is no marker of queues")
        if int(row.value) > SCHEMA:
            raise ConfigurationError(
                f"the queues in {self._kv.name} were written with schema {int(row.value)}, this version reads up to "
                f"{SCHEMA}: upgrade sagaloom, or choose another file"
            )

    async def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            await self.end()
            if self._on_close is not None:
                await self._on_close()

    # -- sending --------------------------------------------------------------------------------------------------

    async def send(self, messages: Sequence[tuple[QueueMessage, int]]) -> Sequence[bool]:
        for _ in range(_ROUNDS_MAX):
            writes = _Writes()
            stored = await self._place(writes, messages)
            if not any(stored):
                return stored
            await self._refuse_overflow(sum(stored))
            if await self._committed(writes):
                self._arrived()
                return stored
        raise self._too_many_rounds("sending")

    async def _place(self, writes: _Writes, messages: Sequence[tuple[QueueMessage, int]]) -> list[bool]:
        now = micros(self._now())
        hashes = [
            None if message.deduplication_id is None else _hash(message.deduplication_id) for message, _ in messages
        ]
        known = await self._known(writes, {each for each in hashes if each is not None}, now)
        lanes = await self._lanes({message.key for message, _ in messages if message.key is not None})
        stored: list[bool] = []
        for (message, delay_ms), hashed in zip(messages, hashes, strict=True):
            if hashed is not None:
                if hashed in known:
                    stored.append(False)
                    continue
                known.add(hashed)
                until = now + self._deduplication_micros
                # Not an insert: an old one may have to go first. The check says which one was seen.
                writes.puts.append((("queue_dedupe", self._queue, hashed), str(until).encode()))
                writes.puts.append((("queue_expiry", self._queue, until, hashed), b""))
            due = now + delay_ms * 1000 if delay_ms else 0
            waiting = _Waiting(row_of(message), 0, due)
            lane = None if message.key is None else _hash(message.key)
            if lane is None:
                self._wait(writes, waiting)
            elif lane in lanes:
                head = lanes[lane]
                if head is not None:
                    # Bumped, so that whoever ends the head at this moment looks behind it again.
                    writes.checks.append(Check(head.key, head.versionstamp))
                    writes.puts.append((head.key, b""))
                    lanes[lane] = None
                writes.inserts.append((("queue_lane", self._queue, lane, self._number(writes)), encode(waiting)))
            else:
                lanes[lane] = None
                writes.inserts.append((("queue_head", self._queue, lane), b""))
                self._wait(writes, waiting)
            stored.append(True)
        return stored

    async def _known(self, writes: _Writes, hashes: set[bytes], now: int) -> set[bytes]:
        """Those of the hashes whose deduplication id still counts."""
        if not hashes:
            return set()
        for row in await self._kv.scan(("queue_expiry", self._queue), limit=64):
            until, hashed = cast("int", row.key[2]), cast("bytes", row.key[3])
            if until > now:
                break
            writes.deletes.append(row.key)
            if hashed not in hashes:
                writes.deletes.append(("queue_dedupe", self._queue, hashed))
        known: set[bytes] = set()
        keys: list[Key] = [("queue_dedupe", self._queue, hashed) for hashed in hashes]
        for key, found in zip(keys, await self._kv.get_many(keys), strict=True):
            writes.checks.append(Check(key, None if found is None else found.versionstamp))
            if found is not None and int(found.value) > now:
                known.add(cast("bytes", key[2]))
        return known

    async def _lanes(self, keys: set[str]) -> dict[bytes, Entry | None]:
        """The lanes that somebody is in, with their rows."""
        if not keys:
            return {}
        heads: list[Key] = [("queue_head", self._queue, _hash(key)) for key in keys]
        found = await self._kv.get_many(heads)
        return {cast("bytes", row.key[2]): row for row in found if row is not None}

    def _wait(self, writes: _Writes, waiting: _Waiting) -> None:
        """Lets a message wait that no other one of its key is before."""
        seq = self._number(writes)
        if waiting.due:
            writes.inserts.append((("queue_later", self._queue, waiting.due, seq), encode(waiting)))
        else:
            rank = PRIORITY_MAX - waiting.message.priority
            writes.inserts.append((("queue_ready", self._queue, rank, seq), encode(waiting)))

    def _number(self, writes: _Writes) -> Slot:
        writes.numbers += 1
        return Slot(self._counter, writes.numbers - 1)

    async def _committed(self, writes: _Writes) -> bool:
        done = await self._kv.commit(
            checks=writes.checks,
            inserts=writes.inserts,
            puts=writes.puts,
            deletes=writes.deletes,
            reserve={self._counter: writes.numbers} if writes.numbers else None,
        )
        return isinstance(done, Committed)

    async def _refuse_overflow(self, count: int) -> None:
        if self._max_length is None:
            return
        there = 0
        for table in ("queue_ready", "queue_later", "queue_claim", "queue_lane"):
            there += await self._kv.count((table, self._queue), limit=self._max_length + 1 - there)
            if there + count > self._max_length:
                raise QueueFull(
                    f"{self.name} is full: {count} more do not fit into max_length={self._max_length}; try again when "
                    "some are done, or let it hold more"
                )

    def _arrived(self) -> None:
        if self._on_arrival is not None:
            self._on_arrival()
        self._bell.nudge()

    # -- consuming ------------------------------------------------------------------------------------------------

    async def begin(self, on_arrival: Callable[[], None], *, prefetch: int, lease_seconds: float) -> None:
        self._lease_seconds = lease_seconds
        self._on_arrival = on_arrival
        await self._join(self._make_presence(lease_seconds), on_arrival)

    async def _join(self, presence: Presence, on_arrival: Callable[[], None]) -> None:
        """Becomes a consumer that holds nothing, under a name of its own."""
        self._holder = uuid.uuid4().hex
        self._claims.clear()
        presence.enter(self._holder)
        presence.listen(on_arrival)
        self._presence = presence
        joined = await self._kv.commit(inserts=[(self._holder_key, b"")])
        assert isinstance(joined, Committed)
        self._standing = joined.versionstamp
        self._looked_at = self._scanned_at = 0.0
        self._bell.nudge()  # From now on the others look whether we are still there.

    @property
    def _holder_key(self) -> Key:
        return ("queue_holder", self._queue, self._holder)

    async def end(self) -> None:
        presence, self._presence = self._presence, None
        if presence is not None:
            self._on_arrival = None
            self._claims.clear()
            presence.leave()
            self._bell.nudge()  # What we still held is free.

    async def exchange(self, settlements: Sequence[Settlement], *, limit: int) -> Exchange:
        if self._presence is None or self._on_arrival is None:
            raise ConfigurationError(f"{self.name} is not consumed here: begin first")
        self._presence.renew()
        stale: list[Token] = []
        for _ in range(_ROUNDS_MAX):
            writes = _Writes()
            leases = self._known_leases(settlements, stale)
            if leases:
                # Rewritten, so that nobody takes over from us what we settle in this commit.
                writes.checks.append(Check(self._holder_key, self._standing))
                writes.puts.append((self._holder_key, b""))
            has_freed = False
            for settlement, claim in leases:
                has_freed |= await self._settle(writes, settlement, claim)
            claims: list[tuple[int, _Claim]] = []
            next_due, now = None, micros(self._now())
            if limit > 0:
                next_due, claims = await self._take(writes, limit, now)
            if not writes:
                return Exchange((), stale, self._next_look(next_due, now))
            done = await self._kv.commit(
                checks=writes.checks,
                inserts=writes.inserts,
                puts=writes.puts,
                deletes=writes.deletes,
                reserve={self._counter: writes.numbers} if writes.numbers else None,
            )
            if not isinstance(done, Committed):
                if self._holder_key in done.failed:
                    # Nobody believed in us any more. All that we held is somebody else's, and we begin anew.
                    await self._join(self._presence, self._on_arrival)
                self._scanned_at = 0.0
                continue
            if leases:
                self._standing = done.versionstamp
            for settlement, _ in leases:
                del self._claims[_lease(settlement).seq]
            deliveries: list[Delivery] = []
            for seq, claim in claims:
                self._claims[seq] = (done.versionstamp, claim)
                deliveries.append(Delivery(message_of(claim.message), claim.attempt, _Lease(seq, done.versionstamp)))
            if has_freed or writes.numbers:
                self._bell.nudge()
                return Exchange(deliveries, stale, 0.0 if limit > len(deliveries) else None)
            return Exchange(deliveries, stale, self._next_look(next_due, now))
        raise self._too_many_rounds("taking messages")

    async def _take(self, writes: _Writes, limit: int, now: int) -> tuple[int | None, list[tuple[int, _Claim]]]:
        """Takes messages, once those wait again that are free or due; and when the next ones are."""
        turn_key: Key = ("queue_turn", self._queue)
        # Before everything else: what others take after this is noticed by the commit.
        turn = await self._kv.get(turn_key)
        before = len(writes.deletes)
        await self._take_over(writes)
        next_due = await self._promote(writes, now)
        # What begins to wait in this commit has no number yet: it is taken by the next exchange.
        claims = [self._claim(writes, row) for row in await self._kv.scan(("queue_ready", self._queue), limit=limit)]
        if len(writes.deletes) > before:
            writes.checks.append(Check(turn_key, None if turn is None else turn.versionstamp))
            writes.puts.append((turn_key, b""))
        return next_due, claims

    def _known_leases(self, settlements: Sequence[Settlement], stale: list[Token]) -> list[tuple[Settlement, _Claim]]:
        leases: list[tuple[Settlement, _Claim]] = []
        for settlement in settlements:
            lease = _lease(settlement)
            if lease in stale:
                continue
            versionstamp, claim = self._claims.get(lease.seq, (0, None))
            if claim is None or versionstamp != lease.versionstamp:
                stale.append(lease)
            else:
                leases.append((settlement, claim))
        return leases

    async def _settle(self, writes: _Writes, settlement: Settlement, claim: _Claim) -> bool:
        """Writes down a settlement; True when another message may go on because of it."""
        lease = _lease(settlement)
        writes.deletes.append(("queue_claim", self._queue, lease.seq))
        match settlement:
            case Retried(_, delay_ms):
                due = micros(self._now()) + delay_ms * 1000 if delay_ms else 0
                self._wait(writes, _Waiting(claim.message, claim.attempt, due))
                return True
            case Released():
                # It never was away: it gets its old place.
                rank = PRIORITY_MAX - claim.message.priority
                waiting = encode(_Waiting(claim.message, claim.attempt - 1))
                writes.inserts.append((("queue_ready", self._queue, rank, lease.seq), waiting))
                return True
            case Buried(_, letter):
                await self._bury(writes, letter)
            case Acked():
                pass
        return claim.message.key is not None and await self._end_of_head(writes, _hash(claim.message.key))

    async def _bury(self, writes: _Writes, letter: QueueDeadLetter) -> None:
        row = row_of_letter(letter)
        index: Key = ("queue_dead_at", self._queue, letter.id)
        older = await self._kv.get(index)
        if older is not None:
            writes.deletes.append(("queue_dead", self._queue, int(older.value), letter.id))
        writes.puts.append((("queue_dead", self._queue, row.failed, letter.id), encode(row)))
        writes.puts.append((index, str(row.failed).encode()))

    async def _end_of_head(self, writes: _Writes, lane: bytes) -> bool:
        """Lets the next one of a lane go on, or closes the lane."""
        head = await self._kv.get(("queue_head", self._queue, lane))
        if head is None:
            return False
        writes.checks.append(Check(head.key, head.versionstamp))
        following = await self._kv.scan(("queue_lane", self._queue, lane), limit=1)
        if not following:
            writes.deletes.append(head.key)
            return False
        [row] = following
        writes.move(row)
        writes.puts.append((head.key, b""))
        waiting = read(self.name, row.key, row.value, _decode_waiting)
        if waiting.due and waiting.due <= micros(self._now()):
            waiting = msgspec.structs.replace(waiting, due=0)
        self._wait(writes, waiting)
        return True

    async def _take_over(self, writes: _Writes) -> None:
        """Lets messages wait again whose consumers are no more; looks for these now and then."""
        assert self._presence is not None
        monotonic = time.monotonic()
        if monotonic - self._looked_at < min(self._lease_seconds / 10, _LOOK_SECONDS):
            return
        self._looked_at = monotonic
        others = self._presence.others()
        if others >= self._seen and monotonic - self._scanned_at < self._lease_seconds / 2:
            self._seen = others
            return
        self._seen, self._scanned_at = others, monotonic
        # Before their claims: one that settles in between is another row then.
        holders = await self._kv.scan(("queue_holder", self._queue), limit=_PAGE)
        gone = {row.key[2]: row for row in holders if row.key[2] != self._holder and row.key[2] not in others}
        for row in gone.values():
            writes.move(row)
        if gone:
            for row in await self._kv.scan(("queue_claim", self._queue), limit=_CLAIMS_MAX):
                claim = read(self.name, row.key, row.value, _decode_claim)
                if claim.holder in gone:
                    writes.deletes.append(row.key)
                    self._wait(writes, _Waiting(claim.message, claim.attempt))

    async def _promote(self, writes: _Writes, now: int) -> int | None:
        """Lets those wait that have become due; returns when the next one does."""
        for row in await self._kv.scan(("queue_later", self._queue), limit=_PAGE):
            due = cast("int", row.key[2])
            if due > now:
                return due
            writes.deletes.append(row.key)
            waiting = read(self.name, row.key, row.value, _decode_waiting)
            self._wait(writes, _Waiting(waiting.message, waiting.attempt))
        return None

    def _claim(self, writes: _Writes, row: Entry) -> tuple[int, _Claim]:
        seq = cast("int", row.key[3])
        waiting = read(self.name, row.key, row.value, _decode_waiting)
        claim = _Claim(waiting.message, waiting.attempt + 1, self._holder)
        writes.deletes.append(row.key)
        writes.inserts.append((("queue_claim", self._queue, seq), encode(claim)))
        return seq, claim

    def _next_look(self, due: int | None, now: int) -> float | None:
        """When to look again though nobody calls: something becomes due, or one of the others may have died."""
        moments = [] if due is None else [max(0.0, (due - now) / 1_000_000)]
        if self._seen:
            moments.append(_LOOK_SECONDS)
        return min(moments, default=None)

    async def renew(self, tokens: Sequence[Token]) -> Sequence[Token]:
        if self._presence is None:
            return tokens
        if not self._presence.renew():
            # We were away for longer than anybody believed in us. Whoever took over from us has removed our row.
            standing = await self._kv.get(self._holder_key)
            if standing is None:
                self._claims.clear()
        return [token for token in tokens if not self._is_held(cast("_Lease", token))]

    def _is_held(self, lease: _Lease) -> bool:
        return self._claims.get(lease.seq, (0, None))[0] == lease.versionstamp

    # -- looking --------------------------------------------------------------------------------------------------

    async def depth(self) -> QueueDepth:
        async def count(table: str) -> int:
            return await self._kv.count((table, self._queue), limit=_COUNT_MAX)

        waiting = await count("queue_ready") + await count("queue_lane")
        return QueueDepth(waiting, await count("queue_later"), await count("queue_claim"), await count("queue_dead"))

    async def dead_letters(self, *, limit: int, after: str | None = None) -> Sequence[QueueDeadLetter]:
        bound: Key | None = None
        if after is not None:
            index = await self._kv.get(("queue_dead_at", self._queue, after))
            if index is None:
                return []
            bound = ("queue_dead", self._queue, int(index.value), after)
        rows = await self._kv.scan(("queue_dead", self._queue), after=bound, limit=limit)
        return [letter_of(self._queue, read(self.name, row.key, row.value, decode_letter)) for row in rows]

    async def redrive(self, ids: Sequence[str]) -> int:
        for _ in range(_ROUNDS_MAX):
            writes = _Writes()
            letters = await self._dig_up(writes, ids)
            if not letters:
                return 0
            again = [(msgspec.structs.replace(letter.message, deduplication_id=None), 0) for letter in letters]
            await self._place(writes, again)
            if await self._committed(writes):
                self._arrived()
                return len(letters)
        raise self._too_many_rounds("redriving")

    async def discard(self, ids: Sequence[str]) -> int:
        for _ in range(_ROUNDS_MAX):
            writes = _Writes()
            letters = await self._dig_up(writes, ids)
            if not letters or await self._committed(writes):
                return len(letters)
        raise self._too_many_rounds("discarding")

    async def _dig_up(self, writes: _Writes, ids: Sequence[str]) -> list[QueueDeadLetter]:
        wanted = list(dict.fromkeys(ids))
        indexes = await self._kv.get_many([("queue_dead_at", self._queue, each) for each in wanted])
        keys: list[Key] = [
            ("queue_dead", self._queue, int(index.value), index.key[2]) for index in indexes if index is not None
        ]
        letters: list[QueueDeadLetter] = []
        for row in await self._kv.get_many(keys) if keys else []:
            if row is not None:
                writes.move(row)
                writes.deletes.append(("queue_dead_at", self._queue, row.key[3]))
                letters.append(letter_of(self._queue, read(self.name, row.key, row.value, decode_letter)))
        return letters

    def _too_many_rounds(self, doing: str) -> BackendUnavailable:
        return BackendUnavailable(f"{self.name}: others were faster {_ROUNDS_MAX} times while {doing}")


def _lease(settlement: Settlement) -> _Lease:
    return cast("_Lease", settlement.token)


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
