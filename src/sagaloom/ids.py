"""Names for things: instances, partitions, messages, effects. All of them are pure functions, except
`new_message_id`.

An instance has a structured identity (saga id, correlation key, run); its public id is `<saga>:<key>`, or
`<saga>~<run>:<key>` from the second run on. Saga ids contain neither `:` nor `~`, so the id splits in one way only.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import NamedTuple

from sagaloom.errors import DefinitionError, MessageRejected

__all__ = [
    "KEY_BYTES_MAX",
    "PARTITIONS",
    "InstanceRef",
    "check_key",
    "check_saga_id",
    "content_digest",
    "derived_id",
    "effect_key",
    "instance_id",
    "key_hash",
    "new_message_id",
    "new_traceparent",
    "parse_instance_id",
    "partition_of",
]

# BLAKE2 costs half of what SHA-256 does here, and a copy of one that is set up less than one that has to be. Keys keep
# SHA-256: databases can compute it too.
_effect_hash = hashlib.blake2b(digest_size=20).copy
_content_hash = hashlib.blake2b(digest_size=16).copy

# Seeded by the operating system, and again in a forked child: parent and child must not make the same ids.
_random = random.Random()
_random_bits = _random.getrandbits
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_random.seed)

PARTITIONS = 64
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
KEY_BYTES_MAX = 1024
_CONTROLS = re.compile(r"[\x00-\x1f]")
_SURROGATES = re.compile(r"[\ud800-\udfff]")
_INSTANCE_ID = re.compile(r"([^:~]+)(?:~([2-9]|[1-9][0-9]{1,8}))?:(.+)", re.DOTALL)


class InstanceRef(NamedTuple):
    """The structured identity of one run."""

    saga_id: str
    key: str
    run: int


def check_saga_id(saga_id: str) -> str:
    """Returns the trimmed saga id; raises `DefinitionError` when it is empty or holds `:`, `~`, `/` or controls."""
    if not isinstance(saga_id, str):
        raise DefinitionError(f"Saga ID is required. Got {type(saga_id).__name__}: {saga_id!r:.80}.")
    trimmed = saga_id.strip()
    if not trimmed:
        raise DefinitionError("Saga ID is required.")
    if any(sign in trimmed for sign in ":~/") or _CONTROLS.search(trimmed) or _SURROGATES.search(trimmed):
        raise DefinitionError(
            f"saga id {trimmed!r:.80} holds one of ':', '~', '/', a control character or a lone surrogate: the first "
            "separate the parts of an instance id and of a URL; use letters, digits, '-' and '.'"
        )
    return trimmed


def check_key(key: str, what: str = "correlation key") -> str:
    """Returns `key` unchanged; raises `MessageRejected` unless it is 1 to 1024 UTF-8 bytes without control characters
    or lone surrogates."""
    if not isinstance(key, str):
        raise MessageRejected(f"{what} must be a string, got {type(key).__name__}: {key!r:.80}")
    try:
        size = len(key) if key.isascii() else len(key.encode())
    except UnicodeEncodeError:
        raise MessageRejected(f"{what} {key!r:.80} holds a lone surrogate: it is no valid text") from None
    if not size:
        raise MessageRejected(f"{what} is empty: leave it out, or give 1 to {KEY_BYTES_MAX} bytes")
    if size > KEY_BYTES_MAX:
        raise MessageRejected(f"{what} {key[:40]!r}... has {size} bytes: at most {KEY_BYTES_MAX} are allowed")
    if not key.isprintable() and _CONTROLS.search(key):
        raise MessageRejected(f"{what} {key!r:.80} holds a control character: remove it")
    return key


# Asked for several times on the way of a message.
@lru_cache(maxsize=16_384)
def key_hash(saga_id: str, key: str) -> bytes:
    """The 32 bytes by which an instance's keys are unique, placed and found."""
    return hashlib.sha256(f"{saga_id}\0{key}".encode()).digest()


def partition_of(hashed: bytes) -> int:
    """The partition (0 to 63) of a `key_hash`."""
    return hashed[0] % PARTITIONS


def instance_id(saga_id: str, key: str, run: int) -> str:
    """The public id of one run.

    >>> instance_id("order", "o-1", 1), instance_id("order", "o-1", 2)
    ('order:o-1', 'order~2:o-1')
    """
    return f"{saga_id}:{key}" if run <= 1 else f"{saga_id}~{run}:{key}"


def parse_instance_id(text: str) -> InstanceRef:
    """The inverse of `instance_id`; raises `MessageRejected` for anything else."""
    match = _INSTANCE_ID.fullmatch(text)
    if match is None:
        raise MessageRejected(f"{text!r:.80} is no instance id: expected <saga>:<key> or <saga>~<run>:<key>")
    return InstanceRef(match[1], match[3], int(match[2] or 1))


def effect_key(saga_id: str, key: str, run: int, revision: int, position: int) -> str:
    """The name under which an effect leaves, the same after every redelivery, restart and move to another store."""
    hashed = _effect_hash()
    hashed.update(f"{saga_id}\0{key}\0{run}\0{revision}\0{position}".encode())
    return hashed.hexdigest()


def derived_id(prefix: str, *parts: object) -> str:
    """An id that depends on `parts` alone, for things that must get the same id when they are decided again."""
    return prefix + hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:32]


def content_digest(message_type: str, payload: bytes) -> bytes:
    """16 bytes that tell whether two messages under one idempotency key say the same."""
    hashed = _content_hash()
    hashed.update(message_type.encode() + b"\0" + payload)
    return hashed.digest()


class _MessageIds:
    """Makes message ids. It remembers the second of the last one, whose timestamp costs as much as all the rest."""

    __slots__ = ("_second",)

    def __init__(self) -> None:
        self._second = (_EPOCH, _EPOCH, 0)
        """When it begins and ends, and its milliseconds: in one piece, since several threads may ask for ids."""

    def new(self, now: datetime) -> str:
        """A fresh id that sorts by time: 12 hex digits of milliseconds, then 80 random bits."""
        begins, ends, milliseconds = self._second
        if not begins <= now < ends:
            begins = now.replace(microsecond=0)
            milliseconds = int(begins.timestamp()) * 1000
            self._second = (begins, begins + timedelta(seconds=1), milliseconds)
        milliseconds += now.microsecond // 1000
        return (milliseconds << 80 | _random_bits(80)).to_bytes(16, "big").hex()


new_message_id = _MessageIds().new


def new_traceparent() -> str:
    """A fresh W3C trace context, for work that came without one: a trace of its own, marked as sampled."""
    return f"00-{_random_bits(128) | 1:032x}-{_random_bits(64) | 1:016x}-01"
