"""Line 11: jobs a second, from trigger to result, and round trips a second of a publisher.

Handlers do nothing, so that what is measured is what a run costs: it is enqueued, claimed and settled, each durable
before the next. The publisher speaks over HTTP to a server of its own, 64 publishes at a time; each is answered when
its message is durable and applied. Both are told beside the commits of the bare loop's store, which is what they wait
for in the end; there is no limit to them.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final, cast

import msgspec

from bench.harness import ROOT, Bench, Finding, quiet_gc
from bench.workload import order_messages
from sagaloom.kv import SqliteKeyValue
from sagaloom.process import run as run_process
from sagaloom.publisher import create_saga_publisher
from sagaloom.stores.kv_jobs import KvJobRunStore
from sagaloom.workers import JobContext, JobOptions, JobResult, JobRuntime, create_success_result, define_job_handler

__all__ = ["run"]

_AT_ONCE: Final = 64


@define_job_handler
async def nothing(ctx: JobContext[dict[str, Any]]) -> JobResult[None]:
    return create_success_result(None)


async def _commits(path: Path, count: int) -> float:
    """Durable commits of one small row a second."""
    rows = await SqliteKeyValue.open(path)
    began = time.perf_counter()
    for number in range(count):
        await rows.commit(puts=[(("bare", number), b"x" * 300)])
    seconds = time.perf_counter() - began
    await rows.close()
    return count / seconds


async def _jobs(path: Path, count: int) -> tuple[float, float]:
    """Triggers a second, and runs worked on a second."""
    store = KvJobRunStore(await SqliteKeyValue.open(path))
    options = JobOptions(concurrency=_AT_ONCE)
    runtime = JobRuntime(store, jobs=[nothing], options=options)
    began = time.perf_counter()
    for _ in range(count // _AT_ONCE):
        await asyncio.gather(*(runtime.trigger("nothing") for _ in range(_AT_ONCE)))
    triggered = time.perf_counter() - began
    with quiet_gc():
        began = time.perf_counter()
        async with runtime:
            while await store.backlog(limit=1) or runtime.health().running:  # noqa: ASYNC110 - it is what is measured
                await asyncio.sleep(0.005)
            worked = time.perf_counter() - began
    await store.close()
    done = count // _AT_ONCE * _AT_ONCE
    return done / triggered, done / worked


async def _publishes(port: int, count: int) -> float:
    publisher = create_saga_publisher(base_url=f"http://127.0.0.1:{port}")
    messages = iter([message for number in range(count // 3) for message in order_messages(f"o-{number:08d}")])

    async def one_after_the_other() -> int:
        done = 0
        for message in messages:
            (await publisher.publish(message)).raise_for_rejected()
            done += 1
        return done

    began = time.perf_counter()
    done = sum(await asyncio.gather(*(one_after_the_other() for _ in range(_AT_ONCE))))
    seconds = time.perf_counter() - began
    await publisher.close()
    return done / seconds


def _served(path: Path, count: int) -> float:
    command = [sys.executable, "-m", "bench.serving", "durable", str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        try:
            said = cast("dict[str, int]", msgspec.json.decode(server.stdout.readline()))
            return run_process(_publishes(said["port"], count))
        finally:
            server.kill()


def run(bench: Bench) -> None:
    count = bench.pick(6_000, 1_500)
    best: dict[str, float] = {}
    for _ in range(bench.rounds):
        with bench.place() as place:
            commits = run_process(_commits(place / "bare.db", count))
            triggered, worked = run_process(_jobs(place / "jobs.db", count))
            published = _served(place / "sagas.db", count)
        found = {"commits": commits, "triggered": triggered, "worked": worked, "published": published}
        best = {name: max(rate, best.get(name, 0.0)) for name, rate in found.items()}
    bare = f"{best['commits']:.0f} bare commits/s"
    for what, name in (
        (f"jobs triggered, {_AT_ONCE} at once", "triggered"),
        (f"jobs worked on, {_AT_ONCE} at once", "worked"),
        (f"publisher round trips, {_AT_ONCE} at once", "published"),
    ):
        rate = best[name]
        bench.found(Finding(line="11", what=what, ours=f"{rate:.0f}/s", baseline=bare, value=rate / best["commits"]))
