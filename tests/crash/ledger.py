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
    first_dispositions: dict[str, str] = field(default_factory=dict)
    oddities: list[str] = field(default_factory=list)
    cut_answers: int = 0
    duplicates_sent: int = 0
    refused_retryably: Counter[str] = field(default_factory=Counter)

    def acknowledge(self, message_id: str, order_id: str, *, duplicate: bool, disposition: str) -> None:
        """Notes an acknowledgement. One that came before must be called a duplicate now: otherwise the store has
        forgotten what it promised to keep."""
        if message_id in self.acknowledged and not duplicate:
            self.odd(f"I10 message {message_id} was acknowledged before, and is taken in as new ({disposition})")
        self.acknowledged.setdefault(message_id, order_id)
        self.first_dispositions.setdefault(message_id, disposition)

    def odd(self, what: str) -> None:
        """Notes a breach that only the publishing side could see."""
        if len(self.oddities) < _ODDITIES_MAX:
            self.oddities.append(what)
