"""The store of job runs over an ordered key-value store; several processes may share its file with each other, and with
a saga store.

The rows (the first part of a key names its table; times are microseconds since 1970):

    job_run      run id                                      JobRun
    job_ready    job id, 100 - priority, due, run id         empty: runs that are due, in the order of their claim
    job_later    due, run id                                 job id and priority of a run that is not due yet
    job_claim    run id                                      (holder, epoch, expires, whether it was asked to end)
    job_dedupe   job id, hash of the idempotency key         (run id, digest of the payload)
    job_index    job id, status, run id                      empty; moved when a run's status changes
    job_seen     job id                                      empty: which jobs have runs
    job_reply    due, run id                                 empty: runs whose end a saga has not heard of
    job_event    number                                      JobEvent: what happened, to whichever run
    job_schedule job id                                      ScheduleCursor
    job_meta     "schema", "pulse"

How it works:

- A run has one row in `job_ready`, `job_later` or `job_claim` until it is over, and each move is one commit that checks
  the version of the run's row. Of two processes that want one run, one commits; the other looks again. What a move
  makes of a run is in `job_moves`; the event of it is written in the same commit.
- A claim moves what has become due from `job_later` to `job_ready`, takes over claims that are expired or whose holder
  is dead, and then takes the first ready runs.
- The row `pulse` is rewritten by every commit that makes a run claimable earlier than anybody could know: enqueueing,
  retrying, releasing. A store that found nothing remembers the version of that row and the moment at which something
  may become due; until one of them is over, a further claim is one read.
- Death is known before a lease is over where there is a `Presence`: on one host, by locks that the kernel frees. All
  who share a store then show themselves in the same way, for who is not seen is dead.

- Runs are forgotten in the order of their ids, which is that of their triggers. A run that waits for years is looked at
  in each round until it is over.

- Commits that are asked for at the same time go together (`job_commits`).

What we dislike about it: the log and the history of a run are in its row, and written anew with each move.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Final, NamedTuple, Protocol

import msgspec

from sagaloom.engine.records import ScheduleCursor
from sagaloom.errors import (
    BackendUnavailable,
    ConfigurationError,
    IdempotencyKeyReused,
    MessageRejected,
    StoreCorrupt,
)
from sagaloom.ids import content_digest
from sagaloom.ports.jobs import (
    JOB_RUN_STATUSES,
    PRIORITY_MAX,
    Claimed,
    Enqueued,
    JobClaim,
    JobEvent,
    JobNote,
    JobReply,
    JobRun,
    JobRunStatus,
    Pruned,
    Released,
    Renewed,
    Settlement,
)
from sagaloom.ports.keyvalue import Check, Committed, Conflicted, Entry, Key, KeyValue
from sagaloom.stores import job_moves
from sagaloom.stores.job_commits import JobCommits
from sagaloom.stores.job_rows import (
    ClaimRow,
    DedupeRow,
    canonical,
    decode_claim,
    decode_cursor,
    decode_dedupe,
    decode_event,
    decode_later,
    decode_run,
    dedupe_key,
    index_key,
    later_row,
    moment_of,
    number_at,
    ready_key,
    reply_row,
    run_key,
    text_at,
)
from sagaloom.stores.rows import decoded, encode, micros

__all__ = ["SCHEMA", "KvJobRunStore", "Presence"]

SCHEMA: Final = 2
"""1 knew neither cancelled runs nor events."""

_ROUNDS_MAX: Final = 32
_PAGE: Final = 256
_CLAIMS_MAX: Final = 10_000
_JOBS_MAX: Final = 10_000
_RUN_ID: Final = re.compile("[0-9a-f]{32}")

_SCHEMA_KEY: Final[Key] = ("job_meta", "schema")
_PULSE_KEY: Final[Key] = ("job_meta", "pulse")
_PROBE_KEY: Final[Key] = ("job_meta", "probe")


class Presence(Protocol):
    """Shows one holder to the others, and them to it; `sagaloom.kv.presence.FilePresence` is one."""

    def enter(self, holder: str) -> None: ...

    def renew(self) -> bool: ...

    def others(self) -> frozenset[str]:
        """The holders that are alive, but for ourselves."""
        ...

    def leave(self) -> None: ...


class _Candidate(NamedTuple):
    """A run that may be claimed; sorts in the order in which runs are."""

    rank: int
    due: int
    run_id: str
    place: Entry
    """The row that goes when it is claimed."""


class _Look(NamedTuple):
    """What a claim has seen."""

    takeovers: list[Entry]
    """Rows of `job_claim`, each of a holder that is over."""
    candidates: list[_Candidate]
    promoted: dict[str, Entry]
    """Rows of `job_later` that are due, by run."""
    next_at: int | None
    others: frozenset[str]
    """Living holders of other claims."""
    is_complete: bool
    """Whether nothing that is claimable was left out."""


class _Memory(NamedTuple):
    """When the last look found nothing to claim, and what would have to change."""

    holder: str
    job_ids: frozenset[str]
    pulse: int
    next_at: int | None
    others: frozenset[str]


class KvJobRunStore:
    """A `JobRunStore` over a `KeyValue`, which it closes with itself. One object belongs to one event loop.

    >>> import asyncio
    >>> from datetime import timedelta
    >>> from sagaloom.kv import MemoryKeyValue
    >>> async def example() -> str:
    ...     store = KvJobRunStore(MemoryKeyValue())
    ...     now = datetime(2026, 1, 31, tzinfo=UTC)
    ...     await store.enqueue(JobRun(run_id="0" * 32, job_id="mail", payload=b"{}", created_at=now, due_at=now))
    ...     claimed = await store.claim("worker-1", ["mail"], now=now, until=now + timedelta(seconds=6), limit=1)
    ...     return (await store.settle(claimed.runs[0].claim, Succeeded(b"null", now))).status
    >>> asyncio.run(example())
    'succeeded'
    """

    def __init__(self, kv: KeyValue, *, presence: Presence | None = None) -> None:
        self._kv = kv
        self._commits = JobCommits(kv)
        self._presence = presence
        self._is_open = False
        self._memory: _Memory | None = None
        self._seen: set[str] = set()

    @property
    def name(self) -> str:
        return self._kv.name

    @property
    def problem(self) -> str | None:
        problem: str | None = getattr(self._kv, "problem", None)
        return problem

    async def open(self) -> None:
        """Reads the marker of the rows, or writes it. Every other method does so by itself."""
        if self._is_open:
            return
        schema = await self._kv.get(_SCHEMA_KEY)
        if schema is None:
            await self._kv.commit(
                checks=[Check(_SCHEMA_KEY, None)], puts=[(_SCHEMA_KEY, str(SCHEMA).encode()), (_PULSE_KEY, b"")]
            )
            # Conflicted means that somebody else was faster; either way there is one now.
            schema = await self._kv.get(_SCHEMA_KEY)
        if schema is None or not schema.value.isdigit():
            raise StoreCorrupt(f"{self.name}: row {_SCHEMA_KEY!r} is no marker of job runs")
        if int(schema.value) > SCHEMA:
            raise ConfigurationError(
                f"the job runs in {self.name} were written with schema {int(schema.value)}, this version reads up to "
                f"{SCHEMA}: upgrade sagaloom, or choose another store"
            )
        if int(schema.value) < SCHEMA:
            # The rows are the same, with less in them. Who reads only the older ones must not meet the newer.
            await self._kv.commit(puts=[(_SCHEMA_KEY, str(SCHEMA).encode())])
        self._is_open = True

    async def close(self) -> None:
        self._memory = None
        await self.leave()
        await self._kv.close()

    # -- being seen -----------------------------------------------------------------------------------------------

    async def join(self, holder: str) -> None:
        await self.open()
        if self._presence is not None:
            self._presence.enter(holder)

    def stay(self) -> None:
        if self._presence is not None:
            self._presence.renew()

    async def leave(self) -> None:
        if self._presence is not None:
            self._presence.leave()

    def _gone(self, holders: Collection[str]) -> frozenset[str]:
        """Those of `holders` that certainly live no more."""
        if self._presence is None or not holders:
            return frozenset()
        return frozenset(holders) - self._presence.others()

    async def probe(self) -> None:
        await self.open()
        await self._kv.commit(puts=[(_PROBE_KEY, b"")])

    # -- enqueueing -----------------------------------------------------------------------------------------------

    async def enqueue(self, run: JobRun) -> Enqueued:
        await self.open()
        dedupe: tuple[Key, DedupeRow] | None = None
        if run.idempotency_key is not None:
            digest = content_digest(run.job_id, canonical(run.payload))
            dedupe = (dedupe_key(run.job_id, run.idempotency_key), DedupeRow(run.run_id, digest))
        for _ in range(_ROUNDS_MAX):
            if dedupe is not None and (row := await self._kv.get(dedupe[0])) is not None:
                return await self._first_of(run, dedupe[1], decoded(self._kv, row, decode_dedupe))
            inserts = [(run_key(run.run_id), encode(run)), (index_key(run), b""), self._waiting_row(run)]
            if dedupe is not None:
                inserts.append((dedupe[0], encode(dedupe[1])))
            puts: list[tuple[Key, bytes]] = [(_PULSE_KEY, b"")]
            if run.job_id not in self._seen:
                puts.append((("job_seen", run.job_id), b""))
            done = await self._commits.commit([job_moves.event_of(run, at=run.created_at)], inserts=inserts, puts=puts)
            if isinstance(done, Committed):
                self._seen.add(run.job_id)
                return Enqueued(run, duplicate=False)
            if run_key(run.run_id) in done.failed:
                raise MessageRejected(f"{self.name} has a run {run.run_id} already: enqueue another one")
        raise self._too_many_rounds("enqueueing")

    async def _first_of(self, run: JobRun, offered: DedupeRow, known: DedupeRow) -> Enqueued:
        first = await self.get(known.run_id)
        if first is None:
            raise StoreCorrupt(f"{self.name}: run {known.run_id} is gone, and its idempotency key is not")
        if known.digest != offered.digest:
            raise IdempotencyKeyReused(
                f"idempotency key {run.idempotency_key!r:.80} of job {run.job_id!r} came with another payload in run "
                f"{first.run_id}: use a new key for a new run, or repeat the old payload",
                data={"jobId": run.job_id, "runId": first.run_id},
            )
        return Enqueued(first, duplicate=True)

    def _waiting_row(self, run: JobRun) -> tuple[Key, bytes]:
        return later_row(run) if run.due_at > run.created_at else self._ready_row(run)

    def _ready_row(self, run: JobRun) -> tuple[Key, bytes]:
        return ready_key(run.job_id, run.priority, micros(run.due_at), run.run_id), b""

    # -- claiming -------------------------------------------------------------------------------------------------

    async def claim(
        self, holder: str, job_ids: Collection[str], *, now: datetime, until: datetime, limit: int
    ) -> Claimed:
        await self.open()
        wanted = frozenset(job_ids)
        if limit <= 0 or not wanted:
            return Claimed((), None)
        for _ in range(_ROUNDS_MAX):
            # Read before everything else: what is enqueued after it changes it, and is seen by the next look.
            row = await self._kv.get(_PULSE_KEY)
            pulse = row.versionstamp if row is not None else 0
            memory = self._memory
            if memory is not None and not self._is_news(memory, holder, wanted, pulse, micros(now)):
                return Claimed((), moment_of(memory.next_at))
            look = await self._look(holder, wanted, now=micros(now), limit=limit)
            runs = await self._take(look, holder, wanted, now=now, until=until, limit=limit)
            if runs is None:
                continue
            is_done = look.is_complete and not runs
            self._memory = _Memory(holder, wanted, pulse, look.next_at, look.others) if is_done else None
            return Claimed(runs, moment_of(look.next_at))
        raise self._too_many_rounds("claiming")

    def _is_news(self, memory: _Memory, holder: str, wanted: frozenset[str], pulse: int, now: int) -> bool:
        return (
            (memory.holder, memory.job_ids, memory.pulse) != (holder, wanted, pulse)
            or (memory.next_at is not None and memory.next_at <= now)
            or bool(self._gone(memory.others))
        )

    async def _look(self, holder: str, wanted: frozenset[str], *, now: int, limit: int) -> _Look:
        moments: list[int] = []
        later = await self._kv.scan(("job_later",), limit=_PAGE)
        promoted: dict[str, Entry] = {}
        # By run: one that somebody promotes between the two scans is in both.
        candidates: dict[str, _Candidate] = {}
        for row in later:
            due, run_id = number_at(row, 1), text_at(row, 2)
            if due > now:
                moments.append(due)
                break
            promoted[run_id] = row
            job_id, priority = decoded(self._kv, row, decode_later)
            if job_id in wanted:
                candidates[run_id] = _Candidate(PRIORITY_MAX - priority, due, run_id, row)
        is_complete = len(promoted) < _PAGE
        for job_id in sorted(wanted):
            for row in await self._kv.scan(("job_ready", job_id), limit=limit):
                run_id = text_at(row, 4)
                candidates[run_id] = _Candidate(number_at(row, 2), number_at(row, 3), run_id, row)
        claims = await self._kv.scan(("job_claim",), limit=_CLAIMS_MAX)
        takeovers: list[Entry] = []
        held = [(row, decoded(self._kv, row, decode_claim)) for row in claims]
        others = frozenset(claim.holder for _, claim in held if claim.holder != holder)
        gone = self._gone(others)
        for row, claim in held:
            if claim.holder == holder:
                continue
            if claim.expires <= now or claim.holder in gone:
                takeovers.append(row)
            else:
                moments.append(claim.expires)
        return _Look(
            takeovers,
            sorted(candidates.values()),
            promoted,
            min(moments, default=None),
            others - gone,
            is_complete and len(claims) < _CLAIMS_MAX,
        )

    async def _take(
        self, look: _Look, holder: str, wanted: frozenset[str], *, now: datetime, until: datetime, limit: int
    ) -> tuple[JobRun, ...] | None:
        """The runs that were claimed; None when somebody was faster, and it must be looked again."""
        # All of them are read: which jobs they are of is in their runs.
        over = await self._kv.get_many([run_key(text_at(row, 1)) for row in look.takeovers])
        taken_over = [
            (claim_row, run_row)
            for claim_row, run_row in zip(look.takeovers, over, strict=True)
            if run_row is None or decoded(self._kv, run_row, decode_run).job_id in wanted
        ][:limit]
        chosen = look.candidates[: limit - len(taken_over)]
        waiting = await self._kv.get_many([run_key(one.run_id) for one in chosen])
        checks: list[Check] = []
        inserts: list[tuple[Key, bytes]] = []
        puts: list[tuple[Key, bytes]] = []
        deletes: list[Key] = []
        runs: list[JobRun] = []
        events: list[JobEvent] = []

        def move(row: Entry | None, was: JobRunStatus) -> JobRun | None:
            run = decoded(self._kv, row, decode_run) if row is not None else None
            if row is None or run is None or run.status != was:
                return None
            claimed = job_moves.claimed(run, holder, now=now)
            events.append(job_moves.event_of(claimed, at=now))
            checks.append(Check(row.key, row.versionstamp))
            puts.append((row.key, encode(claimed)))
            if was != "running":
                deletes.append(index_key(run))
                puts.append((index_key(claimed), b""))
            runs.append(claimed)
            return claimed

        for claim_row, run_row in taken_over:
            claimed = move(run_row, "running")
            if claimed is None:
                return None
            checks.append(Check(claim_row.key, claim_row.versionstamp))  # a renewal at this very moment wins
            puts.append((claim_row.key, encode(ClaimRow(holder, claimed.epoch, micros(until)))))
        for candidate, run_row in zip(chosen, waiting, strict=True):
            claimed = move(run_row, "pending")
            if claimed is None:
                return None
            checks.append(Check(candidate.place.key, candidate.place.versionstamp))
            deletes.append(candidate.place.key)
            inserts.append((("job_claim", claimed.run_id), encode(ClaimRow(holder, claimed.epoch, micros(until)))))
        taken = {run.run_id for run in runs}
        for run_id, row in look.promoted.items():
            if run_id not in taken:
                job_id, priority = decoded(self._kv, row, decode_later)
                checks.append(Check(row.key, row.versionstamp))
                deletes.append(row.key)
                inserts.append((ready_key(job_id, priority, number_at(row, 1), run_id), b""))
        if not checks:
            return ()
        done = await self._commits.commit(events, checks=checks, inserts=inserts, puts=puts, deletes=deletes)
        return None if isinstance(done, Conflicted) else tuple(runs)

    # -- holding --------------------------------------------------------------------------------------------------

    async def renew(self, claims: Sequence[JobClaim], *, until: datetime) -> Renewed:
        await self.open()
        for _ in range(_ROUNDS_MAX):
            rows = await self._kv.get_many([("job_claim", claim.run_id) for claim in claims])
            held = [
                (claim, row, decoded(self._kv, row, decode_claim))
                for claim, row in zip(claims, rows, strict=True)
                if row is not None and self._is_held(claim, row)
            ]
            if held:
                done = await self._kv.commit(
                    checks=[Check(row.key, row.versionstamp) for _, row, _ in held],
                    puts=[(row.key, encode(stored._replace(expires=micros(until)))) for _, row, stored in held],
                )
                if isinstance(done, Conflicted):
                    continue
            valid = {claim for claim, _, _ in held}
            return Renewed(
                [claim for claim in claims if claim not in valid],
                [claim for claim, _, stored in held if stored.is_cancelled],
            )
        raise self._too_many_rounds("renewing")

    async def note(self, claim: JobClaim, note: JobNote) -> None:
        await self.open()
        for _ in range(_ROUNDS_MAX):
            run_row, claim_row, before = await self._held(claim)
            event = job_moves.progress_event(before, note)
            done = await self._commits.commit(
                [event] if event is not None else [],
                checks=[Check(row.key, row.versionstamp) for row in (run_row, claim_row)],
                puts=[(run_row.key, encode(job_moves.noted(before, note)))],
            )
            if isinstance(done, Committed):
                return
        raise self._too_many_rounds("noting")

    async def settle(self, claim: JobClaim, settlement: Settlement, *, note: JobNote | None = None) -> JobRun:
        await self.open()
        for _ in range(_ROUNDS_MAX):
            run_row, claim_row, before = await self._held(claim)
            after = job_moves.settled(before, settlement, note)
            puts = [(run_row.key, encode(after)), (index_key(after), b"")]
            if after.status == "pending":
                # One that was given back is due since before it was claimed.
                puts += [
                    self._ready_row(after) if isinstance(settlement, Released) else later_row(after),
                    (_PULSE_KEY, b""),
                ]
            if after.reply is not None:
                puts.append(reply_row(after))
            done = await self._commits.commit(
                [job_moves.event_of(after, at=after.history[-1].ended_at)],
                checks=[Check(row.key, row.versionstamp) for row in (run_row, claim_row)],
                deletes=[claim_row.key, index_key(before)],
                puts=puts,
            )
            if isinstance(done, Committed):
                return after
        raise self._too_many_rounds("settling")

    async def _held(self, claim: JobClaim) -> tuple[Entry, Entry, JobRun]:
        """The rows of a run and of its claim, and the run; raises `Fenced` when the claim is over."""
        run_row, claim_row = await self._kv.get_many([run_key(claim.run_id), ("job_claim", claim.run_id)])
        if run_row is None or claim_row is None or not self._is_held(claim, claim_row):
            raise job_moves.fenced(
                self.name,
                claim,
                holder=None if claim_row is None else decoded(self._kv, claim_row, decode_claim).holder,
                status=None if run_row is None else decoded(self._kv, run_row, decode_run).status,
            )
        return run_row, claim_row, decoded(self._kv, run_row, decode_run)

    def _is_held(self, claim: JobClaim, row: Entry) -> bool:
        return decoded(self._kv, row, decode_claim)[:2] == (claim.holder, claim.epoch)

    # -- operators ------------------------------------------------------------------------------------------------

    async def cancel(self, run_id: str, *, at: datetime, reason: str | None = None) -> JobRun:
        await self.open()
        for _ in range(_ROUNDS_MAX):
            run_row, before = await self._found(run_id)
            checks = [Check(run_row.key, run_row.versionstamp)]
            held: tuple[Key, ClaimRow] | None = None
            deletes = [index_key(before), later_row(before)[0], self._ready_row(before)[0]]
            if before.status == "running":
                claim_row = await self._kv.get(("job_claim", run_id))
                if claim_row is None:
                    continue  # it was settled since
                checks.append(Check(claim_row.key, claim_row.versionstamp))
                deletes = [index_key(before), claim_row.key]
                claim = decoded(self._kv, claim_row, decode_claim)
                if claim.expires > micros(at):
                    held = claim_row.key, claim
            after = job_moves.asked_to_end(before, at=at, reason=reason, is_held=held is not None)
            if after is before:
                return before
            puts = [(run_row.key, encode(after))]
            events: list[JobEvent] = []
            if held is not None:
                puts.append((held[0], encode(held[1]._replace(is_cancelled=True))))
                deletes = []
            else:
                puts.append((index_key(after), b""))
                events = [job_moves.event_of(after, at=at)]
                if after.reply is not None:
                    puts.append(reply_row(after))
            done = await self._commits.commit(events, checks=checks, puts=puts, deletes=deletes)
            if isinstance(done, Committed):
                return after
        raise self._too_many_rounds("cancelling")

    async def redrive(self, run_id: str, *, at: datetime) -> JobRun:
        await self.open()
        for _ in range(_ROUNDS_MAX):
            run_row, before = await self._found(run_id)
            after = job_moves.redriven(before, at=at)
            puts = [(run_row.key, encode(after))]
            deletes: list[Key] = []
            if before.reply is not None and before.reply.state == "due":
                deletes.append(reply_row(before)[0])
            events: list[JobEvent] = []
            if after.status == "pending":
                deletes.append(index_key(before))
                puts += [(index_key(after), b""), self._ready_row(after), (_PULSE_KEY, b"")]
                events = [job_moves.event_of(after, at=at)]
            else:
                puts.append(reply_row(after))
            done = await self._commits.commit(
                events, checks=[Check(run_row.key, run_row.versionstamp)], puts=puts, deletes=deletes
            )
            if isinstance(done, Committed):
                return after
        raise self._too_many_rounds("redriving")

    async def _found(self, run_id: str) -> tuple[Entry, JobRun]:
        row = await self._kv.get(run_key(run_id))
        if row is None:
            raise job_moves.no_run(run_id)
        return row, decoded(self._kv, row, decode_run)

    # -- replies --------------------------------------------------------------------------------------------------

    async def claim_replies(self, *, now: datetime, until: datetime, limit: int) -> list[JobRun]:
        await self.open()
        for _ in range(_ROUNDS_MAX):
            found = await self._kv.scan(("job_reply",), limit=limit)
            due = [row for row in found if number_at(row, 1) <= micros(now)]
            if not due:
                return []
            rows = await self._kv.get_many([run_key(text_at(row, 2)) for row in due])
            runs = [decoded(self._kv, row, decode_run) if row is not None else None for row in rows]
            postponed = [
                job_moves.reply_postponed(run, until=until)
                for run in runs
                if run is not None and run.reply is not None and run.reply.state == "due"
            ]
            done = await self._kv.commit(
                checks=[Check(row.key, row.versionstamp) for row in (*due, *(row for row in rows if row is not None))],
                deletes=[row.key for row in due],
                puts=[
                    *((run_key(run.run_id), encode(run)) for run in postponed),
                    *(reply_row(run) for run in postponed),
                ],
            )
            if isinstance(done, Committed):
                return postponed
        raise self._too_many_rounds("claiming the reply of")

    async def settle_reply(self, run: JobRun, reply: JobReply) -> bool:
        await self.open()
        for _ in range(_ROUNDS_MAX):
            row = await self._kv.get(run_key(run.run_id))
            if row is None:
                return False
            before = decoded(self._kv, row, decode_run)
            after = job_moves.reply_settled(before, run, reply)
            if after is None:
                return False
            done = await self._kv.commit(
                checks=[Check(row.key, row.versionstamp)],
                deletes=[reply_row(before)[0]],
                puts=[(row.key, encode(after)), *([reply_row(after)] if reply.state == "due" else [])],
            )
            if isinstance(done, Committed):
                return True
        raise self._too_many_rounds("settling the reply of")

    # -- time -----------------------------------------------------------------------------------------------------

    async def schedules(self) -> list[ScheduleCursor]:
        await self.open()
        rows = await self._kv.scan(("job_schedule",), limit=_JOBS_MAX)
        return [decoded(self._kv, row, decode_cursor) for row in rows]

    async def put_schedule(self, cursor: ScheduleCursor, *, replaces: ScheduleCursor | None) -> bool:
        await self.open()
        key: Key = ("job_schedule", cursor.saga_id)
        row = await self._kv.get(key)
        stored = None if row is None else decoded(self._kv, row, decode_cursor)
        if stored != replaces:
            return False
        check = Check(key, None if row is None else row.versionstamp)
        return isinstance(await self._kv.commit(checks=[check], puts=[(key, encode(cursor))]), Committed)

    # -- what happened --------------------------------------------------------------------------------------------

    async def events(self, *, after: int, limit: int = 256) -> list[JobEvent]:
        await self.open()
        rows = await self._kv.scan(("job_event",), after=("job_event", after), limit=limit)
        return [msgspec.structs.replace(decoded(self._kv, row, decode_event), number=number_at(row, 1)) for row in rows]

    async def event_span(self) -> tuple[int, int]:
        await self.open()
        # The oldest first: what is pruned in between makes it too small, which only costs a reader a look.
        oldest = await self._kv.scan(("job_event",), limit=1)
        newest = await self._kv.scan(("job_event",), limit=1, reverse=True)
        if not oldest or not newest:
            return 1, 0
        return number_at(oldest[0], 1), number_at(newest[0], 1)

    # -- forgetting -----------------------------------------------------------------------------------------------

    async def prune_runs(self, *, before: datetime, after: str | None = None, limit: int = 256) -> Pruned:
        await self.open()
        rows = await self._kv.scan(("job_run",), after=None if after is None else run_key(after), limit=limit)
        checks: list[Check] = []
        deletes: list[Key] = []
        has_more = len(rows) == limit
        for row in rows:
            run = decoded(self._kv, row, decode_run)
            if run.created_at >= before:
                has_more = False
                break
            is_owed = run.reply is not None and run.reply.state == "due"
            if not run.is_over or is_owed or run.ended_at is None or run.ended_at >= before:
                continue
            checks.append(Check(row.key, row.versionstamp))
            deletes += [row.key, index_key(run)]
            if run.idempotency_key is not None:
                deletes.append(dedupe_key(run.job_id, run.idempotency_key))
        if checks and isinstance(await self._kv.commit(checks=checks, deletes=deletes), Conflicted):
            return Pruned(0, after)  # one of them was redriven: the same page again
        return Pruned(len(checks), text_at(rows[-1], 1) if has_more else None)

    async def prune_events(self, *, before: datetime, limit: int = 256) -> int:
        await self.open()
        rows = await self._kv.scan(("job_event",), limit=limit + 1)
        # The newest one stays, so that numbers and readers' places mean something when all others are gone.
        old = [row.key for row in rows[:-1] if decoded(self._kv, row, decode_event).at < before][:limit]
        if old:
            await self._kv.commit(deletes=old)
        return len(old)

    async def backlog(self, *, limit: int) -> int:
        await self.open()
        ready = await self._kv.count(("job_ready",), limit=limit)
        return ready + (await self._kv.count(("job_later",), limit=limit - ready) if ready < limit else 0)

    # -- reading --------------------------------------------------------------------------------------------------

    async def get(self, run_id: str) -> JobRun | None:
        await self.open()
        row = await self._kv.get(run_key(run_id))
        return None if row is None else decoded(self._kv, row, decode_run)

    async def runs(
        self,
        *,
        job_ids: Collection[str] = (),
        statuses: Collection[JobRunStatus] = (),
        cursor: str | None = None,
        limit: int = 50,
    ) -> tuple[list[JobRun], str | None]:
        await self.open()
        if cursor is not None and not _RUN_ID.fullmatch(cursor):
            raise MessageRejected(f"{cursor!r:.80} is no cursor of runs: take it from the page before")
        if not job_ids and not statuses:
            before = run_key(cursor) if cursor is not None else None
            rows = await self._kv.scan(("job_run",), before=before, limit=limit + 1, reverse=True)
            found = [decoded(self._kv, row, decode_run) for row in rows]
        else:
            ids = await self._ids(job_ids, statuses, cursor=cursor, limit=limit + 1)
            entries = await self._kv.get_many([run_key(run_id) for run_id in ids])
            found = [decoded(self._kv, row, decode_run) for row in entries if row is not None]
        page = found[:limit]
        return page, page[-1].run_id if len(found) > limit else None

    async def _ids(
        self, job_ids: Collection[str], statuses: Collection[JobRunStatus], *, cursor: str | None, limit: int
    ) -> list[str]:
        """The newest runs of these jobs in these statuses: one scan each, merged."""
        if not job_ids:
            job_ids = [text_at(row, 1) for row in await self._kv.scan(("job_seen",), limit=_JOBS_MAX)]
        lists: list[list[str]] = []
        for job_id in sorted(set(job_ids)):
            for status in sorted(set(statuses or JOB_RUN_STATUSES)):
                prefix: Key = ("job_index", job_id, status)
                rows = await self._kv.scan(
                    prefix, before=(*prefix, cursor) if cursor is not None else None, limit=limit, reverse=True
                )
                lists.append([text_at(row, 3) for row in rows])
        # A run that changed its status between two scans is in two of them.
        return list(dict.fromkeys(heapq.merge(*lists, reverse=True)))[:limit]

    def _too_many_rounds(self, doing: str) -> BackendUnavailable:
        return BackendUnavailable(f"{self.name}: others were faster {_ROUNDS_MAX} times while {doing} a job run")
