"""The store of job runs over an ordered key-value store; several processes may share its file with each other, and with
a saga store.

The rows (the first part of a key names its table; times are microseconds since 1970):

    job_run      run id                                      JobRun
    job_ready    job id, 100 - priority, due, run id         empty: runs that are due, in the order of their claim
    job_later    due, run id                                 job id and priority of a run that is not due yet
    job_claim    run id                                      (holder, epoch, expires)
    job_dedupe   job id, hash of the idempotency key         (run id, digest of the payload)
    job_index    job id, status, run id                      empty; moved when a run's status changes
    job_seen     job id                                      empty: which jobs have runs
    job_meta     "schema", "pulse"

How it works:

- A run has one row in `job_ready`, `job_later` or `job_claim` until it is over, and each move is one commit that checks
  the version of the run's row. Of two processes that want one run, one commits; the other looks again.
- A claim moves what has become due from `job_later` to `job_ready`, takes over claims that are expired or whose holder
  is dead, and then takes the first ready runs.
- The row `pulse` is rewritten by every commit that makes a run claimable earlier than anybody could know: enqueueing,
  retrying, releasing. A store that found nothing remembers the version of that row and the moment at which something
  may become due; until one of them is over, a further claim is one read.
- Death is known before a lease is over where there is a `Presence`: on one host, by locks that the kernel frees. All
  who share a store then show themselves in the same way, for who is not seen is dead.

What we dislike about it: nothing removes runs that are over, and their idempotency keys with them.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Final, NamedTuple, Protocol

import msgspec

from sagaloom.errors import (
    BackendUnavailable,
    ConfigurationError,
    Fenced,
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
    Failed,
    JobClaim,
    JobRun,
    JobRunStatus,
    Released,
    Retried,
    Settlement,
    Succeeded,
)
from sagaloom.ports.keyvalue import Check, Committed, Conflicted, Entry, Key, KeyValue
from sagaloom.stores.job_rows import (
    ClaimRow,
    DedupeRow,
    canonical,
    decode_claim,
    decode_dedupe,
    decode_later,
    decode_run,
    dedupe_key,
    index_key,
    later_row,
    moment_of,
    number_at,
    ready_key,
    run_key,
    text_at,
)
from sagaloom.stores.rows import decoded, encode, micros

__all__ = ["SCHEMA", "KvJobRunStore", "Presence"]

SCHEMA: Final = 1

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
            done = await self._kv.commit(inserts=inserts, puts=puts)
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
        if run.due_at <= run.created_at:
            return ready_key(run.job_id, run.priority, micros(run.due_at), run.run_id), b""
        return later_row(run)

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

        def move(row: Entry | None, was: JobRunStatus) -> JobRun | None:
            run = decoded(self._kv, row, decode_run) if row is not None else None
            if row is None or run is None or run.status != was:
                return None
            claimed = msgspec.structs.replace(
                run, status="running", holder=holder, epoch=run.epoch + 1, attempt=run.attempt + 1, started_at=now
            )
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
        done = await self._kv.commit(checks=checks, inserts=inserts, puts=puts, deletes=deletes)
        return None if isinstance(done, Conflicted) else tuple(runs)

    # -- holding --------------------------------------------------------------------------------------------------

    async def renew(self, claims: Sequence[JobClaim], *, until: datetime) -> list[JobClaim]:
        await self.open()
        for _ in range(_ROUNDS_MAX):
            rows = await self._kv.get_many([("job_claim", claim.run_id) for claim in claims])
            held = [
                (claim, row)
                for claim, row in zip(claims, rows, strict=True)
                if row is not None and self._is_held(claim, row)
            ]
            if held:
                done = await self._kv.commit(
                    checks=[Check(row.key, row.versionstamp) for _, row in held],
                    puts=[(row.key, encode(ClaimRow(claim.holder, claim.epoch, micros(until)))) for claim, row in held],
                )
                if isinstance(done, Conflicted):
                    continue
            valid = {claim for claim, _ in held}
            return [claim for claim in claims if claim not in valid]
        raise self._too_many_rounds("renewing")

    async def settle(self, claim: JobClaim, settlement: Settlement) -> JobRun:
        await self.open()
        for _ in range(_ROUNDS_MAX):
            run_row, claim_row = await self._kv.get_many([run_key(claim.run_id), ("job_claim", claim.run_id)])
            if run_row is None or claim_row is None or not self._is_held(claim, claim_row):
                raise self._fenced(claim, run_row, claim_row)
            before = decoded(self._kv, run_row, decode_run)
            after = _settled(before, settlement)
            puts = [(run_row.key, encode(after)), (index_key(after), b"")]
            if after.status == "pending":
                puts += [later_row(after), (_PULSE_KEY, b"")]
            done = await self._kv.commit(
                checks=[Check(row.key, row.versionstamp) for row in (run_row, claim_row)],
                deletes=[claim_row.key, index_key(before)],
                puts=puts,
            )
            if isinstance(done, Committed):
                return after
        raise self._too_many_rounds("settling")

    def _is_held(self, claim: JobClaim, row: Entry) -> bool:
        return decoded(self._kv, row, decode_claim)[:2] == (claim.holder, claim.epoch)

    def _fenced(self, claim: JobClaim, run_row: Entry | None, claim_row: Entry | None) -> Fenced:
        if claim_row is not None:
            now = f"{decoded(self._kv, claim_row, decode_claim).holder!r} has it"
        elif run_row is not None:
            now = f"it is {decoded(self._kv, run_row, decode_run).status}"
        else:
            now = "there is no such run"
        return Fenced(
            f"{self.name}: the claim of {claim.holder!r} on run {claim.run_id} (epoch {claim.epoch}) is over, now "
            f"{now}: nothing was written; drop the result"
        )

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


def _settled(run: JobRun, settlement: Settlement) -> JobRun:
    change = msgspec.structs.replace
    match settlement:
        case Succeeded(result, at):
            return change(run, status="succeeded", holder=None, result=result, ended_at=at)
        case Failed(failure):
            return change(run, status="failed", holder=None, failure=failure, ended_at=failure.at)
        case Retried(failure, due_at):
            return change(run, status="pending", holder=None, failure=failure, due_at=due_at)
        case Released():
            return change(run, status="pending", holder=None, attempt=run.attempt - 1)
