"""Runs of an ordinary kind, and short words for what is done to them, for tests of a store."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from sagaloom.ports.jobs import JobEvent, JobFailure, JobReplyTo, JobRun, JobRunStore

__all__ = [
    "ASKS",
    "LEASE",
    "START",
    "Runs",
    "at",
    "claim",
    "failure",
    "happened",
    "ids",
]

START = datetime(2026, 1, 1, 12, tzinfo=UTC)
LEASE = timedelta(seconds=6)


def at(seconds: float) -> datetime:
    """The moment that many seconds after the start of the test."""
    return START + timedelta(seconds=seconds)


def failure(attempt: int = 1, *, seconds: float = 1) -> JobFailure:
    return JobFailure("JOB_HANDLER_FAILED", "OSError: no", attempt, at(seconds), "Traceback ...")


class Runs:
    """Makes runs whose ids grow."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)

    def make(self, job_id: str = "mail", **fields: Any) -> JobRun:
        run_id = f"{next(self._numbers):032x}"
        run = JobRun(run_id=run_id, job_id=job_id, payload=b'{"n":1}', created_at=START, due_at=START)
        return msgspec.structs.replace(run, **fields)


async def claim(
    store: JobRunStore, holder: str = "w1", *job_ids: str, now: float = 0, limit: int = 10
) -> tuple[JobRun, ...]:
    claimed = await store.claim(holder, job_ids or ("mail",), now=at(now), until=at(now) + LEASE, limit=limit)
    return claimed.runs


ASKS = JobReplyTo("signup", "s-1", 1, "e" * 32, 3)


async def happened(store: JobRunStore, after: int = 0) -> list[JobEvent]:
    return await store.events(after=after)


def ids(runs: Any) -> list[str]:
    return [run.run_id for run in runs]
