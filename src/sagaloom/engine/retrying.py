"""Whether an attempt is made again, and when.

What user code raises is retried by the saga's policy, each time against the then current state; `SagasError` with
`retryable=False` and the types the policy lists are not. What the engine itself refuses (a handler that returned the
wrong thing, a state that cannot be encoded) is never retried: it would be refused again.

The jitter is a hash of the message id and the attempt, so that deciding twice gives the same moment.
"""

from __future__ import annotations

import hashlib
import traceback
from datetime import timedelta

from sagaloom.definitions import RetryPolicy
from sagaloom.errors import SagasError

__all__ = ["USER_ERRORS", "backoff", "describe", "has_to_be_awaited", "is_retryable", "storable", "traceback_text"]

USER_ERRORS = (Exception, SystemExit)
"""What a call into user code may raise without ending the worker. `sys.exit()` in a handler is a bug of that handler:
let through, the same message would end every worker that ever picks it up."""

_TEXT_MAX = 2_000
_TRACEBACK_MAX = 16_000


def has_to_be_awaited(returned: object) -> bool:
    """Whether user code gave back a coroutine or the like, which nobody here awaits. It is closed: else it would warn
    that it was never awaited, long after and far from here."""
    if not hasattr(returned, "__await__"):
        return False
    close = getattr(returned, "close", None)
    if callable(close):
        close()
    return True


def is_retryable(error: BaseException, policy: RetryPolicy) -> bool:
    """Whether trying again can help. `non_retryable_error_types` names classes, bases included."""
    if isinstance(error, SagasError) and not error.retryable:
        return False
    listed = policy.non_retryable_error_types
    return not listed or not any(ancestor.__name__ in listed for ancestor in type(error).__mro__)


def backoff(policy: RetryPolicy, *, attempt: int, message_id: str) -> timedelta:
    """The wait after attempt number `attempt` (from 1) has failed."""
    try:
        grown = policy.initial_interval_ms * policy.backoff_coefficient ** (attempt - 1)
    except OverflowError:
        grown = policy.maximum_interval_ms
    digest = hashlib.sha256(f"{message_id}\0{attempt}".encode(errors="surrogatepass")).digest()
    fraction = int.from_bytes(digest[:8], "big") / 2**64
    wait_ms = min(grown, policy.maximum_interval_ms) * (1 - policy.jitter * fraction)
    return timedelta(milliseconds=max(0, round(wait_ms)))


def describe(error: BaseException) -> str:
    """The error in one line, class first; never raises, whatever its `__str__` does."""
    try:
        text = str(error)
    except USER_ERRORS as broken:
        text = f"(its text cannot be shown: {type(broken).__name__})"
    name = type(error).__name__
    return storable(f"{name}: {text}" if text else name)[:_TEXT_MAX]


def storable(text: str) -> str:
    """`text` as UTF-8 can carry it: lone surrogates, which file names and broken input bring along, are spelled out."""
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()


def traceback_text(error: BaseException) -> str:
    """The traceback from the first frame of user code on, its tail if it is long."""
    frames = error.__traceback__
    try:
        lines = traceback.format_exception(type(error), error, frames.tb_next if frames is not None else None)
    except USER_ERRORS:
        return describe(error)
    return storable("".join(lines))[-_TRACEBACK_MAX:]
