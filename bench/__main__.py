"""`make bench`: measures the lines of docs/benchmarks.md on this machine, and fails when one misses its must.

    make bench                                      everything, some minutes
    make bench SHORT=1                              a quick look, under 90 s
    make bench LINES="1 3"                          some lines
    make bench STORE=postgres                       those of PostgreSQL, on a server of its own
    .venv/bin/python -m bench --short --json 1 3    the same, as arguments; JSON on stdout, the rest on stderr
    .venv/bin/python -m bench --rows                the rows that the store writes for one order

BENCH_DIR says where the files go; it must be on a real disk.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Final, cast

from rich.console import Console
from rich.table import Table

from bench import rows_now
from bench.databases import a_server
from bench.harness import Bench, Finding, LineModule, working_directory

LINES: Final = {
    "1": "line1_throughput",
    "2": "line2_postgres",
    "3": "line3_latency",
    "4": "line4_http",
    "5": "line5_peers",
    "6": "line6_crowds",
    "7": "line7_restart",
    "8": "line8_idle",
    "9": "line9_import",
    "10": "line10_queues",
    "11": "line11_jobs",
}
STORES: Final = {"kv": ("1", "3", "4", "6", "7", "8", "9", "10", "11"), "postgres": ("2", "3", "5", "6", "7", "8")}
"""Which lines are of which store."""


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = _parsed(arguments)
    # What is said on the way goes where JSON does not.
    console = Console(stderr=chosen.json, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 160
    directory = working_directory()
    try:
        bench = Bench(directory, short=chosen.short, say=lambda text: console.print(text, markup=False))
        if chosen.rows:
            with bench.place() as place:
                bench.say(rows_now.show(place))
            return 0
        with a_server() if chosen.store == "postgres" else contextlib.nullcontext():
            return _measured(bench, chosen.lines, console, as_json=chosen.json)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _measured(bench: Bench, lines: Sequence[str], console: Console, *, as_json: bool) -> int:
    facts = bench.facts()
    for name, fact in facts.items():
        bench.say(f"{name}: {fact}")
    began = time.monotonic()
    broken: list[str] = []
    for line in lines:
        module = cast("LineModule", importlib.import_module(f"bench.{LINES[line]}"))
        bench.say(f"line {line}: {(module.__doc__ or '').partition(': ')[2].partition('.')[0]}")
        since = time.monotonic()
        try:
            module.run(bench)
        except Exception:  # noqa: BLE001  # one line that breaks must not hide what the others found
            traceback.print_exc()
            broken.append(line)
        bench.say(f"  {time.monotonic() - since:.0f} s")
    missed = [finding for finding in bench.findings if finding.is_met is False]
    if as_json:
        result = {
            "facts": facts,
            "short": bench.short,
            "findings": [finding.as_json() for finding in bench.findings],
            "missed": len(missed),
            "broken": broken,
        }
        print(json.dumps(result, indent=2))
    console.print(_table(bench.findings))
    ended = f"{len(missed)} missed, {time.monotonic() - began:.0f} s"
    bench.say(f"{ended}; broken lines: {', '.join(broken)}" if broken else ended)
    return 1 if missed or broken else 0


def _table(findings: Sequence[Finding]) -> Table:
    table = Table(title="Measured in one run; ratios only, absolute figures belong to this machine and moment")
    for name in ("line", "what", "ours", "baseline", "value", "must", "aim", ""):
        is_text = name in ("line", "what")
        table.add_column(name, justify="left" if is_text else "right", no_wrap=name not in ("what", "ours", "baseline"))
    for finding in findings:
        table.add_row(
            finding.line,
            finding.what,
            finding.ours,
            finding.baseline,
            finding.shown(finding.value),
            finding.limit(finding.must),
            finding.limit(finding.aim),
            f"[bold red]{finding.verdict}[/]" if finding.is_met is False else finding.verdict,
        )
    return table


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measures sagaloom on this machine.")
    parser.add_argument("lines", nargs="*", help=f"lines to measure, of {', '.join(LINES)} (LINES; default all)")
    parser.add_argument("--short", action="store_true", default=_is_set("SHORT"), help="a quick look (SHORT=1)")
    parser.add_argument("--json", action="store_true", default=_is_set("JSON"), help="JSON on stdout (JSON=1)")
    store = os.environ.get("STORE") or "kv"
    parser.add_argument("--store", default=store, choices=list(STORES), help="the store (STORE)")
    parser.add_argument("--rows", action="store_true", help="show the rows of one order, and measure nothing")
    chosen = parser.parse_args(arguments)
    known = STORES[chosen.store]
    chosen.lines = chosen.lines or os.environ.get("LINES", "").replace(",", " ").split() or list(known)
    for line in chosen.lines:
        if line not in known:
            parser.error(f"line {line!r} is not one of {', '.join(known)}, which are those of store {chosen.store}")
    return chosen


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() not in ("", "0", "no", "false")


if __name__ == "__main__":
    sys.exit(main())
