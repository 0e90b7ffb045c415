"""`GET /metrics`: what the runtime has counted and how it is now, in the text format of Prometheus.

Written by hand: the format is a line a number, and the numbers are kept by the runtime already, as plain integers of
its own loop. A client library would add a registry of the process beside them, with locks, and its own copy of each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from fastapi import Response

from sagaloom.engine.records import Disposition
from sagaloom.web.routes import RouteTable

if TYPE_CHECKING:
    from sagaloom.runtime import SagaRuntime

__all__ = ["METRICS_PATH", "add_metrics", "metrics_text"]

METRICS_PATH: Final = "/metrics"
_CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_FINAL: Final[tuple[Disposition, ...]] = ("applied", "ignored", "duplicate", "dead_lettered")

Sample = tuple[Mapping[str, str], float]


class _Family(NamedTuple):
    """One metric: its samples differ in their labels."""

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    samples: Iterable[Sample]


def add_metrics(table: RouteTable, runtime: SagaRuntime) -> None:
    """Serves the metrics of `runtime`."""

    @table.add("GET", METRICS_PATH, answer=object, tag="health", is_documented=False)
    async def _get_metrics() -> Response:
        return Response(metrics_text(runtime), headers={"content-type": _CONTENT_TYPE})


def metrics_text(runtime: SagaRuntime) -> str:
    """All metrics; looks only at memory. A name, its meaning and its labels are a promise to those who watch them."""
    lines: list[str] = []
    for family in _families(runtime):
        lines.append(f"# HELP {family.name} {family.help}")
        lines.append(f"# TYPE {family.name} {family.kind}")
        lines.extend(f"{family.name}{_labels(labels)} {_number(value)}" for labels, value in family.samples)
    return "\n".join(lines) + "\n"


def _families(runtime: SagaRuntime) -> list[_Family]:
    health, counters = runtime.health(), runtime.counters
    sagas = sorted(definition.id for definition in runtime.definitions)
    decided: list[Sample] = []
    failed: list[Sample] = []
    # Those that are counted, and those that could be: a series that begins at 0 shows its first step.
    for saga in sorted({*sagas, *(saga for saga, _ in counters.decided)}):
        decided += [({"saga": saga, "disposition": name}, counters.decided[saga, name]) for name in _FINAL]
        failed.append(({"saga": saga}, counters.decided[saga, "pending"]))
    return [
        _Family("sagaloom_info", "gauge", "Which version runs on which store.", [(_about(runtime), 1)]),
        _Family("sagaloom_ready", "gauge", "1 when messages are taken and applied.", [({}, health.ready)]),
        _Family(
            "sagaloom_store_problem",
            "gauge",
            "1 while the store does not take commits.",
            [({}, health.checks["store"] != "ok")],
        ),
        _Family("sagaloom_backlog", "gauge", "Messages waiting to be applied.", [({}, health.backlog)]),
        _Family(
            "sagaloom_oldest_waiting_seconds",
            "gauge",
            "How long the message whose turn is next has waited.",
            [({}, health.oldest_waiting_seconds)],
        ),
        _Family("sagaloom_outbox", "gauge", "Effects waiting to leave.", [({}, health.outbox)]),
        _Family(
            "sagaloom_stalled_lanes",
            "gauge",
            "Lanes that stand still behind a dead letter.",
            [({}, health.stalled_lanes)],
        ),
        _Family(
            "sagaloom_overdue_instances",
            "gauge",
            "Live instances older than their saga's active days, in the whole store, as of the last hour.",
            [({"saga": saga}, count) for saga, count in sorted(runtime.overdue.items())],
        ),
        _Family(
            "sagaloom_messages_accepted_total",
            "counter",
            "Messages that were new and became durable.",
            [({"saga": saga}, counters.accepted[saga]) for saga in sorted({*sagas, *counters.accepted})],
        ),
        _Family("sagaloom_messages_total", "counter", "Messages that are done with, by what they came to.", decided),
        _Family("sagaloom_attempts_failed_total", "counter", "Attempts that will be made again.", failed),
        _Family(
            "sagaloom_messages_throttled_total",
            "counter",
            "Messages that found no free slot of their concurrency key.",
            [({"saga": saga}, counters.throttled[saga]) for saga in sorted(runtime.definitions.limited)],
        ),
        _Family(
            "sagaloom_effects_total",
            "counter",
            "Attempts to deliver an effect, by what they came to.",
            [({"kind": kind, "outcome": end}, count) for (kind, end), count in sorted(counters.effects.items())],
        ),
        _Family("sagaloom_commits_total", "counter", "Commits of the store.", [({}, counters.commits)]),
        _Family(
            "sagaloom_commits_failed_total",
            "counter",
            "Commits that the store did not take.",
            [({}, counters.commits_failed)],
        ),
        _Family(
            "sagaloom_conflicts_total",
            "counter",
            "Units of commits that were refused and decided again.",
            [({}, counters.conflicts)],
        ),
    ]


def _about(runtime: SagaRuntime) -> Mapping[str, str]:
    return {"version": version("sagaloom"), "store": runtime.store.id, "store_id": runtime.store.store_id}


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))
