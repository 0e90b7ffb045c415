"""Claiming job runs, and what the holder of a claim does with them.

A run has one row in `job_ready`, `job_later` or `job_claim` until it is over, and each move is one commit that checks
the version of the run's row. Of two processes that want one run, one commits; the other looks again. What a move makes
of a run is in `job_moves`; the event of it is written in the same commit.

    job_later ──due──► job_ready ──claim──► job_claim ──settle──► over
        ▲                  ▲                 │   │  ▲
        │                  └────released─────┤   └──┘ taken over: the claim has expired, or its holder is dead
        └───────────────────tried again──────┘

- A claim moves what has become due from `job_later` to `job_ready`, takes over claims that are expired or whose holder
  is dead, and then takes the first ready runs.
- The row `pulse` is rewritten by every commit that makes a run claimable earlier than anybody could know: enqueueing,
  retrying, releasing. A store that found nothing remembers the version of that row and the moment at which something
  may become due; until one of them is over, a further claim is one read.
- Whoever holds a claim renews it, notes how far the run has come, and settles it. A claim that was taken over since has
  another epoch: renewing says that it is lost, and everything else raises `Fenced`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Final, NamedTuple

from sagaloom.ports.jobs import (
    PRIORITY_MAX,
    Claimed,
    JobClaim,
    JobEvent,
    JobNote,
    JobRun,
    JobRunStatus,
    Released,
    Renewed,
    Settlement,
)
from sagaloom.ports.keyvalue import Check, Committed, Conflicted, Entry, Key, KeyValue
from sagaloom.stores import job_moves
from sagaloom.stores.job_opening import ROUNDS_MAX, OpeningJobs, Presence
from sagaloom.stores.job_rows import (
    PULSE_KEY,
    ClaimRow,
    decode_claim,
    decode_later,
    decode_run,
    index_key,
    later_row,
    moment_of,
    number_at,
    ready_key,
    ready_row,
    reply_row,
    run_key,
    text_at,
)
from sagaloom.stores.rows import decoded, encode, micros

__all__ = ["ClaimingJobs"]

_PAGE: Final = 256
_CLAIMS_MAX: Final = 10_000


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


class ClaimingJobs(OpeningJobs):
    """The part of a `KvJobRunStore` that claims runs, and that holders of claims use."""

    def __init__(self, kv: KeyValue, *, presence: Presence | None = None) -> None:
        super().__init__(kv, presence=presence)
        self._memory: _Memory | None = None

    async def close(self) -> None:
        self._memory = None
        await super().close()

    # -- claiming -----------------------------------------------------------------------------------------------------

    async def claim(
        self, holder: str, job_ids: Collection[str], *, now: datetime, until: datetime, limit: int
    ) -> Claimed:
        await self.open()
        wanted = frozenset(job_ids)
        if limit <= 0 or not wanted:
            return Claimed((), None)
        for _ in range(ROUNDS_MAX):
            # Read before everything else: what is enqueued after it changes it, and is seen by the next look.
            row = await self._kv.get(PULSE_KEY)
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

    # -- holding ------------------------------------------------------------------------------------------------------

    async def renew(self, claims: Sequence[JobClaim], *, until: datetime) -> Renewed:
        await self.open()
        for _ in range(ROUNDS_MAX):
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
        for _ in range(ROUNDS_MAX):
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
        for _ in range(ROUNDS_MAX):
            run_row, claim_row, before = await self._held(claim)
            after = job_moves.settled(before, settlement, note)
            puts = [(run_row.key, encode(after)), (index_key(after), b"")]
            if after.status == "pending":
                # One that was given back is due since before it was claimed.
                puts += [
                    ready_row(after) if isinstance(settlement, Released) else later_row(after),
                    (PULSE_KEY, b""),
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
