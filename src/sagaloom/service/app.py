"""The HTTP API as one ASGI application.

    request ──► gate ──► POST /publish: the raw route
                  │
                  └────► everything else: FastAPI, with one shape for every error

The application uses a runtime; it neither starts nor stops it. Before the runtime is started, and after it is stopped,
the application answers all the same: publishing is refused as retryable, and readiness says no.

What is built today is what it serves: a route of later versions is not found, and not in the OpenAPI document.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route as StarletteRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sagaloom.errors import MessageRejected, SagasError
from sagaloom.service.docs_page import DOCS_PAGE_POLICY, docs_page
from sagaloom.service.gate import Gate
from sagaloom.service.openapi import openapi_document
from sagaloom.service.problems import Answer, answer_error, answer_refusal, answer_surprise
from sagaloom.service.publishing import PublishRoute
from sagaloom.service.reading import API_PREFIX, RouteTable, add_health, add_reading

if TYPE_CHECKING:
    from sagaloom.runtime import SagaRuntime

__all__ = ["create_app"]

_PUBLISH_PATH: Final = f"{API_PREFIX}/publish"
_LIVE_PATHS: Final = ("/health/live", f"{API_PREFIX}/health/live")
_ENVELOPE_BYTES: Final = 64 << 10


def create_app(
    runtime: SagaRuntime,
    *,
    token: str | None = None,
    allowed_hosts: Iterable[str] = (),
    body_bytes_max: int | None = None,
    body_seconds_max: float = 30.0,
) -> ASGIApp:
    """The HTTP API of `runtime`.

    With a `token` every route but `/health/live` asks for `Authorization: Bearer <token>`. Without one, connections
    over loopback must name a loopback host or one of `allowed_hosts`, and browsers may not publish from other sites.

    A body is at most `body_bytes_max` long (the runtime's payload limit and 64 KiB for the rest of the message, unless
    given) and must arrive within `body_seconds_max`. Raises `ConfigurationError` for an empty token.
    """
    if body_bytes_max is None:
        body_bytes_max = runtime.options.limits.payload_bytes_max + _ENVELOPE_BYTES
    gate = Gate(token, allowed_hosts=allowed_hosts, open_paths=_LIVE_PATHS)
    publish = PublishRoute(runtime, body_bytes_max=body_bytes_max, body_seconds_max=body_seconds_max)
    fastapi = FastAPI(
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        middleware=[Middleware(_NoSurprises)],
        exception_handlers={
            SagasError: _on_sagas_error,
            RequestValidationError: _on_invalid_request,
            HTTPException: _on_http_exception,
        },
    )
    table = RouteTable(fastapi.router)
    add_health(table, runtime)
    add_reading(table, runtime)
    # Requests come here past the shortcut when the application is mounted below a path, or with another method.
    fastapi.router.routes.append(StarletteRoute(_PUBLISH_PATH, publish, methods=["POST"]))
    _add_documents(fastapi, table, needs_token=token is not None)
    return _Application(gate, publish, fastapi)


class _Application:
    """Lets requests in, and takes the short way to the hot route."""

    def __init__(self, gate: Gate, publish: ASGIApp, fastapi: FastAPI) -> None:
        self._gate = gate
        self._publish = publish
        self._fastapi = fastapi

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._fastapi(scope, receive, send)  # The lifespan, and websockets, which are refused.
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        refused = self._gate.refusal(scope, path)
        if refused is not None:
            await _send(answer_error(refused, scope["headers"]), send)
        elif path == _PUBLISH_PATH and scope["method"] == "POST":
            await self._publish(scope, receive, send)
        elif scope["method"] == "HEAD":
            # Who serves this drops the body of an answer to HEAD; so every GET route has one.
            await self._fastapi({**scope, "method": "GET"}, receive, send)
        else:
            await self._fastapi(scope, receive, send)


class _NoSurprises:
    """Turns what no handler expected into an error of the usual shape, unless an answer has begun."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def watch(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except Exception as error:
            if has_begun or scope["type"] != "http":
                raise
            where = f"{scope['method']} {scope['path']}"
            await _send(answer_surprise(error, scope["headers"], where=where), send)


def _add_documents(fastapi: FastAPI, table: RouteTable, *, needs_token: bool) -> None:
    @cache
    def document() -> dict[str, Any]:
        # Made when first asked for: it takes as long as everything else at the start, and few ask.
        return openapi_document(fastapi.router.routes, table.routes, needs_token=needs_token)

    async def openapi(_: Request) -> Response:
        return Response(msgspec.json.encode(document()), media_type="application/json")

    async def docs(_: Request) -> Response:
        policy = {"content-security-policy": DOCS_PAGE_POLICY}
        return Response(docs_page(document()), media_type="text/html", headers=policy)

    fastapi.router.routes.append(StarletteRoute("/api/openapi.json", openapi))
    fastapi.router.routes.append(StarletteRoute("/api/docs", docs))


async def _send(answer: Answer, send: Send) -> None:
    status, headers, body = answer
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _response_of(answer: Answer) -> Response:
    status, headers, body = answer
    return Response(body, status, {name.decode("latin-1"): value.decode("latin-1") for name, value in headers})


async def _on_sagas_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, SagasError)
    return _response_of(answer_error(error, request.scope["headers"]))


async def _on_invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    fields: dict[str, list[str]] = {}
    for found in error.errors():
        _, *names = found["loc"]  # The first one says where to look: query or path.
        field = ".".join(map(str, names))
        problem = "is no parameter of this route" if found["type"] == "extra_forbidden" else found["msg"]
        fields.setdefault(field, []).append(f"{problem}, got {str(found['input'])!r:.80}")
    message = "; ".join(f"{field}: {problem}" for field, problems in fields.items() for problem in problems)
    refused = MessageRejected(message, data={"formErrors": [], "fieldErrors": fields})
    return _response_of(answer_error(refused, request.scope["headers"]))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    method, path = request.method, request.url.path
    if error.status_code == 404:
        message = f"nothing is served at {method} {path:.200}: /api/docs lists what is"
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        message = f"{method} is not allowed at {path:.200}: use {allowed}"
    else:
        message = f"{method} {path:.200}: {error.detail}"
    return _response_of(answer_refusal(error.status_code, message, request.scope["headers"], headers=error.headers))
