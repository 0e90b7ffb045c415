"""Commits of job runs that are asked for at the same time, made together.

A commit costs a flush of the disk, or a round trip, however little is in it. While one is under way, or in the same
turn of the event loop, others are asked for; they wait, and go as one. Each of them stands or falls alone: when one
meets a conflict nothing was written, it is told so, and the others go again without it.

Two that touch the same rows are never in one commit: the second one would check what the first one changes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

import msgspec

from sagaloom.ports.jobs import JobEvent
from sagaloom.ports.keyvalue import Check, Committed, Conflicted, Key, KeyValue
from sagaloom.stores.job_rows import EVENT_COUNTER, event_rows

__all__ = ["JobCommits"]

_TOGETHER_MAX: Final = 64


class _Asked(msgspec.Struct, eq=False):
    """One commit that somebody waits for. `keys` are those that it checks, inserts or deletes."""

    events: Sequence[JobEvent]
    checks: Sequence[Check]
    inserts: Sequence[tuple[Key, bytes]]
    puts: Sequence[tuple[Key, bytes]]
    deletes: Sequence[Key]
    keys: frozenset[Key]
    answer: asyncio.Future[Committed | Conflicted]


class JobCommits:
    """Commits to `rows`."""

    def __init__(self, rows: KeyValue) -> None:
        self._rows = rows
        self._waiting: list[_Asked] = []
        self._writing: asyncio.Task[None] | None = None

    async def commit(
        self,
        events: Sequence[JobEvent] = (),
        *,
        checks: Sequence[Check] = (),
        inserts: Sequence[tuple[Key, bytes]] = (),
        puts: Sequence[tuple[Key, bytes]] = (),
        deletes: Sequence[Key] = (),
    ) -> Committed | Conflicted:
        """What `KeyValue.commit` says, of a commit that also shows these events."""
        keys = frozenset((*(check.key for check in checks), *(key for key, _ in inserts), *deletes))
        asked = _Asked(events, checks, inserts, puts, deletes, keys, asyncio.get_running_loop().create_future())
        self._waiting.append(asked)
        if self._writing is None:
            self._writing = asyncio.create_task(self._write_all(), name="sagaloom-job-commits")
        return await asked.answer

    async def _write_all(self) -> None:
        try:
            while self._waiting:
                await self._write(self._next_group())
                await asyncio.sleep(0)  # those who have their answer may ask for more
        finally:
            self._writing = None

    def _next_group(self) -> list[_Asked]:
        group: list[_Asked] = []
        later: list[_Asked] = []
        keys: set[Key] = set()
        for asked in self._waiting:
            if len(group) < _TOGETHER_MAX and keys.isdisjoint(asked.keys):
                group.append(asked)
            else:
                later.append(asked)
            # Also of one that has to wait: nobody behind it may overtake it to the same rows.
            keys |= asked.keys
        self._waiting = later
        return group

    async def _write(self, group: Sequence[_Asked]) -> None:
        events = [event for asked in group for event in asked.events]
        try:
            done = await self._rows.commit(
                checks=[check for asked in group for check in asked.checks],
                inserts=[*(row for asked in group for row in asked.inserts), *event_rows(events)],
                puts=list(dict(row for asked in group for row in asked.puts).items()),
                deletes=[key for asked in group for key in asked.deletes],
                reserve={EVENT_COUNTER: len(events)} if events else None,
            )
        except BaseException as error:
            for asked in group:
                if not asked.answer.done():
                    asked.answer.set_exception(error)
                    asked.answer.exception()  # whoever asked may have gone
            if not isinstance(error, Exception):
                raise
            return
        if isinstance(done, Committed):
            for asked in group:
                _tell(asked, done)
            return
        failed = frozenset(done.failed)
        for asked in group:
            if not failed.isdisjoint(asked.keys):
                _tell(asked, Conflicted(tuple(key for key in done.failed if key in asked.keys)))
        self._waiting[:0] = [asked for asked in group if failed.isdisjoint(asked.keys)]


def _tell(asked: _Asked, answer: Committed | Conflicted) -> None:
    if not asked.answer.done():
        asked.answer.set_result(answer)
