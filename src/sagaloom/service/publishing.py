"""The hot route: `POST /publish`, from the bytes of a request to the bytes of its answer.

A raw ASGI application, since frameworks cost three to six times the work itself here. The body is read once and decoded
once; the payload inside it stays the bytes it came as until the saga's codec reads them.

The rules of the body:

- it is JSON in UTF-8 whatever it is called, except that a `Content-Type` which says something else is refused (415):
  that is the one thing a web page of another site could send without asking first;
- it is at most `body_bytes_max` long, counted while it arrives, whatever `Content-Length` claims (413), and is there
  within `body_seconds_max` (408);
- what is not a message is 422 `VALIDATION_ERROR`, malformed JSON too: a NetScript publisher does not repeat either,
  and `data` has the position.

A `traceparent` or `tracestate` that is no such thing is dropped, as the W3C asks: tracing never breaks a publish.
"""

from __future__ import annotations

import asyncio
import math
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl

import msgspec
from starlette.types import Receive, Scope, Send

from sagaloom.durations import parse_duration
from sagaloom.errors import DefinitionError, MessageRejected, SagasError
from sagaloom.messages import SagaMessage
from sagaloom.runtime.receipts import PublishRejected
from sagaloom.service.problems import Answer, answer_error, answer_surprise, json_headers
from sagaloom.service.shapes import PublishBody, publish_answer

if TYPE_CHECKING:
    from sagaloom.runtime import SagaRuntime

__all__ = ["PublishRoute"]

_decode_body = msgspec.json.Decoder(PublishBody).decode
_encode = msgspec.json.Encoder().encode
_NO_PAYLOAD: Final = msgspec.Raw(b"{}")
_TRACEPARENT: Final = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")
_TRACESTATE_CHARACTERS_MAX: Final = 512
_BYTE: Final = re.compile(r"\(byte ([0-9]+)\)")
_PLACE: Final = re.compile(r" - at `\$\.?(.*)`$")


class PublishRoute:
    """Takes messages in for `runtime`."""

    def __init__(self, runtime: SagaRuntime, *, body_bytes_max: int, body_seconds_max: float) -> None:
        self._runtime = runtime
        self._wait_seconds_max = runtime.options.wait_seconds_max
        self._body_bytes_max = body_bytes_max
        self._body_seconds_max = body_seconds_max

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            answer = await self._answer(scope, receive)
        except SagasError as error:
            answer = answer_error(error, scope["headers"])
        except Exception as error:  # noqa: BLE001  # a door answers whatever happens behind it
            answer = answer_surprise(error, scope["headers"], where="POST /publish")
        if answer is None:
            return
        status, headers, body = answer
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope: Scope, receive: Receive) -> Answer | None:
        """The answer, or None when the client is gone."""
        headers: dict[bytes, bytes] = dict(scope["headers"])
        content_type = headers.get(b"content-type")
        if content_type is not None and content_type != b"application/json":
            _check_is_json(content_type)
        if b"content-encoding" in headers:
            _check_is_plain(headers[b"content-encoding"])
        body = await self._read(receive, headers.get(b"content-length"))
        if body is None:
            return None
        query = scope["query_string"]
        wait = self._wait_of(query) if query else None
        receipt = await self._runtime.publish(_message_of(body, headers), wait=wait)
        if isinstance(receipt, PublishRejected):
            receipt.raise_for_rejected()
        content = _encode(publish_answer(receipt, with_outcomes=wait is not None))
        return 202, json_headers(content), content

    async def _read(self, receive: Receive, announced: bytes | None) -> bytes | None:
        """The whole body, or None when the client went away while sending it."""
        if announced is not None and announced.isdigit() and int(announced[:20]) > self._body_bytes_max:
            raise self._too_large(f"{int(announced[:20])} bytes are announced")
        event = await receive()
        if not event.get("more_body", False):
            if event["type"] == "http.disconnect":
                return None
            body: bytes = event.get("body", b"")
            if len(body) > self._body_bytes_max:
                raise self._too_large(f"{len(body)} bytes came")
            return body
        try:
            async with asyncio.timeout(self._body_seconds_max):
                return await self._read_rest(receive, event)
        except TimeoutError:
            raise MessageRejected(
                f"the body did not arrive within {self._body_seconds_max:g} s: send it again, in one go",
                code="REQUEST_TIMEOUT",
                retryable=True,
            ) from None

    async def _read_rest(self, receive: Receive, event: Any) -> bytes | None:
        parts: list[bytes] = []
        size = 0
        while event["type"] == "http.request":
            part: bytes = event.get("body", b"")
            size += len(part)
            if size > self._body_bytes_max:
                raise self._too_large(f"more than {self._body_bytes_max} bytes came")
            parts.append(part)
            if not event.get("more_body", False):
                return b"".join(parts)
            event = await receive()
        return None

    def _too_large(self, found: str) -> MessageRejected:
        return MessageRejected(
            f"the body is too large: {found}, at most {self._body_bytes_max} are taken; keep bulk data elsewhere and "
            "send its address",
            code="PAYLOAD_TOO_LARGE",
            data={"bytesMax": self._body_bytes_max},
        )

    def _wait_of(self, query: bytes) -> float | None:
        """The seconds that `?wait=` asks for; None for no wait at all."""
        wait: float | None = None
        for name, value in parse_qsl(query.decode("latin-1"), keep_blank_values=True):
            if name != "wait":
                raise _invalid(f"query parameter {name!r:.80} is unknown: this route knows 'wait'", name)
            wait = _seconds_of(value)
            if wait > self._wait_seconds_max:
                raise _invalid(
                    f"wait={value[:40]} is too long: at most {self._wait_seconds_max:g} s are waited; the message is "
                    "durable either way, so look at its instance later",
                    name,
                )
        return wait or None


def _message_of(body: bytes, headers: dict[bytes, bytes]) -> SagaMessage[Any]:
    try:
        # The payload is only skipped over here, so what is wrong inside its strings would be found much later.
        if not body.isascii():
            body.decode()
        wanted = _decode_body(body)
    except (ValueError, RecursionError) as error:
        raise _unreadable(body, error) from error
    key = wanted.correlation_id
    if wanted.correlation_key is not None:
        if key is not None and key != wanted.correlation_key:
            raise _invalid(
                f"correlationId {key!r:.80} and correlationKey {wanted.correlation_key!r:.80} are two spellings of one "
                "key, but they differ: send one of them",
                "correlationKey",
            )
        key = wanted.correlation_key
    idempotency_key = wanted.idempotency_key
    if b"idempotency-key" in headers:
        idempotency_key = _idempotency_key(headers[b"idempotency-key"], idempotency_key)
    traceparent, tracestate = wanted.traceparent, wanted.tracestate
    if traceparent is None and b"traceparent" in headers:
        traceparent = headers[b"traceparent"].decode("latin-1")
        tracestate = headers[b"tracestate"].decode("latin-1") if b"tracestate" in headers else None
    if traceparent is not None and not _TRACEPARENT.fullmatch(traceparent):
        traceparent = None
    if tracestate is not None and (traceparent is None or len(tracestate) > _TRACESTATE_CHARACTERS_MAX):
        tracestate = None
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
        _in_utc(occurred_at) if occurred_at is not None else None,
        wanted.message_id,
        traceparent,
        tracestate,
    )


def _unreadable(body: bytes, error: ValueError | RecursionError) -> MessageRejected:
    """Why a body is no message, and where."""
    example = 'send a JSON object such as {"type": "OrderPlaced", "payload": {}}'
    if not body.strip():
        return _invalid(f"the body is empty: {example}", "")
    if isinstance(error, RecursionError):
        return _invalid("the body is nested too deep: send a flatter one", "")
    if isinstance(error, UnicodeDecodeError):
        return _invalid(
            f"the body is not UTF-8: byte {error.start} is 0x{body[error.start]:02x}; JSON is sent as UTF-8",
            "",
            position=error.start,
        )
    text = str(error)
    if isinstance(error, msgspec.ValidationError):
        place = _PLACE.search(text)
        field = place[1] if place else ""
        reason = text[: place.start()] if place else text
        return _invalid(f"{field or 'the body'}: {reason[:1].lower()}{reason[1:]}; {example}", field)
    found = _BYTE.search(text)
    position = int(found[1]) if found else len(body)
    around = body[max(0, position - 20) : position + 20].decode("utf-8", "replace")
    what = text.removeprefix("JSON is malformed: ").partition(" (byte")[0].lower()
    return _invalid(
        f"the body is no valid JSON: {what} at byte {position}, near {around!r}; {example}", "", position=position
    )


def _idempotency_key(header: bytes, in_body: str | None) -> str:
    """The key of the `Idempotency-Key` header, plain or as the quoted string of the IETF draft."""
    if len(header) > 1 and header.startswith(b'"') and header.endswith(b'"'):
        header = header[1:-1]
    try:
        key = header.decode()
    except UnicodeDecodeError:
        raise _invalid(f"the Idempotency-Key header is not UTF-8: {header!r:.80}", "idempotencyKey") from None
    if in_body is not None and in_body != key:
        raise _invalid(
            f"idempotencyKey {in_body!r:.80} and the Idempotency-Key header {key!r:.80} differ: send one of them",
            "idempotencyKey",
        )
    return key


def _in_utc(occurred_at: datetime) -> datetime:
    try:
        return occurred_at.astimezone(UTC)
    except OverflowError:
        raise _invalid(
            f"occurredAt {occurred_at.isoformat()} is outside of the years 1 to 9999 in UTC", "occurredAt"
        ) from None


def _seconds_of(text: str) -> float:
    try:
        seconds = float(text) if text[-1:].isdigit() else parse_duration(text).total_seconds()
    except (ValueError, DefinitionError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise _invalid(f"wait={text[:40]!r} is no duration: write seconds, or for example 500ms or 5s", "wait")
    return seconds


def _check_is_json(content_type: bytes) -> None:
    media_type = content_type.partition(b";")[0].strip().lower()
    if media_type in (b"application/json", b"text/json", b"") or (
        media_type.startswith(b"application/") and media_type.endswith(b"+json")
    ):
        return
    raise MessageRejected(
        f"content type {media_type.decode('latin-1')!r:.80} is not taken: send JSON as application/json "
        "(curl: -H 'content-type: application/json')",
        code="UNSUPPORTED_MEDIA_TYPE",
    )


def _check_is_plain(content_encoding: bytes) -> None:
    if content_encoding.strip().lower() != b"identity":
        raise MessageRejected(
            f"content encoding {content_encoding.decode('latin-1')!r:.80} is not taken: send the body uncompressed",
            code="UNSUPPORTED_MEDIA_TYPE",
        )


def _invalid(message: str, field: str, **data: object) -> MessageRejected:
    if field:
        return MessageRejected(message, data={"formErrors": [], "fieldErrors": {field: [message]}, **data})
    return MessageRejected(message, data={"formErrors": [message], "fieldErrors": {}, **data})
