"""What a batch of saga rows becomes on its way into PostgreSQL: one array for each kind of row.

`_KINDS` are the arguments of the function that writes it (`saga_runtime_commit`), in its order, and the attributes of a
`SagaBatch`. A row is a tuple, with the columns of the type that the function has for its kind, in their order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from sagaloom.kv.packing import pack
from sagaloom.kv.postgres.columns import (
    child_row,
    entry_row,
    head_changes,
    head_row,
    inbox_changes,
    inbox_row,
    letter_row,
    outbox_changes,
    outbox_row,
    run_changes,
    run_row,
    slot_row,
    text,
    timer_row,
)
from sagaloom.ports.keyvalue import Check, Key

__all__ = ["COMMIT", "SagaBatch", "batch_of"]

_KINDS: Final = (
    *("older", "own", "head_checks", "letter_checks", "marks_absent", "marks_gone", "marks"),
    *("heads_new", "heads", "runs_new", "runs", "entries", "part_puts", "sagas_seen"),
    *("inbox_new", "inbox", "inbox_gone", "outbox_new", "outbox", "outbox_gone", "timers", "timers_gone"),
    *("letters", "letters_gone", "children", "children_gone", "slots", "slots_gone"),
)

_Row = tuple[object, ...]


class SagaBatch:
    """The rows of one commit, by kind."""

    __slots__ = (*_KINDS, "feed", "feed_count", "holder", "is_replicated", "member", "older_keys", "stamp")

    def __init__(self) -> None:
        self.member = b""
        self.holder = ""
        self.stamp = 0
        self.is_replicated = False
        """Whether its commit waits for a synchronous standby."""
        self.feed = b""
        self.feed_count = 0
        self.older: list[_Row] = []
        self.older_keys: list[Key] = []
        """What the rows of `older` are called outside."""
        self.own: list[int] = []
        self.head_checks: list[_Row] = []
        self.letter_checks: list[_Row] = []
        self.marks_absent: list[_Row] = []
        self.marks_gone: list[_Row] = []
        self.marks: list[_Row] = []
        self.heads_new: list[_Row] = []
        self.heads: list[_Row] = []
        self.runs_new: list[_Row] = []
        self.runs: list[_Row] = []
        self.entries: list[_Row] = []
        self.part_puts: list[int] = []
        self.sagas_seen: list[bytes] = []
        self.inbox_new: list[_Row] = []
        self.inbox: list[_Row] = []
        self.inbox_gone: list[_Row] = []
        self.outbox_new: list[_Row] = []
        self.outbox: list[_Row] = []
        self.outbox_gone: list[_Row] = []
        self.timers: list[_Row] = []
        self.timers_gone: list[_Row] = []
        self.letters: list[_Row] = []
        self.letters_gone: list[str] = []
        self.children: list[_Row] = []
        self.children_gone: list[_Row] = []
        self.slots: list[_Row] = []
        self.slots_gone: list[_Row] = []

    def arguments(self, commit_no: int) -> list[object]:
        """The arguments of `COMMIT`."""
        arguments: list[object] = [self.is_replicated, self.member, self.stamp, self.holder, commit_no]
        # Most kinds are not in a commit, and an empty array is work.
        arguments += [getattr(self, kind) or None for kind in _KINDS]
        arguments += (self.feed_count, self.feed)
        return arguments


def _commit_statement() -> str:
    places = ", ".join(f"${number}" for number in range(2, 5 + len(_KINDS) + 2 + 1))
    return f"""
        SELECT c.* FROM (SELECT @schema@.saga_runtime_durability($1)) AS d
        CROSS JOIN LATERAL @schema@.saga_runtime_commit({places}) AS c
    """


COMMIT: Final = _commit_statement()


def batch_of(
    checks: Sequence[Check],
    inserts: Sequence[tuple[Key, bytes]],
    puts: Sequence[tuple[Key, bytes]],
    deletes: Sequence[Key],
    reserve: Mapping[str, int],
) -> SagaBatch:
    """The batch that one commit of saga rows becomes. Arguments as for `KeyValue.commit`. Rows that others may
    lock as well are in one order."""
    batch = SagaBatch()
    heads_new: dict[bytes, tuple[object, ...]] = {}
    runs_new: dict[tuple[int, int], tuple[object, ...]] = {}
    key: Any  # The first part says of what kind the others are; to match each of them costs twice as much.
    for key, stamp in checks:
        match key[0]:
            case "older":
                _, part, saga, correlation, above, below, *own = key
                batch.older.append((part, text(saga), text(correlation), above, below))
                batch.older_keys.append(key)
                batch.own += own
            case "correlation" if stamp is not None:
                _, _, hashed = key
                batch.head_checks.append((hashed, stamp))
            case "dead_letter" if stamp is not None:
                _, letter = key
                batch.letter_checks.append((letter, stamp))
            case "dedupe" if stamp is None:
                _, pk, hashed = key
                batch.marks_absent.append((pk, hashed))
            case "member" if stamp is not None:
                _, holder = key
                batch.member, batch.holder, batch.stamp = pack((holder,)), holder, stamp
            case _:
                raise AssertionError(f"a commit of saga rows does not check {key!r}")
    for key, value in inserts:
        match key[0]:
            case "dedupe":
                _, pk, hashed = key
                batch.marks.append((pk, hashed, value))
            case "transition":
                _, pk, run, number = key
                batch.entries.append(entry_row(pk, run, number, value))
            case "outbox":
                _, part, _ = key
                batch.outbox_new.append(outbox_row(part, value))
            case "state":
                _, pk, run = key
                runs_new[pk, run] = run_row(pk, run, value)
            case "correlation":
                _, _, hashed = key
                heads_new[hashed] = head_row(hashed, value)
            case "inbox":
                _, part, _ = key
                batch.inbox_new.append(inbox_row(part, value))
            case "slot":
                _, saga, concurrency, number = key
                batch.slots.append(slot_row((saga, concurrency, number), value))
            case "feed":
                batch.feed, batch.feed_count = value, reserve["feed"]
            case _:
                raise AssertionError(f"a commit of saga rows does not insert {key!r}")
    for key, value in puts:
        match key[0]:
            case "state":
                _, pk, run = key
                if (pk, run) in runs_new:
                    runs_new[pk, run] = run_row(pk, run, value)
                else:
                    batch.runs.append(run_changes(pk, run, value))
            case "correlation":
                _, _, hashed = key
                if hashed in heads_new:
                    heads_new[hashed] = head_row(hashed, value)
                else:
                    batch.heads.append(head_changes(hashed, value))
            case "timer":
                _, due, timer = key
                batch.timers.append(timer_row(due, timer, value))
            case "outbox":
                _, part, seq = key
                batch.outbox.append(outbox_changes(part, seq, value))
            case "inbox":
                _, part, seq = key
                batch.inbox.append(inbox_changes(part, seq, value))
            case "dead_letter":
                _, letter = key
                batch.letters.append(letter_row(letter, value))
            case "child":
                _, pk, run, status, revision, position = key
                batch.children.append(child_row((pk, run, status, revision, position), value))
            case "arrivals":
                _, part = key
                batch.part_puts.append(part)
            case "saga_seen":
                _, saga = key
                batch.sagas_seen.append(pack((saga,)))
            case _:
                raise AssertionError(f"a commit of saga rows does not put {key!r}")
    for key in deletes:
        match key[0]:
            case "outbox":
                _, part, seq = key
                batch.outbox_gone.append((part, seq))
            case "inbox":
                _, part, seq = key
                batch.inbox_gone.append((part, seq))
            case "timer":
                _, due, timer = key
                batch.timers_gone.append((due, timer))
            case "dedupe":
                _, pk, hashed = key
                batch.marks_gone.append((pk, hashed))
            case "slot":
                _, saga, concurrency, number = key
                batch.slots_gone.append((saga, concurrency, number))
            case "child":
                _, *place = key
                batch.children_gone.append(tuple(place))
            case "dead_letter":
                _, letter = key
                batch.letters_gone.append(letter)
            case _:
                raise AssertionError(f"a commit of saga rows does not delete {key!r}")
    # In one order, so that no two commits that want the same rows wait for each other. Heads that will be changed are
    # locked together with those that are checked: the holder changes what somebody else, who brings, checks.
    checked = {hashed for hashed, _ in batch.head_checks}
    batch.head_checks += [(row[0], None) for row in batch.heads if row[0] not in checked]
    batch.head_checks.sort(key=_first)
    batch.letter_checks.sort()
    batch.marks.sort()
    batch.slots.sort(key=lambda row: row[:3])
    batch.slots_gone.sort()
    batch.heads_new = [row for _, row in sorted(heads_new.items())]
    batch.runs_new = list(runs_new.values())
    batch.sagas_seen.sort()
    return batch


def _first(row: tuple[object, ...]) -> Any:
    return row[0]
