"""Connections from a pool of asyncpg, and what to do with one whose statement was given up.

The driver has the server cancel such a statement, and gives the connection back when the server has said that it did.
Whoever leaves `async with pool.acquire()` waits for that, for as long as he would have waited for the connection; and
when he is cancelled meanwhile, he leaves behind a task of the driver's whose error nobody asks for, which the loop then
complains about. A server that does not answer makes both of it the rule.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Final, Protocol, TypeVar

__all__ = ["acquired"]

_C_co = TypeVar("_C_co", covariant=True)
_CANCEL_SECONDS: Final = 1.0
"""How long a server may take to cancel a statement. Then its connection is dropped."""
_returning: Final[set[asyncio.Task[Any]]] = set()
"""What still waits for that, after those who borrowed have gone; kept, since the loop itself would forget it."""


class _Pool(Protocol[_C_co]):
    def acquire(self, *, timeout: float) -> Awaitable[_C_co]: ...

    def release(self, connection: Any, *, timeout: float | None = None) -> Coroutine[Any, Any, None]: ...


@asynccontextmanager
async def acquired(pool: _Pool[_C_co], *, timeout: float) -> AsyncGenerator[_C_co]:
    """A connection of `pool`, waited for at most `timeout` seconds. Giving it back takes a second at most."""
    connection = await pool.acquire(timeout=timeout)
    try:
        yield connection
    except BaseException:
        # In a task of its own, which goes on when we are cancelled, and whose error somebody asks for.
        returning = asyncio.create_task(pool.release(connection, timeout=_CANCEL_SECONDS))
        _returning.add(returning)
        returning.add_done_callback(_returned)
        await asyncio.wait([returning])
        raise
    await pool.release(connection)


def _returned(returning: asyncio.Task[None]) -> None:
    _returning.discard(returning)
    if not returning.cancelled():
        returning.exception()  # Then the pool has dropped the connection, which is what there is to do.
