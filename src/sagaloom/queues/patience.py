"""Waiting for a driver, and no longer than that.

`asyncio.timeout` cancels what it bounds, and then waits until that has ended. A driver that hears of the cancellation
and first tells the server about it waits for the very server that does not answer: a bound of five seconds becomes
none. So what a driver does runs in a task of its own here, and whoever waits for that stops waiting when he said he
would.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from typing import Any, Final, TypeVar

__all__ = ["causes", "end", "within"]

T = TypeVar("T")

_CANCELLATIONS: Final = 3
"""What waits for something again when it is cancelled does so once or twice."""
_CANCEL_SECONDS: Final = 0.2
_left: Final[set[asyncio.Task[Any]]] = set()
"""What did not end for all that; kept, since the loop itself would forget it in the middle."""


async def within(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns or raises.

    Raises `TimeoutError` when that takes longer than `seconds`, and then a moment passes at most until `work` has ended
    or is left alone. What was cancelled from within, as drivers do when a connection breaks, is a `ConnectionError`.
    """
    task = asyncio.create_task(work)
    try:
        done, _ = await asyncio.wait([task], timeout=seconds)
    except asyncio.CancelledError:
        await end(task)
        raise
    if not done:
        await end(task)
        raise TimeoutError(f"no answer within {seconds:g} s")
    try:
        return task.result()
    except asyncio.CancelledError as error:
        raise ConnectionError("the connection broke") from error


async def end(task: asyncio.Task[Any]) -> None:
    """Cancels `task`, more than once if need be, and leaves it alone when it goes on for all that."""
    for _ in range(_CANCELLATIONS):
        task.cancel()
        await asyncio.wait([task], timeout=_CANCEL_SECONDS)
        if task.done():
            break
    else:
        _left.add(task)
        task.add_done_callback(_left.discard)
    task.add_done_callback(_heard)


def causes(error: BaseException) -> Iterator[BaseException]:
    """`error`, and what led to it, the nearest first, each once: a driver that raises one error for everybody who waits
    makes a circle of them, now and then."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def _heard(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()  # Asked for, so that the loop does not complain that nobody did.
