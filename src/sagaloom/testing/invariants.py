"""What must hold of a store, whatever happened to the processes that wrote it.

`check_invariants` reads a store through its port, as a stranger would, and returns every breach it finds, each with
the number of the invariant. What a store alone can show:

    I1  nothing is applied to a run that is over
    I2  revisions are 1..n without a hole, history rows are numbered 1..n, runs are numbered 1..n
    I3  a waiting effect or timer belongs to a run that asked for it, once; a given-up effect stands in the dead
        letters; a timer that a run waits for is there
    I4  no message changed the instances of one (saga, key) twice
    I6  folding the history gives the status and the revision of the run
    I8  the feed has no gap
    I9  messages that carry a number in their payload were applied in the order of these numbers

Of I3, that an effect which is in neither place was really dispatched, only its receiver can tell; I5, I7 and I10 are
about moments that a store at rest has forgotten. `tests/crash` asks those who were there.

What we dislike about it: it reads everything, page by page, so it belongs at the end of a test and not into a service.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Final, cast

import msgspec

from sagaloom.definitions import SagaInstanceStatus
from sagaloom.engine.lifecycle import is_terminal
from sagaloom.engine.records import DeadLetter, Envelope, HistoryEntry, Instance, PendingTimer, Timer
from sagaloom.ids import instance_id
from sagaloom.ports.store import InboxRow, InstanceFilter, OutboxRow, RowRef, SagaStore

__all__ = ["check_invariants", "every_dead_letter", "every_entry", "every_inbox_row", "every_instance", "fold"]

_PAGE: Final = 500
_BREACHES_MAX: Final = 1_000

_RunKey = tuple[str, str, int]


async def check_invariants(store: SagaStore, *, sequence_field: str = "sequence") -> list[str]:
    """Every breach found in `store`, an empty list when there is none; at most 1,000.

    The store must be at rest: what is written meanwhile may look like a breach. A message whose payload has an integer
    under `sequence_field` was accepted after those of its instance with smaller ones.

    >>> import asyncio
    >>> from sagaloom.testing import MemoryStore
    >>> asyncio.run(check_invariants(MemoryStore()))
    []
    """
    audit = _Audit(sequence_field)
    async for instance in every_instance(store):
        audit.look_at_run(instance, [entry async for entry in every_entry(store, instance)])
    audit.look_at_keys()
    await audit.look_at_what_waits(store)
    await _look_at_feed(store, audit)
    return audit.breaches


def fold(entries: Iterable[HistoryEntry]) -> tuple[SagaInstanceStatus, int]:
    """The status and the revision to which the applied entries lead."""
    status: SagaInstanceStatus = "pending"
    revision = 0
    for entry in entries:
        if entry.disposition == "applied":
            status, revision = entry.status_after, entry.revision
    return status, revision


# ---------------------------------------------------------------------- reading everything


async def every_instance(store: SagaStore) -> AsyncIterator[Instance]:
    """Every run of every saga; accepted first messages, which have no run yet, are left out."""
    cursor: str | None = None
    while True:
        page, cursor = await store.instances(InstanceFilter(), limit=_PAGE, cursor=cursor)
        for instance in page:
            if instance.run > 0:
                yield instance
        if cursor is None:
            return


async def every_entry(store: SagaStore, instance: Instance) -> AsyncIterator[HistoryEntry]:
    """The history of one run, in the order in which it was written."""
    after = 0
    while page := await store.history(instance, after_entry=after, limit=_PAGE):
        for entry in page:
            yield entry
        if page[-1].entry_no <= after:
            return  # Numbers that do not grow are a breach that the caller reports; here they must not be a loop.
        after = page[-1].entry_no


async def every_inbox_row(store: SagaStore) -> AsyncIterator[InboxRow]:
    """Every message that waits."""
    after: RowRef | None = None
    while page := await store.inbox_page(after=after, limit=_PAGE):
        for row in page:
            yield row
        after = page[-1].ref


async def every_outbox_row(store: SagaStore) -> AsyncIterator[OutboxRow]:
    """Every effect that is not settled."""
    after: RowRef | None = None
    while page := await store.outbox_page(after=after, limit=_PAGE):
        for row in page:
            yield row
        after = page[-1].ref


async def every_timer(store: SagaStore) -> list[Timer]:
    """Every timer that has not fired."""
    timers: list[Timer] = []
    seen: set[str] = set()
    while True:
        after = None if not timers else _pending(timers[-1])
        page = [timer for timer in await store.timers(after=after, limit=_PAGE) if timer.id not in seen]
        if not page:
            return timers
        seen.update(timer.id for timer in page)
        timers += page


async def every_dead_letter(store: SagaStore) -> AsyncIterator[DeadLetter]:
    """Every message and effect that was given up, newest first."""
    after: str | None = None
    while page := await store.dead_letters(after=after, limit=_PAGE):
        for dead_letter in page:
            yield dead_letter
        after = page[-1].id


# ---------------------------------------------------------------------- judging


class _Audit:
    """What was seen so far, and what was wrong with it."""

    def __init__(self, sequence_field: str) -> None:
        self.breaches: list[str] = []
        self._sequence_field = sequence_field
        self._runs: dict[_RunKey, Instance] = {}
        self._run_numbers: dict[tuple[str, str], list[int]] = {}
        self._applied: dict[tuple[str, str, str], str] = {}
        self._asked: dict[_RunKey, set[str]] = {}
        self._newest_sequence: dict[_RunKey, int] = {}

    def breach(self, invariant: str, where: str, what: str) -> None:
        if len(self.breaches) < _BREACHES_MAX:
            self.breaches.append(f"{invariant} {where}: {what}")

    def look_at_run(self, instance: Instance, entries: list[HistoryEntry]) -> None:
        where = instance_id(instance.saga_id, instance.key, instance.run)
        run = (instance.saga_id, instance.key, instance.run)
        if run in self._runs:
            self.breach("I2", where, "the run is listed twice")
            return
        self._runs[run] = instance
        self._run_numbers.setdefault(run[:2], []).append(instance.run)
        self._asked[run] = {
            effect.effect_key
            for entry in entries
            for step in entry.steps
            for effect in step.effects
            if effect.effect_key is not None
        }
        self._look_at_numbers(where, instance, entries)
        self._look_at_statuses(where, instance, entries)
        self._look_at_messages(where, run, entries)
        self._look_at_order(where, run, entries)

    def _look_at_numbers(self, where: str, instance: Instance, entries: list[HistoryEntry]) -> None:
        for expected, entry in enumerate(entries, start=1):
            if entry.entry_no != expected:
                self.breach("I2", where, f"history row {expected} has the number {entry.entry_no}")
                break
        if len(entries) != instance.entries:
            self.breach("I2", where, f"{len(entries)} history rows, the run counts {instance.entries}")
        revision = 0
        for entry in entries:
            if entry.disposition == "applied":
                if entry.revision != revision + 1:
                    self.breach("I2", where, f"revision {entry.revision} ({entry.message_id}) follows {revision}")
                revision = entry.revision
            elif entry.revision != revision:
                self.breach(
                    "I2", where, f"{entry.message_id} changed nothing at revision {revision}, but says {entry.revision}"
                )

    def _look_at_statuses(self, where: str, instance: Instance, entries: list[HistoryEntry]) -> None:
        status: SagaInstanceStatus = "pending"
        for entry in entries:
            if entry.status_before != status:
                self.breach(
                    "I6",
                    where,
                    f"row {entry.entry_no} begins as {entry.status_before}, the one before ended as {status}",
                )
            if entry.disposition == "applied" and is_terminal(status):
                self.breach("I1", where, f"{entry.message_id} was applied when the run was {status}")
            if entry.disposition != "applied" and entry.status_after != entry.status_before:
                self.breach(
                    "I1", where, f"{entry.message_id} was {entry.disposition} and made the run {entry.status_after}"
                )
            status = entry.status_after
        folded = fold(entries)
        if folded != (instance.status, instance.revision):
            self.breach(
                "I6",
                where,
                f"its history leads to {folded[0]} at revision {folded[1]}, the run is {instance.status} at "
                f"{instance.revision}",
            )

    def _look_at_messages(self, where: str, run: _RunKey, entries: list[HistoryEntry]) -> None:
        for entry in entries:
            if entry.disposition != "applied":
                continue
            message = (*run[:2], entry.message_id)
            place = f"revision {entry.revision} of {where}"
            earlier = self._applied.setdefault(message, place)
            if earlier is not place:
                self.breach("I4", where, f"message {entry.message_id} was applied as {earlier} and as {place}")

    def _look_at_order(self, where: str, run: _RunKey, entries: list[HistoryEntry]) -> None:
        """A message that failed at first steps aside, and only such a one may come after younger ones."""
        newest = 0
        for entry in entries:
            number = self._sequence_of(entry.payload)
            if number is None or entry.origin == "redrive":
                continue
            if number < newest and entry.attempt == 1:
                self.breach("I9", where, f"message {entry.message_id}, number {number}, came after number {newest}")
            newest = max(newest, number)
        self._newest_sequence[run] = newest

    def look_at_keys(self) -> None:
        for (saga_id, key), numbers in self._run_numbers.items():
            if sorted(numbers) != list(range(1, len(numbers) + 1)):
                self.breach("I2", instance_id(saga_id, key, 1), f"its runs are numbered {sorted(numbers)}")

    async def look_at_what_waits(self, store: SagaStore) -> None:
        waiting_ids: set[tuple[str, str, str]] = set()
        numbers: set[int] = set()
        async for row in every_inbox_row(store):
            self._look_at_inbox_row(row, numbers)
            waiting_ids.add((row.envelope.saga_id, row.envelope.key, row.envelope.id))
        await self._look_at_timers(store, waiting_ids)
        dead = {letter.id: letter async for letter in every_dead_letter(store)}
        await self._look_at_outbox(store, dead)

    def _look_at_inbox_row(self, row: InboxRow, numbers: set[int]) -> None:
        envelope = row.envelope
        where = f"inbox row {row.ref.part}/{row.ref.seq}"
        if row.ref.seq in numbers:
            self.breach("I9", where, "its number is another row's too")
        numbers.add(row.ref.seq)
        applied = self._applied.get((envelope.saga_id, envelope.key, envelope.id))
        if applied is not None:
            self.breach("I4", where, f"message {envelope.id} waits, and was applied as {applied}")
        number = self._sequence_of(envelope.payload)
        if number is None or envelope.attempt > 0:
            return
        newest = max(
            (self._newest_sequence[run] for run in self._runs_of(envelope) if run in self._newest_sequence), default=0
        )
        if number < newest:
            self.breach("I9", where, f"message {envelope.id}, number {number}, waits behind number {newest}")

    async def _look_at_timers(self, store: SagaStore, waiting: set[tuple[str, str, str]]) -> None:
        timers = await every_timer(store)
        rows = {(timer.due_at, timer.id) for timer in timers}
        for timer in timers:
            envelope = timer.envelope
            instance = self._runs.get((envelope.saga_id, envelope.key, envelope.run or 0))
            if instance is None or all(pending.id != timer.id for pending in instance.timers):
                self.breach("I3", f"timer {timer.id}", f"no live run of {envelope.saga_id}:{envelope.key} waits for it")
        for run, instance in self._runs.items():
            for pending in instance.timers:
                has_row = (pending.due_at, pending.id) in rows or (*run[:2], pending.id) in waiting
                if not has_row and not is_terminal(instance.status):
                    self.breach("I3", instance_id(*run), f"waits for timer {pending.id}, which is not there")

    async def _look_at_outbox(self, store: SagaStore, dead: dict[str, DeadLetter]) -> None:
        keys: set[str] = set()
        lanes: dict[str, tuple[int, int]] = {}
        standing: set[str] = set()
        async for row in every_outbox_row(store):
            effect = row.effect
            where = f"outbox row {row.ref.part}/{row.ref.seq}"
            if effect.effect_key in keys:
                self.breach("I3", where, f"effect {effect.effect_key} waits twice")
            keys.add(effect.effect_key)
            if effect.effect_key not in self._asked.get((effect.saga_id, effect.key, effect.run), ()):
                self.breach("I5", where, f"no history row of {effect.saga_id}:{effect.key} asked for it")
            place = (effect.revision, effect.position)
            if lanes.get(effect.lane, (0, -1)) > place:
                self.breach("I3", where, f"revision and position {place} stand behind {lanes[effect.lane]} in one lane")
            lanes[effect.lane] = place
            if effect.dead_letter_id is not None:
                standing.add(effect.dead_letter_id)
                if effect.dead_letter_id not in dead:
                    self.breach("I3", where, f"was given up, but dead letter {effect.dead_letter_id} is not there")
        for letter in dead.values():
            if letter.outbox_seq is not None and letter.id not in standing:
                self.breach("I3", f"dead letter {letter.id}", "its lane should stand still behind it, and does not")

    def _runs_of(self, envelope: Envelope) -> list[_RunKey]:
        key = (envelope.saga_id, envelope.key)
        if envelope.run is not None:
            return [(*key, envelope.run)]
        return [(*key, max(self._run_numbers.get(key, [0])))]

    def _sequence_of(self, payload: bytes) -> int | None:
        try:
            content: object = msgspec.json.decode(payload)
        except msgspec.DecodeError:
            return None
        number = cast("dict[str, object]", content).get(self._sequence_field) if isinstance(content, dict) else None
        return number if isinstance(number, int) and not isinstance(number, bool) else None


async def _look_at_feed(store: SagaStore, audit: _Audit) -> None:
    oldest, newest = await store.feed_bounds()
    expected = oldest
    while page := await store.feed(after=expected - 1, limit=_PAGE):
        for number, _ in page:
            if number != expected:
                audit.breach("I8", f"feed event {number}", f"{expected} should come here")
                expected = number
            expected += 1
    # An effect that leaves meanwhile adds an event: what is read is bounded by what was there before, and is after.
    _, newest_after = await store.feed_bounds()
    if not newest < expected <= newest_after + 1:
        audit.breach("I8", f"feed event {newest_after}", f"is the newest, but reading ended at {expected - 1}")


def _pending(timer: Timer) -> PendingTimer:
    return PendingTimer(timer.id, timer.due_at, timer.name)
