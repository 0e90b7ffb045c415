"""Payloads as they come in: JSON, and not too much of it."""

from __future__ import annotations

import msgspec

from sagaloom.codec import encode_any
from sagaloom.errors import MessageRejected, SagasError

__all__ = ["payload_json"]


def payload_json(payload: object, kind: str, name: str, bytes_max: int) -> bytes:
    """`payload` as JSON, or a `MessageRejected` that says what is wrong with that of the `kind` called `name`."""
    if isinstance(payload, msgspec.Raw):
        encoded = bytes(payload)
    else:
        try:
            encoded = encode_any(payload)
        except SagasError as error:
            raise MessageRejected(f"{kind} {name!r}: its payload is not JSON: {error.message}") from error
    if len(encoded) > bytes_max:
        raise MessageRejected(
            f"{kind} {name!r}: its payload has {len(encoded)} bytes, at most {bytes_max} are allowed; store large "
            "things elsewhere and send a reference",
            code="PAYLOAD_TOO_LARGE",
        )
    return encoded
