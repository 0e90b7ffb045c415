"""The rows of the baselines: table by table what the store writes for one order, with the sizes of the real ones.

Frozen on purpose: a store that begins to write more must look slower beside these, not drag them along. When it writes
other rows for a good reason, `python -m bench --rows` says what they are now, and the change here is a change of the
yardstick, to be explained as one.
"""

from __future__ import annotations

import hashlib
import random
import struct
from typing import Final

__all__ = [
    "BYTES_PER_MESSAGE",
    "DEDUPE_BYTES",
    "EFFECT_BYTES",
    "EVENTS",
    "FEED_BYTES",
    "HEAD_BYTES",
    "INBOX_BYTES",
    "PARTITIONS",
    "ROWS_PER_ORDER",
    "STATE_BYTES",
    "TABLES",
    "TRANSITION_BYTES",
    "correlation_key",
    "dedupe_key",
    "feed_key",
    "index_key",
    "outbox_key",
    "partitions",
    "state_key",
    "transition_key",
]

TABLES: Final = ("correlation", "state", "instance_index", "transition", "dedupe", "inbox", "outbox", "feed", "lease")
PARTITIONS: Final = 64

# Bytes of the values that the first, second and third message of an order write.
STATE_BYTES: Final = (401, 422, 490)
TRANSITION_BYTES: Final = (273, 252, 278)
EFFECT_BYTES: Final = (223, 223, 216)
FEED_BYTES: Final = (116, 103, 121)  # of one row a commit, each message's share of it
EVENTS: Final = (3, 2, 3)
DEDUPE_BYTES: Final = 98
HEAD_BYTES: Final = 39
INBOX_BYTES: Final = (216, 196, 207)

ROWS_PER_ORDER: Final = {
    "correlation": 1,
    "state": 3,
    "instance_index": 2,
    "transition": 3,
    "dedupe": 3,
    "outbox": 3,
    "feed": 3,
}
"""Rows that one order writes when each message has a commit of its own; then it deletes one of instance_index and
three of outbox."""

# Values and keys of the rows above, a third of an order: what a log would have to hold of one message.
BYTES_PER_MESSAGE: Final = (
    sum(STATE_BYTES) + sum(TRANSITION_BYTES) + sum(EFFECT_BYTES) + sum(FEED_BYTES) + 3 * DEDUPE_BYTES + HEAD_BYTES + 270
) // 3


def _int(number: int) -> bytes:
    """An int of a key: a tag that says how wide it is, and the number, so that bytes sort as numbers do."""
    if number < 256:
        return bytes((0x11, number))
    if number < 65536:
        return struct.pack(">BH", 0x12, number)
    if number < 2**32:
        return struct.pack(">BI", 0x13, number)
    return struct.pack(">BQ", 0x14, number)


_SAGA: Final = b"0bench-order\0"
_CREATED: Final = 1_700_000_000_000_000


def correlation_key(pk: int) -> bytes:
    return _SAGA + b" " + hashlib.sha256(str(pk).encode()).digest() + b"\0"


def state_key(pk: int) -> bytes:
    return _int(pk) + _int(1)


def index_key(pk: int, status: bytes) -> bytes:
    return _SAGA + b"0" + status + b"\0" + _int(_CREATED + pk) + _int(pk) + _int(1)


def transition_key(pk: int, entry: int) -> bytes:
    return _int(pk) + _int(1) + _int(entry)


def dedupe_key(pk: int, entry: int) -> bytes:
    return _int(pk) + b" " + hashlib.sha256(f"{pk}.{entry}".encode()).digest()[:16] + b"\0"


def outbox_key(part: int, number: int) -> bytes:
    return _int(part) + _int(number)


def feed_key(number: int) -> bytes:
    return _int(number)


def partitions(orders: int) -> list[int]:
    """The partition of each order; the same ones every time."""
    rng = random.Random(20)
    return [rng.randrange(PARTITIONS) for _ in range(orders)]
