"""Line 2: what processes do on PostgreSQL, against the same rows written as arrays.

One process as in line 1, against the bare loop (`bare/arrays.py`) in batches as large as ours were in that very round.
Then 1, 2 and 4 processes that share the store, each as busy as the one: with 64 or 256 publishers of its own, whose
messages are of all partitions. How many CPU seconds a message costs, those of the server and of the processes together.
What it costs to divide 64 or 256 publishers among the processes, more of them than there is work for, is told beside it
without a limit.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from bench.bare import arrays
from bench.databases import database_of, server_cpu_seconds
from bench.harness import Bench, Child, Finding, quiet_gc
from bench.line1_throughput import Throughput, measure
from bench.workload import MESSAGES_PER_ORDER, open_store
from sagaloom.process import run as run_process

__all__ = ["run"]

_IN_FLIGHT = (64, 256)
_SEVERAL = (2, 4)
_MUST = 0.35
_AIM = 0.6
_MUST_CPU = 1.3
_AIM_CPU = 1.15


async def _bare(path: Path, orders: int, batch: int) -> float:
    """Messages a second of the bare loop."""
    _, store = await open_store(path)
    await store.open()
    await store.close()
    batches = arrays.prepared(orders, batch)
    with quiet_gc():
        seconds = sum(await arrays.run(await database_of(path), batches))
    return orders * MESSAGES_PER_ORDER / seconds


def _cpu_us(path: Path, processes: int, orders: int, *, publishers: int) -> tuple[float, float]:
    """Microseconds of CPU a message, and messages a second, of so many processes on one new store, with so many
    publishers each."""
    with ExitStack() as stack:
        workers = [
            stack.enter_context(Child("bench.sharing", str(path), str(number), str(processes), str(publishers)))
            for number in range(processes)
        ]
        for worker in workers:
            worker.hear()
        each = orders // processes
        for name, count in (("w", max(20, each // 10)), ("o", each)):
            before = server_cpu_seconds()
            for worker in workers:
                worker.tell(f"{name} {count}")
            found = [worker.hear() for worker in workers]
            cpu = server_cpu_seconds() - before + sum(one["cpu"] for one in found)
        messages = each * processes * MESSAGES_PER_ORDER
        return cpu / messages * 1_000_000, messages / max(one["seconds"] for one in found)


def run(bench: Bench) -> None:
    ours: dict[int, list[Throughput]] = {in_flight: [] for in_flight in _IN_FLIGHT}
    bare: dict[int, list[float]] = {in_flight: [] for in_flight in _IN_FLIGHT}
    shared: dict[tuple[int, int], list[tuple[float, float]]] = {
        (publishers, processes): []
        for in_flight in _IN_FLIGHT
        for publishers, processes in (
            (in_flight, 1),
            *((in_flight, several) for several in _SEVERAL),
            *((in_flight // several, several) for several in _SEVERAL),
        )
    }
    for _ in range(bench.rounds // 2 + 1):
        for in_flight in _IN_FLIGHT:
            with bench.place() as place:
                found = measure(place, in_flight=in_flight, seconds=bench.seconds)
                ours[in_flight].append(found)
                bare[in_flight].append(run_process(_bare(place / "bare", found.orders, round(found.batch))))
        for (publishers, processes), measured in shared.items():
            with bench.place() as place:
                orders = max(bench.pick(4_000, 1_600), bench.pick(12, 6) * publishers * processes)
                measured.append(_cpu_us(place / "shared", processes, orders, publishers=publishers))
    for in_flight in _IN_FLIGHT:
        best, best_bare = max(ours[in_flight], key=lambda found: found.rate), max(bare[in_flight])
        bench.found(
            Finding(
                line="2",
                what=f"PostgreSQL, {in_flight} in flight, against the bare loop",
                ours=f"{best.rate:,.0f}/s",
                baseline=f"{best_bare:,.0f}/s",
                value=best.rate / best_bare,
                must=_MUST,
                aim=_AIM,
                note=f"batch {best.batch:.0f}, {best.commits} commits; {best.cpu_us:.0f} us of CPU a message here",
            )
        )
    for in_flight in _IN_FLIGHT:
        for several in _SEVERAL:
            for publishers, what in (
                (in_flight, f"{several} processes with {in_flight} in flight each"),
                (in_flight // several, f"{several} processes with {in_flight} in flight in all"),
            ):
                is_held_to = publishers == in_flight
                (cpu, rate), (one, _) = min(shared[publishers, several]), min(shared[in_flight, 1])
                bench.found(
                    Finding(
                        line="2",
                        what=f"PostgreSQL, {what}: CPU a message (with the server's) against one",
                        ours=f"{cpu:.0f} us",
                        baseline=f"{one:.0f} us",
                        value=cpu / one,
                        must=_MUST_CPU if is_held_to else None,
                        aim=_AIM_CPU if is_held_to else None,
                        at_least=False,
                        note=f"{rate:,.0f}/s against {max(rate for _, rate in shared[in_flight, 1]):,.0f}/s",
                    )
                )
