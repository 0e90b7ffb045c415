"""How the body of a request is read, and what is said when it cannot be.

- it is JSON in UTF-8 whatever it is called, except that a `Content-Type` which says something else is refused (415):
  that is the one thing a web page of another site could send without asking first;
- it is bounded, counted while it arrives, whatever `Content-Length` claims (413), and has a deadline (408);
- what is not what the route wants is 422 `VALIDATION_ERROR`, malformed JSON too, and `data` has the position.

A `traceparent` or `tracestate` that is no such thing is dropped, as the W3C asks: tracing never breaks a request.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final, Generic, TypeVar

import msgspec
from starlette.requests import Request
from starlette.types import Receive

from sagaloom.errors import MessageRejected

__all__ = ["BodyReader", "JsonBody", "body_of", "idempotency_key_of", "in_utc", "invalid", "one_of_two", "trace_of"]

T = TypeVar("T")

_TRACEPARENT: Final = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")
_TRACESTATE_CHARACTERS_MAX: Final = 512
_BYTE: Final = re.compile(r"\(byte ([0-9]+)\)")
_PLACE: Final = re.compile(r" - at `\$\.?(.*)`$")


class BodyReader:
    """Reads bodies of at most `body_bytes_max`, which must arrive within `body_seconds_max`."""

    def __init__(self, *, body_bytes_max: int, body_seconds_max: float) -> None:
        self._body_bytes_max = body_bytes_max
        self._body_seconds_max = body_seconds_max

    async def read(self, receive: Receive, headers: Mapping[bytes, bytes]) -> bytes | None:
        """The whole body, or None when the client went away while sending it. Raises `MessageRejected` for one that is
        too large, too slow, compressed, or said to be something else than JSON."""
        content_type = headers.get(b"content-type")
        if content_type is not None and content_type != b"application/json":
            _check_is_json(content_type)
        if b"content-encoding" in headers:
            _check_is_plain(headers[b"content-encoding"])
        announced = headers.get(b"content-length")
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


class JsonBody(Generic[T]):
    """Decodes bodies of one shape; `example` ends what is said of a body that is none."""

    def __init__(self, shape: type[T], *, example: str) -> None:
        self._decode = msgspec.json.Decoder(shape).decode
        self._example = example

    def decode(self, body: bytes) -> T:
        """The value in `body`; raises `MessageRejected` saying what is wrong, and where."""
        try:
            # Raw fields are only skipped over here, so what is wrong inside their strings would be found much later.
            if not body.isascii():
                body.decode()
            return self._decode(body)
        except (ValueError, RecursionError) as error:
            raise self._unreadable(body, error) from error

    def _unreadable(self, body: bytes, error: ValueError | RecursionError) -> MessageRejected:
        example = self._example
        if not body.strip():
            return invalid(f"the body is empty: {example}", "")
        if isinstance(error, RecursionError):
            return invalid("the body is nested too deep: send a flatter one", "")
        if isinstance(error, UnicodeDecodeError):
            return invalid(
                f"the body is not UTF-8: byte {error.start} is 0x{body[error.start]:02x}; JSON is sent as UTF-8",
                "",
                position=error.start,
            )
        text = str(error)
        if isinstance(error, msgspec.ValidationError):
            place = _PLACE.search(text)
            field = place[1] if place else ""
            reason = text[: place.start()] if place else text
            return invalid(f"{field or 'the body'}: {reason[:1].lower()}{reason[1:]}; {example}", field)
        found = _BYTE.search(text)
        position = int(found[1]) if found else len(body)
        around = body[max(0, position - 20) : position + 20].decode("utf-8", "replace")
        what = text.removeprefix("JSON is malformed: ").partition(" (byte")[0].lower()
        return invalid(
            f"the body is no valid JSON: {what} at byte {position}, near {around!r}; {example}", "", position=position
        )


async def body_of(request: Request, reader: BodyReader, wanted: JsonBody[T]) -> T:
    """What was sent with `request`; nothing at all counts as an empty object. Raises `MessageRejected`."""
    content = await reader.read(request.receive, dict(request.scope["headers"]))
    return wanted.decode(content if content and content.strip() else b"{}")


def in_utc(moment: datetime, field: str) -> datetime:
    """`moment` in UTC; raises `MessageRejected` for one that does not exist there."""
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise invalid(f"{field} {moment.isoformat()} is outside of the years 1 to 9999 in UTC", field) from None


def idempotency_key_of(headers: Mapping[bytes, bytes], in_body: str | None) -> str | None:
    """The key in the body, or that of the `Idempotency-Key` header, plain or as the quoted string of the IETF draft.
    Raises `MessageRejected` when both are there and differ."""
    header = headers.get(b"idempotency-key")
    if header is None:
        return in_body
    if len(header) > 1 and header.startswith(b'"') and header.endswith(b'"'):
        header = header[1:-1]
    try:
        key = header.decode()
    except UnicodeDecodeError:
        raise invalid(f"the Idempotency-Key header is not UTF-8: {header!r:.80}", "idempotencyKey") from None
    if in_body is not None and in_body != key:
        raise invalid(
            f"idempotencyKey {in_body!r:.80} and the Idempotency-Key header {key!r:.80} differ: send one of them",
            "idempotencyKey",
        )
    return key


def trace_of(
    headers: Mapping[bytes, bytes], traceparent: str | None, tracestate: str | None
) -> tuple[str | None, str | None]:
    """The trace context of a request: that of the body, else that of the headers; None for what is no trace context."""
    if traceparent is None and b"traceparent" in headers:
        traceparent = headers[b"traceparent"].decode("latin-1")
        tracestate = headers[b"tracestate"].decode("latin-1") if b"tracestate" in headers else None
    if traceparent is not None and not _TRACEPARENT.fullmatch(traceparent):
        traceparent = None
    if tracestate is not None and (traceparent is None or len(tracestate) > _TRACESTATE_CHARACTERS_MAX):
        tracestate = None
    return traceparent, tracestate


def invalid(message: str, field: str, **data: object) -> MessageRejected:
    """The refusal of a request, for what stands in `field`; an empty one means the body as a whole."""
    if field:
        return MessageRejected(message, data={"formErrors": [], "fieldErrors": {field: [message]}, **data})
    return MessageRejected(message, data={"formErrors": [message], "fieldErrors": {}, **data})


def one_of_two(name: str, value: str | None, other_name: str, other: str | None) -> str | None:
    """The value of a parameter that has two spellings; raises `MessageRejected` when they differ."""
    if value is not None and other is not None and value != other:
        raise invalid(
            f"{name} {value!r:.80} and {other_name} {other!r:.80} are two spellings of one thing, but they differ: "
            "send one of them",
            other_name,
        )
    return value if value is not None else other


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
