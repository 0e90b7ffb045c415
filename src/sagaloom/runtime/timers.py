"""Timers as people see them: what waits for its time, and for whom."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Final

import msgspec

from sagaloom.engine.records import PendingTimer, Timer
from sagaloom.errors import MessageRejected
from sagaloom.ports.store import SagaStore

__all__ = ["WaitingTimer", "waiting_timers"]

_PAGE: Final = 500
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)


class WaitingTimer(msgspec.Struct, frozen=True, kw_only=True):
    """A message that a run gets at `due_at`. `name` is what its saga calls it, if anything. `cursor` is its place in
    the list, for the page after it."""

    id: str
    due_at: datetime
    name: str | None
    saga_id: str
    key: str
    run: int
    message_type: str
    cursor: str


async def waiting_timers(
    store: SagaStore, *, saga_id: str | None, key: str | None, after: str | None, limit: int
) -> list[WaitingTimer]:
    """The timers of a saga and a correlation key, or of all, by due time. Reads on until there are `limit` of them,
    so one key among very many timers takes its time."""
    if limit < 1:
        raise MessageRejected(f"{limit} timers cannot be listed: give a limit from 1 on", data={"field": "limit"})
    place = None if after is None else _place(after)
    found: list[WaitingTimer] = []
    while True:
        page = await store.timers(after=place, limit=_PAGE)
        for timer in page:
            envelope = timer.envelope
            if saga_id not in (None, envelope.saga_id) or key not in (None, envelope.key):
                continue
            found.append(_waiting(timer))
            if len(found) == limit:
                return found
        if len(page) < _PAGE:
            return found
        place = PendingTimer(page[-1].id, page[-1].due_at)
        await asyncio.sleep(0)


def _waiting(timer: Timer) -> WaitingTimer:
    envelope = timer.envelope
    return WaitingTimer(
        id=timer.id,
        due_at=timer.due_at,
        name=timer.name,
        saga_id=envelope.saga_id,
        key=envelope.key,
        run=envelope.run or 1,
        message_type=envelope.type,
        cursor=f"{(timer.due_at - _EPOCH) // _MICROSECOND}-{timer.id}",
    )


def _place(cursor: str) -> PendingTimer:
    micros, separator, identifier = cursor.partition("-")
    try:
        if not separator or not identifier:
            raise ValueError(cursor)
        return PendingTimer(identifier, _EPOCH + int(micros) * _MICROSECOND)
    except (ValueError, OverflowError) as error:
        raise MessageRejected(
            f"{cursor!r:.80} is no cursor of this listing: leave it out to start over", data={"field": "after"}
        ) from error
