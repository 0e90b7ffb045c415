"""The lifeline: shows that this process lives, and notices when others come, go, or bring something.

It asks the store moment by moment, which touches no table, and has the receiver look closer when something has changed:
the receiver is the only one who takes and gives partitions, so that none changes hands within a turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from sagaloom.errors import SagasError
from sagaloom.ports.keyvalue import SeesOthers
from sagaloom.ports.store import SagaStore
from sagaloom.runtime.receiver import Receiver

__all__ = ["Lifeline"]

_log = logging.getLogger("sagaloom.lifeline")

_STANDING_SECONDS = 0.2
"""How often to look for the dead: a killed process is taken over within about this."""
_SETTLING_SECONDS = 0.01
"""How long after a nudge to look for who has come or gone."""
_SETTLING_SECONDS_MIN = 0.1
"""How long after the last such look at least: most nudges are about messages, and there may be hundreds in a second."""
_NEWS_SECONDS = 0.02
"""How often to look for what others have written, where nobody tells us."""
_HURRIED_SECONDS = 0.002
"""The same while somebody waits for what another process does."""
_HURRIED_SECONDS_MAX = 0.05
"""How seldom it may become where the store cannot tell that others have written."""


class Lifeline:
    """Watches the store for the receiver."""

    def __init__(self, store: SagaStore, receiver: Receiver, *, on_nudge: Callable[[], None]) -> None:
        """`on_nudge` is called whenever somebody has something for us."""
        self._store = store
        self._on_nudge = on_nudge
        self._receiver = receiver
        self._hurrying: asyncio.Task[None] | None = None
        self._settling: asyncio.TimerHandle | None = None
        self._settled_at = 0.0
        self._hurried_pause = _HURRIED_SECONDS
        receiver.share.on_waiting = self._hurry

    async def run(self) -> None:
        """Watches until cancelled."""
        loop = asyncio.get_running_loop()
        share = self._receiver.share
        look_at_standing = 0.0
        lease = None
        is_told = False
        while True:
            if share.lease is not lease:
                lease = share.lease
                is_told = self._store.listen(self._nudged)
            await asyncio.sleep(_NEWS_SECONDS if share.is_shared and not is_told else _STANDING_SECONDS)
            try:
                if share.is_shared and self._store.has_news():
                    self._receiver.attend(standing=False)
                if loop.time() >= look_at_standing:
                    look_at_standing = loop.time() + _STANDING_SECONDS
                    if share.giving or not self._store.stands():
                        self._receiver.attend(standing=True)
            except SagasError as error:
                _log.debug("the store cannot be watched: %s", error.message)

    def _nudged(self) -> None:
        self._on_nudge()
        self._receiver.attend(standing=False)
        if self._settling is None:
            loop = asyncio.get_running_loop()
            at = max(loop.time() + _SETTLING_SECONDS, self._settled_at + _SETTLING_SECONDS_MIN)
            self._settling = loop.call_at(at, self._look_at_standing)

    def _look_at_standing(self) -> None:
        self._settling = None
        self._settled_at = asyncio.get_running_loop().time()
        try:
            if not self._store.stands():
                self._receiver.attend(standing=True)
        except SagasError as error:
            _log.debug("the store cannot be watched: %s", error.message)

    def _hurry(self) -> None:
        """Somebody begins to wait for another process: looks often, until nobody waits any more."""
        # What they wait for may have happened already, and the news of it have been read.
        self._receiver.attend(standing=False)
        self._hurried_pause = _HURRIED_SECONDS
        if self._hurrying is None or self._hurrying.done():
            self._hurrying = asyncio.create_task(self._look_often(), name="sagaloom-lifeline-hurrying")

    async def _look_often(self) -> None:
        sees_others = isinstance(self._store, SeesOthers) and self._store.others_version() is not None
        self._hurried_pause = _HURRIED_SECONDS
        while self._receiver.share.looks_abroad:
            await asyncio.sleep(self._hurried_pause)
            with contextlib.suppress(SagasError):
                if self._store.has_news() or not sees_others:
                    self._receiver.attend(standing=False)
            if not sees_others:
                # Each look is a question to the store: less often, the longer it takes.
                self._hurried_pause = min(self._hurried_pause * 1.5, _HURRIED_SECONDS_MAX)
