"""One process that serves jobs: their store, their runtime and the HTTP API, from start to a clean end.

It starts and ends as a saga service does (`sagaloom.cli.server`): what is not finished in time after the first signal
is given back, and goes on at the next start.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from sagaloom.cli.server import address_of, serving, stop_signals
from sagaloom.process import calm_gc
from sagaloom.process import run as run_process
from sagaloom.settings import DoorSettings, StorePlace
from sagaloom.workers.handlers import JobDefinition
from sagaloom.workers.registry import ModuleTrouble

__all__ = ["JobsPlan", "run"]

_DRAIN_SECONDS: Final = 1.2


@dataclass(frozen=True, kw_only=True)
class JobsPlan:
    """Everything that a process that serves jobs needs to know. `announce` is called once it answers."""

    settings: DoorSettings
    listener: socket.socket
    jobs: Sequence[JobDefinition[Any]]
    place: StorePlace
    concurrency: int
    processes: int | None = None
    problems: Sequence[ModuleTrouble] = ()
    announce: Callable[[str], None]


def run(plan: JobsPlan) -> None:
    """Serves until SIGTERM or SIGINT. Raises what kept it from starting, or ended it."""
    run_process(_serve(plan))


async def _serve(plan: JobsPlan) -> None:
    from sagaloom.workers import JobOptions, create_jobs_app, start_jobs

    async with contextlib.AsyncExitStack() as stack:
        stopping = stack.enter_context(stop_signals())
        options = JobOptions(concurrency=plan.concurrency, drain_seconds=_DRAIN_SECONDS)
        if plan.processes is not None:
            options = replace(options, processes=plan.processes)
        runtime = await stack.enter_async_context(
            start_jobs(
                plan.jobs,
                path=plan.place.kv_path,
                url=plan.place.url,
                options=options,
                token=plan.settings.bearer,
            )
        )
        app = create_jobs_app(
            runtime,
            token=plan.settings.bearer,
            requests_per_second=plan.settings.requests_per_second,
            problems=plan.problems,
        )
        api = await stack.enter_async_context(serving(app, plan.listener))
        # Those who watch would stay for ever, and the server waits for them.
        stack.callback(runtime.feed.close)
        calm_gc()
        if not stopping.is_set():
            plan.announce(address_of(plan.listener))
        signalled = asyncio.create_task(stopping.wait())
        await asyncio.wait([signalled, api], return_when=asyncio.FIRST_COMPLETED)
        if not signalled.done():
            signalled.cancel()
            raise RuntimeError("the HTTP server ended by itself")
