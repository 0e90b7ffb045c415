"""What people read of a key-value saga store: runs, their history and children, dead letters, the feed.

None of it is in the way of a message. It takes whatever is committed at that moment, and neither believes nor teaches
anything (`sagaloom.stores.beliefs`): a page that was read while runs changed may show some as they were and others as
they are.

The feed is numbered by event and kept in rows of one commit each, so the row that holds a number may begin before it.
Where rows have been pruned the numbers go on, and a page begins with the first event that is kept.

What we dislike about it: a listing over many sagas merges as many scans as there are sagas times statuses
(`sagaloom.stores.listing`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from sagaloom.engine.records import Child, ChildStatus, DeadLetter, FeedEvent, HistoryEntry, Instance, SagaStanding
from sagaloom.ports.keyvalue import Key, KeyValue
from sagaloom.ports.store import InstanceFilter
from sagaloom.stores.listing import Listing
from sagaloom.stores.reading import ReadingStore
from sagaloom.stores.rows import (
    CHILD_STATUSES,
    all_below,
    children_key,
    decode_child,
    decode_dead_letter,
    decode_entry,
    decode_events,
    decode_head,
    decode_instance,
    decode_standing,
    decoded,
    head_key,
    number_of,
    placed,
)

__all__ = ["LookingStore"]

_PAGE: Final = 256
_COUNTED_MAX: Final = 10_000_000


class LookingStore(ReadingStore):
    """The part of a `KvSagaStore` that people read."""

    def __init__(self, kv: KeyValue, *, reads_only: bool = False) -> None:
        super().__init__(kv, reads_only=reads_only)
        self._listing = Listing(kv)

    async def instances(
        self, wanted: InstanceFilter, *, limit: int, offset: int = 0, cursor: str | None = None
    ) -> tuple[list[Instance], str | None]:
        await self.open()
        return await self._listing.page(wanted, limit=limit, offset=offset, cursor=cursor)

    async def count_instances(self, wanted: InstanceFilter, *, limit: int = 10_000) -> int:
        await self.open()
        return await self._listing.count(wanted, limit=limit)

    async def runs(self, saga_id: str, key: str) -> list[Instance]:
        await self.open()
        head = await self._read(head_key(saga_id, key), decode_head)
        found: list[Instance] = []
        before: Key | None = None
        while head is not None:
            rows = await self._kv.scan(("state", head.pk), before=before, limit=_PAGE, reverse=True)
            found += [decoded(self._kv, row, decode_instance) for row in rows]
            if len(rows) < _PAGE:
                break
            before = rows[-1].key
        return found

    async def history(self, instance: Instance, *, after_entry: int = 0, limit: int = 50) -> list[HistoryEntry]:
        await self.open()
        prefix: Key = ("transition", instance.pk, instance.run)
        rows = await self._kv.scan(prefix, after=(*prefix, after_entry), limit=limit)
        return [decoded(self._kv, row, decode_entry) for row in rows]

    async def children(
        self, pk: int, run: int, *, status: ChildStatus = "live", after: tuple[int, int] | None = None, limit: int = 50
    ) -> list[Child]:
        await self.open()
        prefix = children_key(pk, run, status)
        rows = await self._kv.scan(prefix, after=None if after is None else (*prefix, *after), limit=limit)
        return [decoded(self._kv, row, decode_child) for row in rows]

    async def count_children(self, pk: int, run: int) -> Mapping[ChildStatus, int]:
        await self.open()
        return {each: await self._kv.count(children_key(pk, run, each), limit=_COUNTED_MAX) for each in CHILD_STATUSES}

    async def dead_letters(
        self, *, saga_id: str | None = None, key: str | None = None, after: str | None = None, limit: int = 50
    ) -> list[DeadLetter]:
        await self.open()
        if saga_id is None:
            prefix: Key = ("dead_letter",)
        elif key is None:
            prefix = ("dead_letter_index", saga_id, b"")
        else:
            prefix = ("dead_letter_index", saga_id, placed(saga_id, key)[0])
        found: list[DeadLetter] = []
        before = None if after is None else (*prefix, after)
        while len(found) < limit:
            rows = await self._kv.scan(prefix, before=before, limit=limit, reverse=True)
            if saga_id is None:
                letters = [decoded(self._kv, row, decode_dead_letter) for row in rows]
            else:
                keys: list[Key] = [("dead_letter", row.key[-1]) for row in rows]
                read = await self._read_many(keys, decode_dead_letter)
                letters = [letter for letter in read if letter is not None]
            found += [letter for letter in letters if key is None or letter.key == key]
            if len(rows) < limit:
                break
            before = rows[-1].key
        return found[:limit]

    async def dead_letter(self, dead_letter_id: str) -> DeadLetter | None:
        await self.open()
        return await self._read(("dead_letter", dead_letter_id), decode_dead_letter)

    async def feed(self, *, after: int, limit: int) -> list[tuple[int, FeedEvent]]:
        await self.open()
        # The row that holds number after + 1 may begin before it.
        rows = await self._kv.scan(("feed",), before=("feed", after + 2), limit=1, reverse=True)
        begin: Key = rows[-1].key if rows else ("feed", after)
        # A row says where it begins: those that begin behind the page are not even read.
        rows += await self._kv.scan(("feed",), after=begin, before=("feed", after + limit + 1), limit=limit)
        found: list[tuple[int, FeedEvent]] = []
        for row in rows:
            number = number_of(row)
            for event in decoded(self._kv, row, decode_events):
                if number > after and len(found) < limit:
                    found.append((number, event))
                number += 1
        if not found and limit > 0:
            # Nothing in the whole page: the feed has ended, or what came next has been pruned.
            kept = await self._kv.scan(("feed",), after=("feed", after), limit=1)
            return await self.feed(after=number_of(kept[0]) - 1, limit=limit) if kept else []
        return found

    async def feed_bounds(self) -> tuple[int, int]:
        await self.open()
        oldest = await self._kv.scan(("feed",), limit=1)
        newest = await self._kv.scan(("feed",), limit=1, reverse=True)
        if not oldest or not newest:
            return 1, 0
        events = len(decoded(self._kv, newest[0], decode_events))
        return number_of(oldest[0]), number_of(newest[0]) + events - 1

    async def standings(self) -> list[SagaStanding]:
        await self.open()
        return [decoded(self._kv, row, decode_standing) for row in await all_below(self._kv, ("standing",))]
