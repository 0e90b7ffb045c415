"""Planning a commit of the key-value saga store: what a batch writes.

`Plan.place` adds units one after the other, as if each were written before the next: each meets what is believed of the
store (`sagaloom.stores.beliefs`), and what the units before it have changed in the plan. It adds a unit whole, or says
why not and leaves the plan as it was; nothing is asked of the store here. What a unit that does not fit may rest on is
read off it (`sagaloom.stores.units`), and looked up by whoever commits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Final, cast

from sagaloom.engine.records import DeadLetter, FeedRecord, Head, HeldSlot, Instance
from sagaloom.ports.keyvalue import Check, Key
from sagaloom.ports.store import Conflict, SlotClaim, UnitOfWork
from sagaloom.stores.beliefs import Beliefs, Held, RunFacts, RunKey
from sagaloom.stores.rows import (
    FEED_KEY,
    child_key,
    dead_letter_keys,
    encode,
    head_key,
    mark_key,
    micros,
    pending_key,
    placed,
    slot,
    timer_key,
)
from sagaloom.stores.units import misshapen, name_of, only_settles, pk_of

__all__ = ["ROW_BYTES_MAX", "Plan", "refused"]

ROW_BYTES_MAX: Final = 256 << 20

# What a named tuple's own constructor does, without its Python frame: a third of the time, for each row of a commit.
_check: Final = cast("Callable[[tuple[Key, int | None]], Check]", partial(tuple.__new__, Check))  # pyright: ignore[reportUnknownMemberType]


class _Beside:
    """The rows of one unit that most units do without, and what they will have changed."""

    __slots__ = ("checks", "consumed", "rows", "timers_added")

    def __init__(self) -> None:
        self.checks: list[Check] = []
        self.rows: list[tuple[Key, bytes | None]] = []
        self.consumed: list[Key] = []
        self.timers_added: list[Key] = []


class Plan:
    """What a batch will write, unit by unit, and what it will have changed."""

    __slots__ = (
        "_bytes",
        "_is_careful",
        "assumed_new",
        "checks",
        "conflicts",
        "consumed",
        "dead_letters",
        "feed",
        "heads",
        "inbox",
        "inbox_keys",
        "index_rows",
        "indexes",
        "inserts",
        "lost",
        "marks",
        "outbox",
        "runs",
        "sagas",
        "slots",
        "timers",
        "writes",
    )

    def __init__(self, *, indexes: bool = True, is_careful: bool = False) -> None:
        """Without `indexes` the store finds runs and dead letters by other means than rows of ours. `is_careful`: every
        unit is looked at for what cannot be stored, for some unit has such a thing."""
        self.indexes = indexes
        self._is_careful = is_careful
        self._bytes = 0
        """How large all rows are together."""
        self.conflicts: dict[int, Conflict] = {}
        self.lost: set[int] = set()
        """Surrogate numbers of instances of which a unit was left out."""
        self.checks: list[Check] = []
        self.writes: dict[Key, bytes | None] = {}
        """The last word on each key; None deletes."""
        self.inserts: list[tuple[Key, bytes]] = []
        """Rows that must be new: first states of runs, history, marks, slots, and those whose number the commit gives.
        Only a mark or a slot is ever deleted by the commit that would insert it."""
        self.index_rows: dict[Key, bytes] = {}
        """Those that find runs under their new status: new as well, for a run has one at a time. It may move on in the
        same batch, and take its row along."""
        self.runs: dict[RunKey, RunFacts] = {}
        self.heads: dict[Key, Head] = {}
        self.marks: dict[Key, bool] = {}
        self.assumed_new: set[Key] = set()
        """Marks whose absence only their insert will find out."""
        self.consumed: set[Key] = set()
        self.timers: set[Key] = set()
        self.dead_letters: dict[str, DeadLetter] = {}
        self.inbox: list[int] = []
        """The partition of each new row, in the order of their numbers."""
        self.inbox_keys: list[tuple[str, str]] = []
        """The saga and the correlation key of each."""
        self.outbox: list[int] = []
        self.feed: list[FeedRecord] = []
        self.sagas: set[str] = set()
        self.slots: dict[tuple[str, str], Held] = {}
        """Who will hold which slot, where that changes."""

    def place(
        self, unit: UnitOfWork, beliefs: Beliefs, marks_there: set[Key], dead_letters: dict[str, tuple[DeadLetter, int]]
    ) -> Conflict | None:
        """Adds `unit`, whole; or says why not, and leaves the plan as it was."""
        instance, entry, head, mark = unit.instance, unit.entry, unit.head, unit.mark
        done = unit.outbox_done
        if done and only_settles(unit):
            # Nearly every effect ends in such a unit, together with many others.
            settled: dict[Key, None] = dict.fromkeys([("outbox", *ref) for ref in done])
            if not (settled.keys() <= beliefs.rows.keys() and settled.keys().isdisjoint(self.consumed)):
                return Conflict("gone", f"outbox rows {done}")
            if self._is_careful:
                encode(unit.feed)
            self.writes |= settled
            self.consumed.update(settled)
            self.feed += unit.feed
            return None
        if (instance is not None or entry is not None) and (shape := misshapen(unit)) is not None:
            return Conflict("refused", shape)
        pk = pk_of(unit)
        if self.lost and pk and pk in self.lost:
            return Conflict("revision", "an earlier unit of the same instance in this batch was not written")
        checks: list[Check] = []
        rows: list[tuple[Key, bytes | None]] = []
        inserts: list[tuple[Key, bytes]] = []
        size = 0

        run_key = (0, 0)
        index_row: Key = ()
        index_before: Key = ()
        if instance is not None:
            run = instance.run
            encoded = encode(instance)
            size = len(encoded)
            run_key = (pk, run)
            facts = self.runs.get(run_key) or beliefs.runs.get(run_key)
            if unit.revision_before is None:
                if facts is not None:
                    return _wrong_revision(instance, facts)
                inserts.append((("state", pk, run), encoded))
            else:
                if facts is None or facts[0] != unit.revision_before or facts[1] != unit.entries_before:
                    return _wrong_revision(instance, facts)
                rows.append((("state", pk, run), encoded))
            status = instance.status
            if self.indexes and (facts is None or facts[2] != status or facts[3] != instance.created_at):
                created = micros(instance.created_at)
                if facts is not None:
                    known = created if facts[3] == instance.created_at else micros(facts[3])
                    index_before = ("instance_index", instance.saga_id, facts[2], known, pk, run)
                index_row = ("instance_index", instance.saga_id, status, created, pk, run)
            if entry is not None:
                # The second belt: whoever else has written this run has written this entry.
                encoded = encode(entry)
                size += len(encoded)
                inserts.append((("transition", pk, run, entry.entry_no), encoded))

        head_row: Key = ()
        if head is not None:
            head_row = head_key(head.saga_id, head.key)
            stored = self.heads.get(head_row)
            if stored is None:
                known_head = beliefs.heads.get(head_row)
                if known_head is not None:
                    stored = known_head[1]
                    checks.append(_check((head_row, known_head[0])))
            if stored != unit.head_before:
                return Conflict("revision", f"the head of {head.saga_id}:{head.key} is not what was read")
            encoded = encode(head)
            size += 2 * len(encoded)
            if stored is None:
                inserts.append((head_row, encoded))
            else:
                rows.append((head_row, encoded))
                if self.indexes and stored.awaits_start and stored.run == 0:
                    rows.append((pending_key(stored), None))
            if self.indexes and head.awaits_start and head.run == 0:
                rows.append((pending_key(head), encoded))

        unmarked_row: Key = ()
        if unit.unmark is not None:
            unmarked_row = mark_key(*unit.unmark)
            rows.append((unmarked_row, None))
        mark_row: Key = ()
        is_assumed_new = False
        if mark is not None:
            mark_row = mark_key(unit.mark_pk, mark.dedupe_key)
            if mark_row != unmarked_row:
                is_marked = self.marks.get(mark_row)
                is_assumed_new = is_marked is None
                if is_marked or (is_assumed_new and marks_there and mark_row in marks_there):
                    return Conflict("mark", f"{mark.dedupe_key!r} was seen before")
            encoded = encode(mark)
            size += len(encoded)
            inserts.append((mark_row, encoded))

        if unit.outbox_add:
            number = len(self.outbox)
            for effect in unit.outbox_add:
                encoded = encode(effect)
                size += len(encoded)
                inserts.append((("outbox", unit.part, slot("outbox", number)), encoded))
                number += 1
        inbox_parts: list[int] = []
        for envelope in unit.inbox_add:
            part = placed(envelope.saga_id, envelope.key)[1]
            encoded = encode(envelope)
            size += len(encoded)
            inserts.append((("inbox", part, slot("inbox", len(self.inbox) + len(inbox_parts))), encoded))
            inbox_parts.append(part)
        beside: _Beside | None = None
        if (
            unit.inbox_update is not None
            or unit.outbox_update is not None
            or unit.timers_add
            or unit.timers_remove
            or unit.timer_done is not None
            or unit.dead_letters_add
            or unit.dead_letter_done is not None
            or unit.children_add
            or unit.child_done is not None
        ):
            found = self._beside(unit, beliefs, dead_letters)
            if isinstance(found, Conflict):
                return found
            beside = found
            checks += beside.checks
            rows += beside.rows
            size += _size_of(beside.rows)
        inbox_row: Key = ()
        if unit.inbox_done is not None:
            inbox_row = ("inbox", *unit.inbox_done)
            if inbox_row not in beliefs.rows or inbox_row in self.consumed:
                return Conflict("gone", f"inbox row {unit.inbox_done}")
            rows.append((inbox_row, None))
        effects_done: Sequence[Key] = ()
        if done:
            # The unit of an answer, mostly: its effect is settled without the detour that rarer rows take.
            effects_done = [("outbox", *ref) for ref in done]
            for key in effects_done:
                if key not in beliefs.rows or key in self.consumed:
                    return Conflict("gone", f"outbox rows {done}")
                rows.append((key, None))
        held: Held = {}
        if unit.slot is not None:
            claimed = self._claim(unit.slot, beliefs, rows, inserts)
            if isinstance(claimed, Conflict):
                return claimed
            held = claimed
            size += _size_of(inserts)
        if self._is_careful:
            encode(unit.feed)
            _check_sizes(rows, inserts)

        # From here on nothing is refused.
        self._bytes += size
        if unit.slot is not None:
            self.slots[unit.slot.saga_id, unit.slot.key] = held
            if unit.slot.use == "free":
                # The deletes come before the inserts: a slot that this batch has taken would stay.
                freed = {key for key, value in rows if key[0] == "slot" and value is None}
                self.inserts = [insert for insert in self.inserts if insert[0] not in freed]
        for key, value in rows:
            self.writes[key] = value
        if unmarked_row:
            self._unmark(unmarked_row)
        self.inserts += inserts
        self.checks += checks
        if instance is not None:
            self.runs[run_key] = (instance.revision, instance.entries, instance.status, instance.created_at)
            if index_before and self.index_rows.pop(index_before, None) is None:
                self.writes[index_before] = None
            if index_row:
                self.index_rows[index_row] = b""
            if unit.revision_before is None:
                self.sagas.add(instance.saga_id)
        if head is not None:
            self.heads[head_row] = head
            self.sagas.add(head.saga_id)
        if mark_row:
            if is_assumed_new:
                self.assumed_new.add(mark_row)
            self.marks[mark_row] = True
        if unit.outbox_add:
            self.outbox += [unit.part] * len(unit.outbox_add)
        self.feed += unit.feed
        if inbox_parts:
            self.inbox += inbox_parts
            self.inbox_keys += [(envelope.saga_id, envelope.key) for envelope in unit.inbox_add]
        if inbox_row:
            self.consumed.add(inbox_row)
        if effects_done:
            self.consumed.update(effects_done)
        if beside is not None:
            self._learn(unit, beside)
        return None

    def seal(self, strays: Collection[Key] = ()) -> int:
        """Adds the rows of the index and of the feed, and returns how many events are in that. `strays` are rows of the
        index that are there, though nothing accounts for them: they are written over. Raises `TypeError`, `ValueError`
        or `OverflowError` for what cannot be stored: a careful plan finds out which unit brings it."""
        events = sum([len(record.moments) for record in self.feed])
        if events:
            shown = encode(self.feed)
            self._bytes += len(shown)
            self.inserts.append((FEED_KEY, shown))
        for key in self.index_rows.keys() & strays:
            self.writes[key] = self.index_rows.pop(key)
        self.inserts += self.index_rows.items()
        # Only when all rows together are so large can one of them be.
        if self._bytes > ROW_BYTES_MAX:
            _check_sizes(self.writes.items(), self.inserts)
        return events

    def _beside(
        self, unit: UnitOfWork, beliefs: Beliefs, dead_letters: dict[str, tuple[DeadLetter, int]]
    ) -> _Beside | Conflict:
        """What `unit` writes beside a run, its mark, its messages and effects, and those it ends; or why it cannot.
        Changes nothing yet."""
        there = beliefs.rows
        beside = _Beside()
        rows, consumed = beside.rows, beside.consumed
        # Rows that the unit consumes or replaces must be there. An update comes before the end of the same row.
        if unit.inbox_update is not None:
            key: Key = ("inbox", *unit.inbox_update.ref)
            if key not in there or key in self.consumed:
                return Conflict("gone", f"inbox row {unit.inbox_update.ref}")
            rows.append((key, encode(unit.inbox_update.envelope)))
        if unit.outbox_update is not None:
            key = ("outbox", *unit.outbox_update.ref)
            if key not in there or key in self.consumed:
                return Conflict("gone", f"outbox row {unit.outbox_update.ref}")
            rows.append((key, encode(unit.outbox_update.effect)))
        if unit.timer_done is not None:
            key = timer_key(unit.timer_done)
            if key not in self.timers and (key not in there or key in self.consumed):
                return Conflict("gone", f"timer {unit.timer_done.id}")
            rows.append((key, None))
            consumed.append(key)
        if unit.dead_letter_done is not None:
            letter = self.dead_letters.get(unit.dead_letter_done)
            if letter is None and ("dead_letter", unit.dead_letter_done) not in self.consumed:
                found = dead_letters.get(unit.dead_letter_done)
                if found is not None:
                    letter = found[0]
                    beside.checks.append(_check((("dead_letter", letter.id), found[1])))
            if letter is None:
                return Conflict("gone", f"dead letter {unit.dead_letter_done}")
            rows += [(row, None) for row in self._letter_keys(letter)]

        for pending in unit.timers_remove:
            key = timer_key(pending)
            rows.append((key, None))
            consumed.append(key)
        for timer in unit.timers_add:
            key = ("timer", micros(timer.due_at), timer.id)
            rows.append((key, encode(timer)))
            beside.timers_added.append(key)
        for letter in unit.dead_letters_add:
            first, *others = self._letter_keys(letter)
            rows.append((first, encode(letter)))
            rows += [(key, b"") for key in others]
        rows += [(child_key(child, "live"), encode(child)) for child in unit.children_add]
        if (child := unit.child_done) is not None:
            # Nobody else writes them: the parent has before its child came to be, and a child ends once.
            rows += [(child_key(child, "live"), None), (child_key(child, child.status), encode(child))]
        return beside

    def _letter_keys(self, letter: DeadLetter) -> tuple[Key, ...]:
        keys = dead_letter_keys(letter)
        return keys if self.indexes else keys[:1]

    def _claim(
        self, claim: SlotClaim, beliefs: Beliefs, rows: list[tuple[Key, bytes | None]], inserts: list[tuple[Key, bytes]]
    ) -> Held | Conflict:
        """Who holds which slot after `claim`, with the rows that this takes; changes nothing yet. That a number is free
        is found out by its insert: whoever else takes it makes the commit conflict."""
        where, owner = (claim.saga_id, claim.key), (claim.correlation_key, claim.message_id)
        known = self.slots.get(where)
        if known is None:
            known = beliefs.slots.get(where)
        if known is None:
            return Conflict("limit", f"the slots of {claim.key!r:.80} have not been read")  # Which makes us read them.
        held = dict(known)
        if claim.use == "free":
            number = min((number for number, holder in held.items() if holder == owner), default=None)
            if number is not None:
                rows.append((("slot", *where, number), None))
                del held[number]
            return held
        if len(held) >= claim.limit:
            return Conflict("limit", f"{len(held)} messages of saga {claim.saga_id!r} hold a slot of {claim.key!r:.80}")
        if claim.use == "take":
            number = next(number for number in range(len(held) + 1) if number not in held)
            row = HeldSlot(claim.saga_id, claim.key, number, *owner, claim.at)
            inserts.append((("slot", *where, number), encode(row)))
            held[number] = owner
        return held

    def _learn(self, unit: UnitOfWork, beside: _Beside) -> None:
        self.consumed.update(beside.consumed)
        self.timers.difference_update(beside.consumed)
        self.timers.update(beside.timers_added)
        if unit.dead_letter_done is not None:
            self.consumed.add(("dead_letter", unit.dead_letter_done))
            self.dead_letters.pop(unit.dead_letter_done, None)
        for letter in unit.dead_letters_add:
            self.dead_letters[letter.id] = letter

    def _unmark(self, row: Key) -> None:
        if self.marks.get(row):
            self.inserts = [insert for insert in self.inserts if insert[0] != row]
            if row in self.assumed_new:
                # The delete comes before every insert: it would hide that the first of the two was a duplicate.
                self.checks.append(_check((row, None)))
                self.assumed_new.discard(row)
        self.marks[row] = False


def _size_of(rows: Iterable[tuple[Key, bytes | None]]) -> int:
    return sum([len(value) for _, value in rows if value is not None])


def _check_sizes(rows: Iterable[tuple[Key, bytes | None]], inserts: Iterable[tuple[Key, bytes]]) -> None:
    largest = max(map(len, [value for _, value in (*rows, *inserts) if value is not None]), default=0)
    if largest > ROW_BYTES_MAX:
        raise ValueError(f"a row of {largest} bytes is too large for the store: at most {ROW_BYTES_MAX} are allowed")


def refused(error: Exception) -> Conflict:
    return Conflict("refused", f"{type(error).__name__}: {error}")


def _wrong_revision(instance: Instance, facts: RunFacts | None) -> Conflict:
    found = "does not exist" if facts is None else f"is at revision {facts[0]} with {facts[1]} entries"
    return Conflict("revision", f"{name_of(instance)} {found}")
