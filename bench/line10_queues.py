"""Line 10: queues with 64 in flight, each message acknowledged after its own handler and recovered after a kill.
Against the best peer on Redis and on PostgreSQL, and a bare loop with the same driver elsewhere.

The clock runs from the moment at which a filled queue is listened to until the last handler has run. Handlers do
nothing, so that what is measured is the queue. Both sides take turns, and of the rounds the best of each counts.
"""

from __future__ import annotations

import asyncio
import importlib
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final

from bench import queue_peers
from bench.harness import Bench, Finding
from bench.queue_peers import AT_ONCE, Countdown
from sagaloom.process import run as run_fast
from sagaloom.queue import QueueConnectionOptions, create_parallel_queue

__all__ = ["run"]

Measure = Callable[[str, int], Awaitable[float]]

_PEERS: Final[Mapping[str, Mapping[str, Measure]]] = {
    "redis": {
        "taskiq": queue_peers.taskiq_on_redis,
        "saq": queue_peers.saq_on_redis,
        "arq": queue_peers.arq_on_redis,
        "faststream": queue_peers.faststream_on_redis,
    },
    "postgres": {"pgqueuer": queue_peers.pgqueuer_on_postgres},
}
_MUST: Final = {"redis": 1.5, "postgres": 1.0, "kv": 0.3, "rabbitmq": 0.3}
_AIM: Final = {"redis": 4.0, "postgres": 2.0, "kv": 0.6, "rabbitmq": 0.6}
_PATIENCE_SECONDS: Final = 90.0


def run(bench: Bench) -> None:
    for provider, peers in _PEERS.items():
        _beside(bench, provider, peers)
    _beside(bench, "rabbitmq", {"a bare loop on aiormq": _bare_rabbitmq})
    with bench.place() as place:
        _compare(bench, "kv", str(place / "queues.db"), {"a bare loop on apsw": _bare_sqlite})


def _beside(bench: Bench, provider: str, peers: Mapping[str, Measure]) -> None:
    finding: Any = importlib.import_module("tests.servers.finding")
    try:
        url = finding.find(provider)
    except finding.Missing as missing:
        bench.say(f"  no {provider}: {missing}")
        return
    _compare(bench, provider, url, peers)


def _compare(bench: Bench, provider: str, address: str, peers: Mapping[str, Measure]) -> None:
    ours_count, theirs_count = bench.pick(20_000, 5_000), bench.pick(4_000, 1_500)
    if provider in ("rabbitmq", "kv"):
        theirs_count = ours_count
    ours = 0.0
    theirs = dict.fromkeys(peers, 0.0)
    for _ in range(bench.pick(3, 2)):
        ours = max(ours, ours_count / _seconds(lambda _, count: _ours(provider, address, count), address, ours_count))
        for name, measure in peers.items():
            try:
                theirs[name] = max(theirs[name], theirs_count / _seconds(measure, address, theirs_count))
            except ImportError as error:
                bench.say(f"  {name} is not installed ({error}): make bench brings it")
    best = max(theirs, key=lambda name: theirs[name])
    if not theirs[best]:
        return
    everybody = ", ".join(f"{name} {rate:,.0f}" for name, rate in sorted(theirs.items(), key=lambda each: -each[1]))
    bench.found(
        Finding(
            line="10",
            what=f"queue on {provider}, {AT_ONCE} in flight, against {best}",
            ours=f"{ours:,.0f}/s",
            baseline=f"{theirs[best]:,.0f}/s",
            value=ours / theirs[best],
            must=_MUST[provider],
            aim=_AIM[provider],
            note=f"messages a second: {everybody}" if len(theirs) > 1 else "",
        )
    )


def _seconds(measure: Measure, address: str, count: int) -> float:
    async def bounded() -> float:
        return await asyncio.wait_for(measure(address, count), _PATIENCE_SECONDS)

    return run_fast(bounded())


async def _ours(provider: str, address: str, count: int) -> float:
    namespace = f"bench_{uuid.uuid4().hex[:12]}"
    path = Path(address).with_name(f"{namespace}.db") if provider == "kv" else address
    given: dict[str, Any] = {provider: path, "namespace": namespace}
    queue = create_parallel_queue(
        "bench", concurrency=AT_ONCE, provider=provider, connection=QueueConnectionOptions(**given)
    )
    for first in range(0, count, 1_000):
        await queue.enqueue_many(range(first, min(first + 1_000, count)))
    countdown = Countdown(count)

    async def work(n: int) -> None:
        countdown.tick()

    began = time.perf_counter()
    listening = asyncio.create_task(queue.listen(work))
    await countdown.over.wait()
    seconds = time.perf_counter() - began
    await queue.stop()
    await listening
    await _clean(provider, address, namespace, queue)
    return seconds


async def _clean(provider: str, address: str, namespace: str, queue: Any) -> None:
    """Leaves nothing behind at a server that may be somebody's."""
    if provider == "rabbitmq":
        from sagaloom.queues.rabbitmq import RabbitMQQueueBroker

        broker = await RabbitMQQueueBroker.connect("bench", address, namespace=namespace)
        await broker.delete()
        await broker.close()
    await queue.close()
    if provider == "redis":
        redis: Any = importlib.import_module("redis.asyncio")
        async with redis.Redis.from_url(address) as client:
            if keys := [key async for key in client.scan_iter(match=f"{namespace}:*", count=1_000)]:
                await client.delete(*keys)
    if provider == "postgres":
        asyncpg: Any = importlib.import_module("asyncpg")
        connection = await asyncpg.connect(address)
        await connection.execute(f'DROP SCHEMA "{namespace}" CASCADE')
        await connection.close()


async def _bare_rabbitmq(url: str, count: int) -> float:
    """Consumes a quorum queue with 64 ahead, and acknowledges each message."""
    aiormq: Any = importlib.import_module("aiormq")
    connection = await aiormq.connect(url)
    channel = await connection.channel(publisher_confirms=True)
    name = f"bench-bare-{uuid.uuid4().hex}"
    await channel.queue_declare(name, durable=True, arguments={"x-queue-type": "quorum"})
    for first in range(0, count, 1_000):
        await asyncio.gather(
            *(channel.basic_publish(b"%d" % n, routing_key=name) for n in range(first, min(first + 1_000, count)))
        )
    countdown = Countdown(count)

    async def took(delivered: Any) -> None:
        countdown.tick()
        await delivered.channel.basic_ack(delivered.delivery_tag, wait=False)

    await channel.basic_qos(prefetch_count=AT_ONCE)
    began = time.perf_counter()
    await channel.basic_consume(name, took)
    await countdown.over.wait()
    seconds = time.perf_counter() - began
    await channel.queue_delete(name)
    await connection.close()
    return seconds


async def _bare_sqlite(path: str, count: int) -> float:
    """Takes 64 rows of a table, and deletes them, one synced commit each: the very rows that ours writes, as bytes that
    were made before, and nothing else."""
    apsw: Any = importlib.import_module("apsw")
    file = Path(path).with_name(f"bare-{uuid.uuid4().hex[:12]}.db")
    connection = apsw.Connection(str(file))
    connection.pragma("journal_mode", "WAL")
    connection.pragma("synchronous", "FULL")
    connection.wal_autocheckpoint(4000)
    cursor = connection.cursor()
    for table in ("ready", "claim", "one"):
        cursor.execute(f"CREATE TABLE {table} (k BLOB PRIMARY KEY, v BLOB, s INTEGER) STRICT, WITHOUT ROWID")
    keys = [b"0bench\0" + n.to_bytes(8, "big") for n in range(count)]
    with connection:
        cursor.executemany("INSERT INTO ready VALUES (?, ?, 1)", ((b"2" + key, bytes(110)) for key in keys))
    taken: list[bytes] = []
    done, stamp = 0, 1
    began = time.perf_counter()
    while done < count:
        stamp += 1
        cursor.execute("BEGIN IMMEDIATE")
        cursor.execute("REPLACE INTO one VALUES (x'01', x'00', ?), (x'02', x'00', ?), (x'03', x'00', ?)", [stamp] * 3)
        cursor.executemany("DELETE FROM claim WHERE k = ?", ((key[1:],) for key in taken))
        done += len(taken)
        rows = cursor.execute(f"SELECT k, v FROM ready WHERE k > x'00' ORDER BY k LIMIT {AT_ONCE}").fetchall()
        taken = [row[0] for row in rows]
        cursor.executemany("DELETE FROM ready WHERE k = ?", ((key,) for key in taken))
        cursor.executemany("INSERT INTO claim VALUES (?, ?, ?)", ((key[1:], bytes(145), stamp) for key in taken))
        cursor.execute("COMMIT")
        await asyncio.sleep(0)
    seconds = time.perf_counter() - began
    connection.close()
    return seconds
