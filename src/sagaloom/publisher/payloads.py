"""Payloads as they go over the wire: whatever a caller has at hand, as a JSON object, or a refusal naming the place.

1. An instance of a declared class (dataclass, Struct, attrs class, pydantic model) is what its codec makes of it.
2. Anything else is JSON, and dates, times, UUIDs, decimals and enumerations in it become what a declared class would
   make of them: ISO 8601, text, their value. `None` inside is kept; an instance of a declared class may stand anywhere.
3. What is no object at the top is wrapped as `{"value": ...}`, since handlers of other languages expect an object.
   `None` at the top is no payload at all.
4. The rest is refused: numbers that are not finite, keys that are no strings, functions, sets, bytes, circles.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import date, datetime, time
from decimal import Decimal
from enum import Enum
from typing import Any, Final, cast
from uuid import UUID

import msgspec

from sagaloom.codec import codec_for, is_declared_class
from sagaloom.errors import EncodeError, MessageRejected

__all__ = ["payload_json"]

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode
_IDENTIFIER: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def payload_json(payload: object, *, declared: type[Any] | None = None) -> bytes | None:
    """The JSON of `payload`, or None for none. With `declared`, it has to be a value of that class. Raises
    `MessageRejected` naming the place.

    >>> payload_json({"at": date(2026, 1, 31), "note": None})
    b'{"at":"2026-01-31","note":null}'
    >>> payload_json(3)
    b'{"value":3}'
    """
    if declared is not None:
        return _declared_json(payload, declared, "payload")
    if payload is None:
        return None
    if is_declared_class(type(payload)):
        return _declared_json(payload, type(payload), "payload")
    try:
        value = _json_value(payload, "payload")
        return _encode(value if isinstance(value, dict) else {"value": value})
    except RecursionError:
        raise _refusal("payload", "is nested too deep, or contains itself: send a flatter one") from None


def _json_value(value: object, path: str) -> object:
    """`value` as builtins that JSON has."""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, Enum):
        return _json_value(value.value, path)
    if isinstance(value, str):
        return _text(value, path)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise _refusal(path, f"must contain only finite JSON numbers, not {value!r}: send None or a string")
        return float(value)
    if isinstance(value, Mapping):
        parts = cast("Mapping[object, object]", value).items()
        return {_key(key, path): _json_value(part, _at(path, key)) for key, part in parts}
    if isinstance(value, (list, tuple)):
        return [_json_value(part, f"{path}[{number}]") for number, part in enumerate(cast("list[object]", value))]
    if isinstance(value, (datetime, date, time, UUID, Decimal)):
        if isinstance(value, Decimal) and not value.is_finite():
            raise _refusal(path, f"must contain only finite JSON numbers, not {value!r}: send None or a string")
        return _decode(_encode(value))
    if is_declared_class(type(value)):
        return _decode(_declared_json(value, type(value), path))
    if isinstance(value, msgspec.Raw):
        return _raw_value(value, path)
    raise _refusal(
        path,
        f"contains a value that cannot be serialized as JSON: {value!r:.80} ({type(value).__qualname__}); send its "
        "parts as JSON values, or declare a class with such a field",
    )


def _declared_json(value: object, declared: type[Any], path: str) -> bytes:
    try:
        return codec_for(declared).encode(value)
    except EncodeError as error:
        inner = error.data.get("path")
        place = path + inner[1:] if isinstance(inner, str) and inner.startswith("$") else path
        reason = error.message.partition(": ")[2] or error.message
        raise MessageRejected(
            f"{place} contains a value that cannot be serialized as JSON of {declared.__name__}: {reason}",
            data={"path": place},
        ) from error


def _raw_value(value: msgspec.Raw, path: str) -> object:
    try:
        return _decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _refusal(path, f"is no JSON: {error}") from error


def _key(key: object, path: str) -> str:
    if not isinstance(key, str):
        raise _refusal(_at(path, key), "has a key that is no string: send str(key)")
    return _text(key, path)


def _text(text: str, path: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _refusal(path, "contains a lone surrogate, which is no text: remove it") from None
    return str(text)


def _at(path: str, key: object) -> str:
    if isinstance(key, str) and _IDENTIFIER.fullmatch(key):
        return f"{path}.{key}"
    return f"{path}[{key!r:.60}]"


def _refusal(path: str, what: str) -> MessageRejected:
    return MessageRejected(f"{path} {what}", data={"path": path})
