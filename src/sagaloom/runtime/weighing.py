"""How many bytes wait, without looking at each message that comes and goes.

A few messages cannot be too heavy, since each has a limit of its own. Where more wait than that, all of them are
weighed, once for every eighth of their number that came since, so that each costs the same however many there are; and
again when that was a tenth of a second ago. In between what comes is added, and what goes is not noticed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

__all__ = ["Scales"]

_OLD_SECONDS: Final = 0.1


class Scales:
    """Says whether there is room for a message among those that `weigh` weighs, each of at most `each_bytes_max`."""

    def __init__(self, weigh: Callable[[], int], *, bytes_max: int, each_bytes_max: int) -> None:
        self._weigh = weigh
        self._bytes_max = bytes_max
        self._left = 0
        """How many more may come before they are weighed again."""
        self._weighed_at = float("-inf")
        self.few = bytes_max // max(1, each_bytes_max) - 1
        """Among so many there is room for one more, whatever they weigh: nobody need ask."""
        self.bytes = 0
        """What waited, as far as we know."""

    def have_room(self, waiting: int, size: int) -> bool:
        """Whether `size` bytes more fit beside `waiting` messages, more than a few; if so they are counted."""
        now = asyncio.get_running_loop().time()
        if self._left <= 0 or now - self._weighed_at > _OLD_SECONDS:
            self.bytes, self._left, self._weighed_at = self._weigh(), waiting // 8, now
        self._left -= 1
        if self.bytes + size > self._bytes_max:
            return False
        self.bytes += size
        return True
