"""Line 7: how long nobody is served after a restart, and after a kill.

A process is started on a store full of unfinished instances, with inbox rows (half of them due), backing-off effects
and timers among them: the clock runs from its start, interpreter and imports included, until its first publish is
applied. Then it is killed with SIGKILL in the middle of 64 publishes, and a new process is started on the same file.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from pathlib import Path

from bench.filling import Waiting, fill
from bench.harness import Bench, Child, Finding

__all__ = ["run"]

_MUST_RESTART = 5.0
_MUST_TAKEOVER = 10.0
_AIM = 1.0


def run(bench: Bench) -> None:
    accounts = bench.pick(100_000, 20_000)
    waiting = Waiting(*[accounts // 10] * 3)
    restarts: list[tuple[float, float]] = []
    takeovers: list[float] = []
    with bench.place() as place:
        template = place / "full.db"
        asyncio.run(fill(template, accounts, waiting))
        for number in range(bench.pick(3, 2)):
            path = place / f"restarted-{number}.db"
            shutil.copy(template, path)
            began = time.monotonic()
            with _worker(path, accounts - 1) as worker:
                said = worker.hear()
                restarts.append((said["applied"] - began, said["ready"] - began))
                time.sleep(0.5)  # In the middle of its work.
                killed = time.monotonic()
                worker.kill()
            with _worker(path, accounts - 2) as worker:
                takeovers.append(worker.hear()["applied"] - killed)
                worker.kill()
            path.unlink()
    applied, ready = min(restarts)
    bench.found(
        Finding(
            line="7",
            what=f"restart on {accounts:,} unfinished instances, until the first publish is applied",
            ours=f"{applied:.2f} s",
            baseline=f"ready after {ready:.2f} s",
            value=applied,
            unit=" s",
            must=_MUST_RESTART,
            aim=_AIM,
            at_least=False,
            note=f"with {waiting.inbox:,} inbox rows, {waiting.outbox:,} effects and {waiting.timers:,} timers",
        )
    )
    bench.found(
        Finding(
            line="7",
            what="takeover after kill -9 under load, until a new process has applied a publish",
            ours=f"{min(takeovers):.2f} s",
            baseline=f"at worst {max(takeovers):.2f} s",
            value=min(takeovers),
            unit=" s",
            must=_MUST_TAKEOVER,
            aim=_AIM,
            at_least=False,
        )
    )


def _worker(path: Path, account: int) -> Child:
    return Child("bench.restarting", str(path), str(account))
