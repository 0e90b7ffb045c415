"""What a request finds: the sagas of its application.

    scope["state"]["sagas"]     where the middleware puts a `RequestSagas`, before the application sees the request
    request.state.sagas         how FastAPI, Starlette and Litestar show it
    sagas_of(request)           the same, typed, for whatever has a scope: Django's request too

Sagas that are not open yet (`start_sagas([...])` without `await`) are opened at the startup of the application and
shut down after it, by the lifespan that the server speaks. An application that speaks no lifespan, as Django's, need
not: the middleware answers for it. Behind a server that speaks none, they are opened with the first request.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Any, Final, TypeAlias, TypeGuard, cast

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sagaloom.composition import DurableSagaRuntime, Opening
from sagaloom.engine.records import Instance
from sagaloom.errors import ConfigurationError
from sagaloom.messages import as_message
from sagaloom.presets import StartedSagas
from sagaloom.runtime import PublishReceipt, PublishRejected, SagaRuntime

__all__ = ["RequestSagas", "RunningSagas", "create_saga_middleware", "runtime_in", "sagas_of"]

RunningSagas: TypeAlias = SagaRuntime | StartedSagas | DurableSagaRuntime
"""Sagas that somebody else starts and stops."""

_KEY: Final = "sagas"
_TRACEPARENT: Final = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")


class RequestSagas:
    """The sagas of an application, as one request has them."""

    def __init__(self, runtime: SagaRuntime, headers: Mapping[bytes, bytes]) -> None:
        self.bus: SagaRuntime = runtime
        self._headers = headers

    async def publish(
        self,
        message: object,
        options: Mapping[str, Any] | None = None,
        *,
        wait: float | timedelta | None = None,
        **overrides: Any,
    ) -> PublishReceipt | PublishRejected:
        """Publishes like `SagaRuntime.publish`; a message that is in no trace goes on in that of the request."""
        given = {**(options or {}), **overrides}
        traceparent = self._headers.get(b"traceparent", b"").decode("latin-1")
        if "traceparent" not in given and _TRACEPARENT.fullmatch(traceparent) and not _has_trace(message):
            given["traceparent"] = traceparent
            if tracestate := self._headers.get(b"tracestate", b"").decode("latin-1"):
                given.setdefault("tracestate", tracestate)
        return await self.bus.publish(message, given or None, wait=wait)

    async def get_saga_state(self, saga_id: str, key: str, *, run: int | None = None) -> Any:
        """The state of the newest run of a key, or of run number `run`, as its saga declares it; None without one."""
        instance = await self.get_instance(saga_id, key, run=run)
        if instance is None:
            return None
        definition = self.bus.definitions.get(saga_id)
        if definition is None or definition.version != instance.def_version:
            return msgspec.json.decode(instance.state)
        return definition.state_codec.decode(instance.state)

    async def get_instance(self, saga_id: str, key: str, *, run: int | None = None) -> Instance | None:
        """The newest run of a key, or run number `run`: its status, revision, result and reason too."""
        return await self.bus.get_instance(saga_id, key, run=run)


def create_saga_middleware(sagas: RunningSagas | Opening[StartedSagas]) -> Callable[[ASGIApp], ASGIApp]:
    """What wraps an ASGI application so that its requests find `sagas`: running ones, which stay as they are, or
    `start_sagas([...])`, which is opened and closed with the application."""
    host = _Host(sagas)

    def saga_middleware(app: ASGIApp) -> ASGIApp:
        return _SagaMiddleware(app, host)

    return saga_middleware


def sagas_of(request: object) -> RequestSagas:
    """The sagas that the middleware has given to a request: anything with a `scope`, or the scope itself. Raises
    `ConfigurationError` when there are none."""
    scope = cast("object", request) if isinstance(request, Mapping) else getattr(request, "scope", None)
    found = _state_in(cast("Scope", scope)).get(_KEY) if isinstance(scope, Mapping) else None
    if not isinstance(found, RequestSagas):
        raise ConfigurationError(
            "this request has no sagas: wrap the application in create_saga_middleware(start_sagas([...]))"
        )
    return found


def runtime_in(scope: Scope) -> SagaRuntime | None:
    """The runtime that a `create_saga_middleware` further out has put into a scope."""
    found = _state_in(scope).get(_KEY)
    return found.bus if isinstance(found, RequestSagas) else None


class _Host:
    """Sagas, opened once however many applications they are put around (Litestar has one for each route)."""

    def __init__(self, sagas: RunningSagas | Opening[StartedSagas]) -> None:
        self._opening: Opening[StartedSagas] | None = None
        self._runtime: SagaRuntime | None = None
        self._opened = AsyncExitStack()
        self._lock = asyncio.Lock()
        if isinstance(sagas, Opening):
            self._opening = sagas
        elif _is_running(sagas):
            self._runtime = sagas if isinstance(sagas, SagaRuntime) else sagas.runtime
        else:
            raise ConfigurationError(
                f"create_saga_middleware takes start_sagas([...]) or a running SagaRuntime, got {sagas!r:.80}"
            )

    async def runtime(self) -> SagaRuntime:
        if self._runtime is None:
            async with self._lock:
                if self._runtime is None:
                    assert self._opening is not None
                    self._runtime = (await self._opened.enter_async_context(self._opening)).runtime
        return self._runtime

    async def close(self) -> None:
        """Shuts down what was opened here."""
        if self._opening is not None:
            async with self._lock:
                self._runtime = None
                await self._opened.aclose()


class _SagaMiddleware:
    def __init__(self, app: ASGIApp, host: _Host) -> None:
        self._app = app
        self._host = host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _Lifespan(self._app, self._host, scope, receive, send).run()
            return
        runtime = await self._host.runtime()
        headers = dict(cast("Iterable[tuple[bytes, bytes]]", scope.get("headers") or ()))
        await self._app({**scope, "state": {**_state_in(scope), _KEY: RequestSagas(runtime, headers)}}, receive, send)


class _Lifespan:
    """Startup and shutdown of an application, with the sagas open before the one and until after the other."""

    def __init__(self, app: ASGIApp, host: _Host, scope: Scope, receive: Receive, send: Send) -> None:
        self._app = app
        self._host = host
        self._scope = scope
        self._receive = receive
        self._send = send
        self._startup: Message | None = None
        self._has_answered_startup = False
        self._has_answered_shutdown = False

    async def run(self) -> None:
        self._startup = await self._receive()
        try:
            runtime = await self._host.runtime()
        except Exception as error:  # noqa: BLE001 - whatever it is, the server has to hear of it
            await self._send({"type": "lifespan.startup.failed", "message": f"sagas: {error}"})
            return
        # In place: what the application puts beside it is what the server hands to every request.
        state = cast("dict[str, Any]", self._scope.setdefault("state", {}))
        state[_KEY] = RequestSagas(runtime, {})
        try:
            await self._app(self._scope, self._next, self._pass_on)
        except Exception:
            if self._has_answered_startup:
                await self._host.close()
                raise
        # An application that knows no lifespan has raised or returned; the rest is ours.
        if not self._has_answered_startup:
            await self._send({"type": "lifespan.startup.complete"})
            await self._receive()
        if not self._has_answered_shutdown:
            await self._host.close()
            await self._send({"type": "lifespan.shutdown.complete"})

    async def _next(self) -> Message:
        if self._startup is not None:
            startup, self._startup = self._startup, None
            return startup
        return await self._receive()

    async def _pass_on(self, message: Message) -> None:
        kind = message["type"]
        self._has_answered_startup |= kind.startswith("lifespan.startup.")
        if kind.startswith("lifespan.shutdown.") or kind == "lifespan.startup.failed":
            self._has_answered_shutdown = True
            await self._host.close()
        await self._send(message)


def _is_running(sagas: object) -> TypeGuard[RunningSagas]:
    return isinstance(sagas, (SagaRuntime, StartedSagas, DurableSagaRuntime))


def _state_in(scope: Scope) -> Mapping[str, Any]:
    state = scope.get("state")
    return cast("Mapping[str, Any]", state) if isinstance(state, Mapping) else {}


def _has_trace(message: object) -> bool:
    return as_message(message).traceparent is not None
