"""Payloads as they come in: JSON, and not too much of it."""

from __future__ import annotations

from typing import Any

import msgspec

from sagaloom.codec import encode_any_and_read
from sagaloom.errors import MessageRejected, SagasError

__all__ = ["payload_json", "payload_json_and_read"]


def payload_json(payload: object, kind: str, name: str, bytes_max: int) -> bytes:
    """`payload` as JSON, or a `MessageRejected` that says what is wrong with that of the `kind` called `name`."""
    return payload_json_and_read(payload, kind, name, bytes_max)[0]


def payload_json_and_read(payload: object, kind: str, name: str, bytes_max: int) -> tuple[bytes, Any]:
    """The same, and what an untyped handler takes that JSON for; `UNSET` when nobody has read it yet."""
    read: Any = msgspec.UNSET
    if isinstance(payload, msgspec.Raw):
        encoded = bytes(payload)
    else:
        try:
            encoded, read = encode_any_and_read(payload)
        except SagasError as error:
            raise MessageRejected(f"{kind} {name!r}: its payload is not JSON: {error.message}") from error
    if len(encoded) > bytes_max:
        raise MessageRejected(
            f"{kind} {name!r}: its payload has {len(encoded)} bytes, at most {bytes_max} are allowed; store large "
            "things elsewhere and send a reference",
            code="PAYLOAD_TOO_LARGE",
        )
    return encoded, read
