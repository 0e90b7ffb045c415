"""Line 3: how long one message takes when nothing else is going on.

One publisher, each message after the receipt of the one before; the receipt comes after the message was applied. It is
held against a hand-written engine that accepts a message in one commit and applies it in the next (p50), and against
one hand-written commit of all its rows (p99).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from bench.bare import arrays, loop, two_commits
from bench.databases import database_of, server_url
from bench.harness import Bench, Finding, median, percentile, quiet_gc
from bench.workload import open_runtime, open_store, order_messages
from sagaloom.process import run as run_process

__all__ = ["run"]

_MUST_P50 = 2.5
_AIM_P50 = 1.2
_MUST_P99 = 10.0
_AIM_P99 = 5.0


async def _ours(path: Path, orders: int, *, rests: bool) -> list[float]:
    """Seconds from publish to applied. `rests`: each message waits until the effects of the last one are settled."""
    async with open_runtime(path) as (runtime, _, _):
        for message in order_messages("w-00000000"):
            (await runtime.publish(message)).raise_for_rejected()
        groups = [order_messages(f"o-{number:08d}") for number in range(orders)]
        seconds: list[float] = []
        with quiet_gc():
            for group in groups:
                for message in group:
                    if rests:
                        await runtime.settled()
                    began = time.perf_counter()
                    receipt = await runtime.publish(message)
                    seconds.append(time.perf_counter() - began)
                    receipt.raise_for_rejected()
            await runtime.settled()
        return seconds


async def _on_postgres(path: Path, batches: Sequence[arrays.Batch]) -> list[float]:
    _, store = await open_store(path)
    await store.open()
    await store.close()
    with quiet_gc():
        return await arrays.run(await database_of(path), batches)


def _two_commits(path: Path, orders: int) -> list[float]:
    if server_url() is not None:
        seconds = run_process(_on_postgres(path, arrays.prepared(orders, 1, accepted=True)))
        return [accept + apply for accept, apply in zip(seconds[::2], seconds[1::2], strict=True)]
    pairs = two_commits.prepared(orders)
    connection = loop.connect(path)
    try:
        with quiet_gc():
            return two_commits.run(connection, pairs)
    finally:
        connection.close()


def _one_commit(path: Path, orders: int) -> list[float]:
    if server_url() is not None:
        return run_process(_on_postgres(path, arrays.prepared(orders, 1)))
    batches = loop.prepared(orders, 1)
    connection = loop.connect(path)
    try:
        with quiet_gc():
            return loop.run_timed(connection, batches)
    finally:
        connection.close()


def run(bench: Bench) -> None:
    orders = bench.pick(250, 100)
    ours: list[list[float]] = []
    rested: list[list[float]] = []
    pairs: list[list[float]] = []
    single: list[list[float]] = []
    for _ in range(bench.rounds + 2):
        with bench.place() as place:
            ours.append(run_process(_ours(place / "ours.db", orders, rests=False)))
            pairs.append(_two_commits(place / "pairs.db", orders))
            single.append(_one_commit(place / "single.db", orders))
            rested.append(run_process(_ours(place / "rested.db", orders // 4, rests=True)))

    def best_p50(rounds: list[list[float]]) -> float:
        return min(median(seconds) for seconds in rounds)

    def typical_p99(rounds: list[list[float]]) -> float:
        return median([percentile(seconds, 99) for seconds in rounds])

    bench.found(
        Finding(
            line="3",
            what="publish to applied, 1 in flight: p50 against accept and apply commits",
            ours=f"{best_p50(ours) * 1000:.2f} ms",
            baseline=f"{best_p50(pairs) * 1000:.2f} ms",
            value=best_p50(ours) / best_p50(pairs),
            must=_MUST_P50,
            aim=_AIM_P50,
            at_least=False,
            note=f"against one commit {best_p50(ours) / best_p50(single):.2f}x; "
            f"after a rest {best_p50(rested) * 1000:.2f} ms",
        )
    )
    bench.found(
        Finding(
            line="3",
            what="publish to applied, 1 in flight: p99 against the bare commit's p99",
            ours=f"{typical_p99(ours) * 1000:.2f} ms",
            baseline=f"{typical_p99(single) * 1000:.2f} ms",
            value=typical_p99(ours) / typical_p99(single),
            must=_MUST_P99,
            aim=_AIM_P99,
            at_least=False,
        )
    )
