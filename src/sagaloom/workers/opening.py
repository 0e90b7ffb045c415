"""Putting a job runtime together: its store, and who closes it."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager
from typing import Any

from sagaloom.clock import Clock
from sagaloom.composition import open_saga_runtime_kv, sql_database
from sagaloom.ports.jobs import JobRunStore
from sagaloom.workers.handlers import JobDefinition
from sagaloom.workers.options import JobOptions
from sagaloom.workers.replying import HttpReplies, RepliesPort
from sagaloom.workers.runtime import JobRuntime

__all__ = ["open_job_store", "start_jobs"]


async def open_job_store(
    path: str | os.PathLike[str] | None = None, *, url: str | None = None, lease_seconds: float | None = None
) -> JobRunStore:
    """The store of job runs beside the sagas: in the database at `url`; else in the file at `path`, else at
    `NETSCRIPT_SAGA_KV_PATH`, else at `.sagaloom/sagas.db`. A saga service and several job processes may have it open at
    once."""
    from sagaloom.kv.presence import FilePresence
    from sagaloom.stores.kv_jobs import KvJobRunStore

    if url is not None:
        return await _open_in_database(url)
    kv = await open_saga_runtime_kv(path)
    seconds = lease_seconds if lease_seconds is not None else JobOptions().lease_seconds
    # A name of their own: who runs jobs takes no share of the sagas.
    presence = FilePresence(f"{kv.name.removeprefix('kv:')}.jobs", lease_seconds=seconds)
    store = KvJobRunStore(kv, presence=presence)
    try:
        await store.open()
    except BaseException:
        await store.close()
        raise
    return store


async def _open_in_database(url: str) -> JobRunStore:
    from sagaloom.kv.postgres import PostgresKeyValue
    from sagaloom.stores.kv_jobs import KvJobRunStore

    rows = PostgresKeyValue(sql_database(url=url))
    try:
        await rows.open()
        # Processes of several hosts share it, so the dead are told by their leases alone.
        store = KvJobRunStore(rows)
        await store.open()
    except BaseException:
        await rows.close()
        raise
    return store


@asynccontextmanager
async def start_jobs(
    jobs: Iterable[JobDefinition[Any]],
    *,
    path: str | os.PathLike[str] | None = None,
    url: str | None = None,
    store: JobRunStore | None = None,
    clock: Clock | None = None,
    options: JobOptions | None = None,
    sagas: RepliesPort | None = None,
    token: str | None = None,
) -> AsyncGenerator[JobRuntime]:
    """A running job runtime, over `store` or over what `open_job_store` opens, which is closed in the end.

    `sagas` carries the ends of runs to the sagas that asked for them; by default they go over HTTP to the sagas API
    that the environment names, with `token` as the bearer token.

    async with start_jobs([create_user_settings]) as runtime:
        await runtime.trigger("create-user-settings", {"userId": "u-1"})
    """
    chosen = options if options is not None else JobOptions()
    opened = store if store is not None else await open_job_store(path, url=url, lease_seconds=chosen.lease_seconds)
    try:
        replies = sagas if sagas is not None else HttpReplies(token=token)
        async with JobRuntime(opened, jobs=jobs, clock=clock, options=chosen, replies=replies) as runtime:
            yield runtime
    finally:
        if store is None:
            await opened.close()
