"""Line 8: what a process costs that has nothing to do.

The served process of line 4, on a store with live instances, some of which wait for a timer or for another attempt of
an effect; alone, and as one of two that share the store. Statements are those that touch tables, as the store counts
them.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

from bench.filling import Waiting, fill
from bench.harness import Bench, Child, Finding

__all__ = ["run"]

_ACCOUNTS = 1_000
_MUST_STATEMENTS = 120.0
_AIM_STATEMENTS = 30.0
_MUST_CPU_PERCENT = 1.0
_AIM_CPU_PERCENT = 0.3


def run(bench: Bench) -> None:
    seconds = bench.pick(20, 8)
    with bench.place() as place:
        path = place / "durable.db"
        fill(path, _ACCOUNTS, Waiting(inbox=0, outbox=100, timers=100))
        for name, others in (("idle", 0), ("idle, one of two processes", 1)):
            with contextlib.ExitStack() as stack:
                servers = [stack.enter_context(Child("bench.serving", "durable", str(path))) for _ in range(1 + others)]
                for server in servers:
                    server.hear()
                time.sleep(1.0 + 2.0 * others)  # What starting leaves behind is not idling.
                servers[0].ask("start")
                time.sleep(seconds)
                _find(bench, name, servers[0].ask("stop"))


def _find(bench: Bench, name: str, used: dict[str, Any]) -> None:
    statements = used["statements"] * 60 / used["wall"]
    percent = used["cpu"] / used["wall"] * 100
    bench.found(
        Finding(
            line="8",
            what=f"{name}: statements that touch tables, a minute",
            ours=f"{used['statements']:.0f} in {used['wall']:.0f} s",
            baseline="none",
            value=statements,
            unit="",
            must=_MUST_STATEMENTS,
            aim=_AIM_STATEMENTS,
            at_least=False,
        )
    )
    bench.found(
        Finding(
            line="8",
            what=f"{name}: CPU of a serving process",
            ours=f"{used['cpu'] * 1000:.0f} ms in {used['wall']:.0f} s",
            baseline="none",
            value=percent,
            unit=" %",
            must=_MUST_CPU_PERCENT,
            aim=_AIM_CPU_PERCENT,
            at_least=False,
        )
    )
