"""Where effects go when they leave: one small port.

A target delivers one kind of effect. It is called at least once for every committed effect, always under the same
effect key; it returns when the receiver has taken the effect over, with the messages it answered, and raises
`DeliveryFailed` (or anything else, which counts as retryable) when not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from sagaloom.engine.records import OutboxEffect
from sagaloom.messages import SagaMessage

__all__ = ["EffectTarget"]


@runtime_checkable
class EffectTarget(Protocol):
    """Delivers effects of one kind, such as `service`."""

    @property
    def kind(self) -> str: ...

    async def deliver(self, effect: OutboxEffect) -> Sequence[SagaMessage[Any]]:
        """Hands `effect` over and returns the receiver's answers, which go back to the sender's run."""
        ...

    async def close(self) -> None: ...
