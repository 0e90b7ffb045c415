"""The hot route: `POST /publish`, from the bytes of a request to the bytes of its answer.

A raw ASGI application, since frameworks cost three to six times the work itself here. The body is read once and decoded
once; the payload inside it stays the bytes it came as until the saga's codec reads them.

The rules of the body are those of `sagaloom.web.bodies`. What is not a message is 422, malformed JSON too: a NetScript
publisher does not repeat either.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl

import msgspec
from starlette.types import Receive, Scope

from sagaloom.durations import parse_duration
from sagaloom.errors import DefinitionError
from sagaloom.ids import new_traceparent
from sagaloom.messages import SagaMessage
from sagaloom.runtime.receipts import PublishRejected
from sagaloom.service.shapes import PublishBody, publish_answer
from sagaloom.web.bodies import BodyReader, JsonBody, idempotency_key_of, in_utc, invalid, trace_of
from sagaloom.web.problems import Answer, json_headers
from sagaloom.web.raw import RawRoute

if TYPE_CHECKING:
    from sagaloom.runtime import SagaRuntime

__all__ = ["PublishRoute", "message_of", "wait_of"]

_body = JsonBody(PublishBody, example='send a JSON object such as {"type": "OrderPlaced", "payload": {}}')
_encode = msgspec.json.Encoder().encode
_NO_PAYLOAD: Final = msgspec.Raw(b"{}")


class PublishRoute(RawRoute):
    """Takes messages in for `runtime`."""

    where = "POST /publish"

    def __init__(self, runtime: SagaRuntime, *, body_bytes_max: int, body_seconds_max: float) -> None:
        self._runtime = runtime
        self._wait_seconds_max = runtime.options.wait_seconds_max
        self._reader = BodyReader(body_bytes_max=body_bytes_max, body_seconds_max=body_seconds_max)

    async def _answer(self, scope: Scope, receive: Receive) -> Answer | None:
        """The answer, or None when the client is gone."""
        headers: dict[bytes, bytes] = dict(scope["headers"])
        body = await self._reader.read(receive, headers)
        if body is None:
            return None
        query = scope["query_string"]
        wait = self._wait_of(query) if query else None
        telemetry = self._runtime.telemetry
        message = message_of(body, headers, begins_trace=telemetry is None or not telemetry.makes_spans)
        if telemetry is None:
            receipt = await self._runtime.publish(message, wait=wait)
        else:
            with telemetry.serving():
                receipt = await self._runtime.publish(message, wait=wait)
        if isinstance(receipt, PublishRejected):
            receipt.raise_for_rejected()
        content = _encode(publish_answer(receipt, with_outcomes=wait is not None))
        return 202, json_headers(content), content

    def _wait_of(self, query: bytes) -> float | None:
        """The seconds that `?wait=` asks for; None for no wait at all."""
        wait: float | None = None
        for name, value in parse_qsl(query.decode("latin-1"), keep_blank_values=True):
            if name != "wait":
                raise invalid(f"query parameter {name!r:.80} is unknown: this route knows 'wait'", name)
            wait = wait_of(value, self._wait_seconds_max)
        return wait or None


def message_of(body: bytes, headers: dict[bytes, bytes], *, begins_trace: bool = False) -> SagaMessage[Any]:
    """The message in a body and its headers; raises `MessageRejected`. With `begins_trace` one that comes without a
    trace gets one, so that what it sets off can be followed."""
    wanted = _body.decode(body)
    key = wanted.correlation_id
    if wanted.correlation_key is not None:
        if key is not None and key != wanted.correlation_key:
            raise invalid(
                f"correlationId {key!r:.80} and correlationKey {wanted.correlation_key!r:.80} are two spellings of one "
                "key, but they differ: send one of them",
                "correlationKey",
            )
        key = wanted.correlation_key
    idempotency_key = idempotency_key_of(headers, wanted.idempotency_key)
    traceparent, tracestate = trace_of(headers, wanted.traceparent, wanted.tracestate)
    if traceparent is None and begins_trace:
        traceparent = new_traceparent()
    occurred_at = wanted.occurred_at
    payload = wanted.payload
    if isinstance(payload, msgspec.UnsetType) or (memoryview(payload).nbytes == 4 and bytes(payload) == b"null"):
        payload = _NO_PAYLOAD
    return SagaMessage(
        wanted.type,
        payload,
        key,
        idempotency_key,
        wanted.concurrency_key,
        in_utc(occurred_at, "occurredAt") if occurred_at is not None else None,
        wanted.message_id,
        traceparent,
        tracestate,
    )


def wait_of(text: str, seconds_max: float) -> float:
    """The seconds that a `wait=` says; raises `MessageRejected`."""
    seconds = _seconds_of(text)
    if seconds > seconds_max:
        raise invalid(
            f"wait={text[:40]} is too long: at most {seconds_max:g} s are waited; the message is durable either way, "
            "so look at its instance later",
            "wait",
        )
    return seconds


def _seconds_of(text: str) -> float:
    try:
        seconds = float(text) if text[-1:].isdigit() else parse_duration(text).total_seconds()
    except (ValueError, DefinitionError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise invalid(f"wait={text[:40]!r} is no duration: write seconds, or for example 500ms or 5s", "wait")
    return seconds
