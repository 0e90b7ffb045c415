"""Where job runs live until they are done: a durable queue with a memory.

A *run* is one triggered execution of a *job*. It waits until it is due, is claimed, and is settled:

    pending ──claim──▶ running ──settle──▶ succeeded
       ▲ │                │  ├───────────▶ failed ────┐
       │ └──cancel────────┼──┴───────────▶ cancelled ─┤
       └──retry, release──┘                           │
       └──────────────────redrive─────────────────────┘

The rules, which `sagaloom.testing.contracts.jobs` checks:

1. When `enqueue` returns, the run is on stable storage. A run with an idempotency key is enqueued once per job: the
   same key with the same payload (as a JSON value) answers with the first run, with another one it is refused.
2. `claim` hands a due run to one holder, under a lease: until `until`, or until it is renewed no more. Each claim of a
   run has a greater *epoch* than the one before. A run whose lease is over, or whose holder is known to be gone, is
   handed out again.
3. `settle`, `note` and `renew` are believed only from the newest claim of a run. A stale one changes nothing: `settle`
   and `note` raise `Fenced`, `renew` names it as lost.
4. Of due runs, a higher priority goes first, then what was due first.
5. `attempt` counts the claims of a run since it was enqueued or redriven, and survives every crash. A run that was
   released got back the attempt: its process ended in good order before the work did. `history` has every attempt
   that is over, also those that ended with their process.
6. `cancel` ends a run that waits at once, and marks one that is running: its holder hears of it when it renews, or
   whoever claims it next finds the mark, and settles it. A run with the mark is never pending again.
7. Who triggered a run for a saga is told of its end: a run with `reply_to` that is over has a `reply` that is due until
   somebody has said what became of it. Its outcome, its end and the debt of the reply are one commit.
8. Whatever happens to a run is an event, written in the same commit, under a number that grows by one. A reader that
   has seen a number has missed nothing before it.

What we dislike about it: a store cannot know whether a process that stopped renewing has also stopped working, so two
processes can work on one run at the same time. The second one's result counts; what both did outside must be harmless
to repeat. That is why a run has an id that stays the same over all attempts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Final, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import msgspec

from sagaloom.engine.records import ScheduleCursor

__all__ = [
    "ATTEMPTS_KEPT",
    "JOB_EVENT_TYPES",
    "JOB_RUN_STATUSES",
    "LOG_LINES_KEPT",
    "OVER",
    "PRIORITIES",
    "PRIORITY_DEFAULT",
    "PRIORITY_MAX",
    "REPLY_HEADSTART",
    "Cancelled",
    "Claimed",
    "Enqueued",
    "Failed",
    "JobAttempt",
    "JobClaim",
    "JobEvent",
    "JobFailure",
    "JobLogLine",
    "JobNote",
    "JobPriority",
    "JobProgress",
    "JobReply",
    "JobReplyTo",
    "JobRun",
    "JobRunStatus",
    "JobRunStore",
    "Pruned",
    "Released",
    "Renewed",
    "Retried",
    "Settlement",
    "Succeeded",
]

JobRunStatus = Literal["pending", "running", "succeeded", "failed", "cancelled"]
JOB_RUN_STATUSES: Final[tuple[JobRunStatus, ...]] = ("pending", "running", "succeeded", "failed", "cancelled")
OVER: Final = frozenset[JobRunStatus](("succeeded", "failed", "cancelled"))
"""The statuses of a run that is over."""

JobEventType = Literal["run:pending", "run:running", "run:progress", "run:succeeded", "run:failed", "run:cancelled"]
JOB_EVENT_TYPES: Final[tuple[JobEventType, ...]] = (
    "run:pending",
    "run:running",
    "run:progress",
    "run:succeeded",
    "run:failed",
    "run:cancelled",
)

ATTEMPTS_KEPT: Final = 20
"""How many attempts the history of a run holds: the newest ones."""

LOG_LINES_KEPT: Final = 100
"""How many lines of its log a run holds: the newest ones."""

REPLY_HEADSTART: Final = timedelta(seconds=5)
"""For how long a reply is left to the process that has just settled the run. `claim_replies` finds it afterwards."""

JobPriority = Literal["low", "normal", "high", "critical"]

PRIORITY_MAX: Final = 100
PRIORITY_DEFAULT: Final = 50
PRIORITIES: Final[Mapping[str, int]] = {"low": 25, "normal": PRIORITY_DEFAULT, "high": 75, "critical": PRIORITY_MAX}
"""What the words of `JobPriority` stand for."""


class JobClaim(NamedTuple):
    """The right to settle one run: who holds it, and the epoch that the store checks."""

    run_id: str
    holder: str
    epoch: int


class JobFailure(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Why an attempt did not work. `data` is what the handler said beside it, as JSON."""

    code: str
    message: str
    attempt: int
    at: datetime
    traceback: str | None = None
    data: bytes | None = None


class JobAttempt(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An attempt that is over. `lost`: its process ended, or was not heard of any more; `released`: it was given back
    and does not count. `code` and `message` say why it did not work."""

    attempt: int
    started_at: datetime
    ended_at: datetime
    outcome: Literal["succeeded", "failed", "released", "cancelled", "lost"]
    holder: str
    code: str | None = None
    message: str | None = None


class JobProgress(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How far an attempt has come, as its handler says: a part of 1, or words, or both."""

    at: datetime
    fraction: float | None = None
    message: str | None = None


class JobLogLine(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a handler has written down."""

    at: datetime
    level: str
    text: str


class JobNote(msgspec.Struct, frozen=True):
    """What a handler has said since the note before."""

    progress: JobProgress | None = None
    log: tuple[JobLogLine, ...] = ()


class JobReplyTo(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The run of a saga that hears of the end: it has sent the effect `effect_key`, `hops` messages into a cascade."""

    saga_id: str
    key: str
    run: int
    effect_key: str
    hops: int = 0


class JobReply(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What has become of a reply. `refused`: the saga service will never take it, for the reason in `problem`."""

    state: Literal["due", "delivered", "refused"]
    due_at: datetime
    attempt: int = 0
    problem: str | None = None


class JobRun(msgspec.Struct, frozen=True, array_like=True, kw_only=True, gc=False):
    """One run. `payload` and `result` are JSON. `epoch` counts claims, `attempt` those of them that were not given
    back. `failure` is that of the newest failed attempt, and stays when a later one succeeds.

    It is stored as an array: new fields are added at the end, with a default.
    """

    run_id: str
    """Sorts by the time of its making: 32 hex digits."""
    job_id: str
    payload: bytes
    created_at: datetime
    due_at: datetime
    status: JobRunStatus = "pending"
    priority: int = PRIORITY_DEFAULT
    attempt: int = 0
    epoch: int = 0
    holder: str | None = None
    correlation_id: str | None = None
    idempotency_key: str | None = None
    traceparent: str | None = None
    tracestate: str | None = None
    started_at: datetime | None = None
    """When the newest attempt began."""
    ended_at: datetime | None = None
    result: bytes | None = None
    failure: JobFailure | None = None
    history: tuple[JobAttempt, ...] = ()
    """The attempts that are over, oldest first."""
    progress: JobProgress | None = None
    log: tuple[JobLogLine, ...] = ()
    cancelled_at: datetime | None = None
    """When it was asked to end."""
    cancel_reason: str | None = None
    scheduled_for: datetime | None = None
    """The tick of a schedule that this run is."""
    reply_to: JobReplyTo | None = None
    reply: JobReply | None = None

    @property
    def is_over(self) -> bool:
        return self.status in OVER

    @property
    def claim(self) -> JobClaim:
        """The claim under which a running run is held."""
        return JobClaim(self.run_id, self.holder or "", self.epoch)


class Succeeded(msgspec.Struct, frozen=True):
    """The run is done, with `result` as JSON."""

    result: bytes
    at: datetime


class Failed(msgspec.Struct, frozen=True):
    """The run is over: it is not tried again."""

    failure: JobFailure


class Retried(msgspec.Struct, frozen=True):
    """The attempt failed; the next one is due at `due_at`."""

    failure: JobFailure
    due_at: datetime


class Released(msgspec.Struct, frozen=True):
    """The holder gives the run back unfinished; the attempt does not count, and another may begin at once."""

    at: datetime | None = None


class Cancelled(msgspec.Struct, frozen=True):
    """The run is over: it was asked to end, and has."""

    at: datetime


Settlement: TypeAlias = Succeeded | Failed | Retried | Released | Cancelled


class JobEvent(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Something that happened to a run. `number` counts by one over all runs of a store."""

    number: int
    type: JobEventType
    run_id: str
    job_id: str
    attempt: int
    at: datetime
    detail: str | None = None
    """Why it failed or was cancelled; the words of a progress."""
    fraction: float | None = None
    correlation_id: str | None = None


class Enqueued(NamedTuple):
    """The run that is stored now. `duplicate`: it was before, under the same idempotency key."""

    run: JobRun
    duplicate: bool


class Claimed(NamedTuple):
    """Runs that are now `running` under the caller's name, and the earliest moment, if any is known, at which there may
    be more without anybody enqueueing."""

    runs: tuple[JobRun, ...]
    next_at: datetime | None


class Renewed(NamedTuple):
    """`lost` claims are no longer valid; the runs of `cancelled` ones were asked to end."""

    lost: list[JobClaim]
    cancelled: list[JobClaim]


class Pruned(NamedTuple):
    """How many runs were forgotten, and where to go on: None when all that are old enough have been looked at."""

    runs: int
    cursor: str | None


@runtime_checkable
class JobRunStore(Protocol):
    """A durable home for job runs. Every method raises `BackendUnavailable` when the store does not answer in time."""

    @property
    def name(self) -> str:
        """What errors call this store, for example `kv:/data/sagas.db`."""
        ...

    @property
    def problem(self) -> str | None:
        """What is wrong right now, for readiness; None when writes are believed to work."""
        ...

    async def probe(self) -> None:
        """Raises what is wrong when the store cannot commit right now; writes nothing that anybody sees."""
        ...

    async def join(self, holder: str) -> None:
        """Shows `holder`, a name that is used once, to the others who claim: before its first claim."""
        ...

    def stay(self) -> None:
        """Shows that the joined holder still lives. Called every moment or so; touches no table."""
        ...

    async def leave(self) -> None:
        """Shows the holder no more: what it still has claimed may be taken at once. Leaving twice is no error."""
        ...

    async def enqueue(self, run: JobRun) -> Enqueued:
        """Stores a pending run. Raises `IdempotencyKeyReused` when its key is known with another payload."""
        ...

    async def claim(
        self, holder: str, job_ids: Collection[str], *, now: datetime, until: datetime, limit: int
    ) -> Claimed:
        """Takes at most `limit` runs of these jobs for `holder`. Cheap while nothing has changed: made to be called
        twice a second."""
        ...

    async def renew(self, claims: Sequence[JobClaim], *, until: datetime) -> Renewed:
        """Prolongs leases, and tells what the holder has to know of its claims."""
        ...

    async def note(self, claim: JobClaim, note: JobNote) -> None:
        """Writes down what the handler says. Raises `Fenced` and changes nothing when the claim is stale."""
        ...

    async def settle(self, claim: JobClaim, settlement: Settlement, *, note: JobNote | None = None) -> JobRun:
        """Ends a claim, with what the handler said last, and returns the run as it is now. Raises `Fenced` and changes
        nothing when it is stale."""
        ...

    async def cancel(self, run_id: str, *, at: datetime, reason: str | None = None) -> JobRun:
        """Ends a run that waits, and one whose holder is gone; asks one that is being worked on to end. One that is
        over is left as it is, and one that was asked before keeps the first reason. Raises `JobRunNotFound`."""
        ...

    async def redrive(self, run_id: str, *, at: datetime) -> JobRun:
        """Lets a failed or cancelled run begin anew, due at `at`, with a fresh count of attempts and the old history;
        of a run that succeeded it sends a refused reply again. Raises `JobRunNotFound`, and `MessageRejected` (code
        `JOB_RUN_NOT_OVER`) for any other."""
        ...

    async def claim_replies(self, *, now: datetime, until: datetime, limit: int) -> list[JobRun]:
        """Runs whose reply is due, at most `limit`. Until `until` nobody else gets them."""
        ...

    async def settle_reply(self, run: JobRun, reply: JobReply) -> bool:
        """Writes down what became of a reply of `run`. False, and no change, when the run has another epoch or its
        reply is not due any more."""
        ...

    async def backlog(self, *, limit: int) -> int:
        """How many runs are pending, counting no further than `limit`."""
        ...

    async def schedules(self) -> list[ScheduleCursor]:
        """How far the schedule of each job (its `saga_id` is the job's id) has come."""
        ...

    async def put_schedule(self, cursor: ScheduleCursor, *, replaces: ScheduleCursor | None) -> bool:
        """Moves a schedule on. False, and no change, when what is stored is not `replaces`."""
        ...

    async def events(self, *, after: int, limit: int = 256) -> list[JobEvent]:
        """Events with greater numbers, oldest first, without a gap. Cheap when there are none."""
        ...

    async def event_span(self) -> tuple[int, int]:
        """The numbers of the oldest event that is kept and of the newest there ever was; the first is greater by one
        where none is kept."""
        ...

    async def prune_runs(self, *, before: datetime, after: str | None = None, limit: int = 256) -> Pruned:
        """Forgets runs that ended before a moment, and their idempotency keys: looks at `limit`, the oldest first,
        behind the cursor of the round before. A run whose reply is due stays."""
        ...

    async def prune_events(self, *, before: datetime, limit: int = 256) -> int:
        """Forgets events from before a moment, at most `limit`, and returns how many. The newest one stays."""
        ...

    async def get(self, run_id: str) -> JobRun | None: ...

    async def runs(
        self,
        *,
        job_ids: Collection[str] = (),
        statuses: Collection[JobRunStatus] = (),
        cursor: str | None = None,
        limit: int = 50,
    ) -> tuple[list[JobRun], str | None]:
        """Runs, the newest first, and the cursor of the next page. Empty filters mean all."""
        ...

    async def close(self) -> None:
        """Releases what the store has opened. Closing twice is no error."""
        ...
