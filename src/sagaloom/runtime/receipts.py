"""What `publish` answers: a receipt or a refusal. Both are values; neither is raised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

from sagaloom.ports.publisher import Outcome, Refusal

__all__ = ["Outcome", "PublishReceipt", "PublishRejected"]


class PublishReceipt(msgspec.Struct, frozen=True, kw_only=True):
    """The message is durable: it survives kill -9 and power loss from here on. `duplicate`: it was before.
    `outcomes` has one entry for each saga that takes it."""

    message_id: str
    message_type: str
    correlation_key: str | None
    outcomes: tuple[Outcome, ...]
    duplicate: bool = False
    published: Literal[True] = True

    def raise_for_rejected(self) -> PublishReceipt:
        return self


@dataclass(slots=True, kw_only=True)
class PublishRejected(Refusal):
    """The message was refused and changed nothing. `error` has its code, message and data. A refusal that nobody
    looks at is logged as a warning."""
