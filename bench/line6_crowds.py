"""Line 6: whether a large store makes its busy instances slow.

All of it is ours against ours: 64 publishers on a hot set of 1,000 accounts in a store of 1,000 (the baseline), and
then in stores of many more, in some of which a timer or an effect waits for each. Cold access goes to accounts that
nobody has touched since the start, so each of them has to be read.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import time
from pathlib import Path

from bench.filling import account_id, add_effects, add_timers, fill
from bench.harness import Bench, Finding, quiet_gc
from bench.workload import account_messages, open_runtime, publish_all

__all__ = ["run"]

_IN_FLIGHT = 64
_HOT = 1_000
_MUST = {"hot": 1.5, "cold": 3.0, "timers": 1.5, "outbox": 1.5}
_AIM = {"hot": 1.2, "cold": 2.5, "timers": 1.2, "outbox": 1.2}


async def _rates(path: Path, accounts: int, *, seconds: float, cold: bool) -> tuple[float, float]:
    """Messages a second on the hot set, and then on cold accounts (0 when not wanted)."""
    rng = random.Random(6)
    numbers = rng.sample(range(accounts), accounts)
    hot = [account_id(number) for number in numbers[:_HOT]]
    async with open_runtime(path) as (runtime, _, _):

        async def rate(chosen: list[str]) -> float:
            groups = account_messages(chosen)
            with quiet_gc():
                began = time.perf_counter()
                await publish_all(runtime, groups, in_flight=_IN_FLIGHT)
                await runtime.settled(60)
                return len(chosen) / (time.perf_counter() - began)

        warm = await rate(hot)
        messages = max(2 * _HOT, round(warm * seconds))
        hot_rate = await rate([rng.choice(hot) for _ in range(messages)])
        cold_rate = 0.0
        if cold:
            cold_rate = await rate([account_id(number) for number in numbers[_HOT : _HOT + messages]])
        return hot_rate, cold_rate


def run(bench: Bench) -> None:
    accounts = bench.pick(100_000, 20_000)
    best: dict[str, float] = {}
    with bench.place() as place:
        paths = {name: place / f"{name}.db" for name in ("small", "hot", "timers", "outbox")}
        asyncio.run(fill(paths["small"], _HOT))
        asyncio.run(fill(paths["hot"], accounts))
        for name in ("timers", "outbox"):
            shutil.copy(paths["hot"], paths[name])
        asyncio.run(add_timers(paths["timers"], accounts, accounts))
        asyncio.run(add_effects(paths["outbox"], accounts, accounts))
        for _ in range(bench.pick(3, 2)):
            for name, path in paths.items():
                size = _HOT if name == "small" else accounts
                hot, cold = asyncio.run(_rates(path, size, seconds=bench.seconds, cold=name == "hot"))
                best[name] = max(best.get(name, 0.0), hot)
                best["cold"] = max(best.get("cold", 0.0), cold)
    what = {
        "hot": f"a hot set of {_HOT:,} in a store of {accounts:,}, time a message against a store of {_HOT:,}",
        "cold": f"cold uniform access in a store of {accounts:,}, against the hot set in a store of {_HOT:,}",
        "timers": f"the hot set beside {accounts:,} waiting timers",
        "outbox": f"the hot set beside {accounts:,} waiting effects",
    }
    for name, text in what.items():
        bench.found(
            Finding(
                line="6",
                what=text,
                ours=f"{best[name]:,.0f}/s",
                baseline=f"{best['small']:,.0f}/s",
                value=best["small"] / best[name],
                must=_MUST[name],
                aim=_AIM[name],
                at_least=False,
            )
        )
