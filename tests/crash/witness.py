"""The witness: looks at the store file from beside the workers, with a connection of its own.

It says who holds which partition, follows the feed while several processes commit to it, and can hold the write lock
for a moment: a process that is stopped meanwhile is provably outside a write. (One that is stopped inside a write
keeps every other from writing; that is the price of one file, and no test of takeover.)
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final

import apsw
import msgspec

from sagaloom.ids import PARTITIONS
from sagaloom.kv.sqlite import SqliteKeyValue
from sagaloom.stores.kv import KvSagaStore

__all__ = ["Witness"]

_LOCK_SECONDS_MAX: Final = 5.0
_FEED_PAGE: Final = 500
_FEED_PAUSE_SECONDS: Final = 0.05

_decode_lease = msgspec.msgpack.Decoder(tuple[str, int]).decode


class Witness:
    """Reads the store at `path`, opened when it is first asked."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kv: SqliteKeyValue | None = None
        self._is_away = asyncio.Lock()
        self.feed_seen = 0
        """The newest number of the feed that it has read."""

    async def holders(self) -> dict[int, str]:
        """By whom each partition is held; those that are free are left out."""
        async with self._is_away:
            rows = await (await self._open()).scan(("lease",), limit=PARTITIONS)
        found: dict[int, str] = {}
        for row in rows:
            part = row.key[1]
            assert isinstance(part, int)
            holder, _ = _decode_lease(row.value)
            if holder:
                found[part] = holder
        return found

    async def parts_of(self, holder: str) -> frozenset[int]:
        return frozenset(part for part, found in (await self.holders()).items() if found == holder)

    async def members(self) -> list[str]:
        """Everybody who has entered, and neither left nor was buried."""
        async with self._is_away:
            rows = await (await self._open()).scan(("member",), limit=PARTITIONS)
        return [str(row.key[1]) for row in rows]

    async def follow_feed(self, odd: Callable[[str], None]) -> None:
        """Reads the feed from where it was left, until cancelled. Tells of every gap and repeat (I8)."""
        while True:
            if await self.read_feed(odd) < _FEED_PAGE:
                await asyncio.sleep(_FEED_PAUSE_SECONDS)

    async def read_feed(self, odd: Callable[[str], None]) -> int:
        """Reads one page of the feed, and returns how many events it had."""
        async with self._is_away:
            page = await KvSagaStore(await self._open()).feed(after=self.feed_seen, limit=_FEED_PAGE)
        for number, _ in page:
            if number != self.feed_seen + 1:
                odd(f"I8 a reader of the feed got event {number} after event {self.feed_seen}")
            self.feed_seen = number
        return len(page)

    @contextlib.asynccontextmanager
    async def nobody_writes(self) -> AsyncIterator[None]:
        """Holds the write lock: nobody is inside a write, and nobody can begin one."""
        connection = apsw.Connection(str(self._path))
        try:
            connection.set_busy_timeout(0)
            deadline = time.monotonic() + _LOCK_SECONDS_MAX
            while True:
                try:
                    connection.execute("BEGIN IMMEDIATE")
                    break
                except apsw.BusyError:
                    if time.monotonic() > deadline:
                        raise
                await asyncio.sleep(0.0005)
            yield
        finally:
            # Closing rolls back; there is nothing to keep.
            connection.close(force=True)

    @contextlib.asynccontextmanager
    async def away(self) -> AsyncIterator[None]:
        """Lets go of the file: nobody has it open when everybody is dead, and the next one must recover its log."""
        async with self._is_away:
            await self._close()
            yield

    async def close(self) -> None:
        async with self._is_away:
            await self._close()

    async def _open(self) -> SqliteKeyValue:
        if self._kv is None:
            self._kv = await SqliteKeyValue.open(self._path)
        return self._kv

    async def _close(self) -> None:
        kv, self._kv = self._kv, None
        if kv is not None:
            await kv.close()
