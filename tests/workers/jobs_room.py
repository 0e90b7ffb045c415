"""A job runtime over a store in memory, on a clock that stands still, and what tests want to know of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Sequence
from datetime import datetime
from typing import Any

from sagaloom.errors import BackendUnavailable
from sagaloom.kv import MemoryKeyValue
from sagaloom.ports.jobs import Claimed, Enqueued, JobClaim, JobNote, JobRun, Renewed, Settlement
from sagaloom.stores.kv_jobs import KvJobRunStore
from sagaloom.telemetry import TelemetryProviders
from sagaloom.testing import ManualClock
from sagaloom.workers import JobDefinition, JobOptions, JobRuntime, RepliesPort
from tests.patience import PATIENCE_SECONDS


class SharedMemory(MemoryKeyValue):
    """Stays open for the others when one of them closes it."""

    async def close(self) -> None:
        return None


class WatchedStore(KvJobRunStore):
    """Tells what was settled, and can be taken away."""

    def __init__(self, kv: MemoryKeyValue) -> None:
        super().__init__(kv)
        self.settled: asyncio.Queue[JobRun] = asyncio.Queue()
        self.renewed: asyncio.Queue[list[JobClaim]] = asyncio.Queue()
        self.tried: asyncio.Queue[str] = asyncio.Queue()
        self.trouble: str | None = None

    async def claim(
        self, holder: str, job_ids: Collection[str], *, now: datetime, until: datetime, limit: int
    ) -> Claimed:
        self._check("claim")
        return await super().claim(holder, job_ids, now=now, until=until, limit=limit)

    async def enqueue(self, run: JobRun) -> Enqueued:
        self._check("enqueue")
        return await super().enqueue(run)

    async def renew(self, claims: Sequence[JobClaim], *, until: datetime) -> Renewed:
        renewed = await super().renew(claims, until=until)
        self.renewed.put_nowait(list(claims))
        return renewed

    async def settle(self, claim: JobClaim, settlement: Settlement, *, note: JobNote | None = None) -> JobRun:
        self._check("settle")
        run = await super().settle(claim, settlement, note=note)
        self.settled.put_nowait(run)
        return run

    def _check(self, what: str) -> None:
        self.tried.put_nowait(what)
        if self.trouble is not None:
            raise BackendUnavailable(self.trouble)


class Room:
    def __init__(self, runtime: JobRuntime, store: WatchedStore, clock: ManualClock) -> None:
        self.runtime = runtime
        self.store = store
        self.clock = clock

    async def settled(self) -> JobRun:
        """The next run that is settled."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await self.store.settled.get()

    async def run(self, job_id: str, payload: object = None, **fields: Any) -> JobRun:
        """Triggers a run, and what became of its first attempt."""
        receipt = await self.runtime.trigger(job_id, payload, **fields)
        settled = await self.settled()
        assert settled.run_id == receipt.run_id
        return settled


@contextlib.asynccontextmanager
async def open_room(
    *jobs: JobDefinition[Any],
    kv: MemoryKeyValue | None = None,
    clock: ManualClock | None = None,
    is_started: bool = True,
    telemetry: TelemetryProviders | None = None,
    replies: RepliesPort | None = None,
    **options: Any,
) -> AsyncIterator[Room]:
    store = WatchedStore(kv if kv is not None else SharedMemory())
    clock = clock if clock is not None else ManualClock()
    runtime = JobRuntime(
        store, jobs=jobs, clock=clock, options=JobOptions(**options), telemetry=telemetry, replies=replies
    )
    if is_started:
        await runtime.start()
    try:
        yield Room(runtime, store, clock)
    finally:
        await runtime.stop()
