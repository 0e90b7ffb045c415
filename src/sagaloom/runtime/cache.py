"""Hot instances: what the holder of the store's lease remembers, so that it need not read what it wrote.

An entry is valid only while this process holds the lease. It is replaced only after the commit that made it true has
returned, and dropped on any error or unknown outcome. The least recently used ones go first when the bytes run out.
"""

from __future__ import annotations

from typing import NamedTuple

from sagaloom.engine.records import Head, Instance

__all__ = ["Hot", "HotInstances"]

_BYTES_PER_ENTRY = 1200
InstanceKey = tuple[str, str]


class Hot(NamedTuple):
    """The head of a correlation key and its newest run, as last committed. Both None: the store has neither."""

    head: Head | None
    instance: Instance | None

    @property
    def bytes(self) -> int:
        instance = self.instance
        if instance is None:
            return _BYTES_PER_ENTRY
        steps = sum(len(step.payload) + 200 for step in instance.steps) if instance.steps else 0
        return _BYTES_PER_ENTRY + len(instance.state) + steps + 150 * len(instance.timers)


class HotInstances:
    """A mapping of (saga id, correlation key) to `Hot`, bounded by bytes."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._entries: dict[InstanceKey, tuple[Hot, int]] = {}

    def get(self, key: InstanceKey) -> Hot | None:
        found = self._entries.get(key)
        return None if found is None else found[0]

    def put(self, key: InstanceKey, hot: Hot) -> None:
        size = hot.bytes
        replaced = self._entries.pop(key, None)
        self._bytes += size - (replaced[1] if replaced is not None else 0)
        # Insertion order is the order of use: every applied message puts its instance again.
        self._entries[key] = (hot, size)
        while self._bytes > self._bytes_max and len(self._entries) > 1:
            self.drop(next(iter(self._entries)))

    def drop(self, key: InstanceKey) -> None:
        dropped = self._entries.pop(key, None)
        if dropped is not None:
            self._bytes -= dropped[1]

    def clear(self) -> None:
        self._entries.clear()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._entries)
