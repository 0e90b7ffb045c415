"""Listing the runs of a key-value saga store: newest first, merged over sagas and statuses, a page at a time."""

from __future__ import annotations

import base64
import binascii
import heapq
from collections.abc import AsyncIterator, Sequence
from typing import Final

from sagaloom.definitions import SAGA_INSTANCE_STATUSES
from sagaloom.engine.records import Instance
from sagaloom.errors import MessageRejected
from sagaloom.ports.keyvalue import Entry, Key, KeyValue
from sagaloom.ports.store import InstanceFilter
from sagaloom.stores.rows import all_below, decode_head, decode_instance, decoded, micros, pending_instance

__all__ = ["Listing", "from_cursor", "to_cursor"]

_PAGE: Final = 256


class Listing:
    """Reads the instance index."""

    def __init__(self, kv: KeyValue) -> None:
        self._kv = kv

    async def page(
        self, wanted: InstanceFilter, *, limit: int, offset: int = 0, cursor: str | None = None
    ) -> tuple[list[Instance], str | None]:
        found: list[Instance] = []
        skip = offset
        async for instance in self._listed(wanted, None if cursor is None else from_cursor(cursor), limit + offset + 1):
            if skip:
                skip -= 1
            elif len(found) < limit:
                found.append(instance)
            else:
                return found, to_cursor(found[-1]) if found else None
        return found, None

    async def count(self, wanted: InstanceFilter, *, limit: int = 10_000) -> int:
        counted = 0
        if wanted.key_prefix or wanted.version_below is not None:
            async for _ in self._listed(wanted, None, _PAGE):
                counted += 1
                if counted >= limit:
                    break
            return min(counted, limit)
        for prefix in await self._index_prefixes(wanted):
            if counted >= limit:
                break
            if wanted.created_after is None and wanted.created_before is None:
                counted += await self._kv.count(prefix, limit=limit - counted)
            else:
                async for _ in _Walk(self._kv, prefix, wanted, None, _PAGE):
                    counted += 1
                    if counted >= limit:
                        break
        return counted

    async def _listed(
        self, wanted: InstanceFilter, before: tuple[int, int, int] | None, expected: int
    ) -> AsyncIterator[Instance]:
        """The instances that `wanted` asks for, newest first, below the position `before`."""
        page = max(1, min(expected, _PAGE))
        walks = [_Walk(self._kv, prefix, wanted, before, page) for prefix in await self._index_prefixes(wanted)]
        ahead: list[tuple[int, int, int, int, Entry]] = []
        for order, walk in enumerate(walks):
            if (row := await walk.next()) is not None:
                ahead.append((*_newest_first(row), order, row))
        heapq.heapify(ahead)
        while ahead:
            rows: list[Entry] = []
            while ahead and len(rows) < page:
                order, row = ahead[0][3:]
                rows.append(row)
                if (following := await walks[order].next()) is None:
                    heapq.heappop(ahead)
                else:
                    heapq.heapreplace(ahead, (*_newest_first(following), order, following))
            for instance in await self._instances_of(rows):
                if instance is None or not instance.key.startswith(wanted.key_prefix):
                    continue
                if wanted.version_below is None or instance.def_version < wanted.version_below:
                    yield instance

    async def _instances_of(self, rows: Sequence[Entry]) -> list[Instance | None]:
        """What index rows stand for; None where a run has changed its status since the index was read."""
        keys: list[Key] = [("state", *row.key[4:]) for row in rows if not row.value]
        read = iter(await self._read(keys))
        found: list[Instance | None] = []
        for row in rows:
            if row.value:
                found.append(pending_instance(decoded(self._kv, row, decode_head)))
            else:
                instance = next(read)
                found.append(instance if instance is not None and instance.status == row.key[2] else None)
        return found

    async def _index_prefixes(self, wanted: InstanceFilter) -> list[Key]:
        saga_ids = wanted.saga_ids or await self._saga_ids()
        statuses = wanted.statuses or SAGA_INSTANCE_STATUSES
        return [
            ("instance_index", saga_id, status)
            for saga_id in dict.fromkeys(saga_ids)
            for status in dict.fromkeys(statuses)
        ]

    async def _saga_ids(self) -> tuple[str, ...]:
        return tuple(str(row.key[1]) for row in await all_below(self._kv, ("saga_seen",)))

    async def _read(self, keys: Sequence[Key]) -> list[Instance | None]:
        rows = await self._kv.get_many(keys) if keys else []
        return [None if row is None else decoded(self._kv, row, decode_instance) for row in rows]


class _Walk:
    """The index rows of one saga and status, newest first, a page at a time."""

    def __init__(
        self,
        kv: KeyValue,
        prefix: Key,
        wanted: InstanceFilter,
        before: tuple[int, int, int] | None,
        page: int,
    ) -> None:
        self._kv = kv
        self._prefix = prefix
        # A key sorts before those that continue it, so the lower bound is inclusive and the upper one is not.
        self._after: Key | None = None
        if wanted.created_after is not None:
            self._after = (*prefix, micros(wanted.created_after))
        self._before: Key | None = None if before is None else (*prefix, *before)
        if wanted.created_before is not None:
            bound = micros(wanted.created_before)
            if before is None or bound <= before[0]:
                self._before = (*prefix, bound)
        self._page = page
        self._rows: list[Entry] = []
        self._at = 0
        self._is_last = False

    async def next(self) -> Entry | None:
        if self._at == len(self._rows):
            if self._is_last:
                return None
            self._rows = await self._kv.scan(
                self._prefix, after=self._after, before=self._before, limit=self._page, reverse=True
            )
            self._at = 0
            self._is_last = len(self._rows) < self._page
            if not self._rows:
                return None
            self._before = self._rows[-1].key
        self._at += 1
        return self._rows[self._at - 1]

    def __aiter__(self) -> _Walk:
        return self

    async def __anext__(self) -> Entry:
        row = await self.next()
        if row is None:
            raise StopAsyncIteration
        return row


def _newest_first(row: Entry) -> tuple[int, int, int]:
    created, pk, run = row.key[3:]
    assert isinstance(created, int)
    assert isinstance(pk, int)
    assert isinstance(run, int)
    return -created, -pk, -run


def to_cursor(instance: Instance) -> str:
    """Where a page ends whose last run is `instance`."""
    position = f"{micros(instance.created_at)}.{instance.pk}.{instance.run}"
    return base64.urlsafe_b64encode(position.encode()).decode().rstrip("=")


def from_cursor(cursor: str) -> tuple[int, int, int]:
    """The place of a cursor: created_at in microseconds, pk, run."""
    try:
        position = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode()
        created, pk, run = map(int, position.split("."))
    except (ValueError, binascii.Error) as error:
        raise MessageRejected(f"{cursor!r:.80} is no cursor of this listing: leave it out to start over") from error
    return created, pk, run
