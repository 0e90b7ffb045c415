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
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from sagaloom.testing.faults import STEPS
from tests.crash.driver import ALL_AT_ONCE, RANDOM, STOPS, CrashRun, Report, plan_kills, plan_stops
from tests.crash.places import FilePlace, Place
from tests.crash.power import AT_RANDOM, AT_SYNC, PowerReport, PowerRun, plan_power_losses
from tests.crash.story import orders


def main() -> int:
    kills, messages = _number("KILLS", 100), _number("MESSAGES", 10_000)
    seed = _number("SEED", random.SystemRandom().randrange(1_000_000))
    processes = _number("PROCESSES", 1)
    try:
        with tempfile.TemporaryDirectory(prefix="sagaloom-crash-") as directory:
            run = _run(Path(directory), kills=kills, messages=messages, processes=processes, seed=seed)
            try:
                return asyncio.run(run)
            except Exception:
                _keep(Path(directory))
                raise
    except asyncio.CancelledError:
        print("interrupted; every process was ended", file=sys.stderr)
        return 130


async def _run(directory: Path, *, kills: int, messages: int, processes: int, seed: int) -> int:
    running = asyncio.current_task()
    assert running is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        # Both end the run through the code that ends every process.
        asyncio.get_running_loop().add_signal_handler(number, running.cancel)
    # What a dying runtime says of its end is expected here; whoever wants to know finds it with a failed run.
    logging.basicConfig(filename=directory / "driver.log", level=logging.WARNING)
    again = f"make crash KILLS={kills} MESSAGES={messages} PROCESSES={processes} SEED={seed}"
    print(f"SEED={seed}; the same choices again: {again}", flush=True)
    rng = random.Random(seed)
    place = FilePlace(directory / "saga.db")
    plan = plan_kills(kills, rng, steps=place.steps, processes=processes)
    stops = plan_stops(kills) if processes > 1 else []
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
    _print_kills(killed, place)
    if processes > 1:
        _print_sharing(killed)
        if not killed.verdict.is_clean:
            _keep(directory)
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
        _keep(directory)
    return 0 if is_clean else 1


def _print_kills(report: Report, place: Place) -> None:
    is_shared = bool(report.shares)
    _table("killed", report.kills, [*place.steps, RANDOM, *([ALL_AT_ONCE] if is_shared else [])])
    if is_shared:
        print("".join(f"{how}: {report.stops[how]}\n" for how in STOPS), end="")
    print(
        f"{report.seconds:.1f} s; a new worker was ready after {median(report.ready_seconds) * 1000:.0f} ms "
        f"(median; the slowest after {max(report.ready_seconds) * 1000:.0f} ms); {report.cut_answers} answers were cut "
        f"off, {report.duplicates_sent} duplicates sent; told to try again: {dict(report.refused_retryably) or 'none'}"
    )
    verdict = report.verdict
    print(f"kills={report.kills.total()} messages={report.messages} {verdict.counts()} repeats={verdict.repeats}")
    print("\n".join(verdict.lines()), flush=True)


def _print_sharing(report: Report) -> None:
    killed, stopped = sorted(report.after_kill_seconds), sorted(report.after_stop_seconds)
    if killed:
        print(
            f"takeover after kill -9: median {median(killed) * 1000:.0f} ms, slowest {killed[-1] * 1000:.0f} ms "
            f"({len(killed)})"
        )
    if stopped:
        print(
            f"takeover by lease (SIGSTOP): median {median(stopped):.2f} s, slowest {stopped[-1]:.2f} s ({len(stopped)})"
        )
    print(
        f"woken past their lease: {report.woken}; told so when they wrote: {report.refused['write']}, "
        f"when they looked: {report.refused['look']}"
    )
    shares = " ".join(f"{share * 100:.0f} %" for share in report.shares)
    print(f"shares under load: {shares} ({report.shared_messages} messages applied)", flush=True)


def _print_losses(report: PowerReport) -> None:
    _table("power lost", report.losses, [*STEPS, AT_SYNC, AT_RANDOM])
    verdict = report.verdict
    print(f"{report.seconds:.1f} s; {report.unanswered} messages were not answered and were sent again")
    print(
        f"power_losses={report.losses.total()} messages={report.messages} {verdict.counts()} repeats={verdict.repeats}"
    )
    print("\n".join(verdict.lines()), flush=True)


def _table(what: str, counted: dict[str, int], rows: list[str]) -> None:
    width = max(map(len, [*rows, "step"])) + 2
    print(f"\n{'step':<{width}}{what}")
    for row in rows:
        print(f"{row:<{width}}{counted.get(row, 0):>{len(what)}}")


def _keep(directory: Path) -> None:
    """Leaves what a failed run wrote for whoever wants to know why."""
    kept = Path(tempfile.gettempdir()) / f"sagaloom-crash-kept-{int(time.time())}"
    directory.rename(kept)
    directory.mkdir()
    print(f"the store, the worker's log and the receiver's log are in {kept}", file=sys.stderr)


def _number(name: str, default: int) -> int:
    given = os.environ.get(name, "").strip()
    if not given:
        return default
    if not given.isdigit() or int(given) < 1:
        raise SystemExit(f"{name}={given!r} is no number above 0")
    return int(given)


if __name__ == "__main__":
    sys.exit(main())
