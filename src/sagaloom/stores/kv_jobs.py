"""The store of job runs over an ordered key-value store; several processes may share its file with each other, and with
a saga store.

`job_rows` names the rows, `job_opening` opens the store and shows us to the others, and `job_claiming` claims runs and
settles them. Here runs come to be, are steered by operators, are looked at, and are forgotten.

- A run is enqueued once for each idempotency key: the row of the key is inserted with the run, and whoever finds it
  there gets the first run, or is refused for another payload.
- Whatever changes a run checks the version of its row, so of two who change it one looks again.
- The end of a run that a saga waits for is told by a reply, which has a row until the saga has heard of it.
- Runs are forgotten in the order of their ids, which is that of their triggers. A run that waits for years is looked at
  in each round until it is over.
- Commits that are asked for at the same time go together (`job_commits`).

What we dislike about it: the log and the history of a run are in its row, and written anew with each move.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Collection
from datetime import datetime
from typing import Final

import msgspec

from sagaloom.engine.records import ScheduleCursor
from sagaloom.errors import IdempotencyKeyReused, MessageRejected, StoreCorrupt
from sagaloom.ids import content_digest
from sagaloom.ports.jobs import JOB_RUN_STATUSES, Enqueued, JobEvent, JobReply, JobRun, JobRunStatus, Pruned
from sagaloom.ports.keyvalue import Check, Committed, Conflicted, Entry, Key, KeyValue
from sagaloom.stores import job_moves
from sagaloom.stores.job_claiming import ClaimingJobs
from sagaloom.stores.job_opening import ROUNDS_MAX, SCHEMA, Presence
from sagaloom.stores.job_rows import (
    PULSE_KEY,
    ClaimRow,
    DedupeRow,
    canonical,
    decode_claim,
    decode_cursor,
    decode_dedupe,
    decode_event,
    decode_run,
    dedupe_key,
    index_key,
    later_row,
    number_at,
    ready_row,
    reply_row,
    run_key,
    text_at,
)
from sagaloom.stores.rows import decoded, encode, micros

__all__ = ["SCHEMA", "KvJobRunStore", "Presence"]

_JOBS_MAX: Final = 10_000
_RUN_ID: Final = re.compile("[0-9a-f]{32}")


class KvJobRunStore(ClaimingJobs):
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
        super().__init__(kv, presence=presence)
        self._seen: set[str] = set()

    # -- enqueueing -----------------------------------------------------------------------------------------------

    async def enqueue(self, run: JobRun) -> Enqueued:
        await self.open()
        dedupe: tuple[Key, DedupeRow] | None = None
        if run.idempotency_key is not None:
            digest = content_digest(run.job_id, canonical(run.payload))
            dedupe = (dedupe_key(run.job_id, run.idempotency_key), DedupeRow(run.run_id, digest))
        for _ in range(ROUNDS_MAX):
            if dedupe is not None and (row := await self._kv.get(dedupe[0])) is not None:
                return await self._first_of(run, dedupe[1], decoded(self._kv, row, decode_dedupe))
            inserts = [(run_key(run.run_id), encode(run)), (index_key(run), b""), self._waiting_row(run)]
            if dedupe is not None:
                inserts.append((dedupe[0], encode(dedupe[1])))
            puts: list[tuple[Key, bytes]] = [(PULSE_KEY, b"")]
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
        return later_row(run) if run.due_at > run.created_at else ready_row(run)

    # -- operators ------------------------------------------------------------------------------------------------

    async def cancel(self, run_id: str, *, at: datetime, reason: str | None = None) -> JobRun:
        await self.open()
        for _ in range(ROUNDS_MAX):
            run_row, before = await self._found(run_id)
            checks = [Check(run_row.key, run_row.versionstamp)]
            held: tuple[Key, ClaimRow] | None = None
            deletes = [index_key(before), later_row(before)[0], ready_row(before)[0]]
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
        for _ in range(ROUNDS_MAX):
            run_row, before = await self._found(run_id)
            after = job_moves.redriven(before, at=at)
            puts = [(run_row.key, encode(after))]
            deletes: list[Key] = []
            if before.reply is not None and before.reply.state == "due":
                deletes.append(reply_row(before)[0])
            events: list[JobEvent] = []
            if after.status == "pending":
                deletes.append(index_key(before))
                puts += [(index_key(after), b""), ready_row(after), (PULSE_KEY, b"")]
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
        for _ in range(ROUNDS_MAX):
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
        for _ in range(ROUNDS_MAX):
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
