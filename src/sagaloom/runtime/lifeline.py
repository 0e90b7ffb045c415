"""The lifeline: shows that this process lives, and notices when others come, go, or bring something.

It asks the store moment by moment, which touches no table, and has the receiver look closer when something has changed:
the receiver is the only one who takes and gives partitions, so that none changes hands within a turn.
"""

from __future__ import annotations

import asyncio
import logging

from sagaloom.errors import SagasError
from sagaloom.ports.store import SagaStore
from sagaloom.runtime.receiver import Receiver

__all__ = ["Lifeline"]

_log = logging.getLogger("sagaloom.lifeline")

_STANDING_SECONDS = 0.1
"""How often to look for the dead: a killed process is taken over within about twice this."""
_NEWS_SECONDS = 0.02
"""How often to look for what others have written, while there are any."""
_BUSY_NEWS_SECONDS = 0.002
"""The same while news keep coming, or somebody waits for them."""
_BUSY_LOOKS = 250


class Lifeline:
    """Watches the store for the receiver."""

    def __init__(self, store: SagaStore, receiver: Receiver) -> None:
        self._store = store
        self._receiver = receiver

    async def run(self) -> None:
        """Watches until cancelled."""
        loop = asyncio.get_running_loop()
        look_at_standing = 0.0
        busy = 0
        while True:
            receiver = self._receiver
            minds_news = receiver.is_shared or receiver.looks_abroad
            if not minds_news:
                await asyncio.sleep(_STANDING_SECONDS)
            else:
                await asyncio.sleep(_BUSY_NEWS_SECONDS if busy or receiver.looks_abroad else _NEWS_SECONDS)
            try:
                if minds_news and self._store.has_news():
                    busy = _BUSY_LOOKS
                    receiver.attend(standing=False)
                elif busy:
                    busy -= 1
                if loop.time() >= look_at_standing:
                    look_at_standing = loop.time() + _STANDING_SECONDS
                    if receiver.giving or not self._store.stands():
                        receiver.attend(standing=True)
            except SagasError as error:
                _log.debug("the store cannot be watched: %s", error.message)
