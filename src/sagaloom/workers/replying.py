"""Telling sagas of the end of jobs they asked for.

    run over ──(same commit)──▶ reply due ──▶ POST .../instances/{saga}/{key}/replies ──▶ delivered
                                   ▲  └─ not now ── due again, later and later
                                   │  └─ never ──── refused: shown with the run, sent again by a redrive
                                   └─ its process died: another finds it due

A reply is a message to the very run of the saga that sent the effect: `<job id>:completed`, `:failed` or `:cancelled`.
Its id is made of the run and the epoch in which that ended, so however often it is sent, it changes the saga once. What
the saga does not handle it ignores, and says so; that is an answer like any other.

Whoever settles a run delivers its reply at once; only when that did not work is it looked for in the store.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, Protocol
from urllib.parse import quote

import msgspec

from sagaloom.clock import Clock
from sagaloom.definitions import RetryPolicy
from sagaloom.engine.retrying import backoff
from sagaloom.errors import ConfigurationError, DeliveryFailed, SagasError
from sagaloom.ids import derived_id
from sagaloom.messages import SagaMessage
from sagaloom.outbound import checked_base_url, discovered_base_url
from sagaloom.ports.jobs import JobReply, JobReplyTo, JobRun, JobRunStore
from sagaloom.targets.posting import Poster
from sagaloom.workers.roles import Role

if TYPE_CHECKING:
    import httpx2

__all__ = ["HttpReplies", "Replier", "RepliesPort", "reply_of"]

_log = logging.getLogger("sagaloom.jobs")

_SERVICE_NAME: Final = "sagas-api"
_DEV_URL: Final = "http://127.0.0.1:8092"
_URL_VARIABLES: Final = ("SAGAS_API_URL", "NETSCRIPT_SAGAS_URL")
_WHAT: Final = "the sagas API"

_PACE: Final = RetryPolicy(initial_interval_ms=500, maximum_interval_ms=60_000)
_AT_ONCE_MAX: Final = 16
_LEASE: Final = timedelta(seconds=60)
_WORDS: Final = {"succeeded": "completed", "failed": "failed", "cancelled": "cancelled"}


class RepliesPort(Protocol):
    """Hands a message to one run of a saga, and returns once it is durable there. Raises `DeliveryFailed`."""

    async def reply(self, to: JobReplyTo, message: SagaMessage[Any]) -> None: ...

    async def close(self) -> None: ...


def reply_of(run: JobRun) -> SagaMessage[Any]:
    """What a saga hears of a run that is over."""
    payload: dict[str, object] = {"jobId": run.job_id, "runId": run.run_id, "attempts": run.attempt}
    if run.status == "succeeded":
        payload["result"] = msgspec.Raw(run.result or b"null")
    elif run.status == "cancelled":
        payload["reason"] = run.cancel_reason
    elif run.failure is not None:
        payload["reason"] = run.failure.message
        payload["code"] = run.failure.code
        if run.failure.data is not None:
            payload["data"] = msgspec.Raw(run.failure.data)
    return SagaMessage(
        f"{run.job_id}:{_WORDS[run.status]}",
        msgspec.Raw(msgspec.json.encode(payload)),
        occurred_at=run.ended_at,
        id=derived_id("job", run.run_id, run.epoch),
        traceparent=run.traceparent,
        tracestate=run.tracestate,
    )


class HttpReplies:
    """Replies over HTTP, to the sagas API: at `base_url`, else where the environment says, as for a publisher. `token`
    is the bearer token that it asks for."""

    def __init__(
        self,
        base_url: str | None = None,
        *,
        token: str | None = None,
        read_env: Callable[[str], str | None] = os.environ.get,
        timeout_seconds: float = 20.0,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        if base_url is not None:
            base_url = checked_base_url(base_url, "base_url", what=_WHAT, example=_DEV_URL)
        self._base_url = base_url
        self._token = token
        self._read_env = read_env
        self._poster = Poster(timeout_seconds=timeout_seconds, transport=transport)

    async def reply(self, to: JobReplyTo, message: SagaMessage[Any]) -> None:
        body = {
            "type": message.type,
            "payload": message.payload,
            "id": message.id,
            "occurredAt": message.occurred_at,
            "causationId": to.effect_key,
            "hops": to.hops,
            "traceparent": message.traceparent,
            "tracestate": message.tracestate,
        }
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        place = f"{quote(to.saga_id, safe='')}/{quote(to.key, safe='')}"
        await self._poster.post(
            f"{self._address().rstrip('/')}/api/v1/sagas/instances/{place}/replies?run={to.run}",
            msgspec.json.encode({name: value for name, value in body.items() if value is not None}),
            headers,
            receiver=_WHAT,
            variable=_URL_VARIABLES[0],
        )

    def _address(self) -> str:
        if self._base_url is not None:
            return self._base_url
        try:
            return discovered_base_url(
                _SERVICE_NAME, what=_WHAT, variables=_URL_VARIABLES, dev_url=_DEV_URL, read_env=self._read_env
            )
        except ConfigurationError as error:
            # It may be set by the time this process is started again; the saga waits for it.
            raise DeliveryFailed(error.message) from error

    async def close(self) -> None:
        await self._poster.close()


class Replier(Role):
    """Delivers replies: those of runs that are settled here, and those that are found due."""

    name = "replier"

    def __init__(self, store: JobRunStore, replies: RepliesPort, clock: Clock, *, poll_seconds: float) -> None:
        super().__init__()
        self._store = store
        self._replies = replies
        self._clock = clock
        self._poll = timedelta(seconds=max(poll_seconds, 1.0))
        self._places = asyncio.Semaphore(_AT_ONCE_MAX)
        self._under_way: set[asyncio.Task[None]] = set()
        self._silence: str | None = None

    def deliver(self, run: JobRun) -> None:
        """Delivers the reply of a run that has just been settled here."""
        if run.reply is None or run.reply.state != "due" or self._is_draining:
            return
        task = asyncio.create_task(self._deliver(run), name=f"sagaloom-reply-{run.run_id}")
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def settled(self, seconds: float) -> None:
        """Waits for what is under way, for a while. The rest is found due at the next start."""
        if self._under_way:
            _, late = await asyncio.wait(self._under_way, timeout=seconds)
            for task in late:
                task.cancel()
        await self._replies.close()

    async def _turn(self) -> None:
        now = self._clock.now()
        for run in await self._store.claim_replies(now=now, until=now + _LEASE, limit=_AT_ONCE_MAX):
            self.deliver(run)

    async def _pause(self) -> None:
        await self._clock.sleep_until(self._clock.now() + self._poll)

    async def _deliver(self, run: JobRun) -> None:
        to, reply = run.reply_to, run.reply
        assert to is not None
        assert reply is not None
        attempt = reply.attempt + 1
        async with self._places:
            try:
                await self._replies.reply(to, reply_of(run))
                answer = JobReply("delivered", self._clock.now(), attempt)
                self._silence = None
            except SagasError as error:
                answer = self._postponed(run, to, attempt, error)
            try:
                await self._store.settle_reply(run, answer)
            except SagasError as error:
                # It is found due again, and the saga knows its id.
                _log.warning("job %s: the reply of run %s is not settled: %s", run.job_id, run.run_id, error.message)

    def _postponed(self, run: JobRun, to: JobReplyTo, attempt: int, error: SagasError) -> JobReply:
        now = self._clock.now()
        if not error.retryable:
            _log.error(
                "job %s: saga %s does not take the reply of run %s, 'sagaloom jobs redrive %s' sends it again: %s",
                *(run.job_id, to.saga_id, run.run_id, run.run_id, error.message),
            )
            return JobReply("refused", now, attempt, error.message)
        if error.message != self._silence:
            _log.warning("job %s: the reply of run %s has to wait: %s", run.job_id, run.run_id, error.message)
            self._silence = error.message
        return JobReply("due", now + backoff(_PACE, attempt=attempt, message_id=run.run_id), attempt, error.message)
