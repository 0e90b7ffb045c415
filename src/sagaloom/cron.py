"""Cron: five fields and a named zone, and the moments they mean.

    minute  hour  day of month  month  day of week        */15 * * * *     0 3 * * 1-5     30 8 L * *

Numbers, `*`, lists, ranges, steps, English names of three letters, `L` (the last day of a month, and `5L` its last
Friday), `LW` (its last working day), and `1#2` (its second Monday). When neither day field begins with `*`, a day
that fits either of them counts, as in every cron.

Twice a year a zone skips an hour or repeats one. What happens then is what Debian's cron does, and `cronsim` with it:

- a fixed time (neither minute nor hour begins with `*`) that does not exist that day means the first minute after the
  gap, and one that comes twice means the first of the two: it fires once each day, whatever the clock does;
- an expression whose minute or hour begins with `*` follows the time that passes: it fires at every local time that
  fits, so in the hour that comes twice as often as in any other two hours, and never in one that does not exist.

What we dislike about it: in a zone that shifts by half an hour (there is one, Lord Howe Island) an expression of the
second kind can lose one tick at the shift.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from functools import lru_cache
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError

from sagaloom.errors import DefinitionError

__all__ = ["CRON_LENGTH_MAX", "Cron", "parse_cron"]

CRON_LENGTH_MAX = 255

_SEARCHED_FROM = datetime(2000, 1, 1, tzinfo=UTC)
_SECOND = timedelta(seconds=1)
_FOLD_MAX = timedelta(hours=2)


@dataclass(frozen=True, slots=True)
class Cron:
    """An expression in a zone; made by `parse_cron`. Its moments are whole minutes, in UTC."""

    expression: str
    timezone: str

    def after(self, moment: datetime) -> Iterator[datetime]:
        """The moments after `moment`, each once, oldest first. It ends where the next one is fifty years away."""
        last = moment
        for found in _simulated(self, moment.replace(microsecond=0), is_reverse=False):
            # Two local times in a gap are one moment, and the search may begin in the second of two equal hours.
            if found > last:
                last = found
                yield found

    def next_after(self, moment: datetime) -> datetime | None:
        """The first moment after `moment`; None when there is none in fifty years."""
        return next(self.after(moment), None)

    def latest(self, moment: datetime) -> datetime | None:
        """The last moment at or before `moment`; None when there was none in fifty years."""
        start = moment.replace(microsecond=0) + _SECOND
        if start.astimezone(_zone(self.timezone)).fold:
            # From within the second of two equal hours the search back passes over the first one.
            start += _FOLD_MAX
        for found in _simulated(self, start, is_reverse=True):
            if found <= moment:
                return found
        return None


@lru_cache(maxsize=1024)
def parse_cron(expression: str, timezone: str = "UTC") -> Cron:
    """The `Cron` of an expression and the name of a zone; raises `DefinitionError` for what is neither, and for an
    expression that never fires. Blanks around the fields do not matter.

    >>> parse_cron("0 3 * * *", "Europe/Berlin").next_after(datetime(2026, 7, 1, tzinfo=UTC)).isoformat()
    '2026-07-01T01:00:00+00:00'
    """
    fields = expression.split()
    if len(fields) != 5:
        raise DefinitionError(
            f"{expression!r:.80} has {len(fields)} fields: minute, hour, day of month, month, day of week; write for "
            "example '0 3 * * *'"
        )
    if len(expression) > CRON_LENGTH_MAX:
        raise DefinitionError(
            f"{expression!r:.40} has {len(expression)} characters: at most {CRON_LENGTH_MAX} are read"
        )
    cron = Cron(" ".join(fields), timezone)
    _zone(timezone)
    try:
        CronSim(cron.expression, _SEARCHED_FROM)
    except (CronSimError, AssertionError) as error:
        if _is_read(" ".join((*fields[:3], "*", fields[4]))) and _is_read(f"* * * {fields[3]} *"):
            raise _never(expression) from error
        raise DefinitionError(
            f"{expression!r:.80} is no cron expression ({error}): minute, hour, day of month, month, day of week; "
            "write for example '0 3 * * *'"
        ) from error
    if cron.next_after(_SEARCHED_FROM) is None:
        raise _never(expression)
    return cron


def _is_read(expression: str) -> bool:
    try:
        CronSim(expression, _SEARCHED_FROM)
    except (CronSimError, AssertionError):
        return False
    return True


def _never(expression: str) -> DefinitionError:
    return DefinitionError(f"{expression!r:.80} never fires: none of its months has such a day; correct one of the two")


def _simulated(cron: Cron, start: datetime, *, is_reverse: bool) -> Iterator[datetime]:
    try:
        for found in CronSim(cron.expression, start.astimezone(_zone(cron.timezone)), reverse=is_reverse):
            yield found.astimezone(UTC)
    except (OverflowError, ValueError):  # the calendar ends with the year 9999
        return


@lru_cache(maxsize=256)
def _zone(name: str) -> tzinfo:
    if name == "UTC":
        return UTC  # Known without a time zone database, which not every system has.
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise DefinitionError(
            f"time zone {name!r:.80} is unknown here: give a name such as 'UTC' or 'Europe/Berlin'; where the system "
            "has no time zone database, install the package tzdata"
        ) from error
