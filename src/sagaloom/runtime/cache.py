"""Hot instances: what the holder of the store's lease remembers, so that it need not read what it wrote.

An entry is valid only while this process holds the lease. It is replaced only after the commit that made it true has
returned, and dropped on any error or unknown outcome. The least recently used ones go first when the bytes run out.
"""

from __future__ import annotations

import msgspec

from sagaloom.engine.records import Head, Instance

__all__ = ["Hot", "HotInstances"]

_BYTES_PER_ENTRY = 1200
InstanceKey = tuple[str, str]


class Hot(msgspec.Struct, frozen=True, gc=False):
    """The head of a correlation key and its newest run, as last committed. Both None: the store has neither."""

    head: Head | None
    instance: Instance | None


class HotInstances:
    """A mapping of (saga id, correlation key) to `Hot`, bounded by bytes."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._entries: dict[InstanceKey, tuple[Hot, int]] = {}
        """Each with the bytes it takes."""

    def get(self, key: InstanceKey) -> Hot | None:
        entry = self._entries.get(key)
        return None if entry is None else entry[0]

    def put(self, key: InstanceKey, hot: Hot) -> None:
        # Insertion order is the order of use: every applied message puts its instance again.
        entries, size = self._entries, _bytes_of(hot)
        before = entries.pop(key, None)
        self._bytes += size if before is None else size - before[1]
        entries[key] = (hot, size)
        if self._bytes > self._bytes_max:
            self._evict()

    def drop(self, key: InstanceKey) -> None:
        dropped = self._entries.pop(key, None)
        if dropped is not None:
            self._bytes -= dropped[1]

    def clear(self) -> None:
        self._entries.clear()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def _evict(self) -> None:
        """Drops the least recently used ones until an eighth is free; the last one stays, whatever its size."""
        # Many at once: a dict finds its first key by walking past the places of all that were removed before it.
        enough = self._bytes_max - self._bytes_max // 8
        for key in list(self._entries)[:-1]:
            self.drop(key)
            if self._bytes <= enough:
                return


def _bytes_of(hot: Hot) -> int:
    """About what an entry takes."""
    instance = hot.instance
    if instance is None:
        return _BYTES_PER_ENTRY
    size = _BYTES_PER_ENTRY + len(instance.state)
    if instance.timers:
        size += 150 * len(instance.timers)
    if instance.steps:
        size += sum(len(step.payload) + 200 for step in instance.steps)
    return size
