"""`GET /runs/subscribe`: what happens to runs, as server-sent events.

    retry: 2000
    event: heartbeat              first of all, and again whenever nothing was sent for a while
    id: 41                        where the reader is, also when the filter left out what came before
    data: {"type":"heartbeat","timestamp":"..."}

    event: run:succeeded
    id: 42                        counts by one over all runs of the store
    data: {"type":"run:succeeded","timestamp":"...","jobId":"send-invoice","runId":"...","attempt":1}

A reader who was cut off comes back with the last id it has seen, as `Last-Event-ID` or `?after=`, and misses nothing
while that is kept; an id that leads nowhere gets one `reset`, and then everything that is kept.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Annotated, Final, Literal

import msgspec
from fastapi import Header, Query, Response
from msgspec import UNSET, Meta, UnsetType
from pydantic import Field

from sagaloom.errors import SagasError
from sagaloom.ports.jobs import JOB_EVENT_TYPES, JobEvent
from sagaloom.web.bodies import invalid
from sagaloom.web.limits import StreamLimit
from sagaloom.web.routes import RouteTable, Text, Texts, WebQuery, wire_time
from sagaloom.web.sse import After, EventStreams, EventTypes, event_frame
from sagaloom.workers.feed import JobFeed, JobWatch

__all__ = ["RunEventView", "RunsSubscribeQuery", "add_run_streaming"]

_PATH: Final = "/api/v1/workers/runs/subscribe"
_RETRY_MS: Final = 2_000
_ALWAYS_TOLD: Final = frozenset(("heartbeat", "reset"))
_encode = msgspec.json.Encoder().encode


class RunEventView(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The data of one event. A `heartbeat` and a `reset` are about no run. `detail` says why a run failed, waits for
    another attempt or was cancelled, and what a progress is about."""

    type: Literal[
        "run:pending",
        "run:running",
        "run:progress",
        "run:succeeded",
        "run:failed",
        "run:cancelled",
        "heartbeat",
        "reset",
    ]
    timestamp: Annotated[str, Meta(extra_json_schema={"format": "date-time"})]
    job_id: str | UnsetType = UNSET
    run_id: str | UnsetType = UNSET
    attempt: int | UnsetType = UNSET
    correlation_id: str | UnsetType = UNSET
    detail: str | UnsetType = UNSET
    fraction: float | UnsetType = UNSET


def _view_of(event: JobEvent) -> RunEventView:
    return RunEventView(
        type=event.type,
        timestamp=wire_time(event.at),
        job_id=event.job_id,
        run_id=event.run_id,
        attempt=event.attempt,
        correlation_id=UNSET if event.correlation_id is None else event.correlation_id,
        detail=UNSET if event.detail is None else event.detail,
        fraction=UNSET if event.fraction is None else event.fraction,
    )


class RunsSubscribeQuery(WebQuery):
    after: After = None
    job_id: Texts = Field(default_factory=list, description="May be repeated, as may `runId` and `type`.")
    run_id: Texts = Field(default_factory=list)
    correlation_id: Text = None
    type: EventTypes = Field(default_factory=list)

    def wants(self, event: JobEvent) -> bool:
        """Whether the reader asked for such events."""
        return (
            (not self.type or event.type in self.type)
            and (not self.job_id or event.job_id in self.job_id)
            and (not self.run_id or event.run_id in self.run_id)
            and (self.correlation_id is None or event.correlation_id == self.correlation_id)
        )


def add_run_streaming(
    table: RouteTable, feed: JobFeed, *, limit: StreamLimit, heartbeat_seconds: float, write_seconds_max: float = 30.0
) -> None:
    """Serves `feed`: to as many as `limit` lets in, with a heartbeat after `heartbeat_seconds` without an event."""
    streams = EventStreams(limit, write_seconds_max=write_seconds_max)

    @table.add("GET", _PATH, answer=RunEventView, tag="runs", errors=(422, 429, 503), media_type="text/event-stream")
    async def _subscribe_to_runs(
        query: Annotated[RunsSubscribeQuery, Query()],
        last_event_id: Annotated[str | None, Header(alias="Last-Event-ID")] = None,
    ) -> Response:
        """What happens to runs, as it happens, as server-sent events: without a gap and without a repeat for a reader
        who comes back with the last id it has seen."""
        known = (*JOB_EVENT_TYPES, *sorted(_ALWAYS_TOLD))
        for name in query.type:
            if name not in known:
                raise invalid(f"type: {name!r:.80} is no event of runs: there are {', '.join(known)}", "type")
        watch = await feed.watch(last_event_id or query.after)
        return streams.respond(_RunSource(watch, query, heartbeat_seconds))


class _RunSource:
    """What one reader gets."""

    def __init__(self, watch: JobWatch, query: RunsSubscribeQuery, heartbeat_seconds: float) -> None:
        self._watch = watch
        self._query = query
        self._heartbeat_seconds = heartbeat_seconds
        self._silent_until: float | None = None
        self._is_over = False

    async def next_chunk(self) -> bytes | None:
        loop = asyncio.get_running_loop()
        chunk = self._frame("heartbeat", retry_ms=_RETRY_MS) if self._silent_until is None else b""
        while not chunk and not self._is_over:
            try:
                async with asyncio.timeout_at(self._silent_until):
                    page = await self._watch.next_page()
            except TimeoutError:
                chunk = self._frame("heartbeat")
            except SagasError as error:
                # The answer has begun; this is the only way to say it. The client comes back, and hears more.
                self._is_over = True
                chunk = f": {error.code}: {' '.join(error.message.splitlines())}\n\n".encode()
            else:
                if page is None:
                    return None
                chunk = self._frame("reset") if page.is_reset else b"".join(map(self._of, page.events))
        self._silent_until = loop.time() + self._heartbeat_seconds
        return chunk or None

    def _of(self, event: JobEvent) -> bytes:
        if not self._query.wants(event):
            return b""
        return event_frame(event.type, _encode(_view_of(event)), id=str(event.number))

    def _frame(self, kind: Literal["heartbeat", "reset"], *, retry_ms: int | None = None) -> bytes:
        view = RunEventView(type=kind, timestamp=wire_time(datetime.now(UTC)))
        return event_frame(kind, _encode(view), id=str(self._watch.place), retry_ms=retry_ms)

    def close(self) -> None:
        self._watch.close()
