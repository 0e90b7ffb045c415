"""Which suite runs on which store, and what the contract found of each broker: tables at the end of a run, so that a
gap is seen and not believed to be covered.

A test belongs to a suite by the file it is in, and to a store by its class, its parameters or its file.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Final

__all__ = ["STORES", "QueueTable", "SuiteTable"]

STORES: Final = ("model", "embedded", "PostgreSQL")

_SUITES: Final = {
    "tests/stores/test_sagastore_contract.py": "saga store contract",
    "tests/stores/test_keyvalue_contract.py": "key-value contract",
    "tests/workers/test_job_store_contract.py": "job run contract",
    "tests/stores/test_differential.py": "differential",
    "tests/runtime/": "runtime",
    "tests/runtime/test_walk_faults.py": "faults",
    "tests/runtime/test_recovery_races.py": "faults",
    "tests/runtime/test_full_disk.py": "faults",
    "tests/stores/test_postgres_faults.py": "faults",
    "tests/stores/test_postgres_standby.py": "faults",
    "tests/crash/": "processes killed",
    "tests/chaos/": "processes killed",
}
_WORDS: Final = {
    "PostgreSQL": ("postgres", "[sql]", "[sql-"),
    "embedded": ("sqlite", "embedded", "kvsagastore"),
    "model": ("memory", "recording"),
}
_EMBEDDED: Final = ("tests/runtime/", "tests/crash/")
"""Where a test that names no store is one of the embedded store."""


class SuiteTable:
    """Counts outcomes by suite and store."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)

    def note(self, nodeid: str, outcome: str) -> None:
        """Notes one test, if it belongs to a suite."""
        place = place_of(nodeid)
        if place is not None:
            self._counts[place][outcome] += 1

    def lines(self) -> list[str]:
        """The table; nothing when no suite ran."""
        suites = list(
            dict.fromkeys(suite for suite in _SUITES.values() if any((suite, s) in self._counts for s in STORES))
        )
        if not suites:
            return []
        rows = [[suite, *(_shown(self._counts.get((suite, store))) for store in STORES)] for suite in suites]
        table = [["", *STORES], *rows]
        widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
        return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


class QueueTable:
    """Counts what the queue contract found of each broker."""

    def __init__(self) -> None:
        self._found: dict[str, Counter[str]] = defaultdict(Counter)

    def note(self, nodeid: str, outcome: str, *, seconds: float, is_verdict: bool) -> None:
        """Notes one part of a test (setup, call, teardown), if it belongs to the contract."""
        broker, is_contract, _ = nodeid.partition("test_queue_contract.py::Test")[2].partition("Queue::")
        if is_contract:
            self._found[broker][outcome] += is_verdict
            self._found[broker]["milliseconds"] += round(seconds * 1000)

    def lines(self) -> list[str]:
        """The table; nothing unless there is something to compare."""
        if len(self._found) < 2:
            return []
        words = ("passed", "failed", "skipped")
        heading = f"{'broker':<12}{words[0]:>8}{words[1]:>8}{words[2]:>9}{'seconds':>10}"
        return [heading, *(self._row(broker, found) for broker, found in sorted(self._found.items()))]

    @staticmethod
    def _row(broker: str, found: Counter[str]) -> str:
        seconds = found["milliseconds"] / 1000
        return f"{broker:<12}{found['passed']:>8}{found['failed']:>8}{found['skipped']:>9}{seconds:>10.1f}"


def place_of(nodeid: str) -> tuple[str, str] | None:
    """The suite and the store of a test."""
    file, _, rest = nodeid.partition("::")
    found = max((prefix for prefix in _SUITES if file.startswith(prefix)), key=len, default=None)
    if found is None:
        return None
    said = f"{rest} {file.rpartition('/')[2]}".lower()
    for store, words in _WORDS.items():
        if any(word in said for word in words):
            return _SUITES[found], store
    if file.startswith("tests/chaos/"):
        return _SUITES[found], "PostgreSQL"
    return (_SUITES[found], "embedded") if file.startswith(_EMBEDDED) else None


def _shown(counts: Counter[str] | None) -> str:
    if counts is None:
        return "-"
    parts = [
        f"{counts[outcome]} {word}"
        for outcome, word in (("failed", "FAILED"), ("skipped", "skipped"))
        if counts[outcome]
    ]
    return ", ".join([*([f"{counts['passed']} ok"] if counts["passed"] else []), *parts])
