"""A worker process for line 7: opens a store, says when it is ready and when its first publish was applied.

    python -m bench.restarting FILE ACCOUNT [beside]

Then it keeps publishing, 64 at once, until somebody kills it. `beside` another process that has the store it says when
it has got its share, and once more when it holds everything and has applied a publish of each partition: the other one
is gone.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

from bench.filling import account_id
from bench.workload import account_messages, open_runtime, publish_all
from sagaloom.ids import PARTITIONS
from sagaloom.runtime import SagaRuntime

_ACCOUNTS = 640


async def _main(path: Path, first: int, *, is_beside: bool) -> None:
    async with open_runtime(path) as (runtime, _, _):
        ready = time.monotonic()
        await publish_all(runtime, account_messages([account_id(first)]), in_flight=1, is_shared=True)
        _say(ready=ready, applied=time.monotonic())
        messages = account_messages([account_id(number) for number in range(_ACCOUNTS)])
        telling = asyncio.create_task(_tell_of_takeover(runtime)) if is_beside else None
        while True:
            await publish_all(runtime, messages, in_flight=64, is_shared=True)
            if telling is not None and telling.done():
                telling.result()
                _say(applied=time.monotonic())
                telling = None


async def _tell_of_takeover(runtime: SagaRuntime) -> None:
    """Returns when everything is held, after it was shared."""
    while _held(runtime) in (0, PARTITIONS):  # noqa: ASYNC110 - asked, not told: the runtime has no event for it
        await asyncio.sleep(0.005)
    _say(held=_held(runtime))
    while _held(runtime) < PARTITIONS:  # noqa: ASYNC110
        await asyncio.sleep(0.002)
    _say(taken=time.monotonic())


def _held(runtime: SagaRuntime) -> int:
    return sum(map(runtime.holds, range(PARTITIONS)))


def _say(**facts: float) -> None:
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1]), int(sys.argv[2]), is_beside="beside" in sys.argv))
