"""The ASGI application around a door's routes.

    request ──► gate ──► a hot path: a raw ASGI application
                  │
                  └────► everything else: FastAPI, with one shape for every error

It serves the OpenAPI document at `/api/openapi.json` and a page of it at `/api/docs`, and nothing that a door did not
add: a route of later versions is not found, and not in the document.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Final

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import BaseRoute
from starlette.routing import Route as StarletteRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sagaloom.errors import MessageRejected, SagasError
from sagaloom.web.docs_page import DOCS_PAGE_POLICY, docs_page
from sagaloom.web.gate import Gate
from sagaloom.web.problems import Answer, answer_error, answer_refusal, answer_surprise
from sagaloom.web.routes import Route, RouteTable
from sagaloom.web.sse import HEAD_MARK

__all__ = ["DocumentMaker", "create_web_app"]

DocumentMaker = Callable[[list[BaseRoute], list[Route]], dict[str, Any]]
"""Makes the OpenAPI document from FastAPI's routes and what they answer."""

_NO_HOT_PATHS: Final[Mapping[str, ASGIApp]] = {}


def create_web_app(
    gate: Gate,
    add_routes: Callable[[RouteTable], None],
    *,
    document: DocumentMaker,
    hot_posts: Mapping[str, ASGIApp] = _NO_HOT_PATHS,
) -> ASGIApp:
    """The application with the routes that `add_routes` adds, behind `gate`.

    `hot_posts` are raw applications that answer POST at a path, past FastAPI, which costs three to six times the work
    itself.
    """
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
    add_routes(table)
    for path, app in hot_posts.items():
        # Requests come here past the shortcut when the application is mounted below a path, or with another method.
        fastapi.router.routes.append(StarletteRoute(path, app, methods=["POST"]))
    _add_documents(fastapi, table, document)
    return _Application(gate, hot_posts, fastapi)


class _Application:
    """Lets requests in, and takes the short way to the hot paths."""

    def __init__(self, gate: Gate, hot_posts: Mapping[str, ASGIApp], fastapi: FastAPI) -> None:
        self._gate = gate
        self._hot_posts = hot_posts
        self._fastapi = fastapi

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._fastapi(scope, receive, send)  # The lifespan, and websockets, which are refused.
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        refused = self._gate.refusal(scope, path)
        if refused is not None:
            await _send(answer_error(refused, scope["headers"]), send)
        elif scope["method"] == "POST" and (hot := self._hot_posts.get(path)) is not None:
            await hot(scope, receive, send)
        elif scope["method"] == "HEAD":
            # Who serves this drops the body of an answer to HEAD; so every GET route has one.
            await self._fastapi({**scope, "method": "GET", HEAD_MARK: True}, receive, send)
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


def _add_documents(fastapi: FastAPI, table: RouteTable, make: DocumentMaker) -> None:
    @cache
    def document() -> dict[str, Any]:
        # Made when first asked for: it takes as long as everything else at the start, and few ask.
        return make(fastapi.router.routes, table.routes)

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
