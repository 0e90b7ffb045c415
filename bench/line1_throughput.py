"""Line 1: what one process does in its own file, against the same unit by hand.

Whole runtime, tier t1: three messages an order, one effect each to a function of this process, 64 or 256 publishers
that wait for the receipt of one message before they publish the next. The bare loop (`bare/unit.py`) does for each
message what has to be done: dedupe, load, run the handler, make and write all rows, acknowledge; in batches as large as
ours were in that very round. One commit a message is the bare loop with batches of one. What the database alone costs,
with rows prepared before the clock starts (`bare/loop.py`), is told beside it, and is what the append log is held to.

Each side is measured in many rounds of about a second, and its best one counts: a machine that does other work as well
has calm seconds, and seldom ten of them in a row.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from bench import rows_now
from bench.bare import log, loop, rows, unit
from bench.harness import Bench, Finding, median, quiet_gc
from bench.workload import MESSAGES_PER_ORDER, open_runtime, order_messages, publish_all
from sagaloom.process import run as run_process

__all__ = ["Throughput", "measure", "run"]

_IN_FLIGHT = (64, 256)
_MUST = 0.35
_AIM = 0.6
_MUST_SINGLE = 4.0
_AIM_SINGLE = 8.0
_MUST_OF_LOG = 0.2
_MESSAGES_OF_LOG = 40_000
_SECONDS_A_ROUND = 1.0
_ORDERS_OF_SINGLE = 800
"""What one commit a message does in about as long."""


@dataclass(frozen=True)
class Throughput:
    """What one round of ours did."""

    orders: int
    rate: float
    batch: float
    commits: int
    cpu_us: float


def measure(place: Path, *, in_flight: int, seconds: float) -> Throughput:
    """Runs orders through a new store, for about so many seconds."""
    return run_process(_measure(place / "ours.db", in_flight, seconds))


async def _measure(path: Path, in_flight: int, seconds: float) -> Throughput:
    async with open_runtime(path) as (runtime, store, _):
        warm_up = [order_messages(f"w-{number:08d}") for number in range(2 * in_flight)]
        began = time.perf_counter()
        await publish_all(runtime, warm_up, in_flight=in_flight)
        await runtime.settled()
        # Whole rounds of all publishers: the last stragglers would shrink the batches.
        rounds = max(4, round(seconds / (time.perf_counter() - began) * 2))
        orders = rounds * in_flight
        messages = orders * MESSAGES_PER_ORDER
        groups = [order_messages(f"o-{number:08d}") for number in range(orders)]
        with quiet_gc():
            commits, with_messages = store.commits, store.commits_with_messages
            began, cpu = time.perf_counter(), time.process_time()
            await publish_all(runtime, groups, in_flight=in_flight)
            await runtime.settled(60)
            seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        with_messages = store.commits_with_messages - with_messages
        return Throughput(
            orders, messages / seconds, messages / with_messages, store.commits - commits, cpu / messages * 1_000_000
        )


def bare_rate(place: Path, *, batch: int, orders: int) -> tuple[float, float]:
    """Messages a second of the bare unit, and the microseconds of CPU that each took."""
    batches = list(unit.arriving(orders, batch))
    messages = orders * MESSAGES_PER_ORDER
    connection = loop.connect(place / "bare.db")
    try:
        with quiet_gc():
            cpu = time.process_time()
            seconds = unit.run(connection, batches)
            cpu = time.process_time() - cpu
        return messages / seconds, cpu / messages * 1_000_000
    finally:
        connection.close()


def prepared_rate(place: Path, *, batch: int, orders: int) -> float:
    """Messages a second of the database alone: the same rows, made before the clock starts."""
    batches = loop.prepared(orders, batch)
    connection = loop.connect(place / "prepared.db")
    try:
        with quiet_gc():
            return orders * MESSAGES_PER_ORDER / loop.run(connection, batches)
    finally:
        connection.close()


def log_rate(place: Path, *, batch: int) -> float:
    """Records a second of the floor, each as large as the rows of a message."""
    syncs = min(500, max(20, _MESSAGES_OF_LOG // batch))
    return log.append(place / "log", record_bytes=rows.BYTES_PER_MESSAGE, records_per_sync=batch, syncs=syncs)


def run(bench: Bench) -> None:
    ours: dict[int, list[Throughput]] = {in_flight: [] for in_flight in _IN_FLIGHT}
    bare: dict[int, list[tuple[float, float]]] = {in_flight: [] for in_flight in _IN_FLIGHT}
    floor: dict[int, list[float]] = {in_flight: [] for in_flight in _IN_FLIGHT}
    prepared: dict[int, list[float]] = {in_flight: [] for in_flight in _IN_FLIGHT}
    single: list[float] = []
    for _ in range(bench.pick(10, 2)):
        for in_flight in _IN_FLIGHT:
            with bench.place() as place:
                found = measure(place, in_flight=in_flight, seconds=_SECONDS_A_ROUND)
                batch = round(found.batch)
                ours[in_flight].append(found)
                bare[in_flight].append(bare_rate(place, batch=batch, orders=found.orders))
                prepared[in_flight].append(prepared_rate(place, batch=batch, orders=found.orders))
                floor[in_flight].append(log_rate(place, batch=batch))
        with bench.place() as place:
            single.append(bare_rate(place, batch=1, orders=_ORDERS_OF_SINGLE)[0])
    with bench.place() as place:
        floors = ", ".join(f"{log_rate(place, batch=n):,.0f}/s at {n}" for n in (1, 10, 100, 1000))
    rows_now.compare(bench)
    bench.say(f"  append log + fdatasync, {rows.BYTES_PER_MESSAGE} B a record: {floors} a sync")
    for in_flight in _IN_FLIGHT:
        best = max(ours[in_flight], key=lambda found: found.rate)
        (best_bare, _), best_single = max(bare[in_flight]), max(single)
        cpu_us = min(found.cpu_us for found in ours[in_flight])
        bare_cpu_us = min(cpu for _, cpu in bare[in_flight])
        note = (
            f"batch {best.batch:.0f}, {best.commits} commits; CPU a message {cpu_us:.0f} us against "
            f"{bare_cpu_us:.0f} us, {bare_cpu_us / cpu_us:.2f}x"
        )
        bench.found(
            Finding(
                line="1",
                what=f"embedded, {in_flight} in flight, against the bare loop",
                ours=f"{best.rate:,.0f}/s",
                baseline=f"{best_bare:,.0f}/s",
                value=best.rate / best_bare,
                must=_MUST,
                aim=_AIM,
                note=note,
            )
        )
        bench.found(
            Finding(
                line="1",
                what=f"embedded, {in_flight} in flight, against its rows prepared beforehand",
                ours=f"{best.rate:,.0f}/s",
                baseline=f"{max(prepared[in_flight]):,.0f}/s",
                value=best.rate / max(prepared[in_flight]),
            )
        )
        bench.found(
            Finding(
                line="1",
                what=f"embedded, {in_flight} in flight, against one commit a message",
                ours=f"{best.rate:,.0f}/s",
                baseline=f"{best_single:,.0f}/s",
                value=best.rate / best_single,
                must=_MUST_SINGLE,
                aim=_AIM_SINGLE,
            )
        )
        # Both run one after the other, and the disk has its moods: the pairs are compared, not the best of each.
        pairs = zip(prepared[in_flight], floor[in_flight], strict=True)
        bench.found(
            Finding(
                line="1",
                what=f"check: rows prepared beforehand, in batches of {best.batch:.0f}, against the append log",
                ours=f"{max(prepared[in_flight]):,.0f}/s",
                baseline=f"{max(floor[in_flight]):,.0f}/s",
                value=median([rate / of_log for rate, of_log in pairs]),
                must=_MUST_OF_LOG,
                aim=_MUST_OF_LOG,
                note="median of the rounds",
            )
        )
