"""A process that runs workflows of three steps with DBOS, for line 5.

    python -m bench.peers.dbos_steps URL

It answers each line it is sent with one of JSON: `run FORM IN_FLIGHT COUNT` runs COUNT workflows, IN_FLIGHT of them
side by side, and says how many seconds that took. FORM is `threads` or `async`: DBOS has both.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from dbos import DBOS, DBOSConfig

_STEPS = 3


@DBOS.step()
def _step(order_id: str, number: int) -> int:
    return number


@DBOS.workflow()
def _order(order_id: str) -> str:
    for number in range(_STEPS):
        _step(order_id, number)
    return order_id


@DBOS.step()
async def _async_step(order_id: str, number: int) -> int:
    return number


@DBOS.workflow()
async def _async_order(order_id: str) -> str:
    for number in range(_STEPS):
        await _async_step(order_id, number)
    return order_id


def _in_threads(in_flight: int, count: int) -> None:
    with ThreadPoolExecutor(in_flight) as threads:
        list(threads.map(_order, (f"o-{number}" for number in range(count))))


async def _async(in_flight: int, count: int) -> None:
    async def worker(left: Iterator[int]) -> None:
        for number in left:
            await _async_order(f"o-{number}")

    left = iter(range(count))
    await asyncio.gather(*(worker(left) for _ in range(in_flight)))


def _main(url: str) -> None:
    config: DBOSConfig = {
        "name": "bench",
        "system_database_url": url,
        "log_level": "ERROR",
        # One connection and one thread for each that is in flight, so that nothing waits for those.
        "sys_db_pool_size": 64,
        "max_executor_threads": 128,
    }
    DBOS(config=config)
    DBOS.launch()
    try:
        for line in sys.stdin:
            _, form, in_flight, count = line.split()
            began = time.perf_counter()
            if form == "threads":
                _in_threads(int(in_flight), int(count))
            else:
                asyncio.run(_async(int(in_flight), int(count)))
            print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)
    finally:
        DBOS.destroy()


if __name__ == "__main__":
    _main(sys.argv[1])
