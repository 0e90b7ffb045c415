"""The OpenAPI document of the saga API: its examples, and `POST /publish`, which is no FastAPI route."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from starlette.routing import BaseRoute

from sagaloom.service import shapes
from sagaloom.service.addressing import API_PREFIX
from sagaloom.service.replying import ReplyAnswer, ReplyBody
from sagaloom.web.feed import FeedEventView
from sagaloom.web.health import LiveView, ReadyView
from sagaloom.web.openapi import ShapeBook, header_parameter, make_document
from sagaloom.web.routes import Route

__all__ = ["EXAMPLES", "openapi_document"]

_SUMMARY: Final = "Durable sagas over HTTP: publish messages, and look at what they did."
_TAGS: Final = ("publishing", "instances", "sagas", "dead letters", "time", "health")
_PUBLISH_ERRORS: Final = (404, 408, 409, 413, 415, 422, 429, 503)
_BATCH_ERRORS: Final = (408, 413, 415, 422, 429, 503)

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
_RECEIPT_EXAMPLE: Final[Mapping[str, Any]] = {
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
}
EXAMPLES: Final[Mapping[type, Any]] = {
    shapes.PublishBody: {
        "type": "OrderPlaced",
        "payload": {"orderId": "o-1", "amount": 120},
        "correlationId": "o-1",
        "idempotencyKey": "web-7f3a",
    },
    shapes.PublishAnswer: _RECEIPT_EXAMPLE,
    shapes.PublishBatchBody: {"messages": [{"type": "OrderPlaced", "correlationId": "o-1"}, {"type": "OrderPlaecd"}]},
    shapes.PublishBatchAnswer: {
        "accepted": 1,
        "refused": 1,
        "results": [
            {"status": 202, "receipt": _RECEIPT_EXAMPLE},
            {
                "status": 404,
                "error": {
                    "code": "SAGA_NOT_FOUND",
                    "message": "no saga handles message type 'OrderPlaecd': known types are OrderPlaced",
                    "retryable": False,
                    "traceId": "4bf92f3577b34da6a3ce929d0e0e4736",
                },
            },
        ],
    },
    shapes.InstanceView: _INSTANCE_EXAMPLE,
    shapes.ChildList: {
        "children": [
            {
                "sagaName": "shipment",
                "instanceId": "shipment:o-1/1",
                "correlationId": "o-1/1",
                "correlationKey": "o-1/1",
                "run": 1,
                "status": "running",
                "onParentCancel": "cancel",
                "effectKey": "8f14e45fceea167a5a36dedd4bea2543",
                "spawnedAt": "2026-01-31T12:00:00.000Z",
            }
        ],
        "counts": {"live": 1, "completed": 99, "failed": 0, "cancelled": 0},
        "limit": 50,
        "cursor": None,
    },
    shapes.ControlBody: {"reason": "ordered twice"},
    ReplyBody: {
        "type": "send-invoice:completed",
        "id": "job-4f6b3d1c9e8f7a6b5c4d3e2f",
        "payload": {"jobId": "send-invoice", "runId": "019a0c2e4f6b3d1c9e8f7a6b5c4d3e2f", "result": {"sent": True}},
        "causationId": "8f14e45fceea167a5a36dedd4bea2543",
    },
    ReplyAnswer: {
        "messageType": "send-invoice:completed",
        "messageId": "job-4f6b3d1c9e8f7a6b5c4d3e2f",
        "instanceId": "order:o-1",
        "run": 1,
        "disposition": "applied",
    },
    shapes.SignalBody: {"payload": {"by": "ann"}, "id": "web-7f3b"},
    shapes.SignalAnswer: {
        "signal": "approve",
        "messageId": "web-7f3b",
        "sagaName": "order",
        "instanceId": "order:o-1",
        "correlationId": "o-1",
        "correlationKey": "o-1",
        "run": 1,
        "disposition": "applied",
        "status": "running",
        "revision": 2,
    },
    shapes.UpdateAnswer: {
        "update": "approve",
        "messageId": "web-7f3b",
        "sagaName": "order",
        "instanceId": "order:o-1",
        "correlationId": "o-1",
        "correlationKey": "o-1",
        "run": 1,
        "disposition": "applied",
        "duplicate": False,
        "answer": {"approvedBy": "ann"},
        "status": "running",
        "revision": 2,
    },
    shapes.QueryAnswer: {
        "query": "progress",
        "sagaName": "order",
        "instanceId": "order:o-1",
        "correlationId": "o-1",
        "correlationKey": "o-1",
        "run": 1,
        "status": "running",
        "version": 2,
        "answer": 0.5,
    },
    shapes.InstanceList: {
        "instances": [_INSTANCE_EXAMPLE],
        "total": 1,
        "totalIsEstimate": False,
        "limit": 50,
        "offset": 0,
        "cursor": None,
    },
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
    shapes.BulkBody: {"sagaName": "order", "limit": 100},
    shapes.BulkAnswer: {
        "done": 1,
        "failed": 1,
        "hasMore": False,
        "ids": ["dl019a0c2e4f6b8f14e45fceea167a"],
        "troubles": [
            {
                "id": "dl019a0c2e4f6b8f14e45fceea167b",
                "code": "DEAD_LETTER_NOT_FOUND",
                "message": "it was redriven or discarded a moment ago",
                "retryable": False,
            }
        ],
    },
    FeedEventView: {
        "type": "saga:completed",
        "timestamp": "2026-01-31T12:00:00.000Z",
        "sagaName": "order",
        "sagaId": "order",
        "instanceId": "order:o-1",
        "correlationId": "o-1",
        "correlationKey": "o-1",
        "run": 1,
        "status": "completed",
        "revision": 3,
        "messageType": "OrderShipped",
        "messageId": "019a0c2e4f6b3d1c9e8f7a6b5c4d3e2f",
    },
    shapes.DeadLetterList: {"deadLetters": [_DEAD_LETTER_EXAMPLE], "limit": 50, "cursor": None},
    shapes.TimerList: {
        "timers": [
            {
                "id": "tm8f14e45fceea167a5a36dedd4bea2543",
                "dueAt": "2026-01-31T13:00:00.000Z",
                "sagaName": "order",
                "sagaId": "order",
                "instanceId": "order:o-1",
                "correlationId": "o-1",
                "correlationKey": "o-1",
                "run": 1,
                "messageType": "PaymentOverdue",
                "name": "overdue",
            }
        ],
        "limit": 50,
        "cursor": None,
    },
    shapes.MoveTimerBody: {"dueAt": "2026-01-31T12:00:00Z"},
    shapes.TimerChange: {
        "id": "tm8f14e45fceea167a5a36dedd4bea2543",
        "sagaName": "order",
        "instanceId": "order:o-1",
        "correlationId": "o-1",
        "correlationKey": "o-1",
        "run": 1,
        "version": 2,
        "reason": "timer overdue was cancelled",
    },
    shapes.ScheduleList: {
        "schedules": [
            {
                "sagaName": "report",
                "sagaId": "report",
                "cron": "0 3 * * *",
                "timezone": "UTC",
                "catchUp": "latest",
                "messageType": "report:tick",
                "lastTickAt": "2026-01-31T03:00:00.000Z",
                "nextTickAt": "2026-02-01T03:00:00.000Z",
            }
        ]
    },
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
    LiveView: {"status": "ok"},
    ReadyView: {"ready": True, "checks": {"store": "ok", "receiver": "ok"}},
}


def openapi_document(routes: Sequence[BaseRoute], answers: Sequence[Route], *, needs_token: bool) -> dict[str, Any]:
    """The document for the FastAPI `routes`, which answer as `answers` says, and for `POST /publish`."""
    shown = {route.answer for route in answers} | {route.body for route in answers if route.body is not None}
    shown |= {shapes.PublishBody, shapes.PublishAnswer, shapes.PublishBatchBody, shapes.PublishBatchAnswer}
    book = ShapeBook(shown, EXAMPLES, needs_token=needs_token)
    document = make_document(routes, answers, book, summary=_SUMMARY, tags=_TAGS, needs_token=needs_token)
    document["paths"][f"{API_PREFIX}/publish"] = {"post": _publish_operation(book)}
    document["paths"][f"{API_PREFIX}/publish/batch"] = {"post": _batch_operation(book)}
    return document


def _publish_operation(book: ShapeBook) -> dict[str, Any]:
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
                "schema": {"type": "string", "pattern": "^([0-9]+(\\.[0-9]+)?|[0-9]+(ms|s|m|h|d))$"},
                "example": "5s",
            },
            header_parameter("Idempotency-Key", "The same as `idempotencyKey` in the body."),
            header_parameter("traceparent", "W3C trace context, when the body has none."),
            header_parameter("tracestate", "Goes with `traceparent`."),
        ],
        "requestBody": {"required": True, "content": book.content(shapes.PublishBody)},
        "responses": {"202": book.response("Durable.", shapes.PublishAnswer), **book.errors(_PUBLISH_ERRORS)},
    }


def _batch_operation(book: ShapeBook) -> dict[str, Any]:
    return {
        "tags": ["publishing"],
        "summary": "Publish batch",
        "description": "Takes many messages in, together and in their order, and answers each by itself: one that is "
        "refused keeps no other from being accepted. 202 when all of them are durable, 200 when at least one was "
        "refused.",
        "operationId": "publishBatch",
        "parameters": [
            header_parameter("traceparent", "W3C trace context, for messages that have none."),
            header_parameter("tracestate", "Goes with `traceparent`."),
        ],
        "requestBody": {"required": True, "content": book.content(shapes.PublishBatchBody)},
        "responses": {
            "200": book.response("At least one was refused.", shapes.PublishBatchAnswer),
            "202": book.response("All of them are durable.", shapes.PublishBatchAnswer),
            **book.errors(_BATCH_ERRORS),
        },
    }
