"""Kills workers, and counts what was lost: `python -m tests.crash`, or `make crash`.

    KILLS      how many workers are killed (100): each named step at least once, the rest at random
    MESSAGES   how many messages are published (10000), three to an order
    SEED       repeats a run's choices; the timing of processes stays the machine's own
    PROCESSES  how many workers share the store (1); with several of them some are also stopped and woken

Exits with 0 when nothing was lost, duplicated or stuck, every invariant held, and several workers shared the work, else
with 1.
"""

from __future__ import annotations

import asyncio
import logging
import random
import signal
import sys
import tempfile
from pathlib import Path

from sagaloom.testing.faults import STEPS
from tests.crash.driver import CrashRun, plan_kills, plan_stops
from tests.crash.places import FilePlace
from tests.crash.power import AT_RANDOM, AT_SYNC, PowerReport, PowerRun, plan_power_losses
from tests.crash.story import orders
from tests.crash.telling import keep, number, print_kills, print_sharing, table


def main() -> int:
    kills, messages = number("KILLS", 100), number("MESSAGES", 10_000)
    seed = number("SEED", random.SystemRandom().randrange(1_000_000))
    processes = number("PROCESSES", 1)
    try:
        with tempfile.TemporaryDirectory(prefix="sagaloom-crash-") as directory:
            run = _run(Path(directory), kills=kills, messages=messages, processes=processes, seed=seed)
            try:
                return asyncio.run(run)
            except Exception:
                keep(Path(directory))
                raise
    except asyncio.CancelledError:
        print("interrupted; every process was ended", file=sys.stderr)
        return 130


async def _run(directory: Path, *, kills: int, messages: int, processes: int, seed: int) -> int:
    running = asyncio.current_task()
    assert running is not None
    for each in (signal.SIGINT, signal.SIGTERM):
        # Both end the run through the code that ends every process.
        asyncio.get_running_loop().add_signal_handler(each, running.cancel)
    # What a dying runtime says of its end is expected here; whoever wants to know finds it with a failed run.
    logging.basicConfig(filename=directory / "driver.log", level=logging.WARNING)
    again = f"make crash KILLS={kills} MESSAGES={messages} PROCESSES={processes} SEED={seed}"
    print(f"SEED={seed}; the same choices again: {again}", flush=True)
    rng = random.Random(seed)
    place = FilePlace(directory / "saga.db")
    plan = plan_kills(kills, rng, steps=place.steps, processes=processes)
    stops = plan_stops(max(2, kills // 12)) if processes > 1 else []
    stopped = f" and {len(stops)} stops" if stops else ""
    print(f"kill -9: {len(plan)} kills{stopped}, {messages} messages, {processes} processes", flush=True)
    killed = await CrashRun(
        directory,
        place,
        orders=orders(messages, rng),
        kills=plan,
        stops=stops,
        processes=processes,
        rng=rng,
        tell=lambda line: print(line, flush=True),
    ).run()
    print_kills(killed, place)
    if processes > 1:
        print_sharing(killed)
        if not killed.verdict.is_clean:
            keep(directory)
        return 0 if killed.verdict.is_clean else 1
    losses = plan_power_losses(max(kills // 3, 1), rng)
    print(f"\npower loss: {len(losses)} times, {messages // 5} messages", flush=True)
    powerless = await PowerRun(
        directory,
        orders=orders(messages // 5, rng, prefix="p"),
        losses=losses,
        rng=rng,
        tell=lambda line: print(line, flush=True),
    ).run()
    _print_losses(powerless)
    is_clean = killed.verdict.is_clean and powerless.verdict.is_clean
    if not is_clean:
        keep(directory)
    return 0 if is_clean else 1


def _print_losses(report: PowerReport) -> None:
    table("power lost", report.losses, [*STEPS, AT_SYNC, AT_RANDOM])
    verdict = report.verdict
    print(f"{report.seconds:.1f} s; {report.unanswered} messages were not answered and were sent again")
    print(
        f"power_losses={report.losses.total()} messages={report.messages} {verdict.counts()} repeats={verdict.repeats}"
    )
    print("\n".join(verdict.lines()), flush=True)


if __name__ == "__main__":
    sys.exit(main())
