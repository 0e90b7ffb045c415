"""What the key-value saga store believes without asking, and why that is sound.

A commit is planned on memory (`sagaloom.stores.planning`), so that the holder of a partition need not read what it
wrote itself:

- Only the holder of a partition changes instances in it, and consumes its inbox, outbox and timers; a lease belongs to
  one object, and whoever takes a partition away from it removes its member row first. As long as the check of that row
  holds, nobody but this object has touched them since it got them; so a run still is at the revision that it remembers,
  and a row that it added or handed out, and has not consumed since, is there. What it does not remember is looked up.
  The memory is bounded, and dropped when partitions come or go, after any error, and when the lease of somebody else is
  used.
- Messages that others bring add heads, marks and inbox rows, which the commit checks or does not believe in.
- No row can carry a surrogate number (pk) that this object reserved and has not used: there is nothing to check.
- A conflict found by memory alone is never reported: the rows are read, and the unit looked at once more.
- Runs and tombstones are removed by this object alone, too, and between two commits: see `sagaloom.stores.removing`.

Forgetting is always right: what is not remembered is looked up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Final, TypeVar

from sagaloom.definitions import SagaInstanceStatus
from sagaloom.engine.records import DeadLetter, Head, Instance
from sagaloom.ports.keyvalue import Committed, Entry, Key, KeyValue
from sagaloom.stores.rows import decode_dead_letter, decode_head, decode_instance, decode_slot, decoded

if TYPE_CHECKING:
    from sagaloom.stores.planning import Plan

__all__ = ["Beliefs", "Held", "RunFacts", "RunKey"]

_RUNS_KNOWN_MAX: Final = 65_536
_HEADS_KNOWN_MAX: Final = 65_536
_ROWS_KNOWN_MAX: Final = 262_144
_SLOTS_MAX: Final = 100_000

RunKey = tuple[int, int]
RunFacts = tuple[int, int, SagaInstanceStatus, datetime]
"""Of a stored run: revision, entries, status, created_at."""

Held = dict[int, tuple[str, str]]
"""Who holds which slot of a concurrency key: by number, the correlation key and the id of a message."""


class Beliefs:
    """What the holder of the lease knows of the store without asking it. Forgetting is always right."""

    def __init__(self, kv: KeyValue) -> None:
        self._kv = kv
        self.generation = 0
        """How many commits have ended: a read that saw another number may not teach us what is there."""
        self.runs: dict[RunKey, RunFacts] = {}
        self.heads: dict[Key, tuple[int, Head]] = {}
        self.rows: dict[Key, None] = {}
        """Inbox, outbox and timer rows that are there."""
        self.sagas_seen: set[str] = set()
        self.slots: dict[tuple[str, str], Held] = {}
        """Those of a saga and a concurrency key, as read for the commit that is planned: anybody may take some."""

    def forget(self) -> None:
        self.generation += 1
        self.runs.clear()
        self.heads.clear()
        self.rows.clear()
        self.sagas_seen.clear()

    def learn(self, plan: Plan, done: Committed) -> None:
        """Takes over what a commit has changed."""
        self.generation += 1
        stamp = done.versionstamp
        rows = self.rows
        self.runs.update(plan.runs)
        for head_row, head in plan.heads.items():
            self.heads[head_row] = (stamp, head)
        for key in plan.consumed:
            rows.pop(key, None)
        base = done.bases.get("inbox", 0)
        for offset, part in enumerate(plan.inbox):
            rows["inbox", part, base + offset] = None
        if plan.outbox:
            rows.update(
                dict.fromkeys([("outbox", part, n) for n, part in enumerate(plan.outbox, done.bases["outbox"])])
            )
        for key in plan.timers:
            rows[key] = None
        self.sagas_seen |= plan.sagas
        self.bound()

    def bound(self) -> None:
        # Forgetting is always right: what is not remembered is looked up.
        _shrink(self.runs, _RUNS_KNOWN_MAX)
        _shrink(self.heads, _HEADS_KNOWN_MAX)
        _shrink(self.rows, _ROWS_KNOWN_MAX)

    def learn_row(self, key: Key, row: Entry | None) -> None:
        """Takes over what was read under `key`."""
        table = key[0]
        if table == "state":
            _, pk, run = key
            assert isinstance(pk, int)
            assert isinstance(run, int)
            if row is None:
                self.runs.pop((pk, run), None)
            else:
                self.learn_instance(decoded(self._kv, row, decode_instance))
        elif table == "correlation":
            if row is None:
                self.heads.pop(key, None)
            else:
                self.heads[key] = (row.versionstamp, decoded(self._kv, row, decode_head))
        elif row is None:
            self.rows.pop(key, None)
        else:
            self.rows[key] = None

    def learn_instance(self, instance: Instance) -> None:
        self.runs[instance.pk, instance.run] = (
            instance.revision,
            instance.entries,
            instance.status,
            instance.created_at,
        )

    def learn_rows(self, rows: Iterable[Entry], generation: int) -> None:
        self.learn_keys((row.key for row in rows), generation)

    def learn_keys(self, keys: Iterable[Key], generation: int) -> None:
        """Remembers rows that were there when `generation` was current."""
        if generation == self.generation:
            self.rows.update((key, None) for key in keys)
            _shrink(self.rows, _ROWS_KNOWN_MAX)

    async def look_up(
        self, doubted: Sequence[Key], marks_there: set[Key], dead_letters: dict[str, tuple[DeadLetter, int]]
    ) -> None:
        """Reads the rows that are `doubted`. The marks among them that are there go to `marks_there`, the dead letters
        to `dead_letters`, with their versionstamps: anybody may consume one, so each is checked."""
        for where in {(str(key[1]), str(key[2])) for key in doubted if key[0] == "slot"}:
            rows = await self._kv.scan(("slot", *where), limit=_SLOTS_MAX)
            held = [decoded(self._kv, row, decode_slot) for row in rows]
            self.slots[where] = {each.number: (each.correlation_key, each.message_id) for each in held}
        doubted = [key for key in doubted if key[0] != "slot"]
        for key, row in zip(doubted, await self._kv.get_many(doubted), strict=True):
            if key[0] == "dead_letter":
                if row is None:
                    dead_letters.pop(str(key[1]), None)
                else:
                    letter = decoded(self._kv, row, decode_dead_letter)
                    dead_letters[letter.id] = (letter, row.versionstamp)
            elif key[0] == "dedupe":
                if row is not None:
                    marks_there.add(key)
            else:
                self.learn_row(key, row)


_K = TypeVar("_K")
_V = TypeVar("_V")


def _shrink(known: dict[_K, _V], most: int) -> None:
    """Drops the oldest entries of `known` beyond `most`, some more at once so that it is seldom done."""
    if len(known) > most:
        for key in list(known)[: len(known) - most + most // 8]:
            del known[key]
