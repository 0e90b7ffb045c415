"""Payloads on the command line: JSON as it stands, from a file, or from stdin."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from sagaloom.cli.client import CommandFailed

__all__ = ["json_of"]

_PAYLOAD_BYTES_MAX: Final = 64 << 20


def json_of(payload: str) -> object:
    """What `--payload` says: JSON, `@FILE`, or `-` for stdin."""
    import msgspec

    try:
        if payload == "-":
            content = sys.stdin.buffer.read(_PAYLOAD_BYTES_MAX)
        elif payload.startswith("@"):
            content = Path(payload[1:]).read_bytes()
        else:
            content = payload.encode()
        return msgspec.json.decode(content)
    except (OSError, UnicodeError) as error:
        raise CommandFailed(f"--payload {payload:.80} cannot be read: {error}", exit_code=2) from error
    except msgspec.DecodeError as error:
        raise CommandFailed(
            f'--payload is no JSON: {error}; for example --payload \'{{"orderId": "o-1"}}\'', exit_code=2
        ) from error
