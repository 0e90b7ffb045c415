"""Line 4: what durability costs a publisher over HTTP.

64 keep-alive connections of another process, one request under way on each, against two servers in turns: the real one,
and the same app, route and runtime over a store that returns at once. That second one must have been busy: a client
that cannot keep up would make any ratio good. A third one, whose `publish` returns at once, tells what the route costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bench.harness import Bench, Child, Finding
from bench.workload import MESSAGES_PER_ORDER

__all__ = ["run"]

_CONNECTIONS = 64
_WARM_UP_ROUNDS = 3
_MUST = 0.4
_AIM = 0.7
_MUST_BUSY = 0.9


@dataclass(frozen=True)
class _Served:
    rate: float
    cpu: float
    """Of one core."""
    busy: float
    """The same, with the time that it waited for a core which somebody else had."""
    client_cpu: float
    batch: float
    cpu_us: float


def _serve(place: Path, mode: str, seconds: float) -> _Served:
    with (
        Child("bench.serving", mode, str(place / f"{mode}.db")) as server,
        Child("bench.publishing", str(server.hear()["port"]), str(_CONNECTIONS)) as client,
    ):
        client.ask(f"prepare w {_WARM_UP_ROUNDS * _CONNECTIONS}")
        went = client.ask("go")
        rounds = max(2, round(seconds / (went["ended"] - went["began"]) * _WARM_UP_ROUNDS))
        client.ask(f"prepare o {rounds * _CONNECTIONS}")
        server.ask("start")
        went = client.ask("go")
        used = server.ask("stop")
    messages = rounds * _CONNECTIONS * MESSAGES_PER_ORDER
    if went["answers"] != messages:
        raise RuntimeError(f"{went['answers']} answers to {messages} requests")
    wall = used["at"] - went["began"]
    return _Served(
        rate=messages / wall,
        cpu=used["cpu"] / used["wall"],
        busy=(used["cpu"] + used["waited"]) / used["wall"],
        client_cpu=went["cpu"] / (went["ended"] - went["began"]),
        batch=messages / used["commits"] if used["commits"] else 0.0,
        cpu_us=used["cpu"] / messages * 1_000_000,
    )


def run(bench: Bench) -> None:
    durable: list[_Served] = []
    instant: list[_Served] = []
    for _ in range(bench.rounds):
        with bench.place() as place:
            durable.append(_serve(place, "durable", bench.seconds))
            instant.append(_serve(place, "instant", bench.seconds))
    with bench.place() as place:
        echo = _serve(place, "echo", bench.seconds)
    best = max(durable, key=lambda served: served.rate)
    best_instant = max(instant, key=lambda served: served.rate)
    cpu_us = min(served.cpu_us for served in durable)
    instant_cpu_us = min(served.cpu_us for served in instant)
    bench.found(
        Finding(
            line="4",
            what="durable POST /publish, 64 connections, against a store that returns at once",
            ours=f"{best.rate:,.0f}/s",
            baseline=f"{best_instant.rate:,.0f}/s",
            value=best.rate / best_instant.rate,
            must=_MUST,
            aim=_AIM,
            note=f"batch {best.batch:.0f}, server had {best.cpu:.2f} core, client {best.client_cpu:.2f}; "
            f"CPU a request {cpu_us:.0f} us against {instant_cpu_us:.0f} us, {instant_cpu_us / cpu_us:.2f}x",
        )
    )
    bench.found(
        Finding(
            line="4",
            what="the same, against a publish that returns at once",
            ours=f"{best.rate:,.0f}/s",
            baseline=f"{echo.rate:,.0f}/s",
            value=best.rate / echo.rate,
        )
    )
    bench.found(
        Finding(
            line="4",
            what="check: share of the time that the server of the baseline wanted a core",
            ours=f"{max(served.busy for served in instant):.2f}",
            baseline="1.00",
            value=max(served.busy for served in instant),
            unit="",
            must=_MUST_BUSY,
            aim=_MUST_BUSY,
            note=f"it had {best_instant.cpu:.2f} core, the client {best_instant.client_cpu:.2f}",
        )
    )
