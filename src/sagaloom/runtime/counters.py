"""What happened since the runtime was made, as numbers that only grow: for `/metrics`, and for whoever else asks.

Messages are counted once a batch, after its commit, so that the walk of a message pays next to nothing for it. Nothing
here is stored: a restart begins at 0, which is what those who read such numbers expect.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Literal, Protocol

from sagaloom.engine.records import Decision, Disposition
from sagaloom.ports.store import UnitOfWork
from sagaloom.runtime.deliveries import Delivery

__all__ = ["Counters", "EffectEnd"]

EffectEnd = Literal["dispatched", "failed", "dead_lettered"]


class _Written(Protocol):
    """A message whose unit was committed: decided, or only accepted."""

    @property
    def delivery(self) -> Delivery: ...
    @property
    def unit(self) -> UnitOfWork: ...
    @property
    def decision(self) -> Decision | None: ...


class Counters:
    """`accepted` counts by saga the messages that were new and became durable; `decided` by saga and disposition what
    was decided about messages, where `pending` is an attempt that failed; `effects` the attempts to deliver one, by
    kind of target and what came of it; `throttled` by saga the messages that found no free slot."""

    __slots__ = ("accepted", "commits", "commits_failed", "conflicts", "decided", "effects", "throttled")

    def __init__(self) -> None:
        self.accepted: Counter[str] = Counter()
        self.decided: Counter[tuple[str, Disposition]] = Counter()
        # One at a time a plain dict counts twice as fast as a counter.
        self.effects: defaultdict[tuple[str, EffectEnd], int] = defaultdict(int)
        self.throttled: Counter[str] = Counter()
        self.commits = 0
        self.commits_failed = 0
        self.conflicts = 0

    def committed(self, written: Sequence[_Written], *, conflicts: int) -> None:
        """Counts a commit and the messages it has written."""
        self.commits += 1
        self.conflicts += conflicts
        # A counter counts a list three times as fast as a loop does, and texts three times as fast as pairs of them.
        self.accepted.update([each.delivery.key[0] for each in written if each.unit.mark is not None])
        decided: list[tuple[str, Disposition]] = [
            (each.delivery.key[0], each.decision.disposition) for each in written if each.decision is not None
        ]
        applied = [saga_id for saga_id, disposition in decided if disposition == "applied"]
        for saga_id, count in Counter(applied).items():
            self.decided[saga_id, "applied"] += count
        if len(applied) < len(decided):
            self.decided.update([each for each in decided if each[1] != "applied"])
