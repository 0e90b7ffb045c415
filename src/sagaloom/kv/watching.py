"""How a store of one process tells its own loops that something was written.

A `Watch` is registered when it is made, not when it is first awaited: a commit between the two is not missed. Any
number of commits before the next await become one wake-up with the newest versionstamp, so a slow reader costs
nothing and no queue can grow. What other processes write does not wake anybody here; pollers are for that.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Mapping, Sequence

from sagaloom.kv.packing import pack, prefix_range, table_of
from sagaloom.ports.keyvalue import Key

__all__ = ["Watch", "WatchHub"]


class Watch(AsyncIterator[int]):
    """Yields the newest versionstamp below (or at) one prefix; ends when its store closes or after `aclose()`."""

    def __init__(self, prefix: Key) -> None:
        self.table = table_of(prefix)
        self.low, self.high = pack(prefix[1:]), prefix_range(prefix[1:])[1]
        self.whole_table = len(prefix) == 1
        self._woken = asyncio.Event()
        self._versionstamp = 0
        self._ended = False

    async def __anext__(self) -> int:
        await self._woken.wait()
        if self._ended:
            raise StopAsyncIteration
        self._woken.clear()
        return self._versionstamp

    async def aclose(self) -> None:
        """Ends the iteration, also one that waits right now."""
        self.end()

    def wake(self, versionstamp: int) -> None:
        self._versionstamp = versionstamp
        self._woken.set()

    def end(self) -> None:
        self._ended = True
        self._woken.set()


class WatchHub:
    """The watches of one store. It holds them weakly: a loop that was cancelled leaves nothing behind."""

    def __init__(self) -> None:
        self._watches: weakref.WeakSet[Watch] = weakref.WeakSet()

    def __bool__(self) -> bool:
        return bool(self._watches)

    def add(self, prefix: Key) -> Watch:
        watch = Watch(prefix)
        self._watches.add(watch)
        return watch

    def written(self, versionstamp: int, packed_keys: Mapping[str, Sequence[bytes]]) -> None:
        """Wakes every watch with a prefix that one of `packed_keys` (by table) is below or at."""
        for watch in list(self._watches):
            keys = packed_keys.get(watch.table)
            if keys and (watch.whole_table or any(watch.low <= key < watch.high for key in keys)):
                watch.wake(versionstamp)

    def end_all(self) -> None:
        for watch in list(self._watches):
            watch.end()
        self._watches.clear()
