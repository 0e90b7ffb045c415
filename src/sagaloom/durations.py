"""How long: the grammar of delays.

A delay is a timedelta, a number of milliseconds, or an integer with one of the suffixes `ms`, `s`, `m`, `h`, `d`
(`"250ms"`, `"30s"`, `"5m"`, `"2h"`, `"1d"`); where a moment is meant, an aware datetime.
"""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from sagaloom.errors import DefinitionError

__all__ = ["check_delay", "parse_duration", "resolve_delay"]

_TEXT = re.compile(r"([0-9]+)(ms|s|m|h|d)")
_UNIT_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_LONGEST = timedelta(days=3650)
_TOO_LONG_MS = 10**14

D = TypeVar("D", bound="datetime | timedelta | float | str")


def parse_duration(delay: timedelta | float | str) -> timedelta:
    """The length of `delay`, at most ten years; raises `DefinitionError` for anything else.

    >>> parse_duration("90s"), parse_duration(250)
    (datetime.timedelta(seconds=90), datetime.timedelta(microseconds=250000))
    """
    if isinstance(delay, timedelta):
        length = delay
    elif isinstance(delay, str):
        match = _TEXT.fullmatch(delay)
        if match is None or len(match[1]) > 15:
            raise DefinitionError(
                f"Schedule delay must use an ms, s, m, h, or d suffix. {delay!r:.80} does not; write for example '5m'."
            )
        length = timedelta(milliseconds=min(int(match[1]) * _UNIT_MS[match[2]], _TOO_LONG_MS))
    elif isinstance(delay, bool) or not isinstance(delay, (int, float)) or not _is_finite(delay):
        raise DefinitionError(f"Schedule delay must be a non-negative finite number. Got {delay!r:.80}.")
    else:
        # Bounded on both sides before any arithmetic: timedelta and repr refuse huge integers with errors of their own.
        delay = max(min(delay, _TOO_LONG_MS), -_TOO_LONG_MS)
        length = timedelta(milliseconds=delay)
    if length < timedelta(0):
        raise DefinitionError(f"Schedule delay must be a non-negative finite number. Got {delay!r:.80}.")
    if length > _LONGEST:
        raise DefinitionError(f"delay {delay!r:.80} is longer than ten years: give an aware datetime if it is meant")
    return length


def check_delay(delay: D) -> D:
    """Returns `delay` unchanged when `resolve_delay` will accept it; raises `DefinitionError` otherwise."""
    if isinstance(delay, datetime):
        if delay.utcoffset() is None:
            raise DefinitionError(f"delay {delay.isoformat()} has no time zone: give an aware datetime, such as in UTC")
    else:
        parse_duration(delay)
    return delay


def resolve_delay(delay: datetime | timedelta | float | str, now: datetime) -> datetime:
    """The moment that `delay` means at `now`, in UTC. A moment in the past is `now`: late rather than never.

    >>> resolve_delay("2h", datetime(2026, 1, 31, 12, tzinfo=UTC)).isoformat()
    '2026-01-31T14:00:00+00:00'
    """
    if isinstance(delay, datetime):
        return max(check_delay(delay).astimezone(UTC), now)
    return now + parse_duration(delay)


def _is_finite(number: float) -> bool:
    return isinstance(number, int) or math.isfinite(number)
