"""The queues that line 10 compares ours with, each as its own documentation runs it: no-op handlers, 64 in flight, each
message acknowledged after its own handler and recovered after the death of its consumer.

They come with the dependency group `peers`, which `make bench` installs; arq comes with an environment of its own, for
it wants an older driver of Redis, and is measured in a process of its own there. Each function fills a queue with
`count` messages, then works on them, and returns how many seconds that took.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import sys
import time
import uuid
from pathlib import Path
from typing import Any

__all__ = ["arq_on_redis", "faststream_on_redis", "pgqueuer_on_postgres", "saq_on_redis", "taskiq_on_redis"]

AT_ONCE = 64
_ARQ_PYTHON = Path(sys.prefix) / "arq" / "bin" / "python"


class Countdown:
    """Says when so many messages were handled."""

    def __init__(self, count: int) -> None:
        self._left = count
        self.over = asyncio.Event()

    def tick(self) -> None:
        self._left -= 1
        if self._left <= 0:
            self.over.set()


def _module(name: str) -> Any:
    """A module that may not be there, and whose types are its own affair."""
    return importlib.import_module(name)


async def taskiq_on_redis(url: str, count: int) -> float:
    """taskiq over Redis streams with a consumer group; acknowledged when a task was executed."""
    acks, receiving, brokers = _module("taskiq.acks"), _module("taskiq.receiver"), _module("taskiq_redis")
    broker = brokers.RedisStreamBroker(
        url, queue_name=f"bench-taskiq-{uuid.uuid4().hex}", consumer_id="0", xread_count=AT_ONCE
    )
    countdown = Countdown(count)

    async def work(n: int) -> None:
        countdown.tick()

    task = broker.task(work)
    broker.is_worker_process = True
    await broker.startup()
    for first in range(0, count, 100):
        await asyncio.gather(*(task.kiq(n) for n in range(first, min(first + 100, count))))
    receiver = receiving.Receiver(
        broker,
        max_async_tasks=AT_ONCE,
        ack_type=acks.AcknowledgeType.WHEN_EXECUTED,
        run_startup=False,
        validate_params=False,
    )
    finish = asyncio.Event()
    began = time.perf_counter()
    listening = asyncio.create_task(receiver.listen(finish))
    await countdown.over.wait()
    seconds = time.perf_counter() - began
    finish.set()
    listening.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await listening
    with contextlib.suppress(Exception):
        await broker.shutdown()
    return seconds


async def saq_on_redis(url: str, count: int) -> float:
    """saq; what its consumer left behind is swept up."""
    saq = _module("saq")
    queue = saq.Queue.from_url(url, name=f"bench-saq-{uuid.uuid4().hex}")
    await queue.connect()
    countdown = Countdown(count)

    async def work(ctx: Any, *, n: int) -> None:
        countdown.tick()

    for first in range(0, count, 100):
        await asyncio.gather(*(queue.enqueue("work", n=n) for n in range(first, min(first + 100, count))))
    worker = saq.Worker(queue, functions=[("work", work)], concurrency=AT_ONCE)
    worker.SIGNALS = []  # Ours are not its to handle.
    began = time.perf_counter()
    working = asyncio.create_task(worker.start())
    await countdown.over.wait()
    seconds = time.perf_counter() - began
    await worker.stop()
    working.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await working
    await queue.disconnect()
    return seconds


async def arq_on_redis(url: str, count: int) -> float:
    """arq; what its consumer left behind is taken again when its time is over."""
    if not _ARQ_PYTHON.exists():
        raise ImportError(f"no {_ARQ_PYTHON}")
    child = await asyncio.create_subprocess_exec(
        *(_ARQ_PYTHON, Path(__file__).with_name("arq_peer.py"), url, str(count)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        said, complained = await child.communicate()
    finally:
        if child.returncode is None:
            child.kill()
    if child.returncode:
        raise RuntimeError(f"arq ended with {child.returncode}: {complained.decode(errors='replace')[-500:]}")
    return float(said)


async def faststream_on_redis(url: str, count: int) -> float:
    """FastStream over Redis streams with a consumer group; a group reads one message after the other."""
    redis = _module("faststream.redis")
    logging.getLogger("faststream").setLevel(logging.CRITICAL)
    broker = redis.RedisBroker(url, logger=logging.getLogger("faststream"))
    stream = f"bench-faststream-{uuid.uuid4().hex}"
    countdown = Countdown(count)

    async def work(n: int) -> None:
        countdown.tick()

    broker.subscriber(stream=redis.StreamSub(stream, group="bench", consumer="one", last_id="0", max_records=AT_ONCE))(
        work
    )
    await broker.connect()
    for first in range(0, count, 100):
        await asyncio.gather(*(broker.publish(n, stream=stream) for n in range(first, min(first + 100, count))))
    began = time.perf_counter()
    await broker.start()
    await countdown.over.wait()
    seconds = time.perf_counter() - began
    await broker.stop()
    return seconds


async def pgqueuer_on_postgres(url: str, count: int) -> float:
    """pgqueuer over asyncpg, in a schema of its own."""
    asyncpg, pgqueuer = _module("asyncpg"), _module("pgqueuer")
    drivers, asking = _module("pgqueuer.adapters.drivers.asyncpg"), _module("pgqueuer.queries")
    schema = f"bench_pgqueuer_{uuid.uuid4().hex[:12]}"
    connection = await asyncpg.connect(url)
    await connection.execute(f"CREATE SCHEMA {schema}")
    await connection.execute(f"SET search_path = {schema}")
    countdown = Countdown(count)
    try:
        driver = drivers.AsyncpgDriver(connection)
        queries = asking.Queries(driver)
        await queries.install()
        for first in range(0, count, 1_000):
            size = min(1_000, count - first)
            await queries.enqueue(["work"] * size, [b"1"] * size, [0] * size)
        manager = pgqueuer.QueueManager(asking.Queries(driver))

        async def work(job: Any) -> None:
            countdown.tick()

        manager.entrypoint("work", accepts_context=False)(work)
        began = time.perf_counter()
        running = asyncio.create_task(manager.run(batch_size=AT_ONCE, max_concurrent_tasks=2 * AT_ONCE))
        waiting = asyncio.create_task(countdown.over.wait())
        await asyncio.wait([running, waiting], return_when=asyncio.FIRST_COMPLETED)
        seconds = time.perf_counter() - began
        if running.done():
            running.result()
        manager.shutdown.set()
        await asyncio.wait([running], timeout=5)
    finally:
        await connection.close()
        connection = await asyncpg.connect(url)
        await connection.execute(f"DROP SCHEMA {schema} CASCADE")
        await connection.close()
    return seconds
