"""Jobs that run in processes of a pool, which find them here."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import Any, TypedDict

from sagaloom import RetryPolicy
from sagaloom.workers import JobContext, JobResult, create_failure_result, create_success_result, define_job_handler

Ctx = JobContext[dict[str, Any]]
ONCE = RetryPolicy(maximum_attempts=1)


class Number(TypedDict):
    n: int


@define_job_handler(payload=Number, run_in="process")
def square(ctx: JobContext[Number]) -> JobResult[dict[str, int]]:
    return create_success_result({"square": ctx.payload["n"] ** 2, "pid": os.getpid()})


@define_job_handler(run_in="process")
async def square_async(ctx: Ctx) -> JobResult[int]:
    await asyncio.sleep(0)
    return create_success_result(ctx.payload["n"] ** 2)


@define_job_handler(run_in="process")
def talk(ctx: Ctx) -> JobResult[None]:
    ctx.progress(0.5, "half")
    ctx.log.info("attempt %d of %s", ctx.attempt, ctx.job_id)
    return create_failure_result("no", {"a": [1]})


@define_job_handler(run_in="process", retry=RetryPolicy(maximum_attempts=2, initial_interval_ms=0))
def leave(ctx: Ctx) -> JobResult[str]:
    """Ends its process, in one of several ways; the second attempt works."""
    if ctx.attempt == 1:
        match ctx.payload["how"]:
            case "os._exit":
                os._exit(3)
            case "sys.exit":
                sys.exit(3)
            case "abort":
                os.abort()
            case "interrupt":
                raise KeyboardInterrupt
            case _:
                raise OSError("no")
    return create_success_result("done")


@define_job_handler(run_in="process", timeout="1s", retry=ONCE)
def hang(ctx: Ctx) -> JobResult[None]:
    Path(ctx.payload["file"]).write_text(str(os.getpid()))
    while True:
        time.sleep(60)


@define_job_handler(run_in="process")
def endless(ctx: Ctx) -> JobResult[None]:
    Path(ctx.payload["file"]).write_text(str(os.getpid()))
    while not ctx.payload.get("listens") or not ctx.is_cancelled:
        time.sleep(0.005)
    ctx.raise_if_cancelled()
    return create_success_result(None)


@define_job_handler(run_in="process")
async def endless_async(ctx: Ctx) -> JobResult[None]:
    await asyncio.to_thread(Path(ctx.payload["file"]).write_text, str(os.getpid()))
    await asyncio.sleep(60)
    return create_success_result(None)


@define_job_handler(run_in="process")
def nothing(ctx: Ctx) -> Any:
    return None
