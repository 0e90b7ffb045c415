"""For a process that does nothing but run sagas: the faster event loop, and a garbage collector that keeps calm.

`sagaloom serve` runs like this. A library must not decide it for its host, so a host that wants it says so:

    from sagaloom.process import calm_gc, run

    async def main() -> None:
        async with start_sagas([order_saga]) as sagas:
            calm_gc()
            ...

    run(main())
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

__all__ = ["calm_gc", "loop_factory", "run"]

T = TypeVar("T")


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's where it exists (not on Windows), else None, which means asyncio's own."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def run(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`, on the faster loop where there is one."""
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(main)


def calm_gc() -> None:
    """Call it once everything is loaded: what lives for ever is not looked at again, and the rest less often.

    A message makes some fifty objects that die by themselves. The default threshold of 700 would look for cycles among
    them every dozen messages, and find none.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
