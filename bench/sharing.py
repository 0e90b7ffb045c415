"""A worker process for line 2: publishes orders on a store that it shares with others.

    python -m bench.sharing PLACE NUMBER OF IN_FLIGHT

It says when all of them have got their shares, and runs as many orders as it is told: each publisher sends the next
message after the receipt of the one before, wherever that one is applied.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.workload import open_runtime, order_messages
from sagaloom import SagaMessage
from sagaloom.ids import PARTITIONS
from sagaloom.process import calm_gc
from sagaloom.process import run as run_process
from sagaloom.runtime import SagaRuntime


async def _main(path: Path, number: int, of: int, in_flight: int) -> None:
    async with open_runtime(path) as (runtime, _, _):
        while sum(map(runtime.holds, range(PARTITIONS))) != PARTITIONS // of:  # noqa: ASYNC110 - it has no event
            await asyncio.sleep(0.01)
        calm_gc()
        _say(ready=True)
        loop = asyncio.get_running_loop()
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            name, _, orders = line.strip().partition(" ")
            groups = [order_messages(f"{name}-{number}-{each:07d}") for each in range(int(orders))]
            began, cpu = time.perf_counter(), time.process_time()
            left = iter(groups)
            await asyncio.gather(*(_publisher(runtime, left) for _ in range(in_flight)))
            await runtime.settled(60)
            _say(seconds=time.perf_counter() - began, cpu=time.process_time() - cpu)


async def _publisher(runtime: SagaRuntime, left: Iterator[Sequence[SagaMessage[Any]]]) -> None:
    for group in left:
        for message in group:
            (await runtime.publish(message)).raise_for_rejected()


def _say(**facts: float | bool) -> None:
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    run_process(_main(Path(sys.argv[1]), *map(int, sys.argv[2:5])))
