"""What a batch of saga rows becomes on its way into PostgreSQL: one array for each column of each kind of row.

The three functions that write it (`saga_runtime_begin`, `_write_instances`, `_write_rows`) take their arguments in the
order of `_BEGIN`, `_INSTANCES` and `_ROWS`: each group is the rows of one kind with as many columns as its number says.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from sagaloom.ports.keyvalue import Key

__all__ = ["COMMIT", "SagaBatch"]

_BEGIN: Final = {
    "older": 5,
    "own": 1,
    "head_checks": 2,
    "letter_checks": 2,
    "marks_absent": 2,
    "marks_gone": 2,
    "marks": 3,
}
_INSTANCES: Final = {"heads_new": 9, "heads": 4, "runs_new": 15, "runs": 12, "entries": 11}
_ROWS: Final = {
    "part_puts": 1,
    "sagas_seen": 1,
    "inbox_new": 10,
    "inbox": 6,
    "inbox_gone": 2,
    "outbox_new": 8,
    "outbox": 7,
    "outbox_gone": 2,
    "timers": 9,
    "timers_gone": 2,
    "letters": 10,
    "letters_gone": 1,
    "children": 11,
    "children_gone": 5,
    "slots": 7,
    "slots_gone": 3,
}

_Row = tuple[object, ...]


class SagaBatch:
    """The rows of one commit, by kind."""

    __slots__ = (
        *_BEGIN,
        *_INSTANCES,
        *_ROWS,
        "feed",
        "feed_count",
        "holder",
        "is_replicated",
        "member",
        "older_keys",
        "stamp",
    )

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
        self.own: list[_Row] = []
        self.head_checks: list[_Row] = []
        self.letter_checks: list[_Row] = []
        self.marks_absent: list[_Row] = []
        self.marks_gone: list[_Row] = []
        self.marks: list[_Row] = []
        self.heads_new: dict[bytes, _Row] = {}
        self.heads: list[_Row] = []
        self.runs_new: dict[tuple[int, int], _Row] = {}
        self.runs: list[_Row] = []
        self.entries: list[_Row] = []
        self.part_puts: list[_Row] = []
        self.sagas_seen: list[_Row] = []
        self.inbox_new: list[_Row] = []
        self.inbox: list[_Row] = []
        self.inbox_gone: list[_Row] = []
        self.outbox_new: list[_Row] = []
        self.outbox: list[_Row] = []
        self.outbox_gone: list[_Row] = []
        self.timers: list[_Row] = []
        self.timers_gone: list[_Row] = []
        self.letters: list[_Row] = []
        self.letters_gone: list[_Row] = []
        self.children: list[_Row] = []
        self.children_gone: list[_Row] = []
        self.slots: list[_Row] = []
        self.slots_gone: list[_Row] = []

    def arguments(self, commit_no: int) -> list[object]:
        """The arguments of `COMMIT`."""
        begin = (
            *(self.older, self.own, self.head_checks, self.letter_checks),
            *(self.marks_absent, self.marks_gone, self.marks),
        )
        instances = (self.heads_new.values(), self.heads, self.runs_new.values(), self.runs, self.entries)
        rows = (
            *(self.part_puts, self.sagas_seen, self.inbox_new, self.inbox, self.inbox_gone),
            *(self.outbox_new, self.outbox, self.outbox_gone, self.timers, self.timers_gone),
            *(self.letters, self.letters_gone, self.children, self.children_gone),
            *(self.slots, self.slots_gone),
        )
        arguments: list[object] = [self.is_replicated, self.member, self.stamp]
        _columns(arguments, begin, _BEGIN.values())
        _columns(arguments, instances, _INSTANCES.values())
        arguments += (self.holder, commit_no)
        _columns(arguments, rows, _ROWS.values())
        arguments += (self.feed_count, self.feed)
        return arguments


def _columns(arguments: list[object], groups: Sequence[Iterable[_Row]], widths: Iterable[int]) -> None:
    for group, width in zip(groups, widths, strict=True):
        columns = tuple(zip(*group, strict=True))
        arguments.extend(columns or (None,) * width)  # Most kinds are not in a commit, and an empty array is work.


def _commit_statement() -> str:
    numbers = iter(range(1, 1000))

    def some(count: int) -> str:
        return ", ".join(f"${next(numbers)}" for _ in range(count))

    return f"""
        SELECT b.outcome, b.older, b.stamp, r.inbox_base, r.outbox_base, r.feed_base
        FROM (SELECT @schema@.saga_runtime_durability({some(1)})) AS d
        CROSS JOIN LATERAL @schema@.saga_runtime_begin({some(2 + sum(_BEGIN.values()))}) AS b
        CROSS JOIN LATERAL @schema@.saga_runtime_write_instances(b.stamp, {some(sum(_INSTANCES.values()))}) AS i(stamp)
        CROSS JOIN LATERAL @schema@.saga_runtime_write_rows(i.stamp, {some(2 + sum(_ROWS.values()) + 2)}) AS r
    """


COMMIT: Final = _commit_statement()
