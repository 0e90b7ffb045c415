"""Removing what is over: finished runs, and later the tombstones that they leave.

1. Only the holder of a partition removes from it, between two of its commits, under the same lock and the same check
   of its member row. So what is read here is what there is, and nobody else changes it in between.
2. A run goes whole, in one commit: its state, its place in the listing, its history, the rows of its children. A
   process that ends between two commits leaves some runs that are gone and others that are untouched.
3. Where the newest run of a key goes, its head stays, as a tombstone: the key does not forget its number (pk) nor its
   count of runs, so marks find it (I4), a saga that takes no second run still takes none (I1), and another run has the
   next number. What brings messages from elsewhere reads the head as ever. A row found by its time says when it may go.
4. What was believed of the rows is corrected as the commit returns. After an outcome that is not known, everything is
   forgotten.
5. A run with live children stays until they have ended: the row of a child is moved by the commit that ends it.

What we dislike about it: a run with a very long history is one very large commit.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from datetime import datetime
from typing import Final, Protocol

from msgspec.structs import replace

from sagaloom.engine.lifecycle import is_terminal
from sagaloom.engine.records import Head, Instance
from sagaloom.errors import MessageRejected
from sagaloom.ids import partition_of
from sagaloom.ports.keyvalue import Check, Committed, Conflicted, Key, KeyValue
from sagaloom.ports.store import Lease
from sagaloom.stores.beliefs import Beliefs
from sagaloom.stores.rows import (
    children_key,
    decode_head,
    decode_instance,
    decoded,
    encode,
    head_key,
    micros,
    placed,
    tombstone_key,
)
from sagaloom.stores.tenure import Tenure, member_key

__all__ = ["Remover", "mark_cursor", "mark_place"]

_PAGE: Final = 256


class CommitsRemoval(Protocol):
    """Writes one commit of a removal."""

    def __call__(
        self, checks: Sequence[Check], puts: Sequence[tuple[Key, bytes]], deletes: Sequence[Key]
    ) -> Awaitable[Committed | Conflicted]: ...


class Remover:
    """What a store removes under its lease; to be called while nothing else is being committed."""

    def __init__(
        self, kv: KeyValue, beliefs: Beliefs, tenure: Tenure, *, commit: CommitsRemoval, keeps_indexes: bool
    ) -> None:
        self._kv = kv
        self._beliefs = beliefs
        self._tenure = tenure
        self._commit = commit
        self._keeps_indexes = keeps_indexes

    async def remove_runs(self, runs: Sequence[Instance], tombstone_until: datetime, lease: Lease) -> int:
        held = [run for run in runs if placed(run.saga_id, run.key)[1] in self._tenure.parts]
        if not held:
            return 0
        states: list[Key] = [("state", run.pk, run.run) for run in held]
        heads = list({head_key(run.saga_id, run.key): None for run in held})
        rows = await self._kv.get_many([*states, *heads])
        known = {row.key: (row.versionstamp, decoded(self._kv, row, decode_head)) for row in rows[len(states) :] if row}

        checks: dict[Key, Check] = {}
        puts: list[tuple[Key, bytes]] = []
        deletes: list[Key] = []
        removed: list[Instance] = []
        tombstones: dict[Key, Head] = {}
        for run, row in zip(held, rows, strict=False):
            where = head_key(run.saga_id, run.key)
            if row is None or where not in known or decoded(self._kv, row, decode_instance) != run:
                continue
            if not is_terminal(run.status) or await self._has_live_children(run):
                continue
            stamp, head = known[where]
            if head.run == run.run:
                tombstones[where] = head = replace(head, tombstone_until=tombstone_until, ended_as=run.status)
                checks[where] = Check(where, stamp)
                puts += [(where, encode(head)), (tombstone_key(head), run.key.encode())]
            deletes += [("state", run.pk, run.run), *await self._rows_beside(run)]
            removed.append(run)
        if not removed:
            return 0
        done = await self._write(lease, list(checks.values()), puts, deletes)
        if done is None:
            return 0
        for run in removed:
            self._beliefs.runs.pop((run.pk, run.run), None)
        for where, head in tombstones.items():
            self._beliefs.heads[where] = (done.versionstamp, head)
        return len(removed)

    async def _has_live_children(self, run: Instance) -> bool:
        return bool(run.children and await self._kv.scan(children_key(run.pk, run.run, "live"), limit=1))

    async def _rows_beside(self, run: Instance) -> list[Key]:
        keys: list[Key] = [("transition", run.pk, run.run, number) for number in range(1, run.entries + 1)]
        if self._keeps_indexes:
            keys.append(("instance_index", run.saga_id, run.status, micros(run.created_at), run.pk, run.run))
        after: Key | None = None
        while run.children:
            rows = await self._kv.scan(("child", run.pk, run.run), after=after, limit=_PAGE)
            keys += [row.key for row in rows]
            if len(rows) < _PAGE:
                break
            after = rows[-1].key
        return keys

    async def remove_tombstones(self, due_by: datetime, limit: int, lease: Lease) -> list[tuple[str, str]]:
        checks: list[Check] = []
        deletes: list[Key] = []
        gone: list[tuple[Key, tuple[str, str]]] = []
        after: Key | None = None
        before: Key = ("tombstone", micros(due_by) + 1)
        while len(gone) < limit:
            rows = await self._kv.scan(("tombstone",), after=after, before=before, limit=_PAGE)
            held = [row for row in rows if self._is_held(row.key)]
            heads = await self._kv.get_many([("correlation", *row.key[2:]) for row in held])
            for row, head_row in zip(held, heads, strict=True):
                if len(gone) == limit:
                    break
                head = None if head_row is None else decoded(self._kv, head_row, decode_head)
                if head is None or head.tombstone_until is None or tombstone_key(head) != row.key:
                    deletes.append(row.key)  # It has opened another run since.
                elif head_row is not None and not await self._kv.scan(("state", head.pk), limit=1):
                    checks.append(Check(head_row.key, head_row.versionstamp))
                    deletes += [row.key, head_row.key]
                    gone.append((head_row.key, (head.saga_id, head.key)))
            if len(rows) < _PAGE:
                break
            after = rows[-1].key
        if not deletes or await self._write(lease, checks, [], deletes) is None:
            return []
        for where, _ in gone:
            self._beliefs.heads.pop(where, None)
        return [key for _, key in gone]

    def _is_held(self, key: Key) -> bool:
        hashed = key[-1]
        return isinstance(hashed, bytes) and partition_of(hashed) in self._tenure.parts

    async def _write(
        self, lease: Lease, checks: Sequence[Check], puts: Sequence[tuple[Key, bytes]], deletes: Sequence[Key]
    ) -> Committed | None:
        """One commit; None when something has changed since it was read: then it is for the next time."""
        member = member_key(lease.holder)
        done = await self._commit([Check(member, self._tenure.stamp), *checks], puts, deletes)
        if isinstance(done, Committed):
            self._beliefs.generation += 1
            return done
        self._beliefs.forget()
        if member in done.failed:
            await self._tenure.look(lease)
        return None


def mark_cursor(key: Key) -> str:
    """The place of a mark in the walk over all of them."""
    _, pk, hashed = key
    assert isinstance(pk, int)
    assert isinstance(hashed, bytes)
    return f"{pk}.{hashed.hex()}"


def mark_place(cursor: str) -> Key:
    try:
        pk, hashed = cursor.split(".")
        return "dedupe", int(pk), bytes.fromhex(hashed)
    except ValueError as error:
        raise MessageRejected(f"{cursor!r:.80} is no cursor of this walk: leave it out to start over") from error
