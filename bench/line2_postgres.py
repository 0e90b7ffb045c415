"""Line 2: what processes do on PostgreSQL, against the same rows written as arrays.

One process as in line 1, against the bare loop (`bare/arrays.py`) in batches as large as ours were in that very round.
Then 1, 2 and 4 processes that share the store, each as busy as the one: with 64 or 256 publishers of its own, whose
messages are of all partitions. How many CPU seconds a message costs, those of the server and of the processes together.
What it costs to divide 64 or 256 publishers among the processes, more of them than there is work for, is told beside it
without a limit.

The CPU that a message takes depends on what else the machine does, and four processes never find it as calm as one
does. So those of one round, which follow each other, are compared, and the median of the rounds counts.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from bench.bare import arrays
from bench.databases import database_of, server_cpu_seconds
from bench.harness import Bench, Child, Finding, median, quiet_gc
from bench.line1_throughput import Throughput, measure
from bench.workload import MESSAGES_PER_ORDER, open_store
from sagaloom.process import run as run_process

__all__ = ["run"]

_IN_FLIGHT = (64, 256)
_SEVERAL = (2, 4)
_SECONDS_A_ROUND = 1.0  # as in line 1
_ORDERS_SHARED = 4_000
"""What any of them do in about as long, and some orders for each publisher."""
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


class _Shared(NamedTuple):
    """What one round of several processes did."""

    cpu_us: float
    """A message, of the server and the processes together."""
    rate: float


def _together(path: Path, processes: int, orders: int, *, publishers: int) -> _Shared:
    """So many processes on one new store, with so many publishers each."""
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
        return _Shared(cpu / messages * 1_000_000, messages / max(one["seconds"] for one in found))


def run(bench: Bench) -> None:
    ours: dict[int, list[Throughput]] = {in_flight: [] for in_flight in _IN_FLIGHT}
    bare: dict[int, list[float]] = {in_flight: [] for in_flight in _IN_FLIGHT}
    shared: dict[tuple[int, int], list[_Shared]] = {
        (publishers, processes): []
        for in_flight in _IN_FLIGHT
        for publishers, processes in (
            (in_flight, 1),
            *((in_flight, several) for several in _SEVERAL),
            *((in_flight // several, several) for several in _SEVERAL),
        )
    }
    for _ in range(bench.pick(7, 3)):
        for in_flight in _IN_FLIGHT:
            with bench.place() as place:
                found = measure(place, in_flight=in_flight, seconds=_SECONDS_A_ROUND)
                ours[in_flight].append(found)
                bare[in_flight].append(run_process(_bare(place / "bare", found.orders, round(found.batch))))
        for (publishers, processes), measured in shared.items():
            with bench.place() as place:
                measured.append(_together(place / "shared", processes, _ORDERS_SHARED, publishers=publishers))
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
                pairs = list(zip(shared[publishers, several], shared[in_flight, 1], strict=True))
                bench.found(
                    Finding(
                        line="2",
                        what=f"PostgreSQL, {what}: CPU a message (with the server's) against one",
                        ours=f"{median([each.cpu_us for each, _ in pairs]):.0f} us",
                        baseline=f"{median([one.cpu_us for _, one in pairs]):.0f} us",
                        value=median([each.cpu_us / one.cpu_us for each, one in pairs]),
                        must=_MUST_CPU if is_held_to else None,
                        aim=_AIM_CPU if is_held_to else None,
                        at_least=False,
                        note=f"median of the rounds; {max(each.rate for each, _ in pairs):,.0f}/s against "
                        f"{max(one.rate for _, one in pairs):,.0f}/s",
                    )
                )
