"""What a refused request gets back: one body for every error, and the status that belongs to its code.

    {"code": "IDEMPOTENCY_KEY_REUSED", "message": "...", "retryable": false, "traceId": "4bf9...", "data": {...}}

`code` is for programs, `message` for people, `retryable` says whether the very same request may succeed later.
`traceId` is the trace of the caller's `traceparent` header, else one made up for this answer; an unexpected error is
logged under it. A traceback never goes over the wire.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any, Final

import msgspec

from sagaloom.errors import HandlerError, MessageRejected, SagasError

__all__ = [
    "STATUS_OF_CODE",
    "Answer",
    "Header",
    "Headers",
    "Problem",
    "answer_error",
    "answer_refusal",
    "answer_surprise",
    "json_headers",
    "status_of",
    "trace_id_of",
]

Header = tuple[bytes, bytes]
Headers = Iterable[Header]
Answer = tuple[int, list[Header], bytes]
"""Status, headers and body, ready to be sent."""

_log = logging.getLogger("sagaloom.web")
_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")
_RETRY_AFTER_SECONDS: Final = 1

STATUS_OF_CODE: Final[Mapping[str, int]] = {
    "UNAUTHORIZED": 401,
    "FORBIDDEN": 403,
    "NOT_FOUND": 404,
    "SAGA_NOT_FOUND": 404,
    "SAGA_INSTANCE_NOT_FOUND": 404,
    "DEAD_LETTER_NOT_FOUND": 404,
    "SIGNAL_NOT_FOUND": 404,
    "QUERY_NOT_FOUND": 404,
    "SCHEDULE_NOT_FOUND": 404,
    "TIMER_NOT_FOUND": 404,
    "JOB_NOT_FOUND": 404,
    "JOB_RUN_NOT_FOUND": 404,
    "METHOD_NOT_ALLOWED": 405,
    "REQUEST_TIMEOUT": 408,
    "SAGA_RETRYABLE": 409,
    "SAGA_INSTANCE_PENDING": 409,
    "SAGA_CONCURRENCY_LIMITED": 409,
    "JOB_RUN_NOT_OVER": 409,
    "SAGA_INSTANCE_ENDED": 409,
    "PAYLOAD_TOO_LARGE": 413,
    "UNSUPPORTED_MEDIA_TYPE": 415,
    "VALIDATION_ERROR": 422,
    "SAGA_VALIDATION_FAILED": 422,
    "CORRELATION_REQUIRED": 422,
    "IDEMPOTENCY_KEY_REUSED": 422,
    "MESSAGE_TYPE_RESERVED": 422,
    "SAGA_UPDATE_REFUSED": 422,
    # The same every time: whoever counts 5xx, or repeats what got one, is not to take it for an outage.
    "SAGA_QUERY_FAILED": 422,
    "SAGA_QUERY_MUTATED": 422,
    "SAGA_QUERY_ASYNC": 422,
    "RATE_LIMITED": 429,
    "INTERNAL": 500,
    "STORE_CORRUPT": 500,
    "CONFIGURATION_ERROR": 500,
    "SAGA_STATE_UNREADABLE": 500,
    "SAGA_UPDATE_FAILED": 500,
    "BACKEND_UNAVAILABLE": 503,
    "SAGA_FENCED": 503,
    "SAGA_NOT_STARTED": 503,
    "SAGA_DISABLED": 503,
    "SAGA_NOT_LOADED": 503,
    "SAGA_OVERLOADED": 503,
    "JOB_BACKLOG_FULL": 503,
}


class Problem(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """The body of every error."""

    code: str
    message: str
    retryable: bool
    trace_id: str
    data: Mapping[str, Any] = {}


def status_of(error: SagasError) -> int:
    """The HTTP status for an error: by its code, else by whose fault it is."""
    known = STATUS_OF_CODE.get(error.code)
    if known is not None:
        return known
    if error.retryable:
        return 503
    return 422 if isinstance(error, MessageRejected) else 500


def trace_id_of(headers: Headers) -> str:
    """The trace id of the `traceparent` header, else a new one."""
    for name, value in headers:
        if name == b"traceparent" and (match := _TRACEPARENT.fullmatch(value)):
            return match[1].decode()
    return os.urandom(16).hex()


def json_headers(body: bytes) -> list[Header]:
    """The headers of a JSON answer."""
    return [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]


def answer_error(error: SagasError, request_headers: Headers) -> Answer:
    """The answer to a request that `error` ended."""
    status = status_of(error)
    trace_id = trace_id_of(request_headers)
    if status == 500 or isinstance(error, HandlerError):  # whoever has written the handler wants to see where it was
        text = "%s: %s (trace %s)"
        _log.error(text, error.code, error.message, trace_id, exc_info=error, extra={"trace_id": trace_id})
    extra: list[Header] = []
    if status in (429, 503):
        seconds = error.data.get("retryAfterSeconds", _RETRY_AFTER_SECONDS)
        extra.append((b"retry-after", str(seconds).encode()))
    elif status == 401:
        extra.append((b"www-authenticate", b"Bearer"))
    return _answer(status, Problem(error.code, error.message, error.retryable, trace_id, error.data), extra)


def answer_refusal(
    status: int, message: str, request_headers: Headers, *, headers: Mapping[str, str] | None = None
) -> Answer:
    """The answer for a bare HTTP status, such as 404 for an unknown path."""
    code = next((code for code, known in STATUS_OF_CODE.items() if known == status), HTTPStatus(status).name)
    extra = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    return _answer(status, Problem(code, message, status >= 500, trace_id_of(request_headers)), extra)


def answer_surprise(error: Exception, request_headers: Headers, *, where: str) -> Answer:
    """The answer to what nobody expected; the traceback goes to the log, under the trace id of the answer."""
    trace_id = trace_id_of(request_headers)
    _log.error("unexpected error at %s (trace %s)", where, trace_id, exc_info=error, extra={"trace_id": trace_id})
    # Not retryable: whether the request was carried out is unknown, so repeating it is the caller's decision.
    message = f"unexpected {type(error).__name__} at {where}: the log of the service tells more under this trace id"
    return _answer(500, Problem("INTERNAL", message, retryable=False, trace_id=trace_id), [])


def _answer(status: int, problem: Problem, extra: list[Header]) -> Answer:
    body = msgspec.json.encode(problem, enc_hook=str) if problem.data else msgspec.json.encode(problem)
    return status, [*json_headers(body), *extra], body
