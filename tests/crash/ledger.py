"""What the publishing side knows: which messages were acknowledged, and what was odd about it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

__all__ = ["Ledger"]

_ODDITIES_MAX = 200


@dataclass
class Ledger:
    """Kept outside everything that is killed."""

    acknowledged: dict[str, str] = field(default_factory=dict)
    """Message id -> order id."""
    offered_at: dict[str, int] = field(default_factory=dict)
    """When each message was sent for the first time, and when it was first acknowledged, as numbers that only grow:
    what was acknowledged before another one was offered is older than that, whoever took them in."""
    acknowledged_at: dict[str, int] = field(default_factory=dict)
    first_dispositions: dict[str, str] = field(default_factory=dict)
    oddities: list[str] = field(default_factory=list)
    cut_answers: int = 0
    duplicates_sent: int = 0
    refused_retryably: Counter[str] = field(default_factory=Counter)
    _ticks: int = 0

    def offer(self, message_id: str) -> int:
        """Notes that a message is about to be sent, and says when that is."""
        now = self._tick()
        self.offered_at.setdefault(message_id, now)
        return now

    def acknowledge(self, message_id: str, order_id: str, *, offered: int, duplicate: bool, disposition: str) -> None:
        """Notes an acknowledgement of what was sent at `offered`. If there was one before that, this must call it a
        duplicate: otherwise the store has forgotten what it promised to keep."""
        if self.acknowledged_at.get(message_id, offered) < offered and not duplicate:
            self.odd(f"I10 message {message_id} was acknowledged before, and is taken in as new ({disposition})")
        self.acknowledged.setdefault(message_id, order_id)
        self.acknowledged_at.setdefault(message_id, self._tick())
        self.first_dispositions.setdefault(message_id, disposition)

    def is_older(self, message: str, other: str) -> bool:
        """Whether `message` was acknowledged before `other` was offered."""
        return self.acknowledged_at[message] < self.offered_at[other]

    def _tick(self) -> int:
        self._ticks += 1
        return self._ticks

    def odd(self, what: str) -> None:
        """Notes a breach that only the publishing side could see."""
        if len(self.oddities) < _ODDITIES_MAX:
            self.oddities.append(what)
