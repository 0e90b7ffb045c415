"""Workers that break their promises on purpose: a harness that cannot fail proves nothing.

Each kind of sabotage breaks one promise, now and then, in a way that a real mistake would; `test_harness.py` has each
of them found, as what it is.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from sagaloom.engine.records import OutboxEffect
from sagaloom.errors import Fenced
from sagaloom.messages import SagaMessage
from sagaloom.ports.store import CommitResult, Lease, SagaStore, UnitOfWork
from sagaloom.ports.targets import EffectTarget

__all__ = ["SABOTAGES", "Saboteur"]

DROP_COMMIT: Final = "drop-commit"
ACK_EARLY: Final = "ack-early"
IGNORE_FENCING: Final = "ignore-fencing"
SWAP_ORDER: Final = "swap-order"
NEW_EFFECT_KEY: Final = "new-effect-key"
SWALLOW_EFFECT: Final = "swallow-effect"
SABOTAGES: Final = (DROP_COMMIT, ACK_EARLY, IGNORE_FENCING, SWAP_ORDER, NEW_EFFECT_KEY, SWALLOW_EFFECT)

_COMMITS: Final = 5
"""Every how manyth commit is dropped, of those that take a message in."""
_EFFECTS: Final = 10
_EARLY_SECONDS: Final = 0.2
"""How much later what was acknowledged is published: so late that a kill at any moment finds some of it unwritten."""
_HELD_BACK: Final = 4
"""Every how manyth message a later one may overtake: often enough that in a short run some are overtaken indeed."""
_HELD_BACK_SECONDS: Final = 0.3


class Saboteur:
    """Does one kind of sabotage, or none."""

    def __init__(self, kind: str) -> None:
        if kind and kind not in SABOTAGES:
            raise ValueError(f"{kind!r} is no sabotage: {', '.join(SABOTAGES)}")
        self._kind = kind
        self._messages = 0
        self._background: set[asyncio.Task[Any]] = set()

    def store(self, inner: SagaStore) -> Any:
        return _Store(inner, self._kind) if self._kind in (DROP_COMMIT, IGNORE_FENCING) else inner

    def target(self, inner: EffectTarget) -> Any:
        return _Target(inner, self._kind) if self._kind in (NEW_EFFECT_KEY, SWALLOW_EFFECT) else inner

    def takes_over(self, publish: Callable[[], Any]) -> bool:
        """Whether a message shall be acknowledged though it was only taken into memory. Then it is published later."""
        self._messages += 1
        held_back = self._kind == SWAP_ORDER and self._messages % _HELD_BACK == 0
        if self._kind != ACK_EARLY and not held_back:
            return False

        async def later() -> None:
            await asyncio.sleep(_HELD_BACK_SECONDS if held_back else _EARLY_SECONDS)
            await publish()

        task = asyncio.create_task(later())
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return True


class _Store:
    """Says that it has written what it has not, or writes though it may not."""

    def __init__(self, inner: SagaStore, kind: str) -> None:
        self._inner = inner
        self._kind = kind
        self._commits = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def commit(self, units: Sequence[UnitOfWork], *, lease: Lease) -> CommitResult:
        self._commits += any(unit.mark is not None for unit in units)
        if self._kind == DROP_COMMIT and self._commits % _COMMITS == 0:
            self._commits += 1
            return CommitResult({}, 1_000_000_000 + self._commits, 1_000_000_000 + self._commits, 0)
        try:
            return await self._inner.commit(units, lease=lease)
        except Fenced:
            if self._kind != IGNORE_FENCING:
                raise
        # It takes the right to write instead of asking for it, and goes on with what it has decided long ago.
        return await self._inner.commit(units, lease=await self._inner.acquire(lease.holder, now=datetime.now(UTC)))


class _Target:
    """Sends under a key that is new each time, or does not send at all."""

    def __init__(self, inner: EffectTarget, kind: str) -> None:
        self._inner = inner
        self._kind = kind
        self._effects = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def deliver(self, effect: OutboxEffect) -> Sequence[SagaMessage[Any]]:
        self._effects += 1
        if self._effects % _EFFECTS == 0:
            if self._kind == SWALLOW_EFFECT:
                return []
            await self._inner.deliver(msgspec.structs.replace(effect, effect_key=uuid.uuid4().hex))
        return await self._inner.deliver(effect)
