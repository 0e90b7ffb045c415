"""The ordered key-value port: the smallest floor a durable store can stand on.

A key is a tuple; its first element names a table, the rest sorts: integers by value, then byte strings and text
bytewise (`pack` in `sagaloom.kv.packing` is the order). A value is bytes. Every committed entry carries the
*versionstamp* of the commit that wrote it: an integer that grows with every commit of the store.

`commit` is the only way to write. It checks, reserves and writes in one atomic, durable step:

- a `Check` names the versionstamp that a key must still have (`None`: the key must be absent);
- an *insert* is a put whose key must be absent once the deletes are done: its own check, and cheaper than one;
- `reserve` takes the next n numbers of named counters; a `Slot` in a put's key stands for one of them, so that
  a row can be keyed by an order that only the commit itself can know;
- either every put and delete is visible and safe on stable storage when `commit` returns `Committed`, or nothing is.

What we dislike about it: the caller reads first and checks later, so a conflict costs a second round. It is the
price of a port that SQLite, Redis and FoundationDB can all honour.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

__all__ = ["Check", "Committed", "Conflicted", "Entry", "Key", "KeyPart", "KeyValue", "SeesOthers", "Slot"]


class Slot(NamedTuple):
    """Stands in the key of an insert or put for `base + offset`; `base` is what the commit reserved of `counter`."""

    counter: str
    offset: int


KeyPart = str | int | bytes | Slot
Key = tuple[KeyPart, ...]


class Entry(NamedTuple):
    """One stored row."""

    key: Key
    value: bytes
    versionstamp: int


class Check(NamedTuple):
    """A condition of a commit: `key` still has `versionstamp`; `None` means that it is absent."""

    key: Key
    versionstamp: int | None


class Committed(NamedTuple):
    """The commit is durable. `bases` maps each reserved counter to the first number it got (counters start at 1)."""

    versionstamp: int
    bases: Mapping[str, int]


class Conflicted(NamedTuple):
    """Nothing was written. `failed` has the keys whose checks did not hold, and then those whose inserts met a row, in
    their order."""

    failed: tuple[Key, ...]


@runtime_checkable
class KeyValue(Protocol):
    """An ordered, transactional key-value store. Every method raises `BackendUnavailable` when the store cannot
    answer within its deadline, and `StoreCorrupt` when what it holds cannot be read."""

    @property
    def name(self) -> str:
        """What errors call this store, for example `kv:/data/orders.db`."""
        ...

    async def get(self, key: Key) -> Entry | None: ...

    async def get_many(self, keys: Sequence[Key]) -> list[Entry | None]:
        """The entries of `keys`, in their order."""
        ...

    async def scan(
        self,
        prefix: Key,
        *,
        after: Key | None = None,
        before: Key | None = None,
        limit: int = 1000,
        reverse: bool = False,
    ) -> list[Entry]:
        """Entries below `prefix` (at least a table), strictly after `after` and strictly before `before` in key
        order, at most `limit`, in one short read. `reverse` walks from the end."""
        ...

    async def count(self, prefix: Key, *, limit: int) -> int:
        """How many entries are below `prefix`, counting no further than `limit`."""
        ...

    async def commit(
        self,
        *,
        checks: Sequence[Check] = (),
        inserts: Sequence[tuple[Key, bytes]] = (),
        puts: Sequence[tuple[Key, bytes]] = (),
        deletes: Sequence[Key] = (),
        reserve: Mapping[str, int] | None = None,
    ) -> Committed | Conflicted:
        """Writes everything or nothing, durably: deletes first, then inserts, then puts. Deleting what is absent is no
        error. Two inserts of one key are a `ValueError`."""
        ...

    def watch(self, prefix: Key) -> AsyncIterator[int]:
        """Yields the versionstamp after commits of this process that wrote below `prefix`; bursts may be merged."""
        ...

    async def close(self) -> None:
        """Releases the file, connection or pool. Closing twice is no error."""
        ...


@runtime_checkable
class SeesOthers(Protocol):
    """What a store, of keys or of sagas, can do that knows when another process has written to it. Optional: whoever
    has to notice the commits of others reads now and then where it is missing."""

    def others_version(self) -> int | None:
        """A number that is another one after each commit of somebody else: cheap enough to be asked ten times a second,
        and touching no table. One's own commits leave it as it is. None: it cannot tell after all."""
        ...
