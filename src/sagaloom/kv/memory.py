"""The key-value port over a dict: so plain that it can be the model which other stores are compared with.

It shares no code with the packing of keys: a scan sorts by the tuples themselves. Nothing survives `close()`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence

from sagaloom.errors import BackendUnavailable
from sagaloom.kv.packing import INT_MAX, INT_MIN, pack, table_of
from sagaloom.kv.watching import WatchHub
from sagaloom.ports.keyvalue import Check, Committed, Conflicted, Entry, Key, Slot

__all__ = ["MemoryKeyValue"]

_SortKey = tuple[tuple[int, int | bytes | str], ...]


class MemoryKeyValue:
    """An ordered key-value store in memory; sorts everything on every scan, so keep it small.

    >>> import asyncio
    >>> async def example() -> bytes:
    ...     store = MemoryKeyValue()
    ...     await store.commit(puts=[(("color", "sky"), b"blue")])
    ...     return (await store.scan(("color",)))[0].value
    >>> asyncio.run(example())
    b'blue'
    """

    def __init__(self, name: str = "memory") -> None:
        self._name = f"kv:{name}"
        self._entries: dict[Key, Entry] = {}
        self._versionstamp = 0
        self._counters: dict[str, int] = {}
        self._watches = WatchHub()
        self._closed = False

    @property
    def name(self) -> str:
        return self._name

    async def get(self, key: Key) -> Entry | None:
        self._refuse_if_closed()
        _sort_key(key)
        return self._entries.get(key)

    async def get_many(self, keys: Sequence[Key]) -> list[Entry | None]:
        return [await self.get(key) for key in keys]

    async def scan(
        self,
        prefix: Key,
        *,
        after: Key | None = None,
        before: Key | None = None,
        limit: int = 1000,
        reverse: bool = False,
    ) -> list[Entry]:
        self._refuse_if_closed()
        _sort_key(prefix)
        for bound in (after, before):
            if bound is not None and bound[:1] != prefix[:1]:
                raise ValueError(f"{bound!r} does not bound a scan of table {prefix[0]!r}")
        found = [
            entry
            for key, entry in self._entries.items()
            if len(key) > len(prefix)
            and key[: len(prefix)] == prefix
            and (after is None or _sort_key(key) > _sort_key(after))
            and (before is None or _sort_key(key) < _sort_key(before))
        ]
        found.sort(key=lambda entry: _sort_key(entry.key), reverse=reverse)
        return found[: max(limit, 0)]

    async def count(self, prefix: Key, *, limit: int) -> int:
        return len(await self.scan(prefix, limit=limit))

    async def commit(
        self,
        *,
        checks: Sequence[Check] = (),
        inserts: Sequence[tuple[Key, bytes]] = (),
        puts: Sequence[tuple[Key, bytes]] = (),
        deletes: Sequence[Key] = (),
        reserve: Mapping[str, int] | None = None,
    ) -> Committed | Conflicted:
        self._refuse_if_closed()
        for counter, numbers in (reserve or {}).items():
            if numbers < 0:
                raise ValueError(f"cannot reserve {numbers} of counter {counter!r}")
        bases = {counter: self._counters.get(counter, 0) + 1 for counter in reserve or {}}
        inserted = [(_with_numbers(key, bases), value) for key, value in inserts]
        failed = [check.key for check in checks if self._stamp_of(check.key) != check.versionstamp]
        failed += [key for key, _ in inserted if self._stamp_of(key) is not None and key not in deletes]
        if failed:
            return Conflicted(tuple(failed))
        if len({key for key, _ in inserted}) != len(inserted):
            raise ValueError("two inserts have the same key")
        written = [*inserted, *((_with_numbers(key, bases), value) for key, value in puts)]
        for key in (*deletes, *(key for key, _ in written)):
            _sort_key(key)
        for key, value in written:
            if not isinstance(value, bytes):
                raise TypeError(f"the value of {key!r} is not bytes")
        # From here on nothing can fail: everything that could be refused has been looked at.
        self._versionstamp += 1
        for counter, numbers in (reserve or {}).items():
            self._counters[counter] = bases[counter] + numbers - 1
        for key in deletes:
            self._entries.pop(key, None)
        for key, value in written:
            self._entries[key] = Entry(key, value, self._versionstamp)
        self._wake([*deletes, *(key for key, _ in written)])
        return Committed(self._versionstamp, bases)

    def watch(self, prefix: Key) -> AsyncIterator[int]:
        self._refuse_if_closed()
        return self._watches.add(prefix)

    def others_version(self) -> int:
        return 0  # Nobody else can reach it.

    async def close(self) -> None:
        self._closed = True
        self._watches.end_all()

    def _stamp_of(self, key: Key) -> int | None:
        _sort_key(key)
        entry = self._entries.get(key)
        return None if entry is None else entry.versionstamp

    def _wake(self, keys: Sequence[Key]) -> None:
        packed_keys: dict[str, list[bytes]] = {}
        for key in keys:
            packed_keys.setdefault(table_of(key), []).append(pack(key[1:]))
        self._watches.written(self._versionstamp, packed_keys)

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise BackendUnavailable(f"{self._name} is closed: open another store", retryable=False)


def _with_numbers(key: Key, bases: Mapping[str, int]) -> Key:
    for part in key:
        if isinstance(part, Slot) and part.counter not in bases:
            raise ValueError(f"{part} needs a number that was not reserved: name {part.counter!r} in `reserve`")
    return tuple(bases[part.counter] + part.offset if isinstance(part, Slot) else part for part in key)


def _sort_key(key: Key) -> _SortKey:
    """What `key` sorts by: parts with the rank of their type. Refuses what cannot be a key."""
    table_of(key)
    ranked: list[tuple[int, int | bytes | str]] = []
    for part in key:
        match part:
            case bool():
                raise TypeError(f"{part} cannot be part of a key: write it as 0 or 1")
            case int():
                if not INT_MIN <= part <= INT_MAX:
                    raise ValueError(f"{part} does not fit a key: ints have 64 bits with sign")
                ranked.append((0, part))
            case bytes():
                ranked.append((1, part))
            case str():
                ranked.append((2, part))
            case Slot():
                raise ValueError(f"{part} stands only in the key of a put")
            case _:
                raise TypeError(f"{part!r} cannot be part of a key: parts are int, bytes or str")
    return tuple(ranked)
