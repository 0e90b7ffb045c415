"""The live feed as server-sent events: `GET /subscribe` of the API, and what a host serves under a path of its own.

    retry: 2000
    event: heartbeat              first of all, and again whenever nothing was sent for a while
    id: 4711170000000041          where the reader is, also when the filter left out what came before
    data: {"type":"heartbeat","timestamp":"...","data":{"connected":true,"storeId":"..."}}

    event: saga:completed
    id: 4711170000000042          the cursor of the event: it counts by one
    data: {"type":"saga:completed","timestamp":"...","sagaName":"order","correlationId":"o-1",...}

    event: reset                  a cursor that leads nowhere: once, and then everything that is kept
    id: 4711170000000000
    data: {"type":"reset","timestamp":"...","data":{"reason":"expired","oldestId":"4711170000000001",...}}

A reader who was cut off comes back with the last id it has seen, as `Last-Event-ID` or `?after=`, and misses nothing.
What `runtime.feed` says of cursors, filters and retention holds here; `web.sse` says how a stream ends.

The frames of events are made once for all readers, who mostly come past the same events at the same time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Final, Protocol

import msgspec
from fastapi import Header, Query, Response
from msgspec import UNSET, Meta, UnsetType
from pydantic import Field

from sagaloom.definitions import SagaInstanceStatus
from sagaloom.engine.records import FeedEvent
from sagaloom.errors import SagasError
from sagaloom.ids import instance_id
from sagaloom.runtime.feed import FEED_EVENT_TYPES, FeedPage, FeedReset, FeedWatch, cursor_of
from sagaloom.web.bodies import invalid, one_of_two
from sagaloom.web.limits import StreamLimit
from sagaloom.web.routes import RouteTable, Text, Texts, WebQuery, wire_time
from sagaloom.web.sse import After, ChunkSource, EventStreams, EventTypes, event_frame

if TYPE_CHECKING:
    from sagaloom.runtime import SagaRuntime

__all__ = ["FeedEventView", "FeedFrames", "OlderEvents", "SubscribeQuery", "add_streaming", "feed_source"]

_Time = Annotated[str, Meta(extra_json_schema={"format": "date-time"})]
_RETRY_MS: Final = 2_000
_FRAMES_KEPT: Final = 4_096
_ALWAYS_TOLD: Final = frozenset(("heartbeat", "reset"))
_encode = msgspec.json.Encoder().encode


class FeedEventView(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The data of one event. A `heartbeat` and a `reset` are about no saga. `data` has what the type has to add:
    `detail` (a reason, mostly), `target` and `effectKey` of an effect, `connected` and `storeId` of a heartbeat,
    `reason`, `oldestId` and `storeId` of a reset."""

    type: str
    timestamp: _Time
    saga_name: str | UnsetType = UNSET
    saga_id: str | UnsetType = UNSET
    instance_id: str | UnsetType = UNSET
    correlation_id: str | UnsetType = UNSET
    correlation_key: str | UnsetType = UNSET
    run: int | UnsetType = UNSET
    status: SagaInstanceStatus | UnsetType = UNSET
    revision: int | UnsetType = UNSET
    message_type: str | UnsetType = UNSET
    message_id: str | UnsetType = UNSET
    data: Mapping[str, Any] | UnsetType = UNSET


def _view_of(event: FeedEvent) -> FeedEventView:
    data: dict[str, str] = {}
    if event.effect_key is not None:
        data = {"target": event.message_type, "effectKey": event.effect_key}
    if event.detail is not None:
        data["detail"] = event.detail
    return FeedEventView(
        type=event.type,
        timestamp=wire_time(event.at),
        saga_name=event.saga_id,
        saga_id=event.saga_id,
        instance_id=instance_id(event.saga_id, event.key, event.run),
        correlation_id=event.key,
        correlation_key=event.key,
        run=event.run,
        status=event.status if event.status is not None else UNSET,
        revision=event.revision,
        message_type=event.message_type if event.effect_key is None else UNSET,
        message_id=event.message_id,
        data=data or UNSET,
    )


class SubscribeQuery(WebQuery):
    after: After = None
    saga_name: Texts = Field(default_factory=list, description="May be repeated, as may `sagaId` and `type`.")
    saga_id: Texts = Field(default_factory=list, description="Another spelling of `sagaName`.")
    correlation_id: Text = None
    correlation_key: Annotated[Text, Field(description="Another spelling of `correlationId`.")] = None
    topic: Text = None
    type: EventTypes = Field(default_factory=list)
    streaming: Annotated[bool | None, Field(description="Taken for compatibility; this route always streams.")] = None


def add_streaming(
    table: RouteTable,
    runtime: SagaRuntime,
    path: str,
    *,
    limit: StreamLimit,
    heartbeat_seconds: float = 15.0,
    write_seconds_max: float = 30.0,
) -> None:
    """Serves the feed of `runtime` at `path`: to as many as `limit` lets in, with a heartbeat after `heartbeat_seconds`
    without another event. A reader who takes nothing for `write_seconds_max` is dropped."""
    streams = EventStreams(limit, write_seconds_max=write_seconds_max)
    frames = FeedFrames(runtime)

    @table.add(
        "GET",
        path,
        answer=FeedEventView,
        tag="instances",
        errors=(422, 429, 503),
        media_type="text/event-stream",
    )
    async def _subscribe(
        query: Annotated[SubscribeQuery, Query()],
        last_event_id: Annotated[str | None, Header(alias="Last-Event-ID")] = None,
    ) -> Response:
        """What happens to sagas, as it happens, as server-sent events: without a gap and without a repeat for a reader
        who comes back with the last id it has seen."""
        return streams.respond(await feed_source(frames, query, last_event_id, heartbeat_seconds=heartbeat_seconds))


async def feed_source(
    frames: FeedFrames,
    query: SubscribeQuery,
    last_event_id: str | None = None,
    *,
    heartbeat_seconds: float = 15.0,
    older: OlderEvents | None = None,
) -> ChunkSource:
    """What a reader gets who asks for `query`, ready to be streamed. `older` has events that the feed has forgotten,
    for a reader whose cursor is before those that it keeps. Raises `MessageRejected` for what cannot be asked for."""
    after = last_event_id or query.after
    watch = _watch_for(frames.runtime, query, after)
    if older is not None and after is not None:
        number = await older.begins_behind(frames.runtime, after)
        if number is not None:
            return _OlderSource(frames, query, older, number, heartbeat_seconds)
    await watch.begin()
    return _FeedSource(watch, frames, heartbeat_seconds)


def _watch_for(runtime: SagaRuntime, query: SubscribeQuery, after: str | None) -> FeedWatch:
    known = (*FEED_EVENT_TYPES, *sorted(_ALWAYS_TOLD))
    for name in query.type:
        if name not in known:
            raise invalid(f"type: {name!r:.80} is no event of the feed: there are {', '.join(known)}", "type")
    types = [name for name in query.type if name not in _ALWAYS_TOLD]
    choices: list[set[str]] = [set(names) for names in (query.saga_name, query.saga_id) if names]
    if query.topic is not None:
        choices.append({one.id for one in runtime.definitions if one.about.topic == query.topic})
    if query.type and not types:
        choices.append(set())  # Heartbeats were all that was asked for.
    return runtime.watch(
        after=after,
        saga_id=set[str].intersection(*choices) if choices else None,
        key=one_of_two("correlationId", query.correlation_id, "correlationKey", query.correlation_key),
        types=types,
    )


class OlderEvents(Protocol):
    """Somebody who keeps events for longer than the feed does, under the numbers that it gave them."""

    async def begins_behind(self, runtime: SagaRuntime, after: str) -> int | None:
        """The number that the cursor `after` stands for, when events behind it are here and no longer in the feed."""
        ...

    async def page(self, store_id: str, after: int) -> Sequence[tuple[int, FeedEvent]]:
        """The next events behind number `after`, without a gap to it; nothing when they are not here."""
        ...


class _OlderSource:
    """What one reader gets who begins before the feed does: first what others have kept, and then the feed."""

    def __init__(
        self, frames: FeedFrames, query: SubscribeQuery, older: OlderEvents, number: int, heartbeat_seconds: float
    ) -> None:
        self._frames = frames
        self._query = query
        self._older = older
        self._number = number
        self._heartbeat_seconds = heartbeat_seconds
        # Asked for what it wants, never read: the feed is read by one that begins where the older events end.
        self._wants = _watch_for(frames.runtime, query, None).wants
        self._feed: _FeedSource | None = None
        self._is_closed = False

    async def next_chunk(self) -> bytes | None:
        while self._feed is None:
            if self._is_closed:
                return None
            found = await self._older.page(self._frames.store_id, self._number)
            if not found:
                watch = _watch_for(self._frames.runtime, self._query, cursor_of(self._frames.store_id, self._number))
                await watch.begin()
                self._feed = _FeedSource(watch, self._frames, self._heartbeat_seconds)
                if self._is_closed:
                    watch.close()
                break
            self._number = found[-1][0]
            chunk = b"".join([self._frames.of_event(number, event) for number, event in found if self._wants(event)])
            if chunk:
                return chunk
        return await self._feed.next_chunk()

    def close(self) -> None:
        self._is_closed = True
        if self._feed is not None:
            self._feed.close()


class _FeedSource:
    """What one reader gets of the feed."""

    def __init__(self, watch: FeedWatch, frames: FeedFrames, heartbeat_seconds: float) -> None:
        self._watch = watch
        self._frames = frames
        self._heartbeat_seconds = heartbeat_seconds
        self._silent_until: float | None = None
        self._is_over = False

    async def next_chunk(self) -> bytes | None:
        loop = asyncio.get_running_loop()
        chunk: bytes | None = None
        if self._silent_until is None:
            chunk = self._frames.heartbeat(self._watch.cursor, retry_ms=_RETRY_MS)
        while not chunk and not self._is_over:
            try:
                async with asyncio.timeout_at(self._silent_until):
                    page = await self._watch.next_page()
            except TimeoutError:
                chunk = self._frames.heartbeat(self._watch.cursor)
            except SagasError as error:
                # The answer has begun; this is the only way to say it. The client comes back, and hears more.
                self._is_over = True
                chunk = f": {error.code}: {' '.join(error.message.splitlines())}\n\n".encode()
            else:
                if page is None:
                    return None
                chunk = self._frames.of_page(page)
        self._silent_until = loop.time() + self._heartbeat_seconds
        return chunk or None

    def close(self) -> None:
        self._watch.close()


class FeedFrames:
    """Events as they go over the wire, made once for all readers of an application."""

    def __init__(self, runtime: SagaRuntime) -> None:
        self.runtime = runtime
        self._frames: dict[int, bytes] = {}
        self._newest_page: tuple[int, int, bytes] = (0, 0, b"")

    @property
    def store_id(self) -> str:
        return self.runtime.store.store_id

    def of_page(self, page: FeedPage) -> bytes:
        """The events of a page; nothing when the filter has left nothing."""
        if page.reset is not None:
            return self._reset(page.last, page.reset)
        if len(page.events) < page.last - page.first + 1:
            return self._joined(page.events)
        first, last, joined = self._newest_page
        if (first, last) != (page.first, page.last):
            joined = self._joined(page.events)
            self._newest_page = (page.first, page.last, joined)
        return joined

    def of_event(self, number: int, event: FeedEvent) -> bytes:
        return self._frames.get(number) or self._make(number, event)

    def _joined(self, events: Iterable[tuple[int, FeedEvent]]) -> bytes:
        return b"".join([self._frames.get(number) or self._make(number, event) for number, event in events])

    def _make(self, number: int, event: FeedEvent) -> bytes:
        frame = event_frame(event.type, _encode(_view_of(event)), id=cursor_of(self.store_id, number))
        if len(self._frames) >= _FRAMES_KEPT:
            self._frames.clear()
        self._frames[number] = frame
        return frame

    def _reset(self, last: int, reset: FeedReset) -> bytes:
        data = {"reason": reset.reason, "oldestId": reset.oldest, "storeId": self.store_id}
        return self._frame("reset", reset.at, data, id=cursor_of(self.store_id, last))

    def heartbeat(self, cursor: str | None, *, retry_ms: int | None = None) -> bytes:
        data = {"connected": True, "storeId": self.store_id}
        return self._frame("heartbeat", self.runtime.clock.now(), data, id=cursor, retry_ms=retry_ms)

    def _frame(
        self, kind: str, at: datetime, data: Mapping[str, Any], *, id: str | None, retry_ms: int | None = None
    ) -> bytes:
        view = FeedEventView(type=kind, timestamp=wire_time(at), data=data)
        return event_frame(kind, _encode(view), id=id, retry_ms=retry_ms)
