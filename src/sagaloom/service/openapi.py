"""The OpenAPI 3.1 document: parameters as FastAPI knows them, shapes as msgspec encodes them, and examples.

`POST /publish` is no FastAPI route, and no route has a pydantic response model, so what a body or an answer looks like
is written down here from the very classes that encode it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, Final

import msgspec
from fastapi.openapi.utils import get_openapi
from starlette.routing import BaseRoute

from sagaloom.service import shapes
from sagaloom.service.problems import STATUS_OF_CODE, Problem
from sagaloom.service.reading import API_PREFIX, Route

__all__ = ["EXAMPLES", "openapi_document"]

_JSON: Final = "application/json"
_SCHEMAS: Final = "#/components/schemas/"
_SUMMARY: Final = "Durable sagas over HTTP: publish messages, and look at what they did."
_REASONS: Final[Mapping[int, str]] = {
    401: "The bearer token is missing or wrong.",
    403: "A browser may not send this, or the host name is not this machine's.",
    404: "There is no such thing.",
    408: "The body did not arrive in time.",
    409: "Somebody else was first; try again.",
    413: "The body or the payload is too large.",
    415: "The body is called something else than JSON.",
    422: "The request is not what it should be; `data` says where.",
    429: "Too many requests; `Retry-After` says when to come back.",
    500: "Nobody expected this; the log knows more under `traceId`.",
    503: "The store or the runtime does not work right now; `Retry-After` says when to come back.",
}
_PUBLISH_ERRORS: Final = (404, 408, 409, 413, 415, 422, 429, 503)

_INSTANCE_EXAMPLE: Final[Mapping[str, Any]] = {
    "sagaName": "order",
    "sagaId": "order",
    "instanceId": "order:o-1",
    "correlationId": "o-1",
    "correlationKey": "o-1",
    "run": 1,
    "status": "running",
    "state": {"paid": False},
    "version": 1,
    "messageCount": 1,
    "durabilityTier": "t1",
    "isPaused": False,
    "createdAt": "2026-01-31T12:00:00.000Z",
    "updatedAt": "2026-01-31T12:00:00.000Z",
    "lastMessageType": "OrderPlaced",
}
_EFFECT_EXAMPLE: Final = {"kind": "send", "target": "service:payments", "effectKey": "8f14e45fceea167a5a36dedd4bea2543"}
_DEAD_LETTER_EXAMPLE: Final[Mapping[str, Any]] = {
    "id": "dl019a0c2e4f6b8f14e45fceea167a",
    "at": "2026-01-31T12:00:00.000Z",
    "kind": "message",
    "sagaName": "order",
    "sagaId": "order",
    "correlationId": "o-1",
    "correlationKey": "o-1",
    "type": "OrderPlaced",
    "messageId": "019a0c2e4f6b3d1c9e8f7a6b5c4d3e2f",
    "code": "SAGA_HANDLER_FAILED",
    "reason": "KeyError: 'orderId'",
    "attempts": 5,
}
EXAMPLES: Final[Mapping[type, Any]] = {
    shapes.PublishBody: {
        "type": "OrderPlaced",
        "payload": {"orderId": "o-1", "amount": 120},
        "correlationId": "o-1",
        "idempotencyKey": "web-7f3a",
    },
    shapes.PublishAnswer: {
        "published": True,
        "messageType": "OrderPlaced",
        "messageId": "019a0c2e4f6b3d1c9e8f7a6b5c4d3e2f",
        "duplicate": False,
        "instances": [
            {
                "sagaName": "order",
                "instanceId": "order:o-1",
                "correlationId": "o-1",
                "correlationKey": "o-1",
                "run": 1,
            }
        ],
        "correlationId": "o-1",
        "correlationKey": "o-1",
    },
    shapes.InstanceView: _INSTANCE_EXAMPLE,
    shapes.InstanceList: {"instances": [_INSTANCE_EXAMPLE], "total": 1, "limit": 50, "offset": 0, "cursor": None},
    shapes.HistoryList: {
        "history": [
            {
                "id": "order:o-1#1",
                "sagaName": "order",
                "sagaId": "order",
                "instanceId": "order:o-1",
                "correlationId": "o-1",
                "correlationKey": "o-1",
                "run": 1,
                "entryNo": 1,
                "revision": 1,
                "messageType": "OrderPlaced",
                "messageId": "019a0c2e4f6b3d1c9e8f7a6b5c4d3e2f",
                "payload": {"orderId": "o-1", "amount": 120},
                "disposition": "applied",
                "outcome": "success",
                "previousStatus": "pending",
                "newStatus": "running",
                "newState": None,
                "transitionAt": "2026-01-31T12:00:00.000Z",
                "attempt": 1,
                "origin": "door",
                "definitionVersion": 1,
                "steps": [
                    {"phase": "handle", "type": "OrderPlaced", "status": "running", "effects": [_EFFECT_EXAMPLE]}
                ],
                "effects": [_EFFECT_EXAMPLE],
            }
        ],
        "total": 1,
        "limit": 50,
        "cursor": None,
    },
    shapes.DeadLetterView: {**_DEAD_LETTER_EXAMPLE, "payload": {"orderId": "o-1"}, "traceback": "Traceback ..."},
    shapes.DeadLetterList: {"deadLetters": [_DEAD_LETTER_EXAMPLE], "limit": 50, "cursor": None},
    shapes.HealthView: {
        "status": "healthy",
        "timestamp": "2026-01-31T12:00:00.000Z",
        "version": "0.1.0",
        "checks": {"store": "ok", "receiver": "ok", "timekeeper": "ok", "dispatcher": "ok"},
        "backlog": 0,
        "outbox": 0,
        "stalledLanes": 0,
        "oldestWaitingSeconds": 0.0,
    },
    shapes.LiveView: {"status": "ok"},
    shapes.ReadyView: {"ready": True, "checks": {"store": "ok", "receiver": "ok"}},
}


def openapi_document(routes: Sequence[BaseRoute], answers: Sequence[Route], *, needs_token: bool) -> dict[str, Any]:
    """The document for the FastAPI `routes`, which answer as `answers` says, and for `POST /publish`."""
    document = get_openapi(
        title="sagaloom",
        version=version("sagaloom"),
        openapi_version="3.1.0",
        summary=_SUMMARY,
        description="Errors have one shape, `Problem`; its `code` is one of " + ", ".join(sorted(STATUS_OF_CODE)) + ".",
        routes=routes,
        tags=[{"name": name} for name in ("publishing", "instances", "sagas", "dead letters", "health")],
    )
    shown = {route.answer for route in answers} | {shapes.PublishBody, shapes.PublishAnswer, Problem}
    ordered = sorted(shown, key=lambda shape: shape.__name__)
    references, schemas = msgspec.json.schema_components(ordered, ref_template=_SCHEMAS + "{name}")
    refs = dict(zip(ordered, references, strict=True))
    for schema in schemas.values():
        if "description" in schema:
            schema["description"] = " ".join(schema["description"].split())
    # Its own schemas for validation errors are shapes that this service never answers with.
    document["components"] = {"schemas": dict(sorted(schemas.items()))}
    always = (401,) if needs_token else (403,)
    for route in answers:
        operation = document["paths"][route.path][route.method.lower()]
        responses = {str(route.status): _response("OK", route.answer, refs)}
        if route.refused_with_answer is not None:
            responses[str(route.refused_with_answer)] = _response("Not ready.", route.answer, refs)
        operation["responses"] = {**responses, **_errors((*route.errors, *always, 500), refs)}
    document["paths"][f"{API_PREFIX}/publish"] = {"post": _publish_operation(refs, always)}
    if needs_token:
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
        document["paths"]["/health/live"]["get"]["security"] = []
    return document


def _publish_operation(refs: Mapping[type, Any], always: tuple[int, ...]) -> dict[str, Any]:
    return {
        "tags": ["publishing"],
        "summary": "Publish",
        "description": "Takes a message in. The answer comes once it is durable: it survives a crash and power loss "
        "from then on. Repeat it with the same `idempotencyKey` when no answer came.",
        "operationId": "publish",
        "parameters": [
            {
                "name": "wait",
                "in": "query",
                "description": "Also wait, at most this long, until each saga is done with the message, and answer "
                "with `outcomes`: seconds, or a duration such as `500ms` or `5s`.",
                "schema": {"type": "string"},
                "example": "5s",
            },
            _header("Idempotency-Key", "The same as `idempotencyKey` in the body."),
            _header("traceparent", "W3C trace context, when the body has none."),
            _header("tracestate", "Goes with `traceparent`."),
        ],
        "requestBody": {"required": True, "content": _content(shapes.PublishBody, refs)},
        "responses": {
            "202": _response("Durable.", shapes.PublishAnswer, refs),
            **_errors((*_PUBLISH_ERRORS, *always, 500), refs),
        },
    }


def _header(name: str, description: str) -> dict[str, Any]:
    return {"name": name, "in": "header", "description": description, "schema": {"type": "string"}}


def _content(shape: type, refs: Mapping[type, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {"schema": refs[shape]}
    if shape in EXAMPLES:
        content["example"] = EXAMPLES[shape]
    return {_JSON: content}


def _response(description: str, shape: type, refs: Mapping[type, Any]) -> dict[str, Any]:
    return {"description": description, "content": _content(shape, refs)}


def _errors(statuses: Sequence[int], refs: Mapping[type, Any]) -> dict[str, Any]:
    return {str(status): _error(status, refs) for status in sorted(statuses)}


def _error(status: int, refs: Mapping[type, Any]) -> dict[str, Any]:
    code = next(code for code, known in STATUS_OF_CODE.items() if known == status)
    example = {
        "code": code,
        "message": _REASONS[status],
        "retryable": status in (408, 409, 429, 503),
        "traceId": "4bf92f3577b34da6a3ce929d0e0e4736",
    }
    response: dict[str, Any] = {
        "description": _REASONS[status],
        "content": {_JSON: {"schema": refs[Problem], "example": example}},
    }
    if status in (429, 503):
        response["headers"] = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
    return response
