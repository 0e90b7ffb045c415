"""Line 7: how long nobody is served after a restart, and after a kill.

A process is started on a store full of unfinished instances, with inbox rows (half of them due), backing-off effects
and timers among them: the clock runs from its start, interpreter and imports included, until its first publish is
applied. Then it is killed with SIGKILL in the middle of 64 publishes, and a new process is started on the same file.
At last two processes share the store and one of them is killed: the other one has been there all the time.
"""

from __future__ import annotations

import time
from pathlib import Path

from bench.databases import copy_store
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
    survivals: list[tuple[float, float]] = []
    with bench.place() as place:
        template = place / "full.db"
        fill(template, accounts, waiting)
        for number in range(bench.pick(3, 2)):
            path = place / f"restarted-{number}.db"
            copy_store(template, path)
            began = time.monotonic()
            with _worker(path, accounts - 1) as worker:
                said = worker.hear()
                restarts.append((said["applied"] - began, said["ready"] - began))
                time.sleep(0.5)  # In the middle of its work.
                killed = time.monotonic()
                worker.kill()
            with _worker(path, accounts - 2) as worker:
                takeovers.append(worker.hear()["applied"] - killed)
                survivals.append(_survival(path, accounts, worker))
            path.unlink(missing_ok=True)
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

    taken, applied_all = min(survivals)
    bench.found(
        Finding(
            line="7",
            what="takeover after kill -9 of one of two processes under load, until the other holds everything",
            ours=f"{taken:.2f} s",
            baseline=f"{applied_all:.2f} s until a round of publishes to every partition was applied",
            value=taken,
            unit=" s",
            must=_MUST_TAKEOVER,
            aim=_AIM,
            at_least=False,
            note=f"at worst {max(survivals)[0]:.2f} s",
        )
    )


def _survival(path: Path, accounts: int, doomed: Child) -> tuple[float, float]:
    """Seconds from the kill of `doomed` until its partner on the same store has all of it, and has applied a publish of
    every partition."""
    with _worker(path, accounts - 3, "beside") as survivor:
        survivor.hear()
        survivor.hear()  # It has got its share.
        time.sleep(0.5)
        killed = time.monotonic()
        doomed.kill()
        taken = survivor.hear()["taken"] - killed
        applied = survivor.hear()["applied"] - killed
        survivor.kill()
        return taken, applied


def _worker(path: Path, account: int, *how: str) -> Child:
    return Child("bench.restarting", str(path), str(account), *how)
