"""What a batch of saga rows becomes on its way into PostgreSQL: one array for each kind of row.

`_KINDS` are the arguments of the function that writes it (`saga_runtime_commit`), in its order, and the attributes of a
`SagaBatch`. A row is a tuple, with the columns of the type that the function has for its kind, in their order.
"""

from __future__ import annotations

from typing import Final

from sagaloom.ports.keyvalue import Key

__all__ = ["COMMIT", "SagaBatch"]

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
