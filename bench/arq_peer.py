"""arq over Redis, for line 10: run by the Python of an environment of its own (`make bench` makes it), for arq wants a
driver of Redis that is older than ours. Knows nothing but arq: `arq_peer.py URL COUNT` prints how many seconds it took.

Its worker looks again after every `poll_delay`, which is set to next to nothing: with the half a second that is its
default, that would be all that is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import sys
import time
import uuid
from typing import Any, Final

_AT_ONCE: Final = 64


async def measure(url: str, count: int) -> float:
    connections: Any = importlib.import_module("arq.connections")
    working: Any = importlib.import_module("arq.worker")
    queue = f"bench-arq-{uuid.uuid4().hex}"
    settings = connections.RedisSettings.from_dsn(url)
    pool = await connections.create_pool(settings, default_queue_name=queue)
    left, over = count, asyncio.Event()

    async def work(_: dict[str, Any], n: int) -> None:
        nonlocal left
        left -= 1
        if not left:
            over.set()

    for first in range(0, count, 100):
        await asyncio.gather(*(pool.enqueue_job("work", n) for n in range(first, min(first + 100, count))))
    worker = working.Worker(
        functions=[working.func(work, name="work")],
        redis_pool=pool,
        queue_name=queue,
        max_jobs=_AT_ONCE,
        poll_delay=0.001,
        keep_result=0,
        handle_signals=False,
        log_results=False,
    )
    began = time.perf_counter()
    running = asyncio.create_task(worker.main())
    done = asyncio.create_task(over.wait())
    await asyncio.wait([running, done], return_when=asyncio.FIRST_COMPLETED)
    seconds = time.perf_counter() - began
    if running.done():
        running.result()
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    await asyncio.wait(list(worker.tasks.values()) or [done], timeout=5)
    await pool.delete(queue, f"{queue}:health-check")
    await pool.aclose()
    return seconds


if __name__ == "__main__":
    print(asyncio.run(measure(sys.argv[1], int(sys.argv[2]))))
