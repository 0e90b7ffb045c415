"""Where job runs live until they are done: a durable queue with a memory.

A *run* is one triggered execution of a *job*. It waits until it is due, is claimed, and is settled:

    pending ──claim──▶ running ──settle──▶ succeeded
       ▲                  │  └───────────▶ failed
       └──retry, release──┘

The rules, which `sagaloom.testing.contracts.jobs` checks:

1. When `enqueue` returns, the run is on stable storage. A run with an idempotency key is enqueued once per job: the
   same key with the same payload (as a JSON value) answers with the first run, with another one it is refused.
2. `claim` hands a due run to one holder, under a lease: until `until`, or until it is renewed no more. Each claim of a
   run has a greater *epoch* than the one before. A run whose lease is over, or whose holder is known to be gone, is
   handed out again.
3. `settle` and `renew` are believed only from the newest claim of a run. A stale one changes nothing: `settle` raises
   `Fenced`, `renew` names it as lost.
4. Of due runs, a higher priority goes first, then what was due first.
5. `attempt` counts the claims of a run and survives every crash. A run that was released got back the attempt: its
   process ended in good order before the work did.

What we dislike about it: a store cannot know whether a process that stopped renewing has also stopped working, so two
processes can work on one run at the same time. The second one's result counts; what both did outside must be harmless
to repeat. That is why a run has an id that stays the same over all attempts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Final, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import msgspec

__all__ = [
    "JOB_RUN_STATUSES",
    "PRIORITIES",
    "PRIORITY_DEFAULT",
    "PRIORITY_MAX",
    "Claimed",
    "Enqueued",
    "Failed",
    "JobClaim",
    "JobFailure",
    "JobPriority",
    "JobRun",
    "JobRunStatus",
    "JobRunStore",
    "Released",
    "Retried",
    "Settlement",
    "Succeeded",
]

JobRunStatus = Literal["pending", "running", "succeeded", "failed"]
JOB_RUN_STATUSES: Final[tuple[JobRunStatus, ...]] = ("pending", "running", "succeeded", "failed")

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


Settlement: TypeAlias = Succeeded | Failed | Retried | Released


class Enqueued(NamedTuple):
    """The run that is stored now. `duplicate`: it was before, under the same idempotency key."""

    run: JobRun
    duplicate: bool


class Claimed(NamedTuple):
    """Runs that are now `running` under the caller's name, and the earliest moment, if any is known, at which there may
    be more without anybody enqueueing."""

    runs: tuple[JobRun, ...]
    next_at: datetime | None


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

    async def renew(self, claims: Sequence[JobClaim], *, until: datetime) -> list[JobClaim]:
        """Prolongs leases; returns the claims that are no longer valid."""
        ...

    async def settle(self, claim: JobClaim, settlement: Settlement) -> JobRun:
        """Ends a claim, and returns the run as it is now. Raises `Fenced` and changes nothing when it is stale."""
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
