"""Everything at once, and an oracle: `python -m tests.chaos`, or `make chaos STORE=postgres`.

    STORE      postgres: a database of our own behind a pooler; kv: one file (postgres)
    ORDERS     how many orders there are, of three messages each (10000)
    KILLS      how many workers are killed (40)
    STOPS      how many are stopped past their lease and woken (8)
    RESTARTS   how often the database is restarted; by turns in order and by kill -9 (2)
    PROCESSES  how many workers there are (4)
    SEED       repeats a run's choices; the timing of processes stays the machine's own

Exits with 0 when nothing was lost, duplicated, stuck or out of order, a late write was refused, every invariant holds,
and charges minus refunds are what the oracle says; with 1 when not. Where the servers are not installed it says so and
does nothing; that is a failure only with SAGALOOM_REQUIRE_SERVERS=1.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.crash.driver import CrashRun, plan_kills, plan_stops
from tests.crash.places import DatabasePlace, FilePlace, Place
from tests.crash.story import orders
from tests.crash.telling import keep, number, print_kills, print_sharing
from tests.servers.postgres import PgBouncer, Postgres
from tests.servers.server import Missing


def main() -> int:
    store = os.environ.get("STORE", "").strip() or "postgres"
    seed = number("SEED", random.SystemRandom().randrange(1_000_000))
    with tempfile.TemporaryDirectory(prefix="sagaloom-chaos-") as directory:
        try:
            with _place(store, Path(directory)) as place:
                is_clean = asyncio.run(_run(Path(directory), place, store, seed))
            if not is_clean:
                keep(Path(directory))
            return 0 if is_clean else 1
        except Missing as missing:
            print(f"skipped: {missing}", file=sys.stderr)
            return int(os.environ.get("SAGALOOM_REQUIRE_SERVERS", "0") not in {"", "0"})
        except asyncio.CancelledError:
            print("interrupted; every process was ended", file=sys.stderr)
            return 130
        except Exception:
            keep(Path(directory))
            raise


@contextlib.contextmanager
def _place(store: str, directory: Path) -> Iterator[Place]:
    match store:
        case "kv":
            yield FilePlace(directory / "saga.db")
        case "postgres":
            with Postgres() as database, PgBouncer(database) as pooler:
                try:
                    yield DatabasePlace(database, pooler)
                finally:
                    for server in (database, pooler):
                        shutil.copy(server.log, directory / f"{server.name}.log")
        case unknown:
            raise SystemExit(f"STORE={unknown!r}: kv or postgres")


async def _run(directory: Path, place: Place, store: str, seed: int) -> bool:
    running = asyncio.current_task()
    assert running is not None
    for each in (signal.SIGINT, signal.SIGTERM):
        # Both end the run through the code that ends every process.
        asyncio.get_running_loop().add_signal_handler(each, running.cancel)
    logging.basicConfig(filename=directory / "driver.log", level=logging.WARNING)
    count, kills, processes = number("ORDERS", 10_000), number("KILLS", 40), number("PROCESSES", 4)
    rng = random.Random(seed)
    plan = plan_kills(kills, rng, steps=place.steps, processes=processes)
    stops = plan_stops(number("STOPS", 8))
    disasters = [place.disasters[turn % 2] for turn in range(number("RESTARTS", 2) if place.disasters else 0)]
    print(f"SEED={seed}; {store}: {processes} workers, {count} orders of three messages, ", end="")
    print(f"{len(plan)} kills, {len(stops)} stops, {len(disasters)} restarts", flush=True)
    run = CrashRun(
        directory,
        place,
        orders=orders(3 * count, rng),
        kills=plan,
        stops=stops,
        disasters=disasters,
        processes=processes,
        rng=rng,
        tell=lambda line: print(line, flush=True),
    )
    report = await run.run()
    print_kills(report, place)
    print_sharing(report)
    print("".join(f"{what}: {times}\n" for what, times in report.disasters.items()), end="")
    fenced = report.refused["write"]
    print(f"{report.verdict.counts()} fenced_writes={fenced}", flush=True)
    return report.verdict.is_clean and fenced > 0


if __name__ == "__main__":
    sys.exit(main())
