"""What the outside sees of a definition."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pytest

from sagaloom import RetryPolicy, SagaDefinition, define_saga
from sagaloom.describe import describe


@dataclass
class Order:
    since: datetime
    status: str = "new"


@dataclass
class OrderPlaced:
    order_id: str


def handler(saga: Any, event: Any, context: Any) -> list[Any]:
    return []


SAGA = (
    define_saga("order")
    .durability("t2")
    .correlate(lambda message: "k")
    .retry(RetryPolicy(maximum_attempts=3))
    .reuse("new_run")
    .version(2, migrate={1: lambda state: state})
    .state(Order(datetime(2026, 1, 31, tzinfo=UTC)))
    .invariant("is new", lambda state: True)
    .on(OrderPlaced, handler)
    .on("Paid", handler, starts=False, on_missing="discard")
    .compensate("Paid", handler)
    .compensate("Shipped", handler)
    .build()
)


def test_a_description_is_json() -> None:
    assert describe(SAGA) == json.loads(json.dumps(describe(SAGA)))


def test_a_description_has_the_facts_under_the_names_of_the_wire() -> None:
    described = describe(SAGA)

    schemas = [described.pop("stateSchema"), described["handledMessageTypes"][0].pop("schema")]
    assert [schema["$ref"] for schema in schemas] == ["#/$defs/Order", "#/$defs/OrderPlaced"]
    assert described.pop("graph")
    assert described == {
        "id": "order",
        "name": "order",
        "version": 2,
        "durabilityTier": "t2",
        "handledMessageTypes": [
            {"type": "OrderPlaced", "starts": True, "onMissing": "dead_letter"},
            {"type": "Paid", "starts": False, "onMissing": "discard", "schema": {}},
        ],
        "compensations": [{"type": "Paid", "schema": {}}, {"type": "Shipped", "schema": {}}],
        "correlations": ["*"],
        "signals": [],
        "updates": [],
        "queries": [],
        "joins": [],
        "statusField": "status",
        "description": "order",
        "topic": "default",
        "enabled": True,
        "paused": False,
        "entrypoint": "",
        "tags": [],
        "metadata": {},
        "retention": {"completedDays": None, "activeDays": None},
        "retry": {
            "maxAttempts": 3,
            "initialDelay": 1000,
            "maxDelay": 60000,
            "backoffMultiplier": 2.0,
            "jitter": 0.2,
            "nonRetryableErrorTypes": [],
        },
        "concurrency": None,
        "schedule": None,
        "timeouts": [],
        "pivots": [],
        "reuse": "new_run",
        "singleton": False,
        "invariants": ["is new"],
        "migratesFrom": [1],
        "initialState": {"since": "2026-01-31T00:00:00Z", "status": "new"},
        "fingerprint": SAGA.fingerprint,
    }


def test_the_graph_leads_from_start_over_types_to_compensations() -> None:
    graph = describe(SAGA)["graph"]

    assert [(edge["from"], edge["kind"], edge["to"]) for edge in graph["edges"]] == [
        ("start", "starts", "OrderPlaced"),
        ("instance", "continues", "Paid"),
        ("Paid", "compensates", "compensate Paid"),
    ]


TIMED = (
    define_saga("report")
    .schedule("0 3 * * *", timezone="Europe/Berlin", catch_up="none")
    .timeout("90s", message="Late")
    .timeout("2h", message="Later", name="second")
    .state({})
    .on("report:tick", handler)
    .on("Late", handler, starts=False)
    .on("Later", handler, starts=False)
    .build()
)


def test_a_description_tells_when_a_saga_ticks_and_when_its_runs_time_out() -> None:
    described = describe(TIMED)

    assert described["schedule"] == {
        "cron": "0 3 * * *",
        "timezone": "Europe/Berlin",
        "catchUp": "none",
        "messageType": "report:tick",
    }
    assert described["timeouts"] == [
        {"name": "timeout", "delay": 90_000, "messageType": "Late"},
        {"name": "second", "delay": 7_200_000, "messageType": "Later"},
    ]


def test_the_graph_shows_what_a_schedule_and_the_timeouts_send() -> None:
    edges = [(edge["from"], edge["kind"], edge["to"]) for edge in describe(TIMED)["graph"]["edges"]]

    assert edges[3:] == [
        ("schedule", "ticks", "report:tick"),
        ("timeout timeout", "times out", "Late"),
        ("timeout second", "times out", "Later"),
    ]


@pytest.mark.parametrize("saga", [SAGA, TIMED])
def test_every_edge_of_the_graph_joins_two_of_its_nodes(saga: SagaDefinition[Any]) -> None:
    graph = describe(saga)["graph"]

    nodes = {node["id"] for node in graph["nodes"]}
    assert {end for edge in graph["edges"] for end in (edge["from"], edge["to"])} <= nodes
