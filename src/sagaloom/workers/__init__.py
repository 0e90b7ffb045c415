"""Background jobs: functions that do one thing in the outside world, durably triggered and tried until they are done.

    from sagaloom.workers import create_success_result, define_job_handler

    @define_job_handler(payload=Welcome)
    async def send_welcome(ctx):
        await post.send(ctx.payload.address, idempotency_key=ctx.idempotency_key)
        return create_success_result({"sent": True})

`sagaloom jobs serve MODULE` runs them behind an HTTP API on port 8091; `start_jobs` runs them inside a program. They
reach sagas as everybody else does, through a publisher. Importing this package loads no web framework.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

from sagaloom.errors import JobCancelled
from sagaloom.ports.jobs import JobRun
from sagaloom.workers.context import JobContext, JobLog
from sagaloom.workers.handlers import (
    JobDefinition,
    JobHandler,
    JobResult,
    JobSchedule,
    create_failure_result,
    create_success_result,
    define_job_handler,
)
from sagaloom.workers.options import JobOptions

if TYPE_CHECKING:
    from sagaloom.workers.app import create_jobs_app
    from sagaloom.workers.opening import open_job_store, start_jobs
    from sagaloom.workers.replying import HttpReplies, RepliesPort
    from sagaloom.workers.runtime import JobRuntime, TriggerReceipt

__all__ = [
    "HttpReplies",
    "JobCancelled",
    "JobContext",
    "JobDefinition",
    "JobHandler",
    "JobLog",
    "JobOptions",
    "JobResult",
    "JobRun",
    "JobRuntime",
    "JobSchedule",
    "RepliesPort",
    "TriggerReceipt",
    "create_failure_result",
    "create_jobs_app",
    "create_success_result",
    "define_job_handler",
    "open_job_store",
    "start_jobs",
]

# Those who only write jobs need neither a store nor a server.
_ELSEWHERE: Final = {
    "HttpReplies": "sagaloom.workers.replying",
    "RepliesPort": "sagaloom.workers.replying",
    "JobRuntime": "sagaloom.workers.runtime",
    "TriggerReceipt": "sagaloom.workers.runtime",
    "create_jobs_app": "sagaloom.workers.app",
    "open_job_store": "sagaloom.workers.opening",
    "start_jobs": "sagaloom.workers.opening",
}


if not TYPE_CHECKING:  # a checker that saw this would accept any name

    def __getattr__(name: str) -> object:
        home = _ELSEWHERE.get(name)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(home), name)
