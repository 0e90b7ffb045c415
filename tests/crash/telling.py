"""What runs say of themselves when they are over, and what they ask of whoever starts them."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from tests.crash.driver import ALL_AT_ONCE, RANDOM, STOPS, Report
from tests.crash.places import Place

__all__ = ["keep", "number", "print_kills", "print_sharing", "table"]


def print_kills(report: Report, place: Place) -> None:
    """Where workers died, and what became of everything."""
    is_shared = bool(report.shares)
    table("killed", report.kills, [*place.steps, RANDOM, *([ALL_AT_ONCE] if is_shared else [])])
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


def print_sharing(report: Report) -> None:
    """How several workers took over from each other."""
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
    pairs = zip(report.shares, report.fair_shares, strict=True)
    shares = " ".join(f"{share * 100:.0f} % (of {fair * 100:.0f} %)" for share, fair in pairs)
    print(f"shares under load: {shares} ({report.shared_messages} messages applied)", flush=True)


def table(what: str, counted: dict[str, int], rows: list[str]) -> None:
    """How often each of `rows` was counted."""
    width = max(map(len, [*rows, "step"])) + 2
    print(f"\n{'step':<{width}}{what}")
    for row in rows:
        print(f"{row:<{width}}{counted.get(row, 0):>{len(what)}}")


def keep(directory: Path) -> None:
    """Leaves what a failed run wrote for whoever wants to know why."""
    kept = Path(tempfile.gettempdir()) / f"sagaloom-crash-kept-{int(time.time())}"
    directory.rename(kept)
    directory.mkdir()
    print(f"the store, the worker's log and the receiver's log are in {kept}", file=sys.stderr)


def number(name: str, default: int) -> int:
    """The number that the environment has under `name`."""
    given = os.environ.get(name, "").strip()
    if not given:
        return default
    if not given.isdigit() or int(given) < 1:
        raise SystemExit(f"{name}={given!r} is no number above 0")
    return int(given)
