"""What all lines share: how a finding looks, where files go, how children are started and ended, what machine it was.

The rules of every line:

- A figure is a ratio of two measurements of one run, taken in turns, because a machine is never alone: noise then hits
  both sides. Noise only ever slows, so of several rounds the best of each side counts.
- Clocks start after everything is prepared, and stop when inbox and outbox are empty.
- Files live on a real disk. A file system in memory would make every fsync free and every ratio wrong.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Protocol

import apsw

from sagaloom.process import calm_gc

__all__ = [
    "ROOT",
    "Bench",
    "Child",
    "Finding",
    "LineModule",
    "file_system_of",
    "median",
    "percentile",
    "quiet_gc",
    "working_directory",
]

ROOT: Final = Path(__file__).resolve().parent.parent
_IN_MEMORY: Final = ("tmpfs", "ramfs", "devtmpfs")
_CHILD_SECONDS_MAX: Final = 120.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One figure of one line. `value` is what `must` and `aim` speak of: `at_least` says which way is good.

    `is_met` is None for a figure that is only told, without a limit.
    """

    line: str
    what: str
    ours: str
    baseline: str
    value: float
    unit: str = "x"
    must: float | None = None
    aim: float | None = None
    at_least: bool = True
    note: str = ""

    @property
    def is_met(self) -> bool | None:
        if self.must is None:
            return None
        return self.value >= self.must if self.at_least else self.value <= self.must

    @property
    def verdict(self) -> str:
        return {None: "", True: "ok", False: "MISSED"}[self.is_met]

    def shown(self, number: float | None) -> str:
        if number is None:
            return ""
        digits = f"{number:.0f}" if number >= 100 else f"{number:.2f}".rstrip("0").rstrip(".")
        return f"{digits}{self.unit}"

    def limit(self, number: float | None) -> str:
        return "" if number is None else f"{'>=' if self.at_least else '<='} {self.shown(number)}"

    def as_json(self) -> dict[str, Any]:
        return {
            "line": self.line,
            "what": self.what,
            "ours": self.ours,
            "baseline": self.baseline,
            "value": round(self.value, 4),
            "unit": self.unit,
            "must": self.must,
            "aim": self.aim,
            "atLeast": self.at_least,
            "verdict": self.verdict,
            "note": self.note,
        }


@dataclass
class Bench:
    """How this run is done. `short` is for a quick look: fewer messages, fewer rounds, the same figures."""

    directory: Path
    short: bool
    say: Callable[[str], None]
    findings: list[Finding] = field(default_factory=list[Finding])
    _count: int = 0

    @property
    def rounds(self) -> int:
        return 2 if self.short else 4

    @property
    def seconds(self) -> float:
        """About how long one measurement may take: sizes follow the rate of its warm-up."""
        return 1.0 if self.short else 2.5

    def pick(self, full: int, short: int) -> int:
        """A size, by the kind of run."""
        return short if self.short else full

    @contextmanager
    def place(self) -> Generator[Path]:
        """A fresh directory for one measurement, removed after it."""
        self._count += 1
        place = self.directory / f"m{self._count}"
        place.mkdir()
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def found(self, finding: Finding) -> None:
        """Notes a finding and says it at once."""
        self.findings.append(finding)
        parts = [f"  {finding.what}: {finding.shown(finding.value)}", f"({finding.ours} / {finding.baseline})"]
        if finding.must is not None:
            parts.append(f"must {finding.limit(finding.must)}, aim {finding.limit(finding.aim)}: {finding.verdict}")
        if finding.note:
            parts.append(f"[{finding.note}]")
        self.say(" ".join(parts))

    def facts(self) -> dict[str, str]:
        """The machine and the versions, as far as they explain a figure."""
        file_system = file_system_of(self.directory)
        return {
            "machine": f"{os.cpu_count()} x {platform.machine()}, load {os.getloadavg()[0]:.1f} before the run",
            "python": f"{platform.python_implementation()} {platform.python_version()} on {platform.system()}",
            "versions": ", ".join(
                f"{name} {version(name)}" for name in ("sagaloom", "apsw", "msgspec", "uvicorn", "pydantic")
            )
            + f", SQLite {apsw.sqlite_lib_version()}",
            "file system": f"{file_system}, {shutil.disk_usage(self.directory).free >> 30} GiB free",
            "fdatasync": f"{self._fdatasync_ms():.2f} ms (median of 200 after 4 KiB each)",
        }

    def _fdatasync_ms(self) -> float:
        datasync = getattr(os, "fdatasync", os.fsync)
        with self.place() as place, (place / "sync").open("wb", buffering=0) as file:
            seconds: list[float] = []
            for _ in range(200):
                file.write(bytes(4096))
                began = time.perf_counter()
                datasync(file.fileno())
                seconds.append(time.perf_counter() - began)
        return median(seconds) * 1000


class LineModule(Protocol):
    """The module of one line. Its docstring begins with `Line <number>: <what it is about>`."""

    __doc__: str | None

    def run(self, bench: Bench) -> None: ...


def working_directory() -> Path:
    """A new directory on a real disk: in `BENCH_DIR`, else where temporary files go, else here."""
    given = os.environ.get("BENCH_DIR")
    for parent in [Path(given)] if given else [Path(tempfile.gettempdir()), Path.cwd()]:
        if file_system_of(parent) not in _IN_MEMORY:
            return Path(tempfile.mkdtemp(prefix="sagaloom-bench-", dir=parent))
    raise SystemExit("the bench needs a real disk, this one is in memory: set BENCH_DIR to a directory on one")


def file_system_of(path: Path) -> str:
    """The kind of file system that `path` is on, as the kernel calls it; `unknown` where it does not say."""
    mounts = Path("/proc/self/mounts")
    if not mounts.exists():
        return "unknown"
    best, kind = "", "unknown"
    resolved = f"{path.resolve()}/"
    for line in mounts.read_text().splitlines():
        _, point, found, *_ = line.split(" ")
        point = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), point)
        if resolved.startswith(f"{point.rstrip('/')}/") and len(point) >= len(best):
            best, kind = point, found
    return kind


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


@contextmanager
def quiet_gc() -> Generator[None]:
    """Keeps what was prepared for a measurement out of the garbage collector's sight while it lasts, and the collector
    as calm as in a serving process; the bare loops get the same."""
    before = gc.get_threshold()
    calm_gc()
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
        gc.collect()


class Child:
    """A process of ours that is asked by lines of text and answers by lines of JSON. It ends with its `with` block."""

    def __init__(self, module: str, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, question: str) -> dict[str, Any]:
        """Sends a line and reads the answer."""
        self.tell(question)
        return self.hear()

    def tell(self, text: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{text}\n")
        self._process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """The next line that the child says."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a child of the bench ended with {self._process.wait(_CHILD_SECONDS_MAX)}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def kill(self) -> None:
        """Ends the process as a power switch would (SIGKILL), and waits for it."""
        self._process.kill()
        self._process.wait(_CHILD_SECONDS_MAX)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()  # The end of its input is a child's sign to go.
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()
        if self._process.stdout is not None:
            self._process.stdout.close()
