"""A consumer for `make chaos QUEUE=...`: a process that works on messages, says so in a file, and waits to be killed.

Each line of the file is one write, appended by the kernel as a whole, so a process that dies leaves no half ones:

    <what> <message id> <attempt> <pid> <moment>

with `+` when a handler begins, `=` when it has done its work, `!` when it fails.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from typing import Any

from sagaloom.process import run
from sagaloom.queue import QueueConnectionOptions, QueueContext, create_parallel_queue

NAME = "chaos"
ATTEMPTS = 6
RETRY_MS = 40
VISIBILITY_SECONDS = 3.0
DOOMED, FLAKY, GOOD = "doomed", "flaky", "good"


def queue_at(provider: str, address: str, namespace: str, *, concurrency: int = 1) -> Any:
    """The queue that everybody in a run shares."""
    connection = QueueConnectionOptions(**{provider: address}, namespace=namespace)  # type: ignore[arg-type]
    return create_parallel_queue(
        NAME,
        concurrency=concurrency,
        provider=provider,
        connection=connection,
        retry_attempts=ATTEMPTS - 1,
        retry_delay=RETRY_MS,
    )


async def main(provider: str, address: str, namespace: str, witness: str) -> None:
    file = os.open(witness, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    rng = random.Random(os.getpid())

    def say(what: str, context: QueueContext) -> None:
        os.write(file, f"{what} {context.message_id} {context.attempt} {os.getpid()} {time.time():.6f}\n".encode())

    async def handler(payload: dict[str, Any], context: QueueContext) -> None:
        say("+", context)
        await asyncio.sleep(rng.random() * 0.01)
        if payload["kind"] == DOOMED or (payload["kind"] == FLAKY and context.attempt == 1):
            say("!", context)
            raise ConnectionError(payload["kind"])
        say("=", context)

    queue = queue_at(provider, address, namespace, concurrency=32)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, lambda: asyncio.ensure_future(queue.stop()))
    loop.add_signal_handler(signal.SIGUSR1, _tell_tasks)
    await queue.listen(handler, visibility_timeout=VISIBILITY_SECONDS)
    await queue.close()


def _tell_tasks() -> None:
    """For somebody who wonders why we do not end."""
    for task in asyncio.all_tasks():
        print(task.get_name(), file=sys.stderr)
        task.print_stack(file=sys.stderr)


if __name__ == "__main__":
    run(main(*sys.argv[1:5]))
