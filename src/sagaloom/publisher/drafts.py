"""From what a caller publishes to the bytes that are sent, the same ones at every attempt.

Everything that makes two attempts one message is settled here, before the first of them: the message id and the
idempotency key, made up if need be. So an attempt whose answer got lost can be repeated without being applied twice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple, cast

import msgspec

from sagaloom.codec import is_declared_class
from sagaloom.errors import MessageRejected
from sagaloom.ids import check_key, new_message_id
from sagaloom.messages import SagaMessage, as_message, message_type_of
from sagaloom.publisher.payloads import payload_json
from sagaloom.telemetry import current_trace

__all__ = ["Draft", "Parts", "draft_of", "parts_of"]

_OPTIONS: Final = (
    *("correlation_key", "idempotency_key", "concurrency_key", "topic"),
    *("traceparent", "tracestate", "id", "occurred_at"),
)
_TRACEPARENT: Final = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-[!-~]*)?"
)
_TRACESTATE: Final = re.compile(r"[ -~]{1,512}")
_WAIT_SECONDS_MAX: Final = 3600.0


class _Body(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """The body of `POST /publish`. The key goes under both of its names: services know one or the other."""

    type: str
    payload: msgspec.Raw | None = None
    correlation_id: str | None = None
    correlation_key: str | None = None
    idempotency_key: str | None = None
    concurrency_key: str | None = None
    message_id: str | None = None
    occurred_at: datetime | None = None
    topic: str | None = None
    traceparent: str | None = None
    tracestate: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A message that is ready to be sent."""

    message_type: str
    message_id: str
    idempotency_key: str
    correlation_key: str | None
    headers: Mapping[str, str]
    body: bytes
    wait_seconds: float | None


class Parts(NamedTuple):
    """What a call of `publish` says."""

    message: SagaMessage[Any]
    declared: type[Any] | None
    """The class that the payload was declared to be."""
    options: Any


def parts_of(message: object, rest: tuple[Any, ...], named: dict[str, Any]) -> Parts:
    """The parts of a publish in either way to write it: `(message, options)`, or `(type or class, payload, options)`.
    Takes `payload` and `options` out of `named`."""
    given = list(rest)
    if isinstance(message, (str, type)):
        if "payload" in named:
            given.insert(0, named.pop("payload"))
        payload: Any = given.pop(0) if given else {}
        declared = message if isinstance(message, type) else None
        if declared is not None and not is_declared_class(declared):
            raise MessageRejected(
                f"{declared.__name__} is no message class: publish a dataclass, TypedDict, Struct, attrs class or "
                "pydantic model, or give the type as a string"
            )
        message_type = message if isinstance(message, str) else message_type_of(message)
        received = as_message(SagaMessage[Any](message_type, payload))
    else:
        declared = None
        received = as_message(message)
    if "options" in named:
        given.append(named.pop("options"))
    if len(given) > 1:
        raise MessageRejected(f"publish of {received.type!r:.80} got {len(given) - 1} arguments too many")
    return Parts(received, declared, given[0] if given else None)


def draft_of(
    received: SagaMessage[Any],
    options: Any,
    overrides: Mapping[str, Any],
    *,
    declared: type[Any] | None,
    wait: Any,
    now: datetime,
) -> Draft:
    """What is sent for `received`; raises `MessageRejected` for what cannot be sent."""
    said = {**_checked_options(received.type, options), **_checked_options(received.type, overrides)}
    topic = said.pop("topic", None)
    message = as_message(msgspec.structs.replace(received, **said))
    if topic is not None and not isinstance(topic, str):
        raise MessageRejected(f"message {message.type!r:.80}: topic must be a string, got {topic!r:.80}")
    for name in ("correlation_key", "idempotency_key", "concurrency_key", "id"):
        if (key := getattr(message, name)) is not None:
            check_key(key, what="message id" if name == "id" else name.replace("_", " "))
    try:
        payload = payload_json(message.payload, declared=declared)
    except MessageRejected as error:
        raise MessageRejected(f"message {message.type!r:.80}: {error.message}", data=error.data) from error
    message_id = message.id or new_message_id(now)
    idempotency_key = message.idempotency_key or message_id
    traceparent, tracestate = _trace_of(message)
    body = _Body(
        type=message.type,
        payload=msgspec.Raw(payload) if payload is not None else None,
        correlation_id=message.correlation_key,
        correlation_key=message.correlation_key,
        idempotency_key=idempotency_key,
        concurrency_key=message.concurrency_key,
        message_id=message_id,
        occurred_at=message.occurred_at,
        topic=topic,
        traceparent=traceparent,
        tracestate=tracestate,
    )
    try:
        encoded = msgspec.json.encode(body)
    except UnicodeEncodeError:
        raise MessageRejected(f"message {message.type!r:.80}: its type or topic holds a lone surrogate") from None
    headers = {} if traceparent is None else {"traceparent": traceparent}
    if tracestate is not None:
        headers["tracestate"] = tracestate
    return Draft(
        message_type=message.type,
        message_id=message_id,
        idempotency_key=idempotency_key,
        correlation_key=message.correlation_key,
        headers=headers,
        body=encoded,
        wait_seconds=_wait_seconds(wait),
    )


def _checked_options(message_type: str, options: Any) -> dict[str, Any]:
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise MessageRejected(
            f"message {message_type!r:.80}: its options must be a mapping such as {{'correlation_key': 'o-1'}}, got "
            f"{options!r:.80}"
        )
    given = cast("Mapping[object, Any]", options)
    for name in given:
        if name not in _OPTIONS:
            raise MessageRejected(
                f"message {message_type!r:.80}: unknown publish option {name!r:.80}; known are {', '.join(_OPTIONS)}"
            )
    return {str(name): value for name, value in given.items() if value is not None}


def _wait_seconds(wait: Any) -> float | None:
    if wait is None:
        return None
    seconds = wait.total_seconds() if isinstance(wait, timedelta) else wait
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds <= _WAIT_SECONDS_MAX:
        raise MessageRejected(f"wait={wait!r:.80} must be seconds or a timedelta, 0 up to an hour")
    return float(seconds)


def _trace_of(message: SagaMessage[Any]) -> tuple[str | None, str | None]:
    """The trace context of the message, else that of the current span. What is no trace context is dropped, as the W3C
    asks: tracing never breaks a publish."""
    traceparent, tracestate = message.traceparent, message.tracestate
    if traceparent is None and (current := current_trace()) is not None:
        traceparent, tracestate = current
    if traceparent is None or not _TRACEPARENT.fullmatch(traceparent):
        return None, None
    return traceparent, tracestate if tracestate and _TRACESTATE.fullmatch(tracestate) else None
