"""Line 6: whether a large store makes its busy instances slow.

All of it is ours against ours: 64 publishers on a hot set of 1,000 accounts in a store of 1,000 (the baseline), and
then, in turns with it, in a store of many more; then a timer waits for each of those, and at last an effect, too. Cold
access goes to accounts that nobody has touched since the start, so each of them has to be read.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import NamedTuple

from bench.databases import server_url
from bench.filling import account_id, add_effects, add_timers, fill
from bench.harness import Bench, Finding, quiet_gc
from bench.workload import account_messages, open_runtime, publish_all
from sagaloom.process import run as run_process

__all__ = ["run"]

_IN_FLIGHT = 64
_HOT = 1_000
_MUST = {"hot": 1.5, "cold": 3.0, "timers": 1.5, "outbox": 1.5}
_AIM = {"hot": 1.2, "cold": 2.5, "timers": 1.2, "outbox": 1.2}


class _Pace(NamedTuple):
    rate: float
    cpu_us: float
    """CPU a message."""


async def _paces(path: Path, accounts: int, *, seconds: float, cold: bool) -> list[_Pace]:
    """How fast the hot set is, and then cold accounts, if wanted."""
    rng = random.Random(6)
    numbers = rng.sample(range(accounts), accounts)
    hot = [account_id(number) for number in numbers[:_HOT]]
    async with open_runtime(path) as (runtime, _, _):

        async def pace(chosen: list[str]) -> _Pace:
            groups = account_messages(chosen)
            with quiet_gc():
                began, cpu = time.perf_counter(), time.process_time()
                await publish_all(runtime, groups, in_flight=_IN_FLIGHT)
                await runtime.settled(60)
                cpu = time.process_time() - cpu
                return _Pace(len(chosen) / (time.perf_counter() - began), cpu / len(chosen) * 1_000_000)

        warm = await pace(hot)
        messages = max(2 * _HOT, round(warm.rate * seconds))
        paces = [await pace([rng.choice(hot) for _ in range(messages)])]
        if cold:
            paces.append(await pace([account_id(number) for number in numbers[_HOT : _HOT + messages]]))
        return paces


def run(bench: Bench) -> None:
    accounts = bench.pick(1_000_000 if server_url() is not None else 100_000, 20_000)
    rounds = 2 if server_url() is not None else bench.pick(3, 2)
    rate: dict[str, tuple[float, float]] = {}
    cpu_us: dict[str, tuple[float, float]] = {}
    with bench.place() as place:
        small, large = place / "small.db", place / "large.db"
        fill(small, _HOT)
        fill(large, accounts)
        for name, add in (("hot", None), ("timers", add_timers), ("outbox", add_effects)):
            if add is not None:
                add(large, accounts, accounts)
            paces: dict[str, list[_Pace]] = {}
            for _ in range(rounds):
                for kind, path, size in (("small", small, _HOT), (name, large, accounts)):
                    hot, *cold = run_process(_paces(path, size, seconds=bench.seconds, cold=kind == "hot"))
                    paces.setdefault(kind, []).append(hot)
                    paces.setdefault("cold", []).extend(cold)
            best = {kind: max(pace.rate for pace in found) for kind, found in paces.items() if found}
            least = {kind: min(pace.cpu_us for pace in found) for kind, found in paces.items() if found}
            for kind in best.keys() - {"small"}:
                rate[kind] = best[kind], best["small"]
                cpu_us[kind] = least[kind], least["small"]
    what = {
        "hot": f"a hot set of {_HOT:,} in a store of {accounts:,}, time a message against a store of {_HOT:,}",
        "cold": f"cold uniform access in a store of {accounts:,}, against the hot set in a store of {_HOT:,}",
        "timers": f"the hot set beside {accounts:,} waiting timers",
        "outbox": f"the hot set beside {accounts:,} waiting effects, and the timers",
    }
    for name, text in what.items():
        (ours, baseline), (cpu, cpu_baseline) = rate[name], cpu_us[name]
        bench.found(
            Finding(
                line="6",
                what=text,
                ours=f"{ours:,.0f}/s",
                baseline=f"{baseline:,.0f}/s",
                value=baseline / ours,
                must=_MUST[name],
                aim=_AIM[name],
                at_least=False,
                note=f"CPU a message {cpu:.0f} us against {cpu_baseline:.0f} us, {cpu / cpu_baseline:.2f}x",
            )
        )
