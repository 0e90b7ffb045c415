"""A worker process for line 7: opens a store, says when it is ready and when its first publish was applied.

    python -m bench.restarting FILE ACCOUNT

Then it keeps publishing, 64 at once, until somebody kills it.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

from bench.filling import account_id
from bench.workload import account_messages, open_runtime, publish_all


async def _main(path: Path, first: int) -> None:
    async with open_runtime(path) as (runtime, _, _):
        ready = time.monotonic()
        await publish_all(runtime, account_messages([account_id(first)]), in_flight=1)
        applied = time.monotonic()
        print(json.dumps({"ready": ready, "applied": applied}), flush=True)
        while True:
            await publish_all(runtime, account_messages([account_id(number) for number in range(640)]), in_flight=64)


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1]), int(sys.argv[2])))
