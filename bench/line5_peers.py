"""Line 5: a saga of three steps against the peers that do the same on the same database.

Each step is work outside, whose result is durable before the next step begins. DBOS writes five times for it: when the
workflow begins, after each of its steps, and when it ends. So do we: the message that starts the saga, three answers,
and that its last effect has left. Each side runs in one process, with 1, 8 and 64 sagas in flight; what counts is how
many steps a second the peer does at its best of these, and we at ours.

Restate keeps its journal in a server of its own instead of the database, and calls its workers over HTTP, as its client
does it: two processes beside the client, on the same machine. It is measured where `make bench` could install it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

from bench.databases import database_of
from bench.harness import Bench, Child, Finding, quiet_gc
from sagaloom import CascadedMessage, Saga, SagaContext, SagaMessage, define_saga, saga_complete, send
from sagaloom.composition import open_sql_saga_store
from sagaloom.process import run as run_process
from sagaloom.runtime import PublishReceipt, SagaRuntime
from sagaloom.targets import EffectRequest, callable_target

__all__ = ["run"]

_IN_FLIGHT: Final = (1, 8, 64)
_PEERS: Final = {"DBOS": ("threads", "async"), "Restate": ("Service", "Workflow")}
"""The forms in which each of them has workflows."""
_STEPS: Final = 3
_WARM_UP: Final = 20
_SAGA_SECONDS_MAX: Final = 30.0
_MUST: Final = {"DBOS": 10.0, "Restate": 5.0}
_AIM: Final = {"DBOS": 50.0, "Restate": 10.0}

State = dict[str, Any]


def _next_step(saga: Saga[State], message: SagaMessage[Any], context: SagaContext[State]) -> Sequence[CascadedMessage]:
    order_id, done = message.payload["orderId"], message.payload["step"]
    saga.state = {"orderId": order_id, "done": done}
    if done == _STEPS:
        return [send("bench:done", {"orderId": order_id}), saga_complete({"orderId": order_id})]
    return [send("bench:step", {"orderId": order_id, "step": done + 1})]


def _order_of(message: SagaMessage[Any]) -> str:
    order_id: str = message.payload["orderId"]
    return order_id


_nothing_yet: State = {}

_steps = (
    define_saga("bench-steps")
    .state(_nothing_yet)
    .correlate(_order_of)
    .on("Begun", _next_step)
    .on("StepDone", _next_step, starts=False)
    .build()
)


class _Outside:
    """Does the steps, and tells when an order is through."""

    def __init__(self) -> None:
        self._waiting: dict[str, asyncio.Future[None]] = {}

    def through(self, order_id: str) -> asyncio.Future[None]:
        return self._waiting.setdefault(order_id, asyncio.get_running_loop().create_future())

    async def take(self, request: EffectRequest) -> list[SagaMessage[Any]]:
        order_id = request.payload["orderId"]
        if request.target_id == "done":
            self._waiting.pop(order_id).set_result(None)
            return []
        return [SagaMessage("StepDone", {"orderId": order_id, "step": request.payload["step"]})]


async def _ours(url: str, name: str, wanted: Sequence[tuple[int, int]]) -> list[float]:
    """Seconds for each (in flight, count); `name` sets these orders apart from those of other rounds."""
    store = await open_sql_saga_store(url=url)
    outside = _Outside()
    try:
        runtime = SagaRuntime(store, definitions=[_steps], targets=[callable_target("bench", outside.take)])
        async with runtime:
            seconds: list[float] = []
            for number, (in_flight, count) in enumerate(wanted):
                await _run_all(runtime, outside, f"w{name}-{number}", in_flight, _WARM_UP)
                with quiet_gc():
                    began = time.perf_counter()
                    await _run_all(runtime, outside, f"o{name}-{number}", in_flight, count)
                    await runtime.settled()
                    seconds.append(time.perf_counter() - began)
            return seconds
    finally:
        await store.close()


async def _run_all(runtime: SagaRuntime, outside: _Outside, name: str, in_flight: int, count: int) -> None:
    async def worker(left: Iterator[int]) -> None:
        for number in left:
            order_id = f"{name}-{number}"
            through = outside.through(order_id)
            receipt = await runtime.publish(SagaMessage("Begun", {"orderId": order_id, "step": 0}))
            if not isinstance(receipt, PublishReceipt):
                receipt.raise_for_rejected()
            async with asyncio.timeout(_SAGA_SECONDS_MAX):
                await through

    left = iter(range(count))
    await asyncio.gather(*(worker(left) for _ in range(in_flight)))


def run(bench: Bench) -> None:
    count = bench.pick(200, 60)
    ours: dict[str, float] = {}
    theirs: dict[str, dict[str, float]] = {}
    with bench.place() as place, contextlib.ExitStack() as stack:
        url, peer_url = (asyncio.run(database_of(place / name)) for name in ("ours", "peer"))
        peers = {"DBOS": stack.enter_context(Child("bench.peers.dbos_steps", peer_url))}
        restate = stack.enter_context(Child("bench.peers.restate_steps", str(place)))
        greeting = restate.hear()
        if "missing" in greeting:
            bench.say(f"  left out: {greeting['missing']}")
        else:
            peers["Restate"] = restate
            bench.say(f"  {greeting['version']}")
        for name, peer in peers.items():
            for form in _PEERS[name]:
                peer.ask(f"run {form} 8 {_WARM_UP}")
        for turn in range(bench.rounds // 2):
            seconds = run_process(_ours(url, str(turn), [(each, count * each // 2 + count) for each in _IN_FLIGHT]))
            for in_flight, took in zip(_IN_FLIGHT, seconds, strict=True):
                _better(ours, str(in_flight), _STEPS * (count * in_flight // 2 + count) / took)
            for name, peer in peers.items():
                for form in _PEERS[name]:
                    for in_flight in _IN_FLIGHT:
                        sagas = count if in_flight < _IN_FLIGHT[-1] else 2 * count
                        took = peer.ask(f"run {form} {in_flight} {sagas}")["seconds"]
                        _better(theirs.setdefault(name, {}), f"{form} {in_flight}", _STEPS * sagas / took)
    best = max(ours.values())
    for name, rates in theirs.items():
        best_of_theirs = max(rates.values())
        bench.found(
            Finding(
                line="5",
                what=f"a saga of three steps, each durable, against {name} at its best of 1, 8, 64 in flight",
                ours=f"{best:.0f} steps/s",
                baseline=f"{best_of_theirs:.0f} steps/s",
                value=best / best_of_theirs,
                must=_MUST[name],
                aim=_AIM[name],
                note=f"ours {_listed(ours)}; {name} {_listed(rates)}",
            )
        )


def _better(rates: dict[str, float], which: str, rate: float) -> None:
    rates[which] = max(rates.get(which, 0.0), rate)


def _listed(rates: dict[str, float]) -> str:
    return ", ".join(f"{name}: {rate:.0f}" for name, rate in rates.items())
