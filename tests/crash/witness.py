"""The witness: looks at the store from beside the workers. It says who holds which partition, and follows the feed
while several processes commit to it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import msgspec

from sagaloom.errors import BackendUnavailable
from sagaloom.ids import PARTITIONS
from sagaloom.ports.keyvalue import KeyValue
from sagaloom.ports.store import SagaStore
from tests.crash.places import Place

__all__ = ["Witness"]

_FEED_PAGE: Final = 500
_FEED_PAUSE_SECONDS: Final = 0.05
_TRIES: Final = 100
_TRY_SECONDS: Final = 0.1

T = TypeVar("T")

_decode_lease = msgspec.msgpack.Decoder(tuple[str, int]).decode


class Witness:
    """Reads the store at `place`."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self.feed_seen = 0
        """The newest number of the feed that it has read."""

    async def holders(self) -> dict[int, str]:
        """By whom each partition is held; those that are free are left out."""
        found: dict[int, str] = {}
        for part, value in await self._rows("lease"):
            assert isinstance(part, int)
            holder, _ = _decode_lease(value)
            if holder:
                found[part] = holder
        return found

    async def parts_of(self, holder: str) -> frozenset[int]:
        return frozenset(part for part, found in (await self.holders()).items() if found == holder)

    async def members(self) -> list[str]:
        """Everybody who has entered, and neither left nor was buried."""
        return [str(holder) for holder, _ in await self._rows("member")]

    async def follow_feed(self, odd: Callable[[str], None]) -> None:
        """Reads the feed from where it was left, until cancelled. Tells of every gap and repeat (I8)."""
        while True:
            if await self.read_feed(odd) < _FEED_PAGE:
                await asyncio.sleep(_FEED_PAUSE_SECONDS)

    async def read_feed(self, odd: Callable[[str], None]) -> int:
        """Reads one page of the feed, and returns how many events it had."""
        page = await self._ask(lambda _, store: store.feed(after=self.feed_seen, limit=_FEED_PAGE))
        for number, _ in page:
            if number != self.feed_seen + 1:
                odd(f"I8 a reader of the feed got event {number} after event {self.feed_seen}")
            self.feed_seen = number
        return len(page)

    async def _rows(self, table: str) -> list[tuple[object, bytes]]:
        """What follows the name of the table in each key, and the value."""
        rows = await self._ask(lambda kv, _: kv.scan((table,), limit=PARTITIONS))
        return [(row.key[1], row.value) for row in rows]

    async def _ask(self, question: Callable[[KeyValue, SagaStore], Awaitable[T]]) -> T:
        """The answer, though the place may be down for a while."""
        for tried in range(1, _TRIES + 1):
            try:
                async with self._place.look() as (kv, store):
                    return await question(kv, store)
            except BackendUnavailable:
                if tried == _TRIES:
                    raise
                await asyncio.sleep(_TRY_SECONDS)
        raise AssertionError("unreachable")
