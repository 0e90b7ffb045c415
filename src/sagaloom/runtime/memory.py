"""What the receiver remembers of the store, so that it need not ask: instances, marks of messages, numbers to give out.

All of it is true only while this process holds the partitions it is about. It is put here after the commit that made it
true, and forgotten as a whole when the outcome of a commit is unknown, or when partitions come or go.

Of keys in partitions that others hold only the head is remembered, for the number and the place that it has: these
never change while it is there, and it is there for as long as its tombstone is kept, for months.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime
from itertools import islice
from typing import Final

from sagaloom.engine.records import Head, Mark
from sagaloom.errors import SagasError, StoreCorrupt
from sagaloom.ids import key_hash, partition_of
from sagaloom.ports.store import Loaded, SagaStore, UnitOfWork
from sagaloom.runtime.cache import Hot, HotInstances
from sagaloom.runtime.deliveries import Delivery, InstanceKey

__all__ = ["Memory"]

_PKS_AT_ONCE: Final = 1_000
_MARKS_REMEMBERED: Final = 50_000
_UNSEEN: Final = Hot(None, None)
_HEADS_SECONDS_MAX: Final = 24 * 3600.0
"""How long the heads of others are believed: by far not as long as the shortest life of a tombstone."""


class Memory:
    """The memory of one receiver."""

    def __init__(self, store: SagaStore, *, bytes_max: int) -> None:
        self._store = store
        self.hot = HotInstances(bytes_max)
        self.marks: dict[tuple[int, str], Mark] = {}
        """Of messages that have come through a door, by the number of their key and their idempotency key."""
        self._pks: list[int] = []
        self._cleared_at = 0.0

    def clear(self) -> None:
        """Forgets what may not be true any more."""
        self.hot.clear()
        self.marks.clear()

    def forget_marks(self, before: datetime) -> None:
        """The store has forgotten the marks of messages that were accepted before `before`."""
        for where in [where for where, mark in self.marks.items() if mark.at < before]:
            del self.marks[where]

    def bound_marks(self) -> None:
        if len(self.marks) > _MARKS_REMEMBERED:
            # Many at once, for the reason given in `HotInstances`.
            for where in list(islice(self.marks, _MARKS_REMEMBERED // 8)):
                del self.marks[where]

    async def learn_marks(self, units: Iterable[UnitOfWork]) -> None:
        """Reads the marks that stand against refused units. Those decided on top of one that was seen before are
        refused for that alone, and may have been seen as well: a batch that comes again is found out as a whole."""
        wanted = [(unit.mark_pk, unit.mark.dedupe_key) for unit in units if unit.mark is not None]
        # If the store does not answer now, the next commit finds the marks again.
        with contextlib.suppress(SagasError):
            for (pk, _), mark in zip(wanted, await self._store.marks(wanted), strict=True):
                if mark is not None:
                    self.marks[pk, mark.dedupe_key] = mark
        self.bound_marks()

    async def load(
        self, batch: Sequence[Delivery], parts: Collection[int]
    ) -> tuple[dict[InstanceKey, Hot], dict[InstanceKey, StoreCorrupt]]:
        """What is known of every key of the batch, and why some cannot be read: one of those does not keep the others
        from their turn. It is remembered from then on; of what does not lie in `parts`, the head."""
        now = asyncio.get_running_loop().time()
        if now > self._cleared_at + _HEADS_SECONDS_MAX:
            self._cleared_at = now
            self.hot.clear()
        newest: dict[InstanceKey, Hot] = {}
        missing: list[InstanceKey] = []
        for delivery in batch:
            key = delivery.key
            if key not in newest:
                hot = self.hot.get(key)
                newest[key] = hot or _UNSEEN
                if hot is None:
                    missing.append(key)
        if not missing:
            return newest, {}
        found, corrupt = await self.read(missing, parts)
        for key, loaded in found.items():
            if loaded.head is not None:
                newest[key] = hot = Hot(loaded.head, loaded.instance)
                if loaded.head.part in parts or loaded.head.tombstone_until is None:
                    self.hot.put(key, hot)
        # Whatever is unseen gets a new head below, and none of the batch gets two.
        if len(self._pks) < len(batch):
            count = max(_PKS_AT_ONCE, len(batch))
            first = await self._store.reserve_pks(count)
            self._pks[:0] = range(first + count - 1, first - 1, -1)
        return newest, corrupt

    async def read(
        self, keys: Sequence[InstanceKey], parts: Collection[int] | None = None
    ) -> tuple[dict[InstanceKey, Loaded], dict[InstanceKey, StoreCorrupt]]:
        """What the store knows of `keys`, and why some of them cannot be read; outside of `parts`, if they are given,
        only of their heads."""
        if not keys:
            return {}, {}
        try:
            return dict(zip(keys, await self._store.load(keys, parts=parts), strict=True)), {}
        except StoreCorrupt:
            found: dict[InstanceKey, Loaded] = {}
            corrupt: dict[InstanceKey, StoreCorrupt] = {}
            for key in keys:
                try:
                    (found[key],) = await self._store.load([key], parts=parts)
                except StoreCorrupt as error:
                    corrupt[key] = error
            return found, corrupt

    def new_head(self, key: InstanceKey, now: datetime) -> Head:
        return Head(
            saga_id=key[0],
            key=key[1],
            pk=self._pks.pop(),
            part=partition_of(key_hash(*key)),
            run=0,
            created_at=now,
            awaits_start=True,
        )
