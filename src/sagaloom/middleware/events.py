"""What happens to sagas, as server-sent events at a path of the host's application.

It is the feed of `GET /subscribe` (`web.feed` says what is sent, and what a cursor is), behind whatever the host puts
in front of it: its sessions, its tokens, its CORS. With a history a reader who was away for longer than the feed
remembers still misses nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from pydantic import ValidationError
from starlette.datastructures import QueryParams
from starlette.types import ASGIApp, Receive, Scope, Send

from sagaloom.errors import ConfigurationError, SagasError
from sagaloom.middleware.history import SagaHistoryWriter
from sagaloom.middleware.requests import RunningSagas, runtime_in
from sagaloom.runtime import SagaRuntime
from sagaloom.web.bodies import invalid
from sagaloom.web.feed import FeedFrames, SubscribeQuery, feed_source
from sagaloom.web.limits import StreamLimit
from sagaloom.web.problems import answer_error, answer_refusal
from sagaloom.web.sse import HEAD_MARK, EventStreams

__all__ = ["create_sse_events_middleware"]

_LISTS: Final = frozenset(("sagaName", "sagaId", "type"))


def create_sse_events_middleware(
    sagas: RunningSagas | None = None,
    *,
    path: str = "/events",
    history: SagaHistoryWriter | None = None,
    heartbeat_seconds: float = 15.0,
    write_seconds_max: float = 30.0,
    streams_max: int = 1_000,
    streams_per_client_max: int | None = None,
) -> Callable[[ASGIApp], ASGIApp]:
    """What wraps an ASGI application so that GET `path` streams what happens to `sagas`: those of a
    `create_saga_middleware` further out, unless given. It takes the parameters of `GET /subscribe`: `sagaName`,
    `correlationId`, `topic`, `type`, `after`, and the header `Last-Event-ID`.

    With a `history` the events are written there too, from the startup of the application on (behind a server without a
    lifespan, from the first request on), and a reader whose cursor the feed has forgotten goes on from there.
    """
    if not path.startswith("/"):
        raise ConfigurationError(f"path={path!r} is no path of an application: begin it with '/'")
    limit = StreamLimit(streams_max, per_client_max=streams_per_client_max or streams_max)
    events = _Events(
        sagas if sagas is None or isinstance(sagas, SagaRuntime) else sagas.runtime,
        EventStreams(limit, write_seconds_max=write_seconds_max),
        history=history,
        heartbeat_seconds=heartbeat_seconds,
    )

    def sse_events_middleware(app: ASGIApp) -> ASGIApp:
        return _EventsMiddleware(app, path, events)

    return sse_events_middleware


class _Events:
    """The streams of one application."""

    def __init__(
        self,
        runtime: SagaRuntime | None,
        streams: EventStreams,
        *,
        history: SagaHistoryWriter | None,
        heartbeat_seconds: float,
    ) -> None:
        self._runtime = runtime
        self._streams = streams
        self._history = history
        self._heartbeat_seconds = heartbeat_seconds
        self._frames: FeedFrames | None = None

    def begin(self, scope: Scope) -> FeedFrames | None:
        """Has the history written, once it is known of what; returns what frames are made by."""
        runtime = self._runtime or runtime_in(scope)
        if runtime is None:
            return None
        if self._frames is None or self._frames.runtime is not runtime:
            self._frames = FeedFrames(runtime)
        if self._history is not None:
            self._history.follow(runtime)
        return self._frames

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, headers = scope["method"], scope["headers"]
        try:
            if method not in ("GET", "HEAD"):
                refused = answer_refusal(
                    405, f"{method} is not allowed here: use GET", headers, headers={"Allow": "GET"}
                )
            else:
                await self._stream(scope, receive, send)
                return
        except SagasError as error:
            refused = answer_error(error, headers)
        status, fields, body = refused
        await send({"type": "http.response.start", "status": status, "headers": fields})
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        frames = self.begin(scope)
        if frames is None:
            raise ConfigurationError(
                "the events middleware has no sagas: hand them to it, or put create_saga_middleware around it"
            )
        last_event_id = dict(scope["headers"]).get(b"last-event-id", b"").decode("latin-1") or None
        source = await feed_source(
            frames,
            _query_of(scope),
            last_event_id,
            heartbeat_seconds=self._heartbeat_seconds,
            older=self._history,
        )
        is_head = scope["method"] == "HEAD"
        await self._streams.respond(source)({**scope, HEAD_MARK: is_head}, receive, send)


class _EventsMiddleware:
    def __init__(self, app: ASGIApp, path: str, events: _Events) -> None:
        self._app = app
        self._path = path
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            self._events.begin(scope)
        elif scope["type"] == "http" and scope["path"].removeprefix(scope.get("root_path", "")) == self._path:
            await self._events.answer(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _query_of(scope: Scope) -> SubscribeQuery:
    given = QueryParams(scope.get("query_string", b""))
    values: dict[str, Any] = {name: given.getlist(name) if name in _LISTS else given[name] for name in given}
    try:
        return SubscribeQuery.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0])
        problem = "is no parameter of this route" if first["type"] == "extra_forbidden" else first["msg"]
        raise invalid(f"{field}: {problem}", field) from None
